import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from polyspan.checkpoints import MergeScore
from polyspan.cli import run
from polyspan.cli.merge import merge
from polyspan.errors import WrongContent
from polyspan.io import list_folder, read_lines, read_members, write_members, write_text

RECIPE = """
merge_method: ties
base_model: base.safetensors
models:
  - model: one.safetensors
  - model: two.safetensors
parameters: {density: 1.0, lambda: 0.5}
"""


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(5, 4)).astype(np.float32)
    write_members(tmp_path / "base.safetensors", {"w": base})
    for name in ("one", "two"):
        write_members(tmp_path / f"{name}.safetensors", {"w": base + rng.normal(size=base.shape).astype(np.float32)})
    write_text(tmp_path / "recipe.yaml", RECIPE)
    return tmp_path


def read(path):
    return read_members(path)["w"]


def test_the_merged_file_holds_what_the_formulas_give_and_the_report_is_true(files, capsys):
    merge(files / "recipe.yaml", out=files / "out", json=True)
    told = json.loads(capsys.readouterr().out)
    base, one, two = (read(files / f"{name}.safetensors") for name in ("base", "one", "two"))
    a, b = one - base, two - base
    sign = np.sign(a + b)
    expected = base + 0.5 * (a * (a * sign > 0) + b * (b * sign > 0))
    np.testing.assert_allclose(read(files / "out" / "model.safetensors"), expected, atol=1e-6)
    assert told["files"] == ["model.safetensors"]
    assert (told["method"], told["models"], told["tensors"], told["merged"]) == ("ties", ["one", "two"], 1, 1)
    assert told["parameters"] == {"density": 1.0, "scaling": 0.5}


def test_options_of_the_command_take_the_place_of_the_recipes(files, capsys):
    write_text(files / "recipe.yaml", RECIPE.replace("density: 1.0, ", ""))
    merge(files / "recipe.yaml", out=files / "out", method="task-arithmetic", scaling=1.0)
    assert "method\ttask_arithmetic" in capsys.readouterr().out
    base, one, two = (read(files / f"{name}.safetensors") for name in ("base", "one", "two"))
    np.testing.assert_allclose(read(files / "out" / "model.safetensors"), one + two - base, atol=1e-6)


def test_parameters_and_bytes_of_all_that_is_read_and_written_are_told(files, capsys):
    rng = np.random.default_rng(1)
    adapter = files / "lora"
    adapter.mkdir()
    factors = {"lora_A": rng.normal(size=(2, 4)), "lora_B": rng.normal(size=(5, 2))}
    write_members(
        adapter / "adapter_model.safetensors",
        {f"base_model.model.w.{n}.weight": x.astype(np.float32) for n, x in factors.items()},
    )
    write_text(adapter / "adapter_config.json", '{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    for name in ("base", "one"):
        write_members(files / f"{name}.safetensors", {"w.weight": read(files / f"{name}.safetensors"), "b": np.ones(3)})
    text = RECIPE.replace("two.safetensors", "lora").replace("ties", "task_arithmetic").replace("density: 1.0, ", "")
    write_text(files / "recipe.yaml", text)
    merge(files / "recipe.yaml", out=files / "out", shard_bytes=60, json=True)
    told = json.loads(capsys.readouterr().out)["sizes"]
    shards = [p.stat().st_size for p in list_folder(files / "out", "*.safetensors")]
    assert len(shards) == 2
    whole = (files / "base.safetensors").stat().st_size, (files / "one.safetensors").stat().st_size
    assert [tuple(row[n] for n in ("name", "kind", "parameters", "bytes")) for row in told] == [
        ("base", "base", 23, whole[0]), ("one", "model", 23, whole[1]),
        ("lora", "model", 18, (adapter / "adapter_model.safetensors").stat().st_size),
        ("task_arithmetic", "merged", 23, sum(shards)),
    ]  # fmt: skip
    merge(files / "recipe.yaml", out=files / "out", shard_bytes=60)
    assert f"lora\tmodel\t18\t{told[2]['bytes']:,}" in capsys.readouterr().out


def test_a_mask_that_is_read_is_weighed_too(files, capsys):
    text = RECIPE.replace("ties", "task_arithmetic").replace("density: 1.0, ", "")
    write_text(files / "recipe.yaml", text)
    mask = files / "mask.safetensors"
    write_members(mask, {"w": np.zeros((5, 4), np.float32)})
    merge(files / "recipe.yaml", out=files / "out", mask=mask, json=True)
    last = json.loads(capsys.readouterr().out)["sizes"][-1]
    assert last == {"name": "mask.safetensors", "kind": "mask", "parameters": 20, "bytes": mask.stat().st_size}


def test_a_method_that_learns_without_inputs_is_an_error(files):
    write_text(files / "recipe.yaml", RECIPE.replace("parameters: {density: 1.0, lambda: 0.5}", ""))
    with pytest.raises(ValueError, match="models must each have inputs for 'concrete', got none for one, two"):
        merge(files / "recipe.yaml", out=files / "out", method="concrete")
    with pytest.raises(ValueError, match="workers must be 1 for 'concrete', which learns from the whole network"):
        merge(files / "recipe.yaml", out=files / "out", method="concrete", workers=2)
    with pytest.raises(WrongContent, match="merge_method 'fisher'"):
        merge(files / "recipe.yaml", out=files / "out", method="fisher")


def test_the_picture_is_of_the_changes_and_the_same_each_time(files):
    for name in ("a", "b"):
        merge(files / "recipe.yaml", out=files / name, plot=files / f"{name}.svg")
    drawn = (files / "a.svg").read_text()
    assert drawn == (files / "b.svg").read_text()
    assert "Cosine between changes" in drawn
    with pytest.raises(ValueError, match=r"--plot must end in \.svg, \.png or \.pdf, got 'c\.gif'"):
        merge(files / "recipe.yaml", out=files / "c", plot=files / "c.gif")
    assert not (files / "c").exists()


def test_two_workers_write_the_files_of_one(files):
    for name in ("base", "one", "two"):
        write_members(files / f"{name}.safetensors", {part: read(files / f"{name}.safetensors") for part in "abw"})
    for workers in (1, 2):
        merge(files / "recipe.yaml", out=files / f"out{workers}", workers=workers)
    one, two = ({p.name: p.read_bytes() for p in (files / f"out{workers}").iterdir()} for workers in (1, 2))
    assert len(one) == 5
    assert one == two


def test_texts_are_measured_and_named_once(files, tmp_path, capsys, monkeypatch):
    asked = {}

    def measured(recipe, merged, texts, **options):
        asked.update(options, texts=texts, merged=merged)
        return [MergeScore("base", "base", dict.fromkeys(texts, 2.0)), MergeScore("ties", "merged", {"a": 1.5, "b": 3})]

    monkeypatch.setattr("polyspan.checkpoints.merge_scores.plan_scoring", lambda *_, **__: None)
    monkeypatch.setattr("polyspan.checkpoints.score_merge", measured, raising=False)
    given = ["a=one.txt", str(tmp_path / "b.txt")]
    merge(files / "recipe.yaml", out=files / "out", eval=given, compare=True, context=7, device="cpu")
    shown = capsys.readouterr().out
    assert "base\tbase\t2.00\t2.00" in shown
    assert "ties\tmerged\t1.50\t3.00" in shown
    assert asked["texts"] == {"a": Path("one.txt"), "b": tmp_path / "b.txt"}
    assert asked["compare"] == ("average", "task_arithmetic", "ties", "dare")
    assert (asked["context"], asked["device"], asked["merged"]) == (7, "cpu", files / "out")
    with pytest.raises(ValueError, match="a name of its own, got 'one' twice"):
        merge(files / "recipe.yaml", out=files / "other", eval=["one.txt", "one=b.txt"])
    with pytest.raises(ValueError, match="must go with --eval, got no text"):
        merge(files / "recipe.yaml", out=files / "other", compare=True)
    assert not (files / "other").exists()


@pytest.mark.slow
def test_after_kill_9_the_same_command_ends_in_the_same_bytes_and_nothing_of_it_loads_before(
    files, monkeypatch, capsys
):
    rng = np.random.default_rng(1)
    for name in ("base", "one", "two"):
        state = {f"w{i:02}": rng.normal(size=(400, 300)).astype(np.float32) for i in range(16)}
        write_members(files / f"{name}.safetensors", state)
    monkeypatch.chdir(files)
    words = ["merge", "recipe.yaml", "--density", "0.3", "--out"]
    out, journal = files / "out", files / "out" / "merge.journal.jsonl"
    started = subprocess.Popen(
        [sys.executable, "-m", "polyspan.cli", *words, "out"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not (journal.is_file() and len(read_lines(journal)[0]) > 3):
        assert time.monotonic() < end, "no journal"
        assert started.poll() is None, "ended before it was killed"
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    seen = {path.name for path in list_folder(out)}
    shards = {f"model-{i:05}-of-00016.safetensors" for i in range(1, 17)}
    # Shards are whole or not there, and without their index they are no checkpoint.
    assert all(name.startswith(".") or name in shards | {journal.name} for name in seen), seen
    assert 3 <= len(seen & shards) < 16
    assert all(list(read_members(out / name)) for name in seen & shards)
    assert run([*words, "out"]) == 0
    assert "of 16 files were there from an interrupted run" in capsys.readouterr().err
    assert run([*words, "whole"]) == 0
    one, two = ({path.name: path.read_bytes() for path in list_folder(files / name)} for name in ("out", "whole"))
    assert one == two
