import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from polyspan.checkpoints import SparseDictionaryCompressor, SparseDictionaryLinear  # noqa: E402
from polyspan.checkpoints._compressed_layers import LowRankLinear  # noqa: E402
from polyspan.errors import CorruptFile, UnreadableFile, WrongContent  # noqa: E402
from polyspan.integrations import (  # noqa: E402
    CompressedModelConfig,
    export_dense,
    load_compressed,
    register_compressed_models,
    save_compressed,
)
from polyspan.integrations.compressed_model import compressed_layers  # noqa: E402
from polyspan.io import list_folder, read_json, write_bytes, write_json  # noqa: E402
from polyspan.run import torch_generator  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tokens(*shape, seed=0):
    return torch.randint(0, 60, shape, generator=torch_generator(seed))


def llama(dtype=torch.float32, bias=False):
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=60, max_position_embeddings=64, tie_word_embeddings=True, attention_bias=bias,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2 or bias:
                    p.normal_(std=0.3)
    return model


def compressed(model=None, **options):
    model = llama() if model is None else model
    compressor = SparseDictionaryCompressor(0.3, max_iter=2, **options)
    return compressor.fit(model, tokens(600)).compress(model)


def same(a, b):
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) and state[name].dtype == other[name].dtype for name in state)
    ids = tokens(2, 9)
    with torch.no_grad():
        # Products of 16 bits may depend on where in memory a tensor begins.
        off = 0.0 if a.dtype == torch.float32 else 0.02
        torch.testing.assert_close(a(ids).logits, b(ids).logits, atol=off, rtol=off)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"groups": 2}, {"coef_dtype": "int8", "groups": 2}, {"coef_dtype": "bfloat16"}, {"index_cost": "coo"},
        {"algorithm": "svd-llm"}, {"algorithm": "basis-sharing"}, {"algorithm": "wanda"},
        {"algorithm": "wanda", "coef_dtype": "bfloat16"},
        {"targets": ["q_proj", "*.1.mlp.*"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, options):
    model = compressed(**options)
    files = save_compressed(model, tmp_path / "out")
    assert [path.name for path in files] == ["polyspan.safetensors"]
    read = load_compressed(tmp_path / "out")
    same(read, model)
    assert compressed_layers(read) == compressed_layers(model) == read.config.quantization_config.layers
    assert read.lm_head.weight is read.model.embed_tokens.weight
    if options.get("groups") == 2:
        q = [block.self_attn.q_proj for block in read.model.layers]
        assert q[0].dictionary is q[1].dictionary
    save_compressed(read, tmp_path / "again")
    for path in list_folder(tmp_path / "out"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_16_bits_biases_and_shards_come_back_too(tmp_path):
    model = compressed(llama(torch.bfloat16, bias=True))
    files = save_compressed(model, tmp_path / "out", shard_bytes=5000)
    assert len(files) > 1
    read = load_compressed(tmp_path / "out")
    same(read, model)
    assert read.model.layers[0].self_attn.q_proj.bias.any()
    wide = load_compressed(tmp_path / "out", dtype=torch.float32)
    assert wide.model.layers[0].mlp.up_proj.values.dtype == torch.float32
    assert wide.model.layers[0].mlp.up_proj.mask.dtype == torch.uint8


def test_gpt2_and_tied_projections_come_back(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=128)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    model = compressed(model)
    told = compressed_layers(model)["transformer.h.1.mlp.c_fc"]
    assert told["tied_to"] == "transformer.h.0.mlp.c_fc"
    assert told["transposed"]
    save_compressed(model, tmp_path / "out")
    read = load_compressed(tmp_path / "out")
    same(read, model)
    one, two = (block.mlp.c_fc for block in read.transformer.h)
    assert one.values is two.values
    export_dense(read, tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = tokens(2, 9)
    torch.testing.assert_close(dense(ids).logits, read(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["ksvd", "svd-llm", "wanda"])
def test_a_dense_export_computes_the_same_with_plain_transformers(tmp_path, algorithm):
    model = compressed(algorithm=algorithm)
    save_compressed(model, tmp_path / "out")
    files = export_dense(tmp_path / "out", tmp_path / "dense")
    assert [path.name for path in files] == ["model.safetensors"]
    told = read_json(tmp_path / "dense" / "config.json")
    assert not {"quantization_config", "transformers_weights"} & told.keys()
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(m, SparseDictionaryLinear | LowRankLinear) for m in read.modules())
    ids = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_transformers_own_dequantize_gives_the_dense_model(tmp_path):
    save_compressed(compressed(), tmp_path / "out")
    read, other = (load_compressed(tmp_path / "out") for _ in range(2))
    dense = read.dequantize()
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4)


def test_generation_and_products_work_on_what_was_loaded(tmp_path):
    save_compressed(compressed(), tmp_path / "out")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = [
        load_compressed(tmp_path / "out", product=product).generate(tokens(1, 5), **options)
        for product in ("auto", "packed", "gather", "expanded")
    ]
    assert all(torch.equal(text, written[0]) for text in written)
    with pytest.raises(ValueError, match=r"product must be one of .* got 'fast'"):
        load_compressed(tmp_path / "out", product="fast")


def test_transformers_without_polyspan_refuses_the_folder(tmp_path):
    save_compressed(compressed(), tmp_path / "out")
    code = f"import transformers\ntransformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "no file named model.safetensors" in ran.stderr


def test_save_pretrained_is_refused_with_the_way_to_save(tmp_path):
    save_compressed(compressed(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"save it with polyspan.integrations.save_compressed, or dense"):
        load_compressed(tmp_path / "out").save_pretrained(tmp_path / "again")


def test_a_dense_model_cannot_be_loaded_as_a_compressed_one(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    config = CompressedModelConfig(layers={})
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    with pytest.raises(WrongContent, match="found dense weights; expected quant_method polyspan_compressed"):
        load_compressed(tmp_path / "dense")
    with pytest.raises(ValueError, match="model must have compressed layers, got none"):
        save_compressed(llama(), tmp_path / "out")


def test_broken_missing_and_foreign_files_are_told(tmp_path):
    save_compressed(compressed(), tmp_path / "out")
    weights, config = tmp_path / "out" / "polyspan.safetensors", read_json(tmp_path / "out" / "config.json")
    data = weights.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 4
    for broken in (bytes(flipped), data[:-9], b"12345"):
        write_bytes(weights, broken)
        with pytest.raises(CorruptFile):
            load_compressed(tmp_path / "out")
    weights.unlink()
    with pytest.raises(UnreadableFile):
        load_compressed(tmp_path / "out")
    write_bytes(weights, data)
    told = config["quantization_config"]
    write_json(tmp_path / "out" / "config.json", {**config, "quantization_config": {**told, "format": 99}})
    with pytest.raises(ValueError, match="format must be 1, got 99: a newer polyspan wrote this model"):
        load_compressed(tmp_path / "out")
    write_json(tmp_path / "out" / "config.json", {**config, "architectures": ["NoSuchModel"]})
    with pytest.raises(WrongContent, match="NoSuchModel"):
        load_compressed(tmp_path / "out")
    write_json(tmp_path / "out" / "config.json", {**config, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(WrongContent, match="found awq; expected quant_method polyspan_compressed"):
        load_compressed(tmp_path / "out")
    with pytest.raises(UnreadableFile, match=r"a folder with config.json; expected a new or empty folder"):
        save_compressed(compressed(), tmp_path / "out")
    register_compressed_models()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_peft_train_on_top(tmp_path):
    peft = pytest.importorskip("peft")
    save_compressed(compressed(), tmp_path / "out")
    model = load_compressed(tmp_path / "out")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    config._register_custom_module({SparseDictionaryLinear: peft.tuners.lora.layer.Linear})
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        adapted = peft.get_peft_model(model, config)
    ids = tokens(2, 9)
    adapted(ids, labels=ids).loss.backward()
    learnt = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert learnt
    assert all("lora_" in name for name in learnt)
