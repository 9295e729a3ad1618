"""Clusterings from coarse to fine, and features whose first coordinates are of use alone, learned without labels."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.errors import WrongContent
from polyspan.run import pick_device

from ._manifold_network import Source, as_source
from ._matryoshka_encoders import encode, make_encoder
from ._matryoshka_plan import check_parameters, make_plan
from ._matryoshka_training import Network, Training
from .image_folder import ImageFolder
from .matryoshka_head import NestedMatryoshkaHead, nested_widths

ARRAYS = ("labels_", "level_labels_", "cluster_centers_", "_mean")
FACTS = ("history_", "widths_", "n_prototypes_", "batch_size_", "n_features_in_", "n_steps_")
OWN = ("encoder", "augment")
SAMPLE = 20_000


class NestedMatryoshkaClustering(ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, BaseEstimator):
    r"""Learn features and clusters of images, or of the features of any backbone, at several widths at once.

    A student encoder and its moving average, the teacher, see two views of each item. A head
    (:class:`NestedMatryoshkaHead`) scores the first :math:`m_l` coordinates of the feature against :math:`K_l`
    prototypes, at each of a few widths. The teacher's scores, balanced over the batch by Sinkhorn-Knopp, are the
    targets of the student's for the other view; the losses of all levels are added, with a term that spreads features
    (KoLeo) and, for encoders with patches, the same game at patches that are hidden from the student. So prefixes of
    the feature are of use, and the prototypes of the levels are clusters from coarse to fine. The ``n_clusters`` groups
    are those of k-means on the whole features, of 20,000 random rows where there are more.

    What views vary, clusters will not depend on: it needs an ``augment`` that fits the data, and hundreds of steps. The
    balance assumes that groups are of like size within a batch; prototypes many more than rows of a batch stand for
    fractions of a row. Where only short features are wanted, a PCA of features learned at one width did better than
    trained prefixes in all that was measured. Labels passed as ``y`` are ignored.

    Source: catalogue entry ``franca``.

    Parameters
    ----------
    n_clusters : int or None, default=8
        Groups of ``labels_``; with None they are the prototypes of the finest level.
    encoder : {"auto", "transformer"} or Module, default="auto"
        ``"auto"`` is one hidden layer for rows and two convolutions for images; ``"transformer"`` a small vision
        transformer. A copy of a module of yours is trained along: it returns features (b, D), or (features, patches
        (b, n, D)) and then takes ``(images, mask (b, n))``, or is a vision model of Hugging Face.
    n_components : int, default=64
        Width D of the features; a module of yours has its own.
    n_prototypes : int or "auto", default="auto"
        At full width; ``"auto"`` is the batch size, 32 at least. Near the batch size is where Sinkhorn works.
    widths : sequence of int, optional
        Increasing; left out, D/16, D/8, D/4, D/2 and D as far as they hold 2 prototypes. ``[D]`` is a single head.
    nesting : {"slice", "linear"}, default="slice"
    hidden, bottleneck : int, default=256, 64
        Widths of hidden layers of encoder and heads, and at the end of the heads.
    n_layers : int, default=3
        Of the heads.
    normalize : bool, default=True
        Cosine prototypes; False as published.
    image_shape : tuple, optional
        (h, w) or (channels, h, w): rows of X are flattened images. Implied where X is (n, h, w) or (n, channels, h, w).
    patch_size : int, default=4
        Pixels along the side of a patch of ``"transformer"``, or of a masked module of yours.
    augment : callable, "image", "auto" or None, default="auto"
        ``augment(batch, generator)`` draws another view. ``"auto"`` is :class:`ImageJitter` for images; for rows normal
        noise of 0.3 of their overall deviation, and a fifth of the coordinates set to the mean.
    global_scale : (low, high), optional
        Cut views of so large a share of the image's area before ``augment``; published is (0.32, 1).
    n_local : int, default=0
        Small crops a step, which only the student sees; published is 8.
    local_scale : (low, high), default=(0.05, 0.32)
        Their share of the area.
    local_side : float, default=0.5
        Their side as a share of the image's; a multiple of the patch is taken.
    mask : {"cyclic", "block"} or None, default=None
        Hide patches: a block's complement that runs over the edges, so that all are hidden equally often, or not.
    mask_ratio : (low, high), default=(0.1, 0.65)
        Share of patches hidden in a masked image.
    mask_probability : float, default=0.5
        Share of views that are masked.
    drop_path : float, default=0.0
        Of ``"transformer"``.
    max_steps : int, default=400
    batch_size : int or "auto", default="auto"
        ``"auto"`` is 256, or all rows where they are fewer. The last, short batch of a pass is left out.
    lr : float, default=1e-3
        Highest rate of AdamW, after a rise and before a cosine.
    weight_decay : (first, last), default=(0.04, 0.2)
    momentum : float or "auto", default="auto"
        Of the teacher at first; a cosine to 1. ``"auto"`` is 1 - 5 / max_steps within 0.8 .. 0.994: the teacher must
        have left its first weights long before the end. Published is 0.994 over 625,000 steps.
    student_temperature : float, default=0.1
    teacher_temperature : (first, last), default=(0.04, 0.07)
        Linear over the first 0.3 of the steps.
    sinkhorn_rounds : int, default=3
    koleo_weight, ibot_weight : float, default=0.1, 1.0
    clip : float, default=3.0
        Largest norm of a gradient.
    warmup_share, frozen_share : float, default=0.1, 0.0
        Shares of the steps in which the rate rises, and in which prototypes do not move.
    patch_lr_share : float, default=0.2
        Rate of parameters called ``patch_embed``, as a share of the others'.
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
    level_labels_ : ndarray of shape (n, L)
        Prototype of each row at each level, coarse to fine.
    cluster_centers_ : ndarray of shape (n_clusters, D)
        Means of the clusters' features; none for ``n_clusters=None``.
    module_ : Module
        The teacher, in eval mode, on the CPU: ``encoder``, ``head`` and ``patch_head``.
    widths_, n_prototypes_ : tuple of int
    history_ : list of dict
        For every pass: ``step``, mean ``loss`` and its parts ``dino``, ``ibot`` and ``koleo`` as weighted, in nats, and
        ``used``: exponential of the entropy of the teacher's use of the prototypes, a level.
    batch_size_, n_steps_, n_features_in_ : int
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        encoder="auto",
        n_components=64,
        n_prototypes="auto",
        widths=None,
        nesting="slice",
        hidden=256,
        bottleneck=64,
        n_layers=3,
        normalize=True,
        image_shape=None,
        patch_size=4,
        augment="auto",
        global_scale=None,
        n_local=0,
        local_scale=(0.05, 0.32),
        local_side=0.5,
        mask=None,
        mask_ratio=(0.1, 0.65),
        mask_probability=0.5,
        drop_path=0.0,
        max_steps=400,
        batch_size="auto",
        lr=1e-3,
        weight_decay=(0.04, 0.2),
        momentum="auto",
        student_temperature=0.1,
        teacher_temperature=(0.04, 0.07),
        sinkhorn_rounds=3,
        koleo_weight=0.1,
        ibot_weight=1.0,
        clip=3.0,
        warmup_share=0.1,
        frozen_share=0.0,
        patch_lr_share=0.2,
        checkpoint=None,
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.n_clusters = n_clusters
        self.encoder = encoder
        self.n_components = n_components
        self.n_prototypes = n_prototypes
        self.widths = widths
        self.nesting = nesting
        self.hidden = hidden
        self.bottleneck = bottleneck
        self.n_layers = n_layers
        self.normalize = normalize
        self.image_shape = image_shape
        self.patch_size = patch_size
        self.augment = augment
        self.global_scale = global_scale
        self.n_local = n_local
        self.local_scale = local_scale
        self.local_side = local_side
        self.mask = mask
        self.mask_ratio = mask_ratio
        self.mask_probability = mask_probability
        self.drop_path = drop_path
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.sinkhorn_rounds = sinkhorn_rounds
        self.koleo_weight = koleo_weight
        self.ibot_weight = ibot_weight
        self.clip = clip
        self.warmup_share = warmup_share
        self.frozen_share = frozen_share
        self.patch_lr_share = patch_lr_share
        self.checkpoint = checkpoint
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y=None) -> "NestedMatryoshkaClustering":
        """Train on ``X`` and cluster its rows.

        Parameters
        ----------
        X : array (n, d), images (n, h, w) or (n, channels, h, w), torch Dataset or DataLoader, EmbeddingReader or path
            Memory maps are read batch by batch, datasets item by item (the first of a tuple, so that labels are never
            seen), readers in their own order, shuffled within a batch of the reader. A path is an array, which is
            mapped, or a folder of pictures, which are brought to ``image_shape``.

        Raises
        ------
        ValueError
            A parameter is out of range, or X has fewer rows than clusters, or rows that are all equal or not finite.
        NotConverged
            Training left the finite numbers, or the teacher puts all rows on one prototype.
        """
        source = self._source(X, reset=True)
        check_parameters(self, source.n)
        batch = self._batch(source.n)
        rng = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(rng.randint(2**31 - 1)))
        source.measure()
        self._mean, self._scale, self._shape = np.atleast_1d(source.mean), float(source.scale), source.shape
        network = self._network(source, batch, generator)
        device = pick_device(self.device)
        training = Training(network.to(device), source, make_plan(self, source, batch, network), generator, device)
        training.run()
        self.module_ = training.teacher.cpu().eval()
        self.history_, self.batch_size_, self.n_steps_ = training.history, batch, training.step
        self._cluster(source, rng)
        return self

    def transform(self, X, width=None) -> np.ndarray:
        """Return features (n, D), or their first ``width`` coordinates, in float64 for float64 input, else float32."""
        check_is_fitted(self)
        most = self._n_features_out
        if width is not None and not 1 <= width <= most:
            raise ValueError(f"width must be between 1 and {most}, got {width}")
        return np.concatenate([z[:, :width] for z, _ in self._run(self._source(X, reset=False))])

    def predict(self, X, level=None) -> np.ndarray:
        """Return the cluster (n,) of each row, or with ``level`` its prototype there; 0 is coarsest, -1 finest."""
        check_is_fitted(self)
        levels = len(self.widths_)
        if level is not None and not -levels <= level < levels:
            raise ValueError(f"level must be between {-levels} and {levels - 1}, got {level}")
        made = self._run(self._source(X, reset=False))
        if level is None and self.n_clusters is not None:
            return np.concatenate([self._nearest(z) for z, _ in made])
        return np.concatenate([own[:, -1 if level is None else level] for _, own in made])

    def patch_features(self, X) -> np.ndarray:
        """Return the features of patches (n, patches, D), as :class:`PositionalDisentangler` takes them.

        Raises
        ------
        ValueError
            The encoder gives none.
        """
        check_is_fitted(self)
        source, made = self._source(X, reset=False), []
        with torch.no_grad():
            for block in source.blocks():
                patches = encode(self.module_.encoder, source.tensor(block, "cpu"))[1]
                if patches is None:
                    raise ValueError("encoder must give features of patches, as 'transformer' does, got one without")
                made.append(patches.numpy())
        return np.concatenate(made)

    def save(self, path: Path | str) -> Path:
        """Write network, clusters and parameters to one .safetensors file, atomically; no pickle.

        An ``encoder`` or an ``augment`` of your own is code and is not in the file; pass them to :meth:`load`.
        """
        from polyspan.io import constructor_params, save_fitted

        check_is_fitted(self)
        init = {name: value for name, value in constructor_params(self).items() if name not in OWN}
        init["checkpoint"] = None
        words = {name: getattr(self, name) for name in OWN if isinstance(getattr(self, name), str | None)}
        facts = {name: getattr(self, name) for name in FACTS}
        params = {"init": init, "words": words, "facts": facts, "shape": self._shape, "scale": self._scale}
        arrays = {f"module.{name}": value.numpy() for name, value in self.module_.state_dict().items()}
        arrays |= {name: getattr(self, name) for name in ARRAYS}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params)

    @classmethod
    def load(cls, path: Path | str, *, encoder: Any = None, augment: Any = None) -> "NestedMatryoshkaClustering":
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            It was fitted with an encoder of the user's, and none is given.
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else, or weights of another encoder.
        """
        from polyspan.io import load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        words = dict(found.params["words"])
        if "encoder" not in words and encoder is None:
            raise ValueError(f"encoder must be given to load {path}: it was fitted with one that the file cannot hold")
        words |= {name: value for name, value in (("encoder", encoder), ("augment", augment)) if value is not None}
        # JSON has no tuples; a checkpoint tells them from lists.
        init = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found.params["init"].items()
        }
        made = cls(**init, **words)
        for name, value in found.params["facts"].items():
            setattr(made, name, tuple(value) if name in ("widths_", "n_prototypes_") else value)
        for name in ARRAYS:
            setattr(made, name, np.array(found.arrays[name]))
        shape = found.params["shape"]
        made._shape, made._scale = None if shape is None else tuple(shape), float(found.params["scale"])
        network = made._built(made.n_features_in_, made._shape, made.n_prototypes_[-1], torch.Generator())
        own = {n.removeprefix("module."): a for n, a in found.arrays.items() if n.startswith("module.")}
        wanted = network.state_dict()
        wrong = [n for n, t in wanted.items() if n not in own or tuple(t.shape) != own[n].shape] or sorted(
            set(own) - set(wanted)
        )
        if wrong:
            raise WrongContent(path, found=f"other weights {wrong[0]}", expected="those of the encoder that was given")
        network.load_state_dict({name: torch.as_tensor(np.array(value)) for name, value in own.items()})
        made.module_ = network.eval()
        return made

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _source(self, X: Any, *, reset: bool) -> Source:
        shape = self.image_shape if reset else self._shape
        if isinstance(X, str | Path) and Path(X).is_dir():
            X = ImageFolder(X, shape)
        rows, shape, array = as_source(X, shape)
        if array:
            rows = validate_data(self, rows, reset=reset, dtype="numeric", ensure_min_samples=2 if reset else 1)
        source = Source(rows, shape)
        if not array and reset:
            self.n_features_in_ = source.width
            vars(self).pop("feature_names_in_", None)
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
            return min(n, 256)
        if size > n:
            warnings.warn(f"batch_size={size} is larger than the {n} rows; taking all of them", stacklevel=3)
        return min(n, int(size))

    def _network(self, source: Source, batch: int, generator: torch.Generator) -> Network:
        prototypes: Any = self.n_prototypes
        prototypes = max(32, batch) if prototypes == "auto" else int(prototypes)
        if prototypes > 16 * batch:
            warnings.warn(
                f"n_prototypes={prototypes} is far above the {batch} rows of a batch: most of them will stand for a "
                "fraction of one row",
                stacklevel=3,
            )
        return self._built(source.width, source.shape, prototypes, generator)

    def _built(self, width: int, shape: tuple[int, ...] | None, prototypes: int, generator: torch.Generator) -> Network:
        d = int(self.n_components)
        encoder = make_encoder(
            self.encoder,
            width,
            shape,
            d=d,
            hidden=int(self.hidden),
            patch=int(self.patch_size),
            drop_path=float(self.drop_path),
            generator=generator,
        )
        with torch.no_grad():
            example = torch.zeros(2, *(shape or (width,)))
            feature, patches = encode(copy.deepcopy(encoder).eval(), example)
        d = int(feature.shape[1])
        self._n_features_out = d
        if self.mask is not None and patches is None:
            raise ValueError("encoder must give features of patches for a mask, as 'transformer' does, got one without")
        widths = nested_widths(d, prototypes, self.widths)
        made = [
            NestedMatryoshkaHead(
                d,
                prototypes,
                widths,
                self.nesting,
                int(self.hidden),
                int(self.bottleneck),
                int(self.n_layers),
                bool(self.normalize),
                generator=generator,
                # Layers draw from torch's own generator while they are made; nothing is drawn on this device.
                device="meta",
            ).to_empty(device="cpu")
            for _ in range(1 if self.mask is None else 2)
        ]
        for head in made:
            head.reset_parameters(generator)
        self.widths_, self.n_prototypes_ = widths, made[0].num_prototypes
        return Network(encoder, made[0], made[1] if len(made) > 1 else None)

    def _run(self, source: Source):
        """Yield features and prototypes (b, L) of all rows, block by block, in the float width of the rows."""
        device = pick_device(self.device)
        double = getattr(source.X, "dtype", None) == np.float64 and device.type != "mps"
        dtype = torch.float64 if double else torch.float32
        network = copy.deepcopy(self.module_).to(device, dtype)
        with torch.no_grad():
            for block in source.blocks():
                z, _ = encode(network.encoder, source.tensor(block, device, dtype))
                own = torch.stack([scores.argmax(dim=1) for scores in network.head(z)], dim=1)
                yield z.cpu().numpy(), own.cpu().numpy()

    def _cluster(self, source: Source, rng: Any) -> None:
        """Take the prototypes of all rows, and group their features."""
        n, k = source.n, self.n_clusters
        chosen = np.arange(n) if n <= SAMPLE else np.sort(rng.permutation(n)[:SAMPLE])
        found, sample, start = [], [], 0
        for z, own in self._run(source):
            found.append(own)
            sample.append(z[chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(z))] - start])
            start += len(z)
        self.level_labels_ = np.concatenate(found)
        if start != n:
            raise ValueError(f"X must give its {n} rows in every pass, got {start}")
        if k is None:
            self.cluster_centers_ = np.zeros((0, self._n_features_out))
            self.labels_ = self.level_labels_[:, -1].copy()
            return
        rows = np.concatenate(sample).astype(np.float64)
        self.cluster_centers_ = KMeans(int(k), n_init=10, random_state=rng).fit(rows).cluster_centers_
        self.labels_ = np.concatenate([self._nearest(z) for z, _ in self._run(source)])

    def _nearest(self, z: np.ndarray) -> np.ndarray:
        return pairwise_distances_argmin(z.astype(np.float64), self.cluster_centers_).astype(np.int64)
