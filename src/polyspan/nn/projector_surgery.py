"""Put low-rank orthogonal projections into a trained generator, and take them out again."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from polyspan.linalg import principal_angles

from ._model_surgery import replace_module
from ._reflection_frames import check_gain, compose, frame, leading, start_from
from .householder_projector import HouseholderProjector, LowRankOrthogonal

PATTERN = "*.affine|*.modulation"


class ProjectedLayer(NamedTuple):
    """A layer that was replaced: its name, the shape of its weight, and what the rank keeps of it.

    ``kept_share`` is the share of the squared singular values among the leading ones, ``spread`` the ratio of the first
    to the last of those, all of which become ``gain``; ``start`` (r, d) holds the leading right singular vectors.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    kept_share: float
    spread: float
    gain: float
    start: Tensor


class ProjectionReport:
    """What :func:`project_model` did to a model: ``layers``, how far they moved since, and the way back."""

    def __init__(self, model: nn.Module, layers: list[ProjectedLayer], originals: dict[str, tuple[nn.Module, Any]]):
        self.layers = tuple(layers)
        self._model, self._originals = model, originals

    def drift(self) -> dict[str, float]:
        """Return by layer the largest angle, in radians, between the space of its directions now and at the start.

        Raises
        ------
        ValueError
            The projections were taken out.
        """
        now = projections(self._model)
        free = [layer.name for layer in self.layers if layer.name not in now]
        if free:
            raise ValueError(f"report must be of a model that still is projected, but not {', '.join(free)} any more")
        return {
            layer.name: float(principal_angles(now[layer.name][0].detach().to(layer.start).mT, layer.start.mT).max())
            for layer in self.layers
        }

    def undo(self) -> None:
        """Put the layers back as they were before, with their weights of then, after :func:`merge_projections` as well.

        A second call does nothing.
        """
        for name, (old, weight) in self._originals.items():
            current = self._model.get_submodule(name)
            if weight is None:
                replace_module(self._model, current, old)
            else:
                if parametrize.is_parametrized(current, "weight"):
                    _set_free(current)
                current.weight = weight
        self._originals = {}


def project_model(
    model: nn.Module,
    pattern: str = PATTERN,
    rank: int = 10,
    *,
    gain: str | float | int = "mean",
    flatten: bool = False,
) -> ProjectionReport:
    r"""Make layers of a generator low-rank orthogonal, each from its own leading directions; change it in place.

    A ``torch.nn.Linear`` becomes a :class:`HouseholderProjector`; any other module that has a matrix ``weight`` gets
    :class:`LowRankOrthogonal` as a parametrisation, and keeps scales of its own. Where something is refused, nothing is
    changed. Fine-tune afterwards with the loss that the model was trained with: all parameters, about a hundredth of
    the steps. The optimiser must be made after this call.

    In StyleGAN2 the published choice is the first convolution of each resolution from 8 x 8 up, in StyleGAN3 every
    fourth synthesis layer: name them, as in ``"convs.0.conv.modulation|convs.2.conv.modulation"``.

    Parameters
    ----------
    model : torch.nn.Module
    pattern : str, default="*.affine|*.modulation"
        Names of modules, with ``*`` and ``?``; alternatives stand between bars.
    rank : int, default=10
    gain : {"mean", "learned"} or float, default="mean"
        See :class:`HouseholderProjector`.
    flatten : bool, default=False
        Take kernels of convolutions as matrices.

    Returns
    -------
    ProjectionReport

    Raises
    ------
    ValueError
        No module has such a name (candidates are listed), one has no matrix of floats for a weight or shares it with
        another layer, or is too small for the rank.
    """
    chosen = _matching(model, pattern)
    _refuse_shared(model, chosen)
    layers, made = [], {}
    for name, module in chosen.items():
        weight: Any = module.weight
        matrix = weight.detach().flatten(1) if flatten and weight.ndim > 2 else weight.detach()
        try:
            found = leading(matrix, rank)
            if type(module) is nn.Linear:
                made[name] = HouseholderProjector.from_linear(module, rank, gain)
                size = float(made[name].gain.detach())
            else:
                made[name] = LowRankOrthogonal(rank, gain=gain, flatten=flatten and weight.ndim > 2)
                size = float(found.values[:rank].mean()) if isinstance(gain, str) else float(gain)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        spread = float(found.values[0] / found.values[rank - 1])
        layers.append(ProjectedLayer(name, tuple(weight.shape), rank, found.kept_share, spread, size, found.into.mT))
    originals: dict[str, tuple[nn.Module, Any]] = {}
    for name, module in chosen.items():
        if isinstance(made[name], HouseholderProjector):
            originals[name] = (module, None)
            replace_module(model, module, made[name])
        else:
            originals[name] = (module, module.weight)
            parametrize.register_parametrization(module, "weight", made[name])
    return ProjectionReport(model, layers, originals)


def project_weights(
    state: Mapping[str, Tensor], pattern: str, rank: int = 10, *, gain: str | float | int = "mean"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make weights of a checkpoint low-rank orthogonal without its model; return the state and the directions (r, d).

    For networks whose code is not at hand, such as an official one that loads the state as it is: shapes and names stay
    the same. The projections are not constrained any more if it is trained further.

    Parameters
    ----------
    state : mapping of str to Tensor
        Left as it is.
    pattern : str
        Names of weights, as for :func:`project_model`, such as ``"*.affine.weight"``.
    rank, gain :
        As for :func:`project_model`; a learned gain is the mean.

    Raises
    ------
    ValueError
        As for :func:`project_model`.
    """
    check_gain(gain)
    names = [name for name in state if _fits(name, pattern)]
    if not names:
        raise ValueError(_none(pattern, [n for n, v in state.items() if isinstance(v, Tensor) and v.ndim == 2]))
    made, directions = dict(state), {}
    for name in names:
        weight = state[name]
        try:
            out, into, signs, size = start_from(weight, rank, gain)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        made[name] = compose(out, into, signs, size).to(weight.dtype)
        directions[name] = (frame(into) * signs[1]).mT.to(weight.dtype)
    return made, directions


def projections(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer the directions (r, d) and the gain of all low-rank orthogonal layers of a model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, HouseholderProjector):
            found[name] = (module.directions, module.gain)
        elif parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations["weight"]
            if isinstance(chain[0], LowRankOrthogonal):
                learned = getattr(chain, "original2", chain[0].fixed_gain)
                found[name] = (chain[0].directions(chain.original1), learned)
    return found


def merge_projections(model: nn.Module) -> nn.Module:
    """Turn all low-rank orthogonal layers into plain ones with the same weights, in place, and return the model."""
    for name in projections(model):
        module = model.get_submodule(name) if name else model
        if isinstance(module, HouseholderProjector):
            if not name:
                return module.to_linear()
            replace_module(model, module, module.to_linear())
        else:
            _set_free(module)
    return model


def _set_free(module: nn.Module) -> None:
    """Take the parametrisation of a weight off and keep its value."""
    kind = type(module)
    # Deep copies share the class that torch made for the parametrised module, and removal takes the weight out of it:
    # with a class of its own, the other copies keep theirs.
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _fits(name: str, pattern: str) -> bool:
    # A leading dot lets "*.affine" find a layer of that name at the top as well.
    return any(fnmatchcase(name, part) or fnmatchcase(f".{name}", part) for part in pattern.split("|"))


def _none(pattern: str, candidates: list[str]) -> str:
    shown = ", ".join(candidates[:12]) + (", ..." if len(candidates) > 12 else "")
    return f"pattern must fit the name of a layer, got {pattern!r}; candidates are {shown or 'none'}"


def _matching(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    named = {name: module for name, module in model.named_modules() if name}
    chosen = {name: module for name, module in named.items() if _fits(name, pattern)}
    if not chosen:
        raise ValueError(_none(pattern, [n for n, m in named.items() if _weight_of(m) is not None]))
    for name, module in chosen.items():
        if isinstance(module, HouseholderProjector) or parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"{name}: its weight must be free, but it is parametrised already")
        if _weight_of(module) is None:
            raise ValueError(f"{name}: must have a weight, got {type(module).__name__}, which has none")
    return chosen


def _weight_of(module: nn.Module) -> Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.ndim >= 2 else None


def _refuse_shared(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in chosen.items():
        others = [other for other in owners[id(module.weight)] if other != name]
        if others:
            raise ValueError(f"{name}: its weight must be its own, but {', '.join(others)} use it, too")
