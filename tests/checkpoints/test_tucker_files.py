import copy
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyspan.checkpoints import (
    advise_tucker_ranks,
    extract_tucker_adapter,
    load_tucker_adapter,
    merge_checkpoints,
    merge_tucker_adapter,
)
from polyspan.checkpoints.tucker_plots import plot_rank_curves, rank_curve
from polyspan.errors import CorruptFile, UnreadableFile, WrongContent
from polyspan.io import ShardedState, check_directory
from polyspan.run import torch_generator


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.words = nn.Embedding(12, 6)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x, tokens):
        h = self.up(torch.relu(self.conv(x))).mean(dim=(-2, -1))
        return self.head(torch.relu(self.fc(h + self.words(tokens))))


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch_generator(seed))


@pytest.fixture
def pair(tmp_path):
    """A base, and the same tuned by updates of low rank, as files."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        base = Small()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for i, layer in enumerate((tuned.conv, tuned.up)):
            sizes = layer.weight.shape
            core, factors = (
                draw(2, 2, 2, 1, seed=i),
                [draw(*s, seed=i + 9) for s in zip(sizes, (2, 2, 2, 1), strict=True)],
            )
            layer.weight += 0.3 * torch.einsum("abcd,ia,jb,kc,ld->ijkl", core, *factors)
        tuned.words.weight += draw(12, 2, seed=4) @ draw(2, 6, seed=5)
        tuned.fc.weight += draw(5, 1, seed=6) @ draw(1, 6, seed=7)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    return base, tuned, tmp_path


INPUT = (draw(2, 3, 6, 6, seed=20), torch.tensor([1, 7]))


def test_an_adapter_extracted_from_files_loads_in_peft_and_gives_the_tuned_model(pair):
    base, tuned, folder = pair
    found = extract_tucker_adapter(folder / "base.safetensors", folder / "tuned.safetensors", folder / "a", rank=2)
    assert [layer.name for layer in found.layers] == ["conv", "fc", "up", "words"]
    assert max(layer.error for layer in found.layers) < 1e-9
    assert found.kept_share == pytest.approx(1)
    assert found.left_out == []
    model = peft.PeftModel.from_pretrained(base, folder / "a")
    torch.testing.assert_close(model(*INPUT), tuned(*INPUT), rtol=1e-4, atol=1e-4)
    assert sorted(check_directory(folder / "a")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_result_does_not_take_the_place_of_what_it_is_made_of(pair):
    *_, folder = pair
    tuned, adapter = folder / "tuned", folder / "adapter"
    tuned.mkdir()
    (tuned / "model.safetensors").write_bytes((folder / "tuned.safetensors").read_bytes())
    with pytest.raises(ValueError, match="out must be another place than tuned, which it is made of"):
        extract_tucker_adapter(folder / "base.safetensors", tuned, tuned, replace=True)
    with pytest.raises(ValueError, match="out must be another place than base, which it is made of"):
        extract_tucker_adapter(folder / "base.safetensors", tuned, folder, replace=True)
    extract_tucker_adapter(folder / "base.safetensors", tuned, adapter)
    kept = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    for out, name in ((folder / "base.safetensors", "base"), (adapter / "adapter_model.safetensors", "adapter")):
        with pytest.raises(ValueError, match=f"out must be another place than {name}, which it is made of"):
            merge_tucker_adapter(folder / "base.safetensors", adapter, out)
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == kept


def test_an_extracted_adapter_is_a_model_of_a_merge(pair):
    base, _, folder = pair
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    extract_tucker_adapter(*paths, folder / "a", rank=1, modules_to_save=["fc"], scale=3.0)
    merge_tucker_adapter(paths[0], folder / "a", folder / "whole.safetensors")
    found = merge_checkpoints(
        paths[0], {"a": folder / "a", "t": paths[1]}, folder / "out", scaling=0.5, shard_bytes=500
    )
    assert len(found.shards) > 1
    made, one, two = ShardedState(folder / "out"), load_file(folder / "whole.safetensors"), load_file(paths[1])
    for name, start in base.state_dict().items():
        expected = start + 0.5 * (one[name] - start + two[name] - start)
        torch.testing.assert_close(made[name].clone(), expected, rtol=1e-5, atol=1e-5)


def test_a_tucker_adapter_that_is_not_whole_is_no_model_of_a_merge(pair):
    *_, folder = pair
    extract_tucker_adapter(folder / "base.safetensors", folder / "tuned.safetensors", folder / "a", rank=2)
    weights = load_file(folder / "a" / "adapter_model.safetensors")
    lost = next(name for name in weights if name.endswith("conv.tucker_adapter_axis1"))
    save_file({n: x for n, x in weights.items() if n != lost}, folder / "a" / "adapter_model.safetensors")
    with pytest.raises(WrongContent, match="found axis0, axis2, axis3, core of conv; expected a core, its axes"):
        merge_checkpoints(folder / "base.safetensors", {"a": folder / "a"}, folder / "out")


def test_weights_in_a_pickle_are_not_loaded(pair):
    base, _, folder = pair
    extract_tucker_adapter(folder / "base.safetensors", folder / "tuned.safetensors", folder / "a", rank=2)
    weights = folder / "a" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UnreadableFile, match=r"adapter_model.safetensors: found nothing; expected weights in a"):
        load_tucker_adapter(base, folder / "a")


def test_ranks_are_chosen_by_error_and_what_is_left_out_is_told(pair):
    _, tuned, folder = pair
    with torch.no_grad():
        tuned.fc.bias += 1
        tuned.head.weight += draw(2, 5, seed=30)
    save_file(tuned.state_dict(), folder / "tuned.safetensors")
    files = folder / "base.safetensors", folder / "tuned.safetensors"
    found = extract_tucker_adapter(*files, folder / "a", error=1e-6, only="conv|fc|up", modules_to_save=["head"])
    assert {layer.name: layer.ranks for layer in found.layers} == {
        "conv": (2, 2, 2, 1), "fc": (1, 1), "up": (2, 2, 2, 1),
    }  # fmt: skip
    assert found.saved == ["head.bias", "head.weight"]
    assert found.left_out == ["fc.bias", "words.weight"]
    before, after = (load_file(file) for file in files)
    changes = {name: float((after[name] - before[name]).square().sum()) for name in before}
    lost = changes["fc.bias"] + changes["words.weight"]
    assert found.kept_share == pytest.approx(1 - lost / sum(changes.values()), rel=1e-5)


def test_a_saved_head_comes_back_with_the_adapter_and_merging_files_equals_merging_models(pair):
    base, tuned, folder = pair
    with torch.no_grad():
        tuned.head.weight += 1
    save_file(tuned.state_dict(), folder / "tuned.safetensors")
    files = folder / "base.safetensors", folder / "tuned.safetensors"
    extract_tucker_adapter(*files, folder / "a", rank=2, modules_to_save=["head"], scale=0.5)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "a")
    torch.testing.assert_close(model(*INPUT), tuned(*INPUT), rtol=1e-4, atol=1e-4)
    changed = merge_tucker_adapter(folder / "base.safetensors", folder / "a", folder / "merged.safetensors")
    assert changed == ["conv.weight", "fc.weight", "head.bias", "head.weight", "up.weight", "words.weight"]
    merged = Small()
    merged.load_state_dict(load_file(folder / "merged.safetensors"))
    for name, value in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)


def test_a_merge_into_a_folder_keeps_dtypes_and_goes_on_where_it_was(pair):
    base, _, folder = pair
    source = folder / "bf16"
    source.mkdir()
    save_file({name: value.bfloat16() for name, value in base.state_dict().items()}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    extract_tucker_adapter(source, folder / "tuned.safetensors", folder / "a", rank=2, modules_to_save=["head"])
    changed = merge_tucker_adapter(source, folder / "a", folder / "whole.safetensors")
    whole = load_file(folder / "whole.safetensors")
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    wide = folder / "wide.safetensors"
    save_file({name: value.bfloat16().float() for name, value in base.state_dict().items()}, wide)
    merge_tucker_adapter(wide, folder / "a", folder / "wide-merged.safetensors")
    for name, value in load_file(folder / "wide-merged.safetensors").items():
        assert torch.equal(whole[name], value.bfloat16())
    assert merge_tucker_adapter(source, folder / "a", folder / "out", shard_bytes=200) == changed
    shards = sorted((folder / "out").glob("*.safetensors"))
    assert len(shards) > 3
    parts = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert (folder / "out" / "config.json").read_text() == "{}"
    assert not list((folder / "out").glob("*.jsonl"))
    with pytest.raises(UnreadableFile, match="found another merge"):
        merge_tucker_adapter(source, folder / "a", folder / "out", shard_bytes=300)


def test_sums_too_large_for_the_base_are_told(pair):
    base, _, folder = pair
    save_file({name: value.half() for name, value in base.state_dict().items()}, folder / "half.safetensors")
    huge = {name: value * 1e6 for name, value in base.state_dict().items()}
    save_file(huge, folder / "huge.safetensors")
    extract_tucker_adapter(folder / "half.safetensors", folder / "huge.safetensors", folder / "a", rank=2)
    with pytest.raises(ValueError, match=r"base must hold sums with the adapter, got torch.float16, too narrow for"):
        merge_tucker_adapter(folder / "half.safetensors", folder / "a", folder / "m.safetensors")
    assert not (folder / "m.safetensors").exists()


def test_names_on_the_hub_are_fetched(pair, monkeypatch):
    base, _, folder = pair
    hub = pytest.importorskip("huggingface_hub")
    (folder / "fetched").mkdir()
    save_file(base.state_dict(), folder / "fetched" / "model.safetensors")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(folder / "fetched") if name == "a/b" else name)
    found = extract_tucker_adapter("a/b", folder / "tuned.safetensors", folder / "one", rank=2)
    other = extract_tucker_adapter(folder / "base.safetensors", folder / "tuned.safetensors", folder / "two", rank=2)
    assert found.layers == other.layers
    with pytest.raises(
        UnreadableFile, match=r"nothing; expected a .safetensors file, the folder of a checkpoint, or a"
    ):
        extract_tucker_adapter(folder / "no.safetensors", folder / "tuned.safetensors", folder / "c")


def test_shards_with_an_index_are_read_tensor_by_tensor(pair):
    base, _, folder = pair
    shards = folder / "shards"
    shards.mkdir()
    state, place = base.state_dict(), {}
    for i, names in enumerate((sorted(state)[:4], sorted(state)[4:])):
        save_file({name: state[name].bfloat16() for name in names}, shards / f"part{i}.safetensors")
        place |= dict.fromkeys(names, f"part{i}.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    found = extract_tucker_adapter(shards, folder / "tuned.safetensors", folder / "a", error=0.01)
    assert "conv" in [layer.name for layer in found.layers]
    place["conv.weight"] = "../base.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    with pytest.raises(WrongContent, match="found a file outside the folder"):
        extract_tucker_adapter(shards, folder / "tuned.safetensors", folder / "b")


def test_advice_names_the_planted_ranks_and_draws(pair):
    _, _, folder = pair
    files = folder / "base.safetensors", folder / "tuned.safetensors"
    advice = advise_tucker_ranks(*files, errors=(0.5, 1e-6), curves=True)
    assert {a.name: a.choices[1].ranks for a in advice} == {
        "conv": (2, 2, 2, 1), "fc": (1, 1), "up": (2, 2, 2, 1), "words": (2, 2),
    }  # fmt: skip
    assert all(a.choices[0].parameters <= a.choices[1].parameters for a in advice)
    curves = {a.name: a.curve for a in advice}
    assert plot_rank_curves(curves, folder / "c.svg").read_text().count("<svg") == 1
    first = (folder / "c.svg").read_bytes()
    assert plot_rank_curves(curves, folder / "c.svg").read_bytes() == first


def test_a_curve_of_a_matrix_is_that_of_its_singular_values():
    delta = draw(20, 30, seed=1)
    curve = rank_curve(delta)
    s2 = torch.linalg.svdvals(delta.double()).square()
    for size, left in zip(curve.parameters, curve.tucker, strict=True):
        r = max(r for r in range(1, 21) if 50 * r + r * r <= size or r == 1)
        assert left == pytest.approx(float(1 - s2[:r].sum() / s2.sum()), abs=1e-9)
    assert (np.diff(curve.tucker) <= 1e-12).all()
    assert (curve.matrix <= curve.tucker + 1e-9).all(), "a matrix has no core to pay for"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank and spatial_rank must be at least 1, got 0 and None"),
        ({"spatial_rank": 0}, "rank and spatial_rank must be at least 1, got 8 and 0"),
        ({"error": 1.0}, r"error must be in \[0, 1\), got 1.0"),
        ({"scale": 0.0}, "scale must be finite and not 0"),
        ({"modules_to_save": ["tail"]}, "modules_to_save must name modules of the base, got 'tail'"),
        ({"only": "nothing"}, "tuned must differ from base in a weight that can be adapted"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(pair, options, message):
    _, _, folder = pair
    with pytest.raises(ValueError, match=message):
        extract_tucker_adapter(folder / "base.safetensors", folder / "tuned.safetensors", folder / "a", **options)
    assert sorted(p.name for p in folder.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_files_that_do_not_fit_are_refused_by_name(pair):
    base, tuned, folder = pair
    files = folder / "base.safetensors", folder / "tuned.safetensors"
    extract_tucker_adapter(*files, folder / "a", rank=2)
    with pytest.raises(UnreadableFile, match="something of that name"):
        extract_tucker_adapter(*files, folder / "a")
    with pytest.raises(ValueError, match="errors must be in"):
        advise_tucker_ranks(*files, errors=[2.0])
    with pytest.raises(ValueError, match="tuned must differ"):
        advise_tucker_ranks(files[0], files[0])
    state = tuned.state_dict()
    save_file({k: v for k, v in state.items() if k != "fc.weight"}, folder / "less.safetensors")
    with pytest.raises(WrongContent, match=r"no tensor fc\.weight"):
        extract_tucker_adapter(files[0], folder / "less.safetensors", folder / "b")
    with pytest.raises(WrongContent, match="an adapter of fc"):
        merge_tucker_adapter(folder / "less.safetensors", folder / "a", folder / "m.safetensors")
    state["fc.weight"] = torch.zeros(5, 7)
    save_file(state, folder / "other.safetensors")
    with pytest.raises(WrongContent, match=r"tensor fc.weight: found shape \(5, 7\)"):
        extract_tucker_adapter(files[0], folder / "other.safetensors", folder / "b")
    with pytest.raises(WrongContent, match=r"layer fc"):
        merge_tucker_adapter(folder / "other.safetensors", folder / "a", folder / "m.safetensors")
    (folder / "cut.safetensors").write_bytes(files[1].read_bytes()[:-8])
    with pytest.raises(CorruptFile):
        extract_tucker_adapter(files[0], folder / "cut.safetensors", folder / "b")
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["fc"])).save_pretrained(folder / "lora")
    with pytest.raises(WrongContent, match="an adapter of kind LORA"):
        merge_tucker_adapter(files[0], folder / "lora", folder / "m.safetensors")
    (folder / "two").mkdir()
    with pytest.raises(UnreadableFile, match=r"0 \.safetensors files"):
        extract_tucker_adapter(folder / "two", files[1], folder / "b")
    assert not (folder / "b").exists()
    assert not (folder / "m.safetensors").exists()


def test_curves_are_drawn_only_where_there_are_some(tmp_path):
    with pytest.raises(ValueError, match="curves must hold at least one layer"):
        plot_rank_curves({}, tmp_path / "c.svg")
    with pytest.raises(ValueError, match=r"path must end in \.svg"):
        plot_rank_curves({"a": rank_curve(draw(3, 3, seed=0))}, tmp_path / "c.gif")


def test_an_embedding_that_is_the_output_too_is_left_out(tmp_path):
    table, layer = draw(12, 6, seed=1), draw(6, 6, seed=2)
    for name, more in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        state = {"embed.weight": table + more * draw(12, 1, seed=3), "layer.weight": layer + more * draw(6, 1, seed=4)}
        save_file(state, tmp_path / name / "model.safetensors")
        config = '{"architectures": ["LlamaForCausalLM"], "vocab_size": 12}'
        (tmp_path / name / "config.json").write_text(config)
    found = extract_tucker_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=2)
    assert [row.name for row in found.layers] == ["layer"]
    assert found.left_out == ["embed.weight"]
    assert [row.name for row in advise_tucker_ranks(tmp_path / "base", tmp_path / "tuned")] == ["layer"]
    state["head.weight"] = table
    for name in ("base", "tuned"):
        held = load_file(tmp_path / name / "model.safetensors")
        save_file({**held, "head.weight": table}, tmp_path / name / "model.safetensors")
    found = extract_tucker_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "b", rank=2)
    assert [row.name for row in found.layers] == ["embed", "layer"]
    for call, more in ((extract_tucker_adapter, [tmp_path / "c"]), (advise_tucker_ranks, [])):
        with pytest.raises(ValueError, match="only must be a regular expression, got '\\('"):
            call(tmp_path / "base", tmp_path / "tuned", *more, only="(")
