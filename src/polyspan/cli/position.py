"""``polyspan images position``: fit, apply and score the removal of position from dense features."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import show_json, show_table


def fit(
    features: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    grid: tuple[int, int] | None = None,
    method: str = "leace",
    targets: str | None = None,
    order: int = 3,
    rounds: int = 9,
    alpha: float = 1.0,
    member: str | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Find what tells the position of patches in dense features, and keep the map that takes it out.

    Parameters
    ----------
    features : Path
        Features of patches without class and register tokens, (images, h, w, d) or (images, patches, d): .npy, .npz or
        .safetensors. Files are mapped.
    out : Path
        Where the map goes, .safetensors.
    grid : tuple[int, int]
        Height and width in patches; left out, a square.
    method : str
        leace (at once), rasa (in rounds, as published) or position_mean (needs the same grid again).
    targets : str
        What of position goes: row_col, row, or cosine (smooth functions of both); left out, cosine for leace and
        row_col else.
    order : int
        Half waves of the cosines along each side, at most.
    rounds : int
        For rasa.
    alpha : float
        Ridge penalty, in rows.
    member : str
        Which array of an .npz or .safetensors file.
    plot : Path
        Picture of what each place tells before and after: .svg, .png or .pdf.
    json : bool
        Print the report as JSON.
    """
    from polyspan.cluster import PositionalDisentangler
    from polyspan.cluster.position_plots import plot_position
    from polyspan.io import digest_file, picture_path

    if plot is not None:
        picture_path(plot)
    X = _read(features, member)
    targets = targets or ("cosine" if method == "leace" else "row_col")
    made = PositionalDisentangler(rounds, method=method, targets=targets, order=order, alpha=alpha)
    made.fit(X, grid=grid)
    made.save(out, features=features.name, digest=digest_file(features))
    if plot is not None:
        plot_position(made, X, plot, grid=grid)
    told = {
        "images": len(X),
        "rows": made.n_rows_seen_,
        "directions": 0 if method == "position_mean" else int(made.basis_.shape[1]),
        "rounds": made.n_rounds_,
        "r2_curve": [float(r) for r in made.r2_curve_],
        "out": str(out),
    }
    _show(told, json)


def apply(
    features: Path,
    fitted: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    grid: tuple[int, int] | None = None,
    member: str | None = None,
    json: bool = False,
) -> None:
    """Take position out of features by a map that was kept.

    Parameters
    ----------
    features : Path
        Features as for fit, or rows (n, d) of any number in a .npy file, which are streamed.
    fitted : Path
        What fit wrote.
    out : Path
        Where the features go, in their shape.
    grid : tuple[int, int]
        For position_mean, where patches are no square.
    member : str
        Which array of an .npz or .safetensors file.
    json : bool
        Print the report as JSON.
    """
    from polyspan.cluster import PositionalDisentangler
    from polyspan.io import digest_file, transform_file, write_array

    if out.resolve() == features.resolve():
        raise ValueError(f"--out must be another file than the features, got {out}")
    made = PositionalDisentangler.load(fitted)
    X = _read(features, member)
    if X.ndim == 2:
        d = made.n_features_in_
        transform_file(features, out, made.transform, dim=d, member=member, fingerprint=digest_file(fitted))
    else:
        write_array(out, made.transform(X, grid=grid))
    _show({"shape": list(X.shape), "out": str(out)}, json)


def score(
    features: Path,
    *,
    cleaned: Path | None = None,
    grid: tuple[int, int] | None = None,
    member: str | None = None,
    json: bool = False,
) -> None:
    """Measure how well position can be told from features: R² of ridge regression on images it has not seen.

    Parameters
    ----------
    features : Path
        Features as for fit.
    cleaned : Path
        The same features after apply, to compare with.
    grid : tuple[int, int]
        Height and width in patches; left out, a square.
    member : str
        Which array of an .npz or .safetensors file.
    json : bool
        Print the report as JSON.
    """
    from polyspan.cluster import position_r2

    told = {"r2": position_r2(_read(features, member), grid=grid)}
    if cleaned is not None:
        told["r2_cleaned"] = position_r2(_read(cleaned, member), grid=grid)
    _show(told, json)


def _read(path: Path, member: str | None) -> Any:
    from polyspan.io import read_array

    return read_array(path, member=member, ndim=None)


def _show(told: dict[str, Any], json: bool) -> None:
    if json:
        show_json(told)
        return

    def word(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(word(part) for part in value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    show_table("", ("what", "value"), [(name, word(value)) for name, value in told.items()])
