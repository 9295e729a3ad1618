"""Compatible training of image and text encoders under the Hugging Face Trainer: model, loss, metrics, callback."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from polyspan.align import CompatibleOutput, OrthogonalCompatibleHead, OrthogonalCompatibleLoss, evaluate_compatibility
from polyspan.errors import require

transformers: Any = require("transformers", extra="hf", purpose="compatible training under the Hugging Face Trainer")
generic: Any = require("transformers.utils", extra="hf")

POOLINGS = ("mean", "first", "pooler")


@dataclass
class CompatibleModelOutput(generic.ModelOutput):
    """What the model returns: ``logits`` (b, C), ``compatible`` (b, d) and ``embedding`` (b, d + e), unit rows."""

    logits: Tensor | None = None
    compatible: Tensor | None = None
    embedding: Tensor | None = None


class CompatibleEncoder(nn.Module):
    """A Hugging Face encoder with the head of compatible training, for the Trainer.

    The Trainer keeps the columns of a data set that :meth:`forward` names. Give it :class:`CompatibleTrainerLoss` as
    ``compute_loss_func``, :class:`CompatibilityMetrics` as ``compute_metrics``, :func:`keep_embedding` as
    ``preprocess_logits_for_metrics``, and :class:`RetractionCallback` where the head has
    ``orthogonal_map="retraction"``.
    Source: catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    encoder : transformers.PreTrainedModel or torch.nn.Module
        Takes ``pixel_values``, or ``input_ids`` and masks, and returns ``last_hidden_state`` or ``pooler_output``.
    head : OrthogonalCompatibleHead
        Its ``in_features`` is the encoder's width.
    pooling : {"mean", "first", "pooler"} or callable, default="mean"
        How (b, t, f) becomes (b, f): the mean over tokens that ``attention_mask`` does not hide, the first token, or
        the encoder's ``pooler_output``, flattened. A callable takes the encoder's output and the mask, or None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Any,
        *,
        pooling: str | Callable[[Any, Tensor | None], Tensor] = "mean",
    ):
        super().__init__()
        if not isinstance(head, OrthogonalCompatibleHead):
            raise ValueError(f"head must be an OrthogonalCompatibleHead, got {type(head).__name__}")
        if not callable(pooling) and pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS} or a callable, got {pooling!r}")
        self.encoder, self.head, self.pooling = encoder, head, pooling

    def features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Return what the head sees of a batch, (b, in_features)."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }
        z = self._pooled(self.encoder(**{n: v for n, v in given.items() if v is not None}), attention_mask)
        if z.ndim != 2 or z.shape[1] != self.head.in_features:
            raise ValueError(f"encoder must give features (b, {self.head.in_features}) like head, got {tuple(z.shape)}")
        return z

    def _pooled(self, found: Any, mask: Tensor | None) -> Tensor:
        if not isinstance(self.pooling, str):
            return self.pooling(found, mask)
        name = "pooler_output" if self.pooling == "pooler" else "last_hidden_state"
        hidden = getattr(found, name, None)
        if hidden is None:
            raise ValueError(f"pooling={self.pooling!r} must find {name} in the encoder's output, got none")
        if self.pooling == "pooler":
            return hidden.flatten(1)
        if hidden.ndim != 3:
            raise ValueError(f"pooling={self.pooling!r} must find (b, t, f) in {name}, got {tuple(hidden.shape)}")
        if self.pooling == "first":
            return hidden[:, 0]
        if mask is None:
            return hidden.mean(dim=1)
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def embed(self, **inputs: Tensor) -> Tensor:
        """Return the vectors to store and to search with, (b, d + e), for the inputs of :meth:`features`."""
        return self.head.embed(self.features(**inputs))

    # No **kwargs: the Trainer would take them for a sign that the model scales its own loss.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CompatibleModelOutput:
        """Return logits, compatible part and embedding; ``labels`` are the loss's and are not looked at here."""
        found = self.head(self.features(input_ids, attention_mask, token_type_ids, pixel_values))
        return CompatibleModelOutput(found.logits, found.compatible, found.embedding)


class CompatibleTrainerLoss:
    """Loss for ``Trainer(compute_loss_func=...)``: the ``total`` of :class:`polyspan.align.OrthogonalCompatibleLoss`.

    The Trainer says how many items a whole step has, over its accumulated batches and, where it averages across
    devices, over those too; the sum over the batch is divided by that, so that an accumulated step is the step of one
    large batch. ``terms`` holds the last batch's means by name, as numbers.

    Parameters
    ----------
    loss : OrthogonalCompatibleLoss
        With ``reduction="mean"``. It follows the outputs to their device.
    """

    def __init__(self, loss: OrthogonalCompatibleLoss):
        if not isinstance(loss, OrthogonalCompatibleLoss) or loss.reduction != "mean":
            raise ValueError(f"loss must be an OrthogonalCompatibleLoss with reduction='mean', got {loss!r}")
        self.loss = loss
        self._terms: dict[str, Tensor] = {}

    @property
    def terms(self) -> dict[str, float]:
        """Means of the last batch by name: ce, bct, cos and total; empty before the first."""
        return {name: float(value) for name, value in self._terms.items()}

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss of a batch with labels (b,) in 0..C-1.

        Raises
        ------
        ValueError
            There are no labels, or they do not fit.
        """
        if labels is None:
            raise ValueError("labels must be given for compatible training, got None: name their column 'labels'")
        logits, compatible, embedding = (outputs[name] for name in ("logits", "compatible", "embedding"))
        terms = self.loss.to(logits.device)(CompatibleOutput(logits, compatible, embedding, embedding), labels)
        self._terms = {name: value.detach() for name, value in terms.items()}
        if num_items_in_batch is None:
            return terms["total"]
        return terms["total"] * (len(labels) / num_items_in_batch)


def keep_embedding(outputs: Any, labels: Any = None) -> Tensor:  # noqa: ARG001 - the Trainer passes both
    """Keep of a batch's outputs what :class:`CompatibilityMetrics` needs: for ``preprocess_logits_for_metrics``."""
    return outputs[-1]


class CompatibilityMetrics:
    """Metrics for ``Trainer(compute_metrics=...)``: new queries in the old gallery, against old queries there.

    At each evaluation the items of the evaluation set are queries and gallery, each searched without itself. Reports
    ``cross_*`` (new on old), ``old_*`` (old on old), ``gain_*`` (their difference), ``self_*`` (new on new), each with
    top-k and map in [0, 1], and ``compatible``, 1.0 where the criterion of backward compatibility holds.
    Source: catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    old_vectors : array of shape (n, d)
        The old encoder's vectors of the evaluation set, in its order.
    labels : array of shape (n,)
        Labels of those rows, with which the order is checked: leave ``Trainer`` to read the set as it is.
    ks : sequence of int, default=(1, 5)
    """

    def __init__(self, old_vectors: Any, labels: Any, *, ks: Sequence[int] = (1, 5)):
        self.old_vectors, self.labels, self.ks = np.asarray(old_vectors), np.asarray(labels), tuple(ks)
        if self.old_vectors.ndim != 2 or self.labels.shape != (len(self.old_vectors),):
            raise ValueError(
                "old_vectors and labels must have shapes (n, d) and (n,), got "
                f"{self.old_vectors.shape} and {self.labels.shape}"
            )

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Return metrics by name for the Trainer's predictions and label_ids.

        Raises
        ------
        ValueError
            The evaluation set is another one than that of the old vectors, or is read in another order, or the new
            vectors are narrower than the old ones.
        """
        rows = prediction.predictions
        new = np.asarray(rows[-1] if isinstance(rows, tuple | list) else rows)
        y, old = np.asarray(prediction.label_ids), self.old_vectors
        if len(new) != len(old):
            raise ValueError(f"old_vectors must have one row an item evaluated, got {len(old)} for {len(new)} items")
        if not np.array_equal(y, self.labels):
            raise ValueError(
                f"labels must be those of the evaluation set in its order, got {int((y != self.labels).sum())} others"
            )
        if new.ndim != 2 or new.shape[1] < old.shape[1]:
            raise ValueError(f"embedding must have at least the {old.shape[1]} numbers of old_vectors, got {new.shape}")
        cross = evaluate_compatibility(new, old, y, y, True, reference=old, ks=self.ks, widths="truncate")
        within = evaluate_compatibility(new, new, y, y, True, ks=self.ks).scores
        if cross.reference is None or cross.gain is None:
            raise AssertionError("a reference was given")
        found = {}
        for name, scores in (("cross", cross.scores), ("old", cross.reference), ("self", within)):
            found |= {f"{name}_top-{k}": float(value) for k, value in scores.cmc.items()}
            found[f"{name}_map"] = float(scores.map)
        found |= {f"gain_{name}": float(value) for name, value in cross.gain.items()}
        return found | {"compatible": float(bool(cross.compatible))}


class RetractionCallback(transformers.TrainerCallback):
    """Bring the head's transform back to orthogonality after each step of the optimiser.

    Only heads with ``orthogonal_map="retraction"`` need it; with others it does nothing.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Retract every head in the model."""
        for part in kwargs["model"].modules():
            if isinstance(part, OrthogonalCompatibleHead):
                part.retract_()
