"""Give the atoms of two molecules features that turn with them, and find out which features tell left from right.

Coordinates are those of small molecules in ångström. Every atom collects its neighbours' directions by a Gaunt
convolution; the many-body layer and products turn what it collected into numbers that no rotation changes.

The system is the catalogue's ``gaunt``.
"""

import torch

from polyspan.nn import GauntConvolution, GauntManyBody, GauntTensorProduct, random_rotation

WATER = torch.tensor([[0.0, 0.0, 0.117], [0.0, 0.757, -0.469], [0.0, -0.757, -0.469]], dtype=torch.float64)
# Bromochlorofluoromethane: carbon, then H, F, Cl, Br.
CHIRAL = torch.tensor(
    [[0.0, 0.0, 0.0], [0.63, 0.63, 0.63], [-0.78, -0.78, 0.78], [-1.02, 1.02, -1.02], [1.12, -1.12, -1.12]],
    dtype=torch.float64,
)
IRREPS = "4x0e+4x1o+4x2e+4x3o"


def features(positions: torch.Tensor, charges: torch.Tensor) -> torch.Tensor:
    """Return (atoms, 4 (3 + 1)²) features: what each atom sees of the others, in four shells of distance."""
    n = len(positions)
    far, near = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    pairs = far != near
    edges = positions[far[pairs]] - positions[near[pairs]]
    distance = torch.linalg.vector_norm(edges, dim=-1, keepdim=True)
    shells = torch.exp(-((distance - torch.tensor([0.8, 1.3, 1.9, 2.6])) ** 2)) * charges[far[pairs], None] / 35
    convolution = GauntConvolution("4x0e", 3, IRREPS, weights="none", dtype=torch.float64)
    return torch.zeros(n, 64, dtype=torch.float64).index_add_(0, near[pairs], convolution(shells, edges))


def invariants(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the scalars (atoms, 4) of a cube of the features, and of a product that has all paths."""
    cube = GauntManyBody(IRREPS, "4x0e", correlation=3, weights="none", dtype=torch.float64)(x)
    twist = GauntTensorProduct(IRREPS, IRREPS, "4x1e+4x2o+4x3e", paths="all", dtype=torch.float64)
    # Shells are moved by one, since a bracket of a function with itself is zero.
    moved = torch.cat([p.roll(1, dims=1).flatten(1) for p in unpacked(x)], dim=1)
    pseudo = GauntTensorProduct("4x1e+4x2o+4x3e", IRREPS, "4x0o", paths="all", dtype=torch.float64)
    third = torch.cat([p.roll(2, dims=1).flatten(1) for p in unpacked(x)], dim=1)
    return {"cube, even paths": cube, "triple product, all paths": pseudo(twist(x, moved), third)}


def unpacked(x: torch.Tensor) -> list[torch.Tensor]:
    return [p.unflatten(1, (4, -1)) for p in x.split([4 * (2 * l + 1) for l in range(4)], dim=1)]


def main() -> None:
    R = random_rotation(rng=torch.Generator().manual_seed(0), dtype=torch.float64)
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    molecules = {
        "water": (WATER, torch.tensor([8.0, 1.0, 1.0], dtype=torch.float64)),
        "CHFClBr": (CHIRAL, torch.tensor([6.0, 1.0, 9.0, 17.0, 35.0], dtype=torch.float64)),
    }
    for name, (positions, charges) in molecules.items():
        here = invariants(features(positions, charges))
        turned = invariants(features(positions @ R.T, charges))
        seen = invariants(features(positions @ mirror, charges))
        for kind, value in here.items():
            size = float(value.abs().max())
            if size < 1e-9:
                print(f"{name:>8}, {kind:<26} is zero: the molecule is its own mirror image")
                continue
            turn, flip = (float((other[kind] - value).abs().max()) / size for other in (turned, seen))
            print(f"{name:>8}, {kind:<26} {size:9.3g}; share that changes: {turn:.0e} turned, {flip:.0e} in the mirror")


if __name__ == "__main__":
    main()
