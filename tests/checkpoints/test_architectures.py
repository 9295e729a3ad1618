"""Models of transformers other than Llama and Mixtral, from random tiny configurations."""

import math
import warnings

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from polyspan.checkpoints import (  # noqa: E402
    MergeRecipe,
    compress_checkpoint,
    merge_checkpoints,
    merge_expert_checkpoint,
    plot_compression,
)
from polyspan.checkpoints._text_models import longest_context  # noqa: E402
from polyspan.checkpoints.merge_scores import plan_scoring  # noqa: E402
from polyspan.errors import WrongContent  # noqa: E402
from polyspan.integrations import export_dense, load_compressed, load_merged_experts  # noqa: E402
from polyspan.io import ShardedState, write_json, write_members  # noqa: E402

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 32,
}  # fmt: skip
ENDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "decoder_start_token_id": 3, "forced_eos_token_id": 3,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "vocab_size": 60}
KINDS = {
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES),
    "MixtralForCausalLM": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**SIZES, **ROUTED, "num_experts": 4, "head_dim": 8}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "PhimoeForCausalLM": ("PhimoeConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Ernie4_5_MoeForCausalLM": (
        "Ernie4_5_MoeConfig",
        {**SIZES, **ENDS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_layer_start_index": 0},
    ),
    "DeepseekV2ForCausalLM": (
        "DeepseekV2Config",
        {**SIZES, **ROUTED, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {**SIZES, **ROUTED, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**SIZES, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 32, "pad_token_id": 1},
    ),
    "SwitchTransformersForConditionalGeneration": ("SwitchTransformersConfig", {**T5, "num_experts": 4}),
    "FalconForCausalLM": ("FalconConfig", {**SIZES, **ENDS}),
    "MptForCausalLM": ("MptConfig", {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 16, "vocab_size": 60}),
    "BartForConditionalGeneration": ("BartConfig", {**BART, **ENDS}),
    "T5ForConditionalGeneration": ("T5Config", {**T5, "decoder_start_token_id": 1}),
    "T5EncoderModel": ("T5Config", T5),
    "BertForMaskedLM": ("BertConfig", SIZES),
    "BertForSequenceClassification": ("BertConfig", {**SIZES, "num_labels": 3}),
    "ViTForImageClassification": ("ViTConfig", {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def saved(folder, kind, **changes):
    config, options = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**{**options, **changes})).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5 if p.ndim > 1 else p + 0.1 * torch.randn(p.shape))
    model.save_pretrained(folder)
    return model


def tokens(n, seed=1):
    return torch.randint(4, 60, (n,), generator=torch.Generator().manual_seed(seed))


def compress(source, out, calibration=None, **options):
    given = {"ratio": 0.3, "method": "threshold", "context": 16, **options}
    given["calibration"] = tokens(600) if calibration is None else calibration
    return compress_checkpoint(source, out, **given)


def shapes(folder):
    state = ShardedState(folder)
    return {name: state.shape(name) for name in state}


@pytest.mark.filterwarnings("ignore:experts in 1 layers")
@pytest.mark.parametrize(
    "kind", ["GPTNeoXForCausalLM", "MixtralForCausalLM", "GraniteMoeForCausalLM", "Ernie4_5_MoeForCausalLM"]
)
def test_a_dense_export_has_the_names_and_layouts_of_the_checkpoint_that_it_came_from(tmp_path, kind):
    saved(tmp_path / "model", kind, num_hidden_layers=1)
    compress(tmp_path / "model", tmp_path / "out", dense=True)
    assert shapes(tmp_path / "out") == shapes(tmp_path / "model")
    before, after = ShardedState(tmp_path / "model"), ShardedState(tmp_path / "out")
    experts = [name for name in before if ".experts." in name or "output_linear" in name]
    assert all(torch.equal(before[name], after[name]) for name in experts)
    compress(tmp_path / "model", tmp_path / "small")
    export_dense(tmp_path / "small", tmp_path / "again")
    assert shapes(tmp_path / "again") == shapes(tmp_path / "model")
    ids = tokens(9)[None]
    with torch.no_grad():
        dense = getattr(transformers, kind).from_pretrained(tmp_path / "again")(ids).logits
        torch.testing.assert_close(dense, load_compressed(tmp_path / "small")(ids).logits, atol=1e-4, rtol=1e-4)


def merge(source, out, **options):
    ids = torch.stack([tokens(16, seed) for seed in range(24)])
    given = {"preset": "published", "shard_bytes": 2**20, **options}
    with warnings.catch_warnings():
        # A router drawn at random leaves experts without tokens.
        warnings.filterwarnings("ignore", "no calibration token chose", UserWarning)
        return merge_expert_checkpoint(source, out, calibration=ids, experts=3, **given)


@pytest.mark.parametrize("kind", ["GraniteMoeForCausalLM", "PhimoeForCausalLM", "Ernie4_5_MoeForCausalLM"])
def test_experts_whose_files_have_other_names_are_merged_in_all_three_forms(tmp_path, kind):
    saved(tmp_path / "model", kind, num_hidden_layers=1)
    ids = tokens(12)[None]
    found = {form: merge(tmp_path / "model", tmp_path / form, export=form) for form in ("merged", "hf", "hf-repeated")}
    before, merged = shapes(tmp_path / "model"), shapes(tmp_path / "merged")
    assert not [name for name in before if name in merged and before[name][:1] == (4,) and len(before[name]) == 3]
    assert not [name for name in merged if ".experts.3." in name]
    assert shapes(tmp_path / "hf-repeated") == before
    plain = {form: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / form) for form in ("hf", "hf-repeated")}
    with torch.no_grad():
        exact = load_merged_experts(tmp_path / "merged")(ids).logits
        torch.testing.assert_close(plain["hf-repeated"](ids).logits, exact, atol=1e-5, rtol=1e-5)
        off = plain["hf"](ids).logits - exact
    assert float(off.abs().max()) > 1e-3
    held = torch.stack([tokens(16, seed) for seed in (7, 15, 23)])
    with torch.no_grad():
        logits = plain["hf"](held).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, held[:, 1:].flatten())
    assert math.exp(float(loss)) == pytest.approx(found["hf"].perplexity["hf"], rel=1e-4)
    assert found["hf"].parameters_after < found["hf-repeated"].parameters_after


@pytest.mark.parametrize(
    ("kind", "export", "error", "told"),
    [
        ("DeepseekV3ForCausalLM", "hf", ValueError, "model must not route by groups to change router rows, got 2"),
        ("Llama4ForCausalLM", "merged", ValueError, "must hand its experts tokens, indices and weights, got others"),
        (
            "SwitchTransformersForConditionalGeneration", "merged", WrongContent,
            "found a model of type switch_transformers; expected a causal language model",
        ),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_merged_are_refused_before_anything_is_written(tmp_path, kind, export, error, told):
    saved(tmp_path / "model", kind)
    with pytest.raises(error, match=told):
        merge(tmp_path / "model", tmp_path / "out", export=export)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_an_encoder_decoder_reads_the_first_half_of_a_text_and_predicts_the_second(tmp_path, kind):
    model = saved(tmp_path / "model", kind)
    text = tokens(100, seed=2)
    found = compress(tmp_path / "model", tmp_path / "out", evaluation=text, targets=["q_proj", "fc2", "q", "wo"])
    assert not [row.note for row in found.layers if row.note]
    assert {row.layer.split(".")[0] for row in found.layers} | {row.layer.split(".")[1] for row in found.layers} >= {
        "encoder", "decoder",
    }  # fmt: skip
    loss, number = 0.0, 0
    with torch.no_grad():
        for piece in text[:85].view(5, 17):
            begun = torch.cat([torch.tensor([model.config.decoder_start_token_id]), piece[8:-1]])
            logits = model(input_ids=piece[None, :8], decoder_input_ids=begun[None]).logits[0]
            loss += float(torch.nn.functional.cross_entropy(logits, piece[8:], reduction="sum"))
            number += 9
    assert found.methods[0].perplexity == pytest.approx(math.exp(loss / number), rel=1e-5)
    export_dense(tmp_path / "out", tmp_path / "dense")
    dense, small = type(model).from_pretrained(tmp_path / "dense"), load_compressed(tmp_path / "out")
    ids = {"input_ids": text[None, :9], "decoder_input_ids": text[None, 9:15]}
    with torch.no_grad():
        torch.testing.assert_close(small(**ids).logits, dense(**ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "T5EncoderModel"])
def test_models_that_predict_no_text_are_compressed_without_a_perplexity(tmp_path, kind):
    saved(tmp_path / "model", kind)
    with pytest.raises(ValueError, match=f"evaluation must go with a model that predicts text, got a {kind}"):
        compress(tmp_path / "model", tmp_path / "out", evaluation=tokens(60))
    found = compress(tmp_path / "model", tmp_path / "out", targets=["query", "wo"])
    assert found.methods[0].perplexity is None
    assert all(0 < row.error < 0.9 for row in found.layers)
    recipe = MergeRecipe("average", tmp_path / "model", {"a": tmp_path / "model"}, {}, None, {}, {}, "", [])
    with pytest.raises(WrongContent, match=f"found a {kind}; expected a model that predicts text"):
        plan_scoring(recipe, {"text": tmp_path / "text.txt"})


def test_a_model_of_pictures_is_calibrated_on_a_file_of_its_arguments(tmp_path):
    model = saved(tmp_path / "model", "ViTForImageClassification")
    pictures = np.random.default_rng(0).normal(size=(21, 3, 8, 8))
    write_members(tmp_path / "pictures.npz", {"pixel_values": pictures, "labels": np.arange(21)})
    found = compress(tmp_path / "model", tmp_path / "out", tmp_path / "pictures.npz", targets=["*.0.*"])
    x = torch.from_numpy(pictures).float()
    given = [{"pixel_values": x[i : i + 8]} for i in range(0, 21, 8)]
    same = compress(tmp_path / "model", tmp_path / "same", given, targets=["*.0.*"])
    assert [row.error for row in found.layers] == [row.error for row in same.layers]
    assert len(found.layers) == 6
    assert found.methods[0].perplexity is None
    small = load_compressed(tmp_path / "out")
    with torch.no_grad():
        assert 0 < float((small(x).logits - model(x).logits).norm()) < float(model(x).logits.norm())
    write_members(tmp_path / "uneven.npz", {"pixel_values": pictures, "more": np.zeros(20)})
    with pytest.raises(WrongContent, match=r"members of lengths \[20, 21\]; expected as many rows each"):
        compress(tmp_path / "model", tmp_path / "out2", tmp_path / "uneven.npz")


def test_the_longest_text_is_that_of_the_model_and_its_tokenizer(tmp_path):
    saved(tmp_path / "model", "MptForCausalLM")
    found = compress(tmp_path / "model", tmp_path / "out", context=None, evaluation=tokens(60))
    assert found.methods[0].perplexity > 1
    assert longest_context(tmp_path / "model") == 16
    write_json(tmp_path / "model" / "tokenizer_config.json", {"model_max_length": 9})
    assert longest_context(tmp_path / "model") == 9
    write_json(tmp_path / "config.json", {"text_config": {"n_positions": 7}})
    assert longest_context(tmp_path) == 7
    for context in (0, -3, 10):
        with pytest.raises(
            ValueError, match=f"context must be from 1 to 9, the most that the model takes, got {context}"
        ):
            compress(tmp_path / "model", tmp_path / "out2", context=context)


def test_falcons_own_kind_of_linear_layer_is_compressed_too(tmp_path):
    model = saved(tmp_path / "model", "FalconForCausalLM", num_hidden_layers=1)
    found = compress(tmp_path / "model", tmp_path / "out")
    names = [row.layer.rsplit(".", 1)[1] for row in found.layers]
    assert names == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    small = load_compressed(tmp_path / "out")
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = small.transformer.h[0].mlp.dense_h_to_4h(x) - layer(x)
        assert float(off.norm()) < 0.9 * float(layer(x).norm())


def test_code_that_looks_at_where_numbers_lie_reads_outputs_of_compressed_layers(tmp_path):
    saved(tmp_path / "model", "DeepseekV2ForCausalLM")
    with pytest.warns(UserWarning, match=r"experts in 1 layers, model.layers.1.mlp.experts first, stay as they are"):
        found = compress(tmp_path / "model", tmp_path / "out", targets=["q_proj"], evaluation=tokens(60))
    assert found.methods[1].perplexity > 1


def test_a_head_that_is_tied_to_an_embedding_is_refused(tmp_path):
    saved(tmp_path / "model", "BartForConditionalGeneration")
    told = "targets must name layers with weights of their own, got lm_head, tied to model.shared: the embedding would"
    with pytest.raises(ValueError, match=told):
        compress(tmp_path / "model", tmp_path / "out", targets=["lm_head"])


def test_a_perplexity_that_is_no_number_is_told_and_the_rest_is_written(tmp_path):
    model = saved(tmp_path / "model", "GPTNeoXForCausalLM")
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    ids = torch.cat([torch.tensor([3]), tokens(60)])
    with pytest.warns(UserWarning, match=r"perplexity of (dense|threshold) is nan on the evaluation text"):
        found = compress(tmp_path / "model", tmp_path / "out", evaluation=ids, targets=["dense"])
    assert [row.perplexity for row in found.methods] == [None, None]
    plot_compression(found, tmp_path / "plot.svg")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_finds_its_weights_under_the_names_of_the_bases_files(tmp_path):
    peft = pytest.importorskip("peft")
    start = saved(tmp_path / "model", "ViTForImageClassification")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], alpha_pattern={"vit.layers.1.attention.q_proj": 7},
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(start, config)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoints(tmp_path / "model", {"a": tmp_path / "adapter"}, tmp_path / "out", scaling=1)
    assert shapes(tmp_path / "out") == shapes(tmp_path / "model")
    found = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    expected = model.merge_and_unload().state_dict()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
