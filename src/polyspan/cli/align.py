"""``polyspan align fit``, ``apply`` and ``score``."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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
Metric = Literal["cosine", "dot", "euclidean"]
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
    metric: Metric = "cosine",
    shift: bool = True,
    rank: int | None = None,
    held_out: float = 0.2,
    source_member: str | None = None,
    target_member: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    source_id_column: str | None = None,
    target_id_column: str | None = None,
    source_table: str | None = None,
    target_table: str | None = None,
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
        Vectors of the items by the model you leave (.npy, .npz, .parquet, .arrow, .safetensors, .csv, .fvecs, .h5,
        .jsonl; word vectors: .vec, .txt, .bin of word2vec; a FAISS index; a folder of LanceDB).
    target : Path
        Vectors of the same items by the model you go to. Where both have ids or words, rows are paired by these and the
        common ones are the anchors; otherwise row by row.
    out : Path
        The fitted map, one .safetensors file.
    method : one of the families
        auto tries every family by cross-validated retrieval, but for relaxed-orthogonal, srip and forward-compatible,
        which are trained by many steps.
    metric : {"cosine", "dot", "euclidean"}
        How your store compares vectors: recall is by it, and auto chooses by it; cosine scales rows to length 1 first.
    shift : bool
        Fit the means as well (orthogonal, relaxed-orthogonal, srip and ridge).
    rank : int
        Keep only so many leading directions (orthogonal).
    held_out : float
        Share of the anchors that the report is measured on; 0 leaves the report out.
    source_member : str
        Member of an .npz or .safetensors file, or dataset of HDF5.
    target_member : str
        Likewise for the target.
    source_column : str
        Column of a Parquet, Arrow, JSON lines or CSV file, or of a table.
    target_column : str
        Likewise for the target.
    source_id_column : str
        Column of the ids; left out, id, if there is one.
    target_id_column : str
        Likewise for the target.
    source_table : str
        Table of a LanceDB folder.
    target_table : str
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

    check_target(out, "--out", ".safetensors")
    check_target(plot, "--plot", ".svg", ".png", ".pdf")
    for path in (source, target):
        _refuse_to_replace(out, path, "vectors")
    old = _read(source, source_member, source_column, source_id_column, source_table)
    new = _read(target, target_member, target_column, target_id_column, target_table)
    pairs = _paired(source, target, old, new)
    X, Y = pairs.X, pairs.Y
    if rank is not None and method not in ("auto", "orthogonal"):
        raise ValueError(f"--rank must go with --method orthogonal, got {rank} and --method {method}")
    if not shift and method in UNSHIFTED:
        raise ValueError(f"--no-shift must go with a method that fits means and can be without, got --method {method}")
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out must be at least 0 and below 1, got {held_out}")
    normalize = metric == "cosine"
    if normalize:
        for path, rows, places in ((source, X, pairs.source_rows), (target, Y, pairs.target_rows)):
            zero = np.flatnonzero(~np.any(rows, axis=1))
            if len(zero):
                row = zero[0] if places is None else places[zero[0]]
                raise ValueError(f"{path} must have no all-zero row with --metric cosine, got one at row {row}")
    families = _families(shift=shift, rank=rank, normalize=normalize, seed=seed)
    order = np.random.default_rng(seed).permutation(len(X))
    n_held = int(len(X) * held_out)
    held, kept = np.sort(order[:n_held]), np.sort(order[n_held:])
    table, chosen = [], str(method)
    if method == "auto":
        left_out = TRAINED | ({"mean-shift", "no-map"} if X.shape[1] != Y.shape[1] else set())
        usable = {k: v for k, v in families.items() if k not in left_out}
        with few_anchors_unsaid():
            choice = choose_aligner(
                X[kept], Y[kept], similarity=metric, candidates=usable, directions=("gallery",), random_state=seed
            )
        chosen = choice.table[0].aligner
        table = [row._asdict() for row in choice.table]
    aligner = families[chosen]
    report = {}
    with few_anchors_unsaid():
        # The report says it, or the line below.
        if n_held >= 2:
            judged = clone(aligner).fit(X[kept], Y[kept])
            report = alignment_report(judged, X[held], Y[held], metric=metric, random_state=seed)
        aligner.fit(X, Y)
    few = few_anchors(len(X), X.shape[1], Y.shape[1]) if chosen == "orthogonal" and not report else None
    doubts = [*report.get("warnings", []), *([few] if few else []), *_doubts(X, Y)]
    about = {
        "method": chosen,
        "metric": metric,
        "source": {"model": source_model, "dim": X.shape[1], "sha256": old.digest()},
        "target": {"model": target_model, "dim": Y.shape[1], "sha256": new.digest()},
        "paired_by": pairs.by,
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
        show_json(told | {"paired_by": pairs.by, "left_out": pairs.left_out, "warnings": doubts})
        return
    rows = [
        ("map", str(out)),
        ("method", chosen),
        ("anchors", str(len(X))),
        ("paired by", pairs.by),
        ("widths", f"{X.shape[1]} to {Y.shape[1]}"),
    ]
    rows += [(f"cross-validated {r['aligner']}", f"{r['score']:.4f}") for r in table]
    show_table("", ("what", "value"), rows + _report_rows(report))


class _Read(NamedTuple):
    """Vectors (n, d) with the ids (n,) by which their items are known, if there are any."""

    path: Path
    rows: Any
    ids: Any
    is_file: bool

    def digest(self) -> str:
        """Return the digest of the file, or of the vectors where the place is a folder."""
        from polyspan.io import digest_array, digest_file

        return digest_file(self.path) if self.is_file else digest_array(self.rows)


def _read(path: Path, member: str | None, column: str | None, id_column: str | None, table: str | None) -> _Read:
    """Read vectors from a file, a FAISS index or a LanceDB table, with their ids where it has any."""
    import contextlib

    import numpy as np

    from polyspan.io import EmbeddingReader, read_array

    indexed = path.suffix.lower() in (".faiss", ".index")
    if path.is_dir() or indexed:
        from polyspan.integrations import open_vector_table

        if member is not None:
            raise ValueError(f"a member must be of a file of arrays, got {member!r} for {path}")
        if indexed and (column, id_column, table) != (None, None, None):
            raise ValueError(f"a column or table must be of a store that has some, got one for {path}")
        store = open_vector_table(path, table=table, column=column, id_column=id_column)
        batches = list(store.rows())
        rows = np.concatenate([batch.rows for batch in batches])
        named = [part for part in (batch.ids if indexed else batch.keys for batch in batches) if part is not None]
        ids = np.concatenate(named) if len(named) == len(batches) else None
        return _Read(path, rows.astype(np.float32) if rows.dtype == np.float16 else rows, ids, indexed)
    if table is not None:
        raise ValueError(f"a table must be of a folder of LanceDB, got {table!r} for {path}")
    if path.suffix.lower() in (".mat", ".csv", ".tsv") and column is None and id_column is None:
        return _Read(path, *_plain(path, member), True)
    reader = EmbeddingReader(path, member=member, column=column, id_column=id_column)
    if reader.id_column is None:
        return _Read(path, read_array(path, member=member, column=column), None, True)
    with contextlib.closing(reader.batches()) as found:
        batches = list(found)
    rows, ids = (np.concatenate(part) for part in zip(*((b.rows, b.ids) for b in batches), strict=True))
    return _Read(path, rows, ids, True)


def _plain(path: Path, member: str | None) -> tuple[Any, Any]:
    """Read a file that may hold plain numbers only, or a text table whose cells are lists, with its ids."""
    import numpy as np

    from polyspan.errors import WrongContent
    from polyspan.io import EmbeddingReader, read_array

    rows = read_array(path, member=member)
    if path.suffix.lower() == ".mat":
        return rows, None
    try:
        reader = EmbeddingReader(path)
    except WrongContent:
        return rows, None  # no column of lists: numbers alone
    if reader.id_column is None:
        return rows, None
    return rows, np.concatenate([batch.ids for batch in reader.read()])


class _Pairs(NamedTuple):
    """Anchors: row i of ``X`` and of ``Y`` embed one item; ``*_rows`` say which rows of the files, None for all."""

    X: Any
    Y: Any
    by: str
    left_out: dict[str, int]
    source_rows: Any = None
    target_rows: Any = None


def _paired(source: Path, target: Path, old: _Read, new: _Read) -> _Pairs:
    """Pair rows by their ids where both sides have some, else one by one, and say what is left out."""
    import numpy as np

    none_left = {"source": 0, "target": 0}
    if old.ids is None or new.ids is None:
        if len(old.rows) != len(new.rows):
            raise ValueError(
                f"source and target must have one row an item, got {len(old.rows)} rows in {source} and "
                f"{len(new.rows)} in {target}"
            )
        return _Pairs(old.rows, new.rows, "row", none_left)
    if old.ids.dtype.kind != new.ids.dtype.kind:
        kinds = ["text" if ids.dtype.kind in "UO" else "whole numbers" for ids in (old.ids, new.ids)]
        raise ValueError(
            f"source and target must have ids of one kind, got {kinds[0]} in {source} and {kinds[1]} in {target}"
        )
    if np.array_equal(old.ids, new.ids):
        return _Pairs(old.rows, new.rows, "id", none_left)
    for path, ids in ((source, old.ids), (target, new.ids)):
        values, first = np.unique(ids, return_index=True)
        if len(values) < len(ids):
            again = np.setdiff1d(np.arange(len(ids)), first)[0]
            raise ValueError(f"{path} must have every id once, got {ids[again].item()!r} again at row {again}")
    common, a, b = np.intersect1d(old.ids, new.ids, assume_unique=True, return_indices=True)
    if len(common) < 2:
        raise ValueError(
            f"source and target must have at least 2 ids in common, got {len(common)} of {len(old.ids)} in {source} "
            f"and {len(new.ids)} in {target}"
        )
    order = np.argsort(a)
    a, b = a[order], b[order]
    say(
        f"paired by id: {len(common)} anchors are in both, of {len(old.ids)} rows in {source} and {len(new.ids)} in "
        f"{target}"
    )
    left_out = {"source": len(old.ids) - len(common), "target": len(new.ids) - len(common)}
    return _Pairs(old.rows[a], new.rows[b], "id", left_out, a, b)


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
    rows += [("recall is by", report["metric"])]
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
        Vectors (.npy, .npz, .parquet, .arrow, .safetensors, .h5, .jsonl, .csv of lists; word vectors: .vec, .txt, .bin
        of word2vec).
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
    metric: Metric | None = None,
    source_member: str | None = None,
    target_member: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    source_id_column: str | None = None,
    target_id_column: str | None = None,
    source_table: str | None = None,
    target_table: str | None = None,
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
        Vectors of the same items by the model you go to; paired by ids where both have some, as by ``align fit``.
    k : int
        Neighbours that recall looks at.
    metric : {"cosine", "dot", "euclidean"}
        How your store compares vectors: recall is by it; left out, the metric that the map was fitted for.
    source_member : str
        Member of an .npz or .safetensors file.
    target_member : str
        Likewise for the target.
    source_column : str
        Column of a table.
    target_column : str
        Likewise for the target.
    source_id_column : str
        Column of the ids; left out, id, if there is one.
    target_id_column : str
        Likewise for the target.
    source_table : str
        Table of a LanceDB folder.
    target_table : str
        Likewise for the target.
    json : bool
        Print JSON.
    """
    from polyspan.align import alignment_report, load_aligner

    aligner, about = load_aligner(map)
    pairs = _paired(
        source,
        target,
        _read(source, source_member, source_column, source_id_column, source_table),
        _read(target, target_member, target_column, target_id_column, target_table),
    )
    X, Y = pairs.X, pairs.Y
    wanted = (aligner.n_features_in_, aligner._n_features_out)
    if (X.shape[1], Y.shape[1]) != wanted or len(X) != len(Y):
        raise ValueError(
            f"source and target must have widths {wanted} and one row an item, got {X.shape} and {Y.shape}"
        )
    report = alignment_report(aligner, X, Y, k=k, metric=metric or about.get("metric") or "cosine")
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    if json:
        show_json(report | {"paired_by": pairs.by, "left_out": pairs.left_out})
    else:
        show_table("", ("what", "value"), _report_rows(report))
