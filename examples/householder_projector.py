"""Train a small generator on handwritten digits, give it orthogonal projections, and look at its directions.

The generator is an autoencoder's decoder whose latent modulates every layer. Ten directions a layer are kept; after a
short fine-tuning pictures are about as good as before, and nothing but those directions moves them.

The system is the catalogue's ``householder-projector``.
"""

import sys
from pathlib import Path

import torch

from polyspan.data import digits
from polyspan.nn import (
    StyleAutoencoder,
    direction_strengths,
    discover_directions,
    interpretable_path_length,
    perceptual_path_length,
    project_model,
    save_directions,
    train_autoencoder,
)
from polyspan.nn.traversal_plots import plot_traversals


def main(steps: int = 500, rank: int = 10, picture: str | None = None) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.tensor(digits()[0]).reshape(-1, 8, 8)
    images = images[torch.randperm(len(images), generator=rng)]
    train, test = images[:1400], images[1400:]
    model = StyleAutoencoder((8, 8), latent_dim=16, width=64, generator=rng)

    @torch.no_grad()
    def error() -> float:
        return float((model(test) - test).square().mean() / (test - train.mean(dim=0)).square().mean())

    train_autoencoder(model, train, steps, generator=rng, learning_rate=3e-3)
    print(f"unexplained share of held-out pictures: {error():.3f} free", end="")
    generator, layer = model.generator, "layers.1.affine"
    with torch.no_grad():
        latents = model.encode(test)[0][:64]
    sefa = discover_directions(generator, layer, "sefa", num_directions=rank)
    strengths = {"SeFa, free layer": direction_strengths(generator, layer, sefa[layer], latents)}

    report = project_model(generator, rank=rank)
    print(f", {error():.3f} projected", end="")
    train_autoencoder(model, train, max(steps // 5, 1), generator=rng)
    print(f", {error():.3f} after {max(steps // 5, 1)} steps more")
    for (name, angle), kept in zip(report.drift().items(), report.layers, strict=True):
        print(f"  {name}: {kept.kept_share:.2f} of the energy kept, turned by {angle:.2f} rad since")

    directions = discover_directions(generator)
    turned = discover_directions(generator, layer, "jacobian", latents=latents)[layer]
    strengths["projector"] = direction_strengths(generator, layer, directions[layer], latents)
    strengths["projector, by the Jacobian"] = direction_strengths(generator, layer, turned, latents)
    print(f"change of pictures a unit step at {layer}, weakest over strongest of {rank} directions")
    for name, found in strengths.items():
        print(f"  {name}: {float(found.min() / found.max()):.2f}")
    print(f"path length in the latent space {perceptual_path_length(generator, latents, rng=rng):.4f}, ", end="")
    print(f"along the directions {interpretable_path_length(generator, directions, latents, rng=rng):.4f}")
    if picture:
        print("written:", save_directions(directions, Path(picture).with_suffix(".npz")))
        print("written:", generator.save(Path(picture).with_suffix(".safetensors")))
        print("written:", plot_traversals(generator, latents[0], turned, Path(picture), layer=layer))


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else None)
