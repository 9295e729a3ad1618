import inspect

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyspan.errors import NotConverged, WrongContent
from polyspan.io import save_fitted
from polyspan.nn import (
    MHSUNet,
    Segmenter,
    bce_dice_loss,
    convert_mhs_vm,
    plot_segmentation,
    segmentation_scores,
    train_segmentation,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, **options):
    return MHSUNet(
        1,
        1,
        (1,),
        (8,),
        num_heads=2,
        d_state=2,
        patch_size=2,
        drop_path=0.0,
        init_std=None,
        generator=seeded(seed),
        **options,
    )


def squares(n=24, side=8, seed=0):
    """Bright squares in faint noise, on a scale of its own."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, side, side), dtype=np.uint8)
    for mask in masks:
        i, j = rng.integers(0, side - 4, size=2)
        mask[i : i + 4, j : j + 4] = 1
    return (500.0 + 40.0 * masks + rng.normal(0, 8, size=masks.shape)).astype(np.float32), masks


def test_the_loss_is_its_formula_and_empty_masks_cost_nothing_more():
    logits, masks = torch.randn(3, 4, 5, generator=seeded()), torch.randint(2, (3, 4, 5), generator=seeded(1))
    p, m = logits.sigmoid(), masks.float()
    dice = [(2 * (p[i] * m[i]).sum() + 1) / (p[i].sum() + m[i].sum() + 1) for i in range(3)]
    expected = F.binary_cross_entropy(p, m) + 1 - torch.stack(dice).mean()
    torch.testing.assert_close(bce_dice_loss(logits, masks), expected)
    sure = bce_dice_loss(torch.full((1, 4, 4), -50.0), torch.zeros(1, 4, 4))
    assert sure < 1e-6
    with pytest.raises(ValueError, match="smooth must be above 0"):
        bce_dice_loss(logits, masks, 0)
    with pytest.raises(ValueError, match=r"masks must be \(3, 4, 5\), as the logits, got \(3, 5, 4\)"):
        inspect.unwrap(bce_dice_loss)(logits, masks.mT)  # without the tests' own check of shapes


def test_scores_of_all_pixels_differ_from_the_mean_over_images():
    masks = np.array([[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    found = np.array([[[1, 0], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    scores = segmentation_scores(255 * masks, found.astype(float))
    assert scores.dice == pytest.approx(4 / 5)
    assert scores.iou == pytest.approx(2 / 3)
    np.testing.assert_allclose(scores.image_dice, [2 / 3, 1, 1])
    np.testing.assert_allclose(scores.image_iou, [1 / 2, 1, 1])
    with pytest.raises(ValueError, match=r"must be binary, of 0 and 1 or of 0 and 255, got values \[0, 2\]"):
        segmentation_scores(2 * masks, found)
    with pytest.raises(ValueError, match="must both be"):
        segmentation_scores(masks, found[:2])


def test_it_learns_squares_whatever_the_scale_of_the_images():
    images, masks = squares(60)
    found = train_segmentation(small(), images[:48], 255 * masks[:48], max_iter=150, learning_rate=2e-2)
    scores = segmentation_scores(masks[48:], found.predict(images[48:]))
    assert scores.dice > 0.9
    assert np.mean(found.losses[-5:]) < 0.5 * np.mean(found.losses[:5])


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    images, masks = squares()
    how = {"max_iter": 8, "batch_size": 4, "save_every": 3}
    whole = train_segmentation(small(), images, masks, **how, generator=seeded(5))
    checkpoint = tmp_path / "half.safetensors"
    model = small()

    def stop(*_):
        raise KeyboardInterrupt

    calls = []
    model.register_forward_pre_hook(lambda *_: stop() if len(calls) == 5 else calls.append(1))
    with pytest.raises(KeyboardInterrupt):
        train_segmentation(model, images, masks, **how, checkpoint=checkpoint, generator=seeded(5))
    rest = train_segmentation(small(9), images, masks, **how, checkpoint=checkpoint, generator=seeded(6))
    assert rest.losses == whole.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], value), name
    with pytest.raises(ValueError, match="checkpoint"):
        train_segmentation(small(), images[:20], masks[:20], **how, checkpoint=checkpoint)


def test_a_segmenter_is_kept_and_read_and_answers_in_batches_of_any_size(tmp_path):
    images, masks = squares(12)
    found = train_segmentation(small(), images, masks, max_iter=2)
    again = Segmenter.load(found.save(tmp_path / "net.safetensors"))
    np.testing.assert_array_equal(again.predict(images), found.predict(images))
    np.testing.assert_allclose(again.predict(images, 5), found.predict(images), atol=1e-5)
    assert again.losses == found.losses
    with pytest.raises(ValueError, match=r"images must be \(n, h, w\) or \(n, c, h, w\), got shape \(8, 8\)"):
        again.predict(images[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        again.predict(images, 0)
    save_fitted(tmp_path / "other.safetensors", kind="Other", arrays={"x": np.ones(2)}, params={})
    with pytest.raises(WrongContent):
        Segmenter.load(tmp_path / "other.safetensors")


def test_the_global_generator_is_not_touched():
    images, masks = squares(6)
    state = torch.random.get_rng_state()
    train_segmentation(small(), images, masks, max_iter=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def with_nan(images):
    images = images.copy()
    images[3, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: train_segmentation(small(), x, y[:5]), r"masks must be \(24, 8, 8\), one an image"),
        (lambda x, y: train_segmentation(small(), x, 3 * y), "masks must be binary"),
        (lambda x, y: train_segmentation(small(), x, 0 * y), "masks must not all be empty"),
        (lambda x, y: train_segmentation(small(), with_nan(x), y), "NaN or infinity in image 3"),
        (lambda x, y: train_segmentation(small(), x[0], y), "images must be"),
        (lambda x, y: train_segmentation(small(), x, y, max_iter=0), "must be at least 1, got 0"),
        (lambda x, y: train_segmentation(MHSUNet(1, 2, (1,), (8,)), x, y), "model must have one class, got 2"),
        (lambda x, y: Segmenter(small(), 0.0, 1.0, []).predict(with_nan(x)), "NaN or infinity in image 3"),
    ],
)
def test_data_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*squares())


def test_a_loss_that_is_no_longer_finite_ends_the_training():
    images, masks = squares()
    model = small()
    with torch.no_grad():
        model.classes.weight.fill_(float("inf"))
    with pytest.raises(NotConverged, match="no longer finite"):
        train_segmentation(model, images, masks, max_iter=3)


SCAN = {
    "input_weight": "x_proj_weight", "step_weight": "dt_projs_weight", "step_bias": "dt_projs_bias",
    "log_rates": "A_logs", "bypass": "Ds",
}  # fmt: skip
BLOCK = {
    "input_norm": "ln_1", "input": "self_attention.in_proj", "conv": "self_attention.conv2d",
    "norm": "self_attention.out_norm", "mix.to_subspaces": "self_attention.mhs.x_ssproj",
    "mix.norm": "self_attention.mhs.cat_norm", "mix.output": "self_attention.mhs.y_proj",
}  # fmt: skip
OUTER = {
    "embedding": "patch_embed.proj", "embedding_norm": "patch_embed.norm", "final.linear": "final_up.expand",
    "final.norm": "final_up.norm", "classes": "final_conv",
}  # fmt: skip


def as_the_authors_keep_it(net, heads="CXSZ"):
    """The state of a network by the authors' names, each head's tensors by themselves, a projection twice."""
    out = {}
    for name, value in net.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("encoder", "decoder"):
            stem = f"{'layers' if parts[0] == 'encoder' else 'layers_up'}.{parts[1]}.blocks.{parts[2]}"
            rest = ".".join(parts[3:])
            if rest.startswith("mix.scan."):
                old = SCAN[parts[-1]]
                for letter, part in zip(heads, value.chunk(len(heads)), strict=True):
                    flat = part.flatten(0, 1) if old in ("A_logs", "Ds") else part
                    out[f"vmunet.{stem}.self_attention.mhs.scanhead_{letter}.mambaeng.{old}"] = flat
                continue
            module, _, kind = rest.rpartition(".")
            out[f"vmunet.{stem}.{BLOCK[module]}.{kind}"] = value
            if module == "mix.to_subspaces":
                out[f"vmunet.{stem}.self_attention.mhs.x_ssproj_W"] = value
        elif parts[0] in ("merges", "expands"):
            up = parts[0] == "expands"
            stem = f"layers_up.{int(parts[1]) + 1}.upsample" if up else f"layers.{parts[1]}.downsample"
            inner = ("expand" if up else "reduction") if parts[2] == "linear" else "norm"
            out[f"vmunet.{stem}.{inner}.{parts[3]}"] = value
        else:
            module, _, kind = name.rpartition(".")
            out[f"vmunet.{OUTER[module]}.{kind}"] = value
    return out


@pytest.mark.parametrize(("heads", "threshold"), [("CXS", 0.0), ("CXSZ", 0.5)])
def test_weights_of_the_authors_code_are_taken_over(heads, threshold):
    net = MHSUNet(
        3, 1, (1, 2), (12, 24), (2, 1), num_heads=len(heads), d_state=2, threshold=threshold, generator=seeded()
    ).eval()
    taken = convert_mhs_vm(as_the_authors_keep_it(net, heads), threshold=threshold)
    x = torch.randn(1, 3, 16, 24, generator=seeded(1))
    assert torch.equal(taken(x), net(x))
    prefixed = {f"module.{name}": value for name, value in as_the_authors_keep_it(net, heads).items()}
    assert torch.equal(convert_mhs_vm(prefixed, threshold=threshold)(x), net(x))


def test_weights_that_are_not_the_authors_are_refused_by_name():
    state = as_the_authors_keep_it(small(), "CX")
    with pytest.raises(ValueError, match=r"got none called 'patch_embed\.proj\.weight'"):
        convert_mhs_vm({"x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"nothing but the network, got \['extra'\]"):
        convert_mhs_vm(state | {"extra": torch.ones(1)})
    gone = dict(state)
    del gone["vmunet.final_up.norm.bias"]
    with pytest.raises(ValueError, match=r"state must hold 'final_up\.norm\.bias'"):
        convert_mhs_vm(gone)


def test_outlines_are_drawn(tmp_path):
    images, masks = squares(3)
    path = plot_segmentation(images, masks, masks.astype(float), tmp_path / "a.svg", titles=["one"])
    again = plot_segmentation(images, masks, masks.astype(float), tmp_path / "b.svg", titles=["one"])
    assert path.read_bytes() == again.read_bytes()
    plot_segmentation(np.stack([images] * 3, axis=1), masks, 0.0 * masks, tmp_path / "c.png")
    with pytest.raises(ValueError, match="must agree"):
        plot_segmentation(images[:2], masks, masks, path)
    with pytest.raises(ValueError, match="images must be at least one"):
        plot_segmentation(images[:0], masks[:0], masks[:0], path)


def test_a_drawing_says_which_outline_is_which(tmp_path, monkeypatch):
    from matplotlib.colors import to_hex

    from polyspan.nn import scan_plots

    drawn = []
    monkeypatch.setattr(scan_plots, "write_picture", lambda figure, path: drawn.append(figure))
    images, masks = squares(2)
    plot_segmentation(images, masks, np.roll(masks, 1, axis=2).astype(float), tmp_path / "a.svg")
    (figure,) = drawn
    (key,) = figure.legends
    told = [(text.get_text(), line.get_color()) for text, line in zip(key.texts, key.legend_handles, strict=True)]
    assert [name for name, _ in told] == ["true mask", "predicted"]
    for axis in figure.axes:
        outlines = [to_hex(part.get_edgecolor()[0]) for part in axis.collections]
        assert outlines == [colour for _, colour in told]


def test_masks_may_be_booleans_and_more_than_are_read_at_once():
    images, masks = squares(70)
    found = train_segmentation(small(), images, masks == 1, max_iter=2)
    assert found.losses == train_segmentation(small(), images, masks, max_iter=2).losses
    late = masks.copy()
    late[69, 0, 0] = 7
    with pytest.raises(ValueError, match=r"masks must be binary, .* got values \[0, 1, 7\]"):
        train_segmentation(small(), images, late, max_iter=2)


def test_other_masks_do_not_go_on_from_a_checkpoint(tmp_path):
    images, masks = squares(6)
    how = {"max_iter": 2, "save_every": 1, "checkpoint": tmp_path / "c.safetensors"}
    train_segmentation(small(), images, masks, **how)
    with pytest.raises(ValueError, match=r"must belong to this fit, got another \['masks'\]"):
        train_segmentation(small(), images, np.maximum(masks, np.eye(8, dtype=np.uint8)), **how)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_rates_out_of_range_are_told(name, value):
    images, masks = squares(6)
    with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {value}"):
        train_segmentation(small(), images, masks, **{name: value})
