"""Heads that scan their channels along routes of their own, all in one scan, and put the routes together again."""

import math
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ._autocast import without_autocast
from .scan_routes import PATTERNS, ScanRoute, scan_routes
from .selective_scan import BACKENDS, scan_time_major

MERGES = ("cv", "sum", "attention")
LEAST_MEAN = 1e-5
STEP_LEAST, STEP_MOST, STEP_FLOOR = 1e-3, 0.1, 1e-4
"""Range of the lengths of steps at first, drawn evenly in the logarithm."""


def route_disagreement(y: Tensor) -> Tensor:
    r"""Coefficient of variation over the first dimension, above its own minimum: how much K routes disagree.

    :math:`s / (m + 10^{-5})` with the standard deviation s (divisor K - 1) and :math:`m = \overline{y - \min y}`. It is
    0 where all are equal, and otherwise lies between √K / (K - 1), one route below the rest, and √K, one above it.
    """
    K = y.shape[0]
    variance = (y - y.mean(dim=0)).square().sum(dim=0) / (K - 1)
    # A root has no derivative at 0, where all routes agree; there the gate is 0 and passes none.
    spread = torch.where(variance > 0, variance.clamp(min=torch.finfo(y.dtype).tiny).sqrt(), 0.0)
    return spread / ((y - y.amin(dim=0)).mean(dim=0) + LEAST_MEAN)


def route_indices(routes: Sequence[ScanRoute], device: Any) -> tuple[Tensor, Tensor]:
    """Rows to gather for all heads at once, from images to sequences (heads K, L) and back (K, heads, L).

    An image is one row a head and cell, a sequence one row a step, head and route. Each route is followed, at odd
    places among the K, by itself backwards.
    """
    order = torch.stack([torch.from_numpy(route.order.copy()) for route in routes])
    inverse = torch.stack([torch.from_numpy(route.inverse.copy()) for route in routes])
    heads, _, L = order.shape
    there = torch.stack([order, order.flip(-1)], dim=2).flatten(1, 2)
    back = torch.stack([inverse, L - 1 - inverse], dim=2).flatten(1, 2)
    K = there.shape[1]
    group = torch.arange(heads * K, device="cpu").view(heads, K, 1)
    there = (there + L * torch.arange(heads, device="cpu").view(-1, 1, 1)).flatten(0, 1)
    back = (back * (heads * K) + group).transpose(0, 1).contiguous()
    return there.to(device), back.to(device)


@lru_cache(maxsize=64)
def _named_indices(h: int, w: int, patterns: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    return route_indices([scan_routes(h, w, pattern) for pattern in patterns], "cpu")


def _fresh_indices(h: int, w: int, patterns: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    there, back = _named_indices(h, w, tuple(patterns))
    return there.to(device, copy=True), back.to(device, copy=True)


def _index_shapes(h: int, w: int, patterns: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    return _own_shapes(h, w, 0, len(patterns), 2 * len(PATTERNS[patterns[0]](2, 2)), device)


# Operators, so that compiled and exported graphs hold one node in the place of NumPy's work on routes.
_library = torch.library.Library("polyspan", "FRAGMENT")
_library.define("scan_route_indices(SymInt h, SymInt w, str[] patterns, Device device) -> (Tensor, Tensor)")
_library.impl("scan_route_indices", _fresh_indices, "CompositeExplicitAutograd")
torch.library.register_fake("polyspan::scan_route_indices", _index_shapes, lib=_library)

_own: dict[int, tuple[Any, ...]] = {}
"""Patterns that are not all names, for compiled graphs. Keys are drawn: no two processes have the same."""


def _own_key(patterns: tuple[Any, ...]) -> int:
    """Return the key of the patterns; the same for equal arrays and for the same callables."""
    for key, known in _own.items():
        if len(known) == len(patterns) and all(
            np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a is b
            for a, b in zip(known, patterns, strict=True)
        ):
            return key
    key = secrets.randbits(62)
    _own[key] = patterns
    return key


def found_routes(patterns: Sequence[Any], num_routes: int, h: int, w: int) -> list[ScanRoute]:
    """Return the routes of every pattern on an h by w grid, and refuse any that has not half of ``num_routes``."""
    found = [scan_routes(h, w, pattern) for pattern in patterns]
    for i, route in enumerate(found):
        if 2 * len(route.order) != num_routes:
            raise ValueError(
                f"patterns[{i}] must give {num_routes // 2} routes on every grid, got {len(route.order)} on {h} by {w}"
            )
    return found


@lru_cache(maxsize=64)
def _called_indices(h: int, w: int, key: int, num_routes: int) -> tuple[Tensor, Tensor]:
    if key not in _own:
        raise ValueError("a graph whose patterns are callables or arrays runs only in the process that compiled it")
    return route_indices(found_routes(_own[key], num_routes, h, w), "cpu")


def _own_indices(h: int, w: int, key: int, heads: int, K: int, device: torch.device):  # noqa: ARG001
    there, back = _called_indices(h, w, key, K)
    return there.to(device, copy=True), back.to(device, copy=True)


def _own_shapes(h: int, w: int, key: int, heads: int, K: int, device: torch.device):  # noqa: ARG001
    how: dict[str, Any] = {"dtype": torch.int64, "device": device}
    return torch.empty(heads * K, h * w, **how), torch.empty(K, heads, h * w, **how)


_library.define(
    "scan_own_route_indices(SymInt h, SymInt w, int key, int heads, int K, Device device) -> (Tensor, Tensor)"
)
_library.impl("scan_own_route_indices", _own_indices, "CompositeExplicitAutograd")
torch.library.register_fake("polyspan::scan_own_route_indices", _own_shapes, lib=_library)


def to_routes(x: Float[Tensor, "heads L b d"], there: Int[Tensor, "groups L"]) -> Float[Tensor, "groups L b d"]:
    """Read every head's image along each of its routes."""
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]).index_select(0, there.flatten())
    return rows.view(*there.shape, *x.shape[2:])


def from_routes(y: Float[Tensor, "L groups b d"], back: Int[Tensor, "K heads L"]) -> Float[Tensor, "K heads L b d"]:
    """Put every sequence back in image order."""
    rows = y.reshape(y.shape[0] * y.shape[1], y.shape[2] * y.shape[3]).index_select(0, back.flatten())
    return rows.view(*back.shape, *y.shape[2:])


class RouteScan(nn.Module):
    """Scan ``num_heads`` groups of channels of (b, h, w, heads d), each along its routes and their reverses."""

    def __init__(
        self,
        head_channels: int,
        num_heads: int,
        patterns: Sequence[Any],
        d_state: int,
        dt_rank: str | int,
        merge: str,
        threshold: float | int,
        learn_threshold: bool,
        backend: str,
        *,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if isinstance(patterns, str):
            raise ValueError(f"patterns must be a sequence of patterns, got {patterns!r}")
        if not len(patterns):
            raise ValueError("patterns must hold at least one pattern, got none")
        if d_state < 1:
            raise ValueError(f"d_state must be at least 1, got {d_state}")
        rank = math.ceil(head_channels / 16) if dt_rank == "auto" else dt_rank
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"dt_rank must be 'auto' or at least 1, got {dt_rank!r}")
        if merge not in MERGES:
            raise ValueError(f"merge must be one of {MERGES}, got {merge!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.head_channels, self.num_heads, self.d_state, self.dt_rank = head_channels, num_heads, d_state, rank
        taken = [_taken(pattern) for pattern in patterns]
        self.patterns = tuple(taken[i % len(taken)] for i in range(num_heads))
        named = all(isinstance(pattern, str) for pattern in self.patterns)
        # An attribute, so that a compiled graph is used again only where the patterns are the same.
        self.own_key = None if named else _own_key(self.patterns)
        self.merge, self.backend = merge, backend
        counts = {_count(pattern) for pattern in self.patterns}
        if len(counts) > 1:
            raise ValueError(f"patterns must all have as many routes, got {sorted(counts)}")
        self.num_routes = K = 2 * counts.pop()
        if merge == "cv":
            _check_threshold(threshold, K, learn_threshold)
        elif learn_threshold:
            raise ValueError(f"learn_threshold must be False unless merge is 'cv', got merge {merge!r}")
        self.threshold, self.learn_threshold = float(threshold), learn_threshold
        groups = num_heads * K
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_weight = nn.Parameter(torch.empty(groups, rank + 2 * d_state, head_channels, **how))
        self.step_weight = nn.Parameter(torch.empty(groups, head_channels, rank, **how))
        self.step_bias = nn.Parameter(torch.empty(groups, head_channels, **how))
        self.log_rates = nn.Parameter(torch.empty(groups, head_channels, d_state, **how))
        self.bypass = nn.Parameter(torch.empty(groups, head_channels, **how))
        # As a logit it stays inside (0, √K) whatever the optimiser does.
        self.threshold_logit = nn.Parameter(torch.empty((), **how)) if learn_threshold else None
        self.query = nn.Parameter(torch.empty(num_heads, head_channels, **how)) if merge == "attention" else None
        self._indices: dict[Any, tuple[Tensor, Tensor]] = {}
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set rates -1 .. -N, steps of 0.001 to 0.1, a bypass of 1, and the query to 0: attention begins as a sum."""
        bound = 1 / math.sqrt(self.head_channels)
        self.input_weight.uniform_(-bound, bound, generator=generator)
        self.step_weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5, generator=generator)
        self.step_bias.uniform_(math.log(STEP_LEAST), math.log(STEP_MOST), generator=generator)
        step = self.step_bias.exp().clamp_(min=STEP_FLOOR)
        self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus gives the step back
        self.log_rates.copy_(torch.arange(1, self.d_state + 1, device=self.log_rates.device).log())
        self.bypass.fill_(1.0)
        if self.threshold_logit is not None:
            share = self.threshold / math.sqrt(self.num_routes)
            self.threshold_logit.fill_(math.log(share / (1 - share)))
        if self.query is not None:
            self.query.zero_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.own_key is not None:  # a copy from another process
            self.own_key = _own_key(self.patterns)

    def _gathers(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # tensors of a trace must not outlive it
            if self.own_key is None:
                return torch.ops.polyspan.scan_route_indices(h, w, list(self.patterns), device)
            return torch.ops.polyspan.scan_own_route_indices(
                h, w, self.own_key, self.num_heads, self.num_routes, device
            )
        key = (h, w, device)
        if key not in self._indices:
            with torch.inference_mode(False):  # or they could serve no training later
                self._indices[key] = route_indices(found_routes(self.patterns, self.num_routes, h, w), device)
        return self._indices[key]

    def current_threshold(self) -> Tensor | float:
        """Return the threshold of the gate, in [0, √K)."""
        if self.threshold_logit is None:
            return self.threshold
        return math.sqrt(self.num_routes) * torch.sigmoid(self.threshold_logit)

    def scanned(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "K heads L b d"]:
        """Return every route's own output, in image order: what is merged."""
        b, h, w, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        there, back = self._gathers(h, w, x.device)
        with without_autocast(x):
            image = x.to(wide).reshape(b, h * w, self.num_heads, self.head_channels).permute(2, 1, 0, 3)
            u = to_routes(image, there)
            groups, L = u.shape[:2]
            flat = u.flatten(1, 2)
            read = torch.bmm(flat, self.input_weight.to(wide).transpose(1, 2))
            low, B, C = read.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            raw = torch.baddbmm(self.step_bias.to(wide).unsqueeze(1), low, self.step_weight.to(wide).transpose(1, 2))
            u, delta, B, C = (
                part.view(groups, L, b, part.shape[-1]).transpose(0, 1).contiguous()
                for part in (flat, F.softplus(raw), B, C)
            )
            A = -self.log_rates.to(wide).exp()
            y, _ = scan_time_major(u, delta, A, B, C, backend=self.backend)
            return from_routes(torch.addcmul(y, self.bypass.to(wide).unsqueeze(1), u), back)

    def merged(self, y: Float[Tensor, "K heads L b d"]) -> Float[Tensor, "heads L b d"]:
        """Put the routes together."""
        if self.merge == "sum":
            return y.sum(dim=0)
        if self.query is not None:
            scores = torch.einsum("khlbd,hd->khlb", y, self.query.to(y.dtype)) / math.sqrt(self.head_channels)
            return self.num_routes * torch.einsum("khlb,khlbd->hlbd", scores.softmax(dim=0), y)
        return y.sum(dim=0) * F.relu(route_disagreement(y) - self.current_threshold())

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.merged(self.scanned(x)).permute(2, 1, 0, 3).reshape(x.shape).to(x.dtype)


def _taken(pattern: Any) -> Any:
    """A name or a callable as it is; an array of cells checked and copied, as (routes, cells) that nobody changes."""
    if isinstance(pattern, str) or callable(pattern):
        return pattern
    listed = isinstance(pattern, list | tuple)
    shape: tuple[int, ...] = np.shape(pattern) if listed else tuple(getattr(pattern, "shape", ()))
    if len(shape) not in (1, 2):
        raise ValueError(f"patterns must hold names, callables or arrays of cells, got {type(pattern).__name__}")
    order = scan_routes(1, max(shape[-1], 1), pattern).order
    order.flags.writeable = False
    return order


def _count(pattern: Any) -> int:
    """How many routes a pattern has; a callable is asked for those of a 2 by 2 grid."""
    return len(pattern) if isinstance(pattern, np.ndarray) else len(scan_routes(2, 2, pattern).order)


def _check_threshold(threshold: float | int, K: int, learnt: bool) -> None:
    most = math.sqrt(K)
    if not 0 <= threshold < most:
        raise ValueError(
            f"threshold must be at least 0 and below {most:.4g}, got {threshold}: {K} routes never disagree by more, "
            "and the output would always be 0"
        )
    if learnt and threshold == 0:
        raise ValueError("threshold must be above 0 to be learnt, got 0")
