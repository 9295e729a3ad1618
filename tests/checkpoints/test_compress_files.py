import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polyspan.checkpoints import SparseDictionaryCompressor, compress_checkpoint, compress_files, plot_compression
from polyspan.checkpoints._compressed_files import read_layers, write_layers
from polyspan.checkpoints._compression import LayerReport, windows
from polyspan.checkpoints._layer_methods import Settings, Sizes, compress_unit, layer_config
from polyspan.checkpoints._text_models import check_ids, open_model, token_ids
from polyspan.checkpoints.compress_files import COMPARED, JOURNAL
from polyspan.checkpoints.compression_plots import errors_by_role
from polyspan.errors import CorruptFile, UnreadableFile, WrongContent
from polyspan.io import ShardedState, list_folder, read_json, write_bytes, write_json, write_tensor_file, write_text
from polyspan.run import torch_generator

transformers = pytest.importorskip("transformers")
FAST = {"max_iter": 3, "context": 30, "batch_size": 10}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()


def tokens(n=900, seed=1):
    return torch.randint(0, 60, (n,), generator=torch_generator(seed))


def saved(folder, *, layers=1, hidden=16, shards="9KB", dtype=torch.float32, **options):
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=60, max_position_embeddings=64, tie_word_embeddings=True, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2:
                    p.mul_(6)
    model.save_pretrained(folder, max_shard_size=shards)
    return model.eval()


def contents(folder):
    return {path.name: path.read_bytes() for path in list_folder(folder)}


@pytest.mark.parametrize("options", [{"groups": 2}, {"method": "wanda", "coef_dtype": "int8"}, {"method": "svd"}])
def test_the_report_counts_the_numbers_that_the_files_hold(tmp_path, options):
    saved(tmp_path / "base", layers=2)
    found = compress_checkpoint(tmp_path / "base", tmp_path / "out", calibration=tokens(), **FAST, **options)
    before, after = (ShardedState(tmp_path / "base"), ShardedState(found.files[0]))
    told = {row.method: row.parameters for row in found.methods}
    assert told.pop("dense") == sum(part.numel() for part in before.values())
    kept = sum(part.numel() for name, part in after.items() if not name.endswith((".mask", ".indices")))
    assert list(told.values()) == [kept]


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"sequential": True}, {"method": "orthogonal"}])
def test_a_compressed_checkpoint_holds_the_layers_of_the_compressor(tmp_path, options):
    model, ids = saved(tmp_path / "base", hidden=32, layers=2), tokens()
    found = compress_checkpoint(tmp_path / "base", tmp_path / "out", calibration=ids.view(-1, 30), **FAST, **options)
    assert [path.name for path in found.files] == ["polyspan.safetensors"]
    assert found.bytes_after == found.files[0].stat().st_size < found.bytes_before
    same = {name: value for name, value in options.items() if name != "method"}
    algorithm = options.get("method", "ksvd")
    compressor = SparseDictionaryCompressor(0.3, max_iter=3, algorithm=algorithm, **same)
    compressor.fit(model, list(ids.view(-1, 30).split(10)))
    assert found.layers == compressor.report_
    state, small = ShardedState(found.files[0]), compressor.compress(model).state_dict()
    assert all(torch.equal(state[name], small[name]) for name in state)
    assert not {name for name in small if name not in state} - {
        name for name in small if name == "lm_head.weight" or name.endswith(".dictionary")
    }
    told = read_json(tmp_path / "out" / "config.json")
    assert told["quantization_config"]["quant_method"] == "polyspan_compressed"
    assert len(told["quantization_config"]["layers"]) == 14
    assert sorted(p.name for p in list_folder(tmp_path / "out")) == [
        "compression.json", "config.json", "generation_config.json", "polyspan.safetensors",
    ]  # fmt: skip


def test_a_killed_run_does_only_the_rest_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    saved(tmp_path / "base")
    arguments = {"calibration": tokens(), "evaluation": tokens(200, 2), "compare": ("svd-llm",), **FAST}
    compress_checkpoint(tmp_path / "base", tmp_path / "whole", **arguments)
    calls, real = [], compress_files._compress_item

    def dying(item):
        calls.append(item["key"])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(item)

    monkeypatch.setattr(compress_files, "_compress_item", dying)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "polyspan.safetensors").exists()
    with pytest.raises(ValueError, match=r"belongs to other work .*ratio: 0.3 there, 0.4 now"):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", **arguments, ratio=0.4)
    again = compress_checkpoint(tmp_path / "base", tmp_path / "out", **arguments)
    assert again.resumed == 5
    assert len(calls) == 6 + 14 - 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("sequential", [False, True])
def test_a_run_killed_while_it_measures_or_in_sequence_resumes_too(tmp_path, monkeypatch, sequential):
    saved(tmp_path / "base")
    arguments = {"calibration": tokens(), "evaluation": tokens(200, 2), "sequential": sequential, **FAST}
    compress_checkpoint(tmp_path / "base", tmp_path / "whole", **arguments)
    real, calls = compress_files.gather_grams, []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    def dying_at_last(*_, **__):
        raise KeyboardInterrupt

    name = "gather_grams" if sequential else "perplexity"
    monkeypatch.setattr(compress_files, name, dying if sequential else dying_at_last)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", **arguments)
    monkeypatch.undo()
    assert compress_checkpoint(tmp_path / "base", tmp_path / "out", **arguments).resumed == (4 if sequential else 7)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_layer_that_was_changed_is_an_error(tmp_path, monkeypatch):
    saved(tmp_path / "base")
    monkeypatch.setattr(compress_files, "stored_entries", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", calibration=tokens(), **FAST)
    victim = list_folder(tmp_path / "out", "work-*")[3]
    write_bytes(victim, victim.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptFile, match=r"expected what compress.journal.jsonl recorded for ksvd/model"):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", calibration=tokens(), **FAST)


def test_a_run_killed_while_it_clears_up_goes_on(tmp_path, monkeypatch):
    saved(tmp_path / "base")
    arguments = {"calibration": tokens(), "evaluation": tokens(200, seed=3), "compare": ("svd",), **FAST}
    compress_checkpoint(tmp_path / "base", tmp_path / "whole", **arguments)
    monkeypatch.setattr(compress_files.Journal, "remove", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", **arguments)
    monkeypatch.undo()
    assert not list_folder(tmp_path / "out", "work-*")
    compress_checkpoint(tmp_path / "base", tmp_path / "out", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_several_passes_shards_and_processes_give_the_same_layers(tmp_path):
    saved(tmp_path / "base")
    found = [
        compress_checkpoint(tmp_path / "base", tmp_path / f"out{i}", calibration=tokens(), **FAST, **options)
        for i, options in enumerate([{}, {"memory_bytes": 3000, "shard_bytes": 4000}])
    ]
    assert found[0].layers == found[1].layers
    assert len(found[1].files) > 1
    index = read_json(tmp_path / "out1" / "polyspan.safetensors.index.json")
    assert set(index["weight_map"].values()) == {path.name for path in found[1].files}
    whole = ShardedState(found[0].files[0])
    parts = {name: ShardedState(tmp_path / "out1" / file)[name] for name, file in index["weight_map"].items()}
    torch.testing.assert_close(parts, {name: whole[name] for name in whole}, atol=0, rtol=0)


@pytest.mark.slow
def test_layers_fan_out_over_processes(tmp_path):
    saved(tmp_path / "base")
    one, two = (
        compress_checkpoint(
            tmp_path / "base", tmp_path / f"out{workers}", calibration=tokens(), workers=workers, **FAST
        )
        for workers in (1, 2)
    )
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a._replace(error=0) == b._replace(error=0)
        assert a.error == pytest.approx(b.error, rel=1e-6)


def test_all_rivals_stand_in_one_table_with_the_bytes_that_they_would_take(tmp_path):
    saved(tmp_path / "base", hidden=32)
    found = compress_checkpoint(
        tmp_path / "base", tmp_path / "out", calibration=tokens(), evaluation=tokens(300, 3), compare=COMPARED,
        word_bytes=4, **FAST,
    )  # fmt: skip
    rows = {row.method: row for row in found.methods}
    assert list(rows) == ["dense", "ksvd", *COMPARED]
    assert rows["ksvd"].mean_error < rows["svd-llm"].mean_error < rows["svd"].mean_error
    dense = rows.pop("dense")
    for row in rows.values():
        assert row.bytes < 0.8 * dense.bytes
        assert row.perplexity > 1
    assert found.methods[1].bytes <= found.bytes_after < found.methods[1].bytes + 12_000
    told = read_json(tmp_path / "out" / "compression.json")
    assert told["methods"][1]["method"] == "ksvd"
    assert len(told["layers"]) == 7
    for suffix in (".svg", ".png", ".pdf"):
        path = plot_compression(found, tmp_path / f"plot{suffix}")
        assert path.stat().st_size > 1000
        before = path.read_bytes()
        assert plot_compression(found, path).read_bytes() == before
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf"):
        plot_compression(found, tmp_path / "plot.jpg")


def test_the_picture_has_each_layer_where_it_is_in_the_model(tmp_path):
    def row(name, error, method="ksvd"):
        return LayerReport(name, (4, 4), method, 2, 1, 64, 40, error)

    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    kept = errors_by_role([row(names[0], 0.1), row(names[1], 0.0, ""), row(names[2], 0.3)])
    assert kept == {"up_proj": ([0, 2], [0.1, 0.3])}
    stacks = errors_by_role(
        [row("encoder.block.1.q", 0.1), row("decoder.block.0.q", 0.2), row("decoder.block.1.q", 0.3)]
    )
    assert stacks == {"encoder.block q": ([1], [0.1]), "decoder.block q": ([0, 1], [0.2, 0.3])}
    assert errors_by_role([row("up", 0.1), row("down", 0.2)]) == {"up": ([0], [0.1]), "down": ([0], [0.2])}


def test_the_perplexity_is_that_of_consecutive_pieces(tmp_path):
    model, ids = saved(tmp_path / "base"), tokens(121, 3)
    with torch.no_grad():
        loss = [model(ids[i : i + 30][None], labels=None).logits[0] for i in range(0, 120, 30)]
        nats = torch.cat([torch.nn.functional.cross_entropy(x, ids[30 * i + 1 : 30 * i + 31], reduction="none")
                          for i, x in enumerate(loss)])  # fmt: skip
    assert compress_files.perplexity(model, ids, context=30) == pytest.approx(float(nats.mean().exp()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dense_export_is_read_by_plain_transformers(tmp_path, dtype):
    saved(tmp_path / "base", dtype=dtype)
    compress_checkpoint(tmp_path / "base", tmp_path / "out", calibration=tokens(), dense=True, **FAST)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    small = SparseDictionaryCompressor(0.3, max_iter=3)
    model = open_model(tmp_path / "base")
    small.fit(model, list(tokens().view(-1, 30).split(10))).compress(model)
    weight = read.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == dtype
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight_matrix())
    assert read.lm_head.weight is read.model.embed_tokens.weight


def test_gpt2_is_compressed_and_exported_in_its_own_layout(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    found = compress_checkpoint(tmp_path / "base", tmp_path / "out", calibration=tokens(), dense=True, **FAST)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read.transformer.h[0].attn.c_attn.weight.shape == (16, 48)
    assert {row.layer for row in found.layers} == {
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    off = read.transformer.h[0].mlp.c_fc.weight - model.transformer.h[0].mlp.c_fc.weight
    assert 0 < float(off.detach().norm() / model.transformer.h[0].mlp.c_fc.weight.detach().norm()) < 0.8


def test_layers_come_back_from_their_file_with_what_they_share(tmp_path):
    W = [torch.randn(12, 10, generator=torch_generator(i)) for i in range(2)]
    for method, sizes in (("ksvd", Sizes(8, 4)), ("svd-llm", Sizes(3, 0)), ("wanda", Sizes(12, 4))):
        unit = compress_unit(
            W, [torch.eye(12).double()] * 2, sizes, Settings(method=method, coef_dtype="int8"), W[0].dtype
        )
        modules = {name: layer.module for name, layer in zip("ab", unit.layers, strict=True)}
        share = method != "wanda"
        configs = {name: layer_config(m, owner="a" if name == "b" and share else None) for name, m in modules.items()}
        path = write_layers(tmp_path / f"{method}.safetensors", modules)
        back = read_layers(path, configs, torch.float32)
        for name, module in modules.items():
            assert torch.equal(back[name].weight_matrix(), module.weight_matrix())
        part = {"ksvd": "dictionary", "svd-llm": "left"}.get(method)
        if part:
            assert getattr(back["a"], part) is getattr(back["b"], part)


def test_windows_hold_as_many_grams_as_the_budget_and_all_units_in_order():
    sites = {"a": ["x"], "b": ["x"], "c": ["y"], "d": ["x", "z"], "e": ["z"]}
    widths = {"x": 10, "y": 20, "z": 5}
    for budget in (1, 800, 4000, 10**6):
        found = list(windows(list(sites), sites.__getitem__, widths, budget, sequential=False))
        assert [unit for part, _ in found for unit in part] == list(sites)
        for part, needed in found:
            assert {site for unit in part for site in sites[unit]} == set(needed)
            assert sum(8 * widths[s] ** 2 for s in needed) <= budget or len({tuple(sites[u]) for u in part}) == 1
    in_turn = list(windows(list(sites), sites.__getitem__, widths, 10**6, sequential=True))
    assert [part for part, _ in in_turn] == [["a", "b"], ["c"], ["d", "e"]]


def test_ids_are_compared_where_a_model_has_one_table_of_them():
    parts = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**parts, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**parts, "image_size": 8, "patch_size": 4})
    model = transformers.CLIPModel(config)
    ids = torch.tensor([[3, 20]])
    check_ids("calibration", ids, model)
    with pytest.raises(ValueError, match="calibration must hold ids from 0 to 19, got 3 to 20"):
        check_ids("calibration", ids, model.text_model)


def test_digests_tell_a_flipped_bit(tmp_path):
    path = write_tensor_file(tmp_path / "t.safetensors", {"a": torch.ones(4).bfloat16(), "b": torch.arange(3)})
    state = ShardedState(path)
    assert torch.equal(state["a"], torch.ones(4).bfloat16())
    assert torch.equal(state["b"], torch.arange(3))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    write_bytes(path, bytes(data))
    with pytest.raises(CorruptFile, match="changed bytes"):
        ShardedState(path)["a"]


def test_text_is_read_by_the_models_own_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    saved(tmp_path / "base")
    write_text(tmp_path / "text.txt", "one two\n\nthree two one\n" * 100)
    with pytest.raises(WrongContent, match="found no tokenizer"):
        token_ids(tmp_path / "base", tmp_path / "text.txt")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "one": 1, "two": 2, "three": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "base")
    write_json(tmp_path / "base" / "manifest.json", {"schema": 1, "files": {}})
    ids = token_ids(tmp_path / "base", tmp_path / "text.txt", limit=7)
    assert ids.tolist() == [1, 2, 3, 2, 1, 1, 2]
    write_text(tmp_path / "empty.txt", "\n")
    with pytest.raises(WrongContent, match="found no token; expected text to calibrate on"):
        token_ids(tmp_path / "base", tmp_path / "empty.txt")
    found = compress_checkpoint(tmp_path / "base", tmp_path / "out", calibration=tmp_path / "text.txt", **FAST)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(found.layers) == 7


def test_ratios_that_fit_no_layer_and_weights_that_are_not_finite_are_told(tmp_path):
    model = saved(tmp_path / "base")
    options = {"calibration": tokens(), **FAST}
    with pytest.raises(ValueError, match="ratio must name layers that are compressed, got 'zz', which fits none"):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", ratio={"zz": 0.3, "*": 0.3}, **options)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"; the model's own .*up_proj.weight is not finite"):
        compress_checkpoint(tmp_path / "broken", tmp_path / "out", ratio=0.3, **options)


def test_folders_that_hold_no_plain_model_are_errors(tmp_path, monkeypatch):
    options = {"calibration": tokens(), **FAST}
    with pytest.raises(UnreadableFile, match=r"found nothing; expected the folder of a checkpoint, or a model's name"):
        compress_checkpoint(tmp_path / "none", tmp_path / "out", **options)
    hub = pytest.importorskip("huggingface_hub")

    def offline(name, **_):
        raise OSError(f"no way to reach {name}")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UnreadableFile, match="found no way to reach someone/model"):
        compress_checkpoint("someone/model", tmp_path / "out", **options)
    saved(tmp_path / "base")
    (tmp_path / "other").mkdir()
    write_text(tmp_path / "other" / "notes.txt", "mine\n")
    with pytest.raises(
        UnreadableFile, match=r"a folder with notes.txt; expected a new folder, or one of this compression"
    ):
        compress_checkpoint(tmp_path / "base", tmp_path / "other", **options)
    config = read_json(tmp_path / "base" / "config.json")
    for change, kind, told in (
        (
            {"architectures": ["NoSuchModel"]},
            WrongContent,
            r"architectures \['NoSuchModel'\]; expected a class of transf",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, ValueError, "got one quantised by awq"),
    ):
        write_json(tmp_path / "base" / "config.json", {**config, **change})
        with pytest.raises(kind, match=told):
            compress_checkpoint(tmp_path / "base", tmp_path / "out", **options)
    write_json(tmp_path / "base" / "config.json", config)
    victim = list_folder(tmp_path / "base", "model-*.safetensors")[1]
    write_bytes(victim, victim.read_bytes()[:-5])
    with pytest.raises(CorruptFile):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "quip"}, "method must be one of .* got 'quip'"),
        ({"compare": ("gptq",)}, "method must be one of .* got 'gptq'"),
        ({"memory_bytes": 0}, "memory_bytes and shard_bytes must be at least 1, got 0 and None"),
        ({"ratio": 1.2}, r"ratio must be in \(0, 1\), got 1.2"),
        ({"coef_dtype": "fp4"}, "coef_dtype must be one of"),
        ({"evaluation": tokens(1)}, r"evaluation must be token ids \(n,\) with n >= 2, got \(1,\) of torch.int64"),
        ({"evaluation": tokens(60).view(2, 30)}, r"evaluation must be token ids \(n,\) .* got \(2, 30\)"),
        ({"evaluation": torch.tensor([3, 60])}, "evaluation must hold ids from 0 to 59, got 3 to 60"),
        ({"calibration": [torch.tensor([[3, -1]])]}, "calibration must hold ids from 0 to 59, got -1 to 3"),
        ({"calibration": [{"input_ids": torch.tensor([[3, 61]])}]}, "calibration must hold ids from 0 to 59, got 3"),
    ],
)
def test_options_that_do_not_fit_are_named_before_anything_is_written(tmp_path, options, told):
    saved(tmp_path / "base")
    with pytest.raises(ValueError, match=told):
        compress_checkpoint(tmp_path / "base", tmp_path / "out", **{"calibration": tokens(), **FAST, **options})
    assert not (tmp_path / "out" / JOURNAL).exists()


# Measured by the kernel: anonymous memory, since mapped pages of the checkpoint are given back when they are needed.
PROBE = """
import re, threading, time
from pathlib import Path
import torch
import transformers
from polyspan.checkpoints.compress_files import compress_checkpoint
from polyspan.run import measure_peak, torch_generator
transformers.logging.disable_progress_bar()
folder = Path({folder!r})
ids = torch.randint(0, 60, (240,), generator=torch_generator(1))
def work(name, out):
    return lambda: compress_checkpoint(
        folder / name, folder / out, calibration=ids, method="orthogonal", max_iter=1, context=40, batch_size=2,
        memory_bytes=2**21, shard_bytes=2**21, targets=['up_proj'])
work("warm", "out-warm")()
print(measure_peak(work("base", "out")).peak_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory")
@pytest.mark.slow
def test_a_sharded_checkpoint_larger_than_the_budget_is_compressed_within_it(tmp_path):
    sizes = {"hidden": 192, "shards": "2MB"}
    saved(tmp_path / "warm", layers=1, **sizes)
    saved(tmp_path / "base", layers=20, **sizes)
    total = sum(path.stat().st_size for path in list_folder(tmp_path / "base", "*.safetensors"))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1"}
    code = PROBE.format(folder=str(tmp_path))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    peak = int(ran.stdout.split()[-1])
    assert total > 25 * 2**20
    # The budget, the working arrays of one layer in float64, and what the model is besides its weights.
    assert peak < total / 2
    assert len(list_folder(tmp_path / "out", "polyspan-*.safetensors")) > 5
