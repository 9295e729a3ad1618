"""``polyspan align fit``, ``apply`` and ``score``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import check_target, say, show_json, show_table

Method = Literal[
    "auto",
    "orthogonal",
    "relaxed-orthogonal",
    "srip",
    "ridge",
    "mean-shift",
    "residual-mlp",
    "forward-compatible",
    "no-map",
]
TRAINED = {"relaxed-orthogonal", "srip", "forward-compatible"}
"""What auto leaves out: methods trained by many steps."""
UNSHIFTED = {"mean-shift", "residual-mlp", "forward-compatible", "no-map"}
"""What --no-shift means nothing for."""


def fit(
    source: Path,
    target: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    method: Method = "orthogonal",
    metric: Literal["cosine", "dot"] = "cosine",
    shift: bool = True,
    rank: int | None = None,
    held_out: float = 0.2,
    source_member: str | None = None,
    target_member: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    source_model: str = "",
    target_model: str = "",
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Fit a map on items that both models have embedded.

    The map is judged on anchors held out, then fitted again on all of them and written.

    Parameters
    ----------
    source : Path
        Vectors of the items by the model you leave (.npy, .npz, .parquet, .arrow, .safetensors, .csv, .fvecs).
    target : Path
        Vectors of the same items, row by row, by the model you go to.
    out : Path
        The fitted map, one .safetensors file.
    method : one of the families
        auto tries every family by cross-validated retrieval, but for relaxed-orthogonal, srip and forward-compatible,
        which are trained by many steps.
    metric : {"cosine", "dot"}
        How your store compares vectors; cosine scales rows to length 1 first.
    shift : bool
        Fit the means as well (orthogonal, relaxed-orthogonal, srip and ridge).
    rank : int
        Keep only so many leading directions (orthogonal).
    held_out : float
        Share of the anchors that the report is measured on; 0 leaves the report out.
    source_member : str
        Member of an .npz or .safetensors file.
    target_member : str
        Likewise for the target.
    source_column : str
        Column of a Parquet, Arrow or CSV file.
    target_column : str
        Likewise for the target.
    source_model : str
        Name of the model you leave, kept in the file.
    target_model : str
        Name of the model you go to; a map is refused where the names do not match.
    seed : int
        Which anchors are held out.
    plot : Path
        Draw singular values and cosines before and after (.svg, .png or .pdf).
    json : bool
        Print the report as JSON.
    """
    import numpy as np
    from sklearn.base import clone

    from polyspan.align import alignment_report, choose_aligner
    from polyspan.align.orthogonal_map import few_anchors, few_anchors_unsaid
    from polyspan.io import digest_file, read_array

    check_target(out, "--out", ".safetensors")
    check_target(plot, "--plot", ".svg", ".png", ".pdf")
    for path in (source, target):
        _refuse_to_replace(out, path, "vectors")
    X = read_array(source, member=source_member, column=source_column)
    Y = read_array(target, member=target_member, column=target_column)
    if len(X) != len(Y):
        raise ValueError(
            f"source and target must have one row an item, got {len(X)} rows in {source} and {len(Y)} in {target}"
        )
    if rank is not None and method not in ("auto", "orthogonal"):
        raise ValueError(f"--rank must go with --method orthogonal, got {rank} and --method {method}")
    if not shift and method in UNSHIFTED:
        raise ValueError(f"--no-shift must go with a method that fits means and can be without, got --method {method}")
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out must be at least 0 and below 1, got {held_out}")
    normalize = metric == "cosine"
    if normalize:
        for path, rows in ((source, X), (target, Y)):
            zero = np.flatnonzero(~np.any(rows, axis=1))
            if len(zero):
                raise ValueError(f"{path} must have no all-zero row with --metric cosine, got one at row {zero[0]}")
    families = _families(shift=shift, rank=rank, normalize=normalize, seed=seed)
    order = np.random.default_rng(seed).permutation(len(X))
    n_held = int(len(X) * held_out)
    held, kept = np.sort(order[:n_held]), np.sort(order[n_held:])
    table, chosen = [], str(method)
    if method == "auto":
        left_out = TRAINED | ({"mean-shift", "no-map"} if X.shape[1] != Y.shape[1] else set())
        usable = {k: v for k, v in families.items() if k not in left_out}
        with few_anchors_unsaid():
            choice = choose_aligner(X[kept], Y[kept], candidates=usable, directions=("gallery",), random_state=seed)
        chosen = choice.table[0].aligner
        table = [row._asdict() for row in choice.table]
    aligner = families[chosen]
    report = {}
    with few_anchors_unsaid():
        # The report says it, or the line below.
        if n_held >= 2:
            report = alignment_report(clone(aligner).fit(X[kept], Y[kept]), X[held], Y[held], random_state=seed)
        aligner.fit(X, Y)
    few = few_anchors(len(X), X.shape[1], Y.shape[1]) if chosen == "orthogonal" and not report else None
    doubts = [*report.get("warnings", []), *([few] if few else []), *_doubts(X, Y)]
    about = {
        "method": chosen,
        "metric": metric,
        "source": {"model": source_model, "dim": X.shape[1], "sha256": digest_file(source)},
        "target": {"model": target_model, "dim": Y.shape[1], "sha256": digest_file(target)},
        "held_out": report,
    }
    aligner.save(out, **about)
    if plot is not None:
        from polyspan.align.plots import plot_alignment

        plot_alignment(aligner, X, Y, plot)
    for warning in doubts:
        say(f"warning: {warning}")
    if json:
        told = {"map": str(out), "method": chosen, "n_anchors": len(X), "held_out": report, "table": table}
        show_json(told | {"warnings": doubts})
        return
    rows = [
        ("map", str(out)),
        ("method", chosen),
        ("anchors", str(len(X))),
        ("widths", f"{X.shape[1]} to {Y.shape[1]}"),
    ]
    rows += [(f"cross-validated {r['aligner']}", f"{r['score']:.4f}") for r in table]
    show_table("", ("what", "value"), rows + _report_rows(report))


def _refuse_to_replace(out: Path, read: Path, what: str) -> None:
    """Refuse a result that would take the place of what is read."""
    if out.exists() and read.exists() and out.samefile(read):
        raise ValueError(f"--out must be another file than the {what} it is made of, got {out} twice")


def _doubts(X: Any, Y: Any) -> list[str]:
    """Say what of the anchors makes one doubt, whatever the map."""
    import numpy as np

    said = []
    if X.shape == Y.shape and np.array_equal(X, Y):
        said.append("source and target hold the same vectors: there is nothing to align")
    repeated = len(X) - len(np.unique(X, axis=0))
    if repeated:
        said.append(f"{repeated} of {len(X)} anchors repeat others: what is held out may have been fitted on")
    return said


def _families(*, shift: bool, rank: int | None, normalize: bool, seed: int):
    from polyspan.align import (
        ForwardCompatibleMap,
        IdentityMap,
        MeanShift,
        OrthogonalMap,
        RelaxedOrthogonalAdapter,
        ResidualMLPMap,
        RidgeMap,
    )

    return {
        "orthogonal": OrthogonalMap(shift=shift, rank=rank, normalize=normalize),
        "relaxed-orthogonal": RelaxedOrthogonalAdapter(shift=shift, normalize=normalize, random_state=seed),
        "srip": RelaxedOrthogonalAdapter("srip", shift=shift, normalize=normalize, random_state=seed),
        "ridge": RidgeMap(shift=shift, normalize=normalize),
        "mean-shift": MeanShift(normalize=normalize),
        "residual-mlp": ResidualMLPMap(normalize=normalize, random_state=seed),
        "forward-compatible": ForwardCompatibleMap(normalize=normalize, random_state=seed),
        "no-map": IdentityMap(normalize=normalize),
    }


def _report_rows(report: dict) -> list[tuple[str, str]]:
    if not report:
        return []
    cosine = report["cosine"]
    before = "-" if cosine["before"] is None else f"{cosine['before']:.3f}"
    rows = [
        ("held out", f"{report['n']} items"),
        ("cosine", f"{before} before, {cosine['after']:.3f} after"),
    ]
    rows += [(name, f"{value:.3f}") for name, value in report["recall"].items()]
    return [*rows, ("unexplained", f"{report['unexplained']:.3f}"), ("unpaired?", f"p = {report['pairing_p']:.3f}")]


def apply(
    map: Path,
    source: Annotated[Path, Parameter(name=("--source", "--in"))],
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    member: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    batch_rows: int = 16384,
    inverse: Annotated[bool, Parameter(negative="")] = False,
    source_model: str = "",
    json: bool = False,
) -> None:
    """Carry a file of vectors of any size through a map.

    Batches are streamed, so memory does not grow with the file; the source is never changed. With an .npy target a
    killed run goes on where it stopped.

    Parameters
    ----------
    map : Path
        A map that ``polyspan align fit`` wrote.
    source : Path
        Vectors (.npy, .npz, .parquet, .arrow, .safetensors).
    out : Path
        Where the carried vectors go; the suffix says the format. Ids of a table are kept.
    member : str
        Member of an .npz or .safetensors file.
    column : str
        Vector column of a table.
    id_column : str
        Id column of a table.
    batch_rows : int
        Rows a batch.
    inverse : bool
        Go back from the target's space.
    source_model : str
        Name of the model that made the vectors; refused where the map is for another.
    json : bool
        Print JSON.
    """
    import time

    from polyspan.align import load_aligner
    from polyspan.errors import WrongContent
    from polyspan.io import EmbeddingReader, digest_file, transform_file
    from polyspan.run import Progress

    _refuse_to_replace(out, map, "map")
    aligner, about = load_aligner(map)
    side = "target" if inverse else "source"
    wanted = about.get(side, {}).get("model", "")
    if source_model and wanted and source_model != wanted:
        raise WrongContent(
            map, found=f"a map for vectors of {wanted!r}", expected=f"one for vectors of {source_model!r}"
        )
    step = aligner.inverse_transform if inverse else aligner.transform
    dim = aligner.n_features_in_ if inverse else aligner._n_features_out
    start = time.perf_counter()
    places: dict[str, Any] = {"member": member, "column": column, "id_column": id_column}
    n_rows = EmbeddingReader(source, **places).n_rows
    try:
        with Progress(f"carrying {source.name}", n_rows) as shown:
            rows = transform_file(
                source,
                out,
                step,
                dim=dim,
                **places,
                batch_rows=batch_rows,
                fingerprint=f"{digest_file(map)}:{'inverse' if inverse else 'forward'}",
                progress=lambda done, _: shown.advance(done - shown.count),
            )
    except ValueError as error:
        # The map sees a batch; whoever has the file wants the row of it.
        zero = _all_zero_row(EmbeddingReader(source, **places)) if aligner.normalize and not inverse else None
        if zero is None:
            raise
        raise ValueError(f"{source} must have no all-zero row for this map, got one at row {zero}") from error
    seconds = time.perf_counter() - start
    if json:
        show_json({"out": str(out), "rows": rows, "dim": dim, "wall_s": seconds})
    else:
        show_table(
            "",
            ("what", "value"),
            [("out", str(out)), ("rows", str(rows)), ("dim", str(dim)), ("seconds", f"{seconds:.2f}")],
        )


def _all_zero_row(reader: Any) -> int | None:
    """Return the number of the first row without a direction, or None."""
    for batch in reader.read():
        zero = ~batch.rows.any(axis=1)
        if zero.any():
            return batch.start + int(zero.argmax())
    return None


def score(
    map: Path,
    source: Path,
    target: Path,
    *,
    k: Annotated[int, Parameter(name=("-k", "--k"))] = 10,
    source_member: str | None = None,
    target_member: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    json: bool = False,
) -> None:
    """Measure a map on paired vectors it has not seen.

    Parameters
    ----------
    map : Path
        A map that ``polyspan align fit`` wrote.
    source : Path
        Vectors by the model you leave.
    target : Path
        Vectors of the same items by the model you go to.
    k : int
        Neighbours that recall looks at.
    source_member : str
        Member of an .npz or .safetensors file.
    target_member : str
        Likewise for the target.
    source_column : str
        Column of a table.
    target_column : str
        Likewise for the target.
    json : bool
        Print JSON.
    """
    from polyspan.align import alignment_report, load_aligner
    from polyspan.io import read_array

    aligner, _ = load_aligner(map)
    X = read_array(source, member=source_member, column=source_column)
    Y = read_array(target, member=target_member, column=target_column)
    wanted = (aligner.n_features_in_, aligner._n_features_out)
    if (X.shape[1], Y.shape[1]) != wanted or len(X) != len(Y):
        raise ValueError(
            f"source and target must have widths {wanted} and one row an item, got {X.shape} and {Y.shape}"
        )
    report = alignment_report(aligner, X, Y, k=k)
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    if json:
        show_json(report)
    else:
        show_table("", ("what", "value"), _report_rows(report))
