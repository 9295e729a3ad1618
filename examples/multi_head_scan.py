"""Segment a photograph by scanning it along many routes.

Cut-outs of a photograph of grass hold a patch of the moon of any outline; a small U-shaped network of multi-head scan
blocks is trained to find it, and measured on cut-outs that it has not seen. A file name draws them with both outlines.

The system is the catalogue's ``mhs-vm``.
"""

import sys

import numpy as np
import torch

from polyspan.data import photograph
from polyspan.nn import MHSUNet, plot_segmentation, segmentation_scores, train_segmentation

SIDE, TRAIN, TEST = 32, 96, 24


def cut_outs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Grass (n, side, side) with a wavy disc of the moon, both of mean 0 and spread 1, and the mask of the moon."""
    ground, patch = ((p - p.mean()) / p.std() for p in map(photograph, ("grass", "moon")))
    i, j = np.indices((SIDE, SIDE))
    images, masks = np.empty((n, SIDE, SIDE), dtype=np.float32), np.empty((n, SIDE, SIDE), dtype=bool)
    for k in range(n):
        (ci, cj), corners = rng.uniform(12, SIDE - 12, 2), rng.integers(0, 512 - SIDE, size=4)
        wave = 1 + 0.25 * np.cos(3 * np.arctan2(i - ci, j - cj) + rng.uniform(0, 6))
        disc = np.hypot(i - ci, j - cj) < 10 * wave
        masks[k] = np.roll(disc, rng.integers(SIDE, size=2), axis=(0, 1))  # no place is likelier than another
        (gi, gj), (pi, pj) = corners[:2], corners[2:]
        images[k] = np.where(masks[k], patch[pi : pi + SIDE, pj : pj + SIDE], ground[gi : gi + SIDE, gj : gj + SIDE])
    return images, masks


def main(steps: int = 140, picture: str | None = None) -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    images, masks = cut_outs(rng, TRAIN + TEST)
    net = MHSUNet(1, 1, (1, 1), (16, 32), d_state=4, drop_path=0.0, init_std=None, generator=generator)
    print(f"a network of {sum(p.numel() for p in net.parameters()):,} parameters, {steps} steps")
    found = train_segmentation(net, images[:TRAIN], masks[:TRAIN], max_iter=steps, learning_rate=2e-2)
    print(f"loss {np.mean(found.losses[:5]):.2f} at first, {np.mean(found.losses[-5:]):.2f} in the end")
    shares = found.predict(images[TRAIN:])
    scores = segmentation_scores(masks[TRAIN:], shares)
    everything = segmentation_scores(masks[TRAIN:], np.ones_like(shares))
    print(f"Dice of pixels not seen: {scores.dice:.3f}; of calling everything moon: {everything.dice:.3f}")
    print(f"worst image {scores.image_dice.min():.3f}, median {np.median(scores.image_dice):.3f}")
    if picture is not None:
        print("drawn:", plot_segmentation(images[TRAIN:], masks[TRAIN:], shares, picture))


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else None)
