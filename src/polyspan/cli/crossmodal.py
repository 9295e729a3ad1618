"""``polyspan crossmodal fit``, ``match`` and ``retrieve``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import check_target, say, show_json, show_table
from ._places import check_places

Method = Literal["affine", "local_cka", "cosine"]


def fit(
    source: Path,
    target: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    components: str = "auto",
    method: Method = "affine",
    reg: float = 1e-3,
    normalize: Annotated[bool, Parameter(negative="")] = False,
    held_out: float = 0.2,
    source_member: str | None = None,
    target_member: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    batch_rows: int = 16384,
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Find the subspaces in which two spaces agree, from items embedded in both.

    The subspaces are judged on anchors held out and against shuffled pairs, then fitted again on all anchors and
    written. With --held-out 0 and a number of --components the files are streamed, in memory that does not grow.

    Parameters
    ----------
    source : Path
        Vectors of the items in the first space (.npy, .npz, .parquet, .arrow, .safetensors), such as captions.
    target : Path
        Vectors of the same items, row by row, in the second space, such as shapes.
    out : Path
        The fitted subspaces, one .safetensors file.
    components : str
        Dimension of the subspaces: a number, auto (by held-out ranking) or all.
    method : {"affine", "local_cka", "cosine"}
        How pairs are scored in the subspaces; match and retrieve can take another.
    reg : float
        Ridge, as a share of each space's mean variance; raise it where anchors are few.
    normalize : bool
        Scale vectors to length 1 first.
    held_out : float
        Share of the anchors that the report is measured on; 0 leaves the report out.
    source_member : str
        Member of an .npz or .safetensors file.
    target_member : str
        Likewise for the target.
    source_column : str
        Vector column of a table.
    target_column : str
        Likewise for the target.
    batch_rows : int
        Rows a batch, where files are streamed.
    seed : int
        Which anchors are held out.
    plot : Path
        Draw correlations and scores by dimension, measured on the anchors held out (.svg, .png or .pdf).
    json : bool
        Print the report as JSON.
    """
    import warnings

    from polyspan.align import SubspaceAligner
    from polyspan.io import EmbeddingReader, digest_file

    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out must be at least 0 and below 1, got {held_out}")
    if plot is not None and not held_out:
        raise ValueError("--plot must go with --held-out above 0: it shows what anchors held out say")
    check_target(out, "--out", ".safetensors")
    check_places(plot, read=(source, target), out=out)
    names = (source_member, source_column), (target_member, target_column)
    readers = [
        EmbeddingReader(path, member=member, column=column, batch_rows=batch_rows)
        for path, (member, column) in zip((source, target), names, strict=True)
    ]
    n = readers[0].n_rows
    if n != readers[1].n_rows:
        raise ValueError(
            f"source and target must have one row an item, got {n} rows in {source} and {readers[1].n_rows} in {target}"
        )
    size = _components(components)
    aligner = SubspaceAligner(size, method=method, reg=reg, normalize=normalize, random_state=seed)
    report: dict[str, Any] = {}
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if held_out or size == "auto":
            from polyspan.io import read_array

            X, Y = (
                read_array(path, member=member, column=column)
                for path, (member, column) in zip((source, target), names, strict=True)
            )
            if held_out:
                report = _judge(aligner, X, Y, held_out=held_out, seed=seed, plot=plot)
            aligner.fit(X, Y)
        else:
            batches = zip(readers[0].batches(), readers[1].batches(), strict=True)
            for one, other in batches:
                aligner.partial_fit(one.rows, other.rows, solve=other.start + len(other.rows) == n)
    told = list(dict.fromkeys([str(w.message) for w in caught] + report.get("warnings", [])))
    about = {
        "source": {"dim": readers[0].dim, "sha256": digest_file(source)},
        "target": {"dim": readers[1].dim, "sha256": digest_file(target)},
        "held_out": report,
    }
    aligner.save(out, **about)
    for text in told:
        say(f"warning: {text}")
    result = {
        "map": str(out),
        "method": method,
        "n_anchors": aligner.n_anchors_,
        "n_components": aligner.n_components_,
        "widths": [readers[0].dim, readers[1].dim],
        "correlations": aligner.correlations_.tolist(),
        "tried": getattr(aligner, "tried_", []),
        "held_out": report,
        "warnings": told,
    }
    if json:
        show_json(result)
    else:
        show_table("", ("what", "value"), _fit_rows(result))


def _components(text: str) -> int | str:
    if text in ("auto", "all"):
        return text
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--components must be a number from 1 up, auto or all, got {text!r}")
    return int(text)


def _judge(aligner: Any, X: Any, Y: Any, *, held_out: float, seed: int, plot: Path | None) -> dict[str, Any]:
    """Fit on part of the anchors and measure on the others."""
    import numpy as np
    from sklearn.base import clone

    from polyspan.align import crossmodal_scores, scores_by_size, subspace_report

    order = np.random.default_rng(seed).permutation(len(X))
    held, kept = (np.sort(part) for part in np.split(order, [min(int(len(X) * held_out), 5000)]))
    if len(held) < 2:
        raise ValueError(f"--held-out must hold back at least 2 of {len(X)} anchors, got {held_out}")
    fitted = clone(aligner).fit(X[kept], Y[kept])
    found = crossmodal_scores(fitted, X[held], Y[held])
    if aligner.normalize:
        # What is reported is of the spaces that the subspaces are of.
        X, Y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (X, Y))
    subspaces = subspace_report(
        X, Y, n_components=fitted.n_components_, reg=aligner.reg, held_share=held_out, random_state=seed
    )
    if plot is not None:
        from polyspan.align.subspace_plots import plot_subspaces

        table = scores_by_size(X[kept], Y[kept], X[held], Y[held], reg=aligner.reg)
        plot_subspaces(subspaces, table, plot)
    shown = ("n_shared", "shuffled_held_out", "cka_raw", "cka_shared", "x_share", "y_share", "pairing_p")
    return {
        **found,
        **{name: getattr(subspaces, name) for name in shown},
        "correlations": subspaces.held_out.tolist(),
        "warnings": list(dict.fromkeys(subspaces.warnings + found["warnings"])),
    }


def _fit_rows(result: dict) -> list[tuple[str, str]]:
    first = " ".join(f"{rho:.2f}" for rho in result["correlations"][:5])
    rows = [
        ("map", result["map"]),
        ("anchors", str(result["n_anchors"])),
        ("widths", " and ".join(str(d) for d in result["widths"])),
        ("dimension", str(result["n_components"])),
        ("correlations", first + (" …" if len(result["correlations"]) > 5 else "")),
    ]
    found = result["held_out"]
    if found:
        held = " ".join(f"{rho:.2f}" for rho in found["correlations"][:5])
        rows += [
            ("held out", f"{found['n']} items"),
            ("correlations held out", f"{held}, by chance up to {found['shuffled_held_out']:.2f}"),
            ("directions shared", str(found["n_shared"])),
            ("CKA", f"{found['cka_raw']:.3f} in the full spaces, {found['cka_shared']:.3f} in the subspaces"),
            ("variance shared", f"{found['x_share']:.1%} of the source, {found['y_share']:.1%} of the target"),
            *_score_rows(found),
            ("unpaired?", f"p = {found['pairing_p']:.3f}"),
        ]
    return rows


def _score_rows(found: dict) -> list[tuple[str, str]]:
    return [
        ("matched", f"{found['matching']:.1%}"),
        ("found first", f"{found['top_1']:.1%}, at best {found['ceiling']['at_1']:.1%}"),
        (f"found among {found['k']}", f"{found['top_k']:.1%}, by chance {found['chance']:.1%}"),
    ]


def _load(map: Path, method: str | None) -> Any:
    """Read fitted subspaces, with another route of scores where one is asked for."""
    from polyspan.align import SubspaceAligner

    aligner = SubspaceAligner.load(map)
    return aligner if method is None else aligner.set_params(method=method)


def _read(aligner: Any, paths: tuple[Path, Path], members: tuple, columns: tuple) -> tuple[Any, Any]:
    from polyspan.errors import WrongContent
    from polyspan.io import read_array

    found = []
    widths = aligner.n_features_in_, aligner._n_features_out
    for path, member, column, width in zip(paths, members, columns, widths, strict=True):
        rows = read_array(path, member=member, column=column)
        if rows.shape[1] != width:
            raise WrongContent(path, found=f"vectors of {rows.shape[1]} components", expected=f"{width}, as fitted")
        found.append(rows)
    return found[0], found[1]


def match(
    map: Path,
    source: Path,
    target: Path,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    method: Method | None = None,
    candidates: int | None = None,
    paired: Annotated[bool, Parameter(negative="")] = False,
    source_member: str | None = None,
    target_member: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    json: bool = False,
) -> None:
    """Match items of two spaces one to one.

    Parameters
    ----------
    map : Path
        Subspaces that ``polyspan crossmodal fit`` wrote.
    source : Path
        Vectors in the first space.
    target : Path
        Vectors in the second space, of the same items in unknown order.
    out : Path
        A table of the pairs (.csv, .tsv, .parquet, .arrow): row, column, score, confidence; rows count from 0.
    method : {"affine", "local_cka", "cosine"}
        How pairs are scored; the one that was fitted, where left out.
    candidates : int
        Only so many best partners of every item are considered: for files whose scores do not fit into memory.
    paired : bool
        Row i of both files is one item: say how many are found.
    source_member : str
        Member of an .npz or .safetensors file.
    target_member : str
        Likewise for the target.
    source_column : str
        Vector column of a table.
    target_column : str
        Likewise for the target.
    json : bool
        Print JSON.
    """
    import numpy as np

    from polyspan.align import matching_accuracy
    from polyspan.io import write_columns

    check_places(read=(map, source, target), out=out)
    aligner = _load(map, method)
    X, Y = _read(aligner, (source, target), (source_member, target_member), (source_column, target_column))
    if paired and len(X) != len(Y):
        raise ValueError(f"--paired must have one row an item in both files, got {len(X)} and {len(Y)} rows")
    found = aligner.match(X, Y, candidates=candidates)
    if out is not None:
        names = ("row", "column", "score", "confidence")
        write_columns(out, dict(zip(names, found, strict=True)))
    result: dict[str, Any] = {
        "out": None if out is None else str(out),
        "method": aligner.method,
        "rows": len(X),
        "columns": len(Y),
        "pairs": len(found.rows),
        "doubtful": int(np.sum(found.confidence < 0)),
    }
    if paired:
        result["matching"] = matching_accuracy(found, np.arange(len(X)))
        leaked = int(aligner.seen(X).sum())
        if leaked:
            say(f"warning: {leaked} of {len(X)} rows equal the row of an anchor: the share found may be too good")
    if json:
        show_json(result | ({} if out is not None else {"found": [part.tolist() for part in found[:2]]}))
        return
    rows = [
        ("pairs", f"{result['pairs']} of {len(X)} by {len(Y)}"),
        ("doubtful", f"{result['doubtful']} with a better partner elsewhere"),
    ]
    if paired:
        rows.append(("matched", f"{result['matching']:.1%}"))
    if out is not None:
        rows.insert(0, ("out", str(out)))
    else:
        rows += [(str(i), str(j)) for i, j in zip(found.rows, found.columns, strict=True)]
    show_table("", ("what", "value"), rows)


def retrieve(
    map: Path,
    queries: Path,
    gallery: Path,
    *,
    k: Annotated[int, Parameter(name=("--k", "-k"))] = 5,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    method: Method | None = None,
    paired: Annotated[bool, Parameter(negative="")] = False,
    query_member: str | None = None,
    gallery_member: str | None = None,
    query_column: str | None = None,
    gallery_column: str | None = None,
    json: bool = False,
) -> None:
    """Find the best items of the second space for each query in the first.

    Parameters
    ----------
    map : Path
        Subspaces that ``polyspan crossmodal fit`` wrote.
    queries : Path
        Vectors in the first space.
    gallery : Path
        Vectors in the second space.
    k : int
        How many items a query.
    out : Path
        A table (.csv, .tsv, .parquet, .arrow): query, rank, item, score; rows count from 0, ranks from 1.
    method : {"affine", "local_cka", "cosine"}
        How pairs are scored; the one that was fitted, where left out.
    paired : bool
        Row i of the gallery is the answer to query i: say how many are found.
    query_member : str
        Member of an .npz or .safetensors file.
    gallery_member : str
        Likewise for the gallery.
    query_column : str
        Vector column of a table.
    gallery_column : str
        Likewise for the gallery.
    json : bool
        Print JSON.
    """
    import numpy as np

    from polyspan.io import write_columns
    from polyspan.linalg import recall_at_k

    check_places(read=(map, queries, gallery), out=out)
    aligner = _load(map, method)
    X, Y = _read(aligner, (queries, gallery), (query_member, gallery_member), (query_column, gallery_column))
    if paired and len(X) != len(Y):
        raise ValueError(f"--paired must have one row an item in both files, got {len(X)} and {len(Y)} rows")
    found = aligner.retrieve(X, Y, k)
    if out is not None:
        columns = {
            "query": np.repeat(np.arange(len(X)), k),
            "rank": np.tile(np.arange(1, k + 1), len(X)),
            "item": found.indices.ravel(),
            "score": found.scores.ravel(),
        }
        write_columns(out, columns)
    result: dict[str, Any] = {
        "out": None if out is None else str(out),
        "method": aligner.method,
        "queries": len(X),
        "gallery": len(Y),
        "k": k,
    }
    if paired:
        twins = np.arange(len(X))
        result["found_first"] = recall_at_k(found.indices[:, :1], twins)
        result["found"] = recall_at_k(found.indices, twins)
        leaked = int(aligner.seen(X).sum())
        if leaked:
            say(f"warning: {leaked} of {len(X)} queries equal the row of an anchor: the share found may be too good")
    if json:
        show_json(result | ({} if out is not None else {"items": found.indices.tolist()}))
        return
    rows = [("queries", f"{len(X)} in a gallery of {len(Y)}")]
    if paired:
        rows += [("found first", f"{result['found_first']:.1%}"), (f"found among {k}", f"{result['found']:.1%}")]
    if out is not None:
        rows.insert(0, ("out", str(out)))
    else:
        rows += [(str(i), " ".join(str(j) for j in items)) for i, items in enumerate(found.indices.tolist())]
    show_table("", ("what", "value"), rows)
