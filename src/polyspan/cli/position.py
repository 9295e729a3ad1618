"""``polyspan images position``: fit, apply and score the removal of position from dense features."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_places

ARRAYS = (".npy", ".npz", ".safetensors")


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
    from polyspan.io import digest_file

    check_places(plot, read=(features,), out=out)
    if out.suffix.lower() != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out.name!r}")
    X = _read(features, member, grid)
    targets = targets or ("cosine" if method == "leace" else "row_col")
    made = PositionalDisentangler(rounds, method=method, targets=targets, order=order, alpha=alpha)
    made.fit(X, grid=grid)
    made.save(out, features=features.name, digest=digest_file(features))
    if plot is not None:
        plot_position(made, X, plot, grid=grid)
    told = {
        "method": method,
        "targets": targets,
        "images": len(X),
        "rows": made.n_rows_seen_,
        "directions": 0 if method == "position_mean" else int(made.basis_.shape[1]),
        "rounds": made.n_rounds_,
        "r2_curve": [float(r) for r in made.r2_curve_],
        "out": str(out),
    }
    if not json:
        told["method"] = _told_of(method, targets, order)
        del told["targets"]
        each = " each round" if method == "rasa" else ""
        told = {f"R² of the targets, before and after{each}" if k == "r2_curve" else k: v for k, v in told.items()}
    _show(told, json)


def _told_of(method: str, targets: str, order: int) -> str:
    """Say what was taken out, and how many numbers a position in the grid is to it."""
    if method == "position_mean":
        return "position_mean"
    count = {"row_col": 2, "row": 1, "cosine": (order + 1) ** 2 - 1}[targets]
    return f"{method}, {count} targets: {targets}" + (f" of order {order}" if targets == "cosine" else "")


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

    check_places(read=(features, fitted), out=out)
    made = PositionalDisentangler.load(fitted)
    X = _read(features, member, grid, rows=True)
    if X.ndim == 2 and made.method == "position_mean":
        raise ValueError(
            f"features must be (images, h, w, d) or (images, patches, d) for position_mean, got rows {X.shape} "
            f"without places in {features.name}"
        )
    if X.ndim > 2 and out.suffix.lower() not in ARRAYS:
        raise ValueError(f"--out must end in one of {', '.join(ARRAYS)} for features of images, got {out.name!r}")
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

    Two images are enough to measure; of fewer than eight it is said that the number hangs on chance.

    Parameters
    ----------
    features : Path
        Features as for fit.
    cleaned : Path
        The same features after apply, in the same shape, to compare with.
    grid : tuple[int, int]
        Height and width in patches; left out, a square.
    member : str
        Which array of an .npz or .safetensors file.
    json : bool
        Print the report as JSON.
    """
    from polyspan.cluster import position_r2
    from polyspan.cluster.positional_disentangling import LEAST_IMAGES

    X = _read(features, member, grid)
    told: dict[str, Any] = {"images": len(X), "r2": position_r2(X, grid=grid)}
    if cleaned is not None:
        Y = _read(cleaned, member, grid)
        if Y.shape != X.shape:
            raise ValueError(
                f"--cleaned must have the shape of the features, {X.shape} in {features.name}, "
                f"got {Y.shape} in {cleaned.name}"
            )
        told["r2_cleaned"] = position_r2(Y, grid=grid)
    few = f"R² of {len(X)} images hangs on chance: give at least {LEAST_IMAGES}"
    if len(X) < LEAST_IMAGES:
        say(f"warning: {few}")
    _show(told | ({"warnings": [few] if len(X) < LEAST_IMAGES else []} if json else {}), json)


def _read(path: Path, member: str | None, grid: tuple[int, int] | None, *, rows: bool = False) -> Any:
    """Return features of patches, (images, h, w, d) or (images, patches, d), or also rows (n, d) where they will do."""
    from polyspan.io import read_array

    X = read_array(path, member=member, ndim=None)
    if X.ndim not in (3, 4) and not (rows and X.ndim == 2):
        also = " or rows (n, d)" if rows else ""
        raise ValueError(
            f"features must be (images, h, w, d) or (images, patches, d){also}, got shape {X.shape} in {path}"
        )
    if grid is None and X.ndim == 4 and X.shape[2] == X.shape[3] != X.shape[1]:
        raise ValueError(
            f"features must be (images, h, w, d), but those of {path.name} look like (images, d, h, w), got shape "
            f"{X.shape}; move the second axis last, or give --grid {X.shape[1]} {X.shape[2]} if that is the grid"
        )
    if grid is not None and X.ndim == 4 and tuple(grid) != X.shape[1:3]:
        raise ValueError(f"--grid must be that of the features, {X.shape[1:3]}, or be left out, got {tuple(grid)}")
    return X


def _show(told: dict[str, Any], json: bool) -> None:
    if json:
        show_json(told)
        return

    def word(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(word(part) for part in value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    show_table("", ("what", "value"), [(name, word(value)) for name, value in told.items()])
