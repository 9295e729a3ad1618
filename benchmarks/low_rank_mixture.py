"""Race EM against scikit-learn's full mixture, and leading Jacobian directions against the whole matrix.

Targets: 5 times as fast as ``GaussianMixture`` at 20,000 rows of 256 features and 10 components, one start
and as many rounds each; the 64 leading singular values of a convolutional denoiser of 3,072 inputs at least 4
times as fast as by its whole Jacobian, equal to a thousandth.

The system is the catalogue's ``diffusion-subspace``.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from _runner import growth, race, save
from polyspan.cluster import LowRankGaussianMixture, jacobian_spectrum

D, K, RANK, ROUNDS = 256, 10, 16, 5
SIZES = (1_000, 5_000, 20_000)


def rows(n):
    rng = np.random.default_rng(0)
    bases, means = np.linalg.qr(rng.normal(size=(K, D, RANK)))[0], 0.5 * rng.normal(size=(K, D))
    labels = rng.integers(K, size=n)
    X = means[labels] + 0.1 * rng.normal(size=(n, D))
    for k in range(K):
        X[labels == k] += rng.normal(size=(int(np.sum(labels == k)), RANK)) @ bases[k].T
    return X


def ours(X):
    return LowRankGaussianMixture(K, RANK, n_init=1, max_iter=ROUNDS, tol=1e-12, random_state=0).fit(X)


def theirs(X, kind="full"):
    return GaussianMixture(K, covariance_type=kind, max_iter=ROUNDS, tol=1e-12, random_state=0).fit(X)


class SmallNet(torch.nn.Module):
    """A denoiser of images (3, side, side): two convolutions whose answer has few strong directions."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.last = torch.nn.Conv2d(16, 3, 3, padding=1)
        for layer in (self.first, self.last):
            torch.nn.init.normal_(layer.weight, std=0.1, generator=generator)

    def forward(self, x, sigma):
        pooled = torch.nn.functional.avg_pool2d(x, 4)
        smooth = torch.nn.functional.interpolate(pooled, scale_factor=4)
        return smooth + self.last(torch.nn.functional.silu(self.first(smooth)))


def whole(net, x):
    """All singular values by the whole Jacobian, one product with its transpose for each output."""
    J = torch.autograd.functional.jacobian(lambda z: net(z[None], 1.0)[0], x, vectorize=True)
    return torch.linalg.svdvals(J.reshape(x.numel(), x.numel()))


def main() -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)
    fits, likelihood = [], {}
    for n in SIZES:
        X, held = rows(n), rows(n + 500)[n:]
        arms = {"polyspan": lambda X=X: ours(X), "scikit-learn, full": lambda X=X: theirs(X)}
        fits.append(race("fit", arms, size={"n": n, "D": D, "K": K}, repeats=3 if n < 2_000 else 1, warmup=0))
        likelihood[str(n)] = {"polyspan": ours(X).score(held), "scikit-learn, full": float(theirs(X).score(held))}
    net, spectra, off = SmallNet(), [], {}
    for side in (16, 32):
        x = torch.randn(3, side, side, generator=torch.Generator().manual_seed(1))
        arms = {
            "polyspan, 64 leading": lambda x=x: jacobian_spectrum(net, x, 1.0, 64, n_iter=3, n_probes=0),
            "the whole matrix": lambda x=x: whole(net, x),
        }
        spectra.append(race("jacobian", arms, size={"inputs": 3 * side**2}, repeats=1, warmup=int(side == 16)))
        true, found = whole(net, x)[:8], arms["polyspan, 64 leading"]().values[:8]
        off[str(3 * side**2)] = float(((found - true).abs() / true).max())
    save(
        "low_rank_mixture",
        fits + spectra,
        growth_in_rows=growth(fits, "n"),
        growth_in_rows_of_scikit_learn=growth(fits, "n", "scikit-learn, full"),
        held_out_log_likelihood=likelihood,
        rounds=ROUNDS,
        largest_relative_difference_of_the_first_eight_values=off,
    )


if __name__ == "__main__":
    main()
