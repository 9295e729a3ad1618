"""Errors of the scan and its layers name the argument, what was expected and what came."""

import inspect

import numpy as np
import pytest
import torch

from polyspan.nn import (
    MHSBlock,
    MHSUNet,
    MultiHeadScan2d,
    Segmenter,
    SS2DBlock,
    convert_mhs_vm,
    plot_segmentation,
    segmentation_scores,
    selective_scan,
    train_segmentation,
)


def plain(function, *arguments, **options):
    """Call without the tests' own check of shapes, which would answer first."""
    return inspect.unwrap(function)(*arguments, **options)


def seeded():
    return torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=seeded())


def net(in_channels=1, **options):
    return MHSUNet(in_channels, 1, (1,), (8,), num_heads=2, d_state=2, generator=seeded(), **options)


def pictures():
    images = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
    return images, (images > 0).astype(np.uint8)


SCAN = {
    "u": draw(2, 6, 9),
    "delta": draw(2, 6, 9).abs(),
    "A": -draw(6, 3).abs(),
    "B": draw(2, 3, 9),
    "C": draw(2, 3, 9),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": draw(6, 9)}, r"u must have shape \(b, D, L\), got \(6, 9\)"),
        ({"D": draw(5)}, r"D must have shape \(6,\), one number a channel, got \(5,\)"),
        ({"D": torch.tensor(1.0)}, r"D must have shape \(6,\), one number a channel, got \(\)"),
        ({"delta_bias": draw(5)}, r"delta_bias must have shape \(6,\), one number a channel, got \(5,\)"),
        ({"z": draw(2, 6, 8)}, r"z must have the shape of u, \(2, 6, 9\), got \(2, 6, 8\)"),
        ({"u": torch.ones(2, 6, 9, dtype=torch.long)}, "u must hold real floats, got torch.int64"),
        ({"B": draw(2, 3, 9).to(torch.complex64)}, "B must hold real floats, got torch.complex64"),
        ({"C": torch.ones(2, 3, 9, dtype=torch.bool)}, "C must hold real floats, got torch.bool"),
    ],
    ids=["u", "D", "D-number", "bias", "z", "whole", "complex", "bool"],
)
def test_arguments_of_a_scan_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        plain(selective_scan, **SCAN | change)


@pytest.mark.parametrize("kind", [MHSBlock, SS2DBlock, MultiHeadScan2d])
def test_maps_of_another_shape_are_refused_by_every_layer(kind):
    layer = kind(8, generator=seeded())
    for shape in ((3, 4, 8), (1, 2, 3, 4, 8)):
        with pytest.raises(ValueError, match=rf"x must be \(b, h, w, 8\), got shape \({', '.join(map(str, shape))}\)"):
            plain(kind.forward, layer, draw(*shape))
    with pytest.raises(ValueError, match="x must have 8 channels, got 7"):
        layer(draw(1, 3, 3, 7))


def test_a_map_with_channels_first_is_told_as_such():
    layer = MultiHeadScan2d(8, channels_last=False, generator=seeded())
    with pytest.raises(ValueError, match=r"x must be \(b, 8, h, w\), got shape \(8, 3, 4\)"):
        plain(MultiHeadScan2d.forward, layer, draw(8, 3, 4))


def test_blocks_without_channels_are_refused():
    for kind in (MHSBlock, SS2DBlock):
        with pytest.raises(ValueError, match=r"channels.*, got 0|channels=0"):
            kind(0)


def test_one_name_is_no_sequence_of_patterns():
    with pytest.raises(ValueError, match="patterns must be a sequence of patterns, got 'snake'"):
        plain(MultiHeadScan2d, 8, patterns="snake")


def test_a_list_of_cells_is_a_pattern_as_an_array_is():
    x = draw(1, 2, 2, 8)
    listed = MultiHeadScan2d(8, patterns=([0, 2, 1, 3],), d_state=2, generator=seeded())
    as_array = MultiHeadScan2d(8, patterns=(np.array([0, 2, 1, 3]),), d_state=2, generator=seeded())
    torch.testing.assert_close(listed(x), as_array(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8), r"x must be \(b, 3, h, w\), got shape \(3, 8, 8\)"),
        ((1, 3, 0, 8), r"x must have at least one pixel, got shape \(1, 3, 0, 8\)"),
        ((1, 2, 8, 8), "x must have 3 channels, got 2"),
    ],
)
def test_images_that_are_none_are_refused_by_the_network(shape, message):
    with pytest.raises(ValueError, match=message):
        plain(MHSUNet.forward, net(3), torch.zeros(shape))


def test_an_empty_batch_of_images_has_an_empty_result():
    assert net()(torch.zeros(0, 1, 8, 8)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("std", [0.0, -0.1, float("nan")])
def test_a_spread_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match=f"init_std must be positive and finite, or None, got {std}"):
        net(init_std=std)


def test_a_segmenter_with_routes_of_its_own_is_kept_and_read(tmp_path):
    images, masks = pictures()
    model = net(patterns=(np.array([0, 2, 1, 3]),), patch_size=4)
    found = train_segmentation(model, images, masks, max_iter=1)
    again = Segmenter.load(found.save(tmp_path / "net.safetensors"))
    np.testing.assert_array_equal(again.predict(images), found.predict(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_segmenter_in_half_precision_answers_and_is_kept(tmp_path, dtype):
    images, masks = pictures()
    found = train_segmentation(net(), images, masks, max_iter=1)
    expected = found.predict(images)
    half = found._replace(model=found.model.to(dtype))
    answers = half.predict(images)
    assert answers.dtype == np.float32
    # Weights and every layer's output are rounded, by 2^-9 at most; shares of 0 to 1 are a few dozen of these off.
    assert 0 < np.abs(answers - expected).max() < 0.1
    again = Segmenter.load(half.save(tmp_path / "half.safetensors"))
    wide = found.model.float()
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value.float(), wide.state_dict()[name], rtol=0, atol=0)


def test_a_network_of_several_classes_is_no_segmenter():
    several = Segmenter(MHSUNet(1, 3, (1,), (8,), num_heads=2, d_state=2), 0.0, 1.0, [])
    with pytest.raises(ValueError, match="model must have one class, got 3"):
        several.predict(pictures()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype(complex), "images must hold real numbers, got complex128"),
        (lambda x: x.astype(str), "images must hold real numbers, got <U"),
        (lambda x: np.stack([x] * 2, axis=1), "images must have 1 channel, as the network, got 2"),
        (lambda x: x[:, :0], r"images must have at least one pixel, got shape \(6, 0, 8\)"),
    ],
    ids=["complex", "text", "channels", "empty"],
)
def test_images_that_do_not_fit_the_network_are_told_before_training_and_before_predicting(change, message):
    images, masks = pictures()
    with pytest.raises(ValueError, match=message):
        train_segmentation(net(), change(images), masks, max_iter=1)
    with pytest.raises(ValueError, match=message):
        Segmenter(net(), 0.0, 1.0, []).predict(change(images))


def test_lists_and_tensors_are_images_too():
    images, masks = pictures()
    expected = train_segmentation(net(), images, masks, max_iter=1)
    for change in (np.ndarray.tolist, torch.from_numpy):
        found = train_segmentation(net(), change(images), change(masks), max_iter=1)
        assert found.losses == expected.losses
        np.testing.assert_array_equal(found.predict(change(images)), expected.predict(images))


def test_no_picture_is_not_scored():
    with pytest.raises(ValueError, match=r"of at least one pixel, got \(0, 8, 8\) and \(0, 8, 8\)"):
        segmentation_scores(np.zeros((0, 8, 8)), np.zeros((0, 8, 8)))


def test_answers_that_are_no_numbers_are_not_scored():
    masks = pictures()[1]
    with pytest.raises(ValueError, match="predicted must hold numbers, got NaN in image 2"):
        segmentation_scores(masks, np.where(np.arange(6)[:, None, None] == 2, np.nan, masks))


def test_pictures_of_two_channels_are_not_drawn(tmp_path):
    images, masks = pictures()
    with pytest.raises(ValueError, match=r"images must be \(n, h, w\) or \(n, 3, h, w\), got shape \(6, 2, 8, 8\)"):
        plot_segmentation(np.stack([images] * 2, axis=1), masks, masks, tmp_path / "a.svg")


def test_what_is_no_weights_is_told():
    with pytest.raises(ValueError, match="state must map names to weights, got str"):
        plain(convert_mhs_vm, "best.pth")
