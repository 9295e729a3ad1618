import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from polyspan.errors import UntrustedFile, WrongContent
from polyspan.io import write_array, write_members
from polyspan.linalg import coding_rate
from polyspan.nn import (
    CRATE,
    CRATEMAE,
    Lion,
    SparseRateReductionLoss,
    convert_official,
    crate_base,
    crate_large,
    crate_small,
    crate_tiny,
    layer_report,
    load_crate,
    save_crate,
)
from polyspan.nn.rate_report_plots import plot_layer_rates, plot_masks
from polyspan.run import torch_generator


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch_generator(seed))


def small(num_classes=5, seed=0, **options):
    sizes = {"dim": 12, "depth": 3, "num_heads": 2, "head_dim": 4} | options
    return CRATE((8, 12), 4, num_classes, generator=torch_generator(seed), **sizes).eval()


def official(depth=2, dim=12, inner=8, patch=4, n=6, classes=5):
    """Weights by the names and shapes of the authors' classifier, drawn at random."""
    width = patch * patch * 3
    shapes = {
        "pos_embedding": (1, n + 1, dim), "cls_token": (1, 1, dim),
        "to_patch_embedding.1.weight": (width,), "to_patch_embedding.1.bias": (width,),
        "to_patch_embedding.2.weight": (dim, width), "to_patch_embedding.2.bias": (dim,),
        "to_patch_embedding.3.weight": (dim,), "to_patch_embedding.3.bias": (dim,),
        "mlp_head.0.weight": (dim,), "mlp_head.0.bias": (dim,),
        "mlp_head.1.weight": (classes, dim), "mlp_head.1.bias": (classes,),
    }  # fmt: skip
    for i in range(depth):
        at = f"transformer.layers.{i}"
        for half in (0, 1):
            shapes[f"{at}.{half}.norm.weight"] = shapes[f"{at}.{half}.norm.bias"] = (dim,)
        shapes[f"{at}.0.fn.qkv.weight"] = (inner, dim)
        shapes[f"{at}.0.fn.to_out.0.weight"], shapes[f"{at}.0.fn.to_out.0.bias"] = (dim, inner), (dim,)
        shapes[f"{at}.1.fn.weight"] = (dim, dim)
    return {name: draw(*shape, seed=i) / 3 for i, (name, shape) in enumerate(shapes.items())}


def literal_attention(w, s, at, heads, name="fn"):
    """Attention of the authors' code, head by head; rows are the tokens of one image."""
    out = []
    for u in (w @ s[f"{at}.{name}.qkv.weight"].T).chunk(heads, dim=1):
        out.append(((u @ u.T) / math.sqrt(u.shape[1])).softmax(dim=1) @ u)
    return torch.cat(out, 1) @ s[f"{at}.{name}.to_out.0.weight"].T + s[f"{at}.{name}.to_out.0.bias"]


def norm(x, s, at):
    return F.layer_norm(x, x.shape[-1:], s[f"{at}.weight"], s[f"{at}.bias"])


def literal_block(x, s, at, heads, eta, lambd):
    x = x + literal_attention(norm(x, s, f"{at}.0.norm"), s, f"{at}.0", heads)
    y, D = norm(x, s, f"{at}.1.norm"), s[f"{at}.1.fn.weight"]
    return F.relu(y + eta * (y @ D - (y @ D.T) @ D) - eta * lambd)


def cut(image, patch):
    """Patches by rows, the values of each by rows with channels last."""
    _, h, w = image.shape
    return torch.stack(
        [
            torch.stack([image[:, r + i, c + j] for i in range(patch) for j in range(patch)]).flatten()
            for r in range(0, h, patch)
            for c in range(0, w, patch)
        ]
    )


def literal_logits(image, s, heads, depth):
    """The whole network of the authors' code on one image, from its description."""
    t = "to_patch_embedding"
    x = norm(cut(image, 4), s, f"{t}.1") @ s[f"{t}.2.weight"].T + s[f"{t}.2.bias"]
    x = torch.cat([s["cls_token"][0], norm(x, s, f"{t}.3")]) + s["pos_embedding"][0]
    for i in range(depth):
        x = literal_block(x, s, f"transformer.layers.{i}", heads, 0.1, 0.1)
    return norm(x[0], s, "mlp_head.0") @ s["mlp_head.1.weight"].T + s["mlp_head.1.bias"]


# oracles


def test_official_weights_give_the_logits_of_a_literal_network(tmp_path):
    state, images = official(), draw(3, 3, 8, 12)
    made = convert_official(state, num_heads=2, image_size=(8, 12))
    expected = torch.stack([literal_logits(image, state, 2, 2) for image in images])
    torch.testing.assert_close(made(images), expected, atol=1e-5, rtol=1e-5)
    write_members(tmp_path / "w.safetensors", {f"module.{name}": v.numpy() for name, v in state.items()})
    again = convert_official(tmp_path / "w.safetensors", num_heads=2, image_size=(8, 12))
    assert torch.equal(again(images), made(images))
    wrapped = convert_official({"epoch": 3, "state_dict": state}, num_heads=2, image_size=(8, 12))
    assert torch.equal(wrapped(images), made(images))


def official_mae(depth=2, dim=12, patch=4, side=2):
    n, inner = side * side, dim
    s = {"cls_token": (1, 1, dim), "mask_token": (1, 1, dim)}
    s |= {"pos_embed": (1, n + 1, dim), "decoder_embed.weight": (dim, dim), "decoder_embed.bias": (dim,)}
    s |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    s |= {"decoder_pred.weight": (patch * patch * 3, dim), "decoder_pred.bias": (patch * patch * 3,)}
    for name in ("norm", "decoder_norm"):
        s[f"{name}.weight"] = s[f"{name}.bias"] = (dim,)
    for tower, first in (("blocks", "0"), ("decoder_blocks", "1")):
        for i in range(depth):
            at = f"{tower}.{i}.layers.0"
            for half in (0, 1):
                s[f"{at}.{half}.norm.weight"] = s[f"{at}.{half}.norm.bias"] = (dim,)
            s[f"{at}.{first}.fn.qkv.weight"] = (inner, dim)
            s[f"{at}.{first}.fn.to_out.0.weight"], s[f"{at}.{first}.fn.to_out.0.bias"] = (dim, inner), (dim,)
            s[f"{at}.{1 - int(first)}.fn.weight"] = (dim, dim)
    state = {name: draw(*shape, seed=i) / 3 for i, (name, shape) in enumerate(s.items())}
    return state | {"decoder_pos_embed": literal_positions(dim, side)}


def literal_positions(dim, side):
    """Entry by entry: the column in the first half, the row in the second, sines before cosines."""
    table = torch.zeros(1, side * side + 1, dim)
    for row in range(side):
        for column in range(side):
            for half, place in enumerate((column, row)):
                for j in range(dim // 4):
                    angle = place / 10_000 ** (j / (dim // 4))
                    at = half * dim // 2 + j
                    table[0, 1 + row * side + column, at] = math.sin(angle)
                    table[0, 1 + row * side + column, at + dim // 4] = math.cos(angle)
    return table


def test_official_auto_encoder_weights_give_the_pixels_of_a_literal_network():
    s, image = official_mae(), draw(1, 3, 8, 8)
    made = convert_official(s, num_heads=2)
    mask = torch.tensor([[True, False, True, True]])
    kernel = s["patch_embed.proj.weight"]
    x = F.conv2d(image, kernel, s["patch_embed.proj.bias"], stride=4).flatten(2)[0].T
    x = torch.where(mask[0, :, None], s["mask_token"][0], x)
    x = torch.cat([s["cls_token"][0], x]) + s["decoder_pos_embed"][0]
    for i in range(2):
        x = literal_block(x, s, f"blocks.{i}.layers.0", 2, 0.1, 0.5)
    x = norm(x, s, "norm")
    for i in range(2):
        at = f"decoder_blocks.{i}.layers.0"
        y = norm(x, s, f"{at}.0.norm") @ s[f"{at}.0.fn.weight"].T
        x = y - literal_attention(norm(y, s, f"{at}.1.norm"), s, f"{at}.1", 2)
    pixels = norm(x, s, "decoder_norm") @ s["decoder_pred.weight"].T + s["decoder_pred.bias"]
    torch.testing.assert_close(made(image, mask)[0], pixels[1:], atol=1e-4, rtol=1e-4)
    expected = (pixels[1:] - cut(image[0], 4)).square().mean(dim=1)[mask[0]].mean()
    torch.testing.assert_close(made.loss(image, mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "millions"), [(crate_tiny, 6.09), (crate_small, 13.12), (crate_base, 22.80), (crate_large, 77.64)]
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(make, millions):
    assert sum(p.numel() for p in make(device="meta").parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_auto_encoder_starts_with_the_fixed_positions():
    made = CRATEMAE(12, 4, 8, 1, 2)
    torch.testing.assert_close(made.positions, literal_positions(8, 3))
    assert "positions" not in dict(made.named_parameters())


def literal_rate(Z, U, eps2):
    """Half the log-determinant of the N x N matrix for every head, tokens brought to length 1."""
    total = 0.0
    for basis in U:
        w = F.normalize(Z @ basis, dim=1).double()
        n, p = w.shape
        total += 0.5 * torch.logdet(torch.eye(n) + p / (n * eps2) * w @ w.T)
    return total


@pytest.mark.parametrize("where", ["half", "input"])
def test_the_report_agrees_with_literal_rates_and_shares(where):
    model, images = small(), draw(5, 3, 8, 12)
    told = layer_report(model, [images[:2], (images[2:], "labels")], where=where)
    states = model.forward_states(images)
    for i, block in enumerate(model.blocks):
        Z = F.layer_norm(states.halves[i], (12,)) if where == "half" else block.attention_norm(states.outputs[i])
        own = torch.stack([literal_rate(z, block.attention.bases, 0.01) for z in Z]).mean()
        assert told.rate_within[i] == pytest.approx(own.item(), rel=1e-4)
        assert told.rate[i] == pytest.approx(coding_rate(F.normalize(Z, dim=-1), 0.1).mean().item(), rel=1e-4)
        assert told.nonzero_share[i] == pytest.approx((states.outputs[i + 1] != 0).double().mean().item())
    assert told.n_items == 5
    assert told.names == ["blocks.0", "blocks.1", "blocks.2"]
    assert told.to_json()["rate"] == told.rate.tolist()
    whole = layer_report(model, images, where=where)
    assert whole.n_items == 5
    np.testing.assert_allclose(whole.rate_within, told.rate_within, rtol=1e-5)


def test_a_tensor_of_more_items_than_are_measured_at_once_is_their_mean():
    model, images = small(), draw(300, 3, 8, 12)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    told = layer_report(model, images)
    handle.remove()
    assert seen == [256, 44]
    again = layer_report(model, [images[:100], images[100:]])
    assert told.n_items == again.n_items == 300
    for a, b in zip(told[1:6], again[1:6], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_turned_subspaces_are_as_good_as_learnt_ones_for_tokens_without_structure():
    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = small(dim=16).blocks[0]

        def forward(self, x):
            return self.block(x)

    noise = Noise()
    told = layer_report(noise, [draw(400, 10, 16)], where="input", n_random=8)
    assert told.rate_random == pytest.approx(told.rate_within, rel=0.01)
    with torch.no_grad():
        noise.block.attention.projection.weight[:, 4:] = 0
    lined = draw(400, 10, 16) * (torch.arange(16) < 4)
    told = layer_report(noise, [lined + 0.05 * draw(400, 10, 16, seed=1)], where="input", n_random=8)
    assert told.rate_random != pytest.approx(told.rate_within, rel=0.02)


def test_the_report_measures_layers_of_any_network_and_leaves_no_hook():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(layer, torch.nn.ReLU()).train()
    x = draw(4, 6, 8)
    told = layer_report(model, [x], layers=["0", "1"])
    assert np.isnan(told.rate_within).all()
    out = model(x)
    assert told.nonzero_share[1] == pytest.approx((out > 0).double().mean().item())
    assert told.rate[1] == pytest.approx(coding_rate(F.normalize(out, dim=-1), 0.1).mean().item(), rel=1e-4)
    assert model.training
    assert layer.training
    assert not model[0]._forward_hooks


def test_orthogonal_subspaces_have_no_incoherence_and_equal_ones_all():
    model = small(depth=1, dim=12)
    with torch.no_grad():
        model.blocks[0].attention.projection.weight.copy_(torch.eye(12)[:8] * 3)
    assert layer_report(model, [draw(2, 3, 8, 12)]).incoherence[0] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.blocks[0].attention.projection.weight.copy_(torch.eye(12)[:4].repeat(2, 1))
    assert layer_report(model, [draw(2, 3, 8, 12)]).incoherence[0] == pytest.approx(2)


def test_dead_tokens_are_counted():
    model = small(depth=1, block={"lambd": 1e6})
    told = layer_report(model, [draw(2, 3, 8, 12)])
    assert told.dead_share[0] == 1
    assert told.nonzero_share[0] == 0
    assert torch.isfinite(model(draw(2, 3, 8, 12))).all()


def test_the_loss_asks_for_what_the_report_measures():
    model, images = small(), draw(4, 3, 8, 12)
    states = model.forward_states(images)
    told = layer_report(model, [images])
    loss = SparseRateReductionLoss([0, 2.0, 0], lambd=0)
    normed = [F.layer_norm(h, (12,)) for h in states.halves]
    value = loss(normed, [b.attention.bases for b in model.blocks]).mean().item()
    assert value == pytest.approx(2 * (told.rate_within[1] - told.rate[1]), rel=1e-4)
    sparse = SparseRateReductionLoss([0, 1.0, 0], lambd=0.5).of(model, states)
    plain = SparseRateReductionLoss([0, 1.0, 0], lambd=0).of(model, states)
    torch.testing.assert_close(sparse - plain, 0.5 * states.outputs[2].sum(-1).mean(-1), atol=1e-4, rtol=1e-4)


def test_gradients_of_the_loss_are_finite_at_a_zero_token():
    Z = torch.zeros(2, 4, 8).index_fill(1, torch.tensor([1, 2]), 0.7).requires_grad_()
    SparseRateReductionLoss(eps2=0.1)(Z, draw(2, 8, 3), Z).sum().backward()
    assert torch.isfinite(Z.grad).all()


def test_lion_follows_its_formula():
    theta = torch.nn.Parameter(draw(5))
    optimiser = Lion([theta], lr=0.1, weight_decay=0.5)
    x, m = theta.detach().clone(), torch.zeros(5)
    for step in range(3):
        optimiser.zero_grad()
        gradient = draw(5, seed=step + 1)
        loss = optimiser.step(lambda g=gradient: ((theta * g).sum().backward(), 7)[1])
        x = x - 0.1 * (torch.sign(0.9 * m + 0.1 * gradient) + 0.5 * x)
        m = 0.99 * m + 0.01 * gradient
        assert loss == 7
    torch.testing.assert_close(theta.detach(), x)
    with pytest.raises(ValueError, match="betas must be two numbers, each at least 0 and below 1"):
        Lion([theta], betas=(1.0, 0.5))
    with pytest.raises(ValueError, match="lr and weight_decay must be finite and at least 0, got -1 and 0"):
        Lion([theta], lr=-1, weight_decay=0)


# laws and options


def test_states_features_and_checkpointing_agree_with_the_forward_pass():
    model, images = small(), draw(2, 3, 8, 12)
    states = model.forward_states(images)
    assert torch.equal(states.logits, model(images))
    assert torch.equal(states.outputs[-1], model.forward_features(images))
    twin = small(gradient_checkpointing=True).train()
    model.train()
    model(images).square().sum().backward()
    twin(images).square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("causal", [False, True])
def test_patches_that_are_left_out_change_nothing(pool, causal):
    model = small(pool=pool, causal=causal)
    images, mask = draw(2, 3, 8, 12), torch.tensor([[True] * 6, [True, True, False, True, True, False]])
    spoilt = images.clone()
    spoilt[1, :, :, 8:] = 100.0
    mask[1] = torch.tensor([True, True, False, True, True, False])
    torch.testing.assert_close(model(spoilt, mask), model(images, mask))
    torch.testing.assert_close(model(images, torch.ones(2, 6, dtype=torch.bool)), model(images))


def test_a_causal_network_with_a_class_token_still_sees_the_whole_image():
    model, images = small(causal=True), draw(1, 3, 8, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    per_patch = gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum(dim=(0, 1, 4, 5))
    assert (per_patch > 0).all()


def test_positions_are_interpolated_on_request_only():
    model = small(0)
    with pytest.raises(ValueError, match="images must be 8 by 12 pixels, got 16 by 12; interpolate_pos_encoding=True"):
        model(draw(1, 3, 16, 12))
    assert model(draw(1, 3, 16, 12), interpolate_pos_encoding=True).shape == (1, 12)
    with torch.no_grad():
        model.positions[:, 1:] = 0.5
    grown = model.embed(draw(1, 3, 16, 24), interpolate_pos_encoding=True)
    zero = small(0)
    with torch.no_grad():
        zero.positions.copy_(model.positions).index_fill_(1, torch.arange(1, 7), 0)
    torch.testing.assert_close(
        grown[:, 1:] - zero.embed(draw(1, 3, 16, 24), interpolate_pos_encoding=True)[:, 1:],
        torch.full((1, 24, 12), 0.5),
    )


def test_attention_maps_are_rows_of_the_whole_map():
    model, images = small(), draw(2, 3, 8, 12)
    maps = model.attention_maps(images, 1)
    x = model.blocks[0](model.embed(images))
    whole = model.blocks[1].attention.attention_map(model.blocks[1].attention_norm(x))
    torch.testing.assert_close(maps, whole[:, :, 0, 1:].unflatten(-1, (2, 3)))
    last = small(causal=True).attention_maps(images)
    assert last.shape == (2, 2, 2, 3)
    assert (last.sum(dim=(2, 3)) < 1).all()


def test_a_new_head_leaves_the_rest_alone():
    model, images = small(), draw(2, 3, 8, 12)
    before = model.forward_features(images)
    model.reset_head(7, generator=torch_generator(1))
    assert model(images).shape == (2, 7)
    assert torch.equal(model.forward_features(images), before)
    assert CRATE(**model.config)(images).shape == (2, 7)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        model.reset_head(0)


def test_masks_hide_the_share_that_was_asked_for_and_completion_keeps_the_rest():
    made = CRATEMAE((8, 12), 4, 8, 1, 2, mask_ratio=0.5, generator=torch_generator(0))
    images, mask = draw(3, 3, 8, 12), made.draw_mask(3, torch_generator(1))
    assert mask.sum(dim=1).tolist() == [3, 3, 3]
    assert not torch.equal(mask, made.draw_mask(3, torch_generator(2)))
    filled = made.complete(images, mask)
    hidden = mask.reshape(3, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(images)
    torch.testing.assert_close(filled[~hidden], images[~hidden])
    assert (filled[hidden] != images[hidden]).all()
    spoilt = torch.where(hidden, 9.0, images)
    torch.testing.assert_close(made(spoilt, mask), made(images, mask))


def test_normalised_targets_are_undone_by_completion():
    made = CRATEMAE(8, 4, 8, 1, 2, norm_pixels=True, channels=1, generator=torch_generator(0))
    images = 5 + 2 * draw(2, 1, 8, 8)
    targets = made.targets(images)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std(-1), torch.ones(2, 4), atol=1e-3, rtol=0)
    with torch.no_grad():
        made.prediction.weight.zero_()
        made.prediction.bias.zero_()
    filled = made.complete(images, torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(filled.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))


def test_masked_training_completes_images_that_can_be_completed():
    made = CRATEMAE(8, 4, 16, 2, 2, channels=1, mask_ratio=0.5, generator=torch_generator(0))
    ramp = torch.linspace(-1, 1, 8)
    images = draw(32, 1, 1, 1) * ramp[:, None] + draw(32, 1, 1, 1, seed=1) * ramp
    optimiser, generator = torch.optim.AdamW(made.parameters(), lr=1e-2), torch_generator(1)
    losses = []
    for _ in range(160):
        optimiser.zero_grad()
        loss = made.loss(images, generator=generator)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * images.var().item()


def test_checkpointed_masked_training_has_the_same_gradients():
    plain, saving = (
        CRATEMAE(8, 4, 8, 2, 2, gradient_checkpointing=flag, generator=torch_generator(0)) for flag in (False, True)
    )
    images, mask = draw(2, 3, 8, 8), plain.draw_mask(2, torch_generator(0))
    for made in (plain, saving):
        made.loss(images, mask).backward()
    for mine, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_network_is_kept_in_a_file(tmp_path):
    model, images = small(block={"step": "eq10", "eta": 0.2}), draw(2, 3, 8, 12)
    read = load_crate(save_crate(model, tmp_path / "m.safetensors"))
    assert torch.equal(read(images), model(images))
    assert read.config == model.config
    narrow = load_crate(save_crate(small().bfloat16(), tmp_path / "narrow.safetensors"))
    torch.testing.assert_close(narrow.head.weight, small().head.weight.bfloat16().float(), rtol=0, atol=0)
    write_array(tmp_path / "x.npy", images.numpy())
    with pytest.raises(WrongContent):
        load_crate(tmp_path / "x.npy")


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CRATE(30, 16, 5, 8, 1, 2),
            r"image_size must be a multiple of patch_size, got \(30, 30\) and \(16, 16\)",
        ),
        (lambda: CRATE(16, 8, 5, 8, 0, 2), "depth and channels must be at least 1 .* got 0, 3 and 5"),
        (lambda: CRATE(16, 8, 5, 8, 1, 2, pool="max"), "pool must be 'cls' or 'mean', got 'max'"),
        (lambda: small()(draw(2, 1, 8, 12)), r"images must be \(B, 3, h, w\), got shape \(2, 1, 8, 12\)"),
        (
            lambda: small()(draw(2, 3, 9, 12), interpolate_pos_encoding=True),
            r"image_size must be a multiple of patch_size, got \(9, 12\) and \(4, 4\)",
        ),
        (lambda: CRATEMAE(8, 4, 8, 1, 2, mask_ratio=1.0), "mask_ratio must be between 0 and 1, got 1.0"),
        (lambda: CRATEMAE(8, 8, 8, 1, 2), "there must be at least 2 patches"),
        (lambda: CRATEMAE(8, 4, 6, 1, 2), "dim must be a multiple of 4 for sine-cosine positions, got 6"),
        (lambda: CRATEMAE(8, 4, 8, 0, 2), "depth, decoder_depth and channels must be at least 1, got 0, 0 and 3"),
        (
            lambda: CRATEMAE(8, 4, 8, 1, 2)(draw(1, 3, 8, 8), torch.ones(1, 3, dtype=torch.bool)),
            r"mask must be \(1, 4\), true or false for each patch, got \(1, 3\) of torch.bool",
        ),
        (lambda: layer_report(small(), [], eps2=0.0), "eps2 must be positive and finite, got 0.0"),
        (lambda: layer_report(small(), [], where="end"), "where must be 'half' or 'input', got 'end'"),
        (lambda: layer_report(small(), [], n_random=0), "n_random must be at least 1, got 0"),
        (
            lambda: small()(draw(2, 3, 8, 12), torch.ones(2, 5, dtype=torch.bool)),
            r"mask must be \(2, 6\), true or false for each patch, got \(2, 5\) of torch.bool",
        ),
        (
            lambda: small().forward_states(draw(2, 3, 8, 12), torch.ones(2, 7, dtype=torch.bool)),
            r"mask must be \(2, 6\), true or false for each patch, got \(2, 7\)",
        ),
        (lambda: layer_report(small(), []), "batches must hold at least one item, got none"),
        (lambda: layer_report(small(), [np.ones((2, 3, 8, 12))]), "batches must hold tensors, got ndarray"),
        (lambda: layer_report(small(), draw(0, 3, 8, 12)), "batches must hold at least one item, got none"),
        (lambda: layer_report(small(), draw(5)), r"items \(n, ...\), got a tensor of 1 dimensions"),
        (lambda: layer_report(small(), [], layers=["head", "tail"]), r"layers must name submodules, got \['tail'\]"),
        (lambda: layer_report(torch.nn.ReLU(), []), "layers must name submodules, got none, and the model has no"),
        (
            lambda: layer_report(small(), [draw(2, 3, 8, 12)], layers=["head"]),
            r"head must return tokens \(B, N, d\), got torch.Size\(\[2, 5\]\)",
        ),
        (
            lambda: layer_report(torch.nn.Sequential(torch.nn.ReLU()), [draw(2, 1, 4)], layers=["0"]),
            "0 must have at least 2 tokens, got 1",
        ),
        (
            lambda: layer_report(small(), [draw(2, 3, 8, 12) * math.nan]),
            "blocks.0 must have finite tokens, got NaN or infinity",
        ),
        (lambda: SparseRateReductionLoss([]), "weights must be finite, at least 0 and one a layer"),
        (lambda: SparseRateReductionLoss(eps2=-1.0), "eps2 must be positive and finite, got -1.0"),
        (lambda: SparseRateReductionLoss(lambd=-1.0), "lambd must be finite and at least 0, got -1.0"),
        (
            lambda: SparseRateReductionLoss([1.0, 1.0])(draw(1, 4, 8), draw(2, 8, 3)),
            "as many halves, bases and outputs as weights, 2, got 1, 1 and 1",
        ),
        (lambda: convert_official({"pos_embedding": draw(1, 5, 8)}), "got none for .*patch_embedding.weight"),
        (lambda: convert_official(official() | {"extra": draw(1)}, num_heads=2), r"left over, \['extra'\]"),
        (lambda: convert_official(official(n=4)), "num_heads must be given for width 12"),
        (lambda: convert_official(official(n=4), num_heads=3), "num_heads must divide 8, got 3"),
        (lambda: convert_official(official(), num_heads=2), "image_size must be given for 6 patches"),
        (
            lambda: convert_official(official(), num_heads=2, channels=5),
            "channels must fit patches of 48 values, got 5",
        ),
        (
            lambda: convert_official({k: v for k, v in official(n=4).items() if "fn.weight" not in k}, num_heads=2),
            "got none for .*blocks.0.ista.weight",
        ),
        (
            lambda: convert_official(official(n=4) | {"cls_token": draw(1, 1, 3)}, num_heads=2),
            r"source must have shapes that fit together, got .*cls_token",
        ),
    ],
)
def test_what_cannot_be_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_checkpoint_without_a_head_gives_features():
    state = {name: value for name, value in official(n=4).items() if not name.startswith("mlp_head")}
    made = convert_official(state, num_heads=2)
    features = made(draw(2, 3, 8, 8))
    assert features.shape == (2, 12)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)


def test_a_torch_pickle_is_refused(tmp_path):
    torch.save(official(), tmp_path / "w.pth")
    with pytest.raises(UntrustedFile):
        convert_official(tmp_path / "w.pth")


def test_pictures_are_drawn_the_same_twice(tmp_path):
    model, images = small(), draw(3, 3, 8, 12)
    told = layer_report(model, [images])
    first = plot_layer_rates(told, tmp_path / "a.svg").read_bytes()
    assert first == plot_layer_rates(told, tmp_path / "b.svg").read_bytes()
    for word in (b"<svg", b"learnt subspaces", b"non-zero"):
        assert word in first
    assert plot_masks(images, model.attention_maps(images), tmp_path / "m.png").stat().st_size > 2000
    with pytest.raises(ValueError, match=r"path must end in \.svg, \.png or \.pdf"):
        plot_layer_rates(told, tmp_path / "a.txt")
