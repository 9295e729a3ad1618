"""The selective scan on a CPU: blocks of steps at once, then one fused multiply-add a step on contiguous memory.

Tensors are time-major: u, delta (L, G, b, d), A (G, d, N), B, C (L, G, b, N), y (L, G, b, d), states (G, b, N, d). G
counts groups of channels that share B and C.
"""

import math

import torch
from torch import Tensor

from ._scan_chunks import differentiable_gradients

ENTRIES = 1 << 19
"""States of a block, numbers: exponentials and states of a block stay in the cache (2 MiB each in float32)."""
MOST_STEPS = 128
SMALL_MATRIX = 400
"""Numbers of a matrix of states below which a batch of products goes by a slow loop, and a product and a sum do not."""
LOG2_E = math.log2(math.e)


def block_steps(state: int) -> int:
    """How many steps make a block where a step holds ``state`` numbers."""
    return max(4, min(MOST_STEPS, ENTRIES // max(state, 1)))


def _unwatched() -> torch.inference_mode:
    """Tensors made here are not watched by autograd, and a step that changes them costs a fifth less.

    What an operator returns is made outside, or it could serve no training.
    """
    return torch.inference_mode()


class _Block:
    """Decays (T, G, b, N, d) and states (T + 1, ...) of a block, in memory that all blocks share.

    Rows are taken apart once: a view a step costs as much as the step.
    """

    def __init__(self, like: Tensor, A: Tensor, steps: int):
        G, b, d, N = *like.shape[1:], A.shape[-1]
        # Tiled over items, so that a product with the rates runs over long rows.
        self.rates = A.transpose(1, 2).unsqueeze(1).expand(-1, b, -1, -1).contiguous()
        self.octaves = self.rates * LOG2_E
        self.a, self.h = like.new_empty(steps, G, b, N, d), like.new_empty(steps + 1, G, b, N, d)
        self.decays, self.rows = self.a.flatten(1).unbind(0), self.h.flatten(1).unbind(0)

    def fill(self, delta: Tensor, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decays of a block of T steps, and T + 1 states, of which the first stands in ``h[0]`` already."""
        T = len(delta)
        a, h = self.a[:T], self.h[: T + 1]
        # Powers of 2 take half the time of powers of e, and round as the product before them does.
        torch.mul(delta.unsqueeze(-2), self.octaves, out=a).exp2_()
        torch.mul(x.unsqueeze(-2), B.unsqueeze(-1), out=h[1:])
        before = self.rows[0]
        for decay, row in zip(self.decays[:T], self.rows[1 : T + 1], strict=True):
            before = row.addcmul_(decay, before)
        return a, h


def _over_states(h: Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """Sum of ``h`` (T, G, b, N, d) times ``weights`` (T, G, b, N) over N; ``room`` may be overwritten."""
    N, d = h.shape[-2:]
    if N * d < SMALL_MATRIX:
        return torch.mul(h, weights.unsqueeze(-1), out=room).sum(dim=-2)
    return torch.bmm(weights.reshape(-1, 1, N), h.reshape(-1, N, d)).view(*h.shape[:3], d)


def _over_channels(h: Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """Sum of ``h`` (T, G, b, N, d) times ``weights`` (T, G, b, d) over d; ``room`` may be overwritten."""
    N, d = h.shape[-2:]
    if N * d < SMALL_MATRIX:
        return torch.mul(h, weights.unsqueeze(-2), out=room).sum(dim=-1)
    # A row times a matrix: a matrix times a column takes six times as long.
    return torch.bmm(weights.reshape(-1, 1, d), h.reshape(-1, N, d).transpose(1, 2)).view(*h.shape[:3], N)


# Operators rather than an autograd.Function: torch.export then captures one node, not a loop over every step.
_library = torch.library.Library("polyspan", "FRAGMENT")
_library.define("selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C) -> (Tensor, Tensor, Tensor)")
_library.define(
    "selective_scan_backward(Tensor gy, Tensor glast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor starts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last states, and the states at the start of every block, which the backward pass goes on from."""
    L, G, b, d = u.shape
    N = A.shape[-1]
    steps = block_steps(G * b * N * d)
    y, last, starts = torch.empty_like(u), u.new_empty(G, b, N, d), u.new_empty(-(-L // steps), G, b, N, d)
    with torch.autocast(u.device.type, enabled=False), _unwatched():
        block, x = _Block(u, A, min(steps, L)), delta * u
        block.h[0] = 0
        for i, s in enumerate(range(0, L, steps)):
            rows = slice(s, min(s + steps, L))
            starts[i] = block.h[0]
            a, h = block.fill(delta[rows], x[rows], B[rows])
            y[rows] = _over_states(h[1:], C[rows], a)
            block.h[0] = h[-1]
        last.copy_(block.h[0])
    return y, last, starts


def _scan_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor):  # noqa: ARG001
    L, G, b, d = u.shape
    N = A.shape[-1]
    blocks = -(-L // block_steps(G * b * N * d))
    return torch.empty_like(u), u.new_empty(G, b, N, d), u.new_empty(blocks, G, b, N, d)


def _scan_backward(
    gy: Tensor, glast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Return the gradients of u, delta, A, B, C, from the last block to the first.

    With the adjoint state :math:`g_t = C_t\,\partial y_t + a_{t+1} g_{t+1}` and :math:`q_t = g_t h_{t-1} a_t`: ∂A =
    Σ q Δ, ∂B = Σ_c g Δu, ∂C = Σ_c h ∂y, and Σ_n g B is the gradient of Δu. States are made again from a block's start.
    """
    L, G, b, d = u.shape
    N = A.shape[-1]
    steps = block_steps(G * b * N * d)
    gu, gdelta, gA, gB, gC = (torch.empty_like(part) for part in (u, delta, A, B, C))
    with torch.autocast(u.device.type, enabled=False), _unwatched():
        block, x, carry = _Block(u, A, min(steps, L)), delta * u, glast
        decays, g, total = block.decays, torch.empty_like(block.a), torch.zeros_like(block.rates)
        adjoint = g.flatten(1).unbind(0)
        for i in reversed(range(len(starts))):
            rows = slice(i * steps, min((i + 1) * steps, L))
            T = rows.stop - rows.start
            gt, block.h[0] = g[:T], starts[i]
            q, ht = block.fill(delta[rows], x[rows], B[rows])
            torch.mul(C[rows].unsqueeze(-1), gy[rows].unsqueeze(-2), out=gt)
            gt[-1] += carry
            after = adjoint[T - 1]
            for decay, row in zip(decays[T - 1 : 0 : -1], adjoint[T - 2 :: -1] if T > 1 else (), strict=True):
                after = row.addcmul_(decay, after)
            q.mul_(gt)
            carry = q[0].clone()
            q.mul_(ht[:-1])
            room = ht[1:]  # of states, adjoints and q none is read again below once something stands in its place
            gC[rows] = _over_channels(room, gy[rows], room)
            through = _over_states(gt, B[rows], room)
            gB[rows] = _over_channels(gt, x[rows], gt)
            torch.mul(through, delta[rows], out=gu[rows])
            torch.sum(torch.mul(q, block.rates, out=room), dim=-2, out=gdelta[rows])
            gdelta[rows].addcmul_(through, u[rows])
            # Steps first, items last: both at once would be a reduction with strides, many times as slow.
            total += q.mul_(delta[rows].unsqueeze(-2)).sum(dim=0)
        gA.copy_(total.sum(dim=1).transpose(1, 2))
    return gu, gdelta, gA, gB, gC


def _gradient_shapes(gy, glast, u, delta, A, B, C, starts):  # noqa: ARG001
    return torch.empty_like(u), torch.empty_like(u), torch.empty_like(A), torch.empty_like(B), torch.empty_like(C)


def _differentiable_gradients(gy, glast, u, delta, A, B, C):
    """The gradients by the scan in chunks, whose tensors are channel-major, so that they can be derived again."""
    (L, G, b, d), N = u.shape, A.shape[-1]
    gy, u, delta = (x.permute(2, 1, 3, 0).reshape(b, G * d, L) for x in (gy, u, delta))
    glast = glast.permute(1, 0, 3, 2).reshape(b, G * d, N)
    B, C = (x.permute(2, 1, 3, 0) for x in (B, C))
    gu, gdelta, gA, gB, gC = differentiable_gradients(gy, glast, u, delta, A.reshape(G * d, N), B, C)
    gu, gdelta = (x.view(b, G, d, L).permute(3, 1, 0, 2) for x in (gu, gdelta))
    return gu, gdelta, gA.view(G, d, N), *(x.permute(3, 1, 0, 2) for x in (gB, gC))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])


def _differentiate(ctx, gy, glast, _starts):
    if torch.is_grad_enabled():
        return _differentiable_gradients(gy, glast, *ctx.saved_tensors[:5])
    gy = gy.reshape(len(gy), -1).contiguous().view(gy.shape)  # a matrix is copied in tiles, four dimensions are not
    return torch.ops.polyspan.selective_scan_backward(gy, glast.contiguous(), *ctx.saved_tensors)


_library.impl("selective_scan", _scan, "CompositeExplicitAutograd")
_library.impl("selective_scan_backward", _scan_backward, "CompositeExplicitAutograd")
torch.library.register_fake("polyspan::selective_scan", _scan_shapes, lib=_library)
torch.library.register_fake("polyspan::selective_scan_backward", _gradient_shapes, lib=_library)
torch.library.register_autograd("polyspan::selective_scan", _differentiate, setup_context=_keep, lib=_library)


def scan_blocks(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scan contiguous tensors; see :func:`_scan`, of which this is the differentiable form."""
    return torch.ops.polyspan.selective_scan(u, delta, A, B, C)
