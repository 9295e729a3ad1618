import json
import shutil

import numpy as np
import pytest
import torch
from cyclopts import App
from safetensors.torch import load_file, save_file
from torch import nn

from polyspan.cli.ulsam import insert, replace, report
from polyspan.errors import CorruptFile, UnreadableFile, WrongContent
from polyspan.nn import ULSAM, attention_facts, insert_ulsam, mobilenet_v1, replace_with_ulsam
from polyspan.nn.subspace_attention_files import load_attention_network, save_attention_network

SHAPE = "1,3,16,16"
SMALL = {"input": SHAPE, "classes": 5, "width": 0.125, "small_input": True}
NETWORK = {"kind": "mobilenet-v1", "num_classes": 5, "width": 0.125, "in_channels": 3, "small_input": True}
BLOCKS = ["features.8", "features.11"]
X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def network(seed=0):
    return mobilenet_v1(5, 0.125, small_input=True, generator=torch.Generator().manual_seed(seed)).eval()


def ran(command, capsys, *arguments, **options):
    capsys.readouterr()
    command(*arguments, json=True, **options)
    return json.loads(capsys.readouterr().out)


def literal_macs(model, x):
    """Count multiplications one by one, as the loops of a convolution would do them."""
    found = {}

    def count(name, module, args, out):
        _, m, h, w = args[0].shape
        if isinstance(module, nn.Conv2d):
            n = 0
            for _ in range(out.shape[1]):
                n += out.shape[2] * out.shape[3] * (m // module.groups) * module.kernel_size[0] * module.kernel_size[1]
            found[name] = n
        else:
            # One for each channel and place by its scale, and one by the weight of its group's sum.
            found[name] = sum(2 for _ in range(m) for _ in range(h * w))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | ULSAM):
            module.register_forward_hook(lambda *a, name=name: count(name, *a))
    model(x)
    return found


@torch.no_grad()
def literal_maps(module, F):
    """The attention of one image, group by group and place by place, from the weights as they stand."""
    m, g, h, w = module.num_channels, module.num_groups, *F.shape[2:]
    size, made, F = m // g, np.zeros((g, h, w)), F[0].tolist()
    scale, point = module.scale.flatten().tolist(), module.point.flatten(1).tolist()
    norms = {
        norm: [x.tolist() for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
        for norm in (module.scale_norm, module.point_norm)
    }

    def normed(norm, i, value):
        gain, bias, mean, variance = (part[i] for part in norms[norm])
        return max(0.0, gain / (variance + norm.eps) ** 0.5 * (value - mean) + bias)

    for n in range(g):
        u = [[[normed(module.scale_norm, c, scale[c] * F[c][i][j]) for j in range(w)] for i in range(h)]
             for c in range(n * size, (n + 1) * size)]  # fmt: skip
        for i in range(h):
            for j in range(w):
                q = 0.0
                for c in range(size):
                    around = [u[c][a][b] for a in range(max(0, i - 1), min(h, i + 2))
                              for b in range(max(0, j - 1), min(w, j + 2))]  # fmt: skip
                    q += point[n][c] * max(around)
                made[n, i, j] = np.exp(normed(module.point_norm, n, q))
        made[n] /= made[n].sum()
    return made


def trained_file(tmp_path, capsys):
    """A network with attention whose weights and statistics are none that it starts with."""
    path = tmp_path / "small.safetensors"
    ran(replace, capsys, "mobilenet-v1", blocks=",".join(BLOCKS), out=path, groups=4, **SMALL)
    found = load_attention_network(path)
    rng = torch.Generator().manual_seed(1)
    for name, value in found.model.state_dict().items():
        if value.is_floating_point() and name.startswith("features.1") and ("norm" in name or "point" in name):
            value.copy_(0.2 + torch.rand(value.shape, generator=rng))
    save_attention_network(found.model, path, found.network)
    return path


def test_what_is_written_is_the_networks_own_surgery_and_comes_back(tmp_path, capsys):
    out, weights = tmp_path / "made.safetensors", tmp_path / "weights.safetensors"
    save_file(network(3).state_dict(), weights)
    for command, operate in ((replace, replace_with_ulsam), (insert, insert_ulsam)):
        told = ran(command, capsys, "mobilenet-v1", blocks=",".join(BLOCKS), out=out, weights=weights, seed=7, **SMALL)
        expected, found = operate(network(3), BLOCKS, X, generator=torch.Generator().manual_seed(7))
        back = load_attention_network(out)
        assert back.network == NETWORK
        assert not back.model.training
        state = expected.state_dict()
        assert back.model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in back.model.state_dict().items())
        assert torch.equal(back.model(X), expected.eval()(X))
        assert told["changed"] == BLOCKS
        assert (told["parameters"], told["parameters_after"]) == (found.before.num_params, found.after.num_params)
        assert (told["macs"], told["macs_after"]) == (found.before.num_macs, found.after.num_macs)
        assert told["macs_share"] == found.macs_share
        assert [place["how"] for place in told["attention"]] == [command.__name__] * 2


def test_costs_layer_by_layer_are_those_of_a_literal_count(tmp_path, capsys):
    told = ran(report, capsys, "mobilenet-v1", blocks="features.8,features.9", **SMALL)
    plain, changed = network(), replace_with_ulsam(network(), ["features.8", "features.9"], X)[0]
    before, after = literal_macs(plain, X), literal_macs(changed, X)
    for row in told["layers"]:
        for when, counted, model in (("", before, plain), ("_after", after, changed)):
            if row["macs" + when] is None:
                assert row["layer"] not in dict(model.named_modules()) or row["class"] == "ULSAM"
                continue
            module = model.get_submodule(row["layer"])
            assert row["parameters" + when] == sum(p.numel() for p in module.parameters())
            if row["layer"] in counted:
                assert row["macs" + when] == counted[row["layer"]]
    linear = plain.classifier.weight.numel()
    assert told["macs"] == sum(before.values()) + linear
    assert told["macs_after"] == sum(after.values()) + linear
    assert told["parameters"] == sum(p.numel() for p in plain.parameters())
    assert told["parameters_after"] == sum(p.numel() for p in changed.parameters())
    names = [row["layer"] for row in told["layers"]]
    assert names.index("features.8.4") + 1 == names.index("features.8") < names.index("features.9.0")
    assert len(set(names)) == len(names)


def test_a_layer_behind_which_attention_stands_is_the_layer_that_it_was(capsys):
    told = ran(report, capsys, "mobilenet-v1", blocks="features.8", how="insert", **SMALL)
    rows = {row["layer"]: row for row in told["layers"]}
    for name, row in rows.items():
        if name != "features.8.attention":
            assert row["parameters"] == row["parameters_after"]
            assert row["macs"] == row["macs_after"]
    own = rows["features.8.attention"]
    m = own["output"][1]
    assert (own["parameters"], own["parameters_after"]) == (None, 4 * m + 2 * 4)
    assert told["parameters_after"] - told["parameters"] == 4 * m + 2 * 4


@pytest.mark.slow
def test_surgery_on_surgery_comes_back_too(tmp_path, capsys):
    first, second, third = (tmp_path / f"{i}.safetensors" for i in range(3))
    ran(replace, capsys, "mobilenet-v1", blocks="features.8", out=first, **SMALL)
    ran(insert, capsys, str(first), input=SHAPE, blocks="features.8,features.3", out=second, groups=2, kernel=1)
    told = ran(insert, capsys, str(second), input=SHAPE, blocks="features.6.0", out=third, norm=False, seed=2,
               residual=False)  # fmt: skip
    model = load_attention_network(third).model
    expected = network()
    replace_with_ulsam(expected, "features.8", X, generator=torch.Generator().manual_seed(0))
    insert_ulsam(expected, ["features.8", "features.3"], X, 2, kernel_size=1,
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    insert_ulsam(expected, "features.6.0", X, norm=False, residual=False,
                 generator=torch.Generator().manual_seed(2))  # fmt: skip
    assert torch.equal(model(X), expected.eval()(X))
    assert [(p["name"], p["how"]) for p in told["attention"]] == [
        ("features.3", "insert"), ("features.6.0", "insert"), ("features.8", "insert"),
        ("features.8.block", "replace"),
    ]  # fmt: skip
    assert told["parameters"] == sum(p.numel() for p in network().parameters())
    assert ran(report, capsys, str(third), input=SHAPE)["attention"] == told["attention"]


def test_maps_over_a_picture_are_those_of_a_literal_loop_and_are_drawn(tmp_path, capsys):
    pillow = pytest.importorskip("PIL.Image")
    path, picture = trained_file(tmp_path, capsys), tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    pillow.fromarray(pixels).save(picture)
    model = load_attention_network(path).model
    x = (torch.tensor(pixels / np.float32(255)).permute(2, 0, 1)[None] - 0.5) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    inputs = {}
    for name in BLOCKS:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    model(x)
    how = {"input": SHAPE, "image": picture, "mean": "0.5", "std": "0.2,0.3,0.4"}
    told = ran(report, capsys, str(path), plot=tmp_path / "maps.svg", **how)
    assert [row["layer"] for row in told["on image"]] == BLOCKS
    for name, row in zip(BLOCKS, told["on image"], strict=True):
        maps = literal_maps(model.get_submodule(name), inputs[name])
        assert maps.std() > 1e-3 / maps[0].size
        facts = attention_facts(torch.tensor(maps)[None])
        assert row["map"] == list(maps.shape)
        for key in ("divergence", "peak", "group_distance"):
            assert row[key] == pytest.approx(getattr(facts, key), rel=1e-3, abs=1e-6)
    assert (tmp_path / "maps.svg").read_text().count("<image") >= 2 * 5
    np.save(tmp_path / "a.npy", pixels.transpose(2, 0, 1).astype(np.float32) / 255)
    again = ran(report, capsys, str(path), **(how | {"image": tmp_path / "a.npy"}))
    assert again["on image"] == told["on image"]
    brighter = ran(report, capsys, str(path), **(how | {"mean": "0.1"}))
    assert brighter["on image"] != told["on image"]


def test_grey_networks_take_grey_pictures(tmp_path, capsys):
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 40), dtype=np.uint8)
    pillow.fromarray(pixels).save(tmp_path / "a.png")
    options = SMALL | {"input": "1,1,16,16"}
    out = tmp_path / "o.safetensors"
    told = ran(replace, capsys, "mobilenet-v2", blocks="features.3", out=out, image=tmp_path / "a.png",
               plot=tmp_path / "o.png", groups=2, **options)  # fmt: skip
    assert [row["map"] for row in told["on image"]] == [[2, 16, 16]]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert load_attention_network(out).network["in_channels"] == 1


@pytest.fixture
def classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


def test_a_hugging_face_classifier_is_changed_written_and_comes_back(tmp_path, capsys, classifier):
    folder, model = classifier
    told = ran(report, capsys, str(folder), input="1,3,32,32")
    assert told["parameters"] == told["parameters_after"] == sum(p.numel() for p in model.parameters())
    assert told["attention"] == []
    block = "resnet.encoder.stages.1.layers.1"
    assert block in [row["block"] for row in told["replaceable"]]
    out, state = tmp_path / "o.safetensors", torch.random.get_rng_state()
    made = ran(replace, capsys, str(folder), input="1,3,32,32", blocks=block, out=out, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = replace_with_ulsam(model, block, X, generator=torch.Generator().manual_seed(4))[0].eval()
    back = load_attention_network(out)
    assert torch.equal(back.model(X).logits, expected(X).logits)
    assert back.model.config.id2label == model.config.id2label
    assert made["parameters_after"] == sum(p.numel() for p in expected.parameters())
    again = ran(insert, capsys, str(out), input="1,3,32,32", blocks="resnet.embedder", out=tmp_path / "p.safetensors")
    assert again["parameters"] == told["parameters"]
    assert [place["name"] for place in again["attention"]] == ["resnet.embedder", block]
    assert load_attention_network(tmp_path / "p.safetensors").model(X).logits.shape == (1, 3)


def test_tokens_are_no_maps(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"--blocks .* leave a model that does not run.*, got shape \(1, 17, 16\)"):
        report(str(tmp_path / "vit"), input="1,3,32,32", blocks="vit.layernorm", how="insert", groups=17)


def test_a_folder_that_is_no_classifier_or_lacks_weights_is_refused(tmp_path, classifier):
    folder, _ = classifier
    with pytest.raises(WrongContent, match=r"config\.json and \.safetensors weights of an image classifier"):
        report(str(tmp_path), input="1,3,32,32")
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "classifier" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongContent, match=r"no weights \['classifier.1.bias', 'classifier.1.weight'\]"):
        report(str(folder), input="1,3,32,32")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WrongContent, match="weights of an image classifier"):
        report(str(folder), input="1,3,32,32")


def test_other_files_are_refused_before_they_are_a_network(tmp_path, capsys):
    path = trained_file(tmp_path, capsys)
    plain = tmp_path / "plain.safetensors"
    save_file(network().state_dict(), plain)
    with pytest.raises(WrongContent, match="tensors without our header"):
        report(str(plain), input=SHAPE)
    with pytest.raises(UnreadableFile):
        report(str(tmp_path / "none.safetensors"), input=SHAPE)
    torn = bytearray(path.read_bytes())
    torn[-5] ^= 1
    path.write_bytes(torn)
    with pytest.raises(CorruptFile):
        report(str(path), input=SHAPE)


def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path):
    state, out = network().state_dict(), tmp_path / "o.safetensors"
    weights = tmp_path / "w.safetensors"
    how = {"blocks": "features.8", "out": out, "weights": weights, **SMALL}
    for wrong, message in (
        (
            {k: v for k, v in state.items() if k != "features.13.0.weight"},
            "missing features.13.0.weight, unexpected no",
        ),
        (state | {"more": torch.ones(1)}, "missing none, unexpected more"),
        (state | {"classifier.bias": torch.ones(7)}, r"other shapes: classifier.bias \(7,\) for \(5,\)"),
    ):
        save_file(wrong, weights)
        with pytest.raises(WrongContent, match=message):
            replace("mobilenet-v1", **how)
        assert not out.exists()
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, weights)
    replace("mobilenet-v1", **how)
    assert torch.equal(load_attention_network(out).model.state_dict()["features.13.0.weight"],
                       state["features.13.0.weight"])  # fmt: skip


REFUSED = [
    ({"input": "1,3,32"}, r"--input must be four whole numbers above 0 by commas, .*, got '1,3,32'"),
    ({"input": "1,3,0,32"}, "--input must be four whole numbers above 0"),
    ({"input": "1,3,32,x"}, "--input must be four whole numbers above 0"),
    ({"blocks": "features.4"}, r"--blocks must keep the shape of their map, got 'features.4', which turns \(1, 16, "),
    ({"blocks": "features.99"}, "--blocks must name modules of the model, got 'features.99'; the nearest are "),
    ({"blocks": "features.8,features.8.0"}, "--blocks must not lie inside one another"),
    ({"blocks": "features.8,"}, "--blocks must be names of modules by commas, got 'features.8,'"),
    ({"groups": 7}, r"features.8: --groups must divide num_channels=64, got 7; the nearest divisors are 4 and 8"),
    ({"groups": 0}, "features.8: --groups must be between 1 and num_channels=64, got 0"),
    ({"kernel": 2}, "features.8: --kernel must be odd and at least 1, got 2"),
    ({"classes": 0}, "--classes must be at least 1, got 0"),
    ({"width": 0.0}, "--width must be positive and finite, got 0.0"),
    ({"plot": "maps.svg"}, "--plot needs --image"),
    ({"plot": "maps.txt", "image": "a.npy"}, "--plot must end in .svg or .png or .pdf, got 'maps.txt'"),
    ({"image": "a.npy", "mean": "1,2"}, r"--mean must be one number, or 3 by commas, finite, got '1,2'"),
    ({"image": "a.npy", "std": "0"}, r"--std must be one number, or 3 by commas, finite and above 0, got '0'"),
    ({"image": "a.npy", "mean": "x"}, "--mean must be one number"),
    ({"image": "b.npy"}, r"--image must be \(3, 16, 16\), as --input, got shape \(3, 8, 8\)"),
    ({"image": "a.txt"}, "--image must be a picture file"),
    ({"image": "a.npy", "out": "a.npy"}, "--out must end in .safetensors"),
    ({"out": "none/o.safetensors"}, "--out must be a file in a folder that is there"),
    ({"out": "w.safetensors", "weights": "w.safetensors"}, "--out must be another file than a file that is read"),
    ({"weights": "w.npz"}, "--weights must end in .safetensors"),
    (
        {"blocks": ",".join(f"features.{i}.2" for i in range(1, 14)), "image": "a.npy", "plot": "o.png"},
        "--plot shows 12 layers at most, got 13",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_done_is_refused_and_nothing_is_written(tmp_path, change, message):
    np.save(tmp_path / "a.npy", X[0].numpy())
    np.save(tmp_path / "b.npy", X[0, :, :8, :8].numpy())
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    options = SMALL | {"blocks": "features.8", "out": "o.safetensors"} | change
    options |= {k: tmp_path / options[k] for k in ("out", "plot", "image", "weights") if k in options}
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        replace("mobilenet-v1", **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_options_of_named_networks_are_refused_for_files_and_results_do_not_replace_them(tmp_path, capsys):
    path = trained_file(tmp_path, capsys)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"--classes, --width are for mobilenet-v1 and mobilenet-v2, got .*small"):
        report(str(path), input=SHAPE, classes=5, width=1.0)
    with pytest.raises(ValueError, match="--weights is for mobilenet-v1 and mobilenet-v2"):
        insert(str(path), input=SHAPE, blocks="features.3", out=tmp_path / "o.safetensors", weights=path)
    with pytest.raises(ValueError, match="--out must be another file than a file that is read"):
        insert(str(path), input=SHAPE, blocks="features.3", out=path)
    with pytest.raises(ValueError, match=r"--input must be what the network takes, got \(1, 4, 32, 32\): "):
        report(str(path), input="1,4,32,32")
    with pytest.raises(ValueError, match=r"model must be mobilenet-v1, mobilenet-v2, a .safetensors file or the fold"):
        report("mobilenet-v3", input=SHAPE)
    np.save(tmp_path / "a.npy", X[0].numpy())
    with pytest.raises(ValueError, match="--image needs a network with attention"):
        report("mobilenet-v1", image=tmp_path / "a.npy", **SMALL)
    assert path.read_bytes() == before


def test_a_map_of_one_place_is_told_and_so_is_what_starts_from_chance(tmp_path, capsys):
    replace("mobilenet-v1", blocks="features.13", out=tmp_path / "o.safetensors", classes=5, width=0.125,
            input="1,3,32,32")  # fmt: skip
    told = capsys.readouterr().err
    assert told.count("a map of one place has attention 1: the output is exactly 2x") == 1
    assert "the network starts from chance, as no --weights were given" in told
    assert "the attention starts from chance: train or fine-tune the network" in told


def test_a_command_line_is_parsed_and_tables_are_printed(tmp_path, capsys):
    app = App()
    for command in (report, replace, insert):
        app.command(command)
    out = tmp_path / "o.safetensors"
    words = f"mobilenet-v1 --input {SHAPE} --width 0.125 --classes 5 --small-input --blocks features.9"
    app(["replace", *words.split(), "--out", str(out), "--groups", "2", "--no-norm"], result_action="return_value")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layer\tclass\toutput\tparameters\tparameters after\tMACs\tMACs after"
    (own,) = [line for line in lines if "\tULSAM\t" in line]
    assert own == f"features.9\tULSAM\t1 x 64 x 4 x 4\t-\t{2 * 64}\t-\t{2 * 64 * 16}"
    assert "attention at\tfeatures.9" in lines
    assert f"out\t{out}" in lines
    app(["report", str(out), "--input", SHAPE], result_action="return_value")
    assert own in capsys.readouterr().out.splitlines()
    # The file is all that is needed.
    shutil.move(out, tmp_path / "moved.safetensors")
    assert load_attention_network(tmp_path / "moved.safetensors").model(X).shape == (1, 5)
