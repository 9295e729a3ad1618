"""How the changes of several fine-tunings lie to one another, and how much of each a merge carries."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._merge_states import as_state, as_states, is_statistic, mergeable, row_blocks, rows_of, shape_of


class MergeGeometry(NamedTuple):
    r"""Angles between changes :math:`\tau_i = \theta_i - \theta_0`, and what is left of each in a merge.

    Attributes
    ----------
    tasks : list of T str
    names : list of m str
        Tensors that changes are compared in.
    lengths : ndarray of shape (T, m)
        :math:`\lVert\tau_i\rVert`, a tensor each.
    cosines : ndarray of shape (T, T)
        Between changes over all tensors: near 0 where tasks changed other weights, below 0 where they conflict. NaN
        for a task that changed nothing.
    carried : ndarray of shape (T, m)
        :math:`\langle\tau,\tau_i\rangle / \lVert\tau_i\rVert^2` for the merged change :math:`\tau`: 1 where the merge
        holds the task's change whole, 0 where nothing of it. NaN where a task changed nothing.
    """

    tasks: list[str]
    names: list[str]
    lengths: np.ndarray
    cosines: np.ndarray
    carried: np.ndarray


def merge_geometry(base: Any, finetuned: Any, merged: Any, *, ignore_keys: Sequence[str] = ()) -> MergeGeometry:
    """Measure a merge against the checkpoints that it is made of, in blocks of rows and sums in float64.

    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base, finetuned, ignore_keys
        As in :func:`task_arithmetic`.
    merged : module, mapping of str to Tensor, or path
        What they were merged into.

    Raises
    ------
    ValueError
        Names or shapes differ, or there is no tensor to compare.
    """
    start = as_state(base, name="base")
    states = as_states(finetuned, start)
    end = as_states({"merged": merged}, start)
    names = [name for name in mergeable(start, {**states, **end}, ignore_keys) if not is_statistic(name)]
    if not names:
        raise ValueError("base must have floating-point weights to compare, got none")
    found = np.stack([_products(name, start, [*states.values(), end["merged"]]) for name in names])
    own = np.diagonal(found, axis1=1, axis2=2)[:, :-1].T
    total = found[:, :-1, :-1].sum(axis=0)
    norms = np.sqrt(np.diagonal(total))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = total / np.outer(norms, norms)
        carried = found[:, -1, :-1].T / own
    return MergeGeometry(list(states), names, np.sqrt(own), cosines, np.where(own > 0, carried, np.nan))


def _products(name: str, base: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Inner products of all changes of one tensor."""
    total = np.zeros((len(states), len(states)))
    for span in row_blocks(shape_of(base, name)):
        start = rows_of(base, name, *span).double().cpu()
        rows = [(rows_of(state, name, *span).double().cpu() - start).flatten().numpy() for state in states]
        total += [[a @ b for b in rows] for a in rows]
    return total
