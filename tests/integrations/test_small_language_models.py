import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from polyspan.data import python_reference
from polyspan.errors import CorruptFile
from polyspan.integrations import small_language_model
from polyspan.nn import score_next_token

TEXT = python_reference()
TRAIN, TEST = TEXT[:60_000], TEXT[60_000:80_000]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "num_experts": 4, "vocab_size": 300,
    "context": 32, "batch_size": 8,
}  # fmt: skip


def opened(path):
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def perplexity(path):
    model, tokenizer = opened(path)
    ids = torch.tensor(tokenizer(TEST, verbose=False)["input_ids"])
    return math.exp(score_next_token(model, ids, length=31))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return small_language_model(TRAIN, **SIZES, steps=60, folder=tmp_path_factory.mktemp("models"))


def test_a_model_learns_its_text_and_is_a_checkpoint_that_transformers_reads(dense):
    model, tokenizer = opened(dense)
    assert model.config.model_type == "llama"
    assert tokenizer.decode(tokenizer("Ärger, 中 \n\tend")["input_ids"]) == "Ärger, 中 \n\tend"
    untrained = small_language_model(TRAIN, **SIZES, steps=1, folder=dense.parent)
    assert perplexity(dense) < 0.5 * perplexity(untrained)


def test_a_model_is_trained_once_and_again_where_anything_differs(dense):
    stamp = (dense / "model.safetensors").stat().st_mtime_ns
    assert small_language_model(TRAIN, **SIZES, steps=60, folder=dense.parent) == dense
    assert (dense / "model.safetensors").stat().st_mtime_ns == stamp
    others = [
        small_language_model(TRAIN, **SIZES, steps=1, seed=1, folder=dense.parent),
        small_language_model(TRAIN, **SIZES, steps=1, seed=2, folder=dense.parent),
        small_language_model(TEST, **SIZES, steps=1, seed=2, folder=dense.parent),
    ]
    assert len({dense, *others}) == 4


def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(tmp_path):
    made = []
    for i in range(2):
        set_seed(i)
        path = small_language_model(TRAIN, "mixtral", **SIZES, steps=2, folder=tmp_path / str(i))
        made.append((path / "model.safetensors").read_bytes())
        assert torch.initial_seed() == i
    assert made[0] == made[1]


def test_experts_that_are_upcycled_begin_as_the_dense_model(dense):
    options = {**SIZES, "steps": 1, "learning_rate": 1e-9, "initial": dense, "folder": dense.parent}
    same = small_language_model(TRAIN, "mixtral", **options, initial_noise=0.0)
    assert perplexity(same) == pytest.approx(perplexity(dense), rel=1e-3)
    noisy, _ = opened(small_language_model(TRAIN, "mixtral", **options, initial_noise=0.1))
    up = noisy.model.layers[0].mlp.experts.gate_up_proj
    base = opened(dense)[0].model.layers[0].mlp.gate_proj.weight
    moved = (up[:, : len(base)] - base).detach()
    assert (moved.flatten(1).std(dim=1) / base.std()).tolist() == pytest.approx([0.1] * 4, rel=0.1)
    assert torch.corrcoef(moved.flatten(1)).fill_diagonal_(0).abs().max() < 0.1


def test_what_does_not_fit_is_named(dense):
    with pytest.raises(ValueError, match="architecture must be 'llama' or 'mixtral', got 'gpt'"):
        small_language_model(TRAIN, "gpt")
    with pytest.raises(ValueError, match="initial must go with architecture 'mixtral', got 'llama'"):
        small_language_model(TRAIN, initial=dense)
    with pytest.raises(ValueError, match=r"initial must have the sizes of the model, got \(300, 32\)"):
        small_language_model(
            TRAIN, "mixtral", **SIZES | {"hidden_size": 16}, steps=1, initial=dense, folder=dense.parent
        )


def test_a_kept_model_that_was_changed_is_refused(tmp_path):
    path = small_language_model(TRAIN, **SIZES, steps=1, folder=tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        small_language_model(TRAIN, **SIZES, steps=1, folder=tmp_path)
