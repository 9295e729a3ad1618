"""Merges and extractions that are fanned out: the bytes are those of one process, also after workers are killed."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from polyspan.checkpoints import advise_tucker_ranks, extract_tucker_adapter, merge_checkpoints, merge_recipe
from polyspan.checkpoints.merge_recipes import MergeRecipe
from polyspan.io import read_lines, write_json, write_members
from polyspan.run import torch_generator

SHAPES = ((40, 30), (30,), (7, 5), (23, 8, 3))


def saved(folder, shapes=SHAPES, *, dtype=torch.float32, models=2):
    """Write a base and models whose changes are whole sixteenths: those of two tasks often cancel exactly.

    Changes of each layer are twice as large as those of the layer before, and mostly of the other sign.
    """
    from safetensors.torch import save_file

    generator = torch_generator(0)
    base = [torch.randint(-32, 33, shape, generator=generator) / 16 for shape in shapes]
    for model in ("base", *(f"task{i}" for i in range(models))):
        state = {"bn.running_mean": torch.randn(9, generator=generator), "steps": torch.tensor([3])}
        for i, weight in enumerate(base):
            change = (torch.randint(-8, 9, weight.shape, generator=generator) + (-1) ** i) * 2 ** (i % 4) / 16
            state[f"layer{i}.weight"] = (weight if model == "base" else weight + change).to(dtype)
        (folder / model).mkdir()
        save_file(state, folder / model / "model.safetensors")
    return folder / "base", {f"task{i}": folder / f"task{i}" for i in range(models)}


def bytes_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def cluster():
    """Yield the address of a dask cluster of two processes."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster.scheduler_address


METHODS = [
    ("average", {"weights": [1, 3]}),
    ("task_arithmetic", {"scaling": 0.7, "ignore_keys": ["layer2.*"]}),
    ("ties", {"density": 0.4, "weights": [1, 0.5]}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 0.4, "scope": "tensor", "reduction": "mean"}),
    ("dare", {"density": 0.6, "elect": True, "seed": 4}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_two_workers_merge_to_the_bytes_of_one(tmp_path, method, options, dtype):
    base, models = saved(tmp_path, dtype=dtype)
    one = merge_checkpoints(base, models, tmp_path / "one", method=method, **options)
    two = merge_checkpoints(base, models, tmp_path / "two", method=method, workers=2, **options)
    assert len(one.shards) > 2
    assert bytes_in(one.path) == bytes_in(two.path)
    assert two[2:] == one[2:]


@pytest.mark.parametrize("fact", ["limits", "majority"])
def test_what_ties_knows_of_the_whole_model_matters_to_every_shard(tmp_path, monkeypatch, fact):
    base, models = saved(tmp_path)
    module = importlib.import_module("polyspan.checkpoints.merge_files")
    told = merge_checkpoints(base, models, tmp_path / "told", method="ties", density=0.4, workers=2)
    real = module._whole_model
    # Workers that are not told find it in their own shard only.
    monkeypatch.setattr(module, "_whole_model", lambda *a, **k: {n: v for n, v in real(*a, **k).items() if n != fact})
    blind = merge_checkpoints(base, models, tmp_path / "blind", method="ties", density=0.4, workers=2)
    assert bytes_in(blind.path) != bytes_in(told.path)


def test_a_mask_and_the_adapter_of_a_model_are_read_by_every_worker(tmp_path):
    base, models = saved(tmp_path)
    rng = np.random.default_rng(0)
    names = [f"layer{i}.weight" for i in range(len(SHAPES))]
    logits = {n: rng.normal(size=s).astype(np.float16) for n, s in zip(names, SHAPES, strict=True)}
    write_members(tmp_path / "mask.safetensors", logits)
    (tmp_path / "lora").mkdir()
    write_json(tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 4})
    factors = {"A": rng.normal(size=(3, 30)), "B": rng.normal(size=(40, 3))}
    write_members(
        tmp_path / "lora" / "adapter_model.safetensors",
        {f"base_model.model.layer0.lora_{n}.weight": f.astype(np.float32) for n, f in factors.items()},
    )
    models["lora"] = tmp_path / "lora"
    made = [
        merge_checkpoints(base, models, tmp_path / f"out{w}", mask=tmp_path / "mask.safetensors", workers=w)
        for w in (1, 2)
    ]
    assert bytes_in(made[0].path) == bytes_in(made[1].path)


@pytest.mark.parametrize("threads", [3, 16])
def test_the_update_of_an_adapter_and_the_mean_of_a_mask_have_the_same_bits_on_any_number_of_threads(tmp_path, threads):
    # An odd width, which products of matrices cut up differently for each number of threads.
    base, models = saved(tmp_path, shapes=((6, 50257),), models=1)
    rng = np.random.default_rng(0)
    (tmp_path / "lora").mkdir()
    write_json(tmp_path / "lora" / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 4})
    factors = {"A": rng.normal(size=(4, 50257)), "B": rng.normal(size=(6, 4))}
    write_members(
        tmp_path / "lora" / "adapter_model.safetensors",
        {f"base_model.model.layer0.lora_{n}.weight": f.astype(np.float32) for n, f in factors.items()},
    )
    write_members(tmp_path / "mask.safetensors", {"layer0.weight": rng.normal(size=(6, 50257)).astype(np.float16)})
    models["lora"] = tmp_path / "lora"
    before, made = torch.get_num_threads(), []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            out = tmp_path / f"out{n}"
            made.append(merge_checkpoints(base, models, out, mask=tmp_path / "mask.safetensors").path)
    finally:
        torch.set_num_threads(before)
    assert bytes_in(made[0]) == bytes_in(made[1])


@pytest.mark.slow
def test_a_dask_cluster_merges_to_the_bytes_of_one_process(tmp_path, cluster):
    base, models = saved(tmp_path, dtype=torch.bfloat16)
    one = merge_checkpoints(base, models, tmp_path / "one", method="ties", density=0.4)
    two = merge_checkpoints(base, models, tmp_path / "two", method="ties", density=0.4, engine="dask", address=cluster)
    assert bytes_in(one.path) == bytes_in(two.path)


def test_a_merge_goes_on_with_what_an_interrupted_one_knew_of_the_whole_model(tmp_path, monkeypatch):
    base, models = saved(tmp_path)
    module = importlib.import_module("polyspan.checkpoints.merge_files")
    whole = merge_checkpoints(base, models, tmp_path / "whole", method="ties", density=0.4)

    def dying(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_merged", dying)
    # One shard at a time of two workers' work, here: the first of all tasks is lost.
    real = module.map_tasks
    monkeypatch.setattr(module, "map_tasks", lambda *a, **k: real(*a, **{**k, "workers": 1}))
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(base, models, tmp_path / "out", method="ties", density=0.4, workers=2)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_limits", dying)
    monkeypatch.setattr(module, "_votes", dying)
    again = merge_checkpoints(base, models, tmp_path / "out", method="ties", density=0.4, workers=2)
    assert again.resumed == 0
    assert bytes_in(again.path) == bytes_in(whole.path)


@pytest.mark.parametrize(
    ("fan", "told"),
    [
        ({"workers": 2}, "workers must be 1 for 'concrete', which learns from the whole network"),
        ({"engine": "dask"}, "engine must be 'local' for 'concrete'"),
        ({"address": "tcp://a:1"}, "address must be None for 'concrete'"),
    ],
)
def test_a_merge_that_learns_from_the_whole_network_is_not_fanned_out(tmp_path, fan, told):
    base, models = saved(tmp_path)
    recipe = MergeRecipe("concrete", base, models, {}, None, {}, {}, "BertModel", [])
    with pytest.raises(ValueError, match=told):
        merge_recipe(recipe, tmp_path / "out", **fan)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_not_known_is_refused_before_anything_is_written(tmp_path):
    base, models = saved(tmp_path)
    with pytest.raises(ValueError, match=r"engine must be one of .* got 'spark'"):
        merge_checkpoints(base, models, tmp_path / "out", engine="spark")
    tuned = models["task0"] / "model.safetensors"
    with pytest.raises(ValueError, match=r"engine must be one of .* got 'spark'"):
        extract_tucker_adapter(base, tuned, tmp_path / "a", engine="spark")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        advise_tucker_ranks(base, tuned, workers=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "task0", "task1"]


LAYERS = ((30, 20), (20,), (12, 9, 3, 3), (25, 25), (18, 40))


def test_two_workers_extract_the_bytes_of_one_and_measure_the_same(tmp_path):
    base, models = saved(tmp_path, LAYERS, models=1)
    made = [extract_tucker_adapter(base, models["task0"], tmp_path / f"a{w}", error=0.2, workers=w) for w in (1, 2)]
    assert bytes_in(made[0].path) == bytes_in(made[1].path)
    assert made[0][1:] == made[1][1:]
    advice = [advise_tucker_ranks(base, models["task0"], curves=True, workers=w) for w in (1, 2)]
    for one, two in zip(*advice, strict=True):
        assert one[:4] == two[:4]
        for a, b in zip(one.curve, two.curve, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_dask_cluster_extracts_the_bytes_of_one_process(tmp_path, cluster):
    base, models = saved(tmp_path, LAYERS, models=1)
    one = extract_tucker_adapter(base, models["task0"], tmp_path / "one", rank=3)
    two = extract_tucker_adapter(base, models["task0"], tmp_path / "two", rank=3, engine="dask", address=cluster)
    assert bytes_in(one.path) == bytes_in(two.path)
    advice = [advise_tucker_ranks(base, models["task0"], **o) for o in ({}, {"engine": "dask", "address": cluster})]
    assert advice[0] == advice[1]


def test_an_interrupted_extraction_does_only_the_rest_and_torn_layers_again(tmp_path, monkeypatch):
    base, models = saved(tmp_path, LAYERS, models=1)
    files = base, models["task0"]
    whole = extract_tucker_adapter(*files, tmp_path / "whole", rank=3)
    module = importlib.import_module("polyspan.checkpoints.tucker_files")
    calls, real = [], module._extract_layer

    def dying(work, options, item):
        calls.append(item[1].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(work, options, item)

    monkeypatch.setattr(module, "_extract_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        extract_tucker_adapter(*files, tmp_path / "out", rank=3)
    work = tmp_path / ".out.extracting"
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"belongs to other work \(rank: 3 there, 4 now\)"):
        extract_tucker_adapter(*files, tmp_path / "out", rank=4)
    torn = sorted(work.glob("layer-*"))[0]
    torn.write_bytes(torn.read_bytes()[:-1])
    again = extract_tucker_adapter(*files, tmp_path / "out", rank=3)
    assert calls[4:] == [calls[0], calls[3]]
    assert bytes_in(again.path) == bytes_in(whole.path)
    assert again[1:] == whole[1:]
    assert not work.exists()


def test_advice_goes_on_from_a_journal_and_begins_anew_for_another_question(tmp_path, monkeypatch):
    base, models = saved(tmp_path, LAYERS, models=1)
    files, journal = (base, models["task0"]), tmp_path / "ranks.jsonl"
    expected = advise_tucker_ranks(*files)
    module = importlib.import_module("polyspan.checkpoints.tucker_files")
    calls, real = [], module._advise_layer

    def dying(options, pair):
        calls.append(pair.name)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        return real(options, pair)

    monkeypatch.setattr(module, "_advise_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        advise_tucker_ranks(*files, journal=journal)
    assert advise_tucker_ranks(*files, journal=journal) == expected
    assert len(calls) == 3 + 2
    assert not journal.exists()
    with pytest.raises(KeyboardInterrupt):
        advise_tucker_ranks(*files, journal=journal, errors=[0.3])
    assert advise_tucker_ranks(*files, journal=journal) == expected
    assert len(calls) == 6 + 4


MERGE = """
from pathlib import Path
from polyspan.checkpoints import merge_checkpoints
folder = Path({folder!r})
models = {{f"task{{i}}": folder / f"task{{i}}" for i in range(2)}}
merge_checkpoints(folder / "base", models, folder / "out", method="dare", elect=True, workers=2)
"""
EXTRACT = """
from pathlib import Path
from polyspan.checkpoints import extract_tucker_adapter
folder = Path({folder!r})
extract_tucker_adapter(folder / "base", folder / "task0", folder / "out", error=0.1, workers=2)
"""


def started(code, folder, journal, entries):
    """Start a run as the leader of a group of processes, and return it as soon as its journal has so many entries."""
    ran = subprocess.Popen(
        [sys.executable, "-c", code.format(folder=str(folder))], start_new_session=True, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while not (journal.is_file() and len(read_lines(journal)[0]) > entries):
        assert time.monotonic() < end, "no journal"
        assert ran.poll() is None, "ended before it was killed"
        time.sleep(0.002)
    return ran


def children(pid):
    """Return the processes that loky started for a process."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"popen_loky" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells a process's children in files")
@pytest.mark.parametrize(("work", "killed"), [("merge", "all"), ("extract", "worker")])
def test_after_kill_9_in_the_middle_the_same_call_ends_in_the_same_bytes(tmp_path, work, killed):
    if work == "merge":
        base, models = saved(tmp_path, ((256, 1000),) * 16)
        code, journal = MERGE, tmp_path / "out" / "merge.journal.jsonl"
    else:
        base, models = saved(tmp_path, ((30, 20, 9, 9),) * 16)
        code, journal = EXTRACT, tmp_path / ".out.extracting" / "extract.journal.jsonl"
    ran = started(code, tmp_path, journal, 2)
    try:
        if killed == "worker":
            os.kill(children(ran.pid)[0], signal.SIGKILL)
            ran.wait(timeout=60)
    finally:
        # The workers are of its group.
        os.killpg(ran.pid, signal.SIGKILL)
        ran.wait()
    assert ran.returncode != 0
    done = len(read_lines(journal)[0]) - 1
    assert 2 <= done < 16
    if work == "merge":
        options = {"method": "dare", "elect": True}
        whole = merge_checkpoints(base, models, tmp_path / "whole", **options)
        again = merge_checkpoints(base, models, tmp_path / "out", workers=2, **options)
        assert again.resumed == done
    else:
        whole = extract_tucker_adapter(base, models["task0"], tmp_path / "whole", error=0.1)
        again = extract_tucker_adapter(base, models["task0"], tmp_path / "out", error=0.1, workers=2)
        assert not journal.parent.exists()
    assert bytes_in(again.path) == bytes_in(whole.path)
