import pytest
import torch

from polyspan.nn import GrassmannLM
from polyspan.run import torch_generator

transformers = pytest.importorskip("transformers")

from polyspan.integrations import (  # noqa: E402
    GrassmannForCausalLM,
    GrassmannForSequenceClassification,
    GrassmannLMConfig,
    grassmann_to_hugging_face,
    register_grassmann_lm,
)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tokens(*shape, seed=0):
    return torch.randint(1, 11, shape, generator=torch_generator(seed))


def lm(**options):
    made = GrassmannLM(11, 8, 2, 4, (1, 2, 3), 0.0, max_length=40, generator=torch_generator(0), **options).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(10)
    return made


@pytest.mark.parametrize("options", [{}, {"tied": False, "positions": "none", "mixing": {"per_offset_weight": True}}])
def test_a_saved_model_comes_back_through_the_auto_classes_with_equal_logits(tmp_path, options):
    model, ids = lm(**options), tokens(2, 9)
    made = grassmann_to_hugging_face(model)
    assert torch.equal(made(ids).logits, model(ids))
    made.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(read) is GrassmannForCausalLM
    assert torch.equal(read(ids).logits, model(ids))


def test_generate_with_the_state_equals_ours_and_reading_again():
    model = lm()
    made, ids = grassmann_to_hugging_face(model), tokens(2, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = made.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, model.generate(ids, 12, temperature=0))
    assert torch.equal(found, made.generate(ids, use_cache=False, **options))


def test_generate_feeds_one_token_after_the_first_step():
    made, seen = grassmann_to_hugging_face(lm()), []
    made.model.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    made.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert seen == [(2, 5), (2, 1), (2, 1), (2, 1)]


def test_left_padding_does_not_change_what_is_generated():
    made, ids = grassmann_to_hugging_face(lm()), tokens(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1), torch.tensor([[0] * 3 + [1] * 5])
    found = made.generate(padded, attention_mask=mask, **options)
    assert torch.equal(found[:, 3:], made.generate(ids, **options))


def test_beams_find_a_text_at_least_as_likely_as_the_greedy_one():
    made, ids = grassmann_to_hugging_face(lm()), tokens(1, 5)

    def likelihood(text):
        told = made(text).logits[0].log_softmax(dim=-1)
        return float(told[torch.arange(4, len(text[0]) - 1), text[0, 5:]].sum().detach())

    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = made.generate(ids, num_beams=11, **options)
    assert likelihood(found) >= likelihood(made.generate(ids, **options)) - 1e-5
    assert torch.equal(found, made.generate(ids, num_beams=11, use_cache=False, **options))


def test_the_loss_is_that_of_the_model_and_labels_can_be_left_out():
    model, ids = lm(), tokens(2, 9)
    made = grassmann_to_hugging_face(model)
    assert made(ids, labels=ids).loss.item() == pytest.approx(model.loss(ids).item(), rel=1e-6)
    some = ids.masked_fill(torch.arange(9) < 5, -100)
    told = model(ids).log_softmax(dim=-1)[:, 4:-1].gather(2, ids[:, 5:, None])
    assert made(ids, labels=some).loss.item() == pytest.approx(-told.mean().item(), rel=1e-5)


def test_the_classifier_looks_at_real_tokens_only_and_is_trained_by_its_loss(tmp_path):
    config = GrassmannLMConfig(11, 8, 1, 4, [1, 2], max_position_embeddings=20, num_labels=3, hidden_dropout_prob=0.0)
    made, ids = GrassmannForSequenceClassification(config).eval(), tokens(4, 6)
    padded = torch.cat([ids, tokens(4, 3, seed=1)], dim=1)
    mask = (torch.arange(9) < 6).long().expand(4, 9)
    torch.testing.assert_close(made(padded, attention_mask=mask).logits, made(ids).logits)
    labels = torch.tensor([0, 1, 2, 1])
    made(ids, labels=labels).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())
    made.save_pretrained(tmp_path)
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(read(ids).logits, made(ids).logits)


def test_a_fresh_model_starts_as_ours_does_and_registering_twice_is_harmless():
    register_grassmann_lm()
    config = GrassmannLMConfig(50, 32, 1, 8, mixing={"per_offset_weight": True})
    made = transformers.AutoModelForCausalLM.from_config(config)
    assert abs(float(made.model.embedding.weight.detach().std()) - 0.02) < 0.002
    assert made.model.blocks[0].mixing.offset_weight.tolist() == [1] * 6
    assert not made.model.blocks[0].ffn[0].bias.any()


@pytest.mark.parametrize("tied", [True, False])
def test_words_that_are_added_can_be_read_and_said(tmp_path, tied):
    made, ids = grassmann_to_hugging_face(lm(tied=tied)), tokens(2, 5)
    before = made(ids).logits
    made.resize_token_embeddings(15, mean_resizing=False)
    assert made.config.vocab_size == 15
    torch.testing.assert_close(made(ids).logits[..., :11], before)
    assert made(torch.full((1, 3), 14)).logits.shape == (1, 3, 15)
    with pytest.raises(ValueError, match=r"ids must lie in 0..14, got 15"):
        made(torch.full((1, 3), 15))
    made.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(ids).logits, made(ids).logits)


def test_the_weights_of_a_transformer_are_refused_and_the_names_told(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    own = GrassmannLMConfig(11, 8, 1, 4, [1, 2], max_position_embeddings=20)
    with pytest.raises(ValueError, match=r"language model of planes, missing .*model\.blocks.*transformer\.h"):
        GrassmannForCausalLM.from_pretrained(tmp_path, config=own)
    with pytest.raises(ValueError, match="must hold a language model of planes"):
        GrassmannForSequenceClassification.from_pretrained(tmp_path, config=own)


def test_loading_says_what_was_missing_where_asked(tmp_path):
    grassmann_to_hugging_face(lm()).save_pretrained(tmp_path)
    read, told = GrassmannForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(told["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert read(tokens(2, 5)).logits.shape == (2, 3)


def test_labels_of_another_shape_are_refused():
    made, ids = grassmann_to_hugging_face(lm()), tokens(2, 5)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 5\), as input_ids, got \(2, 3\)"):
        made(ids, labels=ids[:, :3])
    config = GrassmannLMConfig(11, 8, 1, 4, [1, 2], max_position_embeddings=20, num_labels=3)
    head = GrassmannForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), one a text, got \(3,\)"):
        head(ids, labels=torch.tensor([0, 1, 2]))


def classifier(**options):
    config = GrassmannLMConfig(11, 8, 2, 4, [1, 2, 3], max_position_embeddings=40, num_labels=3, **options)
    return GrassmannForSequenceClassification(config)


def start_checkpointing(model, reentrant, **options):
    # The name that transformers gave it first is deprecated in later versions.
    start = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    start({"use_reentrant": reentrant}, **options)


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_vectors_of_tokens_give_the_bits_that_the_tokens_give(kind):
    made, ids = (grassmann_to_hugging_face(lm()) if kind == "lm" else classifier().eval()), tokens(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    labels = ids if kind == "lm" else torch.tensor([0, 2])
    rows = made.get_input_embeddings()(ids)
    for options in ({}, {"attention_mask": mask}, {"labels": labels}):
        found, expected = made(inputs_embeds=rows, **options), made(input_ids=ids, **options)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_text_that_starts_with_vectors_is_continued_as_the_one_of_its_tokens():
    made, ids = grassmann_to_hugging_face(lm()), tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    for more in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(mask), "num_beams": 3}):
        expected = made.generate(ids, **more, **options)
        rows = made.get_input_embeddings()(ids)
        assert torch.equal(made.generate(inputs_embeds=rows, **more, **options), expected[:, 5:])


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_hidden_states_are_those_of_the_blocks_and_chosen_as_transformers_chooses(kind):
    made, ids = (grassmann_to_hugging_face(lm()) if kind == "lm" else classifier().eval()), tokens(2, 9)
    given = []
    for block in made.model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    found = made(ids, output_hidden_states=True).hidden_states
    expected = [*given[:2], made.model.hidden(ids)]
    assert len(found) == len(expected) == made.config.num_hidden_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert made(ids).hidden_states is None
    for asked, kept in (([-1], {2}), (1, {1}), ([0, 2, 7], {0, 2})):
        chosen = made(ids, output_hidden_states=asked).hidden_states
        assert {i for i, h in enumerate(chosen) if h is not None} == kept
        assert all(torch.equal(chosen[i], found[i]) for i in kept)
    # As in transformers, where 0 is taken for False.
    assert made(ids, output_hidden_states=0).hidden_states is None
    made.config.output_hidden_states = True
    assert len(made(ids).hidden_states) == 3
    assert made(ids, output_hidden_states=False).hidden_states is None


def test_hidden_states_come_with_what_is_generated():
    made, ids = grassmann_to_hugging_face(lm()), tokens(2, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    told = made.generate(ids, output_hidden_states=True, **options)
    whole = made(told.sequences[:, :-1], output_hidden_states=True).hidden_states
    assert [[h.shape[1] for h in step] for step in told.hidden_states] == [[5] * 3, [1] * 3, [1] * 3]
    for layer, expected in zip(zip(*told.hidden_states, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(layer, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_a_tuple_or_a_dict_comes_back_as_asked_here_or_in_the_configuration(kind):
    made, ids = (grassmann_to_hugging_face(lm()) if kind == "lm" else classifier().eval()), tokens(2, 5)
    told = made(ids, output_hidden_states=True)
    parts = made(ids, output_hidden_states=True, return_dict=False)
    assert type(parts) is tuple
    assert torch.equal(parts[0], told.logits)
    assert all(torch.equal(a, b) for a, b in zip(parts[1], told.hidden_states, strict=True))
    made.config.return_dict = False
    assert torch.equal(made(ids)[0], told.logits)
    assert type(made(ids)) is tuple
    assert torch.equal(made(ids, return_dict=True).logits, told.logits)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_gradients_of_blocks_computed_again_are_the_same_bits(kind, reentrant):
    made, ids = (grassmann_to_hugging_face(lm()) if kind == "lm" else classifier()), tokens(2, 9)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    labels = ids if kind == "lm" else torch.tensor([0, 2])
    passed = []
    for block in made.model.blocks:
        block.mixing.register_forward_pre_hook(lambda *_: passed.append(1))

    def gradients():
        passed.clear()
        made.zero_grad()
        torch.manual_seed(3)
        loss = made.train()(ids, labels=labels).loss
        loss.backward()
        return len(passed), {name: p.grad.clone() for name, p in made.named_parameters()}, loss.item()

    with torch.random.fork_rng(devices=[]):
        times, expected, loss = gradients()
        assert times == 2
        for options, again in (({}, 4), ({"every_n_layers": 2}, 3)):
            start_checkpointing(made, reentrant, **options)
            times, found, value = gradients()
            assert (times, value) == (again, loss)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        if kind == "lm":
            # The state goes along, and generating in training mode is what it was.
            made(ids, labels=labels, use_cache=True).loss.backward()
            texts = made.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            for module in made.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            assert torch.equal(made.train().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), texts)
        stop = getattr(made, "activation_checkpointing_disable", None) or made.gradient_checkpointing_disable
        stop()
        assert not any(block.gradient_checkpointing for block in made.model.blocks)


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_tokens_and_vectors_are_given_one_at_a_time(kind):
    made, ids = (grassmann_to_hugging_face(lm()) if kind == "lm" else classifier()), tokens(2, 5)
    rows = made.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given, got neither"):
        made()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given, got both"):
        made(ids, inputs_embeds=rows)
    if kind == "lm":
        with pytest.raises(ValueError, match=r"labels must have shape \(2, 5\), as inputs_embeds, got \(2, 3\)"):
            made(inputs_embeds=rows, labels=ids[:, :3])
