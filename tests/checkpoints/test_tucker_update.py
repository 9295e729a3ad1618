"""Updates of weights as a core and factors: expanded, extracted, and their ranks chosen."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.checkpoints import adapter_from_delta, tucker_delta, tucker_ranks
from polyspan.checkpoints._tucker import num_parameters, tucker
from polyspan.run import torch_generator


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch_generator(seed), dtype=dtype)


def literal(core, factors, scale):
    """The formula for a kernel, index by index."""
    sizes = [f.shape[0] for f in factors]
    made = torch.zeros(sizes, dtype=core.dtype)
    for target in np.ndindex(*sizes):
        for source in np.ndindex(*core.shape):
            term = core[source]
            for n in range(core.ndim):
                term = term * factors[n][target[n], source[n]]
            made[target] += scale * term
    return made


@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_expanding_equals_the_formula_and_extraction_at_full_rank_gives_it_back(shape, seed):
    core = draw(*[max(1, n - 1) for n in shape], seed=seed)
    factors = [draw(n, j, seed=seed + i) for i, (n, j) in enumerate(zip(shape, core.shape, strict=True))]
    delta = tucker_delta(core, factors, 0.5)
    torch.testing.assert_close(delta, literal(core, factors, 0.5))
    found = adapter_from_delta(delta, list(core.shape), scale=2.0)
    torch.testing.assert_close(tucker_delta(found.core, found.factors, found.scale), delta, rtol=1e-6, atol=1e-6)
    assert found.error < 1e-9


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_extraction_is_at_least_as_exact_as_the_hosvd_and_its_error_is_what_it_says(seed):
    delta, ranks = draw(6, 5, 3, 3, seed=seed), (3, 2, 2, 3)
    start, found = (adapter_from_delta(delta, ranks, max_iter=n) for n in (0, 50))
    assert found.error <= start.error + 1e-12
    left = (delta - tucker_delta(found.core, found.factors, found.scale)).square().sum() / delta.square().sum()
    assert float(left) == pytest.approx(found.error, abs=1e-10)
    for factor in found.factors:
        size = factor.shape[0] / (2 * factor.shape[1])
        torch.testing.assert_close(factor.T @ factor, size * torch.eye(factor.shape[1], dtype=factor.dtype))


def test_of_a_matrix_the_extraction_is_the_truncated_svd():
    delta = draw(9, 6)
    s = torch.linalg.svdvals(delta)
    assert adapter_from_delta(delta, 2).error == pytest.approx(
        float(s[2:].square().sum() / s.square().sum()), abs=1e-10
    )


def test_extraction_agrees_with_a_search_from_many_starts():
    """A literal alternating search from random bases finds nothing better than what begins at the HOSVD."""
    delta, ranks = draw(5, 4, 3), (2, 2, 2)
    best = 1.0
    for seed in range(20):
        bases = [torch.linalg.qr(draw(n, 2, seed=seed + 10 * i))[0] for i, n in enumerate((5, 4, 3))]
        for _ in range(60):
            for n, spec in enumerate(("ijk,jb,kc->ibc", "ijk,ia,kc->jac", "ijk,ia,jb->kab")):
                others = [b for m, b in enumerate(bases) if m != n]
                left = torch.einsum(spec, delta, *others).flatten(1)
                bases[n] = torch.linalg.svd(left)[0][:, : ranks[n]]
        kept = torch.einsum("ijk,ia,jb,kc->abc", delta, *bases).square().sum() / delta.square().sum()
        best = min(best, 1 - float(kept))
    assert tucker(delta, ranks).error <= best + 1e-6


def test_the_ranks_advised_are_the_best_of_all_and_planted_ranks_are_found():
    delta = tucker_delta(draw(2, 3, 1, 2), [draw(n, j, seed=n) for n, j in ((7, 2), (6, 3), (3, 1), (4, 2))])
    assert tucker_ranks(delta, error=1e-9) == (2, 3, 1, 2)
    noisy = delta + 0.3 * delta.std() * draw(*delta.shape, seed=5)
    budget, chosen = 60, tucker_ranks(noisy, parameters=60)
    assert num_parameters(noisy.shape, chosen) <= budget
    error = tucker(noisy, chosen, max_iter=0).error
    every = [
        tucker(noisy, [i + 1 for i in ranks], max_iter=0).error
        for ranks in np.ndindex(*noisy.shape)
        if num_parameters(noisy.shape, [i + 1 for i in ranks]) <= budget
    ]
    assert error <= min(every) + 1e-9
    allowed = tucker_ranks(noisy, error=0.3)
    assert tucker(noisy, allowed, max_iter=0).error <= 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tucker_delta(draw(2, 2), [draw(3, 2)]), "factors must be one for each of the 2 axes of core, got 1"),
        (lambda: tucker_delta(draw(2, 2), [draw(3, 2), draw(3, 3)]), r"factors\[1\] must be \(size, 2\)"),
        (lambda: adapter_from_delta(draw(4), 1), r"at least 2 axes, got shape \(4,\)"),
        (lambda: adapter_from_delta(draw(0, 3), 1), r"must not be empty, got shape \(0, 3\)"),
        (lambda: adapter_from_delta(torch.ones(3, 3, dtype=torch.int64), 1), "floating-point numbers, got torch.int64"),
        (lambda: adapter_from_delta(draw(3, 3) * math.nan, 1), "delta must be finite"),
        (lambda: adapter_from_delta(draw(3, 3), 0), "ranks must be at least 1, got 0"),
        (lambda: adapter_from_delta(draw(3, 3), [1]), r"one for each axis of shape \(3, 3\), got \(1,\)"),
        (lambda: adapter_from_delta(draw(3, 3), [4, None]), r"ranks\[0\] must be between 1 and 3, got 4"),
        (lambda: adapter_from_delta(draw(3, 3), 1, scale=0.0), "scale must be finite and not 0, got 0.0"),
        (lambda: adapter_from_delta(draw(3, 3), 1, max_iter=-1), "max_iter must be at least 0, got -1"),
        (lambda: tucker_ranks(draw(3, 3)), "exactly one of error and parameters"),
        (lambda: tucker_ranks(draw(3, 3), error=1.0), r"error must be in \[0, 1\), got 1.0"),
        (lambda: tucker_ranks(draw(3, 3), parameters=6), r"parameters must be at least 7 for shape \(3, 3\), got 6"),
    ],
)
def test_a_wrong_argument_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_update_of_zeros_or_of_one_entry_is_extracted_without_harm():
    found = adapter_from_delta(torch.zeros(4, 3, 2), 2)
    assert found.error == 0
    assert not tucker_delta(found.core, found.factors, found.scale).any()
    assert tucker_ranks(torch.zeros(4, 3), error=0.0) == (1, 1)
    single = adapter_from_delta(torch.full((1, 1), 3.0), 1)
    assert float(tucker_delta(single.core, single.factors, single.scale)) == pytest.approx(3.0)
    assert single.core.dtype == torch.float32
