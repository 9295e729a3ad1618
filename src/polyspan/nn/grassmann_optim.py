"""Optimisers for parameters that are subspaces: exact geodesic steps, with SGD or Adam for all other parameters."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from polyspan.linalg.grassmann import cos_sinc

# Most that a basis may be off orthonormality to be one.
DRIFT = 1e-3
# A run of bases of this many numbers, with its gradients and momenta, was fastest on a CPU core.
BLOCK_FLOATS = 2**17


class GrassmannParameter(nn.Parameter):
    """Mark a parameter (*b, k, d) as bases of k-dimensional subspaces of R^d: orthonormal rows, k < d.

    :class:`RiemannianSGD` and :class:`RiemannianAdam` know it by its class, which a deep copy, pickling to another
    process and moving to another device keep. A row of zeros is padding and stays zero.
    """

    def __new__(cls, data: Any = None, requires_grad: bool = True):
        """Wrap a tensor as ``nn.Parameter`` does."""
        return super().__new__(cls, torch.empty(0) if data is None else data, requires_grad)

    def __reduce_ex__(self, proto: Any) -> tuple:
        return type(self), (self.data, self.requires_grad)


class _Riemannian(Optimizer):
    """What both optimisers share: which parameters are subspaces, and the geodesic step."""

    def __init__(self, params: Any, defaults: dict[str, Any]):
        for name in ("lr", "weight_decay", "lr_factor", "reorthonormalise_every"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name} must be at least 0, got {defaults[name]}")
        super().__init__(params, defaults)
        # The common default is meant for the other parameters; it is an error only where there are none.
        if defaults["weight_decay"] and all(group["manifold"] == "grassmann" for group in self.param_groups):
            raise ValueError(_no_decay(defaults["weight_decay"]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``manifold="grassmann"`` in it says that plain parameters (*b, k, d) are subspaces too."""
        own_decay = param_group.get("weight_decay")
        manifold = param_group.get("manifold")
        if manifold not in (None, "grassmann", "mixed", "euclidean"):
            raise ValueError(f"manifold must be 'grassmann', 'euclidean' or not given, got {manifold!r}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        curved = [manifold == "grassmann" or isinstance(p, GrassmannParameter) for p in group["params"]]
        if manifold == "euclidean" and any(curved):
            raise ValueError("manifold must not be 'euclidean' for a group that holds a GrassmannParameter")
        kind = "grassmann" if all(curved) else "mixed" if any(curved) else "euclidean"
        group["manifold"] = kind
        for p, is_curved in zip(group["params"], curved, strict=True):
            if is_curved:
                _check_parameter(p)
        if kind == "grassmann" and own_decay is None:
            group["weight_decay"] = 0.0
        if kind != "euclidean" and group["weight_decay"]:
            self.param_groups.pop()
            raise ValueError(_no_decay(group["weight_decay"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` evaluates the loss again, as for torch's optimisers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            curved, flat = self._split(group)
            for p in curved:
                self._step_subspaces(p, group)
            if flat:
                self._step_others(flat, group)
        return loss

    @abstractmethod
    def _step_subspaces(self, p: Tensor, group: dict[str, Any]) -> None:
        """Move one parameter of subspaces along its geodesic."""

    @abstractmethod
    def _step_others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step the others as torch's own optimiser does."""

    def _split(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of the group that have a gradient: subspaces, and others."""
        curved, flat = [], []
        for p in group["params"]:
            if p.grad is None:
                continue
            is_curved = group["manifold"] == "grassmann" or isinstance(p, GrassmannParameter)
            if is_curved and p.grad.is_sparse:
                raise ValueError("gradients of a Grassmann parameter must be dense, got a sparse one")
            (curved if is_curved else flat).append(p)
        return curved, flat

    def _finish(self, W: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        every = group["reorthonormalise_every"]
        if every and state["step"] % every == 0:
            reorthonormalise_(W)


class RiemannianSGD(_Riemannian):
    r"""Gradient descent with momentum that keeps every :class:`GrassmannParameter` a subspace, by exact geodesics.

    A basis S (here the transpose of the parameter's rows) with Euclidean gradient E and momentum M takes

    .. math:: M \leftarrow \mu M + E,\quad M \leftarrow M - S S^\top M,\quad
              S \leftarrow S\cos(\eta\sqrt A) - M\,\frac{\sin\eta\sqrt A}{\sqrt A},\quad A = M^\top M,

    with :math:`\eta` = ``lr * lr_factor``: the projection is the vector transport of the old momentum to the new point
    as well. All classes move in one batch, no tall matrix is decomposed, and on an accelerator a step never waits for
    the device; a step longer than 200 radians is shortened there to that. Other parameters get torch's own SGD.

    Schedulers, closures, per-group options and ``state_dict`` work as for torch's optimisers; a run that is resumed
    from ``state_dict`` goes on bit by bit as if it had not been interrupted.
    Source: catalogue entry ``grassmann-class``.

    Parameters
    ----------
    params : iterable
        Parameters or groups. ``{"params": [...], "manifold": "grassmann"}`` names plain tensors (*b, k, d) as bases.
    lr : float
    momentum, dampening : float
        In [0, 1]; as in ``torch.optim.SGD``.
    nesterov : bool
    weight_decay : float
        For other parameters only: shrinking has no meaning for a subspace.
    lr_factor : float
        The learning rate of subspaces over that of the group, so that one scheduler drives both.
    reorthonormalise_every : int
        Steps between corrections of rounding errors, by a QR without sign flips; 0 for never.
    transport : bool
        False keeps the momentum as it is, in the surrounding space, and projects it only for use: the published
        procedure. It is an approximation that lets the momentum's normal part pile up.
    maximize : bool

    Raises
    ------
    ValueError
        An option is out of range, a group with subspaces has weight decay, rows are not orthonormal to within 1e-3 to
        begin with, or a gradient is not finite (told where that needs no wait, on the CPU; the parameter and its
        momentum are then unchanged).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        *,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        lr_factor: float = 1.0,
        reorthonormalise_every: int = 5,
        transport: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum above 0 and dampening 0, got {momentum} and {dampening}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "lr_factor": lr_factor,
            "reorthonormalise_every": reorthonormalise_every,
            "transport": transport,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _step_subspaces(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state, mu = self.state[p], group["momentum"]
        W, E = _stack(p), _stack(p.grad)
        _refuse_unless_finite(E)
        fresh = mu and "momentum_buffer" not in state
        if fresh:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        M = _stack(state["momentum_buffer"]) if mu else None
        X = M if M is not None and not group["nesterov"] else torch.empty_like(W)
        grams, projected = W.new_empty(2, len(W), W.shape[1], W.shape[1])
        for rows in _blocks(W):
            w, e, x = W[rows], -E[rows] if group["maximize"] else E[rows], X[rows]
            if M is None:
                x.copy_(e)
            else:
                pushed = e if fresh or not group["dampening"] else e * (1 - group["dampening"])
                torch.add(pushed, M[rows], alpha=mu, out=M[rows])
                if group["nesterov"]:
                    torch.add(e, M[rows], alpha=mu, out=x)
            torch.bmm(x, w.mT, out=projected[rows])
            if group["transport"]:
                x.baddbmm_(projected[rows], w, alpha=-1)
                if M is not None and M is not X:
                    M[rows].baddbmm_(M[rows] @ w.mT, w, alpha=-1)
            torch.bmm(x, x.mT, out=grams[rows])
        if not group["transport"]:
            # G = X - P W is never formed: its Gram matrix is that of X less that of P, as W has orthonormal rows.
            grams.baddbmm_(projected, projected.mT, alpha=-1)
        cos, sinc = _cos_sinc(grams, group["lr"] * group["lr_factor"])
        if not group["transport"]:
            cos = cos + sinc @ projected
        for rows in _blocks(W):
            W[rows] = (cos[rows] @ W[rows]).baddbmm_(sinc[rows], X[rows], alpha=-1)
        self._finish(W, state, group)

    def _step_others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        buffers = [state.get("momentum_buffer") for state in states]
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(g.is_sparse for g in grads),
            foreach=group["foreach"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"]:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer


class RiemannianAdam(_Riemannian):
    r"""Adam in which every :class:`GrassmannParameter` moves along geodesics; other parameters get torch's own AdamW.

    The first moment is a tangent, carried along by projection; the second is one number a subspace, the running mean of
    the squared length of its gradient, so that the angle moved in a step is at most about ``lr * lr_factor`` radians.
    Source: Becigneul and Ganea 2019.

    Parameters
    ----------
    params : iterable
        As for :class:`RiemannianSGD`.
    lr : float
    betas : tuple of float
        Decay of the two moments, in [0, 1).
    eps : float
    weight_decay : float
        Decoupled, for other parameters only.
    lr_factor, reorthonormalise_every :
        As for :class:`RiemannianSGD`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_factor: float = 1.0,
        reorthonormalise_every: int = 5,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lr_factor": lr_factor,
            "reorthonormalise_every": reorthonormalise_every,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _step_subspaces(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        W, E = _stack(p), _stack(p.grad)
        _refuse_unless_finite(E)
        E = -E if group["maximize"] else E
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = p.new_zeros((*p.shape[:-2], 1, 1))
        M, v = _stack(state["exp_avg"]), _stack(state["exp_avg_sq"])
        first, second = group["betas"]
        step = state.get("step", 0) + 1
        H = E.baddbmm(E @ W.mT, W, alpha=-1)
        v.mul_(second).add_((H * H).sum((-2, -1), keepdim=True), alpha=1 - second)
        M.lerp_(H, 1 - first)
        M.baddbmm_(M @ W.mT, W, alpha=-1)
        length = (v / (1 - second**step)).sqrt_().add_(group["eps"]) * (1 - first**step)
        direction = M / length
        cos, sinc = _cos_sinc(direction @ direction.mT, group["lr"] * group["lr_factor"])
        W.copy_((cos @ W).baddbmm_(sinc, direction, alpha=-1))
        self._finish(W, state, group)

    def _step_others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
        states = [self.state[p] for p in params]
        first, second = group["betas"]
        adam(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def grassmann_groups(module: nn.Module, *, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
    """Return two optimiser groups: the module's subspaces with ``options``, and all others with ``weight_decay``.

    For recipes with weight decay, which subspaces must not have: ``RiemannianSGD(grassmann_groups(model,
    weight_decay=1e-4, lr_factor=0.5))``. A group that would be empty is left out.
    """
    named = list(module.parameters())
    curved = [p for p in named if isinstance(p, GrassmannParameter)]
    others = [p for p in named if not isinstance(p, GrassmannParameter)]
    groups = [{"params": curved, **options}, {"params": others, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def reorthonormalise_(W: Tensor) -> Tensor:
    """Remove rounding errors from orthonormal rows (*b, k, d) in place; rows of zeros stay zero.

    Gram-Schmidt in the order of the rows, by the Cholesky factor of W W': the QR factor with positive diagonal, so that
    no row flips and momenta stay valid. Nothing waits for the device. For rows that are nearly orthonormal already.
    """
    gram = (W @ W.mT).double()
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    diagonal.add_((diagonal == 0).to(gram.dtype))
    factor = torch.linalg.cholesky_ex(gram)[0]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return W.copy_(torch.linalg.solve_triangular(factor, eye, upper=False).to(W.dtype) @ W)


def _cos_sinc(A: Tensor, eta: Any) -> tuple[Tensor, Tensor]:
    """Return cos(eta sqrt A) and eta sinc(eta sqrt A) in the dtype of A, for angles of any size."""
    wide = A.double() * eta**2
    wide = (wide + wide.mT) / 2
    if A.device.type == "cpu":
        try:
            cos, sinc = cos_sinc(wide)
        except ValueError:
            raise ValueError("a step of a Grassmann parameter must have a finite square, got a longer one") from None
        return cos.to(A.dtype), (sinc * eta).to(A.dtype)
    trace = torch.diagonal(wide, dim1=-2, dim2=-1).sum(-1)[..., None, None]
    shorter = torch.clamp(200.0 * torch.rsqrt(trace.clamp(min=1.0)), max=1.0)
    cos, sinc = cos_sinc(wide * shorter**2, doublings=9)
    return cos.to(A.dtype), (sinc * (shorter * eta)).to(A.dtype)


def _refuse_unless_finite(E: Tensor) -> None:
    """Refuse a gradient on the CPU before anything is changed; a sum that is finite says that all numbers are."""
    if E.device.type == "cpu" and not torch.isfinite(E.sum()) and not torch.isfinite(E).all():
        raise ValueError("gradients of a Grassmann parameter must be finite, got NaN or infinity")


def _blocks(W: Tensor) -> list[slice]:
    """Cut bases (B, k, d) into runs that a core's cache holds; an accelerator takes all at once."""
    step = len(W) if W.device.type != "cpu" else max(1, BLOCK_FLOATS // (W.shape[1] * W.shape[2]))
    return [slice(i, i + step) for i in range(0, len(W), step or 1)]


def _stack(x: Tensor) -> Tensor:
    """View (*b, k, d) as (B, k, d)."""
    return x.view(-1, *x.shape[-2:]) if x.is_contiguous() else x.reshape(-1, *x.shape[-2:])


def _check_parameter(p: Tensor) -> None:
    if p.ndim < 2 or p.shape[-2] >= p.shape[-1]:
        raise ValueError(f"a Grassmann parameter must be (*b, k, d) with k < d, got {tuple(p.shape)}")
    if p.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a Grassmann parameter must be float32 or float64, got {p.dtype}: its steps would be lost")
    if not p.is_contiguous():
        raise ValueError("a Grassmann parameter must be contiguous, got a strided view")
    if p.is_meta:
        return
    with torch.no_grad():
        gram = p @ p.mT
        lengths = torch.diagonal(gram, dim1=-2, dim2=-1)
        # A row of zeros is padding, and off by nothing.
        off = (gram - torch.diag_embed((lengths != 0).to(gram.dtype))).abs().max() if p.numel() else gram.sum()
    if not off <= DRIFT:
        raise ValueError(
            f"a Grassmann parameter must have orthonormal rows, got some that are off by {float(off):.1e}; take "
            "orthonormal_basis of polyspan.linalg, or a head's repair_(), first"
        )


def _no_decay(weight_decay: float) -> str:
    return (
        f"weight_decay must be 0 for a group that holds subspaces, got {weight_decay}: shrinking has no meaning for "
        "them; put other parameters in a group of their own, for instance by grassmann_groups(model, weight_decay=...)"
    )
