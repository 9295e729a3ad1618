import copy
import json
import re

import numpy as np
import pytest
import torch
from cyclopts import App
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from polyspan.cli.projector import convert, directions
from polyspan.cli.projector_generator import traverse
from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import load_fitted
from polyspan.nn import (
    HouseholderProjector,
    LowRankOrthogonal,
    StyleGenerator,
    discover_directions,
    load_directions,
    project_model,
    project_weights,
)

WEIGHTS = "*.affine.weight"


@pytest.fixture
def generator():
    return StyleGenerator((6, 6), latent_dim=8, width=12, num_layers=2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(tmp_path, generator):
    save_file(generator.state_dict(), tmp_path / "g.safetensors")
    return tmp_path / "g.safetensors"


def test_converted_weights_are_those_of_the_library_and_all_else_stays(tmp_path, generator, checkpoint, capsys):
    out = tmp_path / "p.safetensors"
    convert(checkpoint, weights=WEIGHTS, rank=3, out=out, directions=tmp_path / "d.npz", json=True)
    said = json.loads(capsys.readouterr().out)
    before, made = load_file(checkpoint), load_file(out)
    expected, found = project_weights(before, WEIGHTS, 3)
    assert made.keys() == before.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    report = project_model(generator, "*.affine", rank=3)
    kept = load_directions(tmp_path / "d.npz")
    assert list(kept) == ["layers.0.affine", "layers.1.affine"]
    for told, layer in zip(said["layers"], report.layers, strict=True):
        assert (told["weight"], told["shape"]) == (f"{layer.name}.weight", [12, 8])
        for key in ("kept_share", "spread", "gain"):
            assert told[key] == pytest.approx(getattr(layer, key), rel=1e-5)
        A, B = before[told["weight"]], made[told["weight"]]
        assert told["changed"] == pytest.approx(float((A - B).norm() / A.norm()), rel=1e-5)
        torch.testing.assert_close(kept[layer.name].vectors, found[told["weight"]], rtol=0, atol=0)
        torch.testing.assert_close(kept[layer.name].values, torch.full((3,), told["gain"]))
        np.testing.assert_allclose(torch.linalg.svdvals(B)[:4], [told["gain"]] * 3 + [0], atol=1e-5)


def test_the_code_that_made_a_checkpoint_loads_it_and_makes_the_pictures_of_the_projected_model(
    tmp_path, generator, checkpoint
):
    convert(checkpoint, weights=WEIGHTS, rank=3, out=tmp_path / "p.safetensors")
    plain = StyleGenerator((6, 6), latent_dim=8, width=12, num_layers=2)
    plain.load_state_dict(load_file(tmp_path / "p.safetensors"))
    project_model(generator, "*.affine", rank=3)
    latents = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain(latents), generator(latents), rtol=1e-4, atol=1e-5)


def test_a_generator_of_ours_is_loaded_as_before_and_walked(tmp_path, generator, capsys):
    source, out, found = (
        generator.save(tmp_path / "g.safetensors", seed=7),
        tmp_path / "p.safetensors",
        tmp_path / "d.npz",
    )
    convert(source, weights=WEIGHTS, rank=3, out=out, directions=found)
    expected = copy.deepcopy(generator)
    expected.load_state_dict(project_weights(generator.state_dict(), WEIGHTS, 3)[0])
    latents = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(StyleGenerator.load(out)(latents), expected.eval()(latents))
    assert load_fitted(out).about == {"seed": 7}
    capsys.readouterr()
    traverse(out, directions=found, json=True)
    assert json.loads(capsys.readouterr().out)["change a unit step outside"] < 1e-5


def test_converting_again_changes_nothing_and_loses_nothing(tmp_path, checkpoint, capsys):
    convert(checkpoint, weights=WEIGHTS, rank=3, out=tmp_path / "p.safetensors")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weight\tshape\tkept\tchanged\tspread\tgain"
    assert lines[1].startswith("layers.0.affine.weight\t12 x 8\t0.")
    convert(tmp_path / "p.safetensors", weights=WEIGHTS, rank=3, out=tmp_path / "q.safetensors", json=True)
    for layer in json.loads(capsys.readouterr().out)["layers"]:
        assert layer["kept_share"] == pytest.approx(1, abs=1e-6)
        assert layer["spread"] == pytest.approx(1, abs=1e-5)
        assert layer["changed"] < 1e-5


def test_narrow_weights_of_a_folder_keep_their_dtype_and_a_gain_can_be_given(tmp_path, checkpoint, capsys):
    state = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(checkpoint).items()}
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    how = {"weights": WEIGHTS, "rank": 2, "gain": "0.5", "directions": tmp_path / "d.safetensors", "json": True}
    convert(tmp_path / "folder", out=tmp_path / "p.safetensors", **how)
    assert [layer["gain"] for layer in json.loads(capsys.readouterr().out)["layers"]] == pytest.approx(
        [0.5] * 2, rel=0.01
    )
    made = load_file(tmp_path / "p.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    vectors = load_directions(tmp_path / "d.safetensors")["layers.0.affine"].vectors
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(2), rtol=0, atol=0.02)


def test_a_weight_of_less_rank_is_named(tmp_path, checkpoint, capsys):
    state = load_file(checkpoint)
    state["layers.1.affine.weight"] = torch.outer(torch.arange(12.0), torch.ones(8))
    save_file(state, checkpoint)
    convert(checkpoint, weights=WEIGHTS, rank=3, out=tmp_path / "p.safetensors", json=True)
    told = capsys.readouterr()
    assert "layers.1.affine.weight has a rank below 3: the directions beyond it are arbitrary" in told.err
    assert len(json.loads(told.out)["warnings"]) == 1


def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path, checkpoint):
    def refused(message, kind=ValueError, source=checkpoint, **how):
        there = sorted(tmp_path.iterdir())
        with pytest.raises(kind, match=message):
            convert(source, **({"weights": WEIGHTS, "rank": 3, "out": tmp_path / "p.safetensors"} | how))
        assert sorted(tmp_path.iterdir()) == there

    refused(r"--weights must fit the name of a layer, got 'x'; candidates are layers.0.affine.weight, ", weights="x")
    refused(r"layers.0.affine.weight: rank must be between 1 and 8, .*, got 9", rank=9)
    refused(r"layers.0.affine.weight: rank must be between 1 and 8, .*, got 0", rank=0)
    refused(r"layers.0.affine.bias: weight must be a matrix of floats, got shape \(12,\)", weights="*.affine.bias")
    for gain in ("much", "-1", "inf"):
        refused(f"--gain must be mean, or a finite number above 0, got '{gain}'", gain=gain)
    refused(r"--out must end in \.safetensors, got 'p\.npz'", out=tmp_path / "p.npz")
    refused("--out must be another file than a file that is read", out=checkpoint)
    refused("--directions must be another file than that of --out", directions=tmp_path / "p.safetensors")
    refused(r"--directions must end in \.npz or \.safetensors", directions=tmp_path / "d.txt")
    refused(r"missing\.safetensors", UnreadableFile, source=tmp_path / "missing.safetensors")
    state = load_file(checkpoint)
    state["layers.0.affine.weight"][1, 2] = torch.nan
    save_file(state, checkpoint)
    refused(r"layers\.0\.affine\.weight: found NaN or infinity", WrongContent)


def test_the_file_of_a_sharded_checkpoint_is_not_replaced(tmp_path, checkpoint):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "model.safetensors"
    checkpoint.rename(file)
    with pytest.raises(ValueError, match="--out must be another file than a file that is read"):
        convert(file.parent, weights=WEIGHTS, rank=3, out=file)


@pytest.mark.parametrize("gain", ["mean", "learned"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_directions_of_projected_layers_are_those_of_the_model(tmp_path, generator, capsys, gain, suffix):
    """Layers of the module's own kind and parametrised ones, moved off their start as by fine-tuning."""
    generator.layers[0].affine = HouseholderProjector.from_linear(generator.layers[0].affine, 3, gain)
    parametrize.register_parametrization(generator.layers[1].affine, "weight", LowRankOrthogonal(2, gain=gain))
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "affine" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    save_file(generator.state_dict(), tmp_path / "g.safetensors")
    out = tmp_path / f"d{suffix}"
    directions(tmp_path / "g.safetensors", out=out, json=True)
    said, made, expected = json.loads(capsys.readouterr().out), load_directions(out), discover_directions(generator)
    assert list(made) == list(expected) == [layer["layer"] for layer in said["layers"]]
    assert [len(found.vectors) for found in made.values()] == [3, 2]
    for name, found in made.items():
        for part, whole in zip(found, expected[name], strict=True):
            torch.testing.assert_close(part, whole, rtol=0, atol=0)
    directions(tmp_path / "g.safetensors", out=out, weights="*.1.affine.weight", count=1)
    assert [list(found.vectors.shape) for found in load_directions(out).values()] == [[1, 8]]


def test_directions_of_plain_weights_are_singular_vectors(tmp_path, generator, checkpoint, capsys):
    out = tmp_path / "d.npz"
    directions(checkpoint, method="sefa", weights=WEIGHTS, count=5, out=out)
    names = ["layers.0.affine", "layers.1.affine"]
    expected = discover_directions(generator, names, "sefa", num_directions=5)
    for name, found in load_directions(out).items():
        for part, whole in zip(found, expected[name], strict=True):
            torch.testing.assert_close(part, whole, rtol=0, atol=0)
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(expected[names[0]].values[i]) for i in (0, 4))
    assert lines[0] == "layer\tdirections\tsize\tfirst value\tlast value"
    assert lines[1] == f"layers.0.affine\t5\t8\t{first:.4g}\t{last:.4g}"


def test_directions_that_are_not_there_are_told_and_nothing_is_written(tmp_path, generator, checkpoint):
    def refused(message, kind=ValueError, source=checkpoint, **how):
        with pytest.raises(kind, match=message):
            directions(source, **({"out": tmp_path / "d.npz"} | how))
        assert not (tmp_path / "d.npz").exists()

    refused(r"g\.safetensors must hold low-rank orthogonal layers for --method householder, got none")
    refused("--weights must be given for --method sefa", method="sefa")
    refused("--weights must fit the name of a weight, got 'x'; candidates are layers.0", method="sefa", weights="x")
    refused("--count must be at least 1, got 0", count=0)
    refused("--count must be between 1 and 8, got 9", method="sefa", weights=WEIGHTS, count=9)
    refused("matrix for a weight for 'sefa', got 'constant'", method="sefa", weights="constant")
    refused(r"--out must end in \.npz or \.safetensors", out=tmp_path / "d.txt")
    refused("--out must be another file than a file that is read", out=checkpoint)
    save_file({"a.weight": torch.ones(3, 3, dtype=torch.int32)}, tmp_path / "i.safetensors")
    how = {"source": tmp_path / "i.safetensors", "method": "sefa", "weights": "*"}
    refused(r"a\.weight: weight must be of floats, got torch\.int32", **how)
    project_model(generator, "*.affine", rank=3)
    state = generator.state_dict()
    refused_state = {**state, "layers.0.affine.in_vectors": torch.ones(8, 4)}
    save_file(refused_state, tmp_path / "h.safetensors")
    refused(re.escape("expected (p, r), (d, r), (2, r) and ()"), WrongContent, source=tmp_path / "h.safetensors")
    save_file(state, tmp_path / "h.safetensors")
    refused("candidates are layers.0.affine.weight", source=tmp_path / "h.safetensors", weights="x")


def test_the_command_line_knows_the_options_by_their_names(tmp_path, checkpoint):
    app = App()
    app.command(convert, name="convert")
    app.command(directions, name="directions")

    def ran(*words):
        app(list(map(str, words)), exit_on_error=False, print_error=False, result_action="return_value")

    out = tmp_path / "p.safetensors"
    ran("convert", checkpoint, "--weights", WEIGHTS, "--rank", 3, "--gain", "mean", "-o", out)
    expected = project_weights(load_file(checkpoint), WEIGHTS, 3)[0]["layers.0.affine.weight"]
    torch.testing.assert_close(load_file(out)["layers.0.affine.weight"], expected, rtol=0, atol=0)
    ran("directions", out, "--method", "sefa", "--weights", WEIGHTS, "--count", 3, "-o", tmp_path / "d.npz")
    vectors = load_directions(tmp_path / "d.npz")["layers.0.affine"].vectors
    lost = expected - expected @ vectors.mT @ vectors
    assert float(lost.norm()) < 1e-5


def test_a_weight_without_the_usual_name_keeps_its_own(tmp_path):
    model = nn.Module()
    model.basis = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    directions(tmp_path / "m.safetensors", method="sefa", weights="basis", out=tmp_path / "d.npz")
    found = load_directions(tmp_path / "d.npz")["basis"]
    torch.testing.assert_close(found.values, torch.linalg.svdvals(model.basis.detach()))
