import copy
import importlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from polyspan.cli.adapt import extract, merge, ranks
from polyspan.errors import UnreadableFile, WrongContent
from polyspan.run import torch_generator


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
    assert told.out.splitlines()[1] == "conv\t6 x 4 x 3 x 3\t1 x 1 x 1 x 1\t17\t0.000"
    assert "1 tensors differ and are in no adapter: conv.bias" in told.err
    merge(base, files / "a", out=files / "m.safetensors")
    sizes = [f"{n}\t222\t{(files / f'{n}.safetensors').stat().st_size:,}" for n in ("base", "tuned")]
    made = f"adapter\t17\t{(files / 'a' / 'adapter_model.safetensors').stat().st_size:,}"
    assert told.out.splitlines()[2:] == ["checkpoint\tparameters\tbytes", *sizes, made]
    merged = f"merged\t222\t{(files / 'm.safetensors').stat().st_size:,}"
    lines = ["conv.weight", "checkpoint\tparameters\tbytes", sizes[0], made, merged]
    assert capsys.readouterr().out.splitlines() == lines
    ranks(base, tuned, error=[0.5, 0.01], plot=files / "r.svg")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "conv\t6 x 4 x 3 x 3\t0.01\t1 x 1 x 1 x 1\t17\t7.9%"
    assert (files / "r.svg").read_text().count("<svg") == 1
    ranks(base, tuned, json=True)
    assert [c["error"] for c in json.loads(capsys.readouterr().out)[0]["ranks"]] == [0.5, 0.2, 0.1]
    assert list((files / "home" / "journals").iterdir()) == []


def test_two_workers_extract_measure_and_merge_what_one_does(files, capsys):
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
    for workers in (1, 2):
        merge(base, files / "a1", out=files / f"m{workers}.safetensors", workers=workers)
        merge(base, files / "a1", out=files / f"m{workers}", workers=workers)
    assert (files / "m1.safetensors").read_bytes() == (files / "m2.safetensors").read_bytes()
    one, two = ({p.name: p.read_bytes() for p in (files / f"m{workers}").iterdir()} for workers in (1, 2))
    assert len(one) > 3
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


def test_lora_of_as_many_parameters_stands_beside_each_layer(files, capsys):
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    rng = np.random.default_rng(1)
    more = {"wide.weight": rng.normal(size=(9, 12)), "thin.weight": rng.normal(size=(2, 2, 2))}
    for name, k in ((base, 0), (tuned, 1)):
        added = {n: (x + k * rng.normal(size=x.shape)).astype(np.float32) for n, x in more.items()}
        save_file(load_file(name) | added, name)
    extract(base, tuned, out=files / "a", rank=4, compare=True, plot=files / "e.svg", json=True)
    told = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    before, after = load_file(base), load_file(tuned)
    # Parameters of the adapter over rows plus columns of the matrix, but no more than it has ranks.
    sizes = {
        "conv": ((4 * 6 + 4 * 4 + 9 + 9 + 4 * 4 * 9) // 42, 42),
        "wide": ((4 * 21 + 16) // 21, 21),
        "thin": (2, 6),
    }
    assert told.keys() == sizes.keys()
    for name, (rank, per_rank) in sizes.items():
        update = after[f"{name}.weight"].astype(np.float64) - before[f"{name}.weight"]
        U, s, Vh = np.linalg.svd(update.reshape(len(update), -1), full_matrices=False)
        lost = np.linalg.norm(update.reshape(len(update), -1) - (U[:, :rank] * s[:rank]) @ Vh[:rank]) ** 2
        row = told[name]
        assert (row["lora_rank"], row["lora_parameters"]) == (rank, rank * per_rank)
        assert row["lora_error"] == pytest.approx(lost / np.linalg.norm(update) ** 2, abs=1e-9)
    assert "Share of the update left out" in (files / "e.svg").read_text()
    assert "LoRA" in (files / "e.svg").read_text()
    extract(base, tuned, out=files / "b", rank=4, compare=True)
    head, conv, *_ = capsys.readouterr().out.splitlines()
    assert head.split("\t")[5:] == ["LoRA's rank", "parameters", "left out"]
    assert conv.split("\t")[5:] == ["4", "168", "0.000"]
    extract(base, tuned, out=files / "one", rank=1, spatial_rank=1, compare=True, json=True)
    told = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    assert (told["conv"]["parameters"], told["conv"]["lora_rank"], told["conv"]["lora_parameters"]) == (20 - 3, 1, 42)


@pytest.fixture
def language_models(tmp_path, monkeypatch):
    """A language model that is no good, and the same with some layers changed by a low rank and some noise."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    monkeypatch.setenv("POLYSPAN_HOME", str(tmp_path / "home"))
    transformers.logging.disable_progress_bar()
    text = "the cat and the dog ran to the hill . " * 30
    words = sorted(set(text.split()))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=".")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(words), max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        base = transformers.LlamaForCausalLM(config)
    tuned, generator = copy.deepcopy(base), torch_generator(1)
    with torch.no_grad():
        for layer in tuned.model.layers:
            for part in (layer.mlp.up_proj, layer.self_attn.v_proj):
                a, b = (torch.randn(n, 2, generator=generator) for n in part.weight.shape)
                part.weight += 0.3 * a @ b.T + 0.05 * torch.randn(part.weight.shape, generator=generator)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(text)
    return tmp_path, base, tuned, torch.tensor(tokenizer(text)["input_ids"])


def literal(model, ids, length):
    """Perplexity of whole pieces of a text, one at a time."""
    total = count = 0
    for start in range(0, len(ids) - length, length):
        piece = ids[start : start + length + 1]
        with torch.no_grad():
            logits = model.eval()(piece[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
        count += length
    return math.exp(total / count)


def test_perplexities_are_those_of_a_loop_over_the_text(language_models, capsys):
    folder, base, tuned, ids = language_models
    extract(
        folder / "base", folder / "tuned", out=folder / "a", rank=1, compare=True, eval=folder / "text.txt",
        context=20, plot=folder / "e.svg", json=True,
    )  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    low, core = copy.deepcopy(base), copy.deepcopy(base)
    parts = {name: torch.from_numpy(x) for name, x in load_file(folder / "a" / "adapter_model.safetensors").items()}
    with torch.no_grad():
        for name, part in core.named_parameters():
            a, g, b = (
                parts.get(f"base_model.model.{name.removesuffix('.weight')}.tucker_adapter_{n}")
                for n in ("axis0", "core", "axis1")
            )
            if g is not None:
                part += 4.0 * a @ g @ b.T
        for name, part in low.named_parameters():
            update = tuned.state_dict()[name] - part
            if update.abs().max() > 0:
                U, s, Vh = torch.linalg.svd(update.double())
                part += (s[0] * U[:, :1] @ Vh[:1]).float()
    expected = {
        "base": literal(base, ids, 20),
        "tuned": literal(tuned, ids, 20),
        "base with adapter": literal(core, ids, 20),
        "base with LoRA": literal(low, ids, 20),
    }
    assert told["perplexity"] == pytest.approx(expected, rel=1e-5)
    values = list(expected.values())
    assert min(abs(a - b) for i, a in enumerate(values[:3]) for b in values[:i]) > 1e-3, "arms cannot be told apart"
    size = (folder / "base" / "model.safetensors").stat().st_size
    assert told["sizes"]["base"] == {"parameters": sum(p.numel() for p in base.parameters()), "bytes": size}
    assert "Held-out text" in (folder / "e.svg").read_text()
    assert sorted(p.name for p in folder.iterdir() if "extracting" in p.name) == []
    # A file of weights alone is measured beside the base's configuration.
    extract(
        folder / "base", folder / "tuned" / "model.safetensors", out=folder / "b", rank=1, eval=folder / "text.txt",
        context=20, json=True,
    )  # fmt: skip
    again = json.loads(capsys.readouterr().out)["perplexity"]
    assert again == pytest.approx({name: expected[name] for name in list(expected)[:3]}, rel=1e-5)


def test_an_interrupt_while_measuring_loses_neither_layers_nor_perplexities(language_models, capsys, monkeypatch):
    folder, *_ = language_models
    module, files = (importlib.import_module(f"polyspan.checkpoints.{n}") for n in ("_tucker_scores", "tucker_files"))
    options = {"rank": 1, "eval": folder / "text.txt", "context": 20, "json": True}
    extract(folder / "base", folder / "tuned", out=folder / "whole", **options)
    expected = json.loads(capsys.readouterr().out)["perplexity"]
    measured, decomposed, real, layer = [], [], module.open_model, files._extract_layer

    def dying(path, **given):
        measured.append(path.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(path, **given)

    def counted(*given):
        decomposed.append(given[-1][1].name)
        return layer(*given)

    monkeypatch.setattr(module, "open_model", dying)
    monkeypatch.setattr(files, "_extract_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        extract(folder / "base", folder / "tuned", out=folder / "a", **options)
    assert not (folder / "a").exists()
    before = len(decomposed)
    extract(folder / "base", folder / "tuned", out=folder / "a", **options)
    assert json.loads(capsys.readouterr().out)["perplexity"] == expected
    assert measured == ["base", "tuned", "tuned", "measured"]
    assert len(decomposed) == before > 3
    one, two = (
        {p.name: p.read_bytes() for p in (folder / n).iterdir() if p.suffix == ".safetensors"} for n in ("whole", "a")
    )
    assert one == two


def test_what_cannot_be_measured_is_said_before_layers_are_decomposed(files):
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    with pytest.raises(ValueError, match="--context, --max-tokens and --device must go with --eval, got no text"):
        extract(base, tuned, out=files / "a", context=5)
    with pytest.raises(ValueError, match=r"--plot must end in \.svg, \.png or \.pdf, got 'e.gif'"):
        extract(base, tuned, out=files / "a", plot=files / "e.gif")
    (files / "text.txt").write_text("a b")
    with pytest.raises(UnreadableFile, match=r"found a file; expected the folder of a checkpoint"):
        extract(base, tuned, out=files / "a", eval=files / "text.txt")
    folder = files / "folder"
    folder.mkdir()
    save_file(load_file(base), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["ResNetModel"]}')
    with pytest.raises(WrongContent, match=r"found a ResNetModel; expected a model that predicts text"):
        extract(folder, tuned, out=files / "a", eval=files / "text.txt")
    (folder / "text.txt").write_text("a b")
    for text in (folder / "text.txt", folder / "none" / "text.txt"):
        with pytest.raises(ValueError, match="out must be another place than evaluation, which it is made of"):
            extract(base, tuned, out=folder, replace=True, eval=text)
    assert not [p for p in files.iterdir() if "extracting" in p.name or p.name == "a"]


def test_a_merge_of_one_file_goes_on_after_an_interrupt(files, monkeypatch):
    module = importlib.import_module("polyspan.checkpoints._tucker_merging")
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    for name, state in ((base, load_file(base)), (tuned, load_file(tuned))):
        save_file(state | {f"next{i}.weight": (i + 2) * state["conv.weight"] for i in range(3)}, name)
    extract(base, tuned, out=files / "a", rank=2)
    merge(base, files / "a", out=files / "whole.safetensors")
    assert not [p for p in files.iterdir() if "merging" in p.name]
    made, real = [], module.Adapted.made

    def dying(self, key):
        made.append(key)
        if len(made) == 4:
            raise KeyboardInterrupt
        return real(self, key)

    monkeypatch.setattr(module.Adapted, "made", dying)
    with pytest.raises(KeyboardInterrupt):
        merge(base, files / "a", out=files / "m.safetensors")
    assert not (files / "m.safetensors").exists()
    merge(base, files / "a", out=files / "m.safetensors")
    assert (files / "m.safetensors").read_bytes() == (files / "whole.safetensors").read_bytes()
    assert sorted(made) == sorted([*load_file(base), made[3]])
    assert not [p for p in files.iterdir() if "merging" in p.name]
    # What another merge has left behind stands in no one's way.
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        merge(base, files / "a", out=files / "m.safetensors")
    extract(base, tuned, out=files / "b", rank=1)
    merge(base, files / "b", out=files / "m.safetensors")
    assert (files / "m.safetensors").read_bytes() != (files / "whole.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"--shard-bytes must go with a folder as --out, got the file 'm\.safetensors'"
    ):
        merge(base, files / "a", out=files / "m.safetensors", shard_bytes=5)
    with pytest.raises(UnreadableFile, match="found no folder"):
        merge(base, files / "a", out=files / "none" / "m.safetensors")
