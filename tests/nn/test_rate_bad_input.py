"""Errors of the rate-reduction layers and networks name the argument, what was expected and what came."""

import inspect

import numpy as np
import pytest
import torch

from polyspan.nn import (
    CRATE,
    CRATEMAE,
    CRATEBlock,
    CrateClassifier,
    CRATEDecoderBlock,
    Lion,
    SparsifyingISTA,
    SubspaceSelfAttention,
    layer_report,
)


def plain(function, *arguments, **options):
    """Call without the tests' own check of shapes, which would answer first."""
    return inspect.unwrap(function)(*arguments, **options)


def seeded():
    return torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=seeded())


def crate(**options):
    return CRATE(8, 4, 3, 8, 2, 2, generator=seeded(), **options).eval()


def mae(**options):
    return CRATEMAE(8, 4, 8, 1, 2, generator=seeded(), **options).eval()


LAYERS = {
    "published": lambda: SubspaceSelfAttention(8, 2, generator=seeded()),
    "exact": lambda: SubspaceSelfAttention(8, 2, step="exact", generator=seeded()),
    "block": lambda: CRATEBlock(8, 2, generator=seeded()),
    "decoder": lambda: CRATEDecoderBlock(8, 2, generator=seeded()),
}


def entry(layer):
    """The method that looks at tokens first."""
    return CRATEBlock.compress if isinstance(layer, CRATEBlock) else type(layer).forward


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.ones(2, 4, dtype=torch.bool), r"\(2, 4\) of torch.bool"),
        (torch.ones(2, 5, dtype=torch.long), r"\(2, 5\) of torch.int64"),
        (torch.ones(2, 5), r"\(2, 5\) of torch.float32"),
    ],
    ids=["shape", "whole", "float"],
)
def test_masks_that_are_none_are_refused_by_every_layer(name, mask, told):
    layer = LAYERS[name]()
    with pytest.raises(ValueError, match=rf"mask must be \(2, 5\), true for real tokens, of bool, got {told}"):
        plain(entry(layer), layer, draw(2, 5, 8), mask)
    attention = layer if isinstance(layer, SubspaceSelfAttention) else layer.attention
    with pytest.raises(ValueError, match=f"mask must be .*, got {told}"):
        plain(SubspaceSelfAttention.attention_map, attention, draw(2, 5, 8), mask)


@pytest.mark.parametrize("name", [*LAYERS, "sparse"])
def test_tokens_of_another_width_are_refused_by_every_layer(name):
    layer = SparsifyingISTA(8) if name == "sparse" else LAYERS[name]()
    told = "y" if name == "sparse" else "x"
    with pytest.raises(ValueError, match=rf"{told} must have width 8, got shape \(2, 5, 7\)"):
        layer(draw(2, 5, 7))
    if name != "sparse":
        with pytest.raises(ValueError, match=r"x must be \(\*batch, t, 8\), got shape \(8,\)"):
            plain(entry(layer), layer, draw(8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crate(emb_dropout=1.5), r"emb_dropout must be at least 0 and below 1, got 1.5"),
        (lambda: crate(emb_dropout=-1.0), r"emb_dropout must be at least 0 and below 1, got -1.0"),
        (lambda: crate().attention_maps(draw(1, 3, 8, 8), 2), r"layer must be between -2 and 1, got 2"),
        (lambda: Lion([torch.nn.Parameter(draw(2))], betas=(0.9,)), r"betas must be two numbers, .*, got \(0.9,\)"),
        (lambda: mae().draw_mask(2, num_patches=1), "num_patches must be at least 2, got 1"),
        (lambda: mae().targets(draw(2, 1, 8, 8)), r"images must be \(B, 3, h, w\), got shape \(2, 1, 8, 8\)"),
    ],
    ids=["dropout-high", "dropout-low", "layer", "betas", "one-patch", "channels"],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(make)()


@pytest.mark.parametrize("size", [(8,), (8, 8, 8), 8.5, "8"])
def test_sizes_that_are_no_height_and_width_are_refused(size):
    with pytest.raises(ValueError, match="a size must be a whole number or two, height and width, got"):
        plain(CRATE.__init__, CRATE.__new__(CRATE), size, 4, 3, 8, 1, 2)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_masks_of_an_auto_encoder_that_are_no_truths_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"mask must be \(2, 4\), .*, got \(2, 4\) of {dtype}"):
        plain(CRATEMAE.encode, mae(), draw(2, 3, 8, 8), torch.ones(2, 4, dtype=dtype))


def test_predictions_of_other_patches_are_refused():
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"predicted must have shape \(2, 4, 48\), as the patches, got \(2, 3, 48\)"):
        plain(CRATEMAE.loss, mae(), draw(2, 3, 8, 8), mask, predicted=draw(2, 3, 48))


def test_images_of_another_size_are_completed_on_request():
    model, images = mae(), draw(1, 3, 12, 8)
    mask = torch.tensor([[True, False, False, True, False, False]])
    found = model.complete(images, mask, interpolate_pos_encoding=True)
    kept = found[0, :, :4, 4:], found[0, :, 4:8, :4], found[0, :, 8:]
    for mine, theirs in zip(kept, (images[0, :, :4, 4:], images[0, :, 4:8, :4], images[0, :, 8:]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    predicted = model(images, mask, interpolate_pos_encoding=True)[0, 0].view(4, 4, 3).permute(2, 0, 1)
    torch.testing.assert_close(found[0, :, :4, :4], predicted)
    with pytest.raises(ValueError, match="images must be 8 by 8 pixels, got 12 by 8"):
        model.complete(images, mask)


def test_one_layer_may_be_named_without_a_list_and_the_whole_model_is_called_so():
    model, images = crate(), draw(2, 3, 8, 8)
    found = layer_report(model, images, layers="blocks.1")
    assert found.names == ["blocks.1"]
    np.testing.assert_array_equal(found.rate, layer_report(model, images, layers=["blocks.1"]).rate)
    with pytest.raises(ValueError, match="the model must have at least 2 tokens, got 1"):
        layer_report(CRATEBlock(8, 2, generator=seeded()), draw(2, 1, 8))


def test_sparse_gradients_are_refused_by_lion():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Lion takes dense gradients, got a sparse one"):
        Lion(table.parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 1.5}, r"shift must be a whole number of at least 0, got 1.5"),
        ({"shift": -1}, r"shift must be a whole number of at least 0, got -1"),
        ({"max_iter": 2.5}, r"max_iter must be a whole number of at least 1, got 2.5"),
    ],
)
def test_counts_that_are_no_whole_numbers_are_refused(options, message):
    X = np.random.default_rng(0).normal(size=(6, 16))
    with pytest.raises(ValueError, match=message):
        CrateClassifier(8, 1, 2, **options).fit(X, np.arange(6) % 2)


def test_no_images_are_told_as_such():
    X = np.zeros((0, 4, 4))
    with pytest.raises(ValueError, match="0 sample"):
        CrateClassifier(8, 1, 2).fit(X, np.zeros(0))
