import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from polyspan.cluster import (
    LowRankDenoiser,
    as_denoiser,
    jacobian_directions,
    jacobian_spectrum,
    noise_levels,
    rank_profile,
    sample_edm,
)
from polyspan.errors import UntrustedFile
from polyspan.run import torch_generator

WIDE = torch.float64


def orthogonal_subspaces(K=3, D=24, d=4, seed=0):
    Q = torch.linalg.qr(torch.randn(D, D, generator=torch_generator(seed), dtype=WIDE))[0]
    return LowRankDenoiser(torch.stack(Q[:, : K * d].split(d, dim=1)), dtype=WIDE)


class SmallNet(nn.Module):
    """A convolutional denoiser of images (2, 6, 6) that mixes its input with a small answer of its own."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 3, padding=1)
            ).double()

    def forward(self, x, sigma):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) + 0.5 * self.net(x)


def dense(model, x, sigma):
    n = x.numel()
    J = torch.autograd.functional.jacobian(lambda z: model(z[None], z.new_full((1,), sigma))[0], x)
    return J.reshape(n, n)


@pytest.mark.parametrize("model", ["mixture", "net"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_singular_values_and_directions_are_those_of_the_whole_matrix(model, chunk):
    net = orthogonal_subspaces() if model == "mixture" else SmallNet()
    x = torch.randn(*((24,) if model == "mixture" else (2, 6, 6)), generator=torch_generator(1), dtype=WIDE)
    J = dense(net, x, 0.4)
    S = torch.linalg.svdvals(J)
    whole = jacobian_spectrum(net, x, 0.4, None, chunk=chunk)
    torch.testing.assert_close(whole.values, S)
    assert whole.energy == pytest.approx(float(J.square().sum()))
    part = jacobian_spectrum(net, x, 0.4, 5, n_iter=6, chunk=chunk)
    torch.testing.assert_close(part.values, S[:5], rtol=1e-4, atol=1e-9)
    for V, W in zip(part.directions.reshape(5, -1), part.responses.reshape(5, -1), strict=True):
        torch.testing.assert_close(J @ V, (J @ V).norm() * W, atol=1e-6, rtol=0)
    assert part.directions.shape == (5, *x.shape)
    assert part.energy == pytest.approx(whole.energy, rel=0.3)
    assert whole.participation() == pytest.approx(float(S.square().sum() ** 2 / S.pow(4).sum()))
    # The rank is the official count: the fewest whose root of summed squares is above .99 of that of all.
    norms = S.square().cumsum(0).sqrt()
    assert whole.rank(0.99**2) == int((norms <= 0.99 * norms[-1]).sum()) + 1


def test_products_are_far_fewer_than_inputs_and_counted():
    calls = []

    def model(x, sigma):
        calls.append(len(x))
        return x @ weight

    weight = torch.randn(600, 4, generator=torch_generator(0), dtype=WIDE)
    weight = weight @ weight.T / 600
    found = jacobian_spectrum(model, torch.zeros(600, dtype=WIDE), 1.0, 4, n_iter=2, oversample=4, n_probes=3)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(weight)[:4])
    # Eight forward and eight back; the four directions that J has beside, forward and back; then three probes.
    assert found.n_products == 8 + 8 + 4 + 4 + 3
    assert found.energy == pytest.approx(float(weight.square().sum()))
    assert found.rank() == 4 or found.rank(0.999999) == 4
    weight = torch.randn(600, 600, generator=torch_generator(1), dtype=WIDE)
    found = jacobian_spectrum(model, torch.zeros(600, dtype=WIDE), 1.0, 4, n_iter=1, oversample=4, n_probes=3)
    assert found.n_products == 8 * 3 + 3


def test_values_that_fall_slowly_are_right_to_a_thousandth():
    # A power of one block of 32 shrinks what the eighth must lose by 0.995^25; mixtures of all powers do much more.
    n = 400
    generator = torch_generator(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=WIDE))[0] for _ in range(2))
    true = 0.995 ** torch.arange(n, dtype=WIDE)
    weight = left @ torch.diag(true) @ right.T
    found = jacobian_spectrum(lambda z, s: z @ weight.T, torch.zeros(n, dtype=WIDE), 1.0, 24, n_iter=6, n_probes=0)
    torch.testing.assert_close(found.values[:8], true[:8], rtol=1e-3, atol=0)
    assert (found.values <= true[:24] * (1 + 1e-12)).all()
    V = found.directions.reshape(24, n)
    torch.testing.assert_close(V @ V.T, torch.eye(24, dtype=WIDE), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_iter", [3, 12])
def test_a_space_that_is_exhausted_adds_nothing_to_the_values(n_iter):
    generator = torch_generator(0)
    weight = torch.randn(300, 20, generator=generator) @ torch.randn(20, 300, generator=generator)
    found = jacobian_spectrum(lambda z, s: z @ weight.T, torch.zeros(300), 1.0, 10, n_iter=n_iter, n_probes=0)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(weight)[:10], rtol=1e-5, atol=0)
    # The 18 of the start and the 20 directions that there are, each forward and back.
    assert found.n_products == 2 * 18 + 2 * 20


def test_the_rank_of_the_exact_denoiser_is_d_at_small_noise_and_at_most_kd():
    m = orthogonal_subspaces()
    profile = rank_profile(m, n_trajectories=3, shape=(24,), dtype=WIDE)
    assert (profile.ranks[:, profile.sigmas < 0.1] == 4).all()
    assert profile.ranks.max() <= 12
    assert (profile.ranks[:, 0] == 12).all()
    assert profile.intrinsic_dimension == 4
    np.testing.assert_allclose(profile.participation[:, -1], 4, rtol=1e-3)
    assert profile.values.shape == (3, 18, 24)
    fewer = rank_profile(m, [10, 1, 0.05], 2, shape=(24,), dtype=WIDE, k=6)
    assert (fewer.ranks[:, -1] == 4).all()
    # Six directions do not hold 98 % there: the rank is at least seven.
    assert (fewer.ranks[:, 0] == 7).all()
    again = rank_profile(m, [10, 1, 0.05], 2, shape=(24,), dtype=WIDE, k=6)
    np.testing.assert_array_equal(fewer.values, again.values)


def test_a_step_along_a_direction_edits_within_the_subspace():
    m = orthogonal_subspaces(K=2)
    x0 = m.bases[0] @ torch.ones(4, dtype=WIDE)
    sigma = 0.3
    x = x0 + sigma * torch.randn(24, generator=torch_generator(0), dtype=WIDE)
    found = jacobian_directions(m, x, sigma, 3)
    off = found.directions - found.directions @ m.bases[0] @ m.bases[0].T
    assert off.norm() < 0.05
    before, after = (sample_edm(m, (row / sigma)[None], sigma_max=sigma)[0] for row in (x, x + 2 * found.directions[0]))
    assert (after - before) @ found.directions[0] > 1.5
    assert (after - m.bases[0] @ (m.bases[0].T @ after)).norm() < 0.05


def test_a_mask_holds_the_rest_still():
    net, x = SmallNet(), torch.randn(2, 6, 6, generator=torch_generator(1), dtype=WIDE)
    mask = torch.zeros(2, 6, 6, dtype=torch.bool)
    mask[:, 1:5, 1:5] = True
    free = jacobian_directions(net, x, 1.0, 3)
    loose = jacobian_directions(net, x, 1.0, 3, mask, n_outside=0, n_iter=6)
    tight = jacobian_directions(net, x, 1.0, 3, mask, n_outside=40, n_iter=6)
    J = dense(net, x, 1.0)
    S = torch.linalg.svdvals(J * mask.reshape(-1, 1))
    torch.testing.assert_close(loose.values, S[:3], rtol=1e-3, atol=0)
    assert tight.outside_share.mean() < 0.5 * loose.outside_share.mean()
    for found in (free, loose, tight):
        V = found.directions.reshape(3, -1)
        torch.testing.assert_close(V @ V.T, torch.eye(3, dtype=WIDE), atol=1e-8, rtol=0)
    effect = J @ tight.directions.reshape(3, -1).T
    share = effect[~mask.reshape(-1)].square().sum(0) / effect.square().sum(0)
    torch.testing.assert_close(tight.outside_share, share)
    outside = torch.linalg.svd(J * ~mask.reshape(-1, 1))[2][:40]
    assert (outside @ tight.directions.reshape(3, -1).T).abs().max() < 0.2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("named", [False, True])
def test_models_of_steps_become_denoisers(prediction, named):
    """An exact model of each kind, made from the exact denoiser, is that denoiser again when wrapped."""
    m, alphas = orthogonal_subspaces(), torch.linspace(0.9999, 0.0001, 1000, dtype=WIDE).sqrt()
    seen = []

    def model(x_t, t):
        seen.append(t)
        # Between two steps the level is interpolated in its logarithm, as by the wrapper.
        logs, low = ((1 - alphas) / alphas).log() / 2, t.long().clamp(max=998)
        sigma = (logs[low] + (t - low) * (logs[low + 1] - logs[low])).exp()
        a = 1 / (1 + sigma**2)
        x0 = m(x_t, (1 - a).sqrt(), a.sqrt())
        eps = (x_t - a.sqrt()[:, None] * x0) / (1 - a).sqrt()[:, None]
        v = a.sqrt()[:, None] * eps - (1 - a).sqrt()[:, None] * x0
        out = {"epsilon": eps, "v_prediction": v, "sample": x0}[prediction]
        return SimpleNamespace(sample=out) if named else out

    wrapped = as_denoiser(model, alphas, prediction=prediction)
    x = torch.randn(4, 24, generator=torch_generator(0), dtype=WIDE)
    sigma = torch.tensor([0.05, 0.3, 1.0, 5.0], dtype=WIDE)
    torch.testing.assert_close(wrapped(x, sigma), m(x, sigma), atol=1e-9, rtol=0)
    assert (seen[0].diff() > 0).all()
    torch.testing.assert_close(wrapped(x, 0.3), m(x, 0.3), atol=1e-9, rtol=0)
    profile = rank_profile(wrapped, [5.0, 0.5, 0.05], 2, shape=(24,), dtype=WIDE)
    assert (profile.ranks[:, -1] == 4).all()
    with pytest.raises(ValueError, match=r"sigma must lie in the schedule, .* to .*, got 1e\+06"):
        wrapped(x, 1e6)


def test_a_model_that_returns_noise_is_told():
    m = orthogonal_subspaces()

    def noise_model(x, sigma):
        return (x - m(x, sigma)) / sigma[:, None]

    with pytest.raises(ValueError, match=r"model must return clean rows, .* does it predict noise"):
        rank_profile(noise_model, n_trajectories=2, shape=(24,), dtype=WIDE)


def test_pickles_paths_and_other_things_are_no_models():
    x = torch.zeros(4)
    for path in ("edm-cifar10.pkl", Path("net.pth")):
        with pytest.raises(UntrustedFile, match=r"runs code as it is read.*convert its weights to safetensors"):
            jacobian_spectrum(path, x, 1.0)
    with pytest.raises(TypeError, match=re.escape("model must be a callable (x, sigma) -> x0, got the path net.bin")):
        rank_profile("net.bin", shape=(4,))
    with pytest.raises(TypeError, match=r"model must be a callable .* got int"):
        jacobian_directions(3, x, 1.0)


def test_arguments_out_of_range_are_refused():
    m, x = orthogonal_subspaces(), torch.zeros(24, dtype=WIDE)
    mask = torch.ones(24, dtype=torch.bool)
    for call, message in (
        (lambda: jacobian_spectrum(m, x, 0.0), "sigma must be above 0 and finite, got 0.0"),
        (lambda: jacobian_spectrum(m, x, 1.0, 0), "k must be at least 1, or None for all, got 0"),
        (lambda: jacobian_spectrum(m, x, 1.0, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: jacobian_spectrum(lambda z, s: z[:, :3], x, 1.0), "model must return the shape of its input"),
        (lambda: rank_profile(m, [1.0, 2.0], shape=(24,)), "sigmas must fall and stay above 0, got [1.0, 2.0]"),
        (lambda: rank_profile(m, [1.0, 0.0], shape=(24,)), "sigmas must fall and stay above 0"),
        (lambda: rank_profile(m, n_trajectories=0, shape=(24,)), "n_trajectories must be at least 1, got 0"),
        (lambda: jacobian_directions(m, x, 1.0, 0), "k must be at least 1, got 0"),
        (lambda: jacobian_directions(m, x, 1.0, mask=mask), "mask must mark some of the 24 values and not all, got 24"),
        (
            lambda: jacobian_directions(m, x, 1.0, mask=mask[:3]),
            "mask must be bool of shape (24,), got torch.bool of shape",
        ),
        (
            lambda: jacobian_directions(m, x, 1.0, 12, mask=x.bool() ^ (torch.arange(24) < 3)),
            "k + n_outside must be at most 24",
        ),
        (
            lambda: as_denoiser(m, [0.9, 0.5], prediction="score"),
            "prediction must be one of epsilon, v_prediction, sample",
        ),
        (lambda: as_denoiser(m, [0.5, 0.9]), "alphas_cumprod must fall within (0, 1), got shape (2,)"),
        (lambda: as_denoiser(m, [1.0, 0.9]), "alphas_cumprod must fall within (0, 1)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_a_denoiser_of_a_constant_has_rank_nought():
    found = jacobian_spectrum(lambda z, s: z * 0 + 1, torch.zeros(5, dtype=WIDE), 1.0, None)
    assert found.rank() == 0
    assert found.participation() == 0


def test_levels_of_the_profile_are_those_of_sampling_by_default():
    m = orthogonal_subspaces(K=1)
    profile = rank_profile(m, n_trajectories=1, shape=(24,), dtype=WIDE)
    np.testing.assert_allclose(profile.sigmas, noise_levels()[:-1].numpy())


@pytest.mark.parametrize("k", [2, None])
def test_a_model_without_derivatives_is_said(k):
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)
    with pytest.raises(ValueError, match="model must return finite numbers with finite derivatives"):
        jacobian_spectrum(lambda z, s: z * float("nan"), x, 0.1, k)
    with pytest.warns(UserWarning, match="cuts its gradient off"):
        found = jacobian_spectrum(lambda z, s: (2 * z).detach(), x, 0.1, k)
    assert not found.values.any()
