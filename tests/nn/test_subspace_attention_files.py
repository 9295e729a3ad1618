import json

import numpy as np
import pytest
import torch
from torch import nn

from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import load_fitted, save_fitted
from polyspan.nn import ULSAM, insert_ulsam, mobilenet_v1, replace_with_ulsam
from polyspan.nn.attention_surgery import attention_maps_of
from polyspan.nn.subspace_attention_files import (
    attention_places,
    load_attention_network,
    plain_network,
    save_attention_network,
)
from polyspan.nn.subspace_attention_plots import plot_attention_layers

NETWORK = {"kind": "mobilenet-v1", "num_classes": 5, "width": 0.125, "in_channels": 3, "small_input": True}
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def network(dtype=None, **options):
    rng = torch.Generator().manual_seed(3)
    return mobilenet_v1(5, 0.125, small_input=True, generator=rng, dtype=dtype, **options).eval()


def changed(dtype=None):
    model, rng = network(dtype), torch.Generator().manual_seed(4)
    x = X.to(dtype or X.dtype)
    replace_with_ulsam(model, ["features.8", "features.11"], x, 2, residual=False, generator=rng)
    return insert_ulsam(model, ["features.3", "features.8"], x, 4, bias=True, bn_momentum=0.9, generator=rng)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_comes_back_with_its_bits_and_its_dtype(tmp_path, dtype):
    model = changed(dtype).train()
    model(X.to(dtype))
    back, said = load_attention_network(save_attention_network(model, tmp_path / "a.safetensors", NETWORK))
    assert said == NETWORK
    state, expected = back.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in expected.items())
    assert torch.equal(back(X.to(dtype)), model.eval()(X.to(dtype)))
    assert all(p.requires_grad for p in back.parameters())
    assert attention_places(back) == attention_places(model)
    again = save_attention_network(back, tmp_path / "b.safetensors", said)
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_places_tell_what_stands_where_outer_ones_first():
    sizes = {"num_channels": 64, "kernel_size": 3, "dims": 2, "norm": True}
    replaced = {"how": "replace", "num_groups": 2, "bias": False, "residual": False, "bn_momentum": 0.1}
    inserted = {"how": "insert", "num_groups": 4, "bias": True, "residual": True, "bn_momentum": 0.9}
    found = attention_places(changed())
    assert found == [
        {"name": "features.3", **sizes, **inserted, "num_channels": 16},
        {"name": "features.8", **sizes, **inserted},
        {"name": "features.8.block", **sizes, **replaced},
        {"name": "features.11", **sizes, **replaced},
    ]
    assert json.loads(json.dumps(found)) == found
    assert attention_places(network()) == []


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"dims": 1, "bias": True, "bn_momentum": 0.9}, {"dims": 3}])
def test_sizes_make_a_layer_that_takes_the_weights_of_the_first(options):
    first = ULSAM(12, 3, 5, residual=False, **options)
    second = ULSAM(**first.sizes())
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 12, *[3] * options.get("dims", 2))
    assert torch.equal(second.train()(x), first.train()(x))
    assert second.sizes() == first.sizes()
    if first.normed:
        assert second.scale_norm.momentum == first.scale_norm.momentum


def test_narrow_weights_are_widened(tmp_path):
    model = changed().bfloat16()
    back = load_attention_network(save_attention_network(model, tmp_path / "a.safetensors", NETWORK)).model
    assert torch.equal(back(X), model.float()(X))


def test_another_description_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"network must describe the model, got classifier.weight \(5, 128\) for \(6"):
        save_attention_network(changed(), path, NETWORK | {"num_classes": 6})
    with pytest.raises(ValueError, match="network must be of kind mobilenet-v1, mobilenet-v2, hugging-face, got None"):
        save_attention_network(changed(), path, {})
    with pytest.raises(ValueError, match="network must hold the arguments of mobilenet-v1, got"):
        save_attention_network(changed(), path, NETWORK | {"depth": 3})
    with pytest.raises(ValueError, match="network must hold config, with model_type in it, got None"):
        plain_network({"kind": "hugging-face"})
    model = changed()
    model.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got more.weight \(2, 2\) for None, more.bias \(2,\) for None"):
        save_attention_network(model, path, NETWORK)
    assert not path.exists()


def test_files_that_say_another_network_than_their_weights_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    found = load_fitted(save_attention_network(changed(), path, NETWORK))

    def written(arrays=None, **params):
        save_fitted(path, kind=found.kind, arrays=arrays or found.arrays, params=found.params | params)
        return path

    places = found.params["places"]
    for params in (
        {"network": NETWORK | {"kind": "resnet"}},
        {"network": NETWORK | {"width": -1.0}},
        {"network": NETWORK | {"depth": 3}},
        {"network": 3},
        {"places": places[:3]},
        {"places": [places[0] | {"name": "features.99"}, *places[1:]]},
        {"places": [places[0] | {"how": "delete"}, *places[1:]]},
        {"places": [places[0] | {"num_groups": 3}, *places[1:]]},
        {"places": [places[0] | {"num_channels": 32}, *places[1:]]},
        {"places": [{"how": "insert"}]},
        {"places": 7},
    ):
        with pytest.raises(WrongContent, match="a network, places of attention in it, and all of its weights"):
            load_attention_network(written(**params))
    few = {name: value for name, value in found.arrays.items() if name != "features.3.attention.point"}
    with pytest.raises(WrongContent, match=r"features\.3\.attention\.point"):
        load_attention_network(written(few))
    save_fitted(path, kind="GrassmannLM", arrays=found.arrays, params=found.params)
    with pytest.raises(WrongContent):
        load_attention_network(path)
    path.write_bytes(b"12345")
    with pytest.raises(CorruptFile):
        load_attention_network(path)


def test_maps_of_a_network_are_those_of_its_layers_at_what_they_are_given():
    model, given = changed().train(), {}
    for name, module in model.named_modules():
        if isinstance(module, ULSAM):
            module.register_forward_pre_hook(lambda m, args, name=name: given.setdefault(name, args[0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = attention_maps_of(model, X)
    assert model.training
    assert list(maps) == ["features.3.attention", "features.8.block", "features.8.attention", "features.11"]
    for name, found in maps.items():
        assert torch.equal(found, model.get_submodule(name).attention_maps(given[name]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert attention_maps_of(network(), X) == {}


def test_a_layer_that_runs_twice_tells_its_first_maps():
    layer = ULSAM(3, 1, norm=False, generator=torch.Generator().manual_seed(0))
    maps = attention_maps_of(nn.Sequential(layer, nn.Tanh(), layer), X)
    first, second = layer.attention_maps(X), layer.attention_maps(layer(X).tanh())
    assert list(maps) == ["0"]
    assert torch.equal(maps["0"], first)
    assert not torch.allclose(first, second, rtol=1e-3)


def test_layers_are_drawn_row_by_row_and_impossible_ones_refused(tmp_path):
    rng = np.random.default_rng(0)
    image, layers = rng.random((16, 16, 3)), {"first": rng.random((2, 4, 4)), "second": rng.random((4, 2, 3))}
    first = plot_attention_layers(image, layers, tmp_path / "a.svg").read_text()
    assert first == plot_attention_layers(image, layers, tmp_path / "b.svg").read_text()
    # An image in each row, a map for each group, and the bar of colours.
    assert first.count("<image") == 2 + (2 + 4) + 1
    for wrong, maps, message in (
        (image[..., :2], layers, r"image must be \(h, w\) or \(h, w, 3\), .*got shape \(16, 16, 2\)"),
        (image[:0], layers, r"image must be .*got shape \(0, 16, 3\)"),
        (image, {}, "layers must be 1 to 12, got 0"),
        (image, dict.fromkeys(map(str, range(13)), layers["first"]), "layers must be 1 to 12, got 13"),
        (
            image,
            {"one": rng.random((2, 4))},
            r"layers must be maps \(groups, height, width\), got shape \(2, 4\) at one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            plot_attention_layers(wrong, maps, tmp_path / "c.svg")
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf"):
        plot_attention_layers(image, layers, tmp_path / "c.txt")
    assert not (tmp_path / "c.svg").exists()
