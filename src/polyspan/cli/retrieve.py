"""``polyspan retrieve debias``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_places

MARK = ".debias.json"


def debias(
    gallery: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    bank_gallery: Path | None = None,
    bank_queries: Path | None = None,
    rate_gallery: float | None = None,
    rate_query: float | None = None,
    adjacency: Literal["full", "local"] = "full",
    pool_share: float | None = None,
    mean: Literal["bank", "gallery", "none"] | None = None,
    tune_gallery: Path | None = None,
    tune_queries: Path | None = None,
    tune_answers: Path | None = None,
    queries: Path | None = None,
    k: int = 10,
    sample: int = 1000,
    member: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    batch_rows: int = 65536,
    seed: int = 0,
    save: Path | None = None,
    again: Annotated[bool, Parameter(negative="")] = False,
    compare: Annotated[bool, Parameter(negative="")] = False,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Take the hubs out of a gallery: items that are returned for nearly every query.

    Vectors are pushed off their crowd and scaled to length 1; queries stay as they are, and any cosine or inner-product
    index takes the result. The gallery is streamed and never changed. A report, NAME.debias.json, goes beside it.

    Parameters
    ----------
    gallery : Path
        Vectors to be corrected (.npy, .npz, .parquet, .arrow, .safetensors).
    out : Path
        Where the corrected vectors go; the suffix says the format. Ids of a table are kept.
    bank_gallery : Path
        Vectors of other items of the gallery's kind, such as a training split; left out, the gallery itself (full).
    bank_queries : Path
        Vectors of past queries. Without them the step from the gallery's bank stands alone.
    rate_gallery : float
        How far vectors are pushed off the gallery's bank; 0 leaves them. 1 where left out and not tuned.
    rate_query : float
        How far they are pushed off the bank of queries. 1 where left out and not tuned.
    adjacency : {"full", "local"}
        Whether the whole bank pushes, or only each vector's nearest rows of it.
    pool_share : float
        For local: the share of the bank that pushes, 0.01 where left out.
    mean : {"bank", "gallery", "none"}
        For full: the mean similarity that the step leaves in place, of the banks (where left out), of this gallery, or
        none.
    tune_gallery : Path
        Validation items, not those you will test on: the rates that find most pairs are taken.
    tune_queries : Path
        Queries whose answer is the same row of --tune-gallery, or what --tune-answers says.
    tune_answers : Path
        For each of them the row of --tune-gallery that answers it, from 0, or several rows, -1 where there are fewer:
        an image's captions, for instance.
    queries : Path
        Queries to measure hubness with; the bank of queries, or the gallery itself, where left out.
    k : int
        Length of the lists in which hubs are counted.
    sample : int
        How many queries, drawn at random, are measured.
    member : str
        Member of an .npz or .safetensors gallery.
    column : str
        Vector column of a gallery that is a table.
    id_column : str
        Id column of it.
    batch_rows : int
        Rows a batch.
    seed : int
        Which queries are drawn.
    save : Path
        Keep the fitted correction (.safetensors), for vectors that come later.
    again : bool
        Correct a gallery that is a result of this command already.
    compare : bool
        Tune every correction on half of the validation queries, those of scores too (softmax normalisers, CSLS), and
        measure them on the other half: recall, hubness, seconds, memory. The result stays that of this command.
    plot : Path
        Draw occurrences before and after, or with --compare all corrections (.svg, .png or .pdf).
    json : bool
        Print the report as JSON.
    """
    import time
    import warnings

    from polyspan.align import InverseGraphConvolution
    from polyspan.align.retrieval_report import compare_corrections, default_corrections
    from polyspan.io import EmbeddingReader, digest_file, read_array, transform_file, write_json

    started = time.perf_counter()
    _check_options(
        adjacency,
        tuned=tune_gallery is not None,
        pool_share=pool_share,
        mean=mean,
        rate_gallery=rate_gallery,
        rate_query=rate_query,
        bank_queries=bank_queries,
    )
    if adjacency == "local" and bank_gallery is None:
        raise ValueError("--bank-gallery must be given for --adjacency local: a gallery would be pushed off itself")
    if (tune_gallery is None) != (tune_queries is None):
        raise ValueError("--tune-gallery and --tune-queries must be given together")
    if tune_answers is not None and tune_queries is None:
        raise ValueError("--tune-answers must go with --tune-gallery and --tune-queries, got neither")
    if compare:
        given = {
            "--bank-gallery": bank_gallery,
            "--bank-queries": bank_queries,
            "--tune-gallery": tune_gallery,
            "--tune-queries": tune_queries,
        }
        missing = [option for option, path in given.items() if path is None]
        if missing:
            raise ValueError(f"--compare must go with {', '.join(given)}, got no {' and no '.join(missing)}")
    if sample < 1:
        raise ValueError(f"--sample must be at least 1, got {sample}")
    read = (gallery, bank_gallery, bank_queries, tune_gallery, tune_queries, tune_answers, queries)
    check_places(plot, read=read, out=out, save=save)
    digests = {
        name: digest_file(path)
        for name, path in (("gallery", gallery), ("bank_gallery", bank_gallery), ("bank_queries", bank_queries))
        if path is not None
    }
    if not again and _is_result(gallery, digests["gallery"]):
        raise ValueError(f"gallery must not be corrected twice: {gallery} is a result of this command; --again insists")
    if adjacency == "local" and digests["bank_gallery"] == digests["gallery"]:
        raise ValueError(
            f"--bank-gallery must hold other items than the gallery for --adjacency local, got {bank_gallery}, which "
            "is the gallery: it would be pushed off itself"
        )

    def bank(path):
        """A bank in a file of its own is its only array; the gallery's names are for the gallery."""
        own = path is None or path == gallery
        return read_array(gallery, member=member, column=column) if own else read_array(path)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = InverseGraphConvolution(
            1.0 if rate_gallery is None else rate_gallery,
            1.0 if rate_query is None else rate_query,
            adjacency=adjacency,
            pool_share=0.01 if pool_share is None else pool_share,
            mean=None if mean == "none" else mean or "bank",
        )
        own, asked = bank(bank_gallery), None if bank_queries is None else bank(bank_queries)
        if asked is not None and asked.shape[1] != own.shape[1]:
            raise ValueError(
                f"--bank-queries must have {own.shape[1]} components like {bank_gallery or gallery}, got "
                f"{asked.shape[1]} in {bank_queries}"
            )
        measuring = None if queries is None else read_array(queries)
        if measuring is not None and measuring.shape[1] != own.shape[1]:
            raise ValueError(
                f"--queries must have {own.shape[1]} components like {bank_gallery or gallery}, got "
                f"{measuring.shape[1]} in {queries}"
            )
        measuring = asked if measuring is None else measuring
        n_rows = EmbeddingReader(gallery, member=member, column=column, id_column=id_column).n_rows
        if measuring is None and n_rows < 2:
            raise ValueError(f"gallery must hold at least 2 rows to be measured by its own rows, got {n_rows}")
        estimator.fit(own, queries=asked)
        tuned, compared = None, []
        if tune_gallery is not None and tune_queries is not None:
            known, asking, answers = _validation(tune_gallery, tune_queries, tune_answers, own.shape[1])
            tuned = estimator.tune(known, asking, answers)
            if compare and asked is not None:
                corrections = default_corrections(len(own), len(asked), mean=estimator.mean)
                compared = compare_corrections(
                    own, asked, known, asking, answers, corrections=corrections, hub_k=k, random_state=seed
                )
    # What the estimator says of equal banks is said below, of files.
    told = [] if tuned else [str(w.message) for w in caught if "a gallery was given" not in str(w.message)]
    further = {"tune_gallery": tune_gallery, "tune_queries": tune_queries, "queries": queries}
    told += _shared_files(digests | {name: digest_file(path) for name, path in further.items() if path is not None})
    for text in told:
        say(f"warning: {text}")
    options: dict[str, Any] = {}
    if mean == "gallery" and adjacency == "full":
        options["gallery_mean"] = _mean_direction(gallery, member, column, batch_rows)
    settings = {**estimator.get_params(), "gallery_mean": mean or "bank"}
    rows = transform_file(
        gallery,
        out,
        lambda batch: estimator.transform(batch, **options),
        dim=estimator.n_features_in_,
        member=member,
        column=column,
        id_column=id_column,
        batch_rows=batch_rows,
        fingerprint=repr(sorted(settings.items(), key=str)) + repr(sorted(digests.items())),
    )
    if save is not None:
        estimator.save(save, **digests)
    measured = _measure(
        read_array(gallery, member=member, column=column),
        read_array(out),
        measuring,
        k=k,
        sample=sample,
        seed=seed,
        plot=None if compare else plot,
    )
    if compare and plot is not None:
        from polyspan.align.inverse_graph_plots import plot_corrections

        plot_corrections(compared, plot)
    worse = [
        name.replace("_", " ")
        for name in ("skewness", "top_share")
        if measured["hubness"]["after"][name] > measured["hubness"]["before"][name]
    ]
    if worse:
        told.append(f"hubs are worse than before by {' and '.join(worse)}: try smaller rates, or --tune-gallery")
        say(f"warning: {told[-1]}")
    result = {
        "out": str(out),
        "sha256": digest_file(out),
        "rows": rows,
        "dim": int(estimator.n_features_in_),
        "sources": digests,
        "adjacency": adjacency,
        "pool_share": estimator.pool_share if adjacency == "local" else None,
        "rate_gallery": float(estimator.rate_gallery),
        "rate_query": float(estimator.rate_query) if bank_queries is not None else None,
        "rate_limit_gallery": estimator.rate_limit_gallery_,
        "rate_limit_query": estimator.rate_limit_query_ if bank_queries is not None else None,
        "tuning": _tuning(tuned),
        "warnings": told,
        **measured,
        **({"compared": [_compared(row) for row in compared]} if compare else {}),
        "wall_s": round(time.perf_counter() - started, 3),
    }
    write_json(_mark(out), result)
    if json:
        show_json(result)
    else:
        show_table("", ("what", "value"), _rows(result))
        if compare:
            show_table("", COMPARED, map(_compared_row, compared))


COMPARED = ("correction", "changes", "setting", "recall@1", "recall@5", "recall@10", "skewness", "seconds", "MiB")


def _check_options(
    adjacency: str,
    *,
    tuned: bool,
    pool_share: float | None,
    mean: str | None,
    rate_gallery: float | None,
    rate_query: float | None,
    bank_queries: Path | None,
) -> None:
    """Refuse options that would change nothing."""
    if pool_share is not None and adjacency != "local":
        raise ValueError(f"--pool-share must go with --adjacency local, got {pool_share:g} with --adjacency full")
    if mean is not None and adjacency != "full":
        raise ValueError(f"--mean must go with --adjacency full, got {mean} with --adjacency local")
    if rate_query is not None and bank_queries is None:
        raise ValueError(f"--rate-query must go with --bank-queries, got {rate_query:g} and no bank of queries")
    for option, rate in (("--rate-gallery", rate_gallery), ("--rate-query", rate_query)):
        if tuned and rate is not None:
            raise ValueError(f"{option} must be left out with --tune-gallery, which chooses it, got {rate:g}")


def _validation(tune_gallery: Path, tune_queries: Path, tune_answers: Path | None, dim: int) -> tuple[Any, Any, Any]:
    """Read validation items, queries, and which of the items answer each query: None where row i answers query i."""
    from polyspan.io import read_array

    known, asking = read_array(tune_gallery), read_array(tune_queries)
    for option, rows, path in (("--tune-gallery", known, tune_gallery), ("--tune-queries", asking, tune_queries)):
        if rows.shape[1] != dim:
            raise ValueError(f"{option} must have {dim} components like the banks, got {rows.shape[1]} in {path}")
    if tune_answers is None:
        if len(known) != len(asking):
            raise ValueError(
                f"--tune-queries must hold {len(known)} rows like --tune-gallery, or go with --tune-answers, got "
                f"{len(asking)}"
            )
        return known, asking, None
    answers = read_array(tune_answers, ndim=None, dtype="int64")
    if answers.ndim not in (1, 2) or len(answers) != len(asking):
        raise ValueError(f"--tune-answers must hold {len(asking)} rows, one a query, got shape {answers.shape}")
    if answers.min() < -1 or answers.max() >= len(known):
        raise ValueError(
            f"--tune-answers must hold rows of --tune-gallery, 0 to {len(known) - 1}, or -1, got {answers.min()} to "
            f"{answers.max()}"
        )
    return known, asking, answers


def _compared(row: Any) -> dict[str, Any]:
    return {
        "correction": row.name,
        "changes": row.changes,
        "setting": row.params,
        "tuning recall@1": row.tuned,
        **{f"recall@{k}": value for k, value in row.report.recall.items()},
        "mean_rank": row.report.mean_rank,
        "skewness": row.report.hubness.skewness,
        "n_queries": row.report.n_queries,
        "seconds": round(row.wall_s, 4),
        "peak_bytes": row.peak_bytes,
    }


def _compared_row(row: Any) -> tuple[str, ...]:
    def told(value: Any) -> str:
        return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value).lower()

    return (
        row.name,
        row.changes,
        ", ".join(f"{name} {told(value)}" for name, value in row.params.items()) or "-",
        *(f"{value:.4f}" for value in row.report.recall.values()),
        f"{row.report.hubness.skewness:.3f}",
        f"{row.wall_s:.3f}",
        f"{row.peak_bytes / 2**20:.1f}",
    )


def _shared_files(digests: dict[str, str]) -> list[str]:
    """Return sentences about files that are given for two things which should be others."""
    pairs = {
        ("bank_queries", "gallery"): "the bank of queries is the gallery itself",
        ("bank_queries", "bank_gallery"): "the bank of queries is the same file as the gallery's bank",
        ("tune_gallery", "gallery"): "rates are tuned on the gallery itself: scores on it are too good",
        ("tune_gallery", "bank_gallery"): "rates are tuned on the bank, whose items are pushed off themselves",
        ("tune_queries", "tune_gallery"): "rates are tuned on a gallery that asks for itself: it finds all at rate 0",
        ("tune_queries", "queries"): "rates are tuned on the queries that measure them: what is measured is too good",
    }
    return [text for (one, other), text in pairs.items() if one in digests and digests[one] == digests.get(other)]


def _mark(path: Path) -> Path:
    return path.with_name(path.name + MARK)


def _is_result(path: Path, digest: str) -> bool:
    """Whether a report beside a file says that it is a result, and the file has not been changed since."""
    from polyspan.io import read_json

    mark = _mark(path)
    if not mark.is_file():
        return False
    found = read_json(mark)
    return isinstance(found, dict) and found.get("sha256") == digest


def _mean_direction(gallery: Path, member: str | None, column: str | None, batch_rows: int) -> Any:
    """Return the mean unit row (d,) of a gallery of any size, in one pass."""
    import numpy as np

    from polyspan.io import EmbeddingReader

    reader = EmbeddingReader(gallery, member=member, column=column, batch_rows=batch_rows)
    total = np.zeros(reader.dim)
    for batch in reader.batches():
        norms = np.linalg.norm(batch.rows, axis=1, keepdims=True)
        total += (batch.rows / np.where(norms > 0, norms, 1)).sum(axis=0, dtype=np.float64)
    return total / reader.n_rows


def _measure(before: Any, after: Any, queries: Any, *, k: int, sample: int, seed: int, plot: Path | None) -> dict:
    """Compare the gallery before and after by hubness and mean cosine; without queries its own rows are the queries."""
    import numpy as np

    from polyspan.align import hubness, mean_pairwise_cosine

    asked = before if queries is None else queries
    drawn = np.sort(np.random.default_rng(seed).choice(len(asked), size=min(sample, len(asked)), replace=False))
    k = min(k, len(before) - (queries is None))
    found = {
        name: hubness(np.asarray(asked[drawn]), rows, k, exclude=drawn if queries is None else None)
        for name, rows in (("before", before), ("after", after))
    }
    if plot is not None:
        from polyspan.align.inverse_graph_plots import plot_hubness

        plot_hubness(found["before"], found["after"], plot)
    return {
        "measured": {"queries": "gallery" if queries is None else "queries", "n_queries": len(drawn), "k": k},
        "hubness": {
            name: {"skewness": h.skewness, "never_share": h.never_share, "top_share": h.top_share}
            for name, h in found.items()
        },
        "mean_cosine": {"before": mean_pairwise_cosine(before), "after": mean_pairwise_cosine(after)},
    }


def _tuning(tuned: Any) -> dict | None:
    if tuned is None:
        return None
    without = next(
        row.score for row in tuned.table if row.rate_gallery == 0 and row.rate_query in (0, tuned.rate_query)
    )
    return {"settings": len(tuned.table), "recall@1": tuned.score, "recall@1 at rate 0": without}


def _rows(result: dict) -> list[tuple[str, str]]:
    rows = [
        ("out", result["out"]),
        ("vectors", f"{result['rows']} of {result['dim']} components"),
        ("adjacency", result["adjacency"]),
    ]
    for side in ("gallery", "query"):
        rate, limit = result[f"rate_{side}"], result[f"rate_limit_{side}"]
        if rate is not None:
            rows.append((f"{side} rate", f"{rate:g}" + (f", limit {limit:.3g}" if limit is not None else "")))
    if result["tuning"]:
        scores = result["tuning"]
        rows.append(("tuned", f"recall@1 {scores['recall@1 at rate 0']:.4f} at rate 0, {scores['recall@1']:.4f} now"))
    for name in ("skewness", "never_share", "top_share"):
        before, after = (result["hubness"][when][name] for when in ("before", "after"))
        rows.append((name.replace("_", " "), f"{before:.3f} before, {after:.3f} after"))
    cosine = result["mean_cosine"]
    rows.append(("mean cosine", f"{cosine['before']:.3f} before, {cosine['after']:.3f} after"))
    return [*rows, ("seconds", f"{result['wall_s']:.2f}")]
