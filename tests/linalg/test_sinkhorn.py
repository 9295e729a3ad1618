from importlib import import_module

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from polyspan.errors import NotConverged
from polyspan.linalg import doubly_stochastic, sinkhorn

KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
IMPLICIT = pytest.mark.parametrize("implicit", [False, True], ids=["unrolled", "implicit"])
TIGHT = {"tol": 1e-14, "max_iter": 5000}


def problem(n=7, m=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, m)), rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))


def symmetric(n=6, seed=0):
    scores = np.random.default_rng(seed).normal(size=(n, n))
    return (scores + scores.T) / 2


def tensor(x):
    return torch.from_numpy(np.asarray(x, dtype=np.float64)).requires_grad_()


@KINDS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_python_optimal_transport(kind, dtype):
    scores, r, c = problem()
    theirs = ot.sinkhorn(r, c, -scores, 0.3, stopThr=1e-15, numItermax=100000)
    found = sinkhorn(*(kind(x.astype(dtype)) for x in (scores, r, c)), temperature=0.3, tol=1e-12)
    assert found.dtype == kind(scores.astype(dtype)).dtype
    np.testing.assert_allclose(np.asarray(found), theirs, atol=1e-5 if dtype == np.float32 else 1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(1, 8), seed=st.integers(0, 10**6), shift=st.floats(-1e3, 1e3))
def test_sums_are_met_and_potentials_absorb_what_is_added_to_rows_and_columns(n, m, seed, shift):
    scores, r, c = problem(n, m, seed)
    plan = sinkhorn(scores, r, c, tol=1e-10)
    np.testing.assert_allclose(plan.sum(axis=1), r, atol=1e-12)
    np.testing.assert_allclose(plan.sum(axis=0), c, atol=1e-9)
    moved = sinkhorn(scores + shift * r[:, None] - shift * c, r, c, tol=1e-10)
    np.testing.assert_allclose(moved, plan, atol=1e-8)
    np.testing.assert_allclose(sinkhorn(3 * scores, r, c, temperature=3.0, tol=1e-10), plan, atol=1e-12)
    np.testing.assert_allclose(sinkhorn(scores.T, c, r, tol=1e-12).T, plan, atol=1e-8)


@KINDS
def test_sums_are_uniform_unless_given(kind):
    scores, r, c = problem()
    for given_row, given_col, row, col in (
        (None, None, np.full(7, 1 / 7), np.full(5, 1 / 5)),
        (3 * r, None, 3 * r, np.full(5, 3 / 5)),
        (None, 2 * c, np.full(7, 2 / 7), 2 * c),
    ):
        sums = [None if x is None else kind(x) for x in (given_row, given_col)]
        plan = np.asarray(sinkhorn(kind(scores), *sums, tol=1e-12))
        np.testing.assert_allclose(plan.sum(axis=1), row, atol=1e-11)
        np.testing.assert_allclose(plan.sum(axis=0), col, atol=1e-11)


@KINDS
@IMPLICIT
def test_batches_equal_loops(kind, implicit):
    scores = np.random.default_rng(0).normal(size=(2, 3, 6, 4))
    r = np.random.default_rng(1).dirichlet(np.ones(6), size=(2, 3))
    plans = np.asarray(sinkhorn(kind(scores), kind(r), tol=1e-13, implicit=implicit))
    square = scores[..., :4, :] + scores[..., :4, :].swapaxes(-1, -2)
    gammas = np.asarray(doubly_stochastic(kind(square), tol=1e-13, implicit=implicit))
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(plans[i, j], sinkhorn(scores[i, j], r[i, j], tol=1e-13), atol=1e-11)
            np.testing.assert_allclose(gammas[i, j], doubly_stochastic(square[i, j], tol=1e-13), atol=1e-11)


def test_without_tolerance_exactly_the_rounds_asked_for_are_run():
    scores, r, c = problem()
    literal = np.exp(scores / 0.1)
    for _ in range(3):
        literal *= c / literal.sum(axis=0)
        literal *= (r / literal.sum(axis=1))[:, None]
    np.testing.assert_allclose(sinkhorn(scores, r, c, temperature=0.1, max_iter=3, tol=None), literal, rtol=1e-12)
    np.testing.assert_allclose(literal.sum(axis=1), r)


def test_a_huge_range_of_scores_neither_overflows_nor_loses_mass():
    scores, r, c = problem()
    for dtype, tol in ((np.float64, 1e-9), (np.float32, 1e-2)):
        plan = sinkhorn(*(x.astype(dtype) for x in (1e3 * scores, r, c)), max_iter=20000)
        assert np.isfinite(plan).all()
        np.testing.assert_allclose(plan.sum(axis=1), r, rtol=tol)
    best = ot.emd(r, c, -scores)
    np.testing.assert_allclose(
        sinkhorn(scores, r, c, temperature=1e-3, start_temperature=1.0, max_iter=20000, must_converge=True),
        best,
        atol=1e-4,
    )


def test_starting_hotter_needs_fewer_rounds_and_gives_the_same_plan():
    scores, r, c = problem(30, 20)
    asked = {"temperature": 0.01, "tol": 1e-6, "must_converge": True}
    with pytest.raises(
        NotConverged, match=r"columns still miss their sums by \d\.\de-\d\d of the total after 1000 rounds"
    ):
        sinkhorn(scores, r, c, max_iter=1000, **asked)
    cold = sinkhorn(scores, r, c, max_iter=20000, **asked)
    warm = sinkhorn(scores, r, c, max_iter=20000, start_temperature=2.0, **asked)
    np.testing.assert_allclose(warm, cold, atol=1e-5)


@KINDS
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_computed_wider(kind, name):
    scores = torch.from_numpy(problem()[0]).to(getattr(torch, name)) * 100
    if kind is np.asarray:
        if name == "bfloat16":
            return
        scores = scores.numpy()
    plan = sinkhorn(scores, temperature=0.5)
    assert plan.dtype == scores.dtype
    sums = np.asarray(plan.sum(axis=1).tolist())
    np.testing.assert_allclose(sums, np.full(7, 1 / 7), rtol=0.01)


@IMPLICIT
def test_gradient_is_true_at_a_generic_point_for_scores_sums_and_temperature(implicit):
    scores, r, c = problem(4, 3)

    def plan(K, a, b, t):
        return sinkhorn(K, a.softmax(0), b.softmax(0), temperature=t.exp(), implicit=implicit, **TIGHT)

    assert gradcheck(plan, (tensor(scores), tensor(np.log(r)), tensor(np.log(c)), tensor(-0.5)), atol=1e-6)
    assert gradcheck(lambda K: sinkhorn(K.mT, implicit=implicit, **TIGHT), (tensor(scores),), atol=1e-6)


@IMPLICIT
def test_gradient_is_finite_and_true_at_a_permutation_at_a_constant_and_with_forbidden_pairs_and_empty_rows(implicit):
    ones = torch.ones(3, dtype=torch.float64)
    sharp = tensor(np.eye(3) + 0.1 * np.random.default_rng(0).normal(size=(3, 3)))

    def plan(K, temperature=1.0, row=ones, col=ones, forbidden=None):
        K = K if forbidden is None else K.masked_fill(torch.tensor(forbidden, dtype=torch.bool), -torch.inf)
        return sinkhorn(K, row, col, temperature=temperature, implicit=implicit, tol=1e-14, max_iter=250)

    for point, temperature in ((sharp, 0.01), (sharp, 0.3), (tensor(np.zeros((3, 3))), 1.0)):
        assert gradcheck(lambda K, t=temperature: plan(K, t), (point,), atol=1e-6)
    uneven = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    assert gradcheck(
        lambda K: plan(K, row=uneven, col=ones / 3, forbidden=[[0, 1, 0], [0] * 3, [0] * 3]), (sharp,), atol=1e-6
    )
    row, col = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.5, 0.5], [1.0, 0.6, 0.4]))
    blocks = [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert gradcheck(lambda K: plan(K, row=row, col=col, forbidden=blocks), (sharp,), atol=1e-6)


def test_implicit_gradient_equals_the_unrolled_one():
    scores, r, c = problem(30, 20)
    weights = torch.from_numpy(problem(30, 20, seed=1)[0])
    found = []
    for implicit in (False, True):
        K = tensor(scores)
        plan = sinkhorn(K, torch.from_numpy(r), torch.from_numpy(c), temperature=0.2, implicit=implicit, **TIGHT)
        (plan * weights).sum().backward()
        found.append(K.grad.numpy())
    np.testing.assert_allclose(found[1], found[0], atol=1e-10)
    assert np.abs(found[0]).max() > 1e-3


@IMPLICIT
def test_second_derivatives_are_true(implicit):
    scores, r, c = (torch.from_numpy(x) for x in problem(3, 3))
    f = lambda K: sinkhorn(K, r, c, implicit=implicit, **TIGHT)  # noqa: E731
    assert gradgradcheck(f, (tensor(scores),), atol=1e-5)
    g = lambda K: doubly_stochastic((K + K.mT) / 2, implicit=implicit, **TIGHT)  # noqa: E731
    assert gradgradcheck(g, (tensor(symmetric(3)),), atol=1e-5)


@pytest.mark.parametrize("tol", [None, 1e-12])
def test_exponentials_taken_once_and_in_every_round_agree_with_their_gradients(monkeypatch, tol):
    found = []
    for narrow in (1e9, 0.0):
        monkeypatch.setattr(import_module("polyspan.linalg.sinkhorn"), "_NARROW", narrow)
        K = tensor(symmetric(9, seed=3) + 40)
        plan = doubly_stochastic(K, temperature=0.3, tol=tol, max_iter=500)
        (plan**2).sum().backward()
        found.append((plan.detach().numpy(), K.grad.numpy()))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-13)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-12)


@KINDS
def test_a_range_of_scores_too_wide_for_exponentials_is_met(kind):
    scores = symmetric(6, seed=1) * 20
    assert np.ptp(scores) > 40
    found = np.asarray(doubly_stochastic(kind(scores), tol=1e-10, max_iter=20_000))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-8)


@KINDS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_symmetric_projection_is_symmetric_doubly_stochastic_and_equals_the_general_one(kind, dtype):
    scores = symmetric().astype(dtype)
    found = doubly_stochastic(kind(scores), temperature=0.3, tol=1e-12)
    assert found.dtype == kind(scores).dtype
    found = np.asarray(found)
    tol = 1e-5 if dtype == np.float32 else 1e-11
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found.sum(axis=1), np.ones(6), atol=tol)
    general = doubly_stochastic(kind(scores), temperature=0.3, symmetric=False, tol=1e-12)
    np.testing.assert_allclose(found, np.asarray(general), atol=tol)
    theirs = ot.sinkhorn(np.ones(6), np.ones(6), -symmetric(), 0.3, stopThr=1e-15, numItermax=100000)
    np.testing.assert_allclose(found, theirs, atol=tol)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 10), seed=st.integers(0, 10**6))
def test_symmetric_projection_follows_a_permutation_and_ignores_a_potential(n, seed):
    scores = symmetric(n, seed)
    rng = np.random.default_rng(seed)
    order, potential = rng.permutation(n), rng.normal(size=n)
    base = doubly_stochastic(scores, tol=1e-12)
    np.testing.assert_allclose(
        doubly_stochastic(scores[np.ix_(order, order)], tol=1e-12), base[np.ix_(order, order)], atol=1e-10
    )
    moved = scores + potential[:, None] + potential
    np.testing.assert_allclose(doubly_stochastic((moved + moved.T) / 2, tol=1e-12), base, atol=1e-10)


@IMPLICIT
def test_symmetric_gradient_is_true_at_generic_constant_identity_and_two_sided_points(implicit):
    def f(K, temperature=0.5):
        return doubly_stochastic((K + K.mT) / 2, temperature=temperature, implicit=implicit, **TIGHT)

    two_sided = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    for point in (symmetric(4), np.zeros((3, 3)), 40 * np.eye(3)):
        assert gradcheck(f, (tensor(point),), atol=1e-6)
    split = lambda K: f(K.masked_fill(two_sided == 0, -torch.inf))  # noqa: E731
    assert gradcheck(split, (tensor(symmetric(4)),), atol=1e-6)
    K = tensor(symmetric(4))
    (doubly_stochastic(K, implicit=implicit) ** 2).sum().backward()
    np.testing.assert_allclose(K.grad, K.grad.mT, atol=1e-14)


def test_symmetric_implicit_gradient_equals_the_unrolled_one():
    weights, found = torch.from_numpy(problem(25, 25, seed=1)[0]), []
    for implicit in (False, True):
        K = tensor(symmetric(25))
        (doubly_stochastic(K, temperature=0.3, implicit=implicit, **TIGHT) * weights).sum().backward()
        found.append(K.grad.numpy())
    np.testing.assert_allclose(found[1], found[0], atol=1e-10)


@KINDS
def test_a_forbidden_pair_gets_nothing_and_an_empty_row_stays_empty(kind):
    scores, r, c = problem(4, 3)
    scores[0, 1] = -np.inf
    scores[1] = -np.inf
    r[1] = 0
    r /= r.sum()
    plan = np.asarray(sinkhorn(kind(scores), kind(r), kind(c), tol=1e-12))
    assert plan[0, 1] == 0
    np.testing.assert_array_equal(plan[1], np.zeros(3))
    np.testing.assert_allclose(plan.sum(axis=1), r, atol=1e-14)
    np.testing.assert_allclose(plan.sum(axis=0), c, atol=1e-10)


def test_an_impossible_pattern_does_not_converge_and_says_so():
    scores = np.array([[0, -np.inf, -np.inf], [0, -np.inf, -np.inf], [0, 0, 0]])
    with pytest.raises(NotConverged, match="columns still miss their sums"):
        sinkhorn(scores, must_converge=True)
    star = np.array([[0, 0, 0], [0, -np.inf, -np.inf], [0, -np.inf, -np.inf]])
    with pytest.raises(NotConverged, match=r"a row still misses the sum of 1 by \S+ after 50 rounds, tol=1e-06"):
        doubly_stochastic(star, max_iter=50, must_converge=True)


def test_arguments_that_make_no_sense_are_named():
    scores, r, c = problem()
    for args, options, message in (
        ((scores[0],), {}, r"scores must hold non-empty matrices \(\*b, n, m\), got shape \(5,\)"),
        ((np.where(scores > 1, np.nan, scores),), {}, "scores must be finite or -inf"),
        ((np.where(scores > 1, np.inf, scores),), {}, "scores must be finite or -inf"),
        (
            (np.where(np.arange(7)[:, None] == 2, -np.inf, scores),),
            {},
            "scores forbid every pair of a row that needs mass",
        ),
        ((np.where(np.arange(5) == 2, -np.inf, scores),), {}, "scores forbid every pair of a column that needs mass"),
        ((scores, r, 2 * c), {}, "row and col must have one total, got 1 and 2"),
        ((scores, -r, c), {}, "row must hold finite sums that are not negative"),
        ((scores, r, r), {}, r"col must have shape \(5,\) or \(5,\), got \(7,\)"),
        ((scores, 0 * r), {}, "row and col must hold some mass"),
        ((scores,), {"temperature": 0.0}, r"temperature must be positive and finite, got 0\.0"),
        ((scores,), {"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ((scores,), {"tol": -1.0}, "tol must not be negative, got -1.0"),
        ((scores,), {"tol": None, "must_converge": True}, "must_converge needs a tol, got None"),
        ((scores,), {"start_temperature": 0.5}, "start_temperature must be at least temperature=1.0, a float, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn(*args, **options)
    with pytest.raises(TypeError, match="expected arrays of one kind"):
        sinkhorn(torch.from_numpy(scores), r, c)
    with pytest.raises(ValueError, match="scores must be symmetric; use symmetric=False"):
        doubly_stochastic(scores[:5])
    with pytest.raises(ValueError, match=r"scores must hold square matrices \(\*b, n, n\), got shape \(7, 5\)"):
        doubly_stochastic(scores)
    with pytest.raises(ValueError, match="scores must be finite or -inf"):
        doubly_stochastic(np.full((2, 2), np.nan))
