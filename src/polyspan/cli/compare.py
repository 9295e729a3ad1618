"""``polyspan compare``."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_places

SHOWN = 12
"""Groups of the table; the report has all."""


def compare(
    a: Path,
    b: Path,
    *,
    member_a: str | None = None,
    member_b: str | None = None,
    column_a: str | None = None,
    column_b: str | None = None,
    untrained_a: Path | None = None,
    untrained_b: Path | None = None,
    shuffles: int = 20,
    bootstraps: int = 50,
    rows_per_item: int = 1,
    clusters: int | None = None,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    report: Path | None = None,
    plot: Path | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Say which units of two networks are the same.

    Rows of both files are the same inputs in the same order, columns are units. Files are mapped, not read whole, so
    memory grows with units, not with rows. Beside each number stands what shuffled rows, a rotated layer and, where
    you give them, untrained networks reach. What follows ± is a standard error; where rows are positions of images or
    tokens of texts it is right only with --rows-per-item.

    Parameters
    ----------
    a : Path
        Activations of a layer of one network (.npy, .npz, .parquet, .arrow, .safetensors, .csv, .fvecs).
    b : Path
        Activations of a layer of the other.
    member_a : str
        Member of an .npz or .safetensors file.
    member_b : str
        Likewise for b.
    column_a : str
        Column of a Parquet or Arrow file.
    column_b : str
        Likewise for b.
    untrained_a : Path
        The same layer before training, to compare with; needs --untrained-b.
    untrained_b : Path
        Likewise for b.
    shuffles : int
        Times that rows are shuffled; 20 allow p down to 1/21, fewer than 19 tell nothing, 0 leaves them out.
    bootstraps : int
        Times that rows are drawn again for standard errors and the stability of the few-to-one choice; 0 leaves both
        out.
    rows_per_item : int
        So many rows in a row are positions of one input, in one order, and stay together wherever inputs are drawn or
        shuffled.
    clusters : int
        Groups of the many-to-many table; by the eigengap where not given.
    out : Path
        The matching, one row a unit of a: .csv or .parquet.
    report : Path
        Write the report as JSON here too.
    plot : Path
        Draw the correlations in matched order (.svg, .png or .pdf).
    seed : int
        Shuffles, the rotation and starts of the grouping.
    json : bool
        Print the report as JSON.
    """
    from polyspan.align import compare_networks
    from polyspan.io import read_array, write_json

    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out must end in .csv or .parquet, got {out}")
    if (untrained_a is None) != (untrained_b is None):
        raise ValueError("--untrained-a and --untrained-b must be given together, got one of them")
    if shuffles < 0:
        raise ValueError(f"--shuffles must be at least 0, got {shuffles}")
    if bootstraps < 0 or bootstraps == 1:
        raise ValueError(f"--bootstraps must be 0 or at least 2, got {bootstraps}")
    if rows_per_item < 1:
        raise ValueError(f"--rows-per-item must be at least 1, got {rows_per_item}")
    check_places(plot, read=(a, b, untrained_a, untrained_b), out=out, report=report)
    found = compare_networks(
        read_array(a, member=member_a, column=column_a),
        read_array(b, member=member_b, column=column_b),
        untrained=None if untrained_a is None else (untrained_a, untrained_b),
        nulls=("shuffle", "rotation") if shuffles else ("rotation",),
        n_shuffles=max(shuffles, 1),
        n_bootstraps=bootstraps,
        rows_per_item=rows_per_item,
        n_clusters="eigengap" if clusters is None else clusters,
        random_state=seed,
        label=f"comparing {a.name} and {b.name}",
    )[0]
    told: dict[str, Any] = found.to_json() | {"layer_in": str(a), "layer_out": str(b)}
    for warning in told["warnings"]:
        say(f"warning: {warning}")
    if out is not None:
        _write_matching(out, told["matching"])
        told["out"] = str(out)
    if plot is not None:
        from polyspan.align.unit_plots import plot_comparison

        plot_comparison(found, plot)
    if report is not None:
        write_json(report, told)
    if json:
        show_json(told)
    else:
        show_table("", ("what", "value"), _rows(told))


def _write_matching(path: Path, matching: list[dict[str, Any]]) -> None:
    import numpy as np

    from polyspan.io import write_columns

    def column(key: str, missing: float | int) -> Any:
        return np.array([missing if row[key] is None else row[key] for row in matching])

    write_columns(
        path,
        {
            "unit": column("unit", -1),
            "partner": column("partner", -1),
            "correlation": column("correlation", np.nan).astype(np.float64),
            "correlation_error": column("correlation_error", np.nan).astype(np.float64),
            "favourite": column("favourite", -1),
            "favourite_correlation": column("favourite_correlation", np.nan).astype(np.float64),
            "favourite_error": column("favourite_error", np.nan).astype(np.float64),
        },
    )


def _rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    def number(name: str) -> str:
        error = told["errors"].get(name)
        return f"{told[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")

    live = len(told["matching"]) - told["n_dead_in"]
    rows = [
        ("rows", str(told["n_rows"])),
        ("dead units", f"{told['n_dead_in']} and {told['n_dead_out']}"),
        (
            "one to one",
            f"mean correlation {number('mean_bipartite')}, {number('mean_held_out')} on held-out rows",
        ),
        ("favourites", f"mean correlation {number('mean_semi')}"),
    ]
    rows += [(f"one to one, {name}", f"{value:.3f}") for name, value in told["nulls"].items()]
    if told["p_value"] is not None:
        rows.append(
            ("against shuffles", f"p = {told['p_value']:.3f}, {told['n_above_null']} of {live} units above all")
        )
    rows += [
        ("unexplained by the best unit", number("unexplained_single")),
        ("unexplained by all units", number("unexplained_all")),
    ]
    rows += [
        (
            f"few to one, penalty {row['alpha']:g}",
            f"half squared error {row['half_mse']:.3f}, {row['n_units']:.1f} units"
            + ("" if row["stability"] is None else f", {row['stability']:.2f} of them the same when drawn again"),
        )
        for row in told["sparse"]
    ]
    groups = " ".join(f"({p},{q})" for p, q in told["clusters"][:SHOWN])
    more = f" and {len(told['clusters']) - SHOWN} more" if len(told["clusters"]) > SHOWN else ""
    rows.append(("groups (units of a, of b)", groups + more))
    if told["hierarchy"]:
        rows.append(("groups as a tree", _tree(told["hierarchy"])))
    rows.append(("CKA, SVCCA, PWCCA", f"{number('cka')}, {number('svcca')}, {number('pwcca')}"))
    return rows + ([("matching", told["out"])] if "out" in told else [])


def _tree(splits: list[dict[str, Any]]) -> str:
    """Return groups in brackets, as they were cut in two; of many groups the first cuts."""
    made = {0: ""}
    for number, split in enumerate(splits[: SHOWN - 1]):
        made |= {2 * number + 1 + i: "({},{})".format(*split[side]) for i, side in enumerate(("left", "right"))}
    for number in reversed(range(min(len(splits), SHOWN - 1))):
        made[splits[number]["node"]] = f"[{made[2 * number + 1]} {made[2 * number + 2]}]"
    return made[0]
