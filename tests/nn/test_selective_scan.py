import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from polyspan.errors import MissingExtra
from polyspan.nn import selective_scan
from polyspan.nn._scan_blocks import block_steps
from polyspan.nn._scan_chunks import associative_scan, chunked_backward, chunked_forward

FAST = ("blocks", "chunks")


def problem(b=2, D=6, N=3, L=150, G=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    return {
        "u": normal(b, D, L),
        "delta": normal(b, D, L),
        "A": -normal(D, N).abs(),
        "B": normal(b, G, N, L),
        "C": normal(b, G, N, L),
        "D": normal(D),
        "z": normal(b, D, L),
        "delta_bias": normal(D),
    }


def run(backend, parts):
    """Outputs, last states and all gradients."""
    parts = {name: x.clone().requires_grad_() for name, x in parts.items()}
    y, last = selective_scan(**parts, delta_softplus=True, return_last_state=True, backend=backend)
    (y.square().sum() + last.pow(3).sum()).backward()
    return [y.detach(), last.detach(), *(x.grad for x in parts.values())]


def literal(u, delta, A, B, C):
    """The recurrence, number by number."""
    b, D, L = u.shape
    y = torch.zeros_like(u)
    for i in range(b):
        for c in range(D):
            h = [0.0] * A.shape[1]
            for t in range(L):
                for n in range(A.shape[1]):
                    step = float(delta[i, c, t])
                    decay = float(torch.exp(delta[i, c, t] * A[c, n]))
                    h[n] = decay * h[n] + step * float(B[i, n, t]) * float(u[i, c, t])
                    y[i, c, t] += float(C[i, n, t]) * h[n]
    return y


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_every_backend_is_the_formula(backend):
    p = problem(b=2, D=2, N=2, L=9, G=1)
    delta, B, C = p["delta"].abs(), p["B"][:, 0], p["C"][:, 0]
    found = selective_scan(p["u"], delta, p["A"], B, C, backend=backend)
    torch.testing.assert_close(found, literal(p["u"], delta, p["A"], B, C))


@given(
    b=st.integers(1, 3), d=st.integers(1, 4), N=st.integers(1, 5), L=st.integers(1, 140), G=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_fast_scans_equal_the_loop_with_all_gradients_in_every_shape(b, d, N, L, G, seed):
    parts = problem(b, d * G, N, L, G, seed)
    expected = run("loop", parts)
    for backend in FAST:
        for mine, theirs in zip(run(backend, parts), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_blocks_that_are_not_full_change_nothing(monkeypatch):
    monkeypatch.setattr("polyspan.nn._scan_blocks.ENTRIES", 5 * 36)
    assert block_steps(36) == 5
    assert block_steps(10**9) == 4
    assert block_steps(1) == 128
    for L in (4, 5, 6, 11):
        parts = problem(L=L)
        for mine, theirs in zip(run("blocks", parts), run("loop", parts), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_wide_matrices_of_states_are_summed_as_small_ones_are():
    for N in (2, 16):  # 60 and 480 numbers a matrix: a product and a sum, and a batch of products
        parts = problem(b=2, D=60, N=N, L=131, G=2)
        for mine, theirs in zip(run("blocks", parts), run("loop", parts), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_decay_is_as_exact_as_its_exponent():
    """Rounded three times at most: the rate in powers of 2, its product with the step, and the power itself."""
    t = torch.linspace(0, 80, 161)
    u, steps = torch.tensor([1.0, 0.0]).expand(1, 161, 2), torch.stack([torch.ones(161), t], dim=-1)[None]
    A, ones = torch.full((161, 1), -1.0), torch.ones(1, 1, 2)
    exact = torch.exp(-t.double())
    off = (selective_scan(u, steps, A, ones, ones, backend="blocks")[0, :, 1].double() - exact).abs() / exact
    assert (off <= 2 * (t + 1) * torch.finfo(torch.float32).eps).all()


def test_outputs_and_gradients_lie_in_memory_as_the_arguments_do():
    parts = [x.requires_grad_() for x in problem().values()]
    y = selective_scan(*parts)
    y.square().sum().backward()
    assert y.is_contiguous()
    assert all(x.grad.is_contiguous() for x in parts)
    assert not any(x.is_inference() for x in (y, *(x.grad for x in parts)))


def test_the_derivative_passes_gradcheck():
    p = problem(b=2, D=4, N=2, L=7)
    given = tuple(x.requires_grad_() for x in p.values())
    for backend in FAST:
        assert torch.autograd.gradcheck(
            lambda *x, how=backend: selective_scan(*x, True, True, backend=how), given, fast_mode=True
        )


def test_the_operator_keeps_torchs_rules_for_operators():
    p = problem(b=1, D=4, N=2, L=5)
    major = [x.reshape(1, 2, 2, 5).permute(3, 1, 0, 2).contiguous() for x in (p["u"], p["delta"])]
    groups = [p[k].permute(3, 1, 0, 2).contiguous() for k in "BC"]
    args = tuple(x.requires_grad_() for x in (*major, p["A"].view(2, 2, 2).contiguous(), *groups))
    torch.library.opcheck(
        torch.ops.polyspan.selective_scan.default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_with_one_state_and_a_constant_input_it_is_a_geometric_series():
    L, a, step = 40, -0.7, 0.3
    ones = torch.ones(1, 1, L, dtype=torch.float64)
    y = selective_scan(ones, step * ones, torch.tensor([[a]]), ones, ones)
    q = torch.exp(torch.tensor(a * step, dtype=torch.float64))
    torch.testing.assert_close(y[0, 0], step * (1 - q ** torch.arange(1, L + 1)) / (1 - q), rtol=1e-6, atol=1e-6)


def test_where_rates_are_very_negative_nothing_is_remembered():
    p = problem(L=30, G=1)
    delta = p["delta"].abs() + 0.1
    y = selective_scan(p["u"], delta, torch.full((6, 3), -1e6), p["B"], p["C"], p["D"])
    alone = delta * p["u"] * (p["B"] * p["C"]).sum(dim=2) + p["D"][:, None] * p["u"]
    torch.testing.assert_close(y, alone)


@pytest.mark.parametrize("backend", FAST)
def test_steps_of_extreme_length_stay_finite_with_their_gradients(backend):
    p = {k: v for k, v in problem(L=300, dtype=torch.float32).items() if k in ("u", "A", "B", "C")}
    delta = torch.full((2, 6, 300), 1e4)
    delta[..., ::3] = 0.0
    parts = [x.requires_grad_() for x in (p["u"], delta, 50 * p["A"].detach() - 1, p["B"], p["C"])]
    y = selective_scan(*parts, backend=backend)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(x.grad).all() for x in parts)


def test_it_is_causal_and_linear_in_its_input():
    p = problem(G=1)
    rest = [p[k] for k in ("A", "B", "C")]
    delta = p["delta"].abs()
    whole = selective_scan(p["u"], delta, *rest)
    cut = p["u"].clone()
    cut[..., 100:] = 0
    torch.testing.assert_close(selective_scan(cut, delta, *rest)[..., :100], whole[..., :100])
    torch.testing.assert_close(selective_scan(-3 * p["u"], delta, *rest), -3 * whole)


def test_fixed_inputs_and_outputs_stand_for_every_step_and_groups_may_differ():
    p = problem(G=3)
    B = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = selective_scan(p["u"], p["delta"].abs(), p["A"], B, p["C"])
    wide = B[None, :, :, None].expand(2, -1, -1, 150)
    expected = selective_scan(
        p["u"], p["delta"].abs(), p["A"], wide, p["C"].repeat_interleave(2, dim=1), backend="loop"
    )
    torch.testing.assert_close(found, expected)
    one = selective_scan(p["u"], p["delta"].abs(), p["A"], p["B"][:, 0], p["C"])
    torch.testing.assert_close(
        one, selective_scan(p["u"], p["delta"].abs(), p["A"], p["B"][:, :1], p["C"], backend="loop")
    )


def test_half_precision_is_scanned_in_float32_and_autocast_changes_nothing():
    p = problem(dtype=torch.float32)
    half = {k: v.to(torch.bfloat16) for k, v in p.items()}
    y, last = selective_scan(**half, delta_softplus=True, return_last_state=True)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    wide = selective_scan(**{k: v.float() for k, v in half.items()}, delta_softplus=True)
    torch.testing.assert_close(y.float(), wide, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run("blocks", p)
    for mine, theirs in zip(inside, run("blocks", p), strict=True):
        assert torch.equal(mine, theirs)


def test_associative_scan_is_the_recurrence_forwards_and_backwards():
    g = torch.Generator().manual_seed(0)
    a, v = torch.rand(2, 3, 13, generator=g), torch.randn(2, 3, 13, generator=g)
    products, h = associative_scan(a, v)
    torch.testing.assert_close(products, a.cumprod(dim=-1))
    state = torch.zeros(2, 3)
    for t in range(13):
        state = a[..., t] * state + v[..., t]
        torch.testing.assert_close(h[..., t], state)
    state, back = torch.zeros(2, 3), associative_scan(a, v, reverse=True)[1]
    for t in reversed(range(13)):
        state = a[..., t] * state + v[..., t]
        torch.testing.assert_close(back[..., t], state)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_chunks_of_any_length_give_the_same_and_their_backward_is_autograds(chunk):
    p = problem(L=50)
    args = [p["u"], p["delta"].abs(), p["A"], p["B"], p["C"]]
    leaves = [x.clone().requires_grad_() for x in args]
    y, last = selective_scan(*leaves, return_last_state=True, backend="loop")
    g = torch.Generator().manual_seed(1)
    gy = torch.randn(y.shape, dtype=y.dtype, generator=g)
    glast = torch.randn(last.shape, dtype=y.dtype, generator=g)
    expected = torch.autograd.grad([y, last], leaves, [gy, glast])
    found, end, starts = chunked_forward(*args, chunk)
    torch.testing.assert_close(found, y.detach())
    torch.testing.assert_close(end, last.detach())
    for mine, theirs in zip(chunked_backward(gy, glast, *args, starts, chunk), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


PROBE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tests_scan", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
from polyspan.nn import _scan_triton
# The interpreter takes milliseconds a number: chunks of 8 but for one case, and few channels. At 64, a tail; at 8 a
# tail, a full chunk with three channels a group, two carries and a tail, and single steps of many channels.
shapes = [(64, {"L": 65, "N": 1, "b": 1, "D": 1, "G": 1}), (8, {"L": 11, "D": 4}), (8, {"L": 8, "N": 4, "b": 1})]
shapes += [(8, {"L": 17, "D": 3, "G": 3, "b": 1}), (8, {"L": 1, "D": 14, "b": 1})]
for chunk, shape in shapes:
    _scan_triton.CHUNK = chunk
    parts = tests.problem(**shape)
    for mine, theirs in zip(tests.run("triton", parts), tests.run("loop", parts), strict=True):
        tests.torch.testing.assert_close(mine, theirs)
print("equal")
for mine, theirs in zip(*(tests.twice(how, b=1, D=2, L=11) for how in ("triton", "loop")), strict=True):
    tests.torch.testing.assert_close(mine, theirs)
given = tuple(x.requires_grad_() for x in tests.problem(b=1, D=1, N=2, L=5, G=1).values())
for check in (tests.torch.autograd.gradcheck, tests.torch.autograd.gradgradcheck):
    assert check(lambda *x: tests.selective_scan(*x, True, True, backend="triton"), given, fast_mode=True)
print("twice")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the text of the GPU kernels runs in Triton's interpreter, and triton is not installed (Linux only)",
)
def test_the_text_of_the_gpu_kernels_and_their_double_backward_is_right_in_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", PROBE, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["equal", "twice"], done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can prove the GPU kernels")
@pytest.mark.parametrize("backend", ["triton", "chunks"])
def test_on_a_gpu_results_and_gradients_equal_the_cpus(backend):
    parts = problem(b=3, D=32, N=16, L=1000, dtype=torch.float32)
    there = run(backend, {k: v.cuda() for k, v in parts.items()})
    for mine, theirs in zip(there, run("blocks", parts), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 6, 0)}, "u must hold at least one step"),
        ({"delta": torch.zeros(2, 6, 149)}, "delta must have the shape of u"),
        ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "A must hold real floats, got torch.complex64"),
        ({"A": torch.zeros(5, 3)}, r"A must have shape \(D, N\)"),
        ({"B": torch.zeros(2, 4, 3, 150)}, "B must have shape .*G a divisor"),
        ({"B": torch.zeros(1, 2, 3, 150)}, "B must have shape"),
        ({"C": torch.zeros(2, 3, 149)}, "C must have shape"),
        ({"C": torch.zeros(6, 4)}, "C must have shape"),
        ({"backend": "magic"}, "backend must be one of"),
        ({"backend": "mamba"}, "backend 'mamba' needs tensors on a GPU"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    parts = problem(dtype=torch.float32) | change
    with pytest.raises(ValueError, match=message):
        selective_scan(**parts)


def test_a_gpu_backend_says_that_it_needs_a_gpu_or_its_package():
    with pytest.raises((ValueError, MissingExtra), match="needs"):
        selective_scan(**problem(dtype=torch.float32), backend="triton")


def test_a_very_long_sequence_is_announced():
    L = 65_537
    u = torch.ones(1, 1, L)
    with pytest.warns(UserWarning, match="sequences of 65,537 steps"):
        y = selective_scan(u, 0.1 * u, -torch.ones(1, 1), u, u)
    q = torch.exp(torch.tensor(-0.1))
    torch.testing.assert_close(y[0, 0, -1], 0.1 / (1 - q))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan(u[..., 1:], u[..., 1:], -torch.ones(1, 1), u[..., 1:], u[..., 1:])


def test_softplus_and_the_gate_are_those_of_the_formula():
    p = problem(G=1)
    step = F.softplus(p["delta"] + p["delta_bias"][:, None])
    plain = selective_scan(p["u"], step, p["A"], p["B"], p["C"]) + p["D"][:, None] * p["u"]
    torch.testing.assert_close(selective_scan(**p, delta_softplus=True), plain * F.silu(p["z"]))


def test_an_empty_batch_has_an_empty_result():
    u = torch.randn(0, 4, 9, requires_grad=True)
    y, last = selective_scan(
        u, torch.rand(0, 4, 9), -torch.rand(4, 3), torch.randn(0, 3, 9), torch.randn(0, 3, 9), return_last_state=True
    )
    assert (y.shape, last.shape) == ((0, 4, 9), (0, 4, 3))
    y.sum().backward()
    assert u.grad.shape == u.shape


def twice(backend, **shape):
    """First and second derivatives of every argument."""
    parts = [x.clone().requires_grad_() for x in problem(**shape).values()]
    y, last = selective_scan(*parts, True, True, backend=backend)
    grads = torch.autograd.grad(y.square().sum() + last.pow(3).sum(), parts, create_graph=True)
    return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), parts)]


@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives_are_those_of_the_loop(backend):
    shape = {"b": 2, "D": 4, "L": 70}
    for mine, theirs in zip(twice(backend, **shape), twice("loop", **shape), strict=True):
        torch.testing.assert_close(mine, theirs)
    given = tuple(x.requires_grad_() for x in problem(b=1, D=2, N=2, L=5).values())
    assert torch.autograd.gradgradcheck(
        lambda *x: selective_scan(*x, True, True, backend=backend), given, fast_mode=True
    )
