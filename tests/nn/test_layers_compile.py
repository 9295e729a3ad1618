"""Layers compile into one graph, with the same gradients, and a scan is exported for maps of any size."""

import subprocess
import sys

import pytest

CODE = """
import torch
from polyspan.nn import CRATEBlock, CausalGrassmannMixing, MHSBlock, MultiHeadScan2d, ULSAM

def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

g = torch.Generator().manual_seed(0)
layers = (
    (ULSAM(6, 3, generator=g), draw(2, 6, 4, 3)),
    (ULSAM(6, 3, generator=g).eval().fuse(), draw(2, 6, 4, 3)),
    (CausalGrassmannMixing(8, 4, (1, 3), 0.0, generator=g), draw(2, 5, 8)),
    (MultiHeadScan2d(8, d_state=2, generator=g), draw(1, 3, 4, 8)),
    (CRATEBlock(8, 2, generator=g), draw(2, 5, 8)),
)
for layer, x in layers:
    x.requires_grad_()
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = call(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
        x.grad = None
        layer.zero_grad()
    for whole, plain in zip(*results, strict=True):
        torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-4)
    print(type(layer).__name__)

block = MHSBlock(8, 0.5, d_state=2, generator=g).train()
x, kept = draw(4, 3, 4, 8), block.draw_paths(4)
whole = torch.compile(block, backend="aot_eager", fullgraph=True)(x, kept)
torch.testing.assert_close(whole, block(x, kept))
assert torch.equal(whole[~kept], x[~kept]) and not kept.all() and kept.any()
print("paths drawn outside")

scan = layers[3][0].eval()
sides = {1: torch.export.Dim("h", min=2, max=40), 2: torch.export.Dim("w", min=2, max=40)}
exported = torch.export.export(scan, (draw(2, 4, 6, 8),), dynamic_shapes=(sides,)).module()
for shape in ((2, 4, 6, 8), (2, 7, 3, 8)):
    torch.testing.assert_close(exported(draw(*shape)), scan(draw(*shape)))
print("any size")
"""


@pytest.mark.slow
def test_layers_compile_into_one_graph_with_the_same_gradients():
    """In a process of its own, as shapes are not checked there: the checks are no part of a graph."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    told = [
        "ULSAM",
        "FusedULSAM",
        "CausalGrassmannMixing",
        "MultiHeadScan2d",
        "CRATEBlock",
        "paths drawn outside",
        "any size",
    ]
    assert done.stdout.split("\n") == [*told, ""], done.stderr[-3000:]
