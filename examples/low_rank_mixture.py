"""Cluster handwritten digits by subspaces, see whether there are enough of them, take noise off, and find edits.

The digits come with scikit-learn, 8 by 8 pixels. Labels serve to score only.

The system is the catalogue's ``diffusion-subspace``.
"""

import numpy as np
import torch

from polyspan.cluster import (
    LowRankDenoiser,
    LowRankGaussianMixture,
    jacobian_directions,
    rank_profile,
    sample_edm,
    sample_sufficiency,
)
from polyspan.data import digits
from polyspan.linalg import clustering_accuracy
from polyspan.run import torch_generator


def main(rank: int = 8, n_init: int = 10) -> None:
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(images))
    train, test = images[order[:1500]], images[order[1500:]]

    mixture = LowRankGaussianMixture(10, rank, n_init=n_init, random_state=0).fit(train)
    found = clustering_accuracy(labels[order[:1500]], mixture.labels_)
    print(f"accuracy of ten subspaces of {rank} dimensions: {found:.1%}")
    print(f"fewest rows a dimension: {mixture.samples_per_dimension_.min():.1f}")
    few = sample_sufficiency(train, rank, sizes=[20, 80, 320], n_repeats=2, random_state=0)
    for rows, agreement in zip(few.per_dimension, few.agreement, strict=True):
        print(f"{rows:>6.1f} rows a dimension of one subspace for all: two halves agree by {agreement:.2f}")

    sigma = 0.3
    noisy = test + sigma * np.random.default_rng(1).standard_normal(test.shape).astype(np.float32)
    left = np.square(mixture.denoise(noisy, sigma) - test).mean() / sigma**2
    print(f"share of the noise that denoising leaves in digits it has not seen: {left:.2f}")

    model = LowRankDenoiser.from_mixture(mixture)
    profile = rank_profile(model, [5.0, 1.0, 0.3, 0.05], 2, shape=(64,), dtype=torch.float64)
    for level, ranks in zip(profile.sigmas, profile.ranks.T, strict=True):
        print(f"directions of the denoiser at noise {level:g}: {ranks.mean():.1f}")

    x = torch.as_tensor(test[0], dtype=torch.float64)
    x = x + sigma * torch.randn(64, generator=torch_generator(0), dtype=torch.float64)
    edit = jacobian_directions(model, x, sigma, 1).directions[0]
    for amount in (0.0, 1.0):
        made = sample_edm(model, ((x + amount * edit) / sigma)[None], sigma_max=sigma)[0]
        component = int(mixture.predict(made.numpy()[None])[0])
        print(f"edited by {amount:g}: component {component}, {float((made - x).norm()):.2f} from the noisy digit")


if __name__ == "__main__":
    main()
