"""Where maps are of directions, reports and pictures of them are too."""

import json

import numpy as np
import pytest

from polyspan.align import OrthogonalMap, alignment_report
from polyspan.align.plots import plot_alignment
from polyspan.cli.crossmodal import fit
from polyspan.io import write_array

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4))
Y = X @ np.linalg.qr(RNG.normal(size=(4, 4)))[0] + 0.2 * RNG.normal(size=X.shape)
LENGTHS = 2.0 ** RNG.integers(-3, 4, size=(120, 1))


def test_what_a_map_of_directions_leaves_unexplained_does_not_hang_on_lengths():
    aligner = OrthogonalMap(normalize=True).fit(X, Y)
    seen, longer = (alignment_report(aligner, X, rows)["unexplained"] for rows in (Y, LENGTHS * Y))
    assert seen == pytest.approx(aligner.residual_, rel=1e-6)
    assert longer == pytest.approx(seen, rel=1e-6)


def test_a_picture_of_a_map_of_directions_does_not_hang_on_lengths(tmp_path):
    aligner = OrthogonalMap(normalize=True).fit(X, Y)
    one = plot_alignment(aligner, X, Y, tmp_path / "a.svg").read_bytes()
    assert plot_alignment(aligner, LENGTHS * X, LENGTHS * Y, tmp_path / "b.svg").read_bytes() == one


def test_subspaces_of_directions_are_reported_as_such(tmp_path, capsys):
    told = []
    for scale in (1.0, LENGTHS):
        write_array(tmp_path / "x.npy", scale * X)
        write_array(tmp_path / "y.npy", scale * Y)
        options = {"out": tmp_path / "m.safetensors", "components": "2", "normalize": True, "json": True}
        fit(tmp_path / "x.npy", tmp_path / "y.npy", **options)
        told.append(json.loads(capsys.readouterr().out)["held_out"])
    for name in ("correlations", "cka_raw", "cka_shared", "x_share", "shuffled_held_out"):
        np.testing.assert_allclose(told[0][name], told[1][name], rtol=1e-6, err_msg=name)
