"""Every public torch module keeps the promises of a drop-in layer; a new one without a case fails here."""

import pytest
import torch

from polyspan.cluster import CodingRate, DoublyStochastic, RateReductionLoss, TotalCodingRateLoss
from polyspan.nn import GrassmannHead, RotationHead
from polyspan.testing import ModuleCase, check_module, public_modules


def normal(*shape):
    return lambda batch, generator: (torch.randn(batch, *shape, generator=generator),)


def unit(*shape, n=1):
    def draw(batch, generator):
        return tuple(
            torch.nn.functional.normalize(torch.randn(batch, *shape, generator=generator), dim=-1) for _ in range(n)
        )

    return draw


def with_memberships(batch, generator):
    return torch.randn(batch, 6, 4, generator=generator), torch.rand(batch, 6, 3, generator=generator)


CASES = {
    "cluster.CodingRate": [ModuleCase(lambda **kw: CodingRate(**kw), normal(6, 4))],
    "cluster.DoublyStochastic": [ModuleCase(lambda **kw: DoublyStochastic(**kw), unit(6, 4), compiles=False)],
    "cluster.RateReductionLoss": [
        ModuleCase(lambda **kw: RateReductionLoss(**kw), with_memberships),
        ModuleCase(lambda **kw: RateReductionLoss(top=3, frobenius=0.1, **kw), with_memberships),
    ],
    "cluster.TotalCodingRateLoss": [ModuleCase(lambda **kw: TotalCodingRateLoss(**kw), unit(6, 4, n=2))],
    "nn.GrassmannHead": [
        ModuleCase(lambda **kw: GrassmannHead(12, 5, 3, **kw), normal(12)),
        ModuleCase(lambda **kw: GrassmannHead(12, 5, 3, **kw), normal(4, 12)),
    ],
    "nn.RotationHead": [
        ModuleCase(lambda **kw: RotationHead(12, **kw), normal(12)),
        ModuleCase(lambda **kw: RotationHead(12, "5d", **kw), normal(4, 12)),
        ModuleCase(lambda **kw: RotationHead(12, "9d", **kw), normal(12)),
        ModuleCase(lambda **kw: RotationHead(12, "quaternion", **kw), normal(12)),
        ModuleCase(lambda **kw: RotationHead(12, n=4, **kw), normal(12)),
    ],
}


def test_every_module_has_a_case():
    assert set(public_modules()) == set(CASES)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_a_module_keeps_the_promises_of_a_layer(name, case):
    check_module(case)
