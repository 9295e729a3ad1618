"""Classification head whose classes are subspaces, not vectors; and how to put it on a model that has a linear one."""

import math
import warnings
from collections.abc import Sequence
from functools import cache
from operator import index
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from polyspan.linalg import nearest_isometry, orthonormal_basis, principal_angles

from ._class_directions import leading_directions, refuse_unless_finite
from ._lengths import safe_length, shadow_length
from .grassmann_optim import DRIFT, GrassmannParameter


class GrassmannHead(nn.Module):
    r"""Logit of class c: the unit feature's shadow on its subspace, :math:`\gamma\lVert S_c^\top\hat x\rVert`.

    Drop-in for ``nn.Linear(in_features, num_classes)`` before a softmax cross-entropy; there is no bias. The one
    parameter ``weight`` (C, k, d) holds the transposed bases, a :class:`~polyspan.nn.GrassmannParameter`: train it with
    :class:`~polyspan.nn.RiemannianSGD`, or with any optimiser after :meth:`parametrize_`. Trained by a plain optimiser
    without that, the bases drift from orthonormality and the logits lose their meaning.

    Logits lie in [0, gamma] and ignore the feature's sign and (with ``normalize``) its length: on fixed features whose
    classes differ by their mean direction only, a linear head is far better. The gradient of a logit is 0
    where the shadow is 0. Bases stay float32 or wider whatever the module is cast to; logits come in the dtype of x.
    Source: catalogue entry ``grassmann-class``.

    Parameters
    ----------
    in_features, num_classes : int
        d and C.
    rank : int or sequence of C ints, default=8
        Dimension k of each class's subspace, 1 <= k < d; unequal ones are padded by rows of zeros.
        ``rank=1`` gives ``gamma |w . x|`` with unit vectors. Above d/2 any two classes share directions.
    gamma : float, default=25.0
        Scale of the logits, the inverse temperature of the softmax.
    init : {"random", "pca"}, default="random"
        Uniformly random subspaces; ``"pca"`` refuses to run until :meth:`reset_from_features` was called (or a state
        loaded).
    normalize : bool, default=True
        Scale features to length 1 first.
    zero_features : {"error", "ignore"}, default="error"
        What to do with feature rows that are all zero or not finite: a ValueError that names them, which waits for an
        accelerator at each call, is left out of compiled and exported graphs, and must be "ignore" inside
        ``torch.vmap``; or let logits of 0, or NaN, pass.
    generator : torch.Generator, optional
        Source of the random subspaces; torch's global one where not given.

    Attributes
    ----------
    ranks : tuple of int
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        rank: int | Sequence[int] = 8,
        *,
        gamma: float = 25.0,
        init: Literal["random", "pca"] = "random",
        normalize: bool = True,
        zero_features: Literal["error", "ignore"] = "error",
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.ranks = _check_ranks(rank, in_features, num_classes)
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be positive and finite, got {gamma}")
        if init not in ("random", "pca"):
            raise ValueError(f"init must be 'random' or 'pca', got {init!r}")
        if zero_features not in ("error", "ignore"):
            raise ValueError(f"zero_features must be 'error' or 'ignore', got {zero_features!r}")
        self.in_features, self.num_classes, self.gamma = in_features, num_classes, float(gamma)
        self.normalize, self.zero_features = normalize, zero_features
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (num_classes, max(self.ranks), in_features)
        self.weight = GrassmannParameter(torch.empty(shape, device=device, dtype=wide))
        self.reset_parameters(generator)
        self._needs_features = init == "pca"

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every subspace anew, uniformly (Haar measure)."""
        self._needs_features = False
        if self.weight.is_meta:
            return
        device = self.weight.device if generator is None else generator.device
        drawn = torch.randn(self.weight.shape, generator=generator, device=device, dtype=self.weight.dtype)
        self._set_rows(drawn.to(self.weight.device))

    def _set_rows(self, rows: Tensor) -> None:
        """Take bases from linearly independent rows (C, k, d), of which the first ``ranks[c]`` count."""
        made = torch.zeros_like(self.weight)
        for k in set(self.ranks):
            of_rank = self._of_rank(k)
            made[of_rank, :k] = orthonormal_basis(rows[of_rank, :k].mT).mT
        self.weight.copy_(made)

    def _of_rank(self, k: int) -> Tensor:
        return torch.tensor([c for c, r in enumerate(self.ranks) if r == k], device=self.weight.device)

    @property
    def bases(self) -> Tensor:
        """Bases (C, d, k) with orthonormal columns, a view of the parameter."""
        return self.weight.mT

    def forward(self, x: Real[Tensor, "*batch d"]) -> Float[Tensor, "*batch C"]:
        """Return the logits of features ``x``; integers count as floats of the width of the bases."""
        x = self._read(x)
        return self._shadows(x)[0].to(x.dtype)

    def project(self, x: Real[Tensor, "*batch d"]) -> Float[Tensor, "*batch C k"]:
        """Return the coordinates of (unit) features in every class's basis; coordinates beyond a class's rank are 0."""
        x = self._read(x)
        _, inner, norm = self._shadows(x)
        if self.normalize:
            inner = inner / torch.where(norm > 0, norm, 1.0).unsqueeze(-1)
        return inner.to(x.dtype)

    def residual(self, x: Real[Tensor, "*batch d"]) -> Float[Tensor, "*batch C"]:
        """Return the length of the part of (unit) features outside every class's subspace: an out-of-class score.

        In [0, 1] with ``normalize``, the sine of the angle to the subspace. Computed in float64, correct to about 1e-7
        for float32 bases.
        """
        x = self._read(x)
        wide = x.double()
        if self.normalize:
            norm = safe_length(wide)
            wide = wide / torch.where(norm > 0, norm, 1.0)
        inside = self.project(wide).square().sum(-1)
        return (wide.square().sum(-1, keepdim=True) - inside).clamp(min=0).sqrt().to(x.dtype)

    def principal_angles(self) -> Float[Tensor, "C C k"]:
        """Return the angles between every two classes' subspaces, ascending radians; NaN beyond the smaller rank."""
        k = max(self.ranks)
        out = self.weight.new_full((self.num_classes, self.num_classes, k), float("nan"))
        with torch.no_grad():
            for a in sorted(set(self.ranks)):
                for b in sorted(set(self.ranks)):
                    rows, cols = self._of_rank(a), self._of_rank(b)
                    right = self.bases[cols, :, :b]
                    # One class against all of a rank at a time keeps the memory at C bases.
                    for row in rows.tolist():
                        out[row, cols, : min(a, b)] = principal_angles(self.bases[row, :, :a], right)
        return out

    def _read(self, x: Tensor) -> Tensor:
        """Check the width of features, and return them as floats."""
        if x.shape[-1:] != (self.in_features,) or x.is_complex():
            raise ValueError(f"x must be real (*batch, {self.in_features}), got {x.dtype} of shape {tuple(x.shape)}")
        return x if x.is_floating_point() else x.to(self.weight.dtype)

    def _shadows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, inner products with every basis vector (*batch, C, k), and feature lengths (*batch, 1)."""
        if self._needs_features:
            raise RuntimeError("init='pca' needs reset_from_features(X, y) before the head is used")
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        x, weight = x.to(dtype), self.weight.to(dtype)
        norm = shadow_length(x).unsqueeze(-1)
        if self.zero_features == "error" and not x.is_meta and not torch.compiler.is_compiling():
            x, norm = _checked_rows(x, norm)
        inner = F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        # One product with every basis vector and a division afterwards cost less than normalising the features.
        logits = shadow_length(inner.to(dtype)) * self.gamma
        if self.normalize:
            logits = logits / torch.where(norm > 0, norm, 1.0)
        return logits, inner, norm

    @torch.no_grad()
    def reset_from_features(
        self, X: Any, y: Any, *, generator: torch.Generator | None = None, block_rows: int = 16384
    ) -> None:
        """Set each class's subspace to the leading directions of its features, without centring: PCA about the origin.

        Parameters
        ----------
        X : tensor, ndarray, memory map or scipy.sparse CSR of shape (n, d)
            Read class by class, ``block_rows`` at a time.
        y : integers of shape (n,)
            Class indices in [0, C).
        generator : torch.Generator, optional
            For directions that a class with fewer independent features than its rank leaves open; a warning says which.
        """
        labels = np.asarray(torch.as_tensor(y).cpu()) if isinstance(y, Tensor) else np.asarray(y)
        if X.ndim != 2 or X.shape[1] != self.in_features or labels.shape != (X.shape[0],):
            raise ValueError(
                f"X must be (n, {self.in_features}) and y (n,), got {tuple(X.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype.kind not in "iu" or (len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes):
            raise ValueError(f"y must hold integers in [0, {self.num_classes}), got {np.unique(labels)[:10]} ...")
        refuse_unless_finite(X, block_rows)
        short = []
        rows = torch.zeros(self.weight.shape, dtype=torch.float64)
        for c, k in enumerate(self.ranks):
            found = leading_directions(X, np.flatnonzero(labels == c), k, self.normalize, block_rows)
            if len(found) < k:
                short.append(c)
                device = "cpu" if generator is None else generator.device
                drawn = torch.randn(k - len(found), self.in_features, generator=generator, device=device)
                found = torch.cat([found, drawn.to(found)])
            rows[c, :k] = found
        self._needs_features = False
        self._set_rows(rows.to(self.weight))
        if short:
            warnings.warn(
                f"classes {short[:10]}{' ...' if len(short) > 10 else ''} have fewer independent features than their "
                "rank; their subspaces are completed at random",
                UserWarning,
                stacklevel=2,
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int | Sequence[int] = 8,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> "GrassmannHead":
        """Start from a trained linear head: each class's weight vector is its first direction, the others are random.

        A start for training, not the same classifier: the common mean of the weight vectors, which no softmax sees, is
        taken out first; their lengths, signs and the bias have no counterpart (a bias that is not 0 is warned about).

        Parameters
        ----------
        linear : torch.nn.Linear
        rank, generator, **options :
            As for the class.
        """
        weight = linear.weight.detach()
        options = {"device": weight.device, "dtype": weight.dtype, **options}
        head = cls(linear.in_features, linear.out_features, rank, generator=generator, **options)
        if linear.bias is not None and bool(linear.bias.detach().any()):
            warnings.warn("the bias of the linear head is dropped: subspaces have none", UserWarning, stacklevel=2)
        with torch.no_grad():
            rows = head.weight.clone()
            centred = (weight - weight.mean(0)).to(rows)
            usable = torch.linalg.vector_norm(centred, dim=1) > 0
            rows[usable, 0] = centred[usable]
            head._set_rows(rows)
        return head

    def parametrize_(self, method: Literal["polar", "qr"] = "polar") -> "GrassmannHead":
        """Make every plain optimiser usable: ``weight`` becomes the orthonormal factor of a free parameter.

        Moving along the free parameter's own span changes nothing, so weight decay on it does no harm but acts as a
        learning-rate schedule. Undo by ``torch.nn.utils.parametrize.remove_parametrizations(head, "weight")``.
        """
        if method not in ("polar", "qr"):
            raise ValueError(f"method must be 'polar' or 'qr', got {method!r}")
        # A plain parameter: the Riemannian optimisers must not take it for a subspace.
        free = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        self._parameters["weight"] = free
        parametrize.register_parametrization(self, "weight", _OrthonormalRows(self.ranks, method))
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Keep ``weight`` a :class:`GrassmannParameter` when a loader assigns a plain one."""
        if name == "weight" and param is not None and not isinstance(param, GrassmannParameter):
            attributes = dict(param.__dict__)
            param = GrassmannParameter(param.data, param.requires_grad)
            param.__dict__.update(attributes)
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> "GrassmannHead":
        kept = self._parameters.get("weight")
        before = None if kept is None else kept.data
        super()._apply(fn, recurse)
        now = self._parameters.get("weight")
        if now is not None and before is not None:
            if now.dtype not in (torch.float32, torch.float64):
                # Half precision cannot hold an orthonormal basis: follow the device, not the dtype.
                now.data = before.to(now.device)
            if not isinstance(now, GrassmannParameter):
                self.weight = now
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        kept = self._parameters.get("weight")
        if kept is not None and kept.dtype not in (torch.float32, torch.float64):
            # A state that was assigned; half precision cannot hold an orthonormal basis.
            self.weight = GrassmannParameter(kept.detach().float(), kept.requires_grad)
        if f"{prefix}weight" in state_dict and kept is not None and not self.weight.is_meta:
            if not torch.isfinite(self.weight).all():
                error_msgs.append(f"{prefix}weight must be finite, got NaN or infinity")
                return
            self._needs_features = False
            self.repair_()

    @torch.no_grad()
    def repair_(self) -> bool:
        """Replace bases that are not orthonormal to within 1e-3 by their polar factors, with a warning; say if any.

        Called after every ``load_state_dict``.
        """
        drift, bad = 0.0, 0
        for k in set(self.ranks):
            of_rank = self._of_rank(k)
            rows = self.weight[of_rank, :k]
            gram = rows @ rows.mT - torch.eye(k, device=rows.device, dtype=rows.dtype)
            error = gram.abs().amax((-2, -1))
            outside = self.weight[of_rank, k:].abs().sum((-2, -1))
            wrong = (error > DRIFT) | (outside > 0)
            if wrong.any():
                drift, bad = max(drift, float(error.max())), bad + int(wrong.sum())
                self.weight[of_rank[wrong], :k] = nearest_isometry(rows[wrong].mT).mT
                self.weight[of_rank[wrong], k:] = 0
        if bad:
            warnings.warn(
                f"{bad} of {self.num_classes} class bases were not orthonormal (largest error {drift:.1e}, allowed "
                f"{DRIFT:.0e}) and were replaced by their polar factors",
                UserWarning,
                stacklevel=2,
            )
        return bad > 0

    def extra_repr(self) -> str:
        """Name the sizes, as torch's own layers do."""
        ranks = self.ranks[0] if len(set(self.ranks)) == 1 else list(self.ranks)
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, rank={ranks}, gamma={self.gamma:g}, "
            f"normalize={self.normalize}"
        )


class _OrthonormalRows(nn.Module):
    """Free rows (C, k, d) to orthonormal ones, class by class of equal rank."""

    def __init__(self, ranks: tuple[int, ...], method: str):
        super().__init__()
        self.ranks, self.method = ranks, method

    def forward(self, X: Tensor) -> Tensor:
        factor = nearest_isometry if self.method == "polar" else orthonormal_basis
        if len(set(self.ranks)) == 1:
            return factor(X.mT).mT
        k = max(self.ranks)
        return torch.stack([F.pad(factor(x[:r].mT).mT, (0, 0, 0, k - r)) for x, r in zip(X, self.ranks, strict=True)])

    def right_inverse(self, W: Tensor) -> Tensor:
        return W


def replace_head(
    model: nn.Module,
    name: str | None = None,
    rank: int | Sequence[int] = 8,
    *,
    start: Literal["random", "linear", "pca"] | None = None,
    features: Any = None,
    labels: Any = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> GrassmannHead:
    """Swap the linear classifier of a model for a :class:`GrassmannHead`, in place; return the new head.

    For a Hugging Face model the head is written to its config and its class changed to
    :func:`with_grassmann_head` of its class, so that ``save_pretrained`` keeps everything; load it again by
    ``with_grassmann_head(BertForSequenceClassification).from_pretrained(folder)``. The plain class does not know the
    head, and gives a random linear one with transformers' warning about missing weights.

    Parameters
    ----------
    model : torch.nn.Module
    name : str, optional
        Dotted name of the ``nn.Linear``. Where not given: the only linear layer with ``config.num_labels`` outputs, or
        the model's last linear layer.
    rank : int or sequence of int, default=8
    start : {"random", "linear", "pca"}, optional
        Where training starts: random subspaces; the old weight vectors (:meth:`GrassmannHead.from_linear`); the
        classes' PCA (needs ``features`` and ``labels``). ``"pca"`` where features are given, else ``"random"``.
    features, labels : optional
        What the head's input looks like, (n, d) and (n,): see :meth:`GrassmannHead.reset_from_features`.
    **options :
        ``gamma``, ``normalize``, ``zero_features``.
    """
    start = start or ("random" if features is None else "pca")
    if start not in ("random", "linear", "pca"):
        raise ValueError(f"start must be 'random', 'linear' or 'pca', got {start!r}")
    if (start == "pca") != (features is not None and labels is not None):
        raise ValueError(f"features and labels must be given for start='pca' and only there, got start={start!r}")
    name = _find_linear(model) if name is None else name
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"name must be a submodule, got {name!r}; linear layers: {_linears(model)}") from None
    if not isinstance(old, nn.Linear):
        raise ValueError(f"name must be an nn.Linear, got a {type(old).__name__} at {name!r}")
    if start == "linear":
        head = GrassmannHead.from_linear(old, rank, generator=generator, **options)
    else:
        options = {"device": old.weight.device, "dtype": old.weight.dtype, **options}
        head = GrassmannHead(old.in_features, old.out_features, rank, generator=generator, **options)
        if start == "pca":
            head.reset_from_features(features, labels, generator=generator)
    head.train(old.training)
    _put(model, name, head)
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(model, "save_pretrained"):
        config.grassmann_head = {
            "name": name,
            "rank": head.ranks[0] if len(set(head.ranks)) == 1 else list(head.ranks),
            "gamma": head.gamma,
            "normalize": head.normalize,
            "zero_features": head.zero_features,
        }
        model.__class__ = with_grassmann_head(type(model))
    return head


@cache
def with_grassmann_head(base: Any) -> Any:
    """Return the Hugging Face model class whose classifier is the head that its config's ``grassmann_head`` names.

    ``save_pretrained`` and ``from_pretrained`` of that class work as usual; weights are safetensors.
    """
    if getattr(base, "has_grassmann_head", False):
        return base

    class Headed(base):
        has_grassmann_head = True

        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            wanted = getattr(config, "grassmann_head", None)
            if wanted is None:
                raise ValueError("config must have grassmann_head, as replace_head writes it, got one without")
            wanted = dict(wanted)
            name = wanted.pop("name")
            old: Any = self.get_submodule(name)
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            _put(self, name, GrassmannHead(old.in_features, old.out_features, wanted.pop("rank"), **wanted, **place))

        def _init_weights(self, module: Any) -> None:
            # Called for every module after loading; loaded parameters are flagged.
            if not isinstance(module, GrassmannHead):
                super()._init_weights(module)
            elif not getattr(module.weight, "_is_hf_initialized", False):
                module.reset_parameters()

    Headed.__name__ = Headed.__qualname__ = base.__name__
    Headed.__module__ = base.__module__
    return Headed


def _put(model: Any, name: str, head: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, head)


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _find_linear(model: nn.Module) -> str:
    """Name the classifier: the linear layer with as many outputs as the config has labels, or the last one."""
    names = _linears(model)
    if not names:
        raise ValueError(f"model must have an nn.Linear to replace, got a {type(model).__name__} without one")
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels is None:
        return names[-1]
    fitting = [n for n in names if getattr(model.get_submodule(n), "out_features", None) == labels]
    if len(fitting) != 1:
        raise ValueError(
            f"name must be given: {len(fitting)} linear layers have num_labels={labels} outputs: {fitting}"
        )
    return fitting[0]


def _check_ranks(rank: Any, d: int, n_classes: int) -> tuple[int, ...]:
    ranks = tuple(map(index, rank)) if isinstance(rank, Sequence) else (index(rank),) * n_classes
    if len(ranks) != n_classes:
        raise ValueError(f"rank must be one int or one for each of num_classes={n_classes}, got {len(ranks)}")
    wrong = [r for r in ranks if not 1 <= r < d]
    if wrong:
        raise ValueError(f"rank must be at least 1 and below in_features={d}, got {wrong[0]}")
    if max(ranks) > d / 2:
        warnings.warn(
            f"rank={max(ranks)} is more than half of in_features={d}: every two subspaces then share directions",
            UserWarning,
            stacklevel=3,
        )
    return ranks


def _checked_rows(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse rows without a direction; scale those whose squares only leave the range of floats."""
    odd = ~((norm > 0) & torch.isfinite(norm))
    if not odd.any():
        return x, norm
    size = x.detach().abs().amax(dim=-1, keepdim=True)
    wrong = ~((size > 0) & torch.isfinite(size)).flatten()
    if wrong.any():
        rows = wrong.nonzero().flatten()[:10].tolist()
        raise ValueError(
            f"x must have no all-zero or non-finite feature row, got {int(wrong.sum())}, at rows {rows}; "
            "zero_features='ignore' lets them pass"
        )
    x = x / torch.where(odd, size, 1.0)
    return x, safe_length(x)
