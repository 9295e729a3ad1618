import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import read_json, write_array, write_members
from polyspan.learn import ActivationStore
from polyspan.run import measure_peak


def rows(n, d=3, start=0):
    return (start + np.arange(n, dtype=np.float32))[:, None] * np.ones((1, d), np.float32)


def first_column(batches):
    return np.concatenate([batch[:, 0] for batch in batches]).astype(int)


# The order.


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    block=st.integers(1, 20),
    more=st.integers(0, 60),
    batch=st.integers(1, 80),
    seed=st.integers(0, 5),
)
def test_a_pass_gives_every_row_once_and_can_be_taken_up_at_any_batch(sizes, block, more, batch, seed):
    starts = np.cumsum([0, *sizes])
    store = ActivationStore(
        [rows(n, start=int(at)) for n, at in zip(sizes, starts[:-1], strict=True)],
        block_rows=block,
        buffer_rows=block + more,
    )
    n = sum(sizes)
    whole = [part.copy() for part in store.batches(batch, seed=seed, epoch=1)]
    assert len(whole) == store.n_batches(batch)
    found = first_column(whole)
    assert len(found) == (n // batch * batch or n)
    assert len(set(found.tolist())) == len(found)
    for start in {0, len(whole) // 2, len(whole)}:
        rest = list(store.batches(batch, seed=seed, epoch=1, start=start))
        assert len(rest) == len(whole) - start
        for mine, theirs in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    plain = list(store.batches(batch, shuffle=False))
    assert first_column(plain).tolist() == list(range(n))
    assert all(len(part) == batch for part in plain[:-1])


def test_rows_are_mixed_anew_in_each_pass():
    store = ActivationStore.from_array(rows(3000), block_rows=50, buffer_rows=500)
    one, two = (first_column(store.batches(100, epoch=epoch)) for epoch in (0, 1))
    other = first_column(store.batches(100, seed=1))
    assert (one != two).mean() > 0.99
    assert (one != other).mean() > 0.99
    # Neighbours in the file end up far apart.
    assert np.abs(np.diff(one)).mean() > 300
    assert np.corrcoef(one, np.arange(3000))[0, 1] == pytest.approx(0, abs=0.2)
    np.testing.assert_array_equal(store.sample(7, seed=2), next(store.batches(7, seed=2)))
    assert len(store.sample(10_000)) == 3000


# Files.


def write(folder, suffix, values):
    path = folder / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"vector": pa.FixedSizeListArray.from_arrays(values.reshape(-1), 3)}), path,
                       row_group_size=37)  # fmt: skip
    elif suffix == ".npz":
        np.savez_compressed(path, vector=values)
    else:
        write_array(path, values)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".fvecs"])
def test_every_format_gives_its_rows_once(tmp_path, suffix):
    path = write(tmp_path, suffix, rows(200))
    second = tmp_path / "b.npy"
    write_array(second, rows(45, start=200).astype(np.float16))
    store = ActivationStore.from_files([path, second], block_rows=20, buffer_rows=64)
    assert (store.n_rows, store.dim, len(store)) == (245, 3, 245)
    parts = list(store.batches(49, seed=3))
    assert sorted(first_column(parts).tolist()) == list(range(245))
    assert all(part.dtype == np.float32 for part in parts)
    rest = list(store.batches(49, seed=3, start=2))
    for mine, theirs in zip(rest, parts[2:], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_file_larger_than_memory_is_streamed(tmp_path):
    path = tmp_path / "large.npy"
    large = np.lib.format.open_memmap(path, "w+", np.float16, (400_000, 64))
    large[::1000] = 1
    del large

    def pass_through():
        store = ActivationStore.from_files(path, buffer_rows=8192)
        return sum(float(batch[:, 0].sum()) for batch in store.batches(4000))

    found = measure_peak(pass_through)
    assert found.result == 400
    # In float32 the file is 98 MiB; the buffers are 2 of 2 MiB each.
    assert found.peak_bytes < 25 * 2**20


def test_what_tells_a_store_from_others(tmp_path):
    path = write(tmp_path, ".npy", rows(20))
    facts = ActivationStore.from_files(path).facts()
    os.utime(path, (1, 1))
    assert ActivationStore.from_files(path).facts() == facts
    assert ActivationStore.from_files(path, block_rows=7, buffer_rows=70).facts() != facts
    write_array(path, rows(20, start=1))
    assert ActivationStore.from_files(path).facts() != facts
    assert ActivationStore.from_array(rows(5)).facts() != ActivationStore.from_array(rows(5, start=1)).facts()


def test_files_that_cannot_be_are_refused(tmp_path):
    path = write(tmp_path, ".npy", rows(200))
    other = tmp_path / "b.npy"
    write_array(other, rows(4, d=5))
    with pytest.raises(WrongContent, match=r"b.npy: found rows of 5; expected 3 as in .*a.npy"):
        ActivationStore.from_files([path, other])
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(CorruptFile, match=r"a.npy"):
        ActivationStore.from_files(path)
    bad = rows(200)
    bad[150, 1] = np.nan
    np.save(path, bad)
    with pytest.raises(WrongContent, match="at row 150, column 1: found nan; expected finite numbers"):
        list(ActivationStore.from_files(path).batches(10))
    two = tmp_path / "two.safetensors"
    write_members(two, {"a": rows(3), "b": rows(4)})
    with pytest.raises(WrongContent, match="2 arrays: a, b"):
        ActivationStore.from_files(two)
    assert ActivationStore.from_files(two, member="b").n_rows == 4


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="sources must be at least one, got none"):
        ActivationStore([])
    with pytest.raises(ValueError, match="buffer_rows must be at least block_rows, which is at least 1, got 3 and 5"):
        ActivationStore.from_array(rows(9), buffer_rows=3, block_rows=5)
    with pytest.raises(ValueError, match=r"sources must be of one width, got \[3, 4\]"):
        ActivationStore([rows(2), rows(2, d=4)])
    with pytest.raises(
        ValueError, match=r"rows must be an array \(n, d\) of at least one row and column, got \(0, 3\)"
    ):
        ActivationStore.from_array(rows(0))
    store = ActivationStore.from_array(rows(9))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(store.batches(0))
    with pytest.raises(ValueError, match="start must be between 0 and 3, got 4"):
        next(store.batches(3, start=4))


# Activations of a model.

WORDS = ["<end>", *"abcdefghijklmnopqrstuvwxyz"]


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [WORDS.index(letter) for letter in text if letter in WORDS]}


def llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


TEXTS = ["the quick brown fox", "", "jumps over the lazy dog", "and goes on " * 5]


@pytest.mark.parametrize(("make", "layer"), [(llama, "model.layers.0"), (gpt2, "transformer.h.1")])
def test_a_layers_output_at_every_token_is_kept(tmp_path, make, layer):
    model, path = make(), tmp_path / "acts.npy"
    store = ActivationStore.from_model(model, Letters(), TEXTS, layer, path, context=10, n_skip=1, batch_size=3)
    ids = [i for text in TEXTS if text for i in [*Letters()(text, add_special_tokens=False)["input_ids"], 0]]
    windows = np.array(ids[: len(ids) // 10 * 10]).reshape(-1, 10)
    assert store.n_rows == 9 * len(windows)
    assert store.dim == 16
    np.testing.assert_array_equal(ActivationStore.tokens(path), windows[:, 1:].reshape(-1))
    with torch.no_grad():
        states = model(torch.from_numpy(windows), output_hidden_states=True).hidden_states
    number = int(layer.rsplit(".", 1)[1]) + 1
    expected = states[number][:, 1:].reshape(-1, 16).numpy()
    if make is llama:
        found = np.concatenate(list(store.batches(7, shuffle=False)))
        np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
    assert np.load(path).dtype == np.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["acts.json", "acts.npy", "acts.tokens.npy"]
    assert read_json(tmp_path / "acts.json")["layer"] == layer


def test_a_complete_file_is_used_as_it_is_and_one_of_other_work_refused(tmp_path):
    path = tmp_path / "acts.npy"
    options = {"context": 10, "dtype": "float32"}
    ActivationStore.from_model(llama(), Letters(), TEXTS, "model.layers.1", path, **options)
    before = path.stat().st_mtime_ns
    again = ActivationStore.from_model(llama(), Letters(), TEXTS, "model.layers.1", path, **options)
    assert path.stat().st_mtime_ns == before
    assert again.n_rows % 9 == 0
    for model, texts, layer, said in (
        (llama(1), TEXTS, "model.layers.1", r"\['model'\]"),
        (llama(), TEXTS[2:], "model.layers.1", r"\['tokens'\]"),
        (llama(), TEXTS, "model.layers.0", r"\['layer'\]"),
    ):
        with pytest.raises(
            ValueError, match=f"path must be a new file or one of the same work, got acts.npy with.*{said}"
        ):
            ActivationStore.from_model(model, Letters(), texts, layer, path, **options)


def test_fewer_tokens_may_be_asked_for(tmp_path):
    store = ActivationStore.from_model(
        llama(), Letters(), iter(TEXTS), "model.layers.1", tmp_path / "a.npy", context=10, n_skip=0, max_tokens=25
    )
    assert store.n_rows == 20


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {here!r})
    import numpy as np
    import test_activation_store as t
    from polyspan.learn import activation_store as s

    calls = 0
    run = s._run

    def dies(*args):
        global calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args)

    s._run = dies
    # Every window is put on the disk, as in files that are larger.
    s.PartialRows.append = lambda self, start, rows, old=s.PartialRows.append: (old(self, start, rows), self.sync())
    s.ActivationStore.from_model(t.llama(), t.Letters(), t.TEXTS, "model.layers.1", {path!r}, context=10, batch_size=1)
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    path, other = tmp_path / "killed" / "acts.npy", tmp_path / "whole.npy"
    path.parent.mkdir()
    here = os.path.dirname(__file__)
    code = textwrap.dedent(KILLED).format(here=here, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists()
    ran = []
    model = llama()
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    ActivationStore.from_model(model, Letters(), TEXTS, "model.layers.1", path, context=10, batch_size=1)
    ActivationStore.from_model(llama(), Letters(), TEXTS, "model.layers.1", other, context=10, batch_size=1)
    assert path.read_bytes() == other.read_bytes()
    # One run tells the width; three windows were on the disk.
    assert len(ran) == 1 + len(np.load(other)) // 9 - 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["acts.json", "acts.npy", "acts.tokens.npy"]


def test_models_and_texts_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "a.npy"

    def record(model=None, texts=TEXTS, layer="model.layers.1", path=path, **options):
        return ActivationStore.from_model(model or llama(), Letters(), texts, layer, path, **{"context": 10, **options})

    with pytest.raises(ValueError, match=r"layer must name a submodule of the model, such as .*layers.1.*got 'h.1'"):
        record(layer="h.1")
    with pytest.raises(ValueError, match="texts must fill a window of 10 tokens, got 3"):
        record(texts=["ab"])
    with pytest.raises(ValueError, match="texts must be several, got one str"):
        record(texts="the quick brown fox")
    with pytest.raises(ValueError, match=r"path must end in .npy, got 'a.npz'"):
        record(path=tmp_path / "a.npz")
    with pytest.raises(ValueError, match="dtype must be 'float16' or 'float32', got 'int8'"):
        record(dtype="int8")
    with pytest.raises(ValueError, match="n_skip must be between 0 and below context=10, got 10"):
        record(n_skip=10)
    with pytest.raises(ValueError, match="max_tokens must be at least a window's 9 rows, got 5"):
        record(max_tokens=5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        record(batch_size=0)
    with pytest.raises(ValueError, match=r"layer must run once and give a tensor \(b, t, d\), got 0 runs"):
        record(layer="model.layers")
    broken = llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[WORDS.index("z")] = torch.nan
    with pytest.raises(ValueError, match="the layer must give finite numbers, got NaN or infinity in window 3"):
        record(model=broken)
    for file in tmp_path.glob(".a.npy*"):
        file.unlink()
    large = llama()
    with torch.no_grad():
        large.model.embed_tokens.weight *= 1e8
    with pytest.raises(ValueError, match=r"dtype must be 'float32' for activations of up to .*, got 'float16'"):
        record(model=large, layer="model.embed_tokens")
    assert not path.exists()


@pytest.mark.parametrize("sources", ["rows.npy", [Path("rows.npy")]], ids=["text", "list"])
def test_paths_that_were_not_opened_are_refused_by_name(sources):
    with pytest.raises(TypeError, match=r"sources must be readers or arrays, got .*from_files opens paths"):
        ActivationStore(sources)
