"""Clustering by one self-expression of all layers of a network, stopped and cleaned up without labels."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from polyspan.errors import WrongContent
from polyspan.run import Progress, available_memory_bytes, pick_device

from ._conv_autoencoder import ConvAutoencoder
from ._self_expression import (
    SpectralRounding,
    expression_loss,
    leading_affinity,
    ridge_coefficients,
    structured_norm,
)
from ._self_expression_files import from_arrays, listed, to_arrays

LABELS = ("labels_", "first_labels_")
FACTS = (
    "history_",
    "n_epochs_",
    "stopped_by_",
    "solver_",
    "layer_energies_",
    "reconstruction_share_",
    "n_features_in_",
    "_settings",
    "_shape",
    "_scale",
)
STAGES = ("pretrain", "express", "structure")
PUBLISHED = {
    "pretrain": "distance",
    "layers": "all",
    "normalize_layers": False,
    "train_encoder": True,
    "zero_diagonal": False,
    "solver": "adam",
    "tol": 0.0,
    "max_epochs": (100, 180, 520),
    "clustering_refresh": 1,
}
CHANNELS, KERNELS = (15,), (3,)
START = 1e-8
WEIGHT = 10.0
MATRICES = 7
DEAD = 0.5
COLLAPSED = 0.1
STILL = 10


class DeepSelfExpressiveClustering(ClusterMixin, BaseEstimator):
    r"""Cluster images or feature vectors near subspaces; of each subspace only its dimension need be known.

    One matrix C of coefficients expresses every point by the others in the input and in all layers of a convolutional
    encoder at once, :math:`\sum_l\lVert CV_l-V_l\rVert_F^2`. A second stage takes away the square roots of affinities
    between the clusters of the moment, :math:`\mathrm{tr}(Q^\top LQ)`. Both stop where the loss hardly falls any more,
    or labels stand still. In each column of the affinity the ``subspace_dim`` largest entries are kept, and spectral
    clustering gives the labels. No label is used anywhere; ``y`` is ignored.

    Most of the result is early-stopped self-expression and the cut to the largest entries; layers and the second stage
    add little, as measured by this system's claim. Where points outnumber the numbers that a point has in all layers,
    countless C express them exactly, and Adam, whose steps are as long in every entry, ends at one that shows no
    subspaces; the closed form takes the smallest, which does, and so ``solver="auto"`` takes the closed form there.
    Memory is about seven n-by-n matrices and a step is n³: for some thousands of points. Labels belong to the points
    that were fitted; :meth:`predict` is an addition.
    Source: catalogue entry ``lhdsc``.

    Parameters
    ----------
    n_clusters : int, default=8
    subspace_dim : int, default=9
        Dimension d of each cluster's subspace: how many entries of a column are kept. Customary: 9 for faces and
        objects, 12 for digits.
    image_shape : tuple, optional
        (h, w) or (channels, h, w): rows of X are flattened images. Implied where X is (n, h, w) or (n, channels, h, w).
    encoder : {"auto", "conv", "none"} or Module, default="auto"
        ``"auto"`` is ``"conv"`` for images and ``"none"``, the input alone, for rows. A Module is taken as trained; its
        output is one layer.
    channels, kernels : tuple of int, optional
        Of the convolutions, each of stride 2. One layer of 15 channels and kernel 3 by default: of the networks in use
        for this it is the one that gives faces and objects back best, which needs no label to see.
    pretrain : {"reconstruction", "distance", "none"}, default="reconstruction"
        What the convolutions learn first. ``"distance"`` multiplies squared distances of the input and of every layer,
        as published, and draws layers towards one point.
    layers : {"all", "input", "last"}, default="all"
        Which layers are expressed; ``"input"`` is the input alone.
    normalize_layers : bool, default=True
        Unit rows in every layer, so that each counts the same and brightness does not.
    train_encoder : bool, default=False
        Go on training the encoder while expressing, as published; its layers then shrink, because nothing holds them.
    zero_diagonal : bool, default=True
        No point expresses itself.
    solver : {"auto", "adam", "ridge"}, default="auto"
        Gradient steps that stop early, or the closed form with penalty ``ridge``, which needs a fixed encoder.
        ``"auto"`` is the closed form where points outnumber the numbers that a point has in the layers expressed, as
        rows of a table mostly do, and Adam elsewhere and where the encoder is trained.
    ridge : float, default=0.1
        In squared units of a row.
    structure : bool, default=True
        Whether there is a second stage.
    tol : float, default=2e-3
        A stage ends where its loss changes by a smaller share in ten epochs in a row; in pre-training, which has
        plateaus, by a tenth of it. With 0 every stage takes all its epochs.
    min_epochs : int, default=50
    max_epochs : tuple of three int, default=(300, 1000, 200)
        Of pre-training, expressing and structuring.
    learning_rate : float, default=1e-3
        Of Adam, in all stages.
    clustering_refresh : int, default=10
        Epochs between two clusterings in the last stage, which also ends where two in a row agree.
    mode : {"improved", "published"}, default="improved"
        ``"published"`` is the published code to the letter, for comparison: distance pre-training, trained encoder, no
        unit rows, the diagonal, 100, 180 and 520 epochs without stopping, a clustering in each of the last. It
        overrides those parameters.
    n_init : int, default=20
        Starts of k-means.
    device : str, default="auto"
    random_state : int, RandomState or None
    verbose : bool or int, default=0
        Show progress on stderr.

    Attributes
    ----------
    labels_ : ndarray of shape (n,)
    first_labels_ : ndarray of shape (n,)
        Before the second stage.
    representation_matrix_ : ndarray of shape (n, n)
        Row i expresses point i by the others.
    affinity_matrix_ : csr array of shape (n, n)
        What was clustered.
    history_ : list of dict
        ``stage``, ``epoch`` and ``loss``.
    solver_ : {"adam", "ridge"}
        Which of the two found C.
    n_epochs_, stopped_by_ : dict of stage
        How long each stage took, and whether ``"tolerance"``, ``"labels"``, ``"max_epochs"``, ``"diverged"`` or the
        ``"closed form"`` ended it.
    layer_energies_ : list of tuple
        Sum of squares of each layer before and after expressing.
    reconstruction_share_ : float
        Error of the trained autoencoder over that of the mean image; NaN without pre-training by reconstruction.
    subspaces_ : list of ndarray
        An orthonormal basis, at most ``subspace_dim`` columns, for each cluster in the joined layers.
    n_features_in_ : int
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        subspace_dim=9,
        image_shape=None,
        encoder="auto",
        channels=None,
        kernels=None,
        pretrain="reconstruction",
        layers="all",
        normalize_layers=True,
        train_encoder=False,
        zero_diagonal=True,
        solver="auto",
        ridge=0.1,
        structure=True,
        tol=2e-3,
        min_epochs=50,
        max_epochs=(300, 1000, 200),
        learning_rate=1e-3,
        clustering_refresh=10,
        mode="improved",
        n_init=20,
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.n_clusters = n_clusters
        self.subspace_dim = subspace_dim
        self.image_shape = image_shape
        self.encoder = encoder
        self.channels = channels
        self.kernels = kernels
        self.pretrain = pretrain
        self.layers = layers
        self.normalize_layers = normalize_layers
        self.train_encoder = train_encoder
        self.zero_diagonal = zero_diagonal
        self.solver = solver
        self.ridge = ridge
        self.structure = structure
        self.tol = tol
        self.min_epochs = min_epochs
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.clustering_refresh = clustering_refresh
        self.mode = mode
        self.n_init = n_init
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y=None) -> "DeepSelfExpressiveClustering":
        """Express and cluster the rows of ``X``: (n, D), or images (n, h, w) or (n, channels, h, w).

        Raises
        ------
        ValueError
            A parameter is out of range; X has fewer rows than clusters or than ``subspace_dim + 1``, a row without
            direction, or rows that do not hold ``image_shape``; or seven n-by-n matrices do not fit into memory.

        Warns
        -----
        ConvergenceWarning
            A stage after pre-training took all its epochs, and neither loss nor labels stood still.
        UserWarning
            The rows, the autoencoder or the affinity are such that the labels are doubtful.
        """
        X, shape = self._rows(X, reset=True)
        self._settings = self._check(len(X))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        device = pick_device(self.device)
        _check_memory(len(X), X.dtype.itemsize)
        self._warn_of_data(X)
        self._shape = shape
        self._scale = 1.0 if self._published else float(np.sqrt(np.mean(np.square(X, dtype=np.float64)))) or 1.0
        self._round = SpectralRounding(int(self.n_clusters), int(self.n_init), seed)
        self.history_, self.n_epochs_, self.stopped_by_ = [], {}, {}
        self.reconstruction_share_ = math.nan
        with Progress("self-expression", sum(self._settings["max_epochs"]), enabled=bool(self.verbose)) as shown:
            self._shown = shown
            rows = _tensor(X, device)
            self._network = self._made_network(rows, generator)
            self._pretrain(rows)
            C = self._express(rows)
            if self.structure:
                C = self._structure(C)
            del self._shown
        self._finish(C, rows)
        return self

    def predict(self, X) -> np.ndarray:
        """Return, for new rows, the cluster whose subspace leaves the least of them over, (n,).

        Not part of the published method. A subspace has ``subspace_dim`` leading directions of its cluster in the
        joined layers; rows that were fitted may get another label than ``labels_`` has.
        """
        check_is_fitted(self)
        X, _ = self._rows(X, reset=False)
        with torch.no_grad():
            rows = _tensor(X, pick_device(self.device))
            V = torch.cat(self._layers(rows), dim=1).cpu().numpy()
        kept = [np.square(V @ basis).sum(axis=1) for basis in self.subspaces_]
        return np.argmax(np.stack(kept, axis=1), axis=1)

    def save(self, path: Path | str) -> Path:
        """Write parameters, network, coefficients and clusters to one .safetensors file, atomically; no pickle.

        An ``encoder`` of your own is code and is not in the file; pass it to :meth:`load`.
        """
        from polyspan.io import constructor_params, save_fitted

        check_is_fitted(self)
        init = constructor_params(self)
        own = not isinstance(init["encoder"], str)
        init["encoder"] = None if own else init["encoder"]
        facts: dict[str, Any] = {name: getattr(self, name) for name in FACTS}
        facts["history_"] = [h | {"loss": _written(h["loss"])} for h in self.history_]
        facts["reconstruction_share_"] = _written(self.reconstruction_share_)
        arrays = {"representation_matrix_": self.representation_matrix_} | {n: getattr(self, n) for n in LABELS}
        arrays |= to_arrays("affinity_matrix_", self.affinity_matrix_)[1]
        arrays |= {f"subspaces_.{j}": basis for j, basis in enumerate(self.subspaces_)}
        network = self._network if isinstance(self._network, ConvAutoencoder) else None
        if network is not None:
            arrays |= {f"network.{name}": value.numpy() for name, value in network.state_dict().items()}
        params = {"init": init, "own": own, "facts": facts, "convolutions": network is not None}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params)

    @classmethod
    def load(cls, path: Path | str, *, encoder: Any = None) -> "DeepSelfExpressiveClustering":
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            It was fitted with an encoder of the user's, and none is given.
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from polyspan.io import load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        init = dict(found.params["init"])
        if found.params["own"]:
            if not isinstance(encoder, torch.nn.Module):
                raise ValueError(
                    f"encoder must be given to load {path}: it was fitted with one that the file cannot hold"
                )
            init["encoder"] = encoder
        for name in ("max_epochs", "image_shape", "channels", "kernels"):
            init[name] = None if init[name] is None else tuple(init[name])
        made = cls(**init)
        for name, value in found.params["facts"].items():
            setattr(made, name, value)
        made.history_ = [h | {"loss": float(h["loss"])} for h in made.history_]
        made.reconstruction_share_ = float(made.reconstruction_share_)
        made.layer_energies_ = [(before, after) for before, after in made.layer_energies_]
        made._shape = None if made._shape is None else tuple(made._shape)
        for name in LABELS:
            setattr(made, name, np.array(found.arrays[name]))
        n = len(made.labels_)
        made.representation_matrix_ = from_arrays("representation_matrix_", "dense", found.arrays, n, Path(path))
        made.affinity_matrix_ = from_arrays("affinity_matrix_", "csr", found.arrays, n, Path(path))
        made.subspaces_ = listed("subspaces_", found.arrays)
        made._network = None
        if found.params["own"] or found.params["convolutions"]:
            like = torch.as_tensor(np.array(made.representation_matrix_[:0]))
            made._network = made._made_network(like, torch.Generator())
        if found.params["convolutions"]:
            _fill(made._network, found.arrays, Path(path))
        return made

    @property
    def _published(self) -> bool:
        return self.mode == "published"

    def _rows(self, X: Any, *, reset: bool) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return flat rows, and (channels, h, w) where they are images."""
        shape = self.image_shape if reset else self._shape
        if getattr(X, "ndim", 2) in (3, 4):
            shape = tuple(X.shape[1:])
            X = np.asarray(X).reshape(len(X), -1)
        X = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=2 if reset else 1)
        if shape is None:
            return X, None
        shape = tuple(int(side) for side in (shape if len(shape) == 3 else (1, *shape)))
        if len(shape) != 3 or math.prod(shape) != X.shape[1]:
            raise ValueError(f"image_shape must hold the {X.shape[1]} numbers of a row, got {shape}")
        if not reset and shape != self._shape:
            raise ValueError(f"X must have images of shape {self._shape}, as in fit, got {shape}")
        return X, shape

    def _check(self, n: int) -> dict[str, Any]:
        """Look at the parameters and return those that a mode may override."""
        for name, least in (("n_clusters", 1), ("subspace_dim", 1), ("n_init", 1), ("clustering_refresh", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int | np.integer) and value >= least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        choices = {
            "mode": ("improved", "published"),
            "pretrain": ("reconstruction", "distance", "none"),
            "layers": ("all", "input", "last"),
            "solver": ("auto", "adam", "ridge"),
        }
        for name, among in choices.items():
            if getattr(self, name) not in among:
                raise ValueError(f"{name} must be one of {among}, got {getattr(self, name)!r}")
        if not (isinstance(self.encoder, torch.nn.Module) or self.encoder in ("auto", "conv", "none")):
            raise ValueError(f"encoder must be 'auto', 'conv', 'none' or a Module, got {self.encoder!r}")
        for name in ("learning_rate", "ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if not 0 <= self.tol < 1:
            raise ValueError(f"tol must lie in [0, 1), got {self.tol!r}")
        if len(self.max_epochs) != len(STAGES) or min(self.max_epochs) < 0:
            raise ValueError(f"max_epochs must be three numbers of at least 0, got {self.max_epochs!r}")
        if self.n_clusters > n:
            raise ValueError(f"n_clusters must be at most the number of rows, {n}, got {self.n_clusters}")
        if self.subspace_dim >= n:
            raise ValueError(f"subspace_dim must be below the number of rows, {n}, got {self.subspace_dim}")
        settings = {name: getattr(self, name) for name in PUBLISHED}
        if self._published:
            settings |= PUBLISHED
        if settings["solver"] == "ridge" and settings["train_encoder"]:
            raise ValueError("solver must be 'adam' or 'auto' where train_encoder=True, got 'ridge'")
        return settings

    def _warn_of_data(self, X: np.ndarray) -> None:
        n, d = len(X), self.subspace_dim
        if self.n_clusters * d > n:
            warnings.warn(
                f"{n} rows in {self.n_clusters} clusters are fewer than subspace_dim={d} a cluster: columns of the "
                "affinity reach into other clusters",
                stacklevel=3,
            )
        norms = np.linalg.norm(X, axis=1)
        if self._settings["normalize_layers"] and not norms.all():
            row = int(np.flatnonzero(norms == 0)[0])
            raise ValueError(f"X must have no all-zero row when normalize_layers=True, got one at row {row}")
        _, counts = np.unique(X, axis=0, return_counts=True)
        if counts.max() > d:
            warnings.warn(
                f"a row stands {counts.max()} times in X: its copies fill the {d} entries that a column keeps",
                stacklevel=3,
            )

    def _made_network(self, rows: Tensor, generator: torch.Generator) -> Any:
        if isinstance(self.encoder, torch.nn.Module):
            return self.encoder.to(rows.device).eval()
        kind = self.encoder
        if kind == "auto":
            kind = "none" if self._shape is None else "conv"
        if kind == "none" or self._settings["layers"] == "input":
            return None
        if self._shape is None:
            raise ValueError("image_shape must be given, or X be images, for encoder='conv'")
        channels, kernels = tuple(self.channels or CHANNELS), tuple(self.kernels or KERNELS)
        if len(channels) != len(kernels) or min(channels + kernels) < 1:
            raise ValueError(f"channels and kernels must be equally many positive numbers, got {channels}, {kernels}")
        # Layers draw first weights from torch's global generator before ours replace them.
        with torch.random.fork_rng(devices=[]):
            network = ConvAutoencoder(
                (self._shape[0], *channels), kernels, last_relu=self._published, generator=generator
            )
        return network.to(rows.device, rows.dtype)

    def _images(self, rows: Tensor) -> Tensor:
        scaled = self._scaled(rows)
        return scaled if self._shape is None else scaled.reshape(len(rows), *self._shape)

    def _scaled(self, rows: Tensor) -> Tensor:
        """Return rows of root mean square 1 where rows are to count the same, else as they are."""
        if not self._settings["normalize_layers"]:
            return rows / self._scale
        return rows * (rows.shape[1] ** 0.5 / torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    def _layers(self, rows: Tensor) -> list[Tensor]:
        """Return the flat layers that are expressed, input first; unit rows where asked for."""
        found = [self._scaled(rows)]
        if isinstance(self._network, ConvAutoencoder):
            found += [layer.flatten(1) for layer in self._network.layers(self._images(rows))]
        elif self._network is not None:
            found.append(self._network(self._images(rows)).flatten(1))
        if self._settings["layers"] == "last":
            found = found[-1:]
        if not self._settings["normalize_layers"]:
            return found
        # A row that a layer has lost altogether stays zero: it is then expressed by the other layers alone.
        tiny = torch.finfo(rows.dtype).tiny
        return [V / torch.linalg.vector_norm(V, dim=1, keepdim=True).clamp_min(tiny) for V in found]

    def _run(self, stage: str, most: int, step: Any) -> None:
        """Take steps until the loss stands still; ``step`` returns it, and True where it wants to end by itself."""
        least, tol = int(self.min_epochs), float(self._settings["tol"]) * (0.1 if stage == "pretrain" else 1)
        before, by, epoch, still = math.nan, "max_epochs", 0, 0
        for epoch in range(1, most + 1):
            loss, done = step(epoch)
            self.history_.append({"stage": stage, "epoch": epoch, "loss": loss})
            self._shown.advance()
            if not math.isfinite(loss):
                by = "diverged"
                warnings.warn(f"the loss of stage {stage!r} is no longer finite at epoch {epoch}", stacklevel=4)
                break
            if done:
                by = "labels"
                break
            # Where Adam overshoots, the loss stands still for an epoch and then goes on.
            still = still + 1 if abs(before - loss) <= tol * abs(before) else 0
            if epoch >= least and tol > 0 and still >= STILL:
                by = "tolerance"
                break
            before = loss
        self.n_epochs_[stage], self.stopped_by_[stage] = epoch if most else 0, by
        # How far pre-training came its error says.
        if by == "max_epochs" and most and tol > 0 and stage != "pretrain":
            way = ", or use solver='ridge'" if stage == "express" and not self._settings["train_encoder"] else ""
            warnings.warn(
                f"stage {stage!r} took all of its {most} epochs and its loss did not stand still: raise "
                f"max_epochs[{STAGES.index(stage)}], or tol={self.tol:g}{way}",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _pretrain(self, rows: Tensor) -> None:
        kind, most = self._settings["pretrain"], int(self._settings["max_epochs"][0])
        network = self._network
        if not isinstance(network, ConvAutoencoder) or kind == "none" or not most:
            return
        images = self._images(rows)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        if kind == "reconstruction":
            mean = images.mean(dim=0)
            if not self._published:
                network.offset.data = mean

            def loss_of():
                return (network(images) - images).square().sum()

        else:
            H = _squared_distances(self._scaled(rows))

            def loss_of():
                layers = [self._scaled(rows), *(layer.flatten(1) for layer in network.layers(images))]
                return sum((H * _squared_distances(V)).sum() for V in layers) / len(layers)

        def step(_: int):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            optimizer.step()
            return float(loss.detach()), False

        self._run("pretrain", most, step)
        if kind == "reconstruction":
            with torch.no_grad():
                blank = (mean - images).square().sum()
                self.reconstruction_share_ = float((network(images) - images).square().sum() / blank) if blank else 0.0
            if not self.reconstruction_share_ <= DEAD:
                warnings.warn(
                    f"the autoencoder leaves {self.reconstruction_share_:.2f} of the mean image's error: its layers "
                    "say little of the images; train longer, or use encoder='none'",
                    stacklevel=3,
                )

    def _express(self, rows: Tensor) -> Tensor:
        settings, n = self._settings, len(rows)
        with torch.no_grad():
            V = self._layers(rows)
            n_layers = len(V)
            joined = torch.cat(V, dim=1)
            G = joined @ joined.T
            before = [float(layer.square().sum()) for layer in self._raw_layers(rows)]
        trained = settings["train_encoder"] and self._network is not None
        self.solver_ = settings["solver"]
        if self.solver_ == "auto":
            self.solver_ = "ridge" if n > joined.shape[1] and not trained else "adam"
        if self.solver_ == "ridge":
            C = ridge_coefficients(G, self.ridge * n_layers)
            loss, _ = expression_loss(C, G)
            self.history_.append({"stage": "express", "epoch": 1, "loss": float(loss)})
            self.n_epochs_["express"], self.stopped_by_["express"] = 1, "closed form"
        else:
            C = torch.full((n, n), START, dtype=rows.dtype, device=rows.device)
            if settings["zero_diagonal"]:
                C.fill_diagonal_(0)
            good = C.clone()
            parameters = list(self._network.parameters()) if trained else []
            C.requires_grad_(trained)
            optimizer = torch.optim.Adam([C, *parameters], lr=self.learning_rate)

            def step(_: int):
                if trained:
                    optimizer.zero_grad(set_to_none=True)
                    V = torch.cat(self._layers(rows), dim=1)
                    loss = (C @ V - V).square().sum()
                    loss.backward()
                else:
                    loss, C.grad = expression_loss(C, G)
                value = float(loss.detach())
                if math.isfinite(value):
                    good.copy_(C.detach())
                    if settings["zero_diagonal"] and C.grad is not None:
                        C.grad.fill_diagonal_(0)
                    optimizer.step()
                return value, False

            self._run("express", int(settings["max_epochs"][1]), step)
            C = good if self.stopped_by_["express"] == "diverged" else C.detach()
        with torch.no_grad():
            after = [float(layer.square().sum()) for layer in self._raw_layers(rows)]
        self.layer_energies_ = list(zip(before, after, strict=True))
        lost = [i for i, (was, now) in enumerate(self.layer_energies_) if now < COLLAPSED * was]
        if lost:
            was, now = self.layer_energies_[lost[0]]
            warnings.warn(
                f"layer {lost[0]} shrank from energy {was:.4g} to {now:.4g} while it was expressed: the encoder "
                "collapses; train_encoder=False holds it",
                stacklevel=3,
            )
        return C

    def _raw_layers(self, rows: Tensor) -> list[Tensor]:
        if not isinstance(self._network, ConvAutoencoder):
            return [self._scaled(rows)]
        return [self._scaled(rows), *self._network.layers(self._images(rows))]

    def _labels(self, C: Tensor, *, warm: bool = False) -> np.ndarray:
        self.affinity_matrix_ = leading_affinity(C.cpu().numpy(), int(self.subspace_dim))
        return self._round(self.affinity_matrix_, warm=warm)

    @torch.no_grad()
    def _structure(self, C: Tensor) -> Tensor:
        every, most = int(self._settings["clustering_refresh"]), int(self._settings["max_epochs"][2])
        self.first_labels_ = labels = self._labels(C)
        now = torch.as_tensor(labels, device=C.device)
        optimizer = torch.optim.Adam([C], lr=self.learning_rate)
        same, stops = 0, self._settings["tol"] > 0

        def step(epoch: int):
            nonlocal labels, now, same
            if epoch > 1 and (epoch - 1) % every == 0:
                found = self._labels(C, warm=not self._published)
                same = same + every if np.array_equal(found, labels) else 0
                labels, now = found, torch.as_tensor(found, device=C.device)
            loss, grad = structured_norm(C, now)
            C.grad = WEIGHT * (grad.fill_diagonal_(0) if self._settings["zero_diagonal"] else grad)
            optimizer.step()
            return WEIGHT * float(loss), stops and same >= 10

        self._run("structure", most, step)
        return C

    def _finish(self, C: Tensor, rows: Tensor) -> None:
        k = int(self.n_clusters)
        self.labels_ = self._labels(C)
        if not self.structure:
            self.first_labels_ = self.labels_
        self.representation_matrix_ = C.cpu().numpy()
        parts = connected_components(self.affinity_matrix_, directed=False)[0]
        if parts > k > 1:
            warnings.warn(
                f"the affinity falls into {parts} parts, more than n_clusters={k}: which of them share a label is not "
                "determined; a larger subspace_dim joins them",
                stacklevel=3,
            )
        found = len(np.unique(self.labels_))
        if found < k:
            warnings.warn(f"only {found} of n_clusters={k} clusters have a row", stacklevel=3)
        with torch.no_grad():
            V = torch.cat(self._layers(rows), dim=1).cpu().numpy()
        self.subspaces_ = [_leading(V[self.labels_ == c], int(self.subspace_dim)) for c in range(k)]
        self._network = None if self._network is None else self._network.cpu()


def _written(value: float) -> float | str:
    """Return a number as JSON has it, or its name where JSON has none."""
    return value if math.isfinite(value) else str(value)


def _fill(network: Any, arrays: Any, path: Path) -> None:
    """Give a network the weights of a file."""
    own = {name.removeprefix("network."): np.array(a) for name, a in arrays.items() if name.startswith("network.")}
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    # The mean image takes the place of one number a channel.
    wanted["offset"] = own["offset"].shape if "offset" in own else wanted["offset"]
    if wanted != {name: value.shape for name, value in own.items()}:
        raise WrongContent(path, found="weights of other shapes", expected="those of the encoder that was fitted")
    network.offset = torch.zeros(wanted["offset"], dtype=network.offset.dtype)
    network.load_state_dict({name: torch.as_tensor(value) for name, value in own.items()})


def _tensor(X: np.ndarray, device: Any) -> Tensor:
    # Torch warns of read-only memory, which is never written to here.
    return torch.as_tensor(X if X.flags.writeable else X.copy(), device=device)


def _leading(rows: np.ndarray, d: int) -> np.ndarray:
    """Return the d leading directions of rows, through the origin; none where there are no rows."""
    if not len(rows):
        return np.zeros((rows.shape[1], 0), dtype=rows.dtype)
    return np.ascontiguousarray(np.linalg.svd(rows, full_matrices=False)[2][:d].T)


def _squared_distances(V: Tensor) -> Tensor:
    squares = V.square().sum(dim=1)
    return (squares[:, None] + squares - 2 * V @ V.T).clamp_min(0)


def _check_memory(n: int, itemsize: int) -> None:
    needed, free = MATRICES * n * n * itemsize, available_memory_bytes()
    if needed > free:
        raise ValueError(
            f"X must have few enough rows for {MATRICES} matrices of n by n: {n} rows need {needed:,} bytes, "
            f"{free:,} are free; sparse subspace clustering takes more"
        )
