"""The selective scan: a linear recurrence over a sequence whose steps, inputs and outputs depend on the sequence."""

import importlib.util
import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from polyspan.errors import require

from ._scan_blocks import scan_blocks
from ._scan_chunks import CHUNK, ChunkedScan

BACKENDS = ("auto", "blocks", "chunks", "loop", "triton", "mamba")
LONG = 65_536
SECONDS_A_STATE = 3e-9
"""Of one step of one state, forwards, on one core of a common CPU; only for the warning about long sequences."""


def selective_scan(
    u: Float[Tensor, "b D L"],
    delta: Float[Tensor, "b D _"],
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scan sequences by a state-space model that is another one at every step, forwards and with its derivative.

    .. math:: h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \qquad y_t = \langle C_t, h_t \rangle + D u_t

    for every channel, with N states each; ``y * silu(z)`` where ``z`` is given. Arguments stand in the order of Mamba's
    function of this name. Half precision is scanned in float32, and ``y`` has the dtype of ``u``. Decays are never
    divided by nor multiplied up, so that nothing overflows where ``A <= 0``; with positive ``A``, states grow without
    bound. Second derivatives go through the scan in chunks whatever the backend, and keep all states; "mamba" has none.
    Source: catalogue entry ``mhs-vm``.

    Parameters
    ----------
    u, delta : Tensor of shape (b, D, L)
        Inputs, and lengths of the steps: at least 0 once bias and softplus have been applied.
    A : Tensor of shape (D, N)
        Rates, real; below 0 for states that fade.
    B, C : Tensor of shape (b, G, N, L), (b, N, L) or (D, N)
        G divides D: channels D/G g .. D/G (g + 1) - 1 share group g. (D, N) does not depend on the sequence.
    D : Tensor of shape (D,), optional
        Weight of the input that bypasses the states.
    z : Tensor of shape (b, D, L), optional
        Gate of the output.
    delta_bias : Tensor of shape (D,), optional
        Added to ``delta``, before softplus.
    delta_softplus : bool, default=False
    return_last_state : bool, default=False
        Return the states after the last step, too.
    backend : {"auto", "blocks", "chunks", "loop", "triton", "mamba"}, default="auto"
        "blocks" is fast on a CPU: many steps at once, then one fused multiply-add a step; memory O(bD(L + N√L)) or
        less. "chunks" is an associative scan in chunks of 64, for devices that have many lanes. "triton" runs the same
        chunks as GPU kernels, which only a GPU can prove, and "mamba" the kernels of ``mamba_ssm``. "loop" is the
        formula, step by step, for comparison. "auto": on a GPU "mamba" or "triton", whichever is installed, or else
        "chunks"; elsewhere "blocks".

    Returns
    -------
    Tensor of shape (b, D, L), or a pair of it and (b, D, N)

    Raises
    ------
    ValueError
        Shapes do not belong together, a tensor holds no real floats, the sequence is empty, or the backend is not known
        or does not run on this device.
    MissingExtra
        The backend's package is not installed.
    """
    _check_shapes(u, delta, A, B, C)
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None and x.shape != u.shape[1:2]:
            raise ValueError(
                f"{name} must have shape {tuple(u.shape[1:2])}, one number a channel, got {tuple(x.shape)}"
            )
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z must have the shape of u, {tuple(u.shape)}, got {tuple(z.shape)}")
    b, channels, L = u.shape
    out_dtype, wide = u.dtype, torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (x.to(wide) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide).unsqueeze(-1)
    if delta_softplus:
        delta = F.softplus(delta)
    if B.ndim == 2 or C.ndim == 2:
        B, C = (_one_group_a_channel(x, b, channels, L) for x in (B, C))
    B, C = (x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C))
    if B.shape[1] != C.shape[1]:
        B, C = (x.repeat_interleave(channels // x.shape[1], dim=1) for x in (B, C))
    how = pick_backend(backend, u.device)
    if how == "blocks":
        y, last = _scan_turned(u, delta, A, B, C)
    else:
        y, last = _scan_channel_major(u, delta, A, B, C, how)
    if D is not None:
        y = torch.addcmul(y, D.to(wide).unsqueeze(-1), u)
    y = (y if z is None else y * F.silu(z.to(wide))).to(out_dtype)
    return (y, last) if return_last_state else y


def pick_backend(backend: str, device: torch.device) -> str:
    """Return what "auto" stands for on a device, or the backend itself where it can run there.

    Raises
    ------
    ValueError, MissingExtra
        As :func:`selective_scan`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        if device.type != "cuda":
            return "blocks"
        if importlib.util.find_spec("mamba_ssm"):
            return "mamba"
        return "triton" if importlib.util.find_spec("triton") else "chunks"
    if backend == "mamba" and device.type != "cuda":
        raise ValueError(f"backend 'mamba' needs tensors on a GPU, got {device}")
    if backend == "triton" and device.type != "cuda" and not _interpreted():
        raise ValueError(f"backend 'triton' needs tensors on a GPU (or TRITON_INTERPRET=1), got {device}")
    return backend


def _interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    triton = importlib.import_module("triton")
    return bool(triton.knobs.runtime.interpret)


def scan_time_major(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, backend: str
) -> tuple[Tensor, Tensor]:
    """Scan time-major tensors, float32 or wider: u, delta (L, G, b, d), A (G, d, N), B, C (L, G, b, N).

    Returns y (L, G, b, d) and the last states (G, b, N, d).
    """
    L, G, b, d = u.shape
    N = A.shape[-1]
    if not torch.compiler.is_compiling() and L > LONG:
        seconds = L * G * b * d * N * SECONDS_A_STATE
        warnings.warn(f"sequences of {L:,} steps: a scan takes about {seconds:.0f} s on one core", stacklevel=3)
    how = pick_backend(backend, u.device)
    if how == "blocks":
        y, last, _ = scan_blocks(u.contiguous(), delta.contiguous(), A.contiguous(), B.contiguous(), C.contiguous())
        return y, last
    flat = [x.permute(2, 1, 3, 0).reshape(b, G * d, L) for x in (u, delta)]
    y, last = _scan_channel_major(*flat, A.reshape(G * d, N), *(x.permute(2, 1, 3, 0) for x in (B, C)), how)
    return y.reshape(b, G, d, L).permute(3, 1, 0, 2), last.reshape(b, G, d, N).permute(1, 0, 3, 2)


class _Turn(torch.autograd.Function):
    """Transpose a matrix in memory, and its gradient as well: torch copies matrices in tiles, and a gradient of three
    dimensions that is only a view is copied number by number, with strides, when it is stored.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.t().contiguous()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return _Turn.apply(*grads)


def _scan_turned(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_scan_channel_major`, in blocks. Items are groups of their own there, so that tensors are matrices."""
    (b, channels, L), G, N = u.shape, B.shape[1], A.shape[1]
    d = channels // G
    rates = A.reshape(G, d, N).expand(b, -1, -1, -1).reshape(b * G, d, N)
    major = (
        _Turn.apply(x.reshape(b * G * width, L)).view(L, b * G, 1, width)
        for x, width in ((u, d), (delta, d), (B, N), (C, N))
    )
    u, delta, B, C = major
    y, last = scan_time_major(u, delta, rates, B, C, backend="blocks")
    y = _Turn.apply(y.reshape(L, b * channels)).view(b, channels, L)
    return y, last.transpose(-1, -2).reshape(b, channels, N)


def _scan_channel_major(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, how: str) -> tuple[Tensor, Tensor]:
    if how == "chunks":
        return ChunkedScan.apply(u, delta, A, B, C, CHUNK)
    if how == "triton":
        from ._scan_triton import TritonScan

        return TritonScan.apply(u, delta, A, B, C)
    if how == "mamba":
        purpose = "the kernel of Mamba"
        mamba = require("mamba_ssm.ops.selective_scan_interface", extra="gpu", purpose=purpose)
        return mamba.selective_scan_fn(u, delta, A, B.contiguous(), C.contiguous(), return_last_state=True)
    return _literal_loop(u, delta, A, B, C)


def _literal_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, one step after the other; u, delta (b, D, L), A (D, N), B, C (b, G, N, L)."""
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))
    h, out = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t].unsqueeze(-1)
        h = torch.exp(step * A) * h + step * B[..., t] * u[:, :, t].unsqueeze(-1)
        out.append((C[..., t] * h).sum(dim=-1))
    return torch.stack(out, dim=-1), h


def _one_group_a_channel(x: Tensor, b: int, channels: int, L: int) -> Tensor:
    if x.ndim == 2:
        return x[None, :, :, None].expand(b, -1, -1, L)
    x = x.unsqueeze(1) if x.ndim == 3 else x
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if u.ndim != 3:
        raise ValueError(f"u must have shape (b, D, L), got {tuple(u.shape)}")
    for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must hold real floats, got {x.dtype}")
    b, channels, L = u.shape
    if L < 1:
        raise ValueError(f"u must hold at least one step, got shape {tuple(u.shape)}")
    if delta.shape != u.shape:
        raise ValueError(f"delta must have the shape of u, {tuple(u.shape)}, got {tuple(delta.shape)}")
    if A.ndim != 2 or A.shape[0] != channels or not A.shape[1]:
        raise ValueError(f"A must have shape (D, N) with D = {channels} and N >= 1, got {tuple(A.shape)}")
    N = A.shape[1]
    for name, x in (("B", B), ("C", C)):
        groups = x.shape[1] if x.ndim == 4 else 1
        fits = x.shape == (channels, N) if x.ndim == 2 else x.ndim in (3, 4) and x.shape[-2:] == (N, L)
        if not fits or (x.ndim > 2 and x.shape[0] != b) or not groups or channels % groups:
            raise ValueError(
                f"{name} must have shape (b, G, N, L), (b, N, L) or (D, N) with b = {b}, D = {channels}, N = {N}, "
                f"L = {L} and G a divisor of D, got {tuple(x.shape)}"
            )
