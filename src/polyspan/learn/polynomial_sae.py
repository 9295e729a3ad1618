"""Sparse autoencoders whose decoder multiplies features, as a transformer of activations."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array, issparse, vstack
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from ._sae_interactions import Interactions, check_ranking, ranked, steering_direction
from ._sae_reconstruction import Reconstruction, reconstruction
from ._tensors import as_array
from .activation_store import ActivationStore

PASSES = 16
PIECE = 2**24
"""Numbers of dense pre-activations that are held at a time."""


class PolySAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Turn activations of a model (n, d) into sparse codes (n, m) of features that may interact.

    A sparse autoencoder adds one direction a feature. This one, with a linear encoder as before, also adds low-rank
    products of features, :math:`\hat x = b + \sum_i z_i d_i + \sum_{ij} z_i z_j B_{ij} + \ldots`, so that two features
    together can mean something else than their sum. Formulas and limits: :class:`PolynomialSAEModule`. Minimises the
    mean of :math:`\lVert x - \hat x\rVert^2` by Adam, with the factors over latents brought back to orthonormal
    columns after each step.

    What it does not do: tools that take a linear decoder for granted (attribution by decoder rows, absorption scores)
    see only its linear part, ``components_``. On activations of a small text model it leaves one per cent less
    unexplained than a linear one of as many latents, and more than one of as many parameters; probes on single latents
    did not gain.
    Source: catalogue entry ``polysae``.

    Parameters
    ----------
    n_components : int, optional
        Latents m; left out, 8 d, or as many as there are rows where those are fewer.
    k : int, optional
        Latents that fire for a row; left out, 32, or m/8 where that is less.
    ranks : (int, int, int), optional
        Ranks of the linear, quadratic and cubic part; they must not increase. ``None`` stands for d, and for the
        others the least of 64, d/4 and R1.
    order : {1, 2, 3}, default=3
        1 is the linear sparse autoencoder, with one free matrix as decoder.
    shared : bool, default=True
        One factor over latents for all orders, or one each.
    activation : {"topk", "batchtopk", "matryoshka", "jumprelu"}, default="topk"
    cross_only : bool, default=False
        Products of distinct latents only.
    prefixes : sequence of int, optional
        Of "matryoshka": how many leading latents shall do alone.
    init : {"tied", "official"}, default="tied"
        "tied" starts as a linear autoencoder, "official" with encoder and decoder drawn apart, as the published code
        does: at small learning rates it ends worse.
    lambda_init : (float, float), default=(-0.5, 0.5)
    normalize : bool, default=True
        Multiply activations by the power of two that brings their mean length nearest to √d, for cubes of large
        numbers explode. It is kept in ``scale_``, and files for other programs have it folded in, exactly.
    learning_rate : float, default=3e-4
    schedule : {"constant", "cosine"}, default="constant"
        Of the learning rate over the steps of a fit.
    batch_size : int, optional
        Rows a step; left out, 4,096, or a 32nd of the rows but no fewer than 64.
    max_tokens : int, optional
        Rows to train on, counted again in each pass; left out, 16 passes.
    aux_coef : float, default=1.0
        Weight of the loss by which latents that are dead learn what the others leave.
    dead_after : int, default=1000
        Steps without firing after which a latent is dead; which are is looked at every 50 steps.
    l0_coef : float, default=1.0
        Of "jumprelu": how hard the number that fires is drawn to k.
    clip_norm : float, default=1.0
        Largest norm of a gradient; 0 for none.
    retraction : {"qr", "polar"}, default="qr"
    retract_every : int, default=1
        Steps between retractions.
    sparse_output : bool, default=False
        Give codes as a SciPy CSR array.
    device : str, default="cpu"
        ``"auto"`` takes an accelerator where there is one.
    random_state : int, RandomState or None
    verbose : bool, default=False
        Show progress on stderr.

    Attributes
    ----------
    module_ : PolynomialSAEModule
        In units of ``scale_`` times activations.
    components_ : ndarray of shape (m, d)
        Directions of single latents, unit rows.
    scale_ : float
        Power of two that activations are multiplied by.
    loss_curve_ : list of float
        Mean squared length of what is missing, a step.
    n_iter_ : int
        Steps taken.
    n_tokens_ : int
        Rows trained on.
    dead_share_ : float
        Share of latents in [0, 1] that had not fired for ``dead_after`` steps at the end (of a short training, for its
        later half).
    n_features_in_ : int
    """

    module_: Any
    scale_: float

    def __init__(
        self,
        n_components=None,
        k=None,
        *,
        ranks=None,
        order=3,
        shared=True,
        activation="topk",
        cross_only=False,
        prefixes=None,
        init="tied",
        lambda_init=(-0.5, 0.5),
        normalize=True,
        learning_rate=3e-4,
        schedule="constant",
        batch_size=None,
        max_tokens=None,
        aux_coef=1.0,
        dead_after=1000,
        l0_coef=1.0,
        clip_norm=1.0,
        retraction="qr",
        retract_every=1,
        sparse_output=False,
        device="cpu",
        random_state=None,
        verbose=False,
    ):
        self.n_components = n_components
        self.k = k
        self.ranks = ranks
        self.order = order
        self.shared = shared
        self.activation = activation
        self.cross_only = cross_only
        self.prefixes = prefixes
        self.init = init
        self.lambda_init = lambda_init
        self.normalize = normalize
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.aux_coef = aux_coef
        self.dead_after = dead_after
        self.l0_coef = l0_coef
        self.clip_norm = clip_norm
        self.retraction = retraction
        self.retract_every = retract_every
        self.sparse_output = sparse_output
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    # Fitting.

    def fit(self, X, y=None, *, checkpoint: Path | str | None = None, checkpoint_every: int = 500) -> "PolySAE":
        """Train on activations.

        Parameters
        ----------
        X : array or tensor of shape (n, d), or ActivationStore
            Half precision is widened to float32. A store may be larger than memory.
        y : ignored
        checkpoint : path, optional
            A .safetensors file that is written every ``checkpoint_every`` steps and at the end. One that is there, of
            the same data and parameters (but for ``max_tokens`` with a constant rate), is gone on from; on one CPU the
            result has the same bits as that of an unbroken training.

        Raises
        ------
        ValueError
            A parameter is out of range, a row holds NaN (it is named), or the checkpoint is of another training.
        NotConverged
            The loss is no longer finite; that is seen within 50 steps, and changes no parameter.
        """
        self._check_parameters()
        store = self._store(X, reset=True)
        self._fit(store, None if checkpoint is None else Path(checkpoint), checkpoint_every)
        return self

    def partial_fit(self, X, y=None) -> "PolySAE":
        """Take one pass over more rows, in their order and at a constant rate; the first call sets the scale."""
        self._check_parameters()
        first = not hasattr(self, "module_")
        store = self._store(X, reset=first)
        if first:
            self._build(store)
        batch = self._batch_rows(store.n_rows)
        for rows in store.batches(batch, shuffle=False):
            self._trainer.step(rows)
        self._settle()
        return self

    def _check_parameters(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("aux_coef", "l0_coef", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("dead_after", "retract_every"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("n_components", "k", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")
        if self.retraction not in ("qr", "polar"):
            raise ValueError(f"retraction must be 'qr' or 'polar', got {self.retraction!r}")

    def _store(self, X: Any, *, reset: bool) -> ActivationStore:
        """Return a store of the rows of X, after the checks of an estimator."""
        if isinstance(X, ActivationStore):
            if reset:
                self.n_features_in_ = X.dim
                if hasattr(self, "feature_names_in_"):
                    del self.feature_names_in_
            elif X.dim != self.n_features_in_:
                raise ValueError(f"X must have {self.n_features_in_} features, as at the fit, got {X.dim}")
            return X
        return ActivationStore.from_array(self._checked(X, reset=reset, ensure_min_samples=2))

    def _checked(self, X: Any, *, reset: bool = False, **options: Any) -> np.ndarray:
        """Return the rows of X as floats; the first that is not finite is named, and dates are no numbers."""
        X = as_array(X)
        if getattr(getattr(X, "dtype", None), "kind", "f") in "mM":
            raise ValueError(f"X must hold numbers, got {X.dtype}")
        if isinstance(X, np.ndarray) and X.dtype == np.float16:
            X = X.astype(np.float32)
        floats = [np.float64, np.float32]
        rows = validate_data(self, X, reset=reset, dtype=floats, ensure_all_finite=False, **options)
        strange = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(strange):
            raise ValueError(f"X must be finite, got NaN or infinity in {len(strange)} rows, first in row {strange[0]}")
        return rows

    def _batch_rows(self, n: int) -> int:
        return int(self.batch_size) if self.batch_size is not None else max(64, min(4096, n // 32))

    def _sizes(self, n: int, d: int) -> tuple[int, int]:
        """Return the numbers of latents and of those that fire."""
        from .polynomial_sae_module import full_ranks

        if self.n_components is None:
            least = full_ranks(self.ranks, self.order, d, 2**62)[0]
            m = max(min(8 * d, n), least if self.shared else 3 * least)
        else:
            m = int(self.n_components)
            if n < m:
                warnings.warn(
                    f"{n:,} rows are fewer than the {m:,} latents: each can learn its own row by heart",
                    stacklevel=4,
                )
        return m, min(32, max(1, m // 8)) if self.k is None else int(self.k)

    def _build(self, store: ActivationStore) -> None:
        """Make the module and set its start from a sample of the rows."""
        import torch

        from polyspan.run import pick_device, torch_generator

        from ._sae_training import SAMPLE_ROWS, Trainer, mean_norm_scale, set_start
        from .polynomial_sae_module import PolynomialSAEModule

        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        m, k = self._sizes(store.n_rows, store.dim)
        module = PolynomialSAEModule(
            store.dim,
            m,
            k,
            self.ranks,
            order=self.order,
            shared=self.shared,
            activation=self.activation,
            cross_only=self.cross_only,
            prefixes=self.prefixes,
            init=self.init,
            lambda_init=self.lambda_init,
            generator=torch_generator(seed),
            dtype=torch.float32,
        )
        sample = store.sample(SAMPLE_ROWS, seed=seed)
        scale = mean_norm_scale(sample) if self.normalize else 1.0
        set_start(module, torch.from_numpy(sample.astype(np.float32)) * scale)
        self._adopt(Trainer(self, module.to(pick_device(self.device)), scale, seed))

    def _adopt(self, trainer: Any) -> None:
        self._trainer, self.module_, self.scale_ = trainer, trainer.module.eval(), trainer.scale
        self._n_features_out = self.module_.num_latents

    def _fit(self, store: ActivationStore, checkpoint: Path | None, every: int) -> None:
        from ._sae_files import resume
        from ._sae_training import train_on

        if every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {every}")
        batch = self._batch_rows(store.n_rows)
        if checkpoint is not None and checkpoint.exists():
            resume(self, checkpoint, batch, store.facts())
        else:
            self._build(store)
        tokens = PASSES * store.n_rows if self.max_tokens is None else int(self.max_tokens)
        n_steps = max(1, tokens // min(batch, store.n_rows))
        train_on(self, self._trainer, store, n_steps, batch, checkpoint, every)
        self._settle()

    def _settle(self) -> None:
        """Set what is learnt, and speak up where most latents are dead."""
        trainer = self._trainer
        self.loss_curve_, self.n_iter_, self.n_tokens_ = trainer.losses, len(trainer.losses), trainer.n_tokens
        self.dead_share_ = trainer.dead_share
        directions = self.module_.linear_decoder().detach().cpu().numpy()
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        self.components_ = directions / np.where(lengths > 0, lengths, 1)
        if self.dead_share_ > 0.5 and self.n_iter_ > self.dead_after:
            warnings.warn(
                f"{self.dead_share_:.0%} of the latents have not fired for {self.dead_after} steps: raise aux_coef, "
                "lower learning_rate, or take fewer latents",
                stacklevel=3,
            )

    # Codes and reconstructions.

    def transform(self, X) -> Any:
        """Return codes (n, m) in the float width of ``X`` (n, d), dense or (``sparse_output``) as a CSR array."""
        check_is_fitted(self, "module_")
        X = self._checked(X)
        found = vstack([codes for _, codes in self._coded(X)], format="csr")
        return csr_array(found) if self.sparse_output else found.toarray()

    def inverse_transform(self, Z) -> np.ndarray:
        """Return reconstructions (n, d) of codes (n, m), dense or sparse."""
        import torch

        from ._sae_codes import SparseCodes

        check_is_fitted(self, "module_")
        Z = check_array(Z, accept_sparse="csr", dtype=[np.float64, np.float32])
        if Z.shape[1] != self.module_.num_latents:
            raise ValueError(f"Z must have one column for each of {self.module_.num_latents} latents, got {Z.shape[1]}")
        module = self._module(Z.dtype)
        made = []
        step = max(1, PIECE // self.module_.num_latents)
        for start in range(0, Z.shape[0], step):
            part = csr_array(Z[start : start + step])
            codes = SparseCodes(
                *(torch.from_numpy(np.array(v)) for v in (part.indices.astype(np.int64), part.data)),
                torch.from_numpy(part.indptr[:-1].astype(np.int64)),
            )
            with torch.no_grad():
                at = module.W_enc.device
                y, _ = module.sparse_decode(SparseCodes(*(v.to(at) for v in codes)))
            made.append(y.cpu().numpy() / self.scale_)
        return np.concatenate(made)

    def _module(self, dtype: Any) -> Any:
        """Return the module in a float width: in float64 a row's codes do not depend on the rows beside it."""
        import torch

        if np.dtype(dtype) == np.float32 or self.module_.W_enc.device.type == "mps":
            return self.module_
        return copy.deepcopy(self.module_).to(torch.float64)

    def iter_codes(self, X) -> Iterator[csr_array]:
        """Yield codes of some rows (n, d) at a time, as CSR arrays: for stores that are larger than memory."""
        for _, part in self._coded(self._rows(X)):
            yield part

    def _coded(self, X: np.ndarray | ActivationStore) -> Iterator[tuple[np.ndarray, csr_array]]:
        import torch

        store = X if isinstance(X, ActivationStore) else ActivationStore.from_array(X)
        step = min(store.n_rows, max(1, PIECE // self.module_.num_latents))
        module = None
        for rows in store.batches(step, shuffle=False):
            module = self._module(rows.dtype) if module is None else module
            weight = module.W_enc
            x = torch.from_numpy(np.array(rows)).to(weight.device, weight.dtype) * self.scale_
            with torch.no_grad():
                codes = module.sparse_encode(x)
            yield rows, csr_array(codes.csr(module.num_latents).astype(rows.dtype, copy=False))

    def _rows(self, X: Any) -> np.ndarray | ActivationStore:
        """Check activations, or a store of them, against the fit."""
        check_is_fitted(self, "module_")
        if isinstance(X, ActivationStore):
            return self._store(X, reset=False)
        return self._checked(X)

    def report(self, X) -> Reconstruction:
        """Say how well rows (n, d), or a store of them, come back."""
        X = self._rows(X)
        batches = ((rows, codes, self.inverse_transform(codes)) for rows, codes in self._coded(X))
        return reconstruction(batches, self.module_.num_latents)

    def score(self, X, y=None) -> float:
        """Return the share of the variance of rows that the reconstruction explains; 1 is exact."""
        return 1.0 - self.report(X).unexplained

    # Interactions.

    def interactions(self, X, *, top: int = 1000, degree: int = 2, by: str = "data") -> Interactions:
        """Rank the pairs or triples of latents that fire together by how much their product matters.

        Only sets that fire together in a row are looked at, never all m² of them. What a cubic part adds to a pair, by
        the square of one code times the other, is not counted.

        Parameters
        ----------
        X : array of shape (n, d), ActivationStore, or sparse codes (n, m)
        top : int
            How many to return.
        degree : {2, 3}
            Triples take k³/6 products a row: some ten thousand rows are enough.
        by : {"data", "norm"}
            Rank by the mean product of codes times the length of what it adds, or by the length alone.

        Raises
        ------
        ValueError
            The decoder has no such term, or a parameter is out of range.
        """
        check_is_fitted(self, "module_")
        check_ranking(self.module_.ranks, top, degree, by)
        if issparse(X):
            if X.shape[1] != self.module_.num_latents:
                raise ValueError(f"X must hold codes of {self.module_.num_latents} latents, got {X.shape[1]} columns")
            codes, n = iter([csr_array(X)]), X.shape[0]
        else:
            X = self._rows(X)
            codes, n = (part for _, part in self._coded(X)), len(X)
        return ranked(self.module_, self.scale_, codes, n, top=top, degree=degree, by=by)

    def direction(self, latents: int | Sequence[int], *, interaction: bool = True) -> np.ndarray:
        r"""Return the direction (d,) by which one, two or three latents are steered.

        The sum of their directions :math:`d_i`, with ``interaction`` plus what their products add
        (:math:`B_{ij}` and the triple's), all at codes of 1 in units of ``scale_``; of one latent, :math:`d_i` alone.

        Raises
        ------
        ValueError
            There are not one to three distinct latents, or one is not there.
        """
        check_is_fitted(self, "module_")
        return steering_direction(self.module_, self.scale_, latents, interaction)

    # Files.

    def _write(self, path: Path, batch: int | None, facts: dict[str, Any] | None) -> Path:
        from ._sae_files import write_estimator

        return write_estimator(self, path, {"batch": batch, "data": facts})

    def save(self, path: Path | str) -> Path:
        """Write the fitted autoencoder, the state of its training included, to one .safetensors file, atomically."""
        check_is_fitted(self, "module_")
        return self._write(Path(path), None, None)

    @classmethod
    def load(cls, path: Path | str) -> "PolySAE":
        """Read what :meth:`save` or a checkpoint wrote; training can go on by ``partial_fit``.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from ._sae_files import read_estimator

        return read_estimator(cls, Path(path))

    def export(self, folder: Path | str, *, metadata: dict[str, Any] | None = None, placeholders: bool = False) -> Path:
        """Write a new folder with ``cfg.json`` and ``sae_weights.safetensors``, named as SAELens and PolySAE name them.

        The scale is folded into the weights: raw activations go in, and codes have the same bits as of
        :meth:`transform` on float32. "batchtopk" and "matryoshka" become "jumprelu" with the threshold of inference,
        and a linear autoencoder is written as SAELens's own.

        Parameters
        ----------
        folder : path
        metadata : dict, optional
            JSON types: ``model_name``, ``hook_name`` and the like.
        placeholders : bool
            Add what the published code's loader asks for and never uses: ``W_dec`` with unit rows of the linear part,
            and zeros for the factors that are not shared.

        Raises
        ------
        ValueError
            ``cross_only`` was set, which these files cannot say.
        """
        from ._sae_files import write_saelens

        check_is_fitted(self, "module_")
        return write_saelens(self, Path(folder), metadata or {}, placeholders)

    @classmethod
    def from_saelens(cls, folder: Path | str) -> "PolySAE":
        """Read a folder of ``cfg.json`` and ``sae_weights.safetensors``, by :meth:`export`, PolySAE or SAELens.

        Architectures "poly_topk", "poly_jumprelu", "topk", "jumprelu" and "standard". Codes rescaled by decoder norms
        are folded into the weights. It encodes, decodes and steers; its training starts with a fresh optimiser.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` names a key, a tensor or an architecture that does not fit.
        """
        from ._sae_files import read_saelens

        return read_saelens(cls, Path(folder))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
