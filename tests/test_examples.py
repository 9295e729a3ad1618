"""Every example runs as it stands and prints something."""

import runpy
import sys
from pathlib import Path

import pytest

DEAR = {
    "expert_merging", "grassmann_mixing", "manifold_linearizing", "multi_head_scan", "polynomial_sae", "rotation",
    "sparse_dictionary", "subspace_attention", "subspace_clustering",
}  # fmt: skip
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in DEAR))
    for path in sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
