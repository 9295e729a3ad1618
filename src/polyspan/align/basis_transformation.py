"""Compatible training by changes of basis: the older method that adds dimensions, and needs a new model first."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import clone
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import check_number
from ._compatible_head import _on, _unit
from ._orthogonal_transform import ORTHOGONAL_MAPS, OrthogonalTransform
from ._prototypes import as_rows, unit_rows
from .compatible_training import CompatibleClassifier


class BasisTransformationOutput(NamedTuple):
    r"""What the head returns for a batch.

    ``logits`` (\*batch, C); ``compatible`` (\*batch, d), the part for the old index, of any length; ``feature``
    (\*batch, n), the unit vector that follows the independent new model; ``embedding`` (\*batch, n + e), the unit
    vector that is stored, whose first d numbers have the direction of ``compatible``.
    """

    logits: Tensor
    compatible: Tensor
    feature: Tensor
    embedding: Tensor


class BasisTransformationHead(nn.Module):
    r"""Join a vector that follows a new model and a few numbers that follow the old one by two changes of basis (BT²).

    A linear layer gives z of n + d numbers. The unit vector v of the first n is the feature, which the classifier sees;
    the unit vector a of the first e numbers of a linear layer on :math:`\mathrm{relu}(z)` is the old branch. With P and
    Q orthogonal, of width n and d, :math:`w = [a, c P v]` and the embedding is :math:`[Q w_{:d}, w_{d:}]`: all of v
    is kept in it, and its first d numbers are a turn of the numbers that are for the old index. Its length is
    :math:`\sqrt{1 + c^2}` always, and divided out here.
    Source: Zhou et al., "BT²: Backward-compatible Training with Basis Transformation", 2023, by the authors' code; a
    baseline of catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    in_features : int
        Width of the backbone's output.
    old_dim, new_dim : int
        Widths d and n of the old encoder's vectors and of the independent new model's.
    num_classes : int
        Classes C of the new training set.
    extra_dim : int, default=32
        Numbers e of the old branch, at most d; n + e must be d at least.
    scale : float, default=2.0
        The factor c.
    orthogonal_map : {"cayley", "matrix-exp", "householder", "retraction"}, default="cayley"
        How P and Q are kept orthogonal. With ``"retraction"`` call :meth:`retract_` after every optimiser step.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """

    def __init__(
        self,
        in_features: int,
        old_dim: int,
        new_dim: int,
        num_classes: int,
        extra_dim: int = 32,
        *,
        scale: float | int = 2.0,
        orthogonal_map: str = "cayley",
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("old_dim", old_dim, 1),
            ("new_dim", new_dim, 1),
            ("num_classes", num_classes, 2),
            ("extra_dim", extra_dim, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not old_dim - new_dim <= extra_dim <= old_dim:
            raise ValueError(
                f"extra_dim must be between old_dim - new_dim = {old_dim - new_dim} and old_dim = {old_dim}, so that "
                f"the embedding holds the old width and the old branch fits into it, got {extra_dim}"
            )
        if orthogonal_map not in ORTHOGONAL_MAPS:
            raise ValueError(f"orthogonal_map must be one of {ORTHOGONAL_MAPS}, got {orthogonal_map!r}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.in_features, self.old_dim, self.new_dim, self.num_classes = in_features, old_dim, new_dim, num_classes
        self.extra_dim, self.scale = extra_dim, float(scale)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        both = new_dim + old_dim
        self.projection = nn.utils.skip_init(nn.Linear, in_features, both, **_on(made))
        self.old_branch = nn.utils.skip_init(nn.Linear, both, old_dim, **_on(made))
        self.new_basis = OrthogonalTransform(new_dim, orthogonal_map, False, generator=generator, **made)
        self.old_basis = OrthogonalTransform(old_dim, orthogonal_map, False, generator=generator, **made)
        self.classifier = nn.utils.skip_init(nn.Linear, new_dim, num_classes, bias=False, **_on(made))
        for layer in (self.projection, self.old_branch, self.classifier):
            if not layer.weight.is_meta:
                bound = layer.in_features**-0.5
                for part in layer.parameters():
                    nn.init.uniform_(part, -bound, bound, generator=generator)

    @property
    def width(self) -> int:
        """Numbers of the embedding, n + e."""
        return self.new_dim + self.extra_dim

    def embed(self, z: Float[Tensor, "*batch f"]) -> Float[Tensor, "*batch w"]:
        """Return the vectors to store and to search with: unit rows of n + e numbers."""
        return self(z).embedding

    def forward(self, z: Float[Tensor, "*batch f"]) -> BasisTransformationOutput:
        r"""Return logits, compatible part, feature and embedding for features (\*batch, in_features)."""
        both = self.projection(z)
        v = _unit(both[..., : self.new_dim])
        old = _unit(_unit(self.old_branch(torch.relu(both)))[..., : self.extra_dim])
        joined = torch.cat([old, self.new_basis(self.scale * v)], dim=-1)
        compatible = self.old_basis(joined[..., : self.old_dim])
        embedding = _unit(torch.cat([compatible, joined[..., self.old_dim :]], dim=-1))
        return BasisTransformationOutput(self.classifier(v), compatible, v, embedding)

    def retract_(self) -> None:
        """Bring both bases back to orthogonality; only ``orthogonal_map="retraction"`` needs it."""
        self.new_basis.retract_()
        self.old_basis.retract_()

    def extra_repr(self) -> str:
        return f"old_dim={self.old_dim}, new_dim={self.new_dim}, extra_dim={self.extra_dim}"


class BasisTransformationLoss(nn.Module):
    r"""Classify, follow the independent new model, and stay with the old encoder's classes and vectors.

    With o the logits, v the feature, u the unit vector of the compatible part, P the old prototypes, and x and h the
    unit vectors of the item by the new and the old model,

    .. math:: w_{ce}\, CE(o, y) + w_{new} (1 - v \cdot x) + w_{bct}\, CE(u P^\top, y) + w_{cos} (1 - u \cdot h).

    Source: as :class:`BasisTransformationHead`.

    Parameters
    ----------
    prototypes : tensor or array of shape (C, d)
        By :func:`class_prototypes`.
    w_ce, w_new, w_bct, w_cos : float, default=1.0, 1.0, 10.0, 5.0
        The authors' weights.
    label_smoothing : float, default=0.0
        In [0, 1), of both cross-entropies.
    reduction : {"mean", "none"}, default="mean"
        Whether terms are means over the batch, or one number an item.
    """

    prototypes: Tensor

    def __init__(
        self,
        prototypes: Any,
        *,
        w_ce: float | int = 1.0,
        w_new: float | int = 1.0,
        w_bct: float | int = 10.0,
        w_cos: float | int = 5.0,
        label_smoothing: float | int = 0.0,
        reduction: str = "mean",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("w_ce", w_ce), ("w_new", w_new), ("w_bct", w_bct), ("w_cos", w_cos)):
            if not (value >= 0 and np.isfinite(value)):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        P = torch.tensor(as_rows(prototypes, "prototypes"))
        if not torch.isfinite(P).all():
            raise ValueError("prototypes must be finite, got NaN or infinity")
        self.weights = {"ce": float(w_ce), "new": float(w_new), "bct": float(w_bct), "cos": float(w_cos)}
        self.label_smoothing, self.reduction = float(label_smoothing), reduction
        self.register_buffer("prototypes", P.to(device, torch.get_default_dtype() if dtype is None else dtype))

    def forward(
        self,
        output: BasisTransformationOutput,
        target: Int[Tensor, " batch"],
        old: Float[Tensor, "batch d"],
        new: Float[Tensor, "batch n"],
    ) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``new``, ``bct`` and ``cos``, unweighted, and their ``total``.

        Raises
        ------
        ValueError
            Widths or class counts of output, prototypes and vectors differ.
        """
        for name, found, wanted in (
            ("prototypes", self.prototypes, (output.logits.shape[-1], output.compatible.shape[-1])),
            ("old", old, output.compatible.shape),
            ("new", new, output.feature.shape),
        ):
            if tuple(found.shape) != tuple(wanted):
                raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(found.shape)}")
        u, v = _unit(output.compatible), output.feature
        scores = u @ self.prototypes.to(u.dtype).mT
        how: dict[str, Any] = {"label_smoothing": self.label_smoothing, "reduction": "none"}
        terms = {
            "ce": F.cross_entropy(output.logits, target, **how),
            "new": 1 - (v * _unit(new).to(v.dtype)).sum(dim=-1),
            "bct": F.cross_entropy(scores, target, **how),
            "cos": 1 - (u * _unit(old).to(u.dtype)).sum(dim=-1),
        }
        if self.reduction == "mean":
            terms = {name: term.mean() for name, term in terms.items()}
        terms["total"] = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum(dim=0)
        return terms

    def extra_repr(self) -> str:
        return ", ".join(f"w_{name}={weight:g}" for name, weight in self.weights.items())


class BasisTransformationClassifier(CompatibleClassifier):
    r"""Learn a compatible encoder as :class:`CompatibleClassifier` does, by the older method BT².

    The backbone is trained with :class:`BasisTransformationHead` and :class:`BasisTransformationLoss`: it follows the
    vectors of a new model that was trained without a thought of the old one, and so costs two trainings. Where no such
    model is given, one is trained first by the same settings, of the old width. By the authors' weights the old model
    counts for 15 of 17 parts, so that the vectors follow the new one late: few epochs leave them behind it. All that a
    fitted :class:`CompatibleClassifier` does this one does, and each may be the ``old`` of the other; without ``old``
    both are the same plain classifier.
    Source: as :class:`BasisTransformationHead`.

    Parameters
    ----------
    extra_dim : int, default=32
        Numbers of the old branch, at most the old width.
    w_ce, w_new, w_bct, w_cos : float, default=1.0, 1.0, 10.0, 5.0
        Weights of the terms of the loss.
    scale : float, default=2.0
        What the part that follows the new model is multiplied by.
    label_smoothing : float, default=0.0
    backbone, hidden, embedding_dim, orthogonal_map, learning_rate, weight_decay, max_iter, warmup, batch_size, \
    precision, checkpoint, random_state, device, verbose
        As in :class:`CompatibleClassifier`.

    Attributes
    ----------
    new_dim_ : int
        Width of the new model that was followed; 0 without an old model.
    classes_, encoder_, prototypes_, class_means_, separability_, old_dim_, old_unit_, history_, n_iter_
        As in :class:`CompatibleClassifier`; ``history_`` has the term ``new`` too.
    """

    _facts = (*CompatibleClassifier._facts, "new_dim_")
    new_dim_: int

    def __init__(
        self,
        backbone: Any = "mlp",
        *,
        hidden=(256, 256),
        embedding_dim=32,
        extra_dim=32,
        w_ce=1.0,
        w_new=1.0,
        w_bct=10.0,
        w_cos=5.0,
        scale=2.0,
        label_smoothing=0.0,
        orthogonal_map="cayley",
        learning_rate=3e-3,
        weight_decay=2**-15,
        max_iter=20,
        warmup=1.0,
        batch_size=128,
        precision="float32",
        checkpoint=None,
        random_state=None,
        device="auto",
        verbose=False,
    ):
        super().__init__(
            backbone,
            hidden=hidden,
            embedding_dim=embedding_dim,
            extra_dim=extra_dim,
            w_ce=w_ce,
            w_bct=w_bct,
            w_cos=w_cos,
            label_smoothing=label_smoothing,
            orthogonal_map=orthogonal_map,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_iter=max_iter,
            warmup=warmup,
            batch_size=batch_size,
            precision=precision,
            checkpoint=checkpoint,
            random_state=random_state,
            device=device,
            verbose=verbose,
        )
        self.w_new = w_new
        self.scale = scale

    def fit(self, X, y, old=None, new=None) -> "BasisTransformationClassifier":
        """Train on rows ``X`` (n, n_features) with labels ``y`` (n,) of any kind.

        Parameters
        ----------
        old : array of shape (n, d), fitted transformer, or callable, optional
            The old encoder's vectors of the same rows, or what makes them from ``X``.
        new : likewise, of width n, optional
            The independent new model's.

        Raises
        ------
        ValueError
            As in :meth:`CompatibleClassifier.fit`; or ``new`` comes without ``old`` or does not fit, or a checkpoint
            cannot go on because the new model would be another one: give it, or an integer ``random_state``.
        NotConverged
            The loss is not finite in the first epoch.

        Warns
        -----
        UserWarning
            As in :meth:`CompatibleClassifier.fit`.
        """
        if new is not None and old is None:
            raise ValueError("new must come with old, got old=None: without an old model there is nothing to join")
        self.new_dim_ = 0
        return self._learn(X, y, old, new)

    def _beside(self, X, y, old_rows, new):
        if new is None:
            if self.checkpoint is not None and not isinstance(self.random_state, int | np.integer):
                raise ValueError(
                    "random_state must be a whole number where there is a checkpoint and no new model, so that the "
                    f"same one is trained again, got {self.random_state!r}"
                )
            alone = clone(self).set_params(embedding_dim=old_rows.shape[1], checkpoint=None)
            new = alone.fit(X, y)
        new_rows = self._old_rows(new, X, "new")
        self.new_dim_ = new_rows.shape[1]
        return unit_rows(old_rows, "old"), unit_rows(new_rows, "new")

    def _loss(self) -> nn.Module:
        if self.prototypes_ is None:
            return super()._loss()
        return BasisTransformationLoss(
            self.prototypes_,
            w_ce=self.w_ce,
            w_new=self.w_new,
            w_bct=self.w_bct,
            w_cos=self.w_cos,
            label_smoothing=self.label_smoothing,
            dtype=torch.float32,
        )

    def _head(self, width: int, n_classes: int) -> nn.Module:
        if self.prototypes_ is None:
            return super()._head(width, n_classes)
        return BasisTransformationHead(
            width,
            self.old_dim_,
            self.new_dim_,
            n_classes,
            self.extra_dim,
            scale=self.scale,
            orthogonal_map=self.orthogonal_map,
            dtype=torch.float32,
        )

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number("scale", self.scale, positive=True)

    @classmethod
    def _kinds(cls) -> dict[str, type[CompatibleClassifier]]:
        return {cls.__name__: cls}
