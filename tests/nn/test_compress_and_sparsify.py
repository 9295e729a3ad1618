import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from polyspan.linalg import coding_rate
from polyspan.nn import CRATEBlock, CRATEDecoderBlock, SparsifyingISTA, SubspaceSelfAttention


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(d, K, p, seed=0):
    return torch.linalg.qr(draw(d, K * p, seed=seed))[0].unflatten(1, (K, p)).permute(1, 0, 2)


def tied(U, step, **options):
    """Attention whose subspaces are U (K, d, p), both ways."""
    K, d, p = U.shape
    made = SubspaceSelfAttention(d, K, p, step=step, tied_output=True, bias=False, dtype=torch.float64, **options)
    with torch.no_grad():
        made.projection.weight.copy_(U.mT.reshape(K * p, d))
    return made


def rate_within(Z, U, eps2):
    return sum(coding_rate(Z @ basis, math.sqrt(eps2)) for basis in U)


def union(seed=0, n_per=24, K=4, p=8, d=64, noise=0.3):
    """Unit tokens near K orthogonal subspaces; and their bases."""
    U = bases(d, K, p, seed)
    clean = F.normalize((draw(K, n_per, p, seed=seed + 1) @ U.mT).reshape(-1, d), dim=-1)
    return F.normalize(clean + noise * draw(K * n_per, d, seed=seed + 2) / math.sqrt(d), dim=-1), U


# laws


@settings(deadline=None, max_examples=20)
@given(t=st.integers(2, 12), p=st.integers(1, 6), K=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_exact_step_is_the_gradient_of_the_rate_within_subspaces(t, p, K, seed):
    Z, U, eps2 = draw(t, 6, seed=seed).requires_grad_(), draw(K, 6, p, seed=seed + 1), 0.4
    (gradient,) = torch.autograd.grad(rate_within(Z, U, eps2), Z)
    step = tied(U, "exact", eps2=eps2, step_size=0.7)(Z[None])[0]
    beta = p / (t * eps2)
    torch.testing.assert_close(step, -0.7 / beta * gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("step", ["published", "eq10", "exact"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_tokens_may_be_given_in_any_order(step, seed):
    x, made = draw(2, 7, 6, seed=seed), tied(draw(2, 6, 3, seed=seed + 1), step)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(made(x[:, order]), made(x)[:, order])


@pytest.mark.parametrize("step", ["published", "eq10", "exact"])
def test_padding_changes_nothing_for_the_tokens_that_are_there(step):
    x, made = draw(3, 7, 6), tied(draw(2, 6, 3, seed=1), step)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    padded = made(torch.where(mask[..., None], x, 1e3), mask)
    for row, count in enumerate((7, 4, 1)):
        torch.testing.assert_close(padded[row, :count], made(x[row : row + 1, :count])[0])
        assert torch.equal(padded[row, count:], torch.zeros(7 - count, 6, dtype=torch.float64))


@pytest.mark.parametrize("step", ["published", "eq10"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_causal_token_sees_only_those_before(step, masked):
    x, made = draw(1, 6, 6), tied(draw(2, 6, 3, seed=1), step, causal=True)
    other = x.clone()
    other[:, 4:] += 1
    mask = torch.ones(1, 6, dtype=torch.bool) if masked else None
    torch.testing.assert_close(made(x, mask)[:, :4], made(other, mask)[:, :4])
    assert (made(x, mask)[:, 4:] - made(other, mask)[:, 4:]).abs().min() > 1e-4


@pytest.mark.parametrize(("n_steps", "nonneg"), [(1, True), (3, True), (3, False)])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_short_enough_sparse_step_lowers_its_objective(n_steps, nonneg, seed):
    y = draw(5, 8, seed=seed)
    y = y.abs() if nonneg else y
    made = SparsifyingISTA(8, eta=0.05, lambd=0.3, n_steps=n_steps, nonneg=nonneg, dtype=torch.float64)
    with torch.no_grad():
        made.weight.mul_(4 / torch.linalg.matrix_norm(made.weight, 2))

        def objective(z):
            return 0.5 * (y - z @ made.weight.T).square().sum(-1) + 0.3 * z.abs().sum(-1)

        assert (objective(made(y)) < objective(y)).all()


# oracles


def literal_attention(x, W, V, b, scale):
    """The heads one by one, the softmax written out, as the authors' code does."""
    heads = []
    for U in W:
        w = x @ U.T
        logits = scale * w @ w.T
        weights = torch.exp(logits - logits.max(1, keepdim=True).values)
        heads.append(weights / weights.sum(1, keepdim=True) @ w)
    return torch.cat(heads, 1) if V is None else torch.cat(heads, 1) @ V.T + b


@pytest.mark.parametrize("scale", ["sqrt", 1.0, 3])
def test_published_attention_agrees_with_a_literal_twin(scale):
    made = SubspaceSelfAttention(8, 3, 4, scale=scale, dtype=torch.float64)
    x = draw(2, 5, 8)
    W = made.projection.weight.unflatten(0, (3, 4))
    factor = 0.5 if scale == "sqrt" else scale
    for row in range(2):
        expected = literal_attention(x[row], W, made.output.weight, made.output.bias, factor)
        torch.testing.assert_close(made(x)[row], expected)
    maps = made.attention_map(x)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    heads = (maps @ made.project(x)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(made.output(heads), made(x))


def test_a_single_head_of_full_width_needs_no_way_back():
    made = SubspaceSelfAttention(6, 1, dtype=torch.float64)
    x = draw(1, 4, 6)
    assert [name for name, _ in made.named_parameters()] == ["projection.weight"]
    torch.testing.assert_close(made(x)[0], literal_attention(x[0], made.projection.weight[None], None, 0, 6**-0.5))


def test_the_step_of_equation_ten_is_a_mean_of_tokens_and_attention():
    U, x = bases(8, 2, 4), draw(1, 5, 8)
    mssa = tied(U, "published")(x)
    torch.testing.assert_close(x + tied(U, "eq10", step_size=0.3)(x), 0.7 * x + 0.3 * mssa)


def literal_ista(y, D, eta, lambd):
    """Three products, as the authors' code has them."""
    return F.relu(y + eta * (y @ D - (y @ D.T) @ D) - eta * lambd)


def test_the_sparse_step_agrees_with_the_literal_three_products():
    made, y = SparsifyingISTA(8, eta=0.2, lambd=0.4, dtype=torch.float64), draw(3, 4, 8)
    torch.testing.assert_close(made(y), literal_ista(y, made.weight, 0.2, 0.4))


@pytest.mark.parametrize("nonneg", [False, True])
@torch.no_grad()
def test_many_sparse_steps_reach_the_lasso_of_scikit_learn(nonneg):
    from sklearn.linear_model import Lasso

    generator = torch.Generator().manual_seed(0)
    made = SparsifyingISTA(6, 10, 0.05, 0.2, 3000, nonneg, generator=generator, dtype=torch.float64)
    y, D = draw(6), made.weight.numpy()
    assert np.linalg.norm(D, 2) ** 2 < 1 / 0.05
    lasso = Lasso(alpha=0.2 / 6, fit_intercept=False, tol=1e-10, max_iter=100_000, positive=nonneg).fit(D, y.numpy())
    np.testing.assert_allclose(made.codes(y).numpy(), lasso.coef_, atol=1e-6)
    torch.testing.assert_close(made(y), made.codes(y) @ made.readout.weight.T)


def test_a_block_is_its_two_halves_and_the_decoder_takes_attention_away():
    x = draw(2, 5, 8)
    block = CRATEBlock(8, 2, dtype=torch.float64)
    h = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(block(x), literal_ista(block.ista_norm(h), block.ista.weight, 0.1, 0.1))
    assert (block(x) >= 0).all()
    mirror = CRATEDecoderBlock(8, 2, dtype=torch.float64)
    y = mirror.synthesis_norm(x) @ mirror.synthesis.weight.T
    torch.testing.assert_close(mirror(x), y - mirror.attention(mirror.attention_norm(y)))


def test_a_residual_block_adds_the_read_out_to_the_compressed_tokens():
    x = draw(2, 5, 8)
    block = CRATEBlock(8, 2, dict_size=16, residual=True, n_steps=2, step="eq10", dtype=torch.float64)
    h = block.attention_norm(x) + block.attention(block.attention_norm(x))
    torch.testing.assert_close(block(x), h + block.ista(block.ista_norm(h)))
    y = draw(3, 8)
    step = SparsifyingISTA(8, residual=True, dtype=torch.float64)
    torch.testing.assert_close(step(y), y + step.codes(y))


# what the steps do


def test_the_published_step_makes_tokens_longer_and_so_raises_the_rate_that_it_should_lower():
    Z, U = union()
    start = rate_within(Z, U, 0.25)
    made = tied(U, "published", scale=1.0, step_size=8 / (96 * 0.25))
    with torch.no_grad():
        for _ in range(6):
            Z = Z + made(Z)
    assert rate_within(Z, U, 0.25) > 1.2 * start


def test_at_one_length_the_published_step_is_that_of_equation_ten_and_collapses_the_whole():
    Z, U = union()
    within, whole = rate_within(Z, U, 0.25), coding_rate(Z, 0.5)
    published, ten = tied(U, "published", scale=1.0), tied(U, "eq10", scale=1.0)
    with torch.no_grad():
        for _ in range(6):
            moved = F.normalize(Z + published(Z), dim=-1)
            torch.testing.assert_close(F.normalize(Z + ten(Z), dim=-1), moved)
            Z = moved
    assert rate_within(Z, U, 0.25) < 0.6 * within
    assert coding_rate(Z, 0.5) < 0.3 * whole


@pytest.mark.parametrize(("step", "kept"), [("eq10", False), ("exact", False), ("exact", True)])
def test_the_other_steps_lower_it_and_only_a_normalised_one_keeps_the_whole(step, kept):
    Z, U = union()
    within, whole = rate_within(Z, U, 0.25), coding_rate(Z, 0.5)
    made = tied(U, step, scale=1.0, eps2=0.25)
    with torch.no_grad():
        for _ in range(12):
            Z = Z + made(Z)
            Z = F.normalize(Z, dim=-1) if kept else Z
    assert rate_within(Z, U, 0.25) < 0.25 * within
    assert (coding_rate(Z, 0.5) > 0.8 * whole) == kept


# degenerate cases and bad input


@pytest.mark.parametrize("step", ["published", "eq10", "exact"])
def test_a_batch_without_any_token_moves_nothing_and_has_gradients(step):
    made = tied(bases(8, 2, 4), step)
    x = draw(2, 5, 8).requires_grad_()
    out = made(x, torch.zeros(2, 5, dtype=torch.bool))
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("step", ["published", "eq10", "exact"])
def test_half_precision_and_autocast_stay_near_float32(step):
    made = SubspaceSelfAttention(16, 2, step=step, generator=torch.Generator().manual_seed(0))
    x = draw(2, 5, 16).float()
    expected = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(x).float(), expected, atol=0.05, rtol=0.05)
    narrow = made.to(torch.bfloat16)(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, atol=0.05, rtol=0.05)


def test_a_zero_token_stays_finite_with_its_gradients():
    block = CRATEBlock(8, 2, step="exact", dtype=torch.float64)
    x = torch.zeros(1, 4, 8, dtype=torch.float64, requires_grad=True)
    block(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_dropout_acts_in_training_only():
    x = draw(4, 6, 8).float()
    for step in ("published", "exact"):
        made = SubspaceSelfAttention(8, 2, step=step, dropout=0.5)
        assert not torch.equal(made(x), made(x))
        made.eval()
        assert torch.equal(made(x), made(x))


def test_a_generator_makes_the_weights_and_the_global_one_stays():
    state = torch.random.get_rng_state()
    made = [CRATEBlock(8, 2, dict_size=9, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    decoders = [CRATEDecoderBlock(8, 2, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(decoders[0].parameters(), decoders[1].parameters(), strict=True))
    assert not torch.equal(made[0].ista.weight, made[2].ista.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim=8 where head_dim is not given, got 3"),
        ({"num_heads": 0}, "dim and num_heads must be at least 1, got 8 and 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"step": "eq9"}, "step must be one of .* got 'eq9'"),
        ({"scale": "cube"}, "scale must be 'sqrt' or a positive number, got 'cube'"),
        ({"scale": 0.0}, "scale must be 'sqrt' or a positive number, got 0.0"),
        ({"step": "exact", "causal": True}, "causal must be False with step='exact'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"eps2": 0.0}, "eps2 must be positive and finite, got 0.0"),
        ({"step_size": -1.0}, "step_size must be positive and finite, got -1.0"),
    ],
)
def test_attention_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SubspaceSelfAttention(**({"dim": 8, "num_heads": 2} | options))


def test_attention_refuses_no_tokens():
    with pytest.raises(ValueError, match=r"x must hold at least one token, got shape \(2, 0, 8\)"):
        SubspaceSelfAttention(8, 2)(torch.zeros(2, 0, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dict_size": 4}, "dict_size must be at least dim=8, which must be at least 1, got 4"),
        ({"eta": 0.0}, "eta must be positive and lambd at least 0, both finite, got 0.0 and 0.1"),
        ({"lambd": -1.0}, "eta must be positive and lambd at least 0, both finite, got 0.1 and -1.0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
    ],
)
def test_sparse_step_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SparsifyingISTA(8, **options)
