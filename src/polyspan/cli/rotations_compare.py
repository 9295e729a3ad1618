"""``polyspan rotations compare``: which representation of rotations a network learns best on files of one's own."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._pictures import check_drawing
from ._places import check_places
from .rotations import Convention, Kind, Order, Side, _look, _trajectory_side

COLUMNS = ("representation", "mean", "median", "99 %", "largest", "above 30", "above 90", "spread of the mean")


def compare(
    source: Path,
    *,
    targets: Path,
    from_: Annotated[Kind, Parameter(name="--from")],
    order: Order | None = None,
    sequence: str | None = None,
    degrees: Annotated[bool, Parameter(negative="")] = False,
    convention: Convention | None = None,
    representation: list[str] | None = None,
    seeds: int = 3,
    passes: int = 100,
    hidden: list[int] | None = None,
    held_out: float = 0.2,
    learning_rate: float = 1e-3,
    member: str | None = None,
    column: str | None = None,
    target_member: str | None = None,
    target_column: str | None = None,
    device: str = "cpu",
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Train the same small network with each representation of its output, and measure angles on rows held out.

    Parameters
    ----------
    source : Path
        Rows of features (.npy, .npz, .parquet, .arrow, .feather, .safetensors, .fvecs, .csv, .tsv).
    targets : Path
        The rotation of each row, in the same order and kinds of file.
    from_ : {"quaternion", "axis-angle", "euler", "rotation5d", "rotation6d", "rotation9d", "matrix"}
        What a row of --targets holds.
    order : {"wxyz", "xyzw"}
        Where the real part of quaternions stands; must be given for them.
    sequence : str
        Axes of Euler angles; must be given for them.
    degrees : bool
        Euler angles are in degrees; radians otherwise.
    convention : {"columns", "rows", "interleaved"}
        What the six numbers are.
    representation : list of str
        6d, 5d, 9d, quaternion, axis-angle or euler; all of them where left out.
    seeds : int
        Splits and starts.
    passes : int
        Over the training rows.
    hidden : list of int
        Widths of the hidden layers; 128 and 128 where left out.
    held_out : float
        Share of the rows that errors are measured on.
    learning_rate : float
        Of Adam.
    member : str
        Of an .npz or .safetensors file of features.
    column : str
        Vector column of a table of features.
    target_member : str
        As --member, of --targets.
    target_column : str
        As --column, of --targets.
    device : str
        "cpu", "cuda:0", or "auto".
    plot : Path
        Draw mean, 99th percentile and largest errors (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    from polyspan.io import read_array
    from polyspan.nn.rotation_comparison import compare_representations, plot_representations
    from polyspan.nn.rotation_head import SIZES

    check_drawing(plot, "--plot")
    check_places(plot, read=(source, targets))
    names = representation or list(SIZES)
    unknown = [name for name in names if name not in SIZES]
    if unknown:
        raise ValueError(f"--representation must be among {', '.join(SIZES)}, got {unknown[0]!r}")
    given = {"order": order, "sequence": sequence, "degrees": degrees or None, "convention": convention}
    side = _trajectory_side(from_, [], given)
    X = read_array(source, member=member, column=column)
    rows = read_array(targets, member=target_member, column=target_column)
    if len(X) != len(rows):
        raise ValueError(f"--targets must hold one rotation a row of {source.name}, {len(X)}, got {len(rows)}")
    for doubt in _look([(0, rows)], side, Side("rotation9d", {}), targets, complete=None):
        say(f"warning: {doubt}")
    found = compare_representations(
        X, side.to_matrix(rows, check=False), names, seeds=seeds, hidden=tuple(hidden or (128, 128)), max_iter=passes,
        held_out=held_out, learning_rate=learning_rate, device=device, label="training",
    )  # fmt: skip
    if plot is not None:
        plot_representations(found, plot)
    told = [
        {
            **{name: value for name, value in row._asdict().items() if name != "trials"},
            "share_above_30": sum(t.share_above_30 for t in row.trials) / len(row.trials),
            "share_above_90": sum(t.share_above_90 for t in row.trials) / len(row.trials),
        }
        for row in found
    ]
    if json:
        show_json({"rows": len(X), "seeds": seeds, "representations": told})
        return
    cells = [
        (
            str(row["representation"]),
            *(f"{row[name]:.3f}" for name in ("mean", "median", "p99", "max")),
            *(f"{row[name]:.2%}" for name in ("share_above_30", "share_above_90")),
            f"{row['spread']:.3f}",
        )
        for row in told
    ]
    show_table("Errors on rows held out, degrees", COLUMNS, cells)
