"""How well queries find their answers, several a query where there are, with and without a correction of hubness."""

import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array

from polyspan.linalg import top_k

from ._checks import check_count, check_kind
from ._hubness import FLOATS, Hubness, checked_relevant, count_hubs
from ._score_blocks import MatrixBlocks, ScoreBlocks
from .hubness_corrections import CSLS, DualBankNormalization, QueryBankNormalization
from .inverse_graph import InverseGraphConvolution
from .vector_corrections import AllButTheTop, Centering

__all__ = [
    "ComparedCorrection",
    "RetrievalReport",
    "compare_corrections",
    "default_corrections",
    "evaluate_retrieval",
    "evaluate_scores",
    "reversed_relevant",
]

KS = (1, 5, 10)
POOL_SHARES = (0.01, 0.02, 0.05, 0.1)
SCORED = (QueryBankNormalization, DualBankNormalization, CSLS)
"""What changes scores and no vectors."""


class RetrievalReport(NamedTuple):
    """How well queries find their answers.

    ``recall``: by k the share of queries, in [0, 1], with an answer among their first k, as image and text retrieval
    counts it: any of several is enough. ``median_rank`` and ``mean_rank`` are of each query's best answer, from 1. A
    wrong row of the same score counts as half a rank, so that recall is never won by a tie. ``hubness`` is of the lists
    of ``hub_k``. ``n_queries`` counts those that have an answer; the others are left out of all but hubness.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    hubness: Hubness
    n_queries: int


def evaluate_retrieval(
    queries: Any,
    gallery: Any,
    relevant: Any = None,
    *,
    correction: Any = None,
    ks: Sequence[int] = KS,
    hub_k: int = 10,
    block_rows: int = 2048,
) -> RetrievalReport:
    """Search a gallery and report recall, ranks and hubness, exactly and without a matrix of all pairs.

    Parameters
    ----------
    queries, gallery : arrays of shape (m, d) and (n, d)
    relevant : array of shape (m,) or (m, r), optional
        Gallery rows that answer each query, -1 where a query has fewer than r; left out, row i answers query i. For the
        way back, from images to their several captions, see :func:`reversed_relevant`.
    correction : fitted estimator, optional
        Any correction of this module's family; left out, cosines rank.
    ks : sequence of int
    hub_k : int
        Length of the lists in which hubs are counted; all rows where there are fewer.
    block_rows : int
        Rows of either side that are compared at once, where no correction of scores says it.

    Raises
    ------
    ValueError
        Widths differ, a value is not finite, no query has an answer, or ``relevant`` holds other numbers than rows of
        the gallery.
    """
    check_count("block_rows", block_rows)
    return _report(_blocks_of(correction, queries, gallery, block_rows), relevant, ks, hub_k)


def evaluate_scores(scores: Any, relevant: Any = None, *, ks: Sequence[int] = KS, hub_k: int = 10) -> RetrievalReport:
    """Report on a matrix of scores (m, n) that is there already: more is nearer. See :func:`evaluate_retrieval`.

    Raises
    ------
    ValueError
        As there.
    """
    scores = check_array(scores, dtype=FLOATS, input_name="scores")
    return _report(MatrixBlocks(scores, block_rows=2048), relevant, ks, hub_k)


def reversed_relevant(relevant: Any, n_gallery: int) -> np.ndarray:
    """Return the answers of the way back, (n_gallery, r): which queries each gallery row answers, -1 as filling.

    From the one image of each caption it makes the several captions of each image.

    Parameters
    ----------
    relevant : array of shape (m,) or (m, r)
        Gallery rows that answer each query, or -1.
    n_gallery : int
        Rows of the gallery.

    Raises
    ------
    ValueError
        ``relevant`` holds other numbers than rows of the gallery.
    """
    check_count("n_gallery", n_gallery)
    right = _distinct(checked_relevant(relevant, len(relevant), n_gallery))
    query, place = np.nonzero(right >= 0)
    row = right[query, place]
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=n_gallery)
    out = np.full((n_gallery, max(1, int(counts.max()))), -1, dtype=np.int64)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    out[row[order], np.arange(len(order)) - starts] = query[order]
    return out


class ComparedCorrection(NamedTuple):
    """One correction on queries that did not choose its parameters.

    ``changes`` is "vectors", "scores" or "nothing"; ``params`` what tuning chose, and ``tuned`` the recall@1 that it
    was chosen by, in [0, 1]. ``wall_s`` and ``peak_bytes`` are of one fit with these on the banks and one search of the
    measured queries; the second counts what arrays and objects hold at most beyond what was there before.
    """

    name: str
    changes: str
    params: dict[str, Any]
    tuned: float | None
    report: RetrievalReport
    wall_s: float
    peak_bytes: int


def default_corrections(
    n_bank_gallery: int, n_bank_queries: int, *, mean: str | None = "bank"
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return every correction by name, each with what its ``tune`` is to try, for banks of so many rows.

    ``mean`` is that of :class:`InverseGraphConvolution`, full.
    """
    fewest = min(n_bank_gallery, n_bank_queries)
    shares = [share for share in POOL_SHARES if share * fewest >= 1] or [1.0]
    return {
        "inverse graph, full": (InverseGraphConvolution(mean=mean), {}),
        "inverse graph, local": (
            InverseGraphConvolution(adjacency="local", pool_share=shares[-1]),
            {"pool_shares": shares},
        ),
        "centring": (Centering(), {}),
        # Left out at the fit, so that a bank which spans too little is no error: fewer are tried.
        "all but the top": (AllButTheTop(sides=None), {}),
        "inverted softmax": (QueryBankNormalization(dynamic=False), {}),
        "dynamic inverted softmax": (QueryBankNormalization(), {}),
        "dual-bank softmax": (DualBankNormalization(), {}),
        "CSLS": (CSLS(n_neighbors=None), {}),
    }


def compare_corrections(
    bank_gallery: Any,
    bank_queries: Any,
    gallery: Any,
    queries: Any,
    relevant: Any = None,
    *,
    corrections: Mapping[str, tuple[Any, Mapping[str, Any]]] | None = None,
    ks: Sequence[int] = KS,
    hub_k: int = 10,
    random_state: Any = None,
) -> list[ComparedCorrection]:
    """Tune every correction on one half of validation queries and measure it on the other; no correction comes first.

    All get the same banks, the same gallery and the same halves, drawn at random, and choose by recall@1.

    Parameters
    ----------
    bank_gallery, bank_queries : arrays of shape (a, d) and (b, d)
        Known vectors of the gallery's and the queries' kind, of other items than the validation's.
    gallery, queries, relevant
        As in :func:`evaluate_retrieval`; at least two queries must have an answer.
    corrections : mapping of name to estimator and arguments of its ``tune``, optional
        :func:`default_corrections` where left out.
    ks : sequence of int
    hub_k : int
    random_state : int or RandomState, optional
        Which queries are in which half.

    Raises
    ------
    ValueError
        As in each ``fit`` and ``tune``, or fewer than two queries have an answer.
    """
    gallery, queries = _rows(gallery, "gallery"), _rows(queries, "queries")
    right = checked_relevant(relevant, len(queries), len(gallery))
    answered = np.flatnonzero((right >= 0).any(axis=1))
    if len(answered) < 2:
        raise ValueError(f"queries must hold at least 2 with an answer, to tune and to measure, got {len(answered)}")
    order = check_random_state(random_state).permutation(answered)
    tuning, held = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    asked, answers = queries[held], right[held]
    k = min(hub_k, len(gallery))
    wall_s, peak_bytes = _cost(lambda: top_k(asked, gallery, k))
    plain = evaluate_retrieval(asked, gallery, answers, ks=ks, hub_k=hub_k)
    rows = [ComparedCorrection("no correction", "nothing", {}, None, plain, wall_s, peak_bytes)]
    found = default_corrections(len(bank_gallery), len(bank_queries)) if corrections is None else corrections
    for name, (estimator, options) in found.items():
        fitted = clone(estimator).fit(bank_gallery, queries=bank_queries)
        choice = fitted.tune(gallery, queries[tuning], right[tuning], **options)
        chosen = clone(fitted)
        with warnings.catch_warnings():
            # What tuning chose has been measured: it is not to be warned of.
            warnings.filterwarnings("ignore", message=".*is above twice its limit")
            warnings.filterwarnings("ignore", message="queries are the rows of X")
            wall_s, peak_bytes = _cost(
                lambda chosen=chosen: chosen.fit(bank_gallery, queries=bank_queries).retrieve(asked, gallery, k)
            )
            report = evaluate_retrieval(asked, gallery, answers, correction=chosen, ks=ks, hub_k=hub_k)
        rows.append(
            ComparedCorrection(
                name,
                "scores" if isinstance(chosen, SCORED) else "vectors",
                _chosen(choice, chosen),
                choice.score,
                report,
                wall_s,
                peak_bytes,
            )
        )
    return rows


def _cost(run: Callable[[], Any]) -> tuple[float, int]:
    """Return the seconds of one run, and of another the most bytes that it held at once, however short."""
    started = time.perf_counter()
    run()
    wall_s = time.perf_counter() - started
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        run()
        return wall_s, tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced:
            tracemalloc.stop()


def _chosen(choice: Any, chosen: Any) -> dict[str, Any]:
    """Return what a ``tune`` chose, by parameter."""
    if isinstance(chosen, InverseGraphConvolution):
        names = ("rate_gallery", "rate_query", *(("pool_share",) if chosen.adjacency == "local" else ()))
        return {name: getattr(choice, name) for name in names}
    return dict(choice.params)


def _rows(X: Any, name: str) -> np.ndarray:
    check_kind(X, name, 3)
    return check_array(X, dtype=FLOATS, input_name=name)


def _blocks_of(correction: Any, queries: Any, gallery: Any, block_rows: int) -> ScoreBlocks:
    if isinstance(correction, SCORED):
        return correction._blocks(queries, gallery, None)
    queries, gallery = _rows(queries, "queries"), _rows(gallery, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries must have {gallery.shape[1]} features like gallery, got {queries.shape[1]}")
    if correction is None:
        return ScoreBlocks(queries, gallery, normalize=True, block_rows=block_rows)
    if not hasattr(correction, "retrieve"):
        raise ValueError(f"correction must be a fitted correction of hubness, got {type(correction).__name__}")
    if hasattr(correction, "transform_queries"):
        queries = correction.transform_queries(queries)
    made = correction.transform(gallery)
    return ScoreBlocks(queries, made, normalize=bool(correction.normalize), block_rows=block_rows)


def _report(blocks: ScoreBlocks, relevant: Any, ks: Sequence[int], hub_k: int) -> RetrievalReport:
    for k in ks:
        check_count("ks", k)
    check_count("hub_k", hub_k)
    right = _distinct(checked_relevant(relevant, *blocks.shape))
    ranks = blocks.ranks(right)
    ranks = ranks[np.isfinite(ranks)]
    if not len(ranks):
        raise ValueError("relevant must hold an answer of some query, got -1 alone")
    n = blocks.shape[1]
    return RetrievalReport(
        {int(k): float(np.mean(ranks <= k)) for k in ks},
        float(np.median(ranks)),
        float(ranks.mean()),
        count_hubs(blocks.best(min(hub_k, n)).indices, n),
        len(ranks),
    )


def _distinct(right: np.ndarray) -> np.ndarray:
    """Return each query's answers in order, -1 in place of those that stand twice."""
    found = np.sort(right, axis=1)
    found[:, 1:][found[:, 1:] == found[:, :-1]] = -1
    return found
