"""Where the joints of a body are, from how each is turned: what networks for inverse kinematics are trained through."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from polyspan.linalg._namespace import namespace, widen

from ._rotation_maps import native


def forward_kinematics(rotations: Any, offsets: Any, parents: Sequence[int]) -> Float[Any, "*b j 3"]:
    r"""Return the positions of joints: :math:`p_i = p_{\pi(i)} + G_{\pi(i)}\,o_i` with :math:`G_i = G_{\pi(i)} R_i`.

    The root stands at its own offset, turned by nothing. A network that answers positions with rotations is trained on
    the distance between the positions that it was given and those that its rotations lead to; turns that move no joint,
    such as that of the last joint of a chain, stay free. Differentiable any number of times. Not checked for being
    rotations: whatever matrices there are act as linear maps.

    Parameters
    ----------
    rotations : array of shape (*b, j, 3, 3)
        Of each joint against its parent; the root's against the world.
    offsets : array of shape (j, 3), or (*b, j, 3) where bodies differ
        From its parent to each joint, in the frame of the parent.
    parents : sequence of int
        By joint, which one it hangs from: an earlier one, and -1 for the first, the root.

    Returns
    -------
    array of shape (*b, j, 3)
        In the kind and dtype of the rotations; float16 and bfloat16 are computed in float32.

    Raises
    ------
    ValueError
        Shapes do not fit together, or a joint hangs from none before it.

    Notes
    -----
    Source: catalogue entry ``rotation-continuity``.
    """
    xp = namespace(rotations, offsets)
    rotations, offsets = native(rotations), native(offsets)
    j = len(parents)
    if not j or rotations.shape[-3:] != (j, 3, 3) or offsets.shape[-2:] != (j, 3):
        raise ValueError(
            f"rotations must be (*b, {j}, 3, 3) and offsets (*b, {j}, 3) for {j} parents, at least 1, got shapes "
            f"{tuple(rotations.shape)} and {tuple(offsets.shape)}"
        )
    wrong = [i for i, parent in enumerate(parents) if not (parent == -1 if i == 0 else 0 <= parent < i)]
    if wrong:
        raise ValueError(
            f"parents must be -1 for joint 0 and an earlier joint for each other, got {parents[wrong[0]]} for joint "
            f"{wrong[0]}"
        )
    (turns, narrow), (bones, _) = widen(rotations), widen(offsets)
    wide = xp.result_type(turns, bones)
    turns, bones = xp.astype(turns, wide), xp.astype(bones, wide)[..., None]
    frames, places = [turns[..., 0, :, :]], [bones[..., 0, :, :]]
    for i, parent in list(enumerate(parents))[1:]:
        places.append(places[parent] + frames[parent] @ bones[..., i, :, :])
        frames.append(frames[parent] @ turns[..., i, :, :])
    places = xp.broadcast_arrays(*places)
    return narrow(xp.stack([place[..., 0] for place in places], axis=-2))
