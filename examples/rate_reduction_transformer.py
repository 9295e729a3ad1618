"""Train a white-box transformer on photographs' textures and look at what its layers do.

Squares of 16 by 16 pixels come from six grey photographs; the class is the photograph. Then the compressing step is
taken alone, in its three forms, on tokens near four planted subspaces.
"""

import numpy as np
import torch

from polyspan.claims.crate import crops
from polyspan.linalg import coding_rate
from polyspan.nn import CrateClassifier, SubspaceSelfAttention


def layers(steps: int) -> None:
    images, labels, _ = crops(0)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:900], order[900:]
    model = CrateClassifier(32, 3, 4, max_iter=steps, batch_size=64, learning_rate=3e-3, shift=1, random_state=0)
    model.fit(images[train], labels[train])
    told = model.layer_report(images[test])
    print(f"right photograph: {model.score(images[test], labels[test]):.1%} of {len(test)} squares, chance 16.7%")
    print("layer  within learnt  within turned  all tokens  non-zero entries")
    for i in range(len(told.names)):
        print(
            f"{i + 1:>5}  {told.rate_within[i]:>13.1f}  {told.rate_random[i]:>13.1f}  {told.rate[i]:>10.1f}"
            f"  {told.nonzero_share[i]:>16.1%}"
        )


def steps_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(64, 32, generator=generator))[0].unflatten(1, (4, 8)).permute(1, 0, 2)
    tokens = (torch.randn(4, 24, 8, generator=generator) @ U.mT).reshape(96, 64)
    tokens = torch.nn.functional.normalize(tokens + 0.1 * torch.randn(96, 64, generator=generator), dim=-1)
    print("rates after six steps on tokens near four subspaces: within them, and of all")
    for step in ("published", "eq10", "exact"):
        move = SubspaceSelfAttention(64, 4, 8, step=step, tied_output=True, bias=False, scale=1.0, eps2=0.25)
        Z = tokens
        with torch.no_grad():
            move.projection.weight.copy_(U.mT.reshape(32, 64))
            for _ in range(6):
                Z = torch.nn.functional.normalize(Z + move(Z), dim=-1)
        before, after = ((float(coding_rate(X @ U, 0.5).sum()), float(coding_rate(X, 0.5))) for X in (tokens, Z))
        print(f"{step:>9}: {before[0]:5.1f} to {after[0]:5.1f}, {before[1]:5.1f} to {after[1]:5.1f}")


def main(steps: int = 150) -> None:
    layers(steps)
    steps_alone()


if __name__ == "__main__":
    main()
