"""``polyspan cluster graph``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_places

LABEL_FILES = (".parquet", ".csv", ".npy")


def check_seeds(seeds: int, seed: int) -> None:
    """Refuse a number of seeds, and a seed, that no generator takes."""
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {seed}")


def graph(
    edges: Path,
    *,
    n_clusters: Annotated[int | None, Parameter(name=("--n-clusters", "-k"))] = None,
    attributes: Path | None = None,
    labels: Path | None = None,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    method: Literal["s2cag", "m-s2cag"] = "s2cag",
    order: int = 10,
    decay: float = 0.9,
    select: bool = False,
    resolution: float = 1.0,
    rounding: Literal["snem", "kmeans", "cluster_qr"] = "snem",
    n_init: int = 10,
    precision: Literal["float32", "float64"] = "float64",
    symmetrize: Literal["error", "max", "min", "mean", "sum"] = "error",
    embedding: Path | None = None,
    memberships: Path | None = None,
    bases: Path | None = None,
    dim: int | None = None,
    compare: bool = False,
    seeds: int = 1,
    seed: int = 0,
    jobs: int = 1,
    report: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Cluster a graph whose vertices carry attributes.

    Prints a report; labels go to --out, keyed by the ids of the input.

    Parameters
    ----------
    edges : Path
        The graph: edges (.csv, .tsv, .txt, .parquet, .arrow, .npy) or a matrix (.npz of SciPy, .mat with W, fea, gnd).
    n_clusters : int
        How many groups; the number of classes where --labels, or the file itself, has true ones.
    attributes : Path
        Rows of numbers, one a vertex, or a table with an id column; not needed where the graph's file holds them.
    labels : Path
        True classes, to score against. They are not used in clustering.
    out : Path
        Where labels go: .parquet and .csv with columns id and label, .npy in the order of the ids.
    method : {"s2cag", "m-s2cag"}
        Subspace of the smoothed attributes, or its modularity form.
    order : int
        Hops of smoothing.
    decay : float
        Weight of a hop relative to the one before, at least 0; above 1 far hops count most.
    select : bool
        Choose order and decay without labels, from a grid; --jobs share it.
    resolution : float
        For m-s2cag; larger values favour smaller groups.
    rounding : {"snem", "kmeans", "cluster_qr"}
        How the embedding becomes groups.
    n_init : int
        Starts of the rounding.
    precision : {"float32", "float64"}
        float32 halves memory.
    symmetrize : {"error", "max", "min", "mean", "sum"}
        What to do with a matrix that is not symmetric.
    embedding : Path
        The subspace found, one row a vertex: .npy, .npz, .parquet or .safetensors.
    memberships : Path
        How far each vertex belongs to each cluster, (n, clusters), rows with the sum 1: the embedding before it is
        rounded; .npy, .npz, .parquet or .safetensors.
    bases : Path
        Orthonormal bases of the clusters' subspaces of the smoothed attributes, one .safetensors file.
    dim : int
        Dimension of the subspaces of --bases; left out, whatever holds 95 %.
    compare : bool
        Run k-means on attributes and on smoothed rows, spectral clustering of the graph, and subspace clusterings of
        the smoothed rows too.
    seeds : int
        Cluster with so many seeds, and report how far they agree.
    seed : int
        Starts of the rounding.
    jobs : int
        Processes for --select.
    report : Path
        Write the report as JSON here too.
    plot : Path
        Draw the embedding and the affinity by cluster, and with --bases the angles between the subspaces (.svg, .png or
        .pdf).
    json : bool
        Print the report as JSON.
    """
    import time
    import warnings

    import numpy as np

    from polyspan.cluster import S2CAG, ModularityS2CAG, seed_stability, select_order_decay
    from polyspan.io import read_graph, write_array, write_json

    if out is not None and out.suffix not in LABEL_FILES:
        raise ValueError(f"--out must end in one of {', '.join(LABEL_FILES)}, got {out}")
    check_seeds(seeds, seed)
    if dim is not None and bases is None:
        raise ValueError(f"--dim must go with --bases, got {dim} alone")
    if select and (order, decay) != (10, 0.9):
        raise ValueError(f"--select must go without --order and --decay, which it finds, got {order} and {decay}")
    if method == "s2cag" and resolution != 1.0:
        raise ValueError(f"--resolution must go with --method m-s2cag, got {resolution} for s2cag")
    places = {"embedding": embedding, "memberships": memberships, "bases": bases}
    check_places(plot, read=(edges, attributes, labels), out=out, report=report, **places)
    started = time.perf_counter()
    found = read_graph(edges, attributes=attributes, labels=labels, symmetrize=symmetrize)
    if found.attributes is None:
        raise ValueError(f"--attributes must be given: {edges} holds a graph without attributes")
    d = found.attributes.shape[1]
    if dim is not None and not 1 <= dim <= d:
        raise ValueError(f"--dim must be between 1 and the {d} attributes, got {dim}")
    if n_clusters is None:
        if found.labels is None:
            raise ValueError("--n-clusters must be given where there are no true classes to count")
        n_clusters = len(np.unique(found.labels))
    options: dict[str, Any] = {"n_clusters": n_clusters, "order": order, "decay": decay, "rounding": rounding}
    options |= {"n_init": n_init, "dtype": precision, "random_state": seed}
    # cluster_qr finds groups by the trivial vector, which the other roundings do without.
    drop_first = rounding != "cluster_qr"
    estimator = (
        S2CAG(**options, drop_first=drop_first)
        if method == "s2cag"
        else ModularityS2CAG(**options, resolution=resolution)
    )
    read_s, table = time.perf_counter() - started, []
    if select:
        choice = select_order_decay(
            found.attributes,
            found.adjacency,
            n_clusters,
            estimator=estimator,
            workers=jobs,
            random_state=seed,
            label="order and decay",
        )
        estimator.set_params(order=choice.order, decay=choice.decay)
        table = [row._asdict() for row in choice.table]
    before_fit = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator.fit(found.attributes, adjacency=found.adjacency)
    seconds = {"read": read_s, "select": before_fit - started - read_s, "fit": time.perf_counter() - before_fit}
    said = [str(w.message) for w in caught]
    if method == "m-s2cag" and rounding == "cluster_qr":
        said.append("cluster_qr finds groups by the trivial vector, which m-s2cag takes away: prefer snem or kmeans")
    for message in said:
        say(f"warning: {message}")
    told: dict[str, Any] = _report(estimator, found, method, seconds) | {
        "selection": table,
        "warnings": said,
    }
    if seeds > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agreed = seed_stability(estimator, found.attributes, n_seeds=seeds, adjacency=found.adjacency)
        told["stability"] = {"seeds": seeds, "mean_ari": agreed.mean_ari, "min_ari": agreed.min_ari}
    if compare:
        told["compared"] = _compared(estimator, found, method, told)
    if out is not None:
        write_labels(out, estimator.labels_, found.ids)
        told["out"] = str(out)
    if embedding is not None:
        write_array(embedding, estimator.embedding_)
        told["embedding"] = str(embedding)
    if memberships is not None:
        write_array(memberships, estimator.memberships_)
        told["memberships"] = str(memberships)
    subspaces = None
    if bases is not None:
        subspaces = estimator.subspaces(found.attributes, adjacency=found.adjacency, subspace_dim=dim)
        for group, basis in zip(told["clusters"], subspaces, strict=True):
            group["rank"] = int(basis.shape[1])
        write_bases(bases, subspaces, told, {"order": told["order"], "decay": told["decay"]})
        told["bases"] = str(bases)
    if plot is not None:
        from polyspan.cluster.plots import plot_clusters

        plot_clusters(estimator.embedding_, estimator.labels_, plot, bases=subspaces)
    if report is not None:
        write_json(report, told)
    if json:
        show_json(told)
        return
    show_table("", ("what", "value"), _rows(told))
    if compare:
        show_table("", ("method", *COMPARED), comparison_rows(told["compared"], COMPARED))


COMPARED = ("accuracy", "nmi", "ari", "modularity", "seconds")


def _compared(fitted: Any, found: Any, method: str, told: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a method: scores where there are classes, and the modularity of the groups in the graph."""
    from polyspan.cluster import class_scores, graph_baselines
    from polyspan.linalg import graph_modularity

    def row(name: str, labels: Any, seconds: float) -> dict[str, Any]:
        scores = {} if found.labels is None else class_scores(found.labels, labels)
        return {"method": name, **scores, "modularity": graph_modularity(found.adjacency, labels), "seconds": seconds}

    rows = [row(method, fitted.labels_, told["seconds"]["fit"])]
    others = graph_baselines(
        found.attributes, found.adjacency, fitted.n_clusters, order=fitted.order, decay=fitted.decay,
        n_init=fitted.n_init, random_state=fitted.random_state,
    )  # fmt: skip
    for other in others:
        say(f"compared with {other.name}")
        if other.labels is None:
            rows.append({"method": other.name, "error": other.error})
        else:
            rows.append(row(other.name, other.labels, round(other.seconds, 3)))
    return rows


def comparison_rows(compared: list[dict[str, Any]], columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the cells of a table of methods; one that was not run says why."""
    rows = []
    for row in compared:
        if "error" in row:
            rows.append((row["method"], f"not run: {row['error']}", *[""] * (len(columns) - 1)))
            continue
        cells = (row.get(name.replace(" ", "_"), None) for name in columns)
        rows.append((row["method"], *("" if cell is None else f"{cell:.4f}" for cell in cells)))
    return rows


def _report(fitted: Any, found: Any, method: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Return what is worth knowing of a clustering, in plain types."""
    import numpy as np

    sizes = np.bincount(fitted.labels_)
    told = {
        "method": method,
        "n": len(fitted.labels_),
        "edges": int((found.adjacency.nnz + (found.adjacency.diagonal() != 0).sum()) // 2),
        "n_features": int(fitted.n_features_in_),
        "order": int(fitted.order),
        "decay": float(fitted.decay),
        "clusters": [
            {"label": c, "size": int(size), "conductance": float(share) if np.isfinite(share) else None}
            for c, (size, share) in enumerate(zip(sizes, fitted.conductance_, strict=True))
        ],
        "affinity_modularity": float(fitted.affinity_modularity_),
        "rounding_objectives": [float(value) for value in fitted.rounding_objectives_],
        "n_isolated": fitted.n_isolated_,
        "n_components": fitted.n_components_,
        "n_unattributed": fitted.n_unattributed_,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    if found.labels is not None:
        from polyspan.cluster import class_scores

        told["scores"] = class_scores(found.labels, fitted.labels_)
    return told


def _rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("method", f"{told['method']}, order {told['order']}, decay {told['decay']}"),
        ("graph", f"{told['n']} vertices, {told['edges']} edges, {told['n_features']} attributes"),
    ]
    said = {
        "n_isolated": ("vertices without a neighbour", "placed by their attributes"),
        "n_unattributed": ("vertices without attributes", "placed by the graph"),
    }
    rows += [(name, f"{told[key]}, {how}") for key, (name, how) in said.items() if told[key]]
    if told["n_components"] - told["n_isolated"] > 1:
        rows.append(("components", f"{told['n_components'] - told['n_isolated']} of two or more vertices"))
    for group in told["clusters"]:
        share = "undefined" if group["conductance"] is None else f"{group['conductance']:.3f}"
        rank = f", rank {group['rank']}" if "rank" in group else ""
        rows.append((f"cluster {group['label']}", f"{group['size']} vertices, conductance {share}{rank}"))
    spread = max(told["rounding_objectives"]) - min(told["rounding_objectives"])
    rows += [
        ("affinity modularity", f"{told['affinity_modularity']:.4f}"),
        ("rounding objective", f"{max(told['rounding_objectives']):.4f}, starts within {spread:.4f}"),
    ]
    if "stability" in told:
        s = told["stability"]
        rows.append(("stability", f"ARI {s['mean_ari']:.4f} over {s['seeds']} seeds, at least {s['min_ari']:.4f}"))
    rows += [(name, f"{value:.4f}") for name, value in told.get("scores", {}).items()]
    rows += [(f"seconds to {name}", f"{value:.3f}") for name, value in told["seconds"].items()]
    written = {"out": "labels", "embedding": "embedding", "memberships": "memberships", "bases": "bases"}
    return rows + [(name, told[key]) for key, name in written.items() if key in told]


def write_labels(path: Path, labels: Any, ids: Any) -> None:
    """Write one label a row, atomically, in the format that the suffix names."""
    import numpy as np

    from polyspan.io import write_array, write_columns

    if path.suffix == ".npy":
        write_array(path, labels)
    else:
        write_columns(path, {"id": np.arange(len(labels)) if ids is None else ids, "label": labels})


def write_bases(
    path: Path, subspaces: list[Any], told: dict[str, Any], facts: dict[str, Any], projection: Any = None
) -> None:
    """Write bases as basis_0, basis_1, ... with ``facts`` on how rows were made.

    Where rows were projected first, the ``projection`` (d, D) goes with them.
    """
    from polyspan.io import save_fitted

    arrays = {f"basis_{c}": basis for c, basis in enumerate(subspaces) if basis.shape[1]}
    if projection is not None:
        arrays["projection"] = projection
    sizes = {c["label"]: c["size"] for c in told["clusters"]}
    about = {"n": told["n"], "sizes": [sizes.get(c, 0) for c in range(len(subspaces))]}
    about["scores"] = told.get("scores", {})
    params = {"method": told["method"], **facts, "n_clusters": len(subspaces)}
    save_fitted(path, kind="FoundSubspaces", arrays=arrays, params=params, about=about)
