import json
import warnings

import pytest
import torch

from polyspan.cli._compress_experts import compress_experts
from polyspan.io import write_text

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    config = transformers.MixtralConfig(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=24, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(config).save_pretrained(folder / "model")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, **{w: i + 1 for i, w in enumerate(WORDS)}}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder / "model")
    ids = torch.randint(0, 40, (720,), generator=torch.Generator().manual_seed(1)).tolist()
    write_text(folder / "text.txt", " ".join(WORDS[i] for i in ids) + "\n")
    return folder


def compress(files, out, **options):
    compress_experts(files / "model", out, calibration=files / "text.txt", experts=3, device="cpu", **options)


def test_the_report_as_json_holds_what_was_merged_and_what_it_cost(files, tmp_path, capsys):
    compress(files, tmp_path / "out", json=True)
    told = json.loads(capsys.readouterr().out)
    assert [layer["n_kept"] for layer in told["report"]] == [3, 3]
    assert told["parameters"] > told["parameters_after"]
    assert set(told["perplexity"]) == {"before", "after"}
    assert told["shards"][0].startswith("polyspan-00001")
    assert len(told["similarity"]["model.layers.0.mlp.experts"]) == 4
    kept = json.loads((tmp_path / "out" / "expert_merge_report.json").read_text())
    assert {**kept, "out": str(tmp_path / "out"), "resumed": 0} == told


def test_tables_name_every_layer_and_every_rival_and_talk_goes_to_stderr(files, tmp_path, capsys):
    compress(files, tmp_path / "out", export="hf", compare=True, plot=tmp_path / "merge.svg", preset="published")
    told = capsys.readouterr()
    header, *lines = [line.split("\t") for line in told.out.splitlines()]
    assert header[0] == "layer"
    assert [line[0] for line in lines[:2]] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert lines[0][1] == "4 to 3"
    assert sorted(map(int, lines[0][2].split()))[-1] == 2
    names = [line[0] for line in lines[2:]]
    assert names[:3] == ["as it was", "merged", "merged, with averaged router rows, as written"]
    assert {"frequency pruning", "HC-SMoE", "MC-SMoE", "keep", "random groups", "REAP"} < set(names)
    assert "parameters became" in told.err
    assert (tmp_path / "merge.svg").read_text().count("<svg") == 1
    again = tmp_path / "again.svg"
    compress(files, tmp_path / "out2", export="hf", compare=True, plot=again, preset="published")
    assert again.read_bytes() == (tmp_path / "merge.svg").read_bytes()


def test_dropped_experts_are_shown_as_such(files, tmp_path, capsys):
    compress(files, tmp_path / "out", export="hf", preset="published", pruning="frequency")
    line = capsys.readouterr().out.splitlines()[1].split("\t")
    assert line[2].split().count("-") == 1
    assert line[5] == "tokens are routed anew"


def test_a_plot_of_another_kind_or_of_nothing_is_an_error(files, tmp_path):
    from polyspan.checkpoints import ExpertMerger, plot_expert_merge

    with pytest.raises(ValueError, match=r"--plot must end in .svg, .png or .pdf, got .*x.gif"):
        compress(files, tmp_path / "out", plot=tmp_path / "x.gif")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="found must be fitted, got an ExpertMerger without groups"):
        plot_expert_merge(ExpertMerger(2), tmp_path / "x.png")
    model = transformers.MixtralForCausalLM.from_pretrained(files / "model")
    ids = torch.randint(0, 41, (8, 20), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        merger = ExpertMerger.published(3).fit(model, ids)
    assert plot_expert_merge(merger, tmp_path / "x.png").stat().st_size > 1000
