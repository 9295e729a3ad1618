import json

import numpy as np
import pytest
import torch
from cyclopts import App
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

from polyspan.cli.projector import directions
from polyspan.cli.projector_generator import train, traverse
from polyspan.data import digits
from polyspan.errors import CorruptFile, UnreadableFile, WrongContent
from polyspan.io import load_fitted, save_fitted, write_members
from polyspan.nn import (
    HouseholderProjector,
    LowRankOrthogonal,
    StyleGenerator,
    direction_strengths,
    discover_directions,
    project_model,
)

FEW = {"rank": 3, "latent": 8, "width": 24, "layers": 2, "steps": 60, "fine_tune": 20, "device": "cpu"}


def latents(n=5, seed=1):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def generator():
    return StyleGenerator((6, 5), latent_dim=8, width=12, num_layers=2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def projected(generator, tmp_path):
    project_model(generator, rank=3)
    return generator.save(tmp_path / "g.safetensors")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "x.npy"
    np.save(path, (digits()[0].reshape(-1, 8, 8)[:300] * 255).astype(np.uint8))
    return path


@pytest.mark.parametrize("gain", ["mean", "learned", 0.5, None])
def test_a_saved_generator_makes_the_same_pictures_and_keeps_what_can_learn(generator, tmp_path, gain):
    if gain is not None:
        project_model(generator, "layers.1.affine", rank=3, gain=gain)
    generator.save(tmp_path / "g.safetensors", note="kept")
    loaded = StyleGenerator.load(tmp_path / "g.safetensors")
    assert not loaded.training
    torch.testing.assert_close(loaded(latents()), generator(latents()), rtol=0, atol=0)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, _ in generator.named_parameters()}
    assert isinstance(loaded.layers[1].affine, nn.Linear if gain is None else HouseholderProjector)
    assert load_fitted(tmp_path / "g.safetensors").about == {"note": "kept"}
    before = (tmp_path / "g.safetensors").read_bytes()
    assert loaded.save(tmp_path / "again.safetensors", note="kept").read_bytes() == before


def test_what_cannot_be_saved_or_read_is_named(generator, projected, tmp_path):
    parametrize.register_parametrization(generator.layers[0].mix, "weight", LowRankOrthogonal(2))
    generator.layers[1].affine = nn.Sequential(nn.Linear(8, 12))
    with pytest.raises(
        ValueError, match=r"layers\.1\.affine must be Linear or HouseholderProjector .*, got Sequential"
    ):
        generator.save(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        StyleGenerator((2, 2)).save(tmp_path / "g.pt")
    found = load_fitted(projected)

    def refused(message, kind=WrongContent, arrays=None, **params):
        path = tmp_path / "bad.safetensors"
        save_fitted(path, kind="StyleGenerator", arrays=arrays or found.arrays, params={**found.params, **params})
        with pytest.raises(kind, match=message):
            StyleGenerator.load(path)

    config = found.params["config"]
    refused("size mismatch for constant: .*12.*13", config={**config, "width": 13, "num_layers": 2})
    refused("params that make no generator", ranks=[3])
    refused("params that make no generator: ValueError", ranks=[9, 3])
    refused("params that make no generator: .*'colour'", config={**config, "colour": 1})
    refused("layers.0.affine.gain", arrays={k: v for k, v in found.arrays.items() if k != "layers.0.affine.gain"})
    save_fitted(tmp_path / "other.safetensors", kind="PolySAE", arrays=found.arrays, params={})
    with pytest.raises(WrongContent, match="a fitted PolySAE"):
        StyleGenerator.load(tmp_path / "other.safetensors")
    data = bytearray(projected.read_bytes())
    data[-3] ^= 1
    projected.write_bytes(data)
    with pytest.raises(CorruptFile):
        StyleGenerator.load(projected)
    with pytest.raises(UnreadableFile):
        StyleGenerator.load(tmp_path / "missing.safetensors")


def test_train_writes_a_generator_whose_directions_alone_move_it(pictures, tmp_path, capsys):
    out = tmp_path / "g.safetensors"
    train(pictures, out=out, json=True, **{**FEW, "width": 64, "steps": 300})
    said = json.loads(capsys.readouterr().out)
    assert (said["trained on"], said["measured on"]) == (240, 60)
    assert said["unexplained, fine-tuned"] < said["unexplained, projected"]
    assert said["unexplained, free layers"] < 0.7
    assert load_fitted(out).about["picture_range"] == [0, 255]
    traverse(out, plot=tmp_path / "w.png", reach=2.0, columns=5, json=True)
    told = json.loads(capsys.readouterr().out)
    changes = [row["change a unit step"] for row in told["directions"]]
    assert len(changes) == 3
    assert min(changes) > 1e-3
    # Zero but for rounding of the latent's own products.
    assert told["change a unit step outside"] < 1e-3 * min(changes)
    with Image.open(tmp_path / "w.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    train(pictures, out=tmp_path / "free.safetensors", json=True, **{**FEW, "rank": 0})
    said = json.loads(capsys.readouterr().out)
    assert "layers" not in said
    assert all(isinstance(layer.affine, nn.Linear) for layer in StyleGenerator.load(said["out"]).layers)


def test_training_twice_with_one_seed_gives_one_file(pictures, tmp_path):
    made = [train(pictures, out=tmp_path / f"{i}.safetensors", **{**FEW, "steps": 5}) for i in range(2)]
    assert made == [None, None]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_numbers_of_a_walk_are_those_of_the_library_and_pictures_of_a_seed_are_alike(
    generator, projected, tmp_path, capsys
):
    directions(projected, out=tmp_path / "d.npz")
    capsys.readouterr()
    for plot in ("a.svg", "b.svg"):
        how = {"directions": tmp_path / "d.npz", "layer": "layers.1.affine", "count": 2, "samples": 16, "seed": 3}
        traverse(projected, plot=tmp_path / plot, json=True, **how)
        told = json.loads(capsys.readouterr().out)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    expected = direction_strengths(
        generator, "layers.1.affine", discover_directions(generator)["layers.1.affine"], latents(16, 3)
    )
    found = [row["change a unit step"] for row in told["directions"]]
    np.testing.assert_allclose(found, expected[:2].detach().numpy(), rtol=1e-5)
    traverse(projected, samples=16, seed=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "direction\tvalue\tchange a unit step"
    assert [line.split("\t")[0] for line in lines[1:]] == ["1", "2", "3", "outside", "path length"]


def test_the_layer_whose_directions_change_pictures_most_is_walked(generator, projected, capsys):
    traverse(projected, samples=16, seed=3, json=True)
    told = json.loads(capsys.readouterr().out)
    sizes = {
        name: float(direction_strengths(generator, name, found, latents(16, 3)).norm())
        for name, found in discover_directions(generator).items()
    }
    assert told["layer"] == max(sizes, key=sizes.get)
    assert min(sizes.values()) < max(sizes.values())


def test_directions_of_another_method_and_all_of_a_latent_can_be_walked(generator, tmp_path, capsys):
    generator.save(tmp_path / "g.safetensors")
    directions(tmp_path / "g.safetensors", method="sefa", weights="*.affine.weight", out=tmp_path / "d.npz")
    capsys.readouterr()
    traverse(tmp_path / "g.safetensors", directions=tmp_path / "d.npz", json=True)
    told = json.loads(capsys.readouterr().out)
    assert len(told["directions"]) == 8
    assert told["change a unit step outside"] is None


def test_a_walk_that_cannot_be_taken_is_refused_and_nothing_is_written(generator, projected, tmp_path):
    free = StyleGenerator((6, 5), latent_dim=8, width=12, num_layers=2).save(tmp_path / "free.safetensors")

    def refused(message, kind=ValueError, source=projected, **how):
        with pytest.raises(kind, match=message):
            traverse(source, **({"plot": tmp_path / "w.svg"} | how))
        assert not (tmp_path / "w.svg").exists()

    refused(r"--plot must end in \.svg or \.png or \.pdf, got 'w\.txt'", plot=tmp_path / "w.txt")
    refused("--plot must be a file in a folder that is there", plot=tmp_path / "none" / "w.svg")
    refused("--directions must be given: the layers of .*free.safetensors are free", source=free)
    refused("--reach must be above 0 and finite, got 0", reach=0.0)
    refused("--columns must be at least 2, got 1", columns=1)
    refused("--samples must be at least 2, got 1", samples=1)
    refused("--count must be between 1 and 3, got 4", count=4)
    refused(r"--layer must be one of layers\.0\.affine, layers\.1\.affine, got 'x'", layer="x")
    refused("missing", UnreadableFile, source=tmp_path / "missing.safetensors")
    refused("missing", UnreadableFile, directions=tmp_path / "missing.npz")
    write_members(tmp_path / "other.npz", {"x": np.ones(3)})
    refused("vectors", WrongContent, directions=tmp_path / "other.npz")
    for layer, vectors, message in (
        (
            "layers.7.affine",
            np.eye(8)[:2],
            r"--directions must be of layers of the generator, .*, got 'layers\.7\.affine'",
        ),
        ("layers.0.affine", np.eye(7)[:2], r"--directions must be rows of 8 numbers, as latents are, got \(2, 7\)"),
        ("layers.0.affine", 2 * np.eye(8)[:2], "--directions must be orthonormal rows, got rows off by 3"),
        ("layers.0.affine", np.full((2, 8), np.nan), "--directions must be orthonormal|finite"),
    ):
        write_members(tmp_path / "d.npz", {f"{layer}/vectors": vectors, f"{layer}/values": np.ones(2)})
        refused(message, (ValueError, WrongContent), directions=tmp_path / "d.npz")
    colours = StyleGenerator((2, 6, 5), latent_dim=8, width=12, num_layers=2)
    project_model(colours, rank=3)
    colours.save(tmp_path / "c.safetensors")
    refused("generator must make pictures", source=tmp_path / "c.safetensors")


def test_what_cannot_be_trained_on_is_refused_and_nothing_is_written(pictures, tmp_path):
    def refused(message, kind=ValueError, source=pictures, **how):
        with pytest.raises(kind, match=message):
            train(source, **({"out": tmp_path / "g.safetensors", **FEW} | how))
        assert not (tmp_path / "g.safetensors").exists()

    refused(r"--out must end in \.safetensors", out=tmp_path / "g.npz")
    refused("--rank must be between 0 and 8, of --latent and --width, got 9", rank=9)
    for option in ("latent", "width", "layers", "batch_size"):
        refused(f"--{option.replace('_', '-')} must be at least 1, got 0", **{option: 0})
    refused("--steps must be at least 0, got -1", steps=-1)
    refused("--fine-tune must be at least 0, got -1", fine_tune=-1)
    refused("--rate must be above 0 and finite, got nan", rate=float("nan"))
    refused("--held-out must be between 0 and 1, got 1", held_out=1.0)
    refused("must give a finite loss", rate=1e30)
    np.save(tmp_path / "x.npy", np.ones((9, 4, 4), dtype=np.float32))
    refused("pictures must not all be of one value, got 1 everywhere", source=tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.ones((1, 4, 4), dtype=np.float32) * np.arange(4))
    refused("there must be at least 2 pictures", source=tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.ones((9, 16), dtype=np.float32))
    refused(r"pictures must be \(n, h, w\)", source=tmp_path / "x.npy")
    refused("missing", UnreadableFile, source=tmp_path / "missing.npy")


def test_the_command_line_knows_the_options_by_their_names(pictures, tmp_path, capsys):
    app = App()
    app.command(train, name="train")
    app.command(traverse, name="traverse")

    def ran(*words):
        app(list(map(str, words)), exit_on_error=False, print_error=False, result_action="return_value")

    out = tmp_path / "g.safetensors"
    ran("train", pictures, "-o", out, "--steps", 5, "--fine-tune", 2, "--rank", 2, "--latent", 6, "--width", 8)
    assert "layers.2.affine\t" in capsys.readouterr().out
    ran("traverse", out, "--plot", tmp_path / "w.svg", "--reach", 1.5, "--columns", 3, "--layer", "layers.2.affine")
    assert "<svg" in (tmp_path / "w.svg").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 5
