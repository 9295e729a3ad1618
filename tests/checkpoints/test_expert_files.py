import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyspan.checkpoints import ExpertMerger, merge_expert_checkpoint
from polyspan.checkpoints._expert_stream import StreamedModel
from polyspan.checkpoints.expert_merging import RIVALS
from polyspan.errors import CorruptFile, TooLarge, UnreadableFile, WrongContent
from polyspan.io import ShardedState, read_json, write_json, write_text

transformers = pytest.importorskip("transformers")
load_merged_experts = importlib.import_module("polyspan.integrations").load_merged_experts

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
WORDS = [f"w{i}" for i in range(59)]


def drawn(seed, *shape):
    return torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(seed))


CALIBRATION, EVALUATION = drawn(1, 10, 24), drawn(2, 4, 24)


def saved(folder, dtype=torch.float32, *, shard="1GB", tied=False, kind="Mixtral", **changes):
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes}, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape) * 0.2 if p.ndim > 1 else 1 + 0.1 * torch.randn(p.shape))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def source(tmp_path):
    saved(tmp_path / "model")
    return tmp_path / "model"


def merge(source, out, **options):
    given = {"calibration": CALIBRATION, "evaluation": EVALUATION, "experts": 3, **options}
    return merge_expert_checkpoint(source, out, **given)


def perplexity(model, ids=EVALUATION):
    with torch.no_grad():
        logits = model(ids).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).exp())


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_run_layer_by_layer_computes_what_the_whole_model_does(tmp_path, dtype, tied):
    saved(tmp_path, dtype, tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    stream = StreamedModel(tmp_path)
    x = stream.embed(EVALUATION)
    for number in range(2):
        with stream.loaded(number):
            x = stream.run_layer(number, EVALUATION, x)
    assert all(p.is_meta for p in stream.layers.parameters())
    predicted = EVALUATION.numel() - len(EVALUATION)
    assert np.exp(stream.loss(EVALUATION, x) / predicted) == pytest.approx(perplexity(model), rel=1e-5)


@pytest.mark.parametrize("preset", ["published", "recommended"])
def test_files_hold_what_the_model_in_memory_would_be_merged_into(tmp_path, preset):
    model = saved(tmp_path / "model")
    found = merge(tmp_path / "model", tmp_path / "out", preset=preset)
    merger = getattr(ExpertMerger, preset)(3).fit(model, CALIBRATION)
    merged = merger.merge(model)
    for mine, theirs in zip(found.report.layers, merger.report_.layers, strict=True):
        assert mine.groups == theirs.groups
        assert mine.frequencies == theirs.frequencies
        assert mine.error == pytest.approx(theirs.error, rel=1e-4)
        np.testing.assert_allclose(found.similarity[mine.name], merger.similarity_[mine.name], atol=1e-6)
    loaded = load_merged_experts(tmp_path / "out")
    for (name, a), (other, b) in zip(loaded.state_dict().items(), merged.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert found.perplexity == {
        "before": pytest.approx(perplexity(model), rel=1e-5), "after": pytest.approx(perplexity(loaded), rel=1e-5),
    }  # fmt: skip
    assert found.parameters == sum(p.numel() for p in model.parameters())
    groups = sum(layer.n_experts for layer in found.report.layers)
    assert found.parameters_after == sum(p.numel() for p in loaded.parameters()) + groups
    assert (found.tokens, found.resumed, found.comparison) == (CALIBRATION.numel(), 0, {})


@pytest.mark.parametrize("options", [{}, {"intra_ratio": 0.3}, {"allocation": "adaptive"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_experts_are_read_back_bit_for_bit(tmp_path, dtype, options):
    saved(tmp_path / "model", dtype)
    found = merge(tmp_path / "model", tmp_path / "out", shard_bytes=10**9, **options)
    assert [path.name for path in found.shards] == ["polyspan.safetensors"]
    state = ShardedState(found.shards[0])
    loaded = load_merged_experts(tmp_path / "out")
    held = loaded.state_dict()
    experts = [name for name in state if ".experts." in name]
    assert len(experts) == 2 * (7 if "intra_ratio" in options else 4)
    for name in experts:
        assert held[name].dtype == state.dtype(name)
        assert torch.equal(held[name], state[name])
    assert loaded.config.quantization_config.quant_method == "polyspan_merged_experts"
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(WrongContent, match=r"found none of polyspan.safetensors"):
        load_merged_experts(tmp_path / "again")
    os.rename(tmp_path / "again" / "model.safetensors", tmp_path / "again" / "polyspan.safetensors")
    again = load_merged_experts(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], part) for name, part in held.items())
    wide = load_merged_experts(tmp_path / "out", dtype=torch.float64)
    assert wide.model.layers[0].mlp.experts.groups.dtype == torch.int64


def test_a_reader_that_knows_nothing_of_merged_experts_finds_no_weights(source, tmp_path, monkeypatch):
    merge(source, tmp_path / "out")
    auto = importlib.import_module("transformers.quantizers.auto")
    for registry in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(registry, "polyspan_merged_experts")
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", ["Mixtral", "DeepseekV2"])
@pytest.mark.parametrize("options", [{}, {"intra_ratio": 0.3}])
def test_plain_exports_are_read_by_transformers_alone(tmp_path, kind, options):
    extra = {}
    if kind == "DeepseekV2":
        extra = {
            "n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        }  # fmt: skip
    saved(tmp_path / "model", kind=kind, **extra)
    repeated = merge(tmp_path / "model", tmp_path / "repeated", export="hf-repeated", **options)
    plain = merge(tmp_path / "model", tmp_path / "plain", export="hf", **options)
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "repeated")
    assert perplexity(exact) == pytest.approx(repeated.perplexity["after"], rel=1e-5)
    assert repeated.bytes_after == repeated.bytes
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert small.model.layers[1].mlp.experts.num_experts == 3
    assert perplexity(small) == pytest.approx(plain.perplexity["hf"], rel=1e-5)
    assert plain.perplexity["hf"] != pytest.approx(plain.perplexity["after"], rel=1e-6)
    assert plain.perplexity["after"] == repeated.perplexity["after"]
    assert plain.parameters_after == sum(p.numel() for p in small.parameters())
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").model.layers[1].mlp.gate.weight
    groups = torch.tensor(plain.report.layers[-1].groups)
    for g in range(3):
        expected = before[groups == g].mean(0)
        torch.testing.assert_close(small.model.layers[1].mlp.gate.weight[g], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pruning", ["frequency", "reap"])
def test_pruned_checkpoints_are_plain_and_exact(source, tmp_path, pruning):
    found = merge(source, tmp_path / "out", export="hf", preset="published", pruning=pruning)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert perplexity(small) == pytest.approx(found.perplexity["after"], rel=1e-5)
    assert set(found.perplexity) == {"before", "after"}
    assert all(layer.groups.count(-1) == 1 for layer in found.report.layers)
    assert read_json(tmp_path / "out" / "expert_merge_report.json")["report"][0]["error"] is None


def test_fused_layouts_of_files_keep_their_form(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    saved(tmp_path / "model", kind="GptOss", head_dim=8, rope_parameters=rope, bos_token_id=None, eos_token_id=None)
    with warnings.catch_warnings():
        # A router drawn at random leaves experts without tokens.
        warnings.simplefilter("ignore", UserWarning)
        found = merge(tmp_path / "model", tmp_path / "out", export="hf")
    state = ShardedState(tmp_path / "out")
    assert state.shape("model.layers.0.mlp.experts.gate_up_proj") == (3, 16, 48)
    assert state.shape("model.layers.0.mlp.router.bias") == (3,)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert perplexity(small) == pytest.approx(found.perplexity["hf"], rel=1e-5)


def test_the_comparison_holds_every_rival_at_the_same_number_of_experts(tmp_path):
    model = saved(tmp_path / "model")
    found = merge(tmp_path / "model", tmp_path / "out", compare=True)
    assert list(found.comparison) == list(RIVALS)
    assert found.left_out == {}
    for name in ("frequency pruning", "HC-SMoE", "published"):
        merged = ExpertMerger(3, **RIVALS[name]).fit(model, CALIBRATION).merge(model)
        assert found.comparison[name] == pytest.approx(perplexity(merged), rel=1e-4)
    assert found.comparison["recommended"] == pytest.approx(found.perplexity["after"], rel=1e-6)
    told = read_json(tmp_path / "out" / "expert_merge_report.json")
    assert told["comparison"] == found.comparison
    assert told["report"][0]["groups"] == found.report.layers[0].groups


def test_rivals_that_a_router_does_not_allow_are_left_out_with_the_reason(tmp_path):
    saved(
        tmp_path / "model", kind="DeepseekV3", n_routed_experts=8, num_local_experts=8, n_group=2, topk_group=1,
        moe_intermediate_size=24, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    found = merge(tmp_path / "model", tmp_path / "out", experts=5, compare=True, preset="published")
    assert set(found.left_out) == {"frequency pruning", "output-norm pruning", "REAP"}
    assert "must not route by groups" in found.left_out["REAP"]
    with pytest.raises(ValueError, match="must not route by groups"):
        merge(tmp_path / "model", tmp_path / "hf", experts=5, export="hf")


STAGES = {
    "capture": ("_expert_jobs", "Capture", 2, 1),
    "statistics": ("_expert_statistics", "token_blocks", 2, 3),
    "merging": ("_expert_jobs", "layer_report", 2, 5),
    "perplexity": ("expert_files", "perplexities", 1, 6),
    "scoring": ("_expert_jobs", "installed", 2, 7),
    "writing": ("_expert_export", "write_tensor_blocks", 4, 12),
    "reporting": ("expert_files", "report_json", 1, None),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_does_only_the_rest_and_ends_in_the_same_bytes(source, tmp_path, monkeypatch, stage):
    # A merge with a fit of its own reads blocks of tokens as well: the published one has no other reader.
    options = {"preset": "published"} if stage == "statistics" else {}
    whole = merge(source, tmp_path / "whole", **options)
    module, name, at, resumed = STAGES[stage]
    module = importlib.import_module(f"polyspan.checkpoints.{module}")
    real, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)
    with pytest.raises(KeyboardInterrupt):
        merge(source, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "expert_merge_report.json").exists()
    with pytest.raises(ValueError, match=r"belongs to other work .*keep_ratio"):
        merge(source, tmp_path / "out", **{**options, "keep_ratio": 0.75})
    again = merge(source, tmp_path / "out", **options)
    assert again.resumed == (4 + 2 + 2 + 1 + len(whole.shards) if resumed is None else resumed)
    assert content(again.path) == content(whole.path)


@pytest.mark.parametrize("file", ["inputs-0", "inputs-1", "statistics-1", "merged-0"])
def test_pieces_that_were_torn_meanwhile_are_made_again(source, tmp_path, monkeypatch, file):
    whole = merge(source, tmp_path / "whole")
    module = importlib.import_module("polyspan.checkpoints.expert_files")
    real = module.perplexities

    def dying(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "perplexities", dying)
    with pytest.raises(KeyboardInterrupt):
        merge(source, tmp_path / "out")
    torn = tmp_path / "out" / f"work-{file}.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    monkeypatch.setattr(module, "perplexities", real)
    again = merge(source, tmp_path / "out")
    for path in whole.shards:
        assert (again.path / path.name).read_bytes() == path.read_bytes()


def test_a_sharded_checkpoint_larger_than_the_budget_is_merged_shard_by_shard(tmp_path):
    saved(tmp_path / "model", shard="20KB", num_hidden_layers=5)
    size = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 5
    one = 4 * 3 * 16 * 24 * 12
    assert one < size / 2
    found = merge(tmp_path / "model", tmp_path / "out", max_bytes=one)
    assert found.bytes > 2 * one
    whole = merge(tmp_path / "model", tmp_path / "whole")
    assert content(found.path).keys() == content(whole.path).keys()
    loaded = load_merged_experts(found.path)
    assert perplexity(loaded) == pytest.approx(found.perplexity["after"], rel=1e-5)
    with pytest.raises(TooLarge, match=rf"at model.layers.0.mlp.experts: found experts that take {one:,} bytes"):
        merge(tmp_path / "model", tmp_path / "other", max_bytes=one - 1)


PROBE = """
import torch, transformers
from polyspan.checkpoints import merge_expert_checkpoint
from polyspan.run import measure_peak
transformers.utils.logging.disable_progress_bar()
ids = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(0))
for name in ("first", "2", "6"):
    def main():
        merge_expert_checkpoint({folder!r} + name, {folder!r} + "out" + name, calibration=ids, preset="published")
    print(measure_peak(main).peak_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory")
def test_memory_is_that_of_one_layer_whatever_their_number(tmp_path):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    # What is loaded at the first call of all is not the merge's.
    saved(tmp_path / "first")
    for layers in (2, 6):
        saved(tmp_path / str(layers), num_hidden_layers=layers, hidden_size=256, intermediate_size=1024)
    code = PROBE.format(folder=f"{tmp_path}/")
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    _, two, six = map(int, ran.stdout.split())
    layer, size = 4 * 3 * 256 * 1024 * 4, sum(p.stat().st_size for p in (tmp_path / "6").glob("*.safetensors"))
    assert six < 1.2 * two
    assert six < 3 * layer
    assert six < size / 2


@pytest.mark.slow
def test_layers_that_are_fanned_out_end_in_the_same_bytes(source, tmp_path):
    one = merge(source, tmp_path / "one")
    two = merge(source, tmp_path / "two", workers=2)
    for path in one.shards:
        assert (two.path / path.name).read_bytes() == path.read_bytes()


def test_a_text_calibrates_through_the_checkpoints_tokenizer_and_every_eighth_piece_is_held_out(source, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, **{w: i + 1 for i, w in enumerate(WORDS)}}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(source)
    ids = drawn(5, 20, 32)
    write_text(tmp_path / "text.txt", " ".join((["<unk>", *WORDS])[i] for i in ids.flatten().tolist()) + "\n")
    text = merge_expert_checkpoint(source, tmp_path / "text", calibration=tmp_path / "text.txt", experts=3)
    held = torch.arange(20) % 8 == 7
    given = merge(source, tmp_path / "ids", calibration=ids[~held], evaluation=ids[held])
    assert text.tokens == given.tokens == 18 * 32
    assert text.perplexity == given.perplexity
    for path in given.shards:
        assert (text.path / path.name).read_bytes() == path.read_bytes()
    assert (text.path / "tokenizer.json").is_file()
    short = merge_expert_checkpoint(
        source, tmp_path / "short", calibration=tmp_path / "text.txt", experts=3, length=16, samples=9,
        evaluation=tmp_path / "text.txt",
    )  # fmt: skip
    assert short.tokens == 9 * 16
    write_text(tmp_path / "little.txt", "w1 w2\n")
    with pytest.raises(ValueError, match="calibration must hold two pieces of 32 tokens or more, got 2 tokens"):
        merge(source, tmp_path / "x", calibration=tmp_path / "little.txt")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"preset": "best"}, "preset must be one of .* got 'best'"),
        ({"export": "gguf"}, "export must be one of .* got 'gguf'"),
        ({"experts": 4}, r"n_experts must be between 2 \(experts a token\) and 3, got 4"),
        ({"experts": None, "keep_ratio": 0.0}, "keep_ratio must be above 0 and below 1, got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
        ({"pruning": "reap", "preset": "published"}, "export must be 'hf' where experts are dropped, got 'merged'"),
        ({"allocation": "adaptive", "export": "hf"}, "export 'hf' must have as many experts in every layer"),
        ({"calibration": torch.zeros(3, 4)}, r"calibration must be ids \(b, t\) with t >= 2, got \(3, 4\) of torch.fl"),
        ({"evaluation": torch.zeros(3, 1, dtype=torch.long)}, r"evaluation must be ids \(b, t\) with t >= 2"),
        ({"calibration": CALIBRATION + 1}, r"calibration must hold ids from 0 to 59, got 1 to 60"),
        ({"calibration": CALIBRATION[:1], "evaluation": None}, "calibration must hold two pieces or more"),
        ({"engine": "spark"}, "engine must be one of .* got 'spark'"),
    ],
)
def test_options_outside_their_range_are_named(source, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        merge(source, tmp_path / "out", **options)


def test_checkpoints_that_cannot_be_merged_say_why(source, tmp_path, monkeypatch):
    config = read_json(source / "config.json")
    with pytest.raises(WrongContent, match="found no configuration of a model"):
        merge(tmp_path, tmp_path / "out")
    write_json(source / "config.json", {**config, "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(
        WrongContent, match="found a model quantised by fp8; expected plain weights; load the model unq"
    ):
        merge(source, tmp_path / "out")
    write_json(source / "config.json", {**config, "num_hidden_layers": 3})
    with pytest.raises(
        WrongContent, match=r"found no tensor for model.layers.2\..*; expected all weights of the model"
    ):
        merge(source, tmp_path / "out")
    write_json(source / "config.json", config)
    write_text(tmp_path / "text.txt", "w1\n")
    with pytest.raises(WrongContent, match="found no tokenizer"):
        merge(source, tmp_path / "other", calibration=tmp_path / "text.txt")
    (tmp_path / "mine").mkdir()
    write_text(tmp_path / "mine" / "notes.txt", "mine\n")
    with pytest.raises(UnreadableFile, match=r"a folder with notes.txt; expected a new folder, or one of this merge"):
        merge(source, tmp_path / "mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnreadableFile, match="found nothing; expected the folder of a checkpoint, or a model"):
        merge(tmp_path / "nowhere", tmp_path / "out2")
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if "experts" not in k}, tie_word_embeddings=False)
    )
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="got none in LlamaForCausalLM; looked for"):
        merge(tmp_path / "dense", tmp_path / "out3")


def test_weights_that_are_torn_or_not_finite_are_refused(tmp_path):
    model = saved(tmp_path / "model")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(WrongContent, match=r"tensor model.layers.1.*experts.2.w2.*found NaN or infinity"):
        merge(tmp_path / "nan", tmp_path / "out")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptFile):
        merge(tmp_path / "model", tmp_path / "out2")


def test_the_loader_takes_only_checkpoints_with_merged_experts(source, tmp_path):
    with pytest.raises(WrongContent, match="found quant_method None; expected a checkpoint with merged experts"):
        load_merged_experts(source)
    merge(source, tmp_path / "out", shard_bytes=10**9)
    file = tmp_path / "out" / "polyspan.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptFile):
        load_merged_experts(tmp_path / "out")
    file.unlink()
    with pytest.raises(WrongContent, match=r"found none of polyspan.safetensors, polyspan.safetensors.index.json"):
        load_merged_experts(tmp_path / "out")
    merged = merge(source, tmp_path / "again")
    with pytest.raises(WrongContent, match="found a model quantised by polyspan_merged_experts"):
        merge(merged.path, tmp_path / "twice")
    with pytest.raises(ValueError, match="must not be quantised, got polyspan_merged_experts"):
        ExpertMerger(2).fit(load_merged_experts(merged.path), CALIBRATION)
