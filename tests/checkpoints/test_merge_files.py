import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from polyspan.checkpoints import (
    ConcreteMerger,
    dare,
    merge_checkpoints,
    merge_recipe,
    read_recipe,
    task_arithmetic,
    ties,
)
from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import ShardedState, read_json, read_members, write_members, write_text
from polyspan.io.torch_tensors import INDEX


def saved(folder, seed=0, shapes=((40, 30), (30,), (7, 5)), dtype=torch.float32, tasks=2):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    names = [f"layer{i}.weight" for i in range(len(shapes))]
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in zip(names, shapes, strict=True)}
    states = {"base": {**base, "steps": torch.tensor([3])}}
    for t in range(tasks):
        moved = {n: (v.float() + 0.1 * torch.randn(v.shape, generator=generator)).to(dtype) for n, v in base.items()}
        states[f"task{t}"] = {**moved, "steps": torch.tensor([9])}
    for name, state in states.items():
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    write_text(folder / "base" / "config.json", '{"model_type": "toy"}\n')
    return states.pop("base"), states


def paths(folder, states):
    return folder / "base", {task: folder / task for task in states}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_of_files_is_the_merge_of_state_dicts_in_shards(tmp_path, dtype):
    base, states = saved(tmp_path, dtype=dtype)
    for i, (method, function, options) in enumerate(
        [
            ("task_arithmetic", task_arithmetic, {"scaling": 0.4}),
            ("ties", ties, {"density": 0.3}),
            ("ties", ties, {"density": 0.3, "scope": "tensor", "reduction": "mean"}),
            ("dare", dare, {"density": 0.6, "elect": True, "seed": 4}),
            ("average", lambda b, t: task_arithmetic(b, t, scaling=1 / 2), {}),
        ]
    ):
        found = merge_checkpoints(*paths(tmp_path, states), tmp_path / f"out{i}", method=method, **options)
        made = ShardedState(found.path)
        torch.testing.assert_close({n: made[n] for n in base}, function(base, states, **options), atol=0, rtol=0)
        assert {made[n].dtype for n in base} == {dtype, torch.int64}
        assert (found.tensors, found.merged, found.resumed) == (4, 3, 0)
        assert len(found.shards) == 3
        placed = read_json(found.path / INDEX)["weight_map"]
        assert set(placed.values()) == {path.name for path in found.shards}
        assert read_json(found.path / "config.json") == {"model_type": "toy"}


def test_one_shard_is_a_plain_file_that_safetensors_and_torch_read(tmp_path):
    from safetensors.torch import load_file

    base, states = saved(tmp_path, dtype=torch.bfloat16)
    write_text(tmp_path / "base" / "manifest.json", "{}\n")
    found = merge_checkpoints(*paths(tmp_path, states), tmp_path / "out", shard_bytes=10**9)
    # A manifest of the base says nothing of what is merged.
    assert {p.name for p in found.path.iterdir()} == {"model.safetensors", "config.json", "merge.json"}
    torch.testing.assert_close(load_file(found.shards[0]), task_arithmetic(base, states), atol=0, rtol=0)


def test_a_killed_merge_does_only_the_rest_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    base, states = saved(tmp_path, shapes=((20, 20),) * 5)
    whole = merge_checkpoints(*paths(tmp_path, states), tmp_path / "whole", method="ties")
    calls, module = [], importlib.import_module("polyspan.checkpoints.merge_files")
    real = module.merged_blocks

    def dying(name, *rest):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(module, "merged_blocks", dying)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(*paths(tmp_path, states), tmp_path / "out", method="ties")
    assert not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(ValueError, match=r"belongs to other work .*parameters"):
        merge_checkpoints(*paths(tmp_path, states), tmp_path / "out", method="ties", density=0.9)
    again = merge_checkpoints(*paths(tmp_path, states), tmp_path / "out", method="ties")
    assert again.resumed == 2
    assert len(calls) == 3 + len(base) - 2
    for path in whole.shards:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in again.path.iterdir()) == sorted(p.name for p in whole.path.iterdir())


def test_a_merge_that_has_ended_is_known_again_and_mended_and_another_is_refused(tmp_path):
    _, states = saved(tmp_path, shapes=((20, 20),) * 3)
    found = merge_checkpoints(*paths(tmp_path, states), tmp_path / "out")
    content = {p.name: p.read_bytes() for p in found.path.iterdir()}
    again = merge_checkpoints(*paths(tmp_path, states), tmp_path / "out")
    assert again.resumed == len(again.shards) == 4
    found.shards[1].write_bytes(found.shards[1].read_bytes()[:-1])
    mended = merge_checkpoints(*paths(tmp_path, states), tmp_path / "out")
    assert mended.resumed == 3
    assert {p.name: p.read_bytes() for p in found.path.iterdir()} == content
    for other in ({"scaling": 0.1}, {"shard_bytes": 10**6}):
        with pytest.raises(UnreadableFile, match="found another merge; expected a new folder"):
            merge_checkpoints(*paths(tmp_path, states), tmp_path / "out", **other)
    assert {p.name: p.read_bytes() for p in found.path.iterdir()} == content
    # What was merged into the base says nothing of what the base is merged into.
    further = merge_checkpoints(tmp_path / "out", {"t": tmp_path / "task0"}, tmp_path / "more")
    assert (further.path / "merge.json").read_bytes() != content["merge.json"]


def test_a_folder_of_other_files_is_not_written_to(tmp_path):
    _, states = saved(tmp_path)
    (tmp_path / "out").mkdir()
    write_text(tmp_path / "out" / "notes.txt", "mine\n")
    with pytest.raises(UnreadableFile, match=r"a folder with notes.txt; expected a new folder, or one of this merge"):
        merge_checkpoints(*paths(tmp_path, states), tmp_path / "out")


def test_a_saved_mask_is_applied_tensor_by_tensor(tmp_path):
    base, states = saved(tmp_path)
    floats = {n: t for n, t in base.items() if t.is_floating_point()}
    logits = {n: torch.linspace(-2, 2, t.numel()).reshape(t.shape) for n, t in floats.items()}
    write_members(tmp_path / "mask.safetensors", {n: x.numpy().astype(np.float16) for n, x in logits.items()})
    found = merge_checkpoints(*paths(tmp_path, states), tmp_path / "out", mask=tmp_path / "mask.safetensors")
    made = ShardedState(found.path)
    mask = {n: torch.sigmoid(x.half().float()) for n, x in logits.items()}
    torch.testing.assert_close({n: made[n] for n in base}, task_arithmetic(base, states, mask=mask))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "slerp"}, "method must be one of .* got 'slerp'"),
        ({"method": "ties", "mask": "m"}, "mask must go with method 'task_arithmetic', got 'ties'"),
        ({"method": "task_arithmetic", "density": 0.5}, "parameters of task_arithmetic must be among .* got 'density'"),
        ({"method": "average", "scaling": 0.5}, "parameters of average must be among .* got 'scaling'"),
        ({"method": "average", "weights": [1, -1]}, "weights must not sum to 0"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options, told):
    _, states = saved(tmp_path)
    with pytest.raises(ValueError, match=told):
        merge_checkpoints(*paths(tmp_path, states), tmp_path / "out", **options)


# The kernel's own high-water mark, set back first: a sampled peak misses most of a short merge.
PROBE = """
import re
from pathlib import Path
from polyspan.checkpoints import merge_checkpoints
import polyspan.checkpoints.merge_files as merge_files
from polyspan.run import map_tasks
# What a worker does is done in this process, which is the one that is watched.
merge_files.map_tasks = lambda *given, **options: map_tasks(*given, **{{**options, "workers": 1}})
folder, process = Path({folder!r}), Path("/proc/self")
models = {{task: folder / task for task in {tasks!r}}}
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", (process / "status").read_text()).group(1)) * 1024
(process / "clear_refs").write_text("5")
before = status("VmRSS")
merge_checkpoints(folder / "base", models, folder / "out", method={method!r}, workers={workers})
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process exactly")
@pytest.mark.slow
@pytest.mark.parametrize(("method", "workers"), [("task_arithmetic", 1), ("ties", 1), ("dare", 1), ("ties", 2)])
def test_memory_grows_neither_with_layers_nor_to_a_tensor_of_each_model(tmp_path, method, workers):
    # Pieces above a threshold are given back when freed: what the allocator keeps for later is not the merge's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    side, tasks, peaks = 1400, 6, []
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        folder.mkdir()
        _, states = saved(folder, shapes=((side, side),) * layers, tasks=tasks)
        code = PROBE.format(folder=str(folder), tasks=list(states), method=method, workers=workers)
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(ran.stdout.split()[-1]))
    tensor = 4 * side * side
    assert peaks[1] - peaks[0] < tensor
    assert peaks[1] < (tasks + 1) * tensor


RECIPE = """
merge_method: {method}
base_model: base
models:
  - model: task0
    parameters: {{weight: 0.5}}
  - model: task1
    name: second
    parameters: {{weight: 2}}
parameters:
  lambda: 0.7
"""


def recipe(folder, text):
    write_text(folder / "recipe.yaml", text)
    return folder / "recipe.yaml"


def test_a_recipe_in_the_style_of_mergekit_says_what_is_merged(tmp_path):
    base, states = saved(tmp_path)
    read = read_recipe(recipe(tmp_path, RECIPE.format(method="task_arithmetic")))
    assert (list(read.models), read.weights, read.parameters) == (["task0", "second"], [0.5, 2], {"scaling": 0.7})
    made = ShardedState(merge_recipe(read, tmp_path / "out").path)
    expected = task_arithmetic(base, states, scaling=0.7, weights=[0.5, 2])
    torch.testing.assert_close({n: made[n] for n in base}, expected, atol=0, rtol=0)
    dared = read_recipe(tmp_path / "recipe.yaml", method="dare-ties")
    assert (dared.method, dared.parameters) == ("dare", {"scaling": 0.7, "elect": True})
    learnt = read_recipe(tmp_path / "recipe.yaml", method="concrete-adamerging")
    assert (learnt.method, learnt.parameters["method"]) == ("concrete", "adamerging")


def test_models_of_a_recipe_may_have_their_names_on_the_hub(tmp_path, monkeypatch):
    base, states = saved(tmp_path)
    hub = pytest.importorskip("huggingface_hub")
    fetched = {"some/base": "base", "some/task": "task0"}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(tmp_path / fetched[name]))
    text = RECIPE.format(method="task_arithmetic").replace("base_model: base", "base_model: some/base")
    read = read_recipe(recipe(tmp_path, text.replace("model: task0", "model: some/task")))
    assert (str(read.base), next(str(path) for path in read.models.values())) == ("some/base", "some/task")
    made = ShardedState(merge_recipe(read, tmp_path / "out").path)
    expected = task_arithmetic(base, states, scaling=0.7, weights=[0.5, 2])
    torch.testing.assert_close({n: made[n] for n in base}, expected, atol=0, rtol=0)
    with pytest.raises(UnreadableFile, match="a model's name on the hub"):
        merge_recipe(read._replace(base=tmp_path / "none"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "no YAML"),
        ("- 1", "found list; expected entries with names"),
        ("base_model: base", "at the recipe: found no models"),
        ("base_model: base\nmodels: []", "at models: found no list of models"),
        ("base_model: base\nmodels: [{path: x}]", r"at models\[0\]: found entry 'path'"),
        ("base_model: base\nmodels: [{model: x}, {model: y/x}]", r"at models\[1\]: found 'x' twice"),
        ("base_model: base\nmodels: [{model: x}]\nslices: 1", "found entry 'slices'"),
        ("base_model: base\nmodels: [{model: x}]\nmerge_method: slerp", "found merge_method 'slerp'"),
        (
            "base_model: b\nmodels: [{model: x, parameters: {weight: [0, 0.5, 1]}}]",
            r"at models\[0\].parameters: found weight \[0, 0.5, 1\]; expected one number",
        ),
        (
            "base_model: b\nmodels: [{model: x, parameters: {density: [1, 0.5]}}]",
            r"at models\[0\].parameters: found density \[1, 0.5\]; expected one number",
        ),
        ("base_model: b\nmodels: [{model: x, parameters: {weight: }}]", "found weight None; expected one number"),
        ("base_model: b\nmodels: [{model: x, parameters: {weight: true}}]", "found weight True; expected one number"),
        ("base_model: b\nmodels: [{model: }]", r"at models\[0\]: found model None; expected a path or name"),
        ("base_model: [b]\nmodels: [{model: x}]", r"at base_model: found \['b'\]; expected a path or name"),
        (
            "base_model: b\nmodels: [{model: x}]\nignore_keys: lm_head.weight",
            "at ignore_keys: found 'lm_head.weight'; expected a list of names or patterns",
        ),
        (
            "base_model: b\nmodels: [{model: x}]\nparameters: {lambda: 0.1, scaling: 0.9}",
            "at parameters: found lambda and scaling; expected one of them",
        ),
        (
            "base_model: b\nmodels: [{model: x, parameters: {density: 0.1}}, {model: y}]",
            "models of several densities",
        ),
    ],
)
def test_a_recipe_that_would_be_misread_is_refused(tmp_path, text, told):
    with pytest.raises(WrongContent, match=told):
        read_recipe(recipe(tmp_path, text))


LEARNT = """
merge_method: concrete
base_model: base
network: BertModel
models:
  - {model: one, inputs: one.npz, head: one_head.npz}
  - {model: two, inputs: two.npz, head: two_head.npz}
parameters: {steps: 4, batch_size: 4, lr: 0.1}
"""


@pytest.fixture
def bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.BertModel(config)
        base.save_pretrained(tmp_path / "base")
        for name in ("one", "two"):
            with torch.no_grad():
                for p in base.parameters():
                    p += 0.05 * torch.randn_like(p)
            base.save_pretrained(tmp_path / name)
            ids = rng.integers(0, 20, size=(12, 6))
            write_members(tmp_path / f"{name}.npz", {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            write_members(tmp_path / f"{name}_head.npz", {"weight": rng.normal(size=(3, 8)).astype(np.float32)})
    return transformers, tmp_path


def test_a_learnt_merge_of_transformers_reads_inputs_and_heads_from_files(bert):
    transformers, folder = bert
    read = read_recipe(recipe(folder, LEARNT))
    found = merge_recipe(read, folder / "out", mask=folder / "mask.safetensors")
    nets = {name: transformers.BertModel.from_pretrained(folder / name) for name in ("base", "one", "two", "out")}
    loaders, heads = {}, {}
    for name in ("one", "two"):
        loaders[name] = {k: torch.from_numpy(v) for k, v in read_members(folder / f"{name}.npz").items()}
        heads[name] = torch.from_numpy(read_members(folder / f"{name}_head.npz")["weight"])
    merger = ConcreteMerger(steps=4, batch_size=4, lr=0.1)
    merger.fit(nets["base"], {name: nets[name] for name in ("one", "two")}, loaders, heads)
    torch.testing.assert_close(dict(nets["out"].state_dict()), merger.merged_state_dict(), atol=1e-6, rtol=1e-5)
    assert found.merged == len(nets["base"].state_dict())
    with pytest.raises(ValueError, match=r"parameters of 'concrete' must be among .* got 'stepz'"):
        merge_recipe(read._replace(parameters={"stepz": 3}), folder / "other")
    with pytest.raises(ValueError, match="network must be a class of transformers such as 'AutoModel', got 'Nothing'"):
        merge_recipe(read._replace(network="Nothing"), folder / "other")
    with pytest.raises(ValueError, match="models must each have inputs for 'concrete', got none for two"):
        merge_recipe(read._replace(inputs={"one": read.inputs["one"]}), folder / "other")
    with pytest.raises(ValueError, match="weights must be left out of a recipe for 'concrete'"):
        merge_recipe(read._replace(weights=[1, math.pi]), folder / "other")
    for victim in (folder / "one" / "model.safetensors", folder / "two.npz"):
        with pytest.raises(ValueError, match="mask must be another file than those that are read"):
            merge_recipe(read, folder / "other", mask=victim)
    ada = merge_recipe(read._replace(method="adamerging", parameters={"steps": 2}), folder / "ada")
    assert ada.merged == found.merged


@pytest.fixture
def heads_of_their_own(bert):
    """Base and models as classifiers: the same encoders, under names with "bert" in front, and heads."""
    transformers, folder = bert
    config = transformers.BertConfig.from_pretrained(folder / "base", num_labels=3)
    for name in ("base", "one", "two"):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            whole = transformers.BertForSequenceClassification(config)
        whole.bert.load_state_dict(transformers.BertModel.from_pretrained(folder / name).state_dict())
        whole.save_pretrained(folder / f"whole_{name}")
    return transformers, folder


def test_an_encoder_that_is_merged_goes_back_into_the_checkpoint_that_it_is_part_of(heads_of_their_own):
    transformers, folder = heads_of_their_own
    plain = merge_recipe(read_recipe(recipe(folder, LEARNT)), folder / "plain")
    text = LEARNT.replace("base_model: ", "base_model: whole_")
    for name in ("one", "two"):
        text = text.replace(f"model: {name},", f"model: whole_{name}, name: {name},")
    found = merge_recipe(read_recipe(recipe(folder, text)), folder / "out")
    made, told = transformers.BertForSequenceClassification.from_pretrained(folder / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    base = transformers.BertForSequenceClassification.from_pretrained(folder / "whole_base")
    torch.testing.assert_close(made.classifier.weight, base.classifier.weight, atol=0, rtol=0)
    alone = transformers.BertModel.from_pretrained(folder / "plain").state_dict()
    torch.testing.assert_close(dict(made.bert.state_dict()), dict(alone), atol=0, rtol=0)
    assert (found.merged, found.tensors) == (plain.merged, plain.tensors + 2)


def test_weights_that_would_be_left_to_chance_are_an_error(bert):
    transformers, folder = bert
    encoder = transformers.BertModel.from_pretrained(folder / "one", add_pooling_layer=False)
    encoder.save_pretrained(folder / "one")
    with pytest.raises(WrongContent, match=r"one: found no pooler.dense.bias of BertModel; expected a network whose"):
        merge_recipe(read_recipe(recipe(folder, LEARNT)), folder / "out")


def test_a_learnt_merge_has_the_names_of_the_files_and_so_has_its_mask(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    write_members(tmp_path / "in.npz", {"pixel_values": rng.normal(size=(8, 1, 8, 8)).astype(np.float32)})
    for seed, name in enumerate(("base", "one", "two")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformers.ViTForImageClassification(config).save_pretrained(tmp_path / name)
    text = "network: ViTForImageClassification\nbase_model: base\nmodels:\n"
    text += "".join(f"  - {{model: {name}, inputs: in.npz}}\n" for name in ("one", "two"))
    learnt = read_recipe(recipe(tmp_path, text + "merge_method: concrete\nparameters: {steps: 2, batch_size: 4}\n"))
    mask = tmp_path / "mask.safetensors"
    merge_recipe(learnt, tmp_path / "out", mask=mask)
    assert ShardedState(tmp_path / "out").keys() == ShardedState(tmp_path / "base").keys()
    plain = learnt._replace(method="task_arithmetic", parameters={}, inputs={})
    found = merge_recipe(plain, tmp_path / "again", mask=mask)
    assert found.merged == len(ShardedState(tmp_path / "base"))
