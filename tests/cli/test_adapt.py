import importlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyspan.cli.adapt import extract, merge, ranks


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYSPAN_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    base = {"conv.weight": rng.normal(size=(6, 4, 3, 3)), "conv.bias": rng.normal(size=6)}
    delta = np.einsum("i,j,k,l->ijkl", *(rng.normal(size=n) for n in (6, 4, 3, 3)))
    tuned = {"conv.weight": base["conv.weight"] + delta, "conv.bias": base["conv.bias"] + 1}
    for name, state in (("base", base), ("tuned", tuned)):
        save_file({k: v.astype(np.float32) for k, v in state.items()}, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_extracting_and_merging_give_the_tuned_weight_back(files, capsys):
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    extract(base, tuned, out=files / "a", rank=1, spatial_rank=1, json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["layers"][0]["ranks"] == [1, 1, 1, 1]
    assert said["left_out"] == ["conv.bias"]
    merge(base, files / "a", out=files / "m.safetensors", json=True)
    assert json.loads(capsys.readouterr().out)["changed"] == ["conv.weight"]
    merged, wanted = load_file(files / "m.safetensors"), load_file(tuned)
    np.testing.assert_allclose(merged["conv.weight"], wanted["conv.weight"], atol=1e-5)
    np.testing.assert_array_equal(merged["conv.bias"], load_file(base)["conv.bias"])


def test_tables_say_what_was_done_and_talk_goes_to_stderr(files, capsys):
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    extract(base, tuned, out=files / "a", error=0.1)
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == "layer\tweight\tranks\tparameters\tleft out"
    assert told.out.splitlines()[1:] == ["conv\t6 x 4 x 3 x 3\t1 x 1 x 1 x 1\t17\t0.000"]
    assert "1 tensors differ and are in no adapter: conv.bias" in told.err
    merge(base, files / "a", out=files / "m.safetensors")
    assert capsys.readouterr().out.splitlines() == ["conv.weight"]
    ranks(base, tuned, error=[0.5, 0.01], plot=files / "r.svg")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "conv\t6 x 4 x 3 x 3\t0.01\t1 x 1 x 1 x 1\t17\t7.9%"
    assert (files / "r.svg").read_text().count("<svg") == 1
    ranks(base, tuned, json=True)
    assert [c["error"] for c in json.loads(capsys.readouterr().out)[0]["ranks"]] == [0.5, 0.2, 0.1]
    assert list((files / "home" / "journals").iterdir()) == []


def test_two_workers_extract_and_measure_what_one_does(files, capsys):
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    for name, state in ((base, load_file(base)), (tuned, load_file(tuned))):
        save_file(state | {"next.weight": 2 * state["conv.weight"][0]}, name)
    told = []
    for workers in (1, 2):
        extract(base, tuned, out=files / f"a{workers}", error=0.1, workers=workers)
        ranks(base, tuned, workers=workers)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "next\t4 x 3 x 3\t" in told[0]
    one, two = ({p.name: p.read_bytes() for p in (files / f"a{workers}").iterdir()} for workers in (1, 2))
    assert one == two


def test_ranks_go_on_after_an_interrupt(files, capsys, monkeypatch):
    module = importlib.import_module("polyspan.checkpoints.tucker_files")
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    for name, state in ((base, load_file(base)), (tuned, load_file(tuned))):
        save_file(state | {"next.weight": 2 * state["conv.weight"][0]}, name)
    ranks(base, tuned)
    expected, calls, real = capsys.readouterr().out, [], module._advise_layer

    def dying(options, pair):
        calls.append(pair.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(options, pair)

    monkeypatch.setattr(module, "_advise_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        ranks(base, tuned)
    ranks(base, tuned)
    assert capsys.readouterr().out == expected
    assert calls == ["conv.weight", "next.weight", "next.weight"]
