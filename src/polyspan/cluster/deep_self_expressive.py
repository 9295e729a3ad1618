"""Clustering by one self-expression of all layers of a network, stopped and cleaned up without labels."""

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from polyspan.run import Progress, pick_device

from ._affinity import RidgeExpression
from ._coefficients import AllCoefficients, FollowedCoefficients
from ._conv_autoencoder import ConvAutoencoder
from ._deep_layers import Layers, fill, make_convolutions, pretrain
from ._deep_stages import Stages, as_numbers, check_distances, check_memory, check_rows, check_shape, checked
from ._expressing import closed_form, early_stopped
from ._self_expression import SpectralRounding
from ._self_expression_files import from_arrays, listed, to_arrays
from ._self_expressive_base import leading_directions

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
WHOLE_ROWS = 1_000
COLLAPSED = 0.1
STILL = 10


class DeepSelfExpressiveClustering(ClusterMixin, BaseEstimator):
    r"""Cluster images or feature vectors near subspaces; of each subspace only its dimension need be known.

    One matrix C of coefficients expresses every point by the others in the input and in all layers of a convolutional
    encoder at once, :math:`\sum_l\lVert CV_l-V_l\rVert_F^2`. A second stage takes away the square roots of affinities
    between the clusters of the moment, :math:`\mathrm{tr}(Q^\top LQ)`. Both stop where the loss hardly falls any more,
    or labels stand still. In each column of the affinity the ``subspace_dim`` largest entries are kept, and spectral
    clustering gives the labels. No label is used anywhere; ``y`` is ignored.

    Most of the result is early-stopped self-expression and the cut to the largest entries. In this system's claim the
    layer adds 12 points of accuracy on digits and one at most on faces and objects, the second stage next to nothing.
    Where points outnumber the numbers that a point has in all layers,
    countless C express them exactly, and Adam, whose steps are as long in every entry, ends at one that shows no
    subspaces; the closed form takes the smallest, which does, and so ``solver="auto"`` takes the closed form there.

    Adam needs seven n-by-n matrices, and a step is n³: for some thousands of points. The closed form is of the rank of
    the layers, and beyond 1,000 points that outnumber the layers' numbers no n-by-n matrix is made: the leading entries
    of each column are found in blocks of rows, n² operations for each number of the layers, and the second stage
    follows those pairs alone that may be kept. Labels and affinity are those of the whole matrices but for rounding;
    memory is linear in n, and a hundred thousand points go. Labels belong to the points that were fitted;
    :meth:`predict` is an addition.
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
        No point expresses itself; otherwise, by the closed form too, each may.
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
        Of Adam, in all stages. After the closed form, whose coefficients are the smaller the more points there are,
        the second stage takes ten times the mean of the columns' largest affinities as its unit, which is about 1 for
        some hundred faces, and stops coefficients at zero.
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
    representation_matrix_ : ndarray or LinearOperator of shape (n, n)
        Row i expresses point i by the others. Where no n-by-n matrix was made it is the closed form's, before the
        second stage: ``rows(indices)`` gives rows of it, ``dense()`` all.
    affinity_matrix_ : csr array of shape (n, n)
        What was clustered.
    history_ : list of dict
        ``stage``, ``epoch`` and ``loss``: that of the second stage counts, where no n-by-n matrix was made, the pairs
        that were followed.
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
            direction, or rows that do not hold ``image_shape``; or what its parameters need does not fit into memory.

        Warns
        -----
        ConvergenceWarning
            A stage after pre-training took all its epochs, and neither loss nor labels stood still.
        UserWarning
            The rows, the autoencoder or the affinity are such that the labels are doubtful.
        """
        X, shape = self._rows(X, reset=True)
        self._settings = checked(self, len(X))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        device = pick_device(self.device)
        unit = bool(self._settings["normalize_layers"])
        check_rows(X, self.n_clusters, self.subspace_dim, unit=unit)
        self._shape, self._scale = shape, 1.0 if self._published or unit else _typical(X)
        rows = _tensor(_near_one(X) if unit else X, device)
        self._network = self._made_network(rows, generator)
        streamed = self._choose(rows)
        self._round = SpectralRounding(int(self.n_clusters), int(self.n_init), seed)
        epochs = sum(self._settings["max_epochs"])
        with Progress("self-expression", epochs, enabled=bool(self.verbose)) as shown:
            stages = Stages(self._settings, least=int(self.min_epochs), rate_of_tol=float(self.tol), shown=shown)
            self.reconstruction_share_ = self._pretrain(rows, stages)
            coefficients = self._express(rows, stages, streamed=streamed)
            if self.structure:
                self._structure(coefficients, stages)
        self.history_, self.n_epochs_, self.stopped_by_ = stages.history, stages.n_epochs, stages.stopped_by
        self._finish(coefficients, rows)
        return self

    def predict(self, X) -> np.ndarray:
        """Return, for new rows, the cluster whose subspace leaves the least of them over, (n,).

        Not part of the published method. A subspace has ``subspace_dim`` leading directions of its cluster in the
        joined layers; rows that were fitted may get another label than ``labels_`` has.
        """
        check_is_fitted(self)
        X, _ = self._rows(X, reset=False)
        rows = _near_one(X) if self._settings["normalize_layers"] else X
        V = self._layers.joined(_tensor(rows, pick_device(self.device))).cpu().numpy()
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
        form, arrays = to_arrays("representation_matrix_", self.representation_matrix_)
        arrays |= {name: getattr(self, name) for name in LABELS}
        arrays |= to_arrays("affinity_matrix_", self.affinity_matrix_)[1]
        arrays |= {f"subspaces_.{j}": basis for j, basis in enumerate(self.subspaces_)}
        network = self._network if isinstance(self._network, ConvAutoencoder) else None
        if network is not None:
            arrays |= {f"network.{name}": value.numpy() for name, value in network.state_dict().items()}
        params = {"init": init, "own": own, "facts": facts, "convolutions": network is not None, "form": form}
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
        # Files that were written before there were other forms do not name theirs.
        form = found.params.get("form", "dense")
        made.representation_matrix_ = from_arrays("representation_matrix_", form, found.arrays, n, Path(path))
        made.affinity_matrix_ = from_arrays("affinity_matrix_", "csr", found.arrays, n, Path(path))
        made.subspaces_ = listed("subspaces_", found.arrays)
        made._network = None
        if found.params["own"] or found.params["convolutions"]:
            width = getattr(made.representation_matrix_, "width", made.representation_matrix_.dtype)
            made._network = made._made_network(torch.as_tensor(np.zeros(0, width)), torch.Generator())
        if found.params["convolutions"]:
            fill(made._network, found.arrays, Path(path))
        return made

    @property
    def _published(self) -> bool:
        return self.mode == "published"

    def _rows(self, X: Any, *, reset: bool) -> tuple[np.ndarray, tuple[int, ...] | None]:
        """Return flat rows, and (channels, h, w) where they are images."""
        check_shape(self.image_shape)
        shape = self.image_shape if reset else self._shape
        X = as_numbers(X)
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

    @property
    def _layers(self) -> Layers:
        settings = self._settings
        normalize = bool(settings["normalize_layers"])
        return Layers(self._network, self._shape, scale=self._scale, which=settings["layers"], normalize=normalize)

    def _made_network(self, rows: Tensor, generator: torch.Generator) -> Any:
        if isinstance(self.encoder, torch.nn.Module):
            return self.encoder.to(rows.device).eval()
        kind = self.encoder
        if kind == "auto":
            kind = "none" if self._shape is None else "conv"
        if kind == "none" or self._settings["layers"] == "input":
            return None
        return make_convolutions(
            self._shape, self.channels, self.kernels, like=rows, last_relu=self._published, generator=generator
        )

    def _choose(self, rows: Tensor) -> bool:
        """Settle the solver, see that it fits into memory, and return whether it goes without an n-by-n matrix."""
        settings, n = self._settings, len(rows)
        width = self._layers.joined(rows[:1]).shape[1]
        self.solver_ = settings["solver"]
        if self.solver_ == "auto":
            trained = settings["train_encoder"] and self._network is not None
            self.solver_ = "ridge" if n > width and not trained else "adam"
        streamed = self.solver_ == "ridge" and n > max(width, WHOLE_ROWS)
        check_memory(n, width, rows.element_size(), solver=self.solver_, streamed=streamed, settings=settings)
        if isinstance(self._network, ConvAutoencoder) and settings["pretrain"] == "distance":
            check_distances(n, 1 + len(self._network.down), rows.element_size())
        return streamed

    def _pretrain(self, rows: Tensor, stages: Stages) -> float:
        kind, most = self._settings["pretrain"], int(self._settings["max_epochs"][0])
        if not isinstance(self._network, ConvAutoencoder) or kind == "none" or not most:
            return math.nan
        run, mean_offset = partial(stages.run, "pretrain"), not self._published
        return pretrain(self._layers, rows, kind, rate=self.learning_rate, mean_offset=mean_offset, run=run)

    def _express(self, rows: Tensor, stages: Stages, *, streamed: bool) -> Any:
        """Return the coefficients, all or followed, that the second stage may shrink."""
        settings, d, rate = self._settings, int(self.subspace_dim), float(self.learning_rate)
        before = self._layers.energies(rows)
        hollow, ridge = bool(settings["zero_diagonal"]), self.solver_ == "ridge"
        made: Any
        if ridge:
            C, loss = closed_form(self._layers, rows, ridge=float(self.ridge), hollow=hollow)
            stages.closed_form(loss)
        else:
            trained = bool(settings["train_encoder"]) and self._network is not None
            C = early_stopped(self._layers, rows, stages, rate=rate, hollow=hollow, trained=trained)
        if isinstance(C, RidgeExpression) and streamed:
            made = FollowedCoefficients(C, d, rate=rate)
        else:
            if isinstance(C, RidgeExpression):
                C = torch.as_tensor(C.dense(), device=rows.device)
            made = AllCoefficients(C, d, rate=rate, hollow=hollow, relative=ridge)
        self.layer_energies_ = list(zip(before, self._layers.energies(rows), strict=True))
        lost = [i for i, (was, now) in enumerate(self.layer_energies_) if now < COLLAPSED * was]
        if lost:
            was, now = self.layer_energies_[lost[0]]
            warnings.warn(
                f"layer {lost[0]} shrank from energy {was:.4g} to {now:.4g} while it was expressed: the encoder "
                "collapses; train_encoder=False holds it",
                stacklevel=3,
            )
        return made

    def _labels(self, coefficients: Any, *, warm: bool = False) -> np.ndarray:
        self.affinity_matrix_ = coefficients.affinity()
        return self._round(self.affinity_matrix_, warm=warm)

    @torch.no_grad()
    def _structure(self, coefficients: Any, stages: Stages) -> None:
        every, stops = int(self._settings["clustering_refresh"]), self._settings["tol"] > 0
        self.first_labels_ = labels = self._labels(coefficients)
        same = 0

        def step(epoch: int) -> tuple[float, bool]:
            nonlocal labels, same
            if epoch > 1 and (epoch - 1) % every == 0:
                found = self._labels(coefficients, warm=not self._published)
                same = same + every if np.array_equal(found, labels) else 0
                labels = found
            return coefficients.step(labels), stops and same >= STILL

        stages.run("structure", step)

    def _finish(self, coefficients: Any, rows: Tensor) -> None:
        k = int(self.n_clusters)
        self.labels_ = self._labels(coefficients)
        if not self.structure:
            self.first_labels_ = self.labels_
        self.representation_matrix_ = coefficients.matrix()
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
        V = self._layers.joined(rows).cpu().numpy()
        self.subspaces_ = [leading_directions(V[self.labels_ == c], int(self.subspace_dim)) for c in range(k)]
        self._network = None if self._network is None else self._network.cpu()


def _written(value: float) -> float | str:
    """Return a number as JSON has it, or its name where JSON has none."""
    return value if math.isfinite(value) else str(value)


def _tensor(X: np.ndarray, device: Any) -> Tensor:
    # Torch warns of read-only memory, which is never written to here.
    return torch.as_tensor(X if X.flags.writeable else X.copy(), device=device)


def _near_one(X: np.ndarray) -> np.ndarray:
    """Bring rows near length 1 by powers of 2, which rounds nothing, so that squares of any number stay finite."""
    return np.ldexp(X, -np.frexp(np.abs(X).max(axis=1, keepdims=True))[1])


def _typical(X: np.ndarray) -> float:
    """Return the root mean square of all numbers."""
    peak = float(np.abs(X).max()) or 1.0
    return peak * float(np.sqrt(np.mean(np.square(X / peak, dtype=np.float64))) or 1.0)
