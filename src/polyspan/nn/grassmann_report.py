"""Look inside language models of planes: what a prediction depends on, and how planes turn from token to token."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from .grassmann_lm import GrassmannLM, as_ids
from .plucker import plane_angles


class LayerAngles(NamedTuple):
    """Of one layer: its offsets, and for each the angles in radians (o, n) that the planes of its tokens turn by."""

    offsets: tuple[int, ...]
    angles: Tensor


def token_influence(model: GrassmannLM, ids: Integer[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Return how much the last prediction depends on each token: the gradient's length at its embedding.

    The gradient is that of the likeliest next token's log-probability. It is zero exactly beyond
    ``model.receptive_field`` tokens before the last one.

    Parameters
    ----------
    model : GrassmannLM
    ids : Tensor of shape (b, t)
    """
    kept: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> Tensor:  # noqa: ARG001 - torch's own signature
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle, was_training = model.embedding.register_forward_hook(keep), model.training
    model.eval()
    try:
        with torch.enable_grad():
            likeliest = model(ids)[:, -1].log_softmax(dim=-1).amax(dim=-1).sum()
            (gradient,) = torch.autograd.grad(likeliest, kept[0])
    finally:
        handle.remove()
        model.train(was_training)
    return torch.linalg.vector_norm(gradient, dim=-1)


@torch.no_grad()
def layer_plane_angles(model: GrassmannLM, ids: Integer[Tensor, "b t"]) -> list[LayerAngles]:
    """Return, layer by layer, how far the plane of a token and its partner turns on the way to the next token.

    For each offset the larger principal angle between the plane of tokens t and t - offset, and that of t + 1 and
    t + 1 - offset, of all tokens that have both. Planes of several heads are taken as those of their tokens' whole
    reduced vectors.

    Parameters
    ----------
    model : GrassmannLM
    ids : Tensor of shape (b, t)
        Longer than the largest offset and one more.

    Raises
    ------
    ValueError
        The texts are too short.
    """
    ids = as_ids(ids)
    blocks: Any = model.blocks
    mixings = [block.mixing for block in blocks]
    reach = max(mixing.reach for mixing in mixings)
    if ids.shape[1] < reach + 2:
        raise ValueError(f"ids must hold at least {reach + 2} tokens a text, got {ids.shape[1]}")
    kept: list[Tensor] = []
    handles = [
        mixing.reduction.register_forward_hook(lambda module, inputs, output: kept.append(output)) for mixing in mixings
    ]
    was_training = model.training
    model.eval()
    try:
        model(ids)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    told = []
    for mixing, reduced in zip(mixings, kept, strict=True):
        z = reduced.to(torch.promote_types(reduced.dtype, torch.float32))
        now, following = z[:, reach:-1], z[:, reach + 1 :]
        angles = [
            plane_angles(now, z[:, reach - o : -1 - o], following, z[:, reach + 1 - o : z.shape[1] - o])[..., 1]
            for o in mixing.offsets
        ]
        told.append(LayerAngles(mixing.offsets, torch.stack(angles).flatten(1)))
    return told
