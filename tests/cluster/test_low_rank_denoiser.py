import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.cluster import LowRankDenoiser, LowRankGaussianMixture, denoising_loss, noise_levels, sample_edm
from polyspan.run import torch_generator
from polyspan.testing import ModuleCase, check_module

WIDE = torch.float64


def bases(K=3, D=12, d=4, seed=0):
    return torch.linalg.qr(torch.randn(K, D, d, generator=torch_generator(seed), dtype=WIDE))[0]


def general(seed=0, *, K=3, D=12, d=4, noise=0.0, dtype=WIDE, device=None):
    g = torch_generator(seed)
    spectra = torch.rand(K, d, generator=g, dtype=WIDE) + 0.3
    means = torch.randn(K, D, generator=g, dtype=WIDE)
    weights = torch.softmax(torch.randn(K, generator=g, dtype=WIDE), 0)
    white = torch.full((K,), noise, dtype=WIDE)
    return LowRankDenoiser(
        bases(K, D, d, seed), spectra, means, weights, noise_variance=white, device=device, dtype=dtype
    )


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_module_contract(noise):
    def inputs(batch, g):
        return torch.randn(batch, 12, generator=g), torch.rand(batch, generator=g) + 0.2

    check_module(ModuleCase(lambda **kw: general(noise=noise, **kw), inputs))


def brute_force(m, x, sigma, s):
    """Posterior mean by dense Gaussian algebra, one row at a time."""
    K, D, _ = m.bases.shape
    out = torch.zeros_like(x)
    for i, (row, g, scale) in enumerate(zip(x, sigma, s, strict=True)):
        logs, guesses = [], []
        for k in range(K):
            prior = m.bases[k] * m.spectra[k] @ m.bases[k].T + m.noise_variance[k] * torch.eye(D, dtype=WIDE)
            cov = scale**2 * prior + g**2 * torch.eye(D, dtype=WIDE)
            gap = row - scale * m.means[k]
            half = torch.linalg.solve(cov, gap)
            logs.append(m.log_weights[k] - 0.5 * (gap @ half + torch.logdet(cov)))
            guesses.append(m.means[k] + scale * prior @ half)
        out[i] = torch.softmax(torch.stack(logs), 0) @ torch.stack(guesses)
    return out


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), noise=st.sampled_from([0.0, 0.1]), K=st.integers(1, 3), d=st.integers(1, 5))
def test_the_answer_is_the_posterior_mean_of_dense_algebra(seed, noise, K, d):
    m, g = general(seed, K=K, D=7, d=d, noise=noise), torch_generator(seed)
    x = torch.randn(5, 7, generator=g, dtype=WIDE)
    sigma, s = torch.rand(5, generator=g, dtype=WIDE) + 0.05, torch.rand(5, generator=g, dtype=WIDE) * 2
    torch.testing.assert_close(m(x, sigma, s), brute_force(m, x, sigma, s), atol=1e-9, rtol=1e-9)


def test_the_special_case_of_unit_spectra_is_that_of_the_theorem():
    U, s, g = bases(2), 0.8, 0.5
    m, x = LowRankDenoiser(U, dtype=WIDE), torch.randn(6, 12, generator=torch_generator(0), dtype=WIDE)
    inside = torch.einsum("kdi,nd->nki", U, x)
    phi = s**2 / (2 * g**2 * (s**2 + g**2))
    w = torch.softmax(phi * inside.square().sum(-1), -1)
    expected = s / (s**2 + g**2) * torch.einsum("nk,kdi,nki->nd", w, U, inside)
    torch.testing.assert_close(m(x, g, s), expected)


def test_components_of_lower_rank_have_columns_of_zeros():
    U = bases(2, 9, 3)
    U[1, :, 2] = 0
    m = LowRankDenoiser(U, dtype=WIDE)
    assert m.spectra[1].tolist() == [1, 1, 0]
    x = torch.randn(4, 9, generator=torch_generator(0), dtype=WIDE)
    torch.testing.assert_close(m(x, 0.4), brute_force(m, x, torch.full((4,), 0.4), torch.ones(4)))


def test_limits_of_scale_and_noise():
    m = general(1)
    x = torch.randn(4, 12, generator=torch_generator(0), dtype=WIDE)
    prior = (m.log_weights.exp()[:, None] * m.means).sum(0)
    torch.testing.assert_close(m(x, 1.0, 0.0), prior.expand(4, 12))
    torch.testing.assert_close(m(x, 1e8), prior.expand(4, 12), atol=1e-6, rtol=0)
    # Without noise the answer is the nearest point of one affine subspace, at a level where float32 has no digits left.
    k = 1
    on = m.means[k] + torch.randn(4, 4, generator=torch_generator(1), dtype=WIDE) @ m.bases[k].T
    torch.testing.assert_close(m(on, 1e-5), on, atol=1e-8, rtol=0)
    torch.testing.assert_close(m(on.float(), 1e-5), on.float(), atol=1e-5, rtol=0)
    halves = m(on.half(), 0.3)
    assert halves.dtype == torch.float16
    torch.testing.assert_close(halves.double(), m(on, 0.3), atol=5e-3, rtol=0)


def test_hard_weights_come_from_the_clean_row():
    U, x = bases(2), torch.randn(5, 12, generator=torch_generator(0), dtype=WIDE)
    m = LowRankDenoiser(U, dtype=WIDE)
    clean = torch.randn(5, 12, generator=torch_generator(1), dtype=WIDE)
    best = torch.einsum("kdi,nd->nki", U, clean).square().sum(-1).argmax(-1)
    expected = torch.einsum("ndi,nei,ne->nd", U[best], U[best], x) / (1 + 0.5**2)
    torch.testing.assert_close(m(x, 0.5, clean=clean), expected)


@pytest.mark.parametrize("K", [1, 2])
def test_the_loss_with_hard_weights_is_a_constant_less_a_multiple_of_the_squares_held(K):
    """So its least is that of PCA (K = 1) and of K-subspaces (K = 2)."""
    X, draws = torch.randn(60, 8, generator=torch_generator(0), dtype=WIDE), 300
    t = 0.01 + 0.98 * torch.rand(60 * draws, generator=torch_generator(1), dtype=WIDE)
    v = (t / (1 - t)) ** 2
    weight, kept = ((1 + v) / v), 1 / (1 + v)
    twin = LowRankGaussianMixture(K, 2, algorithm="ksubspaces", init="random", center=False, random_state=0)
    losses = []
    for U in (torch.as_tensor(twin.fit(X.numpy()).bases_), *(bases(K, 8, 2, seed) for seed in range(6))):
        inside = torch.einsum("kdi,nd->nki", U, X).square().sum(-1).max(dim=1).values.repeat(draws)
        loss = denoising_loss(LowRankDenoiser(U, dtype=WIDE), X, n_draws=draws, hard=True, generator=torch_generator(1))
        # |UU'(x + e)/(1+v) - x|^2 in the mean over e, for the levels that were drawn
        expected = weight * (X.square().sum(1).repeat(draws) - (2 * kept - kept**2) * inside + 2 * v * kept**2)
        assert float(loss) == pytest.approx(float(expected.mean()), rel=2e-4)
        losses.append(float(loss))
    assert losses[0] < min(losses[1:])


def test_the_exact_denoiser_has_the_least_loss():
    m = general(2, K=2, D=8, d=2)
    z = torch.randn(4000, 2, generator=torch_generator(0), dtype=WIDE)
    k = torch.multinomial(m.log_weights.exp(), 4000, replacement=True, generator=torch_generator(1))
    X = m.means[k] + torch.einsum("ndi,ni->nd", m.bases[k] * m.spectra[k].sqrt()[:, None], z)
    losses = [
        float(denoising_loss(model, X, generator=torch_generator(2)))
        for model in (m, lambda x, s: m(x, 1.5 * s), lambda x, s: m(x, s / 1.5), general(3, K=2, D=8, d=2))
    ]
    assert losses[0] < min(losses[1:])


def test_sampling_with_the_exact_denoiser_gives_the_mixture():
    m = general(4, K=2, D=6, d=2)
    x = sample_edm(m, torch.randn(4000, 6, generator=torch_generator(0), dtype=WIDE), n_steps=30)
    off = torch.stack([(x - m.means[k]) @ (torch.eye(6, dtype=WIDE) - m.bases[k] @ m.bases[k].T) for k in range(2)])
    off = off.norm(dim=-1)
    assert off.min(dim=0).values.quantile(0.99) < 0.02
    own = off.argmin(dim=0)
    torch.testing.assert_close((own == 1).double().mean(), m.log_weights[1].exp(), atol=0.03, rtol=0)
    inside = (x[own == 0] - m.means[0]) @ m.bases[0]
    torch.testing.assert_close(torch.cov(inside.T), torch.diag(m.spectra[0]), atol=0.12, rtol=0)


def test_steps_converge_in_second_order_and_can_be_taken_up_again():
    m = LowRankDenoiser(bases(1, 6, 2), dtype=WIDE)
    z = torch.randn(3, 6, generator=torch_generator(0), dtype=WIDE)
    fine = sample_edm(m, z, n_steps=2000, sigma_min=1e-3)
    gaps = [(sample_edm(m, z, n_steps=n, sigma_min=1e-3) - fine).norm() for n in (40, 80)]
    assert 3.0 < gaps[0] / gaps[1] < 5.5
    seen = []
    whole = sample_edm(m, z, watch=lambda x, sigma: seen.append((x, sigma)))
    assert [sigma for _, sigma in seen] == pytest.approx(noise_levels()[:-1].tolist())
    x, sigma = seen[10]
    rest = sample_edm(m, x / sigma, n_steps=8, sigma_max=sigma)
    torch.testing.assert_close(rest, whole, atol=2e-2, rtol=0)
    last, least = seen[-1]
    torch.testing.assert_close(sample_edm(m, last / least, n_steps=1, sigma_max=least, sigma_min=least), whole)


def test_levels_fall_evenly_in_their_root():
    levels = noise_levels(5, sigma_min=0.1, sigma_max=10, rho=3)
    assert levels[-1] == 0
    np.testing.assert_allclose(np.diff(levels[:-1].numpy() ** (1 / 3), n=2), 0, atol=1e-12)
    assert levels[[0, 4]].tolist() == pytest.approx([10, 0.1])


def test_a_mixture_goes_to_a_denoiser_and_back():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(80, 2)) @ rng.normal(size=(2, 9)) + 4 * i for i in range(2)])
    X += 0.1 * rng.normal(size=X.shape)
    fitted = LowRankGaussianMixture(2, 2, random_state=0).fit(X)
    kept = LowRankDenoiser.from_mixture(fitted, keep_noise=True)
    back = kept.to_mixture()
    np.testing.assert_allclose(back.score_samples(X), fitted.score_samples(X), rtol=1e-9)
    np.testing.assert_array_equal(back.predict(X), fitted.labels_)
    np.testing.assert_allclose(kept(torch.as_tensor(X), 0.3).numpy(), fitted.denoise(X, 0.3), atol=1e-12)
    bare = LowRankDenoiser.from_mixture(fitted)
    assert not bare.noise_variance.any()
    with pytest.raises(ValueError, match="noise_variance must be above 0 for a mixture with a density, got 0"):
        bare.to_mixture()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"bases": torch.ones(2, 5)},
            "bases must be floats of shape (K, D, d) with d <= D, got torch.float32 of shape",
        ),
        ({"bases": torch.ones(1, 2, 5)}, "bases must be floats of shape (K, D, d) with d <= D"),
        ({"bases": torch.ones(1, 5, 2)}, "bases must have orthonormal columns, or zeros, got products off by"),
        (
            {"bases": torch.eye(5, 2).long()[None]},
            "bases must be floats of shape (K, D, d) with d <= D, got torch.int64",
        ),
        ({"spectra": torch.ones(2)}, "spectra must have shape (1, 2), got (2,)"),
        ({"spectra": -torch.ones(1, 2)}, "spectra must be at least 0, got -1"),
        ({"means": torch.full((1, 5), np.nan)}, "means must be finite, got NaN or infinity"),
        ({"weights": torch.tensor([0.5])}, "weights must be above 0 with sum 1, got [0.5]"),
        ({"noise_variance": torch.tensor([-0.5])}, "noise_variance must be at least 0, got -0.5"),
    ],
)
def test_parts_that_make_no_mixture_are_refused(parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LowRankDenoiser(**{"bases": torch.eye(5, 2)[None]} | parts)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_noise_levels_and_scales_out_of_range_are_refused(kind):
    m, x = general(), torch.zeros(3, 12)
    for bad, word in ((0.0, "0"), (-1.0, "-1"), (float("nan"), "nan"), (float("inf"), "inf")):
        with pytest.raises(ValueError, match=f"sigma must be above 0 and finite, got {word}"):
            m(x, kind(bad))
    with pytest.raises(ValueError, match="s must be at least 0 and finite, got -1"):
        m(x, 1.0, kind(-1.0))


def test_shapes_and_kinds_that_do_not_fit_are_refused():
    m, x = general(), torch.zeros(3, 12)
    with pytest.raises(ValueError, match=r"sigma must be a number or have the shape of the rows, \(3,\), got \(3, 1\)"):
        m(x, torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"x must have 12 features in its last axis, got shape \(3, 5\)"):
        m(torch.zeros(3, 5), 1.0)
    with pytest.raises(TypeError, match=r"x must hold floats \(scale images of bytes .* got torch.uint8"):
        m(torch.zeros(3, 12, dtype=torch.uint8), 1.0)
    with pytest.raises(ValueError, match=r"clean must have the shape of x, \(3, 12\), got \(2, 12\)"):
        m(x, 1.0, clean=torch.zeros(2, 12))
    with pytest.raises(ValueError, match="n_draws must be at least 1, got 0"):
        denoising_loss(m, x, n_draws=0)
    for options, message in (
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"sigma_min": 0}, "must be 0 < sigma_min <= sigma_max, got 0 and 80"),
        ({"sigma_min": 90}, "must be 0 < sigma_min <= sigma_max, got 90 and 80"),
        ({"rho": 0}, "rho must be above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            noise_levels(**options)


def test_rows_may_have_any_batch_shape_and_functions_may_be_mapped():
    m, x = general(noise=0.1), torch.randn(2, 3, 12, generator=torch_generator(0), dtype=WIDE)
    sigma = torch.rand(2, 3, generator=torch_generator(1), dtype=WIDE) + 0.1
    whole = m(x, sigma)
    torch.testing.assert_close(whole, m(x.reshape(6, 12), sigma.reshape(6)).reshape(2, 3, 12))
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(m))(x, sigma), whole)
    assert m(x[0, 0], 0.3).shape == (12,)
    assert m(x[:0], 0.3).shape == (0, 3, 12)
