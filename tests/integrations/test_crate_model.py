import pytest
import torch

from polyspan.nn import CRATE, CRATEMAE, CrateClassifier
from polyspan.run import torch_generator

transformers = pytest.importorskip("transformers")

from polyspan.integrations import (  # noqa: E402
    CrateConfig,
    CrateForImageClassification,
    CrateForMaskedImageModeling,
    CrateModel,
    register_crate,
    to_hugging_face,
)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch_generator(seed))


def network(**options):
    return CRATE((8, 12), 4, 5, 12, 2, 2, generator=torch_generator(0), **options).eval()


@pytest.mark.parametrize("options", [{}, {"pool": "mean", "head_dim": 4, "block": {"step": "exact", "eta": 0.2}}])
def test_a_saved_model_comes_back_through_the_auto_classes_with_equal_logits(tmp_path, options):
    model, images = network(**options), draw(3, 3, 8, 12)
    made = to_hugging_face(model)
    assert torch.equal(made(images).logits, model(images))
    made.save_pretrained(tmp_path)
    read = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(read) is CrateForImageClassification
    assert torch.equal(read(images).logits, model(images))
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(body) is CrateModel
    assert torch.equal(body(images).last_hidden_state, model.forward_features(images))
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is CrateConfig
    register_crate()


def test_states_attentions_and_loss_are_given_on_request():
    model, images = network(), draw(3, 3, 8, 12)
    made = to_hugging_face(model)
    out = made(images, labels=torch.tensor([0, 1, 2]), output_hidden_states=True, output_attentions=True)
    states = model.forward_states(images)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, states.outputs, strict=True))
    assert len(out.attentions) == 2
    torch.testing.assert_close(out.attentions[1][:, :, 0, 1:].unflatten(-1, (2, 3)), model.attention_maps(images))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 2])))
    plain = made(images)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert torch.equal(made(images, return_dict=False)[0], plain.logits)


def test_a_new_head_is_drawn_and_the_body_stays(tmp_path):
    model, images = to_hugging_face(network()), draw(2, 3, 8, 12)
    model.save_pretrained(tmp_path)
    tuned = CrateForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert tuned(images).logits.shape == (2, 7)
    assert torch.equal(tuned.crate(images).pooler_output, model.crate(images).pooler_output)
    assert 0 < tuned.classifier.weight.abs().max() <= 12**-0.5


def test_fresh_weights_are_drawn_by_the_networks_own_rules():
    made = CrateModel(
        CrateConfig(image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    block = made.network.blocks[0]
    assert 0.9 < made.network.positions.std() < 1.1
    assert block.ista.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert block.attention.projection.weight.abs().max() <= 1 / 8
    assert torch.equal(block.ista_norm.weight, torch.ones(64))


def test_an_auto_encoder_comes_back_and_completes(tmp_path):
    model = CRATEMAE(8, 4, 8, 2, 2, decoder_depth=1, norm_pixels=True, generator=torch_generator(0)).eval()
    images, mask = draw(2, 3, 8, 8), torch.tensor([[True, False, True, True], [False, True, True, True]])
    made = to_hugging_face(model)
    made.save_pretrained(tmp_path)
    read = transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path)
    assert type(read) is CrateForMaskedImageModeling
    out = read(images, mask)
    assert torch.equal(out.reconstruction, model(images, mask))
    assert torch.equal(out.loss, model.loss(images, mask))
    assert torch.isfinite(read(images).loss)
    assert torch.equal(read(images, mask, return_dict=False)[0], out.loss)


@pytest.mark.parametrize("auto", [True, False])
def test_a_classifier_begins_with_the_encoder_of_a_masked_auto_encoder(tmp_path, auto):
    model = CRATEMAE(
        (8, 12), 4, 8, 2, 2, head_dim=3, decoder_depth=1, block={"eta": 0.2}, generator=torch_generator(0)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(draw(*p.shape, seed=1), alpha=0.1)  # norms are no longer the identity
    to_hugging_face(model).save_pretrained(tmp_path)
    kind = transformers.AutoModelForImageClassification if auto else CrateForImageClassification
    read, told = kind.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert set(told["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert all("decoder" in n or "mask_token" in n or "prediction" in n for n in told["unexpected_keys"])
    assert not told["mismatched_keys"]
    theirs, mine = read.crate.network.state_dict(), model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in theirs.items())
    images = draw(2, 3, 8, 12, seed=2)
    features = model.encode(images)[:, 0]
    torch.testing.assert_close(read.crate(images).pooler_output, features)
    body, told = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    torch.testing.assert_close(body(images).pooler_output, features)
    # What was trained on from there is written and read like any other classifier.
    read.save_pretrained(tmp_path / "tuned")
    again, told = kind.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(again(images).logits, read(images).logits)


def test_the_auto_encoder_leaves_the_configuration_that_it_is_given_alone():
    config = CrateConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    made = CrateForMaskedImageModeling(config)
    assert config.patch_norm
    assert config.embedding_norm
    assert not made.config.patch_norm
    assert not made.config.embedding_norm
    assert torch.isfinite(made(draw(1, 3, 8, 8)).loss)


def test_other_sizes_and_hidden_patches_are_understood():
    model, images = network(), draw(2, 3, 16, 12)
    made = to_hugging_face(model)
    expected = model(images, interpolate_pos_encoding=True)
    assert torch.equal(made(images, interpolate_pos_encoding=True).logits, expected)
    hidden = torch.tensor([[True, False, False, False, False, False]])
    body, small = made.crate, draw(1, 3, 8, 12)
    spoilt = small.clone()
    spoilt[..., :4, :4] = 50
    torch.testing.assert_close(body(spoilt, hidden).pooler_output, body(small, hidden).pooler_output)


def test_gradient_checkpointing_is_switched_on_by_its_usual_name():
    made, images = to_hugging_face(network()).train(), draw(2, 3, 8, 12)
    made(images).logits.sum().backward()
    expected = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    made.activation_checkpointing_enable()
    assert made.crate.network.gradient_checkpointing
    made(images).logits.sum().backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_what_a_configuration_cannot_say_is_told():
    with pytest.raises(ValueError, match=r"no options beyond those of CrateConfig, got \['eps2'\]"):
        to_hugging_face(network(block={"eps2": 0.1}))
    with pytest.raises(ValueError, match="got causal=True"):
        to_hugging_face(network(causal=True))
    for block in ({"scale": 1.0}, {"residual": True}, {"nonneg": False}, {"eps2": 0.1}, {"step_size": 0.3}):
        with pytest.raises(ValueError, match=rf"beyond those of CrateConfig, got another \['{next(iter(block))}'\]"):
            to_hugging_face(CRATEMAE(8, 4, 8, 1, 2, block=block))
    with pytest.raises(ValueError, match=r"got another \['output.bias'\]"):
        to_hugging_face(CRATEMAE(8, 4, 8, 1, 2, block={"bias": False}))
    headless = CRATE(8, 4, 0, 8, 1, 2)
    assert type(to_hugging_face(headless)) is CrateModel


def test_a_fitted_classifier_becomes_one():
    X = draw(20, 8, 8).numpy()
    fitted = CrateClassifier(8, 1, 2, max_iter=2, patch_size=2, random_state=0).fit(X, [0, 1] * 10)
    images = (torch.as_tensor(X)[:, None] - fitted.mean_) / fitted.spread_
    assert torch.equal(to_hugging_face(fitted.model_)(images).logits, fitted.model_(images))
