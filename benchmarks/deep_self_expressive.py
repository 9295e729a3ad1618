"""Race an epoch of both stages, and the closed form, against the published code's steps.

Stage 1: the sum over layers differentiated by torch, against one product with the Gram matrix. Stage 2: a full spectral
clustering with 20 starts in every epoch and a differentiated norm, against a closed gradient and a clustering in every
tenth epoch that starts from the last one. Closed form: the whole matrix against the pairs that can be kept, and wall
time and memory from 1,000 to 100,000 points, each size in a process of its own.

The system is the catalogue's ``lhdsc``.
"""

import numpy as np
import torch

from _runner import growth, race, save
from polyspan.cluster import DeepSelfExpressiveClustering
from polyspan.cluster._affinity import RidgeExpression
from polyspan.cluster._coefficients import AllCoefficients, FollowedCoefficients
from polyspan.cluster._self_expression import (
    SpectralRounding,
    expression_loss,
    leading_affinity,
    ridge_coefficients,
    structured_norm,
)
from polyspan.data import planted_subspaces
from subspace_clusterers import OURS, climb

SIZES, WIDTHS, K, D = (400, 1_440), (1_024, 3_840), 20, 9
EPOCHS = 10
LARGE, BY_SIZE = (1_000, 4_000), (1_000, 10_000, 100_000)
CLOSED = OURS + "DeepSelfExpressiveClustering(10, subspace_dim=5, solver='ridge', device='cpu', random_state=0)"


def layers(n):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1) for width in WIDTHS]


def literal_stage(V, epochs):
    """Adam on the sum of squares over layers; the encoder held, so that the comparison is of one and the same loss."""
    C = torch.full((len(V[0]), len(V[0])), 1e-8, requires_grad=True)
    optimizer = torch.optim.Adam([C], lr=1e-3)
    for _ in range(epochs):
        optimizer.zero_grad(set_to_none=True)
        sum((C @ layer - layer).square().sum() for layer in V).backward()
        optimizer.step()
    return C.detach()


def gram_stage(V, epochs):
    joined = torch.cat(V, dim=1)
    G = joined @ joined.T
    C = torch.full((len(G), len(G)), 1e-8)
    optimizer = torch.optim.Adam([C], lr=1e-3)
    for _ in range(epochs):
        _, C.grad = expression_loss(C, G)
        optimizer.step()
    return C


def closed_form(V):
    joined = torch.cat(V, dim=1)
    return ridge_coefficients(joined @ joined.T, 0.1 * len(V))


def structured(C, epochs, *, literal):
    C = C.clone()
    optimizer = torch.optim.Adam([C], lr=1e-3)
    rounding, every = SpectralRounding(K, 20, 0), 1 if literal else 10
    labels = None
    for epoch in range(epochs):
        if epoch % every == 0:
            found = rounding(leading_affinity(C.detach().numpy(), D), warm=not literal)
            labels = torch.as_tensor(found)
        if literal:
            C.requires_grad_(True)
            optimizer.zero_grad(set_to_none=True)
            W = (C.abs() + C.abs().T + 1e-12).sqrt()
            Q = torch.nn.functional.one_hot(labels, K).float()
            (10 * (Q.T @ (torch.diag(W.sum(1)) - W) @ Q).trace()).backward()
            optimizer.step()
            C.requires_grad_(False)
        else:
            _, gradient = structured_norm(C, labels)
            C.grad = 10 * gradient
            optimizer.step()
    return C


def shrunk(points, *, whole):
    """Return the cut affinity after EPOCHS steps of the second stage, from whole matrices or from followed pairs."""
    expression, labels = RidgeExpression(points, 0.1, zero_diagonal=True), np.arange(len(points)) % K
    if whole:
        C = torch.as_tensor(expression.dense())
        coefficients = AllCoefficients(C, D, rate=1e-3, hollow=True, relative=True)
    else:
        coefficients = FollowedCoefficients(expression, D, rate=1e-3)
    for _ in range(EPOCHS):
        coefficients.step(labels)
    return coefficients.affinity()


def main() -> None:
    first, second, whole, followed = [], [], [], []
    for n in SIZES:
        V = layers(n)
        apart = (literal_stage(V, EPOCHS) - gram_stage(V, EPOCHS)).abs().max()
        print(f"  largest difference of coefficients after {EPOCHS} epochs: {apart:.1e}")
        first.append(
            race(
                f"expressing, {EPOCHS} epochs",
                {
                    "polyspan, Gram form": lambda v=V: gram_stage(v, EPOCHS),
                    "sum over layers, as published": lambda v=V: literal_stage(v, EPOCHS),
                    "polyspan, closed form": lambda v=V: closed_form(v),
                },
                size={"n": n, "widths": sum(WIDTHS)},
                repeats=3,
            )
        )
    for n in SIZES:
        points = planted_subspaces(0, n_per=n // K, d=120, k=5, n_subspaces=K, noise=0.05).points
        rows = torch.as_tensor(points / np.linalg.norm(points, axis=1, keepdims=True), dtype=torch.float32)
        C = ridge_coefficients(rows @ rows.T, 0.1)
        second.append(
            race(
                f"structuring, {EPOCHS} epochs",
                {
                    "polyspan": lambda c=C: structured(c, EPOCHS, literal=False),
                    "as published": lambda c=C: structured(c, EPOCHS, literal=True),
                },
                size={"n": n},
                repeats=3,
            )
        )
        fit = DeepSelfExpressiveClustering(K, subspace_dim=5, solver="adam", device="cpu", random_state=0)
        closed = DeepSelfExpressiveClustering(
            K, subspace_dim=5, solver="ridge", structure=False, device="cpu", random_state=0
        )
        whole.append(
            race(
                "whole fit of rows",
                {
                    "polyspan": lambda f=fit, p=points: f.fit(p.astype(np.float32)),
                    "polyspan, closed form": lambda f=closed, p=points: f.fit(p.astype(np.float32)),
                },
                size={"n": n},
                repeats=2,
                warmup=0,
            )
        )
    for n in LARGE:
        points = planted_subspaces(0, n_per=n // K, d=30, k=5, n_subspaces=K, noise=0.05).points.astype(np.float32)
        apart = abs(shrunk(points, whole=True) - shrunk(points, whole=False)).max()
        print(f"  largest difference of affinities: {apart:.1e}")
        followed.append(
            race(
                f"closed form and {EPOCHS} epochs of structuring",
                {
                    "polyspan, followed pairs": lambda p=points: shrunk(p, whole=False),
                    "polyspan, whole matrices": lambda p=points: shrunk(p, whole=True),
                },
                size={"n": n},
                repeats=3,
            )
        )
    save(
        "deep_self_expressive",
        first + second + whole + followed,
        growth_of_expressing=growth(first, "n"),
        growth_of_structuring=growth(second, "n"),
        growth_of_a_fit=growth(whole, "n"),
        growth_of_followed_pairs=growth(followed, "n"),
        growth_of_whole_matrices=growth(followed, "n", "polyspan, whole matrices"),
        closed_form_by_size=climb("deep self-expression, closed form", CLOSED, BY_SIZE),
    )


if __name__ == "__main__":
    main()
