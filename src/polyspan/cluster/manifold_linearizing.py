"""Clustering of curved groups by a network that flattens each into a subspace of its own while it clusters."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.errors import WrongContent
from polyspan.linalg import doubly_stochastic, truncated_eigh
from polyspan.run import pick_device

from ._manifold_network import ImageJitter, Source, TwoHeads, as_source, make_network
from ._manifold_plan import check_parameters, make_plan
from ._manifold_training import Training

RANK_SHARE = 0.95


class ManifoldLinearizingClustering(ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, BaseEstimator):
    r"""Cluster images or features whose groups are curved, and learn features in which each group is a subspace.

    A network with two heads maps a batch to unit rows Z and C; memberships are :math:`\Gamma`, the doubly stochastic
    projection of :math:`|CC^\top|` with entropy weight :math:`\eta`. Training makes
    :math:`R(Z) - \gamma R_c(Z, \Gamma)` large: all features spread out while each point's neighbours take little room
    (:class:`RateReductionLoss`). It starts from features that two views of each image share, spread by their total
    coding rate, and from a copy of their head: memberships need no training of their own. Labels are the spectral
    clustering of the memberships.

    It sharpens groups that the start already shows. Without ``augment`` the start is little more than a random
    network, and what is sharpened is the neighbourhoods of the input: use that for features that are good already.
    Labels passed as ``y`` are ignored.
    Source: catalogue entry ``mlc``.

    Parameters
    ----------
    n_clusters : int, default=8
        k; see :meth:`coding_lengths` where it is not known.
    n_components : int or "auto", default="auto"
        Width d of the learned features; ``"auto"`` is 128, less for small batches. Batches smaller than d limit R.
    hidden : int or "auto", default="auto"
        Width of the hidden layers; ``"auto"`` is four times the input's within 256 .. 4096, and 256 for images.
    backbone : Module, optional
        Maps rows, or images of ``image_shape``, to features; its copy is trained along. By default none for rows, and
        two convolutions for images.
    image_shape : tuple, optional
        (h, w) or (channels, h, w): rows of X are flattened images. Implied where X is (n, h, w) or (n, channels, h, w).
    eps2 : float, default=0.1
        Squared distortion of the rates.
    gamma : float, default=1.0
    eta : float or "auto", default=0.175
        The one that matters. ``"auto"`` picks it after the start such that a row of a batch of b has about b / (2k)
        effective neighbours, :math:`\exp` of the entropy of its memberships.
    augment : callable, "image" or None, default=None
        ``augment(batch, generator)`` draws another view of a batch as the network takes it. ``"image"`` is
        :class:`ImageJitter` at its defaults. What it varies, clusters will not depend on.
    n_views : int, default=2
        Views a step, averaged, in the main stage; without ``augment`` there is one.
    init : {"tcr", "none"} or path or Module, default="tcr"
        Total coding rate; the untrained network; a file that :meth:`save` wrote; or the ``module_`` of another fit.
    tcr_epochs, max_epochs : int or "auto", default="auto"
        Passes of both stages. ``"auto"``: at least 200 steps of the first (50 without augmentation, which then has
        little to learn) and at least 20 passes and 100 steps of the second.
    tcr_weight : float, default=10.0
        Weight of the agreement of two views.
    batch_size : int or "auto", default="auto"
        ``"auto"`` is a sixth of the rows within 256 .. 1024. The last, short batch of a pass is left out.
    optimizer : {"adam", "sgd"}, default="adam"
        ``"sgd"`` has momentum 0.9.
    tcr_lr, lr : float, default=1e-3, 3e-4
    weight_decay, cluster_weight_decay : float, default=1e-4, 5e-3
        Of the network, and of the cluster head.
    membership_top : int, optional
        ``top`` of :class:`RateReductionLoss`: faster, and another objective where memberships are wide.
    membership_rows : int, default=4096
        Spectral clustering takes this many random rows at most; all others are assigned as new ones are.
    bfloat16 : bool, default=False
        Run the network, never the rates, in half precision.
    checkpoint : path, optional
        A .safetensors file that is rewritten after every pass; a ``fit`` that was stopped goes on from it, to the
        same result, and one that ends leaves it there.
    device : str, default="auto"
    random_state : int, RandomState or None
    verbose : bool or int, default=0
        Show progress on stderr.

    Attributes
    ----------
    labels_ : ndarray of shape (n,)
    module_ : Module
        The trained network, in eval mode, on the CPU.
    history_ : list of dict
        For every pass: ``stage``, and in means over steps R (``rate``), and ``agreement`` of views or R_c
        (``class_rate``), in nats and without sign.
    eta_ : float
    numerical_rank_ : ndarray of shape (n_clusters,)
        Fewest directions that hold 95 % of the squares of a cluster's features; ``overall_rank_`` of all features.
    subspaces_ : list of ndarray of shape (d, rank)
        Orthonormal bases of the clusters' features.
    cosines_ : ndarray of shape (n_clusters, n_clusters)
        Mean absolute cosine between features of two clusters.
    effective_neighbors_ : float
        Mean over rows of the exponential of their memberships' entropy, between 1 and all rows.
    n_rows_seen_, batch_size_, n_features_in_ : int
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        n_components="auto",
        hidden="auto",
        backbone=None,
        image_shape=None,
        eps2=0.1,
        gamma=1.0,
        eta=0.175,
        augment=None,
        n_views=2,
        init="tcr",
        tcr_epochs="auto",
        max_epochs="auto",
        tcr_weight=10.0,
        batch_size="auto",
        optimizer="adam",
        tcr_lr=1e-3,
        lr=3e-4,
        weight_decay=1e-4,
        cluster_weight_decay=5e-3,
        membership_top=None,
        membership_rows=4096,
        bfloat16=False,
        checkpoint=None,
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.hidden = hidden
        self.backbone = backbone
        self.image_shape = image_shape
        self.eps2 = eps2
        self.gamma = gamma
        self.eta = eta
        self.augment = augment
        self.n_views = n_views
        self.init = init
        self.tcr_epochs = tcr_epochs
        self.max_epochs = max_epochs
        self.tcr_weight = tcr_weight
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.tcr_lr = tcr_lr
        self.lr = lr
        self.weight_decay = weight_decay
        self.cluster_weight_decay = cluster_weight_decay
        self.membership_top = membership_top
        self.membership_rows = membership_rows
        self.bfloat16 = bfloat16
        self.checkpoint = checkpoint
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y=None) -> "ManifoldLinearizingClustering":
        """Train the network on ``X`` and cluster its rows.

        Parameters
        ----------
        X : array (n, d), images (n, h, w) or (n, channels, h, w), torch Dataset or DataLoader, EmbeddingReader or path
            Memory maps are read batch by batch, datasets item by item (the first of a tuple, so that labels are never
            seen), readers in their own order, shuffled within a batch of the reader; a loader gives its dataset. A
            path is mapped.

        Raises
        ------
        ValueError
            A parameter is out of range, or X has fewer than 2k rows, or rows that are all equal or not finite.
        NotConverged
            Training left the finite numbers.
        """
        source = self._source(X, reset=True)
        check_parameters(self, source.n)
        batch = self._batch(source.n)
        rng = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(rng.randint(2**31 - 1)))
        source.measure()
        self._mean, self._scale, self._shape = source.mean, source.scale, source.shape
        views = self._views(source)
        network = self._network(source, batch, generator)
        device = pick_device(self.device)
        training = Training(network.to(device), source, make_plan(self, source, batch, views), generator, device)
        training.run()
        self.module_ = network.cpu().eval()
        self.eta_, self.history_, self.batch_size_ = training.eta, training.history, batch
        self._cluster(source, rng)
        return self

    def transform(self, X) -> np.ndarray:
        """Return the learned unit features Z (n, n_components), in float64 for float64 input, float32 otherwise."""
        check_is_fitted(self)
        source = self._source(X, reset=False)
        return np.concatenate([Z for Z, _ in self._run(source)])

    def predict(self, X) -> np.ndarray:
        """Return the cluster of each row (n,): the one to whose rows its membership goes.

        The memberships of a new row follow from those of the rows that were clustered, each by its own potential.
        Rows of the training data keep their label almost always, not by necessity.
        """
        check_is_fitted(self)
        return np.concatenate([self._vote(C).argmax(axis=1) for _, C in self._run(self._source(X, reset=False))])

    def membership(self, X) -> np.ndarray:
        """Return the doubly stochastic memberships (n, n) between rows of X, at most ``membership_rows`` of them."""
        check_is_fitted(self)
        source = self._source(X, reset=False)
        if source.n > self.membership_rows:
            raise ValueError(f"X must have at most membership_rows={self.membership_rows} rows, got {source.n}")
        return self._membership(np.concatenate([C for _, C in self._run(source)]))

    def coding_lengths(self, X, n_clusters) -> dict[int, float]:
        r"""Return nats to code the features for each number of clusters; the smallest is a guess at the right one.

        :math:`L = \sum_j \tfrac{n_j+d}{2}\log\det(I+\tfrac{d}{n_j\epsilon^2}Z_j^\top Z_j) - n_j\log\tfrac{n_j}{n}`.
        The network was trained knowing no number; memberships are clustered anew for each. At most ``membership_rows``
        rows.

        Parameters
        ----------
        n_clusters : iterable of int
            Each between 1 and n - 1.
        """
        gamma = self.membership(X)
        Z = self.transform(X).astype(np.float64)
        rng = check_random_state(self.random_state)
        wanted = [int(k) for k in n_clusters]
        return {k: coding_length(Z, _spectral(gamma, k, rng), eps2=self.eps2) for k in wanted}

    def save(self, path: Path | str) -> Path:
        """Write network, clusters and parameters to one .safetensors file, atomically; no pickle.

        A ``backbone`` or an ``augment`` of your own is code and is not in the file; pass them to :meth:`load`.
        """
        from polyspan.io import constructor_params, save_fitted

        check_is_fitted(self)
        own = ("backbone", "augment")
        init = {name: value for name, value in constructor_params(self).items() if name not in own}
        init["init"] = init["init"] if init["init"] in ("tcr", "none") else "none"
        init["checkpoint"] = None
        facts = {name: getattr(self, name) for name in FACTS}
        params = {"init": init, "facts": facts, "shape": self._shape, "scale": self._scale}
        params["own"] = {"backbone": self.backbone is not None, "augment": not isinstance(self.augment, str | None)}
        params["augment"] = self.augment if isinstance(self.augment, str) else None
        params["sizes"] = [_last(self.module_.features), _first(self.module_.features)]
        arrays = {f"module.{name}": value.numpy() for name, value in self.module_.state_dict().items()}
        arrays |= {f"subspace.{j}": basis for j, basis in enumerate(self.subspaces_)}
        arrays |= {name: getattr(self, name) for name in ARRAYS}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params)

    @classmethod
    def load(cls, path: Path | str, *, backbone: Any = None, augment: Any = None) -> "ManifoldLinearizingClustering":
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            It was fitted with a backbone of the user's, and none, or one of another shape, is given.
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from polyspan.io import load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        own = found.params["own"]
        if own["backbone"] and backbone is None:
            raise ValueError(f"backbone must be given to load {path}: it was fitted with one that the file cannot hold")
        made = cls(**found.params["init"], backbone=backbone, augment=augment or found.params["augment"])
        for name, value in found.params["facts"].items():
            setattr(made, name, value)
        for name in ARRAYS:
            setattr(made, name, np.array(found.arrays[name]))
        shape = found.params["shape"]
        made._shape, made._scale = None if shape is None else tuple(shape), found.params["scale"]
        made.subspaces_ = [np.array(found.arrays[f"subspace.{j}"]) for j in range(len(made.numerical_rank_))]
        d, hidden = found.params["sizes"]
        network = _built(made.n_features_in_, made._shape, backbone, hidden, d, torch.Generator())
        _load_state(network, found.arrays, path)
        made.module_ = network.eval()
        made._n_features_out = d
        return made

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _source(self, X: Any, *, reset: bool) -> Source:
        shape = self.image_shape if reset else self._shape
        rows, shape, array = as_source(X, shape)
        if array:
            rows = validate_data(self, rows, reset=reset, dtype="numeric", ensure_min_samples=2 if reset else 1)
        source = Source(rows, shape)
        if not array and reset:
            self.n_features_in_ = source.width
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
        if source.width != self.n_features_in_:
            raise ValueError(f"X must have {self.n_features_in_} features, as in fit, got {source.width}")
        if shape is not None and math.prod(shape) != source.width:
            raise ValueError(f"image_shape must hold {source.width} pixels, got {shape}")
        if not reset:
            source.mean, source.scale = self._mean, self._scale
        return source

    def _batch(self, n: int) -> int:
        size: Any = self.batch_size
        if size == "auto":
            return min(n, max(256, min(1024, n // 6)))
        if size > n:
            warnings.warn(f"batch_size={size} is larger than the {n} rows; taking all of them", stacklevel=3)
        return min(n, int(size))

    def _views(self, source: Source) -> Any:
        """Return the augmentation, and say when images have none."""
        if source.shape is None and self.augment == "image":
            raise ValueError("image_shape must be given, or X be images, for augment='image'")
        if source.shape is not None and self.augment is None:
            warnings.warn("images without augment: no invariance will be learned", stacklevel=3)
        return ImageJitter() if self.augment == "image" else self.augment

    def _network(self, source: Source, batch: int, generator: torch.Generator) -> TwoHeads:
        width = source.width
        hidden = self.hidden
        if hidden == "auto":
            hidden = 256 if source.shape is not None else min(4096, max(256, 4 * width))
        d: Any = self.n_components
        if d == "auto":
            d = max(1, min(128, batch // 2))
            if d < self.n_clusters:
                warnings.warn(
                    f"n_components={d} is below n_clusters={self.n_clusters}, for batches of {batch} rows: as many "
                    "subspaces cannot all lie apart",
                    stacklevel=3,
                )
        elif d > batch:
            warnings.warn(f"n_components={d} exceeds the batch of {batch} rows, whose rank limits R", stacklevel=3)
        self._n_features_out = int(d)
        if isinstance(self.init, torch.nn.Module):
            given = self.init.state_dict()
        elif self.init in ("tcr", "none"):
            given = None
        else:
            from polyspan.io import load_fitted

            given = load_fitted(Path(self.init), kind=type(self).__name__).arrays
            given = {name.removeprefix("module."): torch.as_tensor(np.array(value)) for name, value in given.items()}
        network = _built(width, source.shape, self.backbone, int(hidden), int(d), generator)
        if given is not None:
            own = network.state_dict()
            wrong = [name for name, value in own.items() if name not in given or given[name].shape != value.shape]
            if wrong:
                raise ValueError(f"init must be a network of these sizes; {wrong[0]} is missing or of another shape")
            network.load_state_dict({name: given[name] for name in own})
        return network

    def _run(self, source: Source):
        """Yield Z and C of all rows, block by block, in the float width of the rows."""
        device = pick_device(self.device)
        double = getattr(source.X, "dtype", None) == np.float64 and device.type != "mps"
        network = copy.deepcopy(self.module_).to(device, torch.float64 if double else torch.float32)
        with torch.no_grad():
            for block in source.blocks():
                Z, C = network(source.tensor(block, device, torch.float64 if double else torch.float32))
                yield Z.cpu().numpy(), C.cpu().numpy()

    def _membership(self, C: np.ndarray) -> np.ndarray:
        return doubly_stochastic(np.abs(C @ C.T), temperature=self.eta_)

    def _cluster(self, source: Source, rng: Any) -> None:
        """Cluster the memberships of the rows, or of a sample of them, and describe the clusters."""
        n, most = source.n, self.membership_rows
        chosen = np.arange(n) if n <= most else np.sort(rng.permutation(n)[:most])
        found, start = [], 0
        for Z, C in self._run(source):
            rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(Z))] - start
            found.append((Z[rows], C[rows]))
            start += len(Z)
        if start != n:
            raise ValueError(f"X must give its {n} rows in every pass, got {start}")
        Z, C = (np.concatenate(part) for part in zip(*found, strict=True))
        gamma = self._membership(C)
        entropy = -(gamma * np.log(np.maximum(gamma, 1e-38))).sum(axis=1)
        self.effective_neighbors_ = float(np.exp(entropy).mean())
        if self.effective_neighbors_ > 0.99 * len(C):
            warnings.warn(f"the memberships show no structure at eta={self.eta_:g}: all are alike", stacklevel=3)
        own = _spectral(gamma, self.n_clusters, rng)
        self.n_rows_seen_ = len(C)
        # Potential of every row: its memberships are exp(|cos| / eta + u_i + u_j).
        potential = (np.log(np.maximum(np.diag(gamma), 1e-38)) - (C**2).sum(axis=1) / self.eta_) / 2
        self._anchors, self._potential, self._anchor_labels = C, potential.astype(np.float32), own
        self.labels_ = np.empty(n, dtype=np.int64)
        if n <= most:
            self.labels_[:] = own
        else:
            self.labels_ = np.concatenate([self._vote(part).argmax(axis=1) for _, part in self._run(source)])
            self.labels_[chosen] = own
        self._describe(Z, own)

    def _describe(self, Z: np.ndarray, labels: np.ndarray) -> None:
        spectra = [np.linalg.svd(Z[labels == j], full_matrices=False)[1:] for j in range(self.n_clusters)]
        self.numerical_rank_ = np.array([numerical_rank(s) for s, _ in spectra])
        self.subspaces_ = [
            np.ascontiguousarray(Vh[: max(r, 1)].T) for r, (_, Vh) in zip(self.numerical_rank_, spectra, strict=True)
        ]
        self.overall_rank_ = numerical_rank(np.linalg.svd(Z, compute_uv=False))
        share = np.eye(self.n_clusters, dtype=Z.dtype)[labels]
        share /= np.maximum(share.sum(axis=0), 1)
        self.cosines_ = share.T @ np.abs(Z @ Z.T) @ share

    def _vote(self, C: np.ndarray) -> np.ndarray:
        """Unnormalised memberships (n, k) of rows in clusters; the row's own potential would not change the order."""
        logits = np.abs(C @ self._anchors.T) / C.dtype.type(self.eta_) + self._potential
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weight @ np.eye(self.n_clusters, dtype=weight.dtype)[self._anchor_labels]


FACTS = (
    "n_features_in_", "history_", "eta_", "batch_size_", "n_rows_seen_", "overall_rank_", "effective_neighbors_",
)  # fmt: skip
ARRAYS = ("_mean", "_anchors", "_potential", "_anchor_labels", "labels_", "numerical_rank_", "cosines_")


def coding_length(Z: np.ndarray, labels: np.ndarray, *, eps2: float | int = 0.1) -> float:
    r"""Return the nats that unit rows take when coded cluster by cluster, names of the clusters included.

    :math:`\sum_j \tfrac{n_j+d}{2}\log\det(I+\tfrac{d}{n_j\epsilon^2}Z_j^\top Z_j) - n_j\log\tfrac{n_j}{n}`. Compare it
    over numbers of clusters: the smallest wins. Many clusters pay for their subspaces, few for their width.
    Source: Ma et al. 2007; catalogue entry ``mlc``.

    Parameters
    ----------
    Z : ndarray of shape (n, d)
    labels : ndarray of shape (n,)
    eps2 : float
        Squared distortion.
    """
    from polyspan.linalg import coding_rate

    n, d = Z.shape
    total = 0.0
    for j in np.unique(labels):
        rows = Z[labels == j]
        total += (len(rows) + d) * float(coding_rate(rows, math.sqrt(eps2))) - len(rows) * math.log(len(rows) / n)
    return total


def numerical_rank(singular_values: np.ndarray, share: float = RANK_SHARE) -> int:
    """Return the fewest leading singular values whose squares hold more than ``share`` of all squares."""
    squares = np.square(np.asarray(singular_values, dtype=np.float64))
    if not squares.sum() > 0:
        return 0
    return min(len(squares), int(np.searchsorted(np.cumsum(squares) / squares.sum(), share, side="right")) + 1)


def _spectral(gamma: np.ndarray, k: int, rng: Any) -> np.ndarray:
    """Cluster the rows of a doubly stochastic matrix: its k leading eigenvectors, unit rows, k-means."""
    from sklearn.cluster import KMeans

    if not 1 <= k < len(gamma):
        raise ValueError(f"n_clusters must be between 1 and n - 1 = {len(gamma) - 1}, got {k}")
    wide = gamma.astype(np.float64)
    # The matrix is its own normalised affinity; half of it is added so that negative eigenvalues do not lead.
    vectors = truncated_eigh(wide, k, which="largest", rng=np.random.default_rng(0)).vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    return KMeans(k, n_init=10, random_state=rng.randint(2**31 - 1)).fit(unit).labels_.astype(np.int64)


def _built(width: int, shape: Any, backbone: Any, hidden: int, d: int, generator: torch.Generator) -> TwoHeads:
    # Layers draw first weights from torch's global generator before ours replace them.
    with torch.random.fork_rng(devices=[]):
        return make_network(width, shape, backbone, hidden, d, generator)


def _load_state(network: TwoHeads, arrays: dict[str, np.ndarray], path: Any) -> None:
    state = {
        name: torch.as_tensor(np.array(arrays[f"module.{name}"]))
        for name in network.state_dict()
        if f"module.{name}" in arrays
    }
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WrongContent(path, found="a network of other sizes", expected="the network that was fitted") from error


def _last(head: Any) -> int:
    return int(head[-1].out_features)


def _first(head: Any) -> int:
    return int(head[0].in_features)
