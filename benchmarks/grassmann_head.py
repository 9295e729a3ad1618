"""Race the Riemannian step against its peers, and the head against nn.Linear, at two sizes.

The system is the catalogue's ``grassmann-class``.
"""

import torch
from torch import nn

from _runner import growth, peaks, race, save
from polyspan.nn import GrassmannHead, GrassmannParameter, RiemannianAdam, RiemannianSGD

SIZES = ((250, 256), (1000, 512))


def optimiser_arms(n_classes, d, k):
    """Every arm holds its own copy of the bases, gradient and momentum."""
    generator = torch.Generator().manual_seed(0)
    start = GrassmannHead(d, n_classes, k, generator=generator).weight.detach()
    gradient = torch.randn(start.shape, generator=generator)

    def ours(make, **options):
        p = GrassmannParameter(start.clone())
        p.grad = gradient.clone()
        return make([p], lr=1e-3, **options).step

    def official():
        S, M = start.mT.clone(), gradient.mT.clone()

        def step():
            M.mul_(0.9).add_(gradient.mT)
            U, s, Vh = torch.linalg.svd(M - S @ (S.mT @ M), full_matrices=False)
            angle = (1e-3 * s).unsqueeze(-2)
            S.copy_(((S @ Vh.mT) * angle.cos() - U * angle.sin()) @ Vh)

        return step

    def plain_qr():
        S, M = start.mT.clone(), gradient.mT.clone()

        def step():
            M.mul_(0.9).add_(gradient.mT)
            S.copy_(torch.linalg.qr(S - 1e-3 * M)[0])

        return step

    def geoopt(manifold):
        from geoopt import ManifoldParameter
        from geoopt.optim import RiemannianSGD as Theirs

        p = ManifoldParameter(start.mT.contiguous().clone(), manifold=manifold)
        p.grad = gradient.mT.contiguous().clone()
        return Theirs([p], lr=1e-3, momentum=0.9).step

    import geoopt as peer

    return {
        "ours": ours(RiemannianSGD, reorthonormalise_every=5),
        "ours, ambient momentum": ours(RiemannianSGD, reorthonormalise_every=5, transport=False),
        "ours, Adam": ours(RiemannianAdam, reorthonormalise_every=5),
        "batched SVD, as published": official(),
        "QR of the flat step": plain_qr(),
        "geoopt, Euclidean Stiefel": geoopt(peer.EuclideanStiefel()),
        "geoopt, its default": geoopt(peer.Stiefel()),
    }


def head_arms(batch, n_classes, d, k):
    """Forward and backward of a training step, loss included."""
    x = torch.randn(batch, d, generator=torch.Generator().manual_seed(0))
    y = torch.arange(batch) % n_classes

    def step(module, widen=None):
        def run():
            module.zero_grad(set_to_none=True)
            out = module(x)
            nn.functional.cross_entropy(out if widen is None else out[:, ::widen], y).backward()

        return run

    return {
        "ours": step(GrassmannHead(d, n_classes, k)),
        "nn.Linear, as many outputs as basis vectors": step(nn.Linear(d, n_classes * k), k),
        "nn.Linear, one output a class": step(nn.Linear(d, n_classes)),
    }


def main():
    torch.set_num_threads(1)
    steps, heads = [], []
    for n_classes, d in SIZES:
        size = {"classes": n_classes, "d": d, "k": 8, "numbers": n_classes * d * 8}
        steps.append(race("optimiser step", optimiser_arms(n_classes, d, 8), size=size, repeats=5, warmup=2))
        heads.append(race("head, batch 128", head_arms(128, n_classes, d, 8), size=size, repeats=5, warmup=2))
    save(
        "grassmann_head",
        [*steps, *heads],
        step_growth=growth(steps, "numbers"),
        svd_growth=growth(steps, "numbers", "batched SVD, as published"),
        head_growth=growth(heads, "numbers"),
        peak_bytes={
            f"{what}, {n_classes} classes": peaks(f"from grassmann_head import {make}\narms = {make}({sizes})")
            for n_classes, d in SIZES
            for what, make, sizes in (
                ("optimiser step", "optimiser_arms", f"{n_classes}, {d}, 8"),
                ("head", "head_arms", f"128, {n_classes}, {d}, 8"),
            )
        },
    )


if __name__ == "__main__":
    main()
