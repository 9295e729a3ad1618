"""Race a step's decoding and retraction against the published algorithm: dense codes, and a Householder QR.

Target: decoding forwards and backwards, and the retraction, at least 3 times as fast at d = 256, 4,096 latents and
1,024 rows of 64 latents each. A whole step of training is raced as well; there the encoder, equal in both, sets the
limit.

At d = 1,024 both are bound by products of matrices: 48.4 Gflop dense (25.8 with the codes, 6.8 with C1 to C3, 15.8 of
the QR) against 17.3 (0.4, 6.8, and 10.0 of the retraction: Gram matrix and triangular solve 4.3 each). At equal rates
that is 2.8 times, and no more. At d = 64 a step is some hundred calls of microseconds, whatever they work on.

The system is the catalogue's ``polysae``.
"""

import itertools

import torch
from torch import Tensor, nn

from _runner import growth, race, save
from polyspan.learn import PolynomialSAEModule
from polyspan.learn._cholesky_qr import cholesky_qr

SIZES = ((1_024, 4_096, 1_024, 64), (256, 4_096, 1_024, 64), (128, 2_048, 512, 32), (64, 512, 256, 16))
HIGH = 32


class Dense(nn.Module):
    """The published decoder: all latents enter every product, whether they fire or not."""

    U_shared: Tensor
    C2: Tensor
    C3: Tensor

    def __init__(self, module):
        super().__init__()
        for name in ("U_shared", "C1", "C2", "C3", "lambda2", "lambda3", "b_dec"):
            setattr(self, name, nn.Parameter(getattr(module, name).detach().clone()))

    def forward(self, z):
        a = z @ self.U_shared
        second, third = a[:, : self.C2.shape[1]], a[:, : self.C3.shape[1]]
        y = self.b_dec + a @ self.C1.T + self.lambda2 * ((second * second) @ self.C2.T)
        return y + self.lambda3 * ((third * third * third) @ self.C3.T)

    @torch.no_grad()
    def retract(self):
        Q, R = torch.linalg.qr(self.U_shared, mode="reduced")
        sign = torch.sign(torch.diag(R))
        sign[sign == 0] = 1
        self.U_shared.copy_(Q * sign)


def arms(d, m, b, k, *, whole):
    """One step from codes, or (``whole``) from activations; then the retraction of U, moved by a little."""
    generator = torch.Generator().manual_seed(0)
    ours = PolynomialSAEModule(d, m, k, (d, HIGH, HIGH), generator=generator)
    theirs = Dense(ours)
    x, up = torch.randn(b, d, generator=generator), torch.randn(b, d, generator=generator)
    step = 1e-3 * torch.randn(m, d, generator=generator)
    # There and back: steps that all went one way would in time be larger than any of a training.
    own_steps, their_steps = itertools.cycle((step, -step)), itertools.cycle((step, -step))
    given = ours.sparse_encode(x)
    values = given.values.detach().requires_grad_()
    z = given.dense(m).detach().requires_grad_()

    def sparse():
        ours.zero_grad(set_to_none=True)
        codes = ours.train_codes(x)[0] if whole else given._replace(values=values)
        ours.sparse_decode(codes)[0].backward(up)
        with torch.no_grad():
            ours.U_shared.add_(next(own_steps))
        ours.retract_()
        values.grad = None

    def dense():
        theirs.zero_grad(set_to_none=True)
        codes = z
        if whole:
            pre = ours.pre_activations(x)
            best = pre.topk(k, dim=-1)
            codes = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        theirs(codes).backward(up)
        with torch.no_grad():
            theirs.U_shared.add_(next(their_steps))
        theirs.retract()
        z.grad = None

    return {"polyspan, sparse codes and Cholesky QR": sparse, "dense codes and Householder QR": dense}


def retractions(d, m):
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(m, d, generator=generator))[0].contiguous()
    U = U + 1e-3 * torch.randn(m, d, generator=generator)
    return {"polyspan, Cholesky QR": lambda: cholesky_qr(U), "Householder QR": lambda: torch.linalg.qr(U)}


def main(sizes=SIZES) -> None:
    torch.set_num_threads(1)
    named = [{"d": d, "latents": m, "rows": b, "k": k} for d, m, b, k in sizes]
    found = [race("decode and retract", arms(*s, whole=False), size=n) for s, n in zip(sizes, named, strict=True)]
    whole = [
        race("encode, decode and retract", arms(*s, whole=True), size=n) for s, n in zip(sizes, named, strict=True)
    ]
    alone = [race("retract", retractions(d, m), size={"d": d, "latents": m}) for d, m, _, _ in sizes]
    save(
        "polynomial_sae",
        found + whole + alone,
        growth_in_latents=growth(found, "latents"),
        targets={"decode and retract": 3},
    )


if __name__ == "__main__":
    main()
