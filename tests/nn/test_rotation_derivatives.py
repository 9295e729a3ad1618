import itertools
from functools import partial

import pytest
import torch

from polyspan.nn import (
    RotationHead,
    rotation5d_to_matrix,
    rotation6d_to_matrix,
    rotation9d_to_matrix,
    rotationnd_to_matrix,
)

ROWS = {
    "5D": (5, partial(rotation5d_to_matrix, check=False)),
    "6D": (6, partial(rotation6d_to_matrix, check=False)),
    "6D, n = 4": (12, partial(rotationnd_to_matrix, check=False)),
    "9D": (9, partial(rotation9d_to_matrix, check=False)),
}
for n in (2, 4, 5):
    generator = torch.Generator().manual_seed(n)
    ROWS[f"9D, n = {n}"] = (7, RotationHead(7, "9d", n=n, check=False, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", ROWS)
def test_derivatives_of_every_order_in_every_mode_go_through_vmap(name):
    g = torch.Generator().manual_seed(5)
    width, f = ROWS[name]
    x, v = (torch.randn(2, width, generator=g, dtype=torch.float64) for _ in range(2))

    def loss(x):
        R = f(x)
        return (R**3 * torch.arange(R.numel(), dtype=R.dtype).reshape(R.shape)).sum()

    expected = torch.stack([torch.autograd.functional.hessian(loss, row) for row in x])
    for outer, inner in itertools.product((torch.func.jacfwd, torch.func.jacrev), repeat=2):
        torch.testing.assert_close(torch.vmap(outer(inner(loss)))(x), expected)

    def slope(x, v):
        return torch.func.jvp(loss, (x,), (v,))[1]

    third = torch.vmap(torch.func.jacfwd(torch.func.jacfwd(slope)))(x, v)
    for row, along, made in zip(x, v, third, strict=True):
        backward = torch.autograd.functional.hessian(
            lambda x, along=along: (torch.autograd.grad(loss(x), x, create_graph=True)[0] * along).sum(), row
        )
        torch.testing.assert_close(made, backward)
