"""Head and loss of compatible training: a wider embedding whose first numbers stay with the old encoder's classes."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ._orthogonal_transform import ORTHOGONAL_MAPS, OrthogonalTransform
from ._prototypes import as_rows

SHORTEST = 1e-6
"""Vectors shorter than this are not stretched to length 1: the gradient would be a million times the loss's."""


class CompatibleOutput(NamedTuple):
    r"""What the head returns for a batch.

    ``logits`` (\*batch, C); ``embedding`` (\*batch, d + e), the unit vector that is stored; ``compatible`` (\*batch,
    d), its first numbers as they are; ``transformed`` (\*batch, d + e), the embedding turned, which only training sees.
    """

    logits: Tensor
    compatible: Tensor
    transformed: Tensor
    embedding: Tensor


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=SHORTEST)


class OrthogonalCompatibleHead(nn.Module):
    r"""Widen an embedding by a few dimensions, and let the classifier see it through an orthogonal layer.

    With z the features, after a linear layer where ``project``, :math:`h = z / \lVert z \rVert` is what you store and
    search; its first d numbers stay comparable with the old encoder's vectors if trained with
    :class:`OrthogonalCompatibleLoss`, and the classifier's logits are :math:`W T h` with T orthogonal. After training
    T and W are thrown away: :meth:`embed` is the encoder. Never store ``transformed``, whose first d numbers are
    comparable with nothing.

    T changes the course of training only: W T is a linear classifier as well, and cosines of h and T h are equal. What
    the method gains comes of the additional dimensions and the old prototypes; ``use_transform=False`` leaves T out.
    Source: catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    in_features : int
        Width of the backbone's output.
    old_dim : int
        Width d of the old encoder's vectors.
    num_classes : int
        Classes C of the new training set.
    extra_dim : int, default=32
        Additional dimensions e. With 0 nothing is free of the old model.
    project : bool, default=True
        Map features to d + e numbers by a linear layer, whose bias gives a direction even to features that a ReLU has
        put out; without it ``in_features`` must be d + e.
    orthogonal_map : {"cayley", "matrix-exp", "householder", "retraction"}, default="cayley"
        How T is kept orthogonal. ``"matrix-exp"`` is the authors' and slow when wide; with ``"retraction"`` call
        :meth:`retract_` after every optimiser step.
    use_transform : bool, default=True
    bias : bool, default=False
        Give T a bias, as the authors' code does.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """

    def __init__(
        self,
        in_features: int,
        old_dim: int,
        num_classes: int,
        extra_dim: int = 32,
        *,
        project: bool = True,
        orthogonal_map: str = "cayley",
        use_transform: bool = True,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("old_dim", old_dim, 1),
            ("num_classes", num_classes, 2),
            ("extra_dim", extra_dim, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if orthogonal_map not in ORTHOGONAL_MAPS:
            raise ValueError(f"orthogonal_map must be one of {ORTHOGONAL_MAPS}, got {orthogonal_map!r}")
        width = old_dim + extra_dim
        if in_features < old_dim:
            raise ValueError(
                f"old_dim must be at most in_features={in_features}, got {old_dim}: features that narrow cannot fill "
                "the old space; widen the backbone"
            )
        if not project and in_features != width:
            raise ValueError(
                f"in_features must be old_dim + extra_dim = {width} where project=False, got {in_features}"
            )
        self.in_features, self.old_dim, self.extra_dim, self.num_classes = in_features, old_dim, extra_dim, num_classes
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection = nn.utils.skip_init(nn.Linear, in_features, width, **_on(made)) if project else None
        self.transform = (
            OrthogonalTransform(width, orthogonal_map, bias, generator=generator, **made) if use_transform else None
        )
        self.classifier = nn.utils.skip_init(nn.Linear, width, num_classes, bias=False, **_on(made))
        for layer in (self.projection, self.classifier):
            if layer is not None and not layer.weight.is_meta:
                bound = layer.in_features**-0.5
                for part in layer.parameters():
                    nn.init.uniform_(part, -bound, bound, generator=generator)

    @property
    def width(self) -> int:
        """Numbers of the embedding, d + e."""
        return self.old_dim + self.extra_dim

    def embed(self, z: Float[Tensor, "*batch f"]) -> Float[Tensor, "*batch w"]:
        """Return the vectors to store and to search with: unit rows of d + e numbers. A row of zeros stays zero."""
        return _unit(z if self.projection is None else self.projection(z))

    def forward(self, z: Float[Tensor, "*batch f"]) -> CompatibleOutput:
        r"""Return logits, compatible part, turned vector and embedding for features (\*batch, in_features)."""
        h = self.embed(z)
        turned = h if self.transform is None else self.transform(h)
        return CompatibleOutput(self.classifier(turned), h[..., : self.old_dim], turned, h)

    def retract_(self) -> None:
        """Bring T back to orthogonality; only ``orthogonal_map="retraction"`` needs it, elsewhere it does nothing."""
        if self.transform is not None:
            self.transform.retract_()

    def extra_repr(self) -> str:
        return f"old_dim={self.old_dim}, extra_dim={self.extra_dim}, num_classes={self.num_classes}"


def _on(made: dict[str, Any]) -> dict[str, Any]:
    """Drop a device of None, with which ``skip_init`` cannot do."""
    return {name: value for name, value in made.items() if value is not None}


class OrthogonalCompatibleLoss(nn.Module):
    r"""Classify with the whole vector, and hold its first d numbers to where the old encoder puts the classes.

    With o the logits, :math:`u = h_{:d} / \lVert h_{:d} \rVert` and P the old prototypes,

    .. math:: w_{ce}\, CE(o, y) + w_{bct}\, CE(u P^\top / \tau, y) + w_{cos}\, (1 - \cos(u, p_y)),

    both cross-entropies with label smoothing. Without a temperature the second term has logits in [-1, 1] and cannot
    fall much below :math:`\log C - 2`. Classes that the old encoder never saw have prototypes too, if noisy ones, which
    may pull new classes together: see ``class_weights``. A prototype of zeros marks a class that is left out.
    Source: catalogue entry ``orthogonal-compatible-alignment``; ``tau`` other than 1 and ``class_weights`` are ours.

    Parameters
    ----------
    prototypes : tensor or array of shape (C, d), optional
        By :func:`class_prototypes`; without them only the first term is left.
    w_ce, w_bct, w_cos : float, default=5.0, 10.0, 5.0
        Weights of the terms.
    label_smoothing : float, default=0.1
        In [0, 1).
    tau : float, default=1.0
        Temperature of the second term.
    class_weights : tensor or array of shape (C,), optional
        Factors in [0, ∞) on the second and third term of items of a class, such as :func:`prototype_separability`.
    reduction : {"mean", "none"}, default="mean"
        Whether terms are means over the batch, or one number an item.
    """

    prototypes: Tensor | None
    alignment: Tensor | None

    def __init__(
        self,
        prototypes: Any = None,
        *,
        w_ce: float | int = 5.0,
        w_bct: float | int = 10.0,
        w_cos: float | int = 5.0,
        label_smoothing: float | int = 0.1,
        tau: float | int = 1.0,
        class_weights: Any = None,
        reduction: str = "mean",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("w_ce", w_ce), ("w_bct", w_bct), ("w_cos", w_cos)):
            if not (value >= 0 and np.isfinite(value)):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}")
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        self.w_ce, self.w_bct, self.w_cos = float(w_ce), float(w_bct), float(w_cos)
        self.label_smoothing, self.tau, self.reduction = float(label_smoothing), float(tau), reduction
        P = None if prototypes is None else torch.tensor(as_rows(prototypes, "prototypes"))
        if P is None and class_weights is not None:
            raise ValueError("class_weights must come with prototypes, got prototypes=None")
        weights = None
        if P is not None:
            if not torch.isfinite(P).all():
                raise ValueError("prototypes must be finite, got NaN or infinity")
            given = np.ones(len(P)) if class_weights is None else np.asarray(class_weights, dtype=np.float64)
            if given.shape != (len(P),) or not (np.isfinite(given) & (given >= 0)).all():
                raise ValueError(
                    f"class_weights must be {len(P)} finite numbers of at least 0, got shape {given.shape}: {given[:5]}"
                )
            weights = torch.as_tensor(given) * (torch.linalg.vector_norm(P, dim=1) > 0)
            kind = torch.get_default_dtype() if dtype is None else dtype
            P, weights = P.to(device, kind), weights.to(device, kind)
        self.register_buffer("prototypes", P)
        self.register_buffer("alignment", weights)

    def forward(self, output: CompatibleOutput, target: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``bct`` and ``cos``, unweighted, and their weighted ``total``.

        Raises
        ------
        ValueError
            Widths or class counts of output and prototypes differ, or, on the CPU, a label is not in 0..C-1.
        """
        logits, P = output.logits, self.prototypes
        C = logits.shape[-1]
        if not (target.is_cuda or torch.compiler.is_compiling()) and target.numel():
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= C:
                raise ValueError(f"target must lie in 0..{C - 1}, got {low} to {high}")
        ce = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing, reduction="none")
        terms = {"ce": ce, "bct": torch.zeros_like(ce), "cos": torch.zeros_like(ce)}
        if P is not None and self.alignment is not None:
            if (C, output.compatible.shape[-1]) != tuple(P.shape):
                raise ValueError(
                    f"prototypes must have shape {(C, output.compatible.shape[-1])} like the head's classes and "
                    f"old_dim, got {tuple(P.shape)}"
                )
            u, weight = _unit(output.compatible), self.alignment[target]
            scores = u @ P.to(u.dtype).mT / self.tau
            bct = F.cross_entropy(scores, target, label_smoothing=self.label_smoothing, reduction="none")
            own = _unit(P)[target].to(u.dtype)
            terms["bct"], terms["cos"] = bct * weight, (1 - (u * own).sum(dim=-1)) * weight
        if self.reduction == "mean":
            terms = {name: term.mean() for name, term in terms.items()}
        terms["total"] = self.w_ce * terms["ce"] + self.w_bct * terms["bct"] + self.w_cos * terms["cos"]
        return terms

    def extra_repr(self) -> str:
        return f"w_ce={self.w_ce:g}, w_bct={self.w_bct:g}, w_cos={self.w_cos:g}, tau={self.tau:g}"
