"""Put the units of one trained network in the order of another's, without changing what the network computes."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .unit_matching import UnitMatching


class UnitAxis(NamedTuple):
    """An axis of a tensor that runs over units: ``block`` neighbouring entries a unit, unit 0 first.

    ``block`` is 1 but where one unit fills several entries, such as the h w positions of a channel once flattened.
    """

    tensor: str
    axis: int
    block: int = 1


def permute_network(
    state: Mapping[str, Any], spec: Mapping[str, Sequence[Any]], matching: Mapping[str, Any] | Any
) -> dict[str, Any]:
    r"""Reorder units of a network by a matching, everywhere they appear, so that it computes the same function.

    Unit i of the result is unit ``matching.indices[i]`` of ``state``: with ``match_units`` on the correlations of
    networks A and B, B's state comes back in the order of A, ready to be averaged with A's. Values are moved, never
    computed with: the inverse permutation, ``numpy.argsort(indices)``, gives back every bit. Outputs are the same but
    for the order in which sums over units are rounded. Signs are not turned: where units were matched by magnitude
    (``absolute=True``), a unit may still be the negative of its partner.
    Source: catalogue entry ``convergent-learning``.

    Parameters
    ----------
    state : mapping of str to tensor or array
        A torch state dict, or NumPy arrays by name.
    spec : mapping of str to sequence of UnitAxis
        By layer of units, all axes that run over its units: the outgoing axis of the layer's weight and its bias, what
        batch norm keeps of it, and the incoming axis of the next weight; see :func:`sequential_unit_spec`. An axis left
        out makes another function of the network. Tuples (tensor, axis) and (tensor, axis, block) do as well.
    matching : mapping of str to (UnitMatching or int array), or one of these
        By layer of units; those it does not name stay as they are. One alone where the spec has one layer.

    Returns
    -------
    dict
        A dict of the kind of ``state``. Tensors without units that move are those of ``state`` themselves.

    Raises
    ------
    ValueError
        A matching leaves a unit without partner or gives two the same (see :func:`complete_matching`), an axis has
        another number of units, a tensor is missing, an axis stands twice in the spec, or two names of one tensor
        (tied weights) would be permuted differently.
    """
    groups = {str(name): [_unit_axis(name, entry) for entry in entries] for name, entries in spec.items()}
    _check_axes(state, groups)
    orders = _orders(matching, groups)
    moves: dict[str, list[tuple[int, int, str]]] = {}
    for name, axes in groups.items():
        for entry in axes:
            length = tuple(state[entry.tensor].shape)[entry.axis]
            if name in orders and length != len(orders[name]) * entry.block:
                raise ValueError(
                    f"matching of {name!r} must have one index a unit, got {len(orders[name])} for axis {entry.axis} "
                    f"of {entry.tensor!r} with {length} entries in blocks of {entry.block}"
                )
            moves.setdefault(entry.tensor, []).append((entry.axis, entry.block, name))
    _check_ties(state, moves)
    permuted = copy.copy(state) if isinstance(state, dict) else dict(state)
    done: dict[int, Any] = {}
    for tensor, all_steps in moves.items():
        steps = [step for step in all_steps if step[2] in orders]
        if not steps:
            continue
        mark = _address(state[tensor])
        if mark is None or mark not in done:
            value = state[tensor]
            for axis, block, name in steps:
                value = _take(value, axis, _spread(orders[name], block))
            if mark is None:
                permuted[tensor] = value
                continue
            done[mark] = value
        permuted[tensor] = done[mark]
    return permuted


def complete_matching(matching: Any) -> np.ndarray:
    """Return indices (d,) in which units without partner get the units that nobody took, in order: a permutation.

    Dead units have no partner in a matching, and which of them meets which changes little.

    Raises
    ------
    ValueError
        Two units have the same partner, or a partner lies outside 0..d-1 because the networks differ in width.
    """
    found = _indices(matching, "matching").copy()
    taken = found[found >= 0]
    if (found < -1).any() or (taken >= len(found)).any():
        raise ValueError(f"matching must hold -1 or indices in 0..{len(found) - 1}, got {found.min()} to {found.max()}")
    if len(np.unique(taken)) < len(taken):
        raise ValueError("matching must be one to one, got a unit that is the partner of two (method='semi' does that)")
    found[found < 0] = np.setdiff1d(np.arange(len(found)), taken)
    return found


def _unit_axis(group: Any, entry: Any) -> UnitAxis:
    try:
        found = UnitAxis(*entry)
    except TypeError:
        raise ValueError(
            f"spec must hold (tensor, axis) or (tensor, axis, block), got {entry!r} in {group!r}"
        ) from None
    if not isinstance(found.tensor, str) or found.block < 1:
        raise ValueError(f"spec must hold a tensor's name, an axis and a block of at least 1, got {entry!r}")
    return found


def _check_axes(state: Mapping[str, Any], groups: dict[str, list[UnitAxis]]) -> None:
    """Raise where an axis does not exist, or two entries speak of one; make all axes count from the front."""
    seen: dict[tuple[str, int], str] = {}
    for name, axes in groups.items():
        units: int | None = None
        for i, given in enumerate(axes):
            if given.tensor not in state:
                raise ValueError(f"spec names tensor {given.tensor!r} in {name!r}, which state does not hold")
            shape = tuple(state[given.tensor].shape)
            if not -len(shape) <= given.axis < len(shape):
                raise ValueError(f"axis of {given.tensor!r} in {name!r} must fit its shape {shape}, got {given.axis}")
            entry = axes[i] = given._replace(axis=given.axis % len(shape))
            other = seen.setdefault((entry.tensor, entry.axis), name)
            if other != name or entry in axes[:i]:
                raise ValueError(
                    f"spec must name axis {entry.axis} of {entry.tensor!r} once, got {other!r} and {name!r}"
                )
            count, rest = divmod(shape[entry.axis], entry.block)
            units = count if units is None else units
            if rest or count != units:
                raise ValueError(
                    f"axes of {name!r} must all have {units} units, got {shape[entry.axis]} entries in blocks of "
                    f"{entry.block} in axis {entry.axis} of {entry.tensor!r}"
                )


def _orders(matching: Any, groups: dict[str, list[UnitAxis]]) -> dict[str, np.ndarray]:
    """Return the permutation of every layer of units that is to be moved."""
    if not isinstance(matching, Mapping):
        if len(groups) != 1:
            raise ValueError(f"matching must be given by layer where spec has {len(groups)}: {list(groups)}, got one")
        matching = {next(iter(groups)): matching}
    unknown = [name for name in matching if name not in groups]
    if unknown:
        raise ValueError(f"matching must name layers of spec, {list(groups)}, got {unknown}")
    orders = {}
    for name, given in matching.items():
        found = _indices(given, f"matching of {name!r}")
        alone = int((found < 0).sum())
        if alone:
            raise ValueError(
                f"matching of {name!r} must give every unit a partner, got {alone} of {len(found)} without: "
                "complete_matching pairs what is left"
            )
        if not np.array_equal(np.sort(found), np.arange(len(found))):
            raise ValueError(
                f"matching of {name!r} must be a permutation of 0..{len(found) - 1}, got "
                f"{len(np.unique(found))} different partners from {found.min()} to {found.max()}"
            )
        orders[name] = found
    return orders


def _indices(given: Any, what: str) -> np.ndarray:
    found = np.asarray(given.indices if isinstance(given, UnitMatching) else given)
    if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        raise ValueError(f"{what} must be a UnitMatching or int array (d,), got {found.dtype} of shape {found.shape}")
    return found.astype(np.int64)


def _check_ties(state: Mapping[str, Any], moves: dict[str, list[tuple[int, int, str]]]) -> None:
    """Raise where names of one memory are to be permuted differently."""
    first: dict[int, str] = {}
    for name, value in state.items():
        mark = _address(value)
        other = name if mark is None else first.setdefault(mark, name)
        mine, its = (sorted(moves.get(n, [])) for n in (name, other))
        if mine != its or (mine and tuple(value.shape) != tuple(state[other].shape)):
            raise ValueError(
                f"tied tensors {other!r} and {name!r} must have the same axes in the same layers of spec, got "
                f"{[(axis, group) for axis, _, group in its]} and {[(axis, group) for axis, _, group in mine]}"
            )


def _address(value: Any) -> int | None:
    """Return where a tensor's memory begins, None where it has none or it cannot be told."""
    if isinstance(value, np.ndarray):
        return value.__array_interface__["data"][0] if value.size else None
    if hasattr(value, "data_ptr") and value.numel() and value.device.type != "meta":
        return value.data_ptr()
    return None


def _spread(order: np.ndarray, block: int) -> np.ndarray:
    return (order[:, None] * block + np.arange(block)).ravel()


def _take(value: Any, axis: int, order: np.ndarray) -> Any:
    if isinstance(value, np.ndarray):
        return np.take(value, order, axis=axis)
    import torch

    return value.detach().index_select(axis, torch.as_tensor(order, device=value.device))


def sequential_unit_spec(model: Any, *, prefix: str = "") -> dict[str, list[UnitAxis]]:
    """Say which axes run over the units of each hidden layer of an ``nn.Sequential``, for :func:`permute_network`.

    Knows linear and convolution layers (transposed and depthwise ones too), batch and instance norm, layer norm over
    the features of rows, PReLU, flattening, and the pooling, dropout and pointwise activations of torch. Layers are
    named as their weights are; the units of the last layer are outputs, which have an order of their own, and are left
    out, as are the inputs.

    Parameters
    ----------
    model : torch.nn.Sequential
        May hold others.
    prefix : str
        Put before the tensors' names, such as "encoder." where the model is a part of the one whose state is permuted.

    Raises
    ------
    ValueError
        The model is no ``nn.Sequential``, holds a layer that is not known, or widths do not fit each other.
    """
    from torch import nn

    if not isinstance(model, nn.Sequential):
        raise ValueError(f"model must be an nn.Sequential, got {type(model).__name__}")
    walk = _Walk()
    for name, layer in _layers(model, prefix):
        walk.pass_through(name, layer)
    walk.spec.pop(walk.group, None)
    return walk.spec


def _layers(model: Any, prefix: str) -> list[tuple[str, Any]]:
    from torch import nn

    found = []
    for name, layer in model._modules.items():
        inner = isinstance(layer, nn.Sequential)
        found += _layers(layer, f"{prefix}{name}.") if inner else [(prefix + name, layer)]
    return found


class _Walk:
    """Where a walk through the layers stands: the layer of units whose numbers flow, and how they lie."""

    def __init__(self) -> None:
        self.spec: dict[str, list[UnitAxis]] = {}
        self.group, self.units, self.block = "", 0, 1
        self.image = self.flattened = False

    def pass_through(self, name: str, layer: Any) -> None:
        from torch import nn
        from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, pooling

        pointwise = (dropout._DropoutNd, nn.Identity, *_pointwise(activation))
        if isinstance(layer, nn.Linear):
            if self.image:
                raise ValueError(f"model must flatten images before linear layer {name!r}, got none in between")
            self._reads(name, 1, layer.in_features)
            self._opens(name, layer, 0, layer.out_features, image=False)
        elif isinstance(layer, conv._ConvNd):
            self._convolves(name, layer)
        elif isinstance(layer, batchnorm._NormBase | instancenorm._InstanceNorm):
            self._scales(name, layer, layer.num_features)
        elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1 and not self.image:
            self._scales(name, layer, layer.normalized_shape[0])
        elif isinstance(layer, nn.PReLU):
            if layer.num_parameters > 1:
                self._scales(name, layer, layer.num_parameters)
        elif isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            self.image, self.flattened = False, self.flattened or self.image
        elif not isinstance(layer, pointwise) and not (self.image and type(layer).__module__ == pooling.__name__):
            raise ValueError(f"model must hold layers whose units are known, got {layer} as {name!r}")

    def _convolves(self, name: str, layer: Any) -> None:
        if self.group and not self.image:
            raise ValueError(f"model must not go from rows back to images, got convolution {name!r} after them")
        if layer.groups > 1:
            if not layer.groups == layer.in_channels == layer.out_channels:
                raise ValueError(f"convolution {name!r} must have groups=1 or be depthwise, got {layer}")
            self._scales(name, layer, layer.out_channels)
            return
        self._reads(name, 0 if layer.transposed else 1, layer.in_channels)
        self._opens(name, layer, 1 if layer.transposed else 0, layer.out_channels, image=True)

    def _fit(self, name: str, width: int) -> None:
        """Take the block from the width where flattening has just hidden it."""
        if self.flattened and self.units and width % self.units == 0:
            self.block, self.flattened = width // self.units, False
        if width != self.units * self.block:
            raise ValueError(
                f"layer {name!r} must take {self.units * self.block} entries of {self.group!r}, got {width}"
            )

    def _reads(self, name: str, axis: int, width: int) -> None:
        if self.group:
            self._fit(name, width)
            self.spec[self.group].append(UnitAxis(f"{name}.weight", axis, self.block))

    def _opens(self, name: str, layer: Any, axis: int, units: int, *, image: bool) -> None:
        self.group, self.units, self.block, self.image, self.flattened = name, units, 1, image, False
        self.spec[name] = [UnitAxis(f"{name}.weight", axis)]
        if layer.bias is not None:
            self.spec[name].append(UnitAxis(f"{name}.bias", 0))

    def _scales(self, name: str, layer: Any, width: int) -> None:
        """Add what a layer keeps of each unit, one number or filter a unit."""
        if self.group:
            self._fit(name, width)
            for part in ("weight", "bias", "running_mean", "running_var"):
                if getattr(layer, part, None) is not None:
                    self.spec[self.group].append(UnitAxis(f"{name}.{part}", 0, self.block))


def _pointwise(activation: Any) -> tuple[type, ...]:
    names = (
        "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Softplus Softsign Hardtanh Hardswish LogSigmoid"
    )
    return tuple(getattr(activation, name) for name in names.split())
