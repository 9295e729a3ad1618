"""The selective scan on a GPU: Triton kernels, one program a channel, an associative scan a chunk.

Only a GPU can prove these kernels: on a machine without one their results, speed and races stay untested. What can be
proved elsewhere is (1) their mathematics, which is that of :mod:`polyspan.nn._scan_chunks`, step by step, and (2) their
text, by Triton's interpreter (``TRITON_INTERPRET=1``), which runs them on a CPU one program after another. Tests do
both where Triton is installed, and compare on a GPU where there is one.

The gradients of B and C are sums over the channels of a group, by atomic additions: on a GPU their last bits may differ
from run to run.
"""

from typing import Any

import torch
from torch import Tensor

from polyspan.errors import require

from ._scan_chunks import differentiable_gradients

triton: Any = require("triton", extra="gpu", purpose="the GPU scan")
tl: Any = require("triton.language", extra="gpu", purpose="the GPU scan")


@triton.jit
def _combine(a1, v1, a2, v2):
    return a1 * a2, a2 * v1 + v2


@triton.jit
def _row(x, length: tl.constexpr, at: tl.constexpr):
    """Row ``at`` of x (length, n)."""
    return tl.sum(tl.where((tl.arange(0, length) == at)[:, None], x, 0.0), axis=0)


@triton.jit
def _forward(u, delta, A, B, C, y, last, starts, D, L, G, N, T: tl.constexpr, P: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)  # item of the batch times D, plus channel
    item, channel = program // D, program % D
    group = item * G + channel // (D // G)
    n, t = tl.arange(0, P), tl.arange(0, T)
    rates = tl.load(A + channel * N + n, mask=n < N, other=0.0)
    h = tl.zeros((P,), dtype=rates.dtype)
    for chunk in range(tl.cdiv(L, T)):
        time = chunk * T + t
        inside = time < L
        both = inside[:, None] & (n < N)[None, :]
        at = group * N * L + n[None, :] * L + time[:, None]
        # A step of length 0 leaves the state as it is: what is read beyond the end.
        dt = tl.load(delta + program * L + time, mask=inside, other=0.0)
        x = dt * tl.load(u + program * L + time, mask=inside, other=0.0)
        b = tl.load(B + at, mask=both, other=0.0)
        c = tl.load(C + at, mask=both, other=0.0)
        tl.store(starts + (chunk * tl.num_programs(0) + program) * N + n, h, mask=n < N)
        a = tl.exp(dt[:, None] * rates[None, :])
        products, states = tl.associative_scan((a, x[:, None] * b), 0, _combine)
        states += products * h[None, :]
        tl.store(y + program * L + time, tl.sum(c * states, axis=1), mask=inside)
        h = _row(states, T, T - 1)
    tl.store(last + program * N + n, h, mask=n < N)


@triton.jit
def _backward(
    gy, glast, u, delta, A, B, C, starts, gu, gdelta, gA, gB, gC, D, L, G, N, T: tl.constexpr, P: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    item, channel = program // D, program % D
    group = item * G + channel // (D // G)
    n, t = tl.arange(0, P), tl.arange(0, T)
    rates = tl.load(A + channel * N + n, mask=n < N, other=0.0)
    carry = tl.load(glast + program * N + n, mask=n < N, other=0.0)
    total = tl.zeros((P,), dtype=rates.dtype)
    chunks = tl.cdiv(L, T)
    for behind in range(chunks):
        chunk = chunks - 1 - behind
        time = chunk * T + t
        inside = time < L
        both = inside[:, None] & (n < N)[None, :]
        at = group * N * L + n[None, :] * L + time[:, None]
        dt = tl.load(delta + program * L + time, mask=inside, other=0.0)
        ut = tl.load(u + program * L + time, mask=inside, other=0.0)
        dy = tl.load(gy + program * L + time, mask=inside, other=0.0)
        b = tl.load(B + at, mask=both, other=0.0)
        c = tl.load(C + at, mask=both, other=0.0)
        start = tl.load(starts + (chunk * tl.num_programs(0) + program) * N + n, mask=n < N, other=0.0)
        a = tl.exp(dt[:, None] * rates[None, :])
        x = (dt * ut)[:, None] * b
        products, states = tl.associative_scan((a, x), 0, _combine)
        states += products * start[None, :]
        # The decay from t to t + 1; 1 at the chunk's last step, behind which the carry stands already.
        later = tl.load(delta + program * L + time + 1, mask=(time + 1 < L) & (t < T - 1), other=0.0)
        after = tl.exp(later[:, None] * rates[None, :])
        adjoint = c * dy[:, None] + tl.where((t == T - 1)[:, None], carry[None, :], 0.0)
        _, g = tl.associative_scan((after, adjoint), 0, _combine, reverse=True)
        carry = _row(a * g, T, 0)
        through = tl.sum(g * b, axis=1)
        # a h_{t-1} = h_t - x_t, without a shifted copy of the states.
        q = g * (states - x)
        tl.store(gu + program * L + time, through * dt, mask=inside)
        tl.store(gdelta + program * L + time, through * ut + tl.sum(q * rates[None, :], axis=1), mask=inside)
        total += tl.sum(q * dt[:, None], axis=0)
        tl.atomic_add(gB + at, g * (dt * ut)[:, None], mask=both)
        tl.atomic_add(gC + at, states * dy[:, None], mask=both)
    tl.atomic_add(gA + channel * N + n, total, mask=n < N)


CHUNK = 64


class TritonScan(torch.autograd.Function):
    """Both kernels; the layout is that of :mod:`polyspan.nn._scan_chunks`, and every tensor contiguous."""

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor):
        u, delta, A, B, C = (x.contiguous() for x in (u, delta, A, B, C))
        (batch, D, L), N = u.shape, A.shape[1]
        y, last = torch.empty_like(u), u.new_empty(batch, D, N)
        starts = u.new_empty(-(-L // CHUNK), batch, D, N)
        if batch and D:
            _forward[(batch * D,)](
                u, delta, A, B, C, y, last, starts, D, L, B.shape[1], N, T=CHUNK, P=triton.next_power_of_2(N)
            )
        ctx.save_for_backward(u, delta, A, B, C, starts)
        return y, last

    @staticmethod
    def backward(ctx, *grads: Tensor):
        gy, glast = grads
        u, delta, A, B, C, starts = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(gy, glast, u, delta, A, B, C)
        (batch, D, L), N = u.shape, A.shape[1]
        gu, gdelta = torch.empty_like(u), torch.empty_like(u)
        gA, gB, gC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        if batch and D:
            _backward[(batch * D,)](
                gy.contiguous(), glast.contiguous(), u, delta, A, B, C, starts, gu, gdelta, gA, gB, gC,
                D, L, B.shape[1], N, T=CHUNK, P=triton.next_power_of_2(N),
            )  # fmt: skip
        return gu, gdelta, gA, gB, gC
