import json

import numpy as np
import pytest

from polyspan.align import load_aligner
from polyspan.cli.align import fit, score
from polyspan.io import write_array


@pytest.fixture(params=[(12, 12), (12, 17), (17, 12)])
def files(request, tmp_path):
    """Rows of one latent space in two embedding spaces, of one width or of two."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 8))
    for name, width in zip("xy", request.param, strict=True):
        turn = np.linalg.qr(rng.normal(size=(width, 8)))[0].T
        rows = latent @ turn + 0.01 * rng.normal(size=(300, width))
        write_array(tmp_path / f"{name}.npy", rows.astype(np.float32))
    return tmp_path, request.param[0] == request.param[1]


@pytest.mark.parametrize("method", ["orthogonal", "ridge", "auto"])
def test_spaces_of_one_width_or_two_are_aligned_reported_and_scored(files, method, capsys):
    folder, alike = files
    x, y, out = folder / "x.npy", folder / "y.npy", folder / "map.safetensors"
    fit(x, y, out=out, method=method, json=True)
    told = json.loads(capsys.readouterr().out)["held_out"]
    assert (told["cosine"]["before"] is not None) == alike
    assert told["recall"]["twin@1"] > 0.9
    X, Y = np.load(x), np.load(y)
    assert load_aligner(out)[0].score(X, Y) > 0.9
    fit(x, y, out=folder / "again.safetensors", method=method)
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert shown["cosine"].endswith(" after")
    assert shown["cosine"].startswith("- before, ") != alike
    score(out, x, y)
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert shown["cosine"].startswith("- before, ") != alike
    assert "nan" not in shown["cosine"]
