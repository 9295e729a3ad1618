"""``polyspan cluster points``."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_places
from ._points_input import read_rows
from .cluster import LABEL_FILES, check_seeds, comparison_rows, write_bases, write_labels


class Method(NamedTuple):
    """Where a clusterer lives, which of the command's options its parameters are, and what it is always given.

    ``clusters`` is what it calls the number of groups.
    """

    where: str
    takes: dict[str, str]
    always: dict[str, Any] = {}  # noqa: RUF012 - never written to
    clusters: str = "n_clusters"


SELF = {"seed": "random_state", "dim": "subspace_dim", "normalize": "normalize"}
SPARSE = SELF | {"jobs": "n_jobs"}
UNIT = {"seed": "random_state", "dim": "subspace_dim", "jobs": "n_jobs"}
# A system joins with one line. What --option may set is whatever the class has.
METHODS = {
    "ensc": Method("polyspan.cluster:ElasticNetSubspaceClustering", SPARSE),
    "ssc": Method("polyspan.cluster:ElasticNetSubspaceClustering", SPARSE, {"tau": 1.0}),
    "omp": Method("polyspan.cluster:OMPSubspaceClustering", SPARSE),
    "lsr": Method("polyspan.cluster:LeastSquaresSubspaceClustering", SELF),
    "lsr-squared": Method("polyspan.cluster:LeastSquaresSubspaceClustering", SELF, {"power": 2}),
    "tsc": Method("polyspan.cluster:ThresholdingSubspaceClustering", UNIT),
    "lhdsc": Method(
        "polyspan.cluster:DeepSelfExpressiveClustering",
        {"seed": "random_state", "dim": "subspace_dim", "image": "image_shape"},
        {"verbose": 1},
    ),
    # Bases are told without means: subspaces go through the origin, as those of the other methods do.
    "diffusion-subspace": Method(
        "polyspan.cluster:LowRankGaussianMixture",
        {"seed": "random_state", "dim": "rank"},
        {"center": False},
        "n_components",
    ),
    "franca": Method(
        "polyspan.cluster:NestedMatryoshkaClustering",
        {"seed": "random_state", "image": "image_shape"},
        {"verbose": 1},
    ),
    "mlc": Method("polyspan.cluster:ManifoldLinearizingClustering", {"seed": "random_state"}, {"verbose": 1}),
    "kmeans": Method("sklearn.cluster:KMeans", {"seed": "random_state"}, {"n_init": 10}),
    "spectral": Method(
        "sklearn.cluster:SpectralClustering",
        {"seed": "random_state", "jobs": "n_jobs"},
        {"affinity": "nearest_neighbors", "n_neighbors": 10},
    ),
}
LEARNED = ("rate", "class_rate", "effective_neighbors")
COMPARED = ("kmeans", "spectral", "ensc", "omp", "lsr", "tsc")
NUMBERS = ("accuracy", "nmi", "ari", "silhouette", "residual share", "seconds")


def points(
    source: Path,
    *,
    n_clusters: Annotated[int | None, Parameter(name=("--n-clusters", "-k"))] = None,
    method: str = "ensc",
    labels: Path | None = None,
    member: str | None = None,
    label_member: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    normalize: bool = True,
    pca: int | None = None,
    dim: int | None = None,
    option: list[str] | None = None,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    memberships: Path | None = None,
    bases: Path | None = None,
    compare: bool = False,
    seeds: int = 1,
    seed: int = 0,
    jobs: int = 1,
    report: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Cluster points by the subspaces that they lie near.

    Prints a report; labels go to --out, keyed by the ids of the input.

    Parameters
    ----------
    source : Path
        Rows of numbers: .npy, .npz, .safetensors, .parquet, .arrow, .csv, .tsv, .fvecs or .mat. In a .csv or .tsv file
        a column id names the rows.
    n_clusters : int
        How many groups; the number of classes where there are true ones.
    method : str
        ensc, ssc, omp, lsr, lsr-squared, tsc, lhdsc, diffusion-subspace, franca, mlc, kmeans or spectral.
    labels : Path
        True classes, to score against (.npy, or .csv with a column label, in the order of the rows or with ids). They
        are not used in clustering.
    member : str
        Which array of an .npz, .safetensors or .mat file holds the rows; left out, the only one, or fea, features, X,
        images or data.
    label_member : str
        Which array of the same file holds true classes; left out, gnd, Label, Labels, labels, label or y, if one of
        them is there and the rows are not named.
    column : str
        Which list column of a table holds the rows.
    label_column : str
        Which column of the same table holds true classes.
    normalize : bool
        Bring rows to unit length first.
    pca : int
        Keep this many leading directions through the origin, which leaves subspaces subspaces; before normalising.
    dim : int
        Dimension of the subspaces of --bases, --memberships and the report; left out, whatever holds 95 %.
    option : list[str]
        Parameters of the method as name=value, such as tau=0.5, or widths=8,16 where it takes several; may be repeated.
    out : Path
        Where labels go: .parquet and .csv with columns id and label, .npy in the order of the rows.
    memberships : Path
        How far each row belongs to each subspace, (n, clusters): .npy, .npz, .parquet or .safetensors.
    bases : Path
        Orthonormal bases of the subspaces found, one .safetensors file; for mlc, like the memberships and the picture,
        those of the learned features.
    compare : bool
        Run the other methods on the same rows too, with their defaults.
    seeds : int
        Cluster with so many seeds, and report how far they agree.
    seed : int
        Of all that is drawn.
    jobs : int
        Processes, where points are independent; -1 is all cores.
    report : Path
        Write the report as JSON here too.
    plot : Path
        Draw embedding, affinity and angles between subspaces; of a method that has them losses; and of
        diffusion-subspace variances, ranks by noise level and agreement of two halves (.svg, .png or .pdf).
    json : bool
        Print the report as JSON.
    """
    check_names(method, METHODS, out, seeds, seed=seed, dim=dim)
    places = {"out": out, "memberships": memberships, "bases": bases, "report": report}
    check_places(plot, read=(source, labels), **places)
    found = read_rows(source, labels, member, label_member, column, label_column)
    run_method(
        found.X,
        found.ids,
        found.truth,
        method=method,
        n_clusters=count_clusters(n_clusters, found.truth, found.X),
        normalize=normalize,
        pca=pca,
        dim=dim,
        option=option,
        out=out,
        memberships=memberships,
        bases=bases,
        compare=compare,
        seeds=seeds,
        seed=seed,
        jobs=jobs,
        report=report,
        plot=plot,
        json=json,
        reading=found.reading,
    )


def check_names(method: str, known: Any, out: Path | None, seeds: int, *, seed: int, dim: int | None) -> None:
    """Look at what can be wrong before any file is read."""
    if out is not None and out.suffix not in LABEL_FILES:
        raise ValueError(f"--out must end in one of {', '.join(LABEL_FILES)}, got {out}")
    if method not in known:
        raise ValueError(f"--method must be one of {', '.join(known)}, got {method}")
    if dim is not None and dim < 1:
        raise ValueError(f"--dim must be at least 1, got {dim}")
    check_seeds(seeds, seed)


def count_clusters(n_clusters: int | None, truth: Any, X: Any) -> int:
    """Return the number of groups asked for, or that of the true classes."""
    import numpy as np

    if n_clusters is None:
        if truth is None:
            raise ValueError("--n-clusters must be given where there are no true classes to count")
        n_clusters = len(np.unique(truth))
    if not 1 <= n_clusters <= len(X):
        turned = "; rows are points: is the file transposed?" if len(X) < n_clusters <= X.shape[1] else ""
        raise ValueError(f"--n-clusters must be between 1 and the {len(X)} rows, got {n_clusters}{turned}")
    return n_clusters


def check_rows(method: str, n: int, k: int) -> None:
    """Refuse as many groups as rows where the method's solver cannot: its own words would name none of the options."""
    if method == "spectral" and k >= n:
        raise ValueError(f"--n-clusters must be below the {n} rows for spectral, got {k}")


def few_rows(rows: Any, k: int) -> list[str]:
    """Return a warning where rows that differ are fewer than the groups: equal rows are then told apart by nothing."""
    distinct: set[bytes] = set()
    for row in rows:
        distinct.add((row + 0.0).tobytes())  # -0 becomes 0
        if len(distinct) >= k:
            return []
    if len(distinct) == 1:
        return [f"all {len(rows)} rows are equal: {k} groups cannot be told apart"]
    return [f"only {len(distinct)} of the {len(rows)} rows differ: {k} groups cannot be told apart"]


def zero_rows(rows: Any, said: list[str]) -> list[str]:
    """Return a warning where rows are zeros, which have no direction, unless the method has ``said`` so."""
    import numpy as np

    zeros = np.flatnonzero(~rows.any(axis=1))
    if not len(zeros) or any("all-zero rows" in message for message in said):
        return []
    first = f"X has {len(zeros)} all-zero rows, the first at row {zeros[0]}"
    return [f"{first}; they lie in every subspace and their labels mean nothing"]


def by_label(bases: list[Any], labels: Any, k: int) -> list[Any]:
    """Return one basis for each of k labels, from those of the labels that are there: empty (d, 0) for the others."""
    import numpy as np

    placed = [np.zeros((bases[0].shape[0], 0))] * k
    for c, basis in zip(np.unique(labels), bases, strict=True):
        placed[c] = basis
    return placed


def few_groups(labels: Any, k: int) -> list[str]:
    """Return a warning where groups that were asked for hold nothing."""
    import numpy as np

    n_found = len(np.unique(labels))
    counted = "1 group was" if n_found == 1 else f"{n_found} groups were"
    return [] if n_found == k else [f"{counted} found of the {k} that were asked for"]


def run_method(
    X: Any,
    ids: Any,
    truth: Any,
    *,
    method: str,
    n_clusters: int,
    normalize: bool,
    pca: int | None,
    dim: int | None,
    option: list[str] | None,
    out: Path | None,
    memberships: Path | None,
    bases: Path | None,
    compare: bool,
    seeds: int,
    seed: int,
    jobs: int,
    report: Path | None,
    plot: Path | None,
    json: bool,
    image_shape: tuple[int, ...] | None = None,
    reading: list[str] | None = None,
) -> None:
    """Fit one of ``METHODS`` to rows, report, write and draw.

    ``image_shape`` goes to those that know images; ``reading`` says what was guessed of the file.
    """
    import time
    import warnings

    import numpy as np

    from polyspan.cluster import clustering_report, found_subspaces, seed_stability
    from polyspan.io import write_array, write_json

    check_rows(method, len(X), n_clusters)
    rows, projection = _prepared(X, pca, normalize)
    given: dict[str, Any] = {"seed": seed, "jobs": jobs, "normalize": normalize}
    given |= {name: value for name, value in (("dim", dim), ("image", image_shape)) if value is not None}
    fitted = _make(method, n_clusters, given, option or [])
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitted.fit(rows)
        except TypeError as error:
            if not option:
                raise
            given_by = ", ".join(option)
            told_by = f"--option must give values of the kind that {method} takes, got {given_by}: {error}"
            raise ValueError(told_by) from error
        fit_s = time.perf_counter() - started
        agreed = seed_stability(fitted, rows, n_seeds=seeds) if seeds > 1 else None
    found = np.asarray(fitted.labels_)
    said = list(dict.fromkeys(str(w.message) for w in caught))
    said += [*zero_rows(rows, said), *few_rows(rows, n_clusters), *few_groups(found, n_clusters)]
    for message in said:
        say(f"warning: {message}")
    # Groups of mlc are curved in the rows: their subspaces are those of the features that it learned.
    learned = method == "mlc"
    seen = fitted.transform(rows) if learned else rows
    subspaces = getattr(fitted, "subspaces_" if learned else "bases_", None)
    # Directions about means of their own (center=true) are no subspaces of the rows, which go through the origin.
    if subspaces is None or (learned and dim is not None) or getattr(fitted, "center", False):
        subspaces = by_label(found_subspaces(seen, found, dim), found, n_clusters)
    # Columns of zeros fill up where ranks differ.
    subspaces = [basis[:, np.square(basis).sum(axis=0) > 0.5] for basis in subspaces]
    told: dict[str, Any] = {"method": method, "n_clusters": n_clusters} | clustering_report(
        seen,
        found,
        truth=truth,
        bases=subspaces,
        representation=getattr(fitted, "representation_", None),
        stability=agreed,
        random_state=seed,
    )
    told |= {"params": _plain(fitted), "seconds": round(fit_s, 3), "warnings": said, "reading": reading or []}
    if learned:
        told |= {"n_features": rows.shape[1], "learned": {"n_features": seen.shape[1]} | learned_facts(fitted)}
    if compare:
        # One judge for all: the leading directions of the rows that every method saw.
        judged = by_label(found_subspaces(rows, found, dim), found, n_clusters)
        own = clustering_report(rows, found, truth=truth, bases=judged, random_state=seed)
        others = compare_methods(rows, truth, n_clusters, without=method, given=given, dim=dim)
        told["compared"] = [row_of(method, own | {"seconds": told["seconds"]}), *others]
    told["out"] = {name: str(p) for name, p in _chosen(out=out, memberships=memberships, bases=bases).items()}
    if out is not None:
        write_labels(out, found, ids)
    if memberships is not None:
        from polyspan.cluster import memberships as belonging

        write_array(memberships, belonging(seen, subspaces))
    if bases is not None:
        facts = {"normalize": normalize and not learned}
        write_bases(bases, subspaces, told, facts, None if learned else projection)
    if plot is not None and learned:
        from polyspan.cluster import manifold_plots

        manifold_plots.plot_linearized(fitted, seen, plot)
    elif plot is not None:
        from polyspan.cluster.points_plots import plot_subspaces

        plot_subspaces(rows, found, subspaces, plot, fitted=fitted, seed=seed, label="drawing")
    if report is not None:
        write_json(report, told)
    if json:
        show_json(told)
        return
    show_table("", ("what", "value"), _table(told))
    if compare:
        show_table("", ("method", *NUMBERS), comparison_rows(told["compared"], NUMBERS))


def pixels_in_rows(X: Any, *, unit: bool = False) -> Any:
    """Return images (n, ...) as rows of pixels (n, d), of length 1 where that is asked for."""
    rows = X.reshape(len(X), -1)
    return _prepared(rows, None, normalize=True)[0] if unit else rows


def _prepared(X: Any, pca: int | None, normalize: bool) -> tuple[Any, Any]:
    """Return rows projected and brought to unit length, and the projection (d, D) or None."""
    import numpy as np

    from polyspan.linalg import truncated_svd

    projection = None
    if pca is not None:
        if not 1 <= pca <= min(X.shape):
            raise ValueError(f"--pca must be between 1 and min(n, d) = {min(X.shape)}, got {pca}")
        projection = truncated_svd(np.asarray(X), pca).Vh.T
        X = X @ projection
    if normalize:
        peak = np.abs(X).max(axis=1, keepdims=True)
        X = X / np.where(peak > 0, peak, 1)
        lengths = np.linalg.norm(X, axis=1, keepdims=True)
        X = X / np.where(lengths > 0, lengths, 1)
    return np.asarray(X), projection


def _make(name: str, k: int, given: dict[str, Any], options: list[str]) -> Any:
    """Return the estimator of a method with what it takes of the command's options."""
    from importlib import import_module

    module, kind = METHODS[name].where.split(":")
    estimator = getattr(import_module(module), kind)()
    known = estimator.get_params()
    takes = {parameter: given[option] for option, parameter in METHODS[name].takes.items() if option in given}
    own = set(takes)
    for text in options:
        parameter, mark, value = text.partition("=")
        if not mark or parameter not in known:
            raise ValueError(f"--option must be name=value with one of {', '.join(sorted(known))}, got {text!r}")
        if parameter == METHODS[name].clusters or parameter in own:
            raise ValueError(f"--option must leave {parameter} to the command's own options, got {text!r}")
        takes[parameter] = _value(value)
    return estimator.set_params(**{METHODS[name].clusters: k} | METHODS[name].always | takes)


def _value(text: str) -> Any:
    """Return what a word of the command line says: a number, a truth, nothing, or with commas a tuple of them."""
    if "," in text:
        return tuple(_value(part.strip()) for part in text.split(",") if part.strip())
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def compare_methods(
    rows: Any, truth: Any, k: int, *, without: str, given: dict[str, Any], dim: int | None = None
) -> list[dict[str, Any]]:
    """Run the classical methods on the same rows, ``without`` the one that was run already; a dict a method."""
    return [_other(name, rows, truth, k, given, dim) for name in COMPARED if name != without]


def _other(name: str, rows: Any, truth: Any, k: int, given: dict[str, Any], dim: int | None) -> dict[str, Any]:
    """Run one method of the comparison; one that cannot take these rows says so."""
    import time
    import warnings

    from polyspan.cluster import clustering_report, found_subspaces
    from polyspan.errors import NotConverged

    say(f"comparing with {name}")
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_rows(name, len(rows), k)
            fitted = _make(name, k, given, []).fit(rows)
    except (ValueError, NotConverged, MemoryError) as error:
        return {"method": name, "error": " ".join(str(error).split())}
    seconds = round(time.perf_counter() - started, 3)
    subspaces = found_subspaces(rows, fitted.labels_, dim)
    told = clustering_report(rows, fitted.labels_, truth=truth, bases=subspaces, random_state=given["seed"])
    return row_of(name, told | {"seconds": seconds})


def row_of(name: str, told: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a method in the comparison."""
    kept = {key: told[key] for key in ("silhouette", "residual_share", "seconds")}
    return {"method": name} | {key: told["scores"][key] for key in NUMBERS[:3] if "scores" in told} | kept


def learned_facts(fitted: Any) -> dict[str, Any]:
    """Return what training of mlc came to: rates in nats, and how wide memberships are."""
    last = fitted.history_[-1] if fitted.history_ else {}
    return {
        "eta": fitted.eta_,
        "overall_rank": int(fitted.overall_rank_),
        "effective_neighbors": fitted.effective_neighbors_,
        **{name: last[name] for name in ("rate", "class_rate") if name in last},
    }


def _plain(fitted: Any) -> dict[str, Any]:
    """Return the parameters that JSON can say."""
    return {k: v for k, v in fitted.get_params().items() if v is None or isinstance(v, str | int | float | bool)}


def _chosen(**paths: Path | None) -> dict[str, Path]:
    return {name: path for name, path in paths.items() if path is not None}


def _number(value: Any) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _table(told: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("method", told["method"]), ("points", f"{told['n']} of {told['n_features']} features")]
    rows += [("reading", note) for note in told["reading"]]
    if "learned" in told:
        facts = told["learned"]
        rows.append(
            ("subspaces", f"of the {facts['n_features']} features that were learned, rank {facts['overall_rank']}")
        )
        rows += [(name.replace("_", " "), f"{facts[name]:.2f}") for name in LEARNED if name in facts]
    for group in told["clusters"]:
        text = f"{group['size']} points, rank {group['rank']}, {group['residual_share']:.3f} outside"
        rows.append((f"cluster {group['label']}", text))
    rows += [("outside the subspaces", _number(told["residual_share"])), ("silhouette", _number(told["silhouette"]))]
    for pair in told["nearest_subspaces"]:
        rows.append((f"angle of {pair['labels'][0]} and {pair['labels'][1]}", f"{pair['degrees']:.1f} degrees"))
    if "stability" in told:
        s = told["stability"]
        rows.append(("stability", f"ARI {s['mean_ari']:.4f} over {s['seeds']} seeds, at least {s['min_ari']:.4f}"))
    rows += [(name.replace("_", " "), _number(value)) for name, value in told.get("scores", {}).items()]
    rows.append(("seconds to fit", f"{told['seconds']:.3f}"))
    return rows + list(told["out"].items())
