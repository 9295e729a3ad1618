"""The selective scan as an associative scan in chunks: log-many vector steps a chunk, one carry from chunk to chunk.

The kernels of :mod:`polyspan.nn._scan_triton` do the same, chunk by chunk and step by step, one program a channel: what
is proved of these functions on a CPU is proved of their mathematics. Tensors are channel-major: u, delta (b, D, L), A
(D, N), B, C (b, G, N, L), states (b, D, N).
"""

import torch
from torch import Tensor

CHUNK = 64


def associative_scan(a: Tensor, v: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """All prefixes of (a, v) along the last dimension under (a₁, v₁)(a₂, v₂) = (a₁a₂, a₂v₁ + v₂), by doubling.

    Returns products and states. No division and no logarithm: with |a| <= 1 nothing can overflow.
    """
    if reverse:
        a, v = associative_scan(a.flip(-1), v.flip(-1))
        return a.flip(-1), v.flip(-1)
    k = 1
    while k < a.shape[-1]:
        v = torch.cat([v[..., :k], v[..., k:] + a[..., k:] * v[..., :-k]], dim=-1)
        a = torch.cat([a[..., :k], a[..., k:] * a[..., :-k]], dim=-1)
        k *= 2
    return a, v


def _for_channels(B: Tensor, D: int) -> Tensor:
    """Groups (b, G, N, T) repeated for their channels, (b, D, N, T)."""
    return B.repeat_interleave(D // B.shape[1], dim=1)


def _chunk_states(delta: Tensor, u: Tensor, A: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states (b, D, N, T) of one chunk that begins from ``start``."""
    a = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))
    products, h = associative_scan(a, (delta * u).unsqueeze(2) * B)
    return a, h + products * start.unsqueeze(-1)


def chunked_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = CHUNK):
    """Return y (b, D, L), the last states, and the states (chunks, b, D, N) at the start of every chunk."""
    D, L = u.shape[1:]
    h = u.new_zeros(u.shape[0], D, A.shape[1])
    parts, starts = [], []
    for s in range(0, L, chunk):
        at = slice(s, s + chunk)
        starts.append(h)
        states = _chunk_states(delta[..., at], u[..., at], A, _for_channels(B[..., at], D), h)[1]
        parts.append((_for_channels(C[..., at], D) * states).sum(dim=2))
        h = states[..., -1]
    return torch.cat(parts, dim=-1), h, torch.stack(starts)


def chunked_backward(gy, glast, u, delta, A, B, C, starts, chunk: int = CHUNK):
    """Return the gradients of u, delta, A, B, C by one reverse scan a chunk, from the last chunk to the first."""
    (b, D, L), G, N = u.shape, B.shape[1], A.shape[1]
    gu, gdelta, gA = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(A)
    gB, gC, carry = torch.empty_like(B), torch.empty_like(C), glast
    for i in reversed(range(len(starts))):
        at = slice(i * chunk, min((i + 1) * chunk, L))
        dt, ut, wide = delta[..., at], u[..., at], _for_channels(B[..., at], D)
        a, h = _chunk_states(dt, ut, A, wide, starts[i])
        c = _for_channels(C[..., at], D) * gy[..., at].unsqueeze(2)
        c[..., -1] += carry
        # The adjoint at t decays by what leads from t to t + 1; the last step has nothing behind it in this chunk.
        after = torch.cat([a[..., 1:], torch.ones_like(a[..., :1])], dim=-1)
        g = associative_scan(after, c, reverse=True)[1]
        carry = a[..., 0] * g[..., 0]
        through = (g * wide).sum(dim=2)
        q = g * a * torch.cat([starts[i].unsqueeze(-1), h[..., :-1]], dim=-1)
        gu[..., at] = through * dt
        gdelta[..., at] = through * ut + (q * A.unsqueeze(-1)).sum(dim=2)
        gA += (q * dt.unsqueeze(2)).sum(dim=(0, 3))
        gB[..., at] = (g * (dt * ut).unsqueeze(2)).view(b, G, D // G, N, -1).sum(dim=2)
        gC[..., at] = (h * gy[..., at].unsqueeze(2)).view(b, G, D // G, N, -1).sum(dim=2)
    return gu, gdelta, gA, gB, gC


def differentiable_gradients(gy, glast, u, delta, A, B, C, chunk: int = CHUNK):
    """Return the gradients of u, delta, A, B, C with a graph of their own, for derivatives of any order.

    Autograd goes through :func:`chunked_forward` and keeps all states, O(bDNL log(chunk)) numbers.
    """
    parts = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (u, delta, A, B, C)]
    y, last, _ = chunked_forward(*parts, chunk)
    return torch.autograd.grad((y, last), parts, (gy, glast), create_graph=True)


class ChunkedScan(torch.autograd.Function):
    """:func:`chunked_forward` with :func:`chunked_backward` as its derivative."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, chunk):
        y, last, starts = chunked_forward(u, delta, A, B, C, chunk)
        ctx.save_for_backward(u, delta, A, B, C, starts)
        ctx.chunk = chunk
        return y, last

    @staticmethod
    def backward(ctx, *grads):
        gy, glast = grads
        if torch.is_grad_enabled():
            return *differentiable_gradients(gy, glast, *ctx.saved_tensors[:5], ctx.chunk), None
        return *chunked_backward(gy, glast, *ctx.saved_tensors, ctx.chunk), None
