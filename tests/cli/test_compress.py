import json
import signal
import subprocess
import sys
import time

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from polyspan.cli import run  # noqa: E402
from polyspan.cli.compress import compress  # noqa: E402
from polyspan.errors import FileError, UnreadableFile  # noqa: E402
from polyspan.integrations import load_compressed  # noqa: E402
from polyspan.io import list_folder, read_lines, write_text  # noqa: E402

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run"]


@pytest.fixture
def base(tmp_path):
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=12, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    vocabulary = {word: i for i, word in enumerate(["?", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "base")
    lines = (" ".join(WORDS[(i * i + j * 3) % 10] for j in range(12)) for i in range(80))
    write_text(tmp_path / "text.txt", "\n".join(lines) + "\n")
    return tmp_path


def test_a_checkpoint_and_a_text_become_a_smaller_checkpoint_and_a_report(base, capsys):
    compress(
        str(base / "base"), out=base / "out", calib=base / "text.txt", ratio=0.4, compare=True, max_iter=2,
        plot=base / "plot.svg", json=True,
    )  # fmt: skip
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert [row["method"] for row in told["methods"]] == [
        "dense", "ksvd", "svd", "svd-llm", "asvd", "basis-sharing", "wanda", "magnitude",
    ]  # fmt: skip
    assert all(row["bytes_after"] < 0.65 * row["bytes_before"] for row in told["layers"])
    assert told["bytes_after"] == (base / "out" / "polyspan.safetensors").stat().st_size
    assert "the last 96 tokens" in said.err
    assert (base / "plot.svg").stat().st_size > 1000
    assert (base / "out" / "tokenizer.json").is_file()
    assert load_compressed(base / "out")(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 12)


def test_a_table_for_people_ratios_by_name_and_a_dense_export(base, capsys):
    compress(
        str(base / "base"), out=base / "out", calib=base / "text.txt", method="threshold", layer_ratio=["q_proj=0.6"],
        dense=True, eval=base / "text.txt",
    )  # fmt: skip
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    layers = {row[0].rsplit(".", 1)[-1]: row for row in rows if len(row) == 7}
    assert int(layers["q_proj"][2]) < int(layers["k_proj"][2])
    assert [row[0] for row in rows if len(row) == 5] == ["method", "dense", "threshold"]
    assert "model.safetensors" in {path.name for path in list_folder(base / "out")}
    transformers.AutoModelForCausalLM.from_pretrained(base / "out")


def test_the_method_experts_is_handed_what_concerns_it(base, monkeypatch):
    seen = {}
    monkeypatch.setattr("polyspan.cli._compress_experts.compress_experts", lambda *a, **kw: seen.update(kw, places=a))
    compress(str(base / "base"), out=base / "out", calib=base / "text.txt", method="experts", ratio=0.25, context=64)
    assert seen["places"] == (str(base / "base"), base / "out")
    assert (seen["keep_ratio"], seen["samples"], seen["length"], seen["preset"]) == (0.75, 4096, 64, "recommended")
    compress(str(base / "base"), out=base / "out", calib=base / "text.txt", method="experts", max_tokens=320)
    assert (seen["samples"], seen["length"]) == (10, 32)
    for wrong in (
        {"dense": True}, {"layer_ratio": ["q=0.1"]}, {"rho": 3.0}, {"groups": 2}, {"index_cost": "none"},
        {"max_iter": 5}, {"memory_bytes": 2**20}, {"device_map": "auto"}, {"skip_bad_batches": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must go with methods for single layers, got --method experts"):
            compress(str(base / "base"), out=base / "out", calib=base / "text.txt", method="experts", **wrong)
    with pytest.raises(ValueError, match="--experts must go with --method experts, got --method svd"):
        compress(str(base / "base"), out=base / "out", calib=base / "text.txt", method="svd", experts=2)


def test_what_cannot_be_done_is_told_before_anything_is_written(base):
    given = {"out": base / "out", "calib": base / "text.txt"}
    with pytest.raises(ValueError, match=r"method must be one of .* got 'zip'"):
        compress(str(base / "base"), method="zip", **given)
    with pytest.raises(ValueError, match="--layer-ratio must be NAME=RATIO, got 'q_proj'"):
        compress(str(base / "base"), layer_ratio=["q_proj"], **given)
    with pytest.raises(ValueError, match=r"--plot must end in .svg, .png or .pdf"):
        compress(str(base / "base"), plot=base / "plot.gif", **given)
    with pytest.raises(UnreadableFile, match="found nothing"):
        compress(str(base / "none"), **given)
    write_text(base / "short.txt", "the cat\n")
    with pytest.raises(ValueError, match="--calib must have 20 tokens at least to hold some out, got 2"):
        compress(str(base / "base"), out=base / "out", calib=base / "short.txt")
    assert not (base / "out").exists()


@pytest.mark.slow
def test_after_kill_9_the_same_command_ends_in_the_same_bytes_and_nothing_of_it_loads_before(base, monkeypatch, capsys):
    words = ["compress", "base", "--calib", "text.txt", "--ratio", "0.4", "--compare", "--max-iter", "8", "--out"]
    monkeypatch.chdir(base)
    # One number of threads, as bits depend on it.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    out, journal = base / "out", base / "out" / "compress.journal.jsonl"
    started = subprocess.Popen(
        [sys.executable, "-m", "polyspan.cli", *words, "out"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not (journal.is_file() and len(read_lines(journal)[0]) > 9):
        assert time.monotonic() < end, "no journal"
        assert started.poll() is None, "ended before it was killed"
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    done = len(read_lines(journal)[0]) - 1
    assert 9 <= done < 7 * 7
    seen = {path.name for path in list_folder(out)}
    assert all(name.startswith((".", "work-", journal.name)) for name in seen), seen
    with pytest.raises(FileError):
        load_compressed(out)
    assert run([*words, "out"]) == 0
    assert f"{done} units of layers were there from an interrupted run" in capsys.readouterr().err
    assert run([*words, "whole"]) == 0
    one, two = ({path.name: path.read_bytes() for path in list_folder(base / name)} for name in ("out", "whole"))
    assert one == two


def test_a_share_of_experts_that_is_none_is_named_as_it_was_given(base):
    with pytest.raises(ValueError, match=r"--ratio must be in \(0, 1\), got 0.0"):
        compress(str(base / "base"), out=base / "out", calib=base / "text.txt", method="experts", ratio=0.0)


@pytest.mark.parametrize("wrong", [{"export": "hf"}, {"preset": "published"}])
def test_what_only_experts_know_is_not_passed_over(base, wrong):
    told = f"--{next(iter(wrong))} must go with --method experts, got --method svd"
    with pytest.raises(ValueError, match=told):
        compress(str(base / "base"), out=base / "out", calib=base / "text.txt", method="svd", **wrong)


def test_a_text_of_one_token_is_refused_before_anything_is_compressed(base):
    write_text(base / "one.txt", "cat\n")
    with pytest.raises(FileError, match=r"one.txt: found one token; expected two at least"):
        compress(str(base / "base"), out=base / "out", calib=base / "text.txt", eval=base / "one.txt")
    assert not (base / "out").exists()
