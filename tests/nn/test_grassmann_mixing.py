import inspect
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import save_fitted, write_members
from polyspan.nn import (
    CausalGrassmannMixing,
    GrassmannBlock,
    GrassmannLM,
    GrassmannPairHead,
    GrassmannSequenceClassifier,
    plane_angles,
    plucker_coordinates,
    plucker_relations_residual,
    score_next_token,
    train_next_token,
)
from polyspan.nn._rival_mixers import CausalAttention, NoMixing, ShiftedMixing
from polyspan.run import torch_generator


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch_generator(seed), dtype=dtype)


def layer(d=6, r=5, offsets=(1, 2, 4), seed=0, dtype=torch.float64, scale=8.0, **options):
    made = CausalGrassmannMixing(d, r, offsets, generator=torch_generator(seed), dtype=dtype, **options).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" not in name:
                p.mul_(scale)
                if name.endswith("bias"):
                    p.copy_(normal(*p.shape, seed=seed + 1, dtype=dtype) / 4)
    return made


def lm(vocab=11, d=8, layers=2, r=4, offsets=(1, 2, 3), seed=0, dtype=torch.float64, **options):
    made = GrassmannLM(
        vocab, d, layers, r, offsets, generator=torch_generator(seed), dtype=dtype, **{"max_length": 40} | options
    ).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(10)
    return made


def tokens(*shape, vocab=11, seed=0):
    return torch.randint(vocab, shape, generator=torch_generator(seed))


def literal(module, x, mask=None):
    """The layer token by token and offset by offset, written from the formula."""
    out = torch.zeros_like(x)
    head = module.r // module.num_heads
    weight = module.plane.weight.unflatten(-1, (module.num_heads, -1))
    factors = module.offset_weight
    signs = (1,) if module.causal else (1, -1)
    for t in range(len(x)):
        z, parts = module.reduction(x), []
        for n, o in enumerate(s * o for s in signs for o in module.offsets):
            if not 0 <= t - o < len(x) or (mask is not None and not mask[t - o]):
                continue
            g = torch.zeros(x.shape[-1], dtype=x.dtype)
            for h in range(module.num_heads):
                u, v = (z[s, h * head : (h + 1) * head] for s in (t, t - o))
                p = torch.stack([u[i] * v[j] - u[j] * v[i] for i in range(head) for j in range(i + 1, head)])
                if module.norm == "l2":
                    p = p / p.norm().clamp(min=1e-8)
                elif module.norm == "smooth":
                    p = p / (p.norm() + 1e-4 * u.norm() * v.norm())
                g = g + weight[:, h] @ p
            parts.append(g * (1 if factors is None else factors[n]))
        g = torch.zeros(x.shape[-1], dtype=x.dtype)
        if parts:
            g = sum(parts) / len(parts) + (0 if module.plane.bias is None else module.plane.bias)
        y = g
        if module.gating is not None:
            alpha = torch.sigmoid(module.gating(torch.cat([x[t], g])))
            y = alpha * x[t] + (1 - alpha) * g
        if module.layer_norm is not None:
            y = module.layer_norm(y)
        out[t] = y if module.output is None else module.output(y)
    return out


# Laws of Plücker coordinates


@given(r=st.integers(2, 7), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_coordinates_belong_to_the_oriented_plane_not_to_its_basis(r, seed):
    u, v = normal(2, r, seed=seed)
    p = plucker_coordinates(u, v)
    torch.testing.assert_close(p.norm(), torch.ones((), dtype=p.dtype))
    torch.testing.assert_close(plucker_coordinates(v, u), -p, atol=1e-9, rtol=0)
    (a, b), (c, d) = normal(2, 2, seed=seed + 1)
    if abs(a * d - b * c) > 0.05:
        turned = plucker_coordinates(a * u + b * v, c * u + d * v)
        torch.testing.assert_close(turned, torch.sign(a * d - b * c) * p, atol=1e-8, rtol=0)
    sheared = plucker_coordinates(u, v + 3 * u, normalize=False)
    torch.testing.assert_close(sheared, plucker_coordinates(u, v, normalize=False), atol=1e-12, rtol=0)


def test_coordinates_are_the_two_by_two_minors():
    u, v = normal(2, 3, 5)
    p = plucker_coordinates(u, v, normalize=False)
    for n, (i, j) in enumerate(combinations(range(5), 2)):
        minor = torch.linalg.det(torch.stack([u[:, [i, j]], v[:, [i, j]]], dim=1))
        torch.testing.assert_close(p[:, n], minor)


def test_planes_fulfil_the_relations_and_sums_of_planes_do_not():
    planes = plucker_coordinates(normal(6, 5), normal(6, 5, seed=1))
    assert plucker_relations_residual(planes).max() < 1e-14
    assert plucker_relations_residual(planes[:3] + planes[3:]).min() > 1e-2
    through_one_line = plucker_coordinates(normal(5).expand(6, 5), normal(6, 5, seed=1)).mean(dim=0)
    assert plucker_relations_residual(through_one_line) < 1e-14
    assert plucker_relations_residual(normal(4, 3)).tolist() == [0] * 4


def test_cosines_of_the_angles_multiply_to_the_inner_product_of_coordinates():
    u, v, w, x = normal(4, 20, 6)
    angles = plane_angles(u, v, w, x)
    inner = (plucker_coordinates(u, v) * plucker_coordinates(w, x)).sum(dim=-1)
    torch.testing.assert_close(angles.cos().prod(dim=-1), inner.abs())
    assert plane_angles(u, v, u + v, v - 2 * u).abs().max() < 1e-7


def test_parallel_vectors_have_no_coordinates():
    u = normal(4, 5)
    assert plucker_coordinates(u, -2 * u, normalize=False).abs().max() < 1e-15
    zero = torch.zeros(3, requires_grad=True)
    p = plucker_coordinates(zero, zero)
    assert p.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(p.sum(), zero)
    assert torch.isfinite(gradient).all()


def test_impossible_coordinates_are_refused():
    with pytest.raises(ValueError, match="u must have at least 2 coordinates, got 1"):
        plucker_coordinates(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="v must have 4 coordinates, as u, got 5"):
        inspect.unwrap(plucker_coordinates)(torch.ones(4), torch.ones(5))  # without the tests' own check of shapes
    with pytest.raises(ValueError, match=r"p must have r \(r - 1\) / 2 coordinates for some r, got 5"):
        plucker_relations_residual(torch.ones(5))


# The layer against its literal twin


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "l2", "out_proj": True},
        {"norm": "none", "gate": "none", "layer_norm": False},
        {"r": 6, "num_heads": 2, "per_offset_weight": True},
        {"causal": False, "per_offset_weight": True},
        {"bias": False},
    ],
    ids=str,
)
def test_the_fast_form_equals_the_literal_one(options):
    module, x = layer(**options), normal(9, 6, seed=3)
    with torch.no_grad():
        if module.offset_weight is not None:
            module.offset_weight.copy_(normal(len(module.offset_weight), seed=5))
    torch.testing.assert_close(module(x), literal(module, x), atol=1e-11, rtol=1e-10)
    mask = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0])
    torch.testing.assert_close(module(x, mask), literal(module, x, mask), atol=1e-11, rtol=1e-10)


def test_both_ways_of_projecting_agree_with_their_gradients():
    module = layer(offsets=(1, 3))
    x = normal(80, 6, seed=1).requires_grad_()
    y = module(x)
    parts = torch.cat([module(x[None, : 40 + 3])[0, :40], module(x[37:])[3:]])
    torch.testing.assert_close(y[:40], parts[:40])
    torch.testing.assert_close(y[43:], parts[43:])
    weights = normal(80, 6, seed=2)
    weights[37:46] = 0
    long = torch.autograd.grad((y * weights).sum(), [x, module.plane.weight])
    short = torch.autograd.grad((parts * weights).sum(), [x, module.plane.weight])
    for a, b in zip(long, short, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_is_the_formula_of_its_order(norm_first):
    block = GrassmannBlock(6, 4, (1, 2), generator=torch_generator(0), norm_first=norm_first, dtype=torch.float64)
    x = normal(2, 7, 6)
    block.eval()
    if norm_first:
        h = x + block.mixing(block.mixing_norm(x))
        expected = h + block.ffn(block.ffn_norm(h))
    else:
        m = block.mixing(x)
        expected = block.ffn_norm(m + block.ffn(m))
    torch.testing.assert_close(block(x), expected, atol=0, rtol=0)


# Causality and reach


@pytest.mark.parametrize("t", [0, 1, 6, 13])
def test_a_later_token_changes_no_bit_of_what_comes_before(t):
    module, model = layer(dtype=torch.float32), lm(dtype=torch.float32)
    x, ids = normal(2, 15, 6, dtype=torch.float32), tokens(2, 15)
    other, other_ids = x.clone(), ids.clone()
    other[:, t + 1 :] += 1
    other_ids[:, t + 1 :] = (ids[:, t + 1 :] + 1) % 11
    assert torch.equal(module(x)[:, : t + 1], module(other)[:, : t + 1])
    assert not torch.equal(module(x)[:, t + 1 :], module(other)[:, t + 1 :])
    assert torch.equal(model(ids)[:, : t + 1], model(other_ids)[:, : t + 1])
    assert not torch.equal(model(ids)[:, t + 1 :], model(other_ids)[:, t + 1 :])


def test_the_jacobian_is_zero_exactly_beyond_the_sum_of_the_largest_offsets():
    blocks = nn.Sequential(*(GrassmannBlock(6, 4, o, generator=torch_generator(i), dtype=torch.float64)
                             for i, o in enumerate([(1, 3), (2,)]))).eval()  # fmt: skip
    x = normal(9, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(blocks(x)[8].square().sum(), x)
    depends = gradient.abs().amax(dim=1) > 0
    assert depends.tolist() == [t in (8, 7, 6, 5, 3) for t in range(9)]
    assert lm(offsets=((1, 3), (2,))).receptive_field == 5


def test_a_layer_that_is_not_causal_looks_ahead_as_far_as_back():
    module = layer(causal=False, offsets=(2,))
    x = normal(9, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[4].square().sum(), x)
    assert [t for t in range(9) if gradient[t].abs().max() > 0] == [2, 4, 6]


def test_the_first_token_is_scaled_by_its_gate_alone():
    module, x = layer(layer_norm=False), normal(6, 6)
    alpha = torch.sigmoid(module.gating(torch.cat([x[0], torch.zeros(6, dtype=x.dtype)])))
    torch.testing.assert_close(module(x)[0], alpha * x[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(side):
    model, ids = lm(), tokens(2, 8)
    pad, real = torch.full((2, 5), 3), torch.ones(2, 8)
    pieces = [pad, ids] if side == "left" else [ids, pad]
    masks = [0 * pad, real] if side == "left" else [real, 0 * pad]
    found = model(torch.cat(pieces, 1), torch.cat(masks, 1))
    torch.testing.assert_close(found[:, 5:] if side == "left" else found[:, :8], model(ids))


# Streaming


@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_reading_in_pieces_equals_reading_at_once(cuts, seed):
    model, ids = lm(seed=seed), tokens(2, sum(cuts), seed=seed)
    state, found = model.init_state(2), []
    sizes = {part.numel() for kept in state.layers for part in kept}
    for piece in ids.split(cuts, dim=1):
        logits, state = model(piece, state=state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids))
    assert {part.numel() for kept in state.layers for part in kept} == sizes
    assert state.position.tolist() == [sum(cuts)] * 2


def test_float32_token_by_token_is_within_rounding_of_the_whole():
    model, ids = lm(dtype=torch.float32), tokens(3, 20)
    state, found = model.init_state(3), []
    for t in range(20):
        logits, state = model(ids[:, t : t + 1], state=state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids), atol=1e-4, rtol=1e-4)


def test_left_padding_goes_along_with_the_state():
    model, ids = lm(), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    _, state = model(padded[:, :8], mask[:, :8], model.init_state())
    logits, _ = model(padded[:, 8:], mask[:, 8:], state)
    torch.testing.assert_close(logits, model(ids)[:, 4:])


def test_greedy_generation_takes_the_likeliest_of_the_full_forward():
    model, ids = lm(), tokens(2, 4)
    found = model.generate(ids, 9, temperature=0)
    for t in range(4, 13):
        assert torch.equal(found[:, t], model(found[:, :t])[:, -1].argmax(dim=-1))


def test_drawn_tokens_follow_the_logits_and_the_generator():
    model, ids = lm(vocab=4), tokens(1, 5, vocab=4)
    many = ids.expand(4000, 5)
    drawn = next(model.stream(many, generator=torch_generator(1), temperature=0.7))
    again = next(model.stream(many, generator=torch_generator(1), temperature=0.7))
    assert torch.equal(drawn, again)
    expected = (model(ids)[0, -1] / 0.7).softmax(dim=-1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, expected.float(), atol=0.03, rtol=0)
    two = next(model.stream(many, generator=torch_generator(1), top_k=2)).unique()
    assert set(two.tolist()) <= set(model(ids)[0, -1].topk(2).indices.tolist())


def test_positions_end_unless_told_to_go_on():
    model, ids = lm(max_length=8), tokens(1, 3)
    with pytest.raises(ValueError, match="ids must end within max_length=8 positions, got 8 and 1 more"):
        model.generate(ids, 7)
    longer = model.generate(ids, 20, temperature=0, truncate=True)
    assert longer.shape == (1, 23)
    # After eight tokens the last four are read again from position 0 on.
    assert longer[0, 9] == model(longer[:, 5:9])[0, -1].argmax()
    # A start that is too long loses its first tokens.
    start = tokens(1, 12)
    assert model.generate(start, 1, temperature=0, truncate=True)[0, -1] == model(start[:, -8:])[0, -1].argmax()
    free = lm(max_length=8, positions="none")
    assert free.generate(ids, 50, temperature=0).shape == (1, 53)


# Numbers at their edges


def test_smooth_planes_of_repeated_tokens_have_tame_gradients_and_l2_has_not():
    def steepest(norm):
        module = layer(norm=norm, bias=False, layer_norm=False)
        token = normal(6)
        x = (token + 1e-7 * normal(8, 6, seed=1)).requires_grad_()
        (gradient,) = torch.autograd.grad((module(x) * normal(8, 6, seed=2)).sum(), x)
        assert torch.isfinite(gradient).all()
        return gradient.abs().max()

    assert steepest("smooth") < 1e5
    assert steepest("l2") > 1e6


def test_tokens_of_length_zero_have_no_plane_and_finite_gradients():
    for norm in ("smooth", "l2", "none"):
        module = layer(norm=norm, bias=False)
        x = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
        module(x).sum().backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_do_not_lose_the_planes(dtype):
    module = layer(dtype=torch.float32, bias=False, gate="none", layer_norm=False)
    x = 1e-3 * normal(7, 6, dtype=torch.float32)  # products of such numbers underflow in half precision
    expected = module(x)
    assert expected[1:].abs().amax(dim=1).min() > 0.03
    with torch.autocast("cpu", dtype=dtype):
        mixed = module(x)
    torch.testing.assert_close(mixed.float(), expected, atol=0.01, rtol=0)
    found = module.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.01, rtol=0)


def test_the_parameters_are_as_many_as_counted_by_hand():
    def count(**options):
        return sum(p.numel() for p in CausalGrassmannMixing(256, layer_norm=False, **options).parameters())

    assert count() == 8_224 + 127_232 + 131_328
    assert count(out_proj=True) - count() == 256 * 257
    model = GrassmannLM(30_522, device="meta")
    assert 12.6e6 < sum(p.numel() for p in model.parameters()) < 12.7e6


def test_same_generator_same_weights_and_torchs_own_stays_untouched():
    before = torch.get_rng_state()
    a, b = (GrassmannLM(9, 8, 2, 4, generator=torch_generator(3)).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(before, torch.get_rng_state())
    assert abs(float(a["blocks.0.ffn.0.weight"].std()) - 0.02) < 0.005


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 1}, "r must be at least 2 a head and a multiple of num_heads=1, got 1"),
        ({"r": 6, "num_heads": 4}, "r must be at least 2 a head and a multiple of num_heads=4, got 6"),
        ({"offsets": ()}, r"offsets must be distinct integers of at least 1, one or more, got \(\)"),
        ({"offsets": (0, 1)}, r"offsets must be distinct .* got \(0, 1\)"),
        ({"offsets": (-2,)}, r"offsets must be distinct .* got \(-2,\)"),
        ({"offsets": (2, 2)}, r"offsets must be distinct .* got \(2, 2\)"),
        ({"norm": "l1"}, "norm must be one of .* got 'l1'"),
        ({"gate": "sum"}, "gate must be one of .* got 'sum'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
    ],
)
def test_a_layer_with_impossible_arguments_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CausalGrassmannMixing(**{"d_model": 8} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"positions": "rotary"}, "positions must be one of .* got 'rotary'"),
        ({"offsets": ((1,), (2,), (3,))}, "offsets must be integers, or num_layers=2 sequences of them"),
        ({"mixing": {"causal": False}}, "mixing must be causal in a language model"),
        ({"ffn": 0}, "ffn must be at least 1, got 0"),
    ],
)
def test_a_model_with_impossible_arguments_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GrassmannLM(**{"vocab_size": 5, "d_model": 4, "num_layers": 2, "r": 2} | options)


def test_input_of_another_shape_is_refused():
    module, x = layer(), normal(2, 5, 6)
    with pytest.raises(ValueError, match="x must have width 6, got 7"):
        module(normal(2, 5, 7))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 5\), one entry a token, got \(2, 4\)"):
        module(x, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"state must hold a past of shape \(2, 4, 5\), got \(3, 4, 5\)"):
        module(x, state=module.init_state(3))
    with pytest.raises(ValueError, match="state must be None where causal is False"):
        layer(causal=False)(x, state=module.init_state(2))


def test_a_sequence_that_no_offset_reaches_into_is_told_and_only_gated():
    module = layer(offsets=(5, 9), layer_norm=False)
    with pytest.warns(UserWarning, match="no offset reaches within 4 tokens, the smallest is 5: nothing is mixed"):
        found = module(normal(4, 6))
    alpha = torch.sigmoid(module.gating(torch.cat([normal(4, 6), torch.zeros(4, 6, dtype=torch.float64)], dim=-1)))
    torch.testing.assert_close(found, alpha * normal(4, 6))


def test_tokens_out_of_range_and_texts_too_long_are_refused():
    model = lm()
    for bad in (-1, 11):
        with pytest.raises(ValueError, match=rf"ids must lie in 0..10, got {bad}"):
            model(torch.tensor([[0, bad]]))
    with pytest.raises(ValueError, match="ids must end within max_length=40 positions, got 0 and 41 more"):
        model(tokens(1, 41))
    with pytest.raises(ValueError, match="ids must hold at least 2 tokens a text, got 1"):
        model.loss(tokens(1, 1))


def test_impossible_drawing_is_refused():
    model, ids = lm(), tokens(2, 3)
    for options, message in (
        ({"temperature": -1}, "temperature must be at least 0 and finite, got -1"),
        ({"top_k": 12}, "top_k must be between 1 and 11, got 12"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, "padding stands left, got padding there"),
    ):
        with pytest.raises(ValueError, match=message):
            next(model.stream(ids, **options))
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        model.generate(ids, -1)
    with pytest.raises(ValueError, match="ids must hold at least one token a text, got none"):
        next(model.stream(ids[:, :0]))


# Files


def test_a_saved_model_computes_the_same(tmp_path):
    model = lm(tied=False, norm_first=False, mixing={"norm": "l2"}, dtype=torch.float32)
    loaded = GrassmannLM.load(model.save(tmp_path / "model.safetensors"))
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens(2, 7)), model(tokens(2, 7)))
    narrow = GrassmannLM.load(lm(dtype=torch.bfloat16).save(tmp_path / "narrow.safetensors"))
    assert narrow.embedding.weight.dtype == torch.float32


def test_another_models_weights_are_refused_and_the_names_told(tmp_path):
    model, path = lm(dtype=torch.float32), tmp_path / "other.safetensors"
    weights = {"h.0.attn.c_attn.weight": np.ones((4, 4), np.float32)}
    save_fitted(path, kind="GrassmannLM", arrays=weights, params={"config": model.config})
    with pytest.raises(WrongContent, match=r"(?s)Missing key.*embedding.weight.*Unexpected key.*attn.c_attn"):
        GrassmannLM.load(path)
    write_members(path, weights)
    with pytest.raises(WrongContent, match="found named arrays; expected a file of save_fitted"):
        GrassmannLM.load(path)
    torn = model.save(tmp_path / "torn.safetensors")
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(CorruptFile):
        GrassmannLM.load(torn)


# Training


def test_training_learns_a_text_to_its_entropy_and_repeats_bit_by_bit():
    text = torch.arange(600) % 5 + 5 * (torch.arange(600) // 5 % 2)  # period 10: all but the start is certain

    def trained():
        model = GrassmannLM(10, 16, 1, 4, (1, 2), 0.0, max_length=24, generator=torch_generator(0))
        train_next_token(model, text, steps=150, length=24, learning_rate=2e-2, warmup=10, generator=torch_generator(1))
        return model

    model, again = trained(), trained()
    assert score_next_token(model, text, length=24) < 0.05
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not model.training


def test_the_score_is_the_mean_loss_of_consecutive_pieces():
    model, text = lm(), tokens(47)
    pieces = torch.stack([text[0:11], text[10:21], text[20:31], text[30:41]])
    found = score_next_token(model, text, length=10, batch_size=3)
    assert found == pytest.approx(model.loss(pieces).item(), rel=1e-6)
    counted = torch.zeros(47, dtype=torch.bool)
    counted[[5, 33]] = True
    logits = torch.log_softmax(model(pieces[:, :-1]), dim=-1)
    expected = -(logits[0, 4, text[5]] + logits[3, 2, text[33]]) / 2
    assert score_next_token(model, text, length=10, counted=counted) == pytest.approx(expected.item(), rel=1e-6)


def test_only_counted_tokens_are_learnt():
    text, counted = tokens(400, vocab=3), torch.zeros(400, dtype=torch.bool)
    counted[::2] = True
    text[::2] = 4
    model = GrassmannLM(6, 8, 1, 4, (1,), 0.0, max_length=20, generator=torch_generator(0))
    seen = []
    losses = train_next_token(
        model, text, steps=60, length=20, stride=2, counted=counted, generator=torch_generator(0),
        learning_rate=1e-2, warmup=5, on_step=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert losses[-1] < 0.05
    assert model(text[None, :20]).argmax(dim=-1).eq(4).all()
    assert seen == [(n + 1, pytest.approx(loss)) for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(30)}, "ids must be one row of integers"),
        ({"length": 50}, "length must be at least 1 and below the 50 tokens of the text, got 50"),
        ({"steps": 0}, "steps, batch_size and stride must be at least 1"),
        ({"counted": torch.ones(3, dtype=torch.bool)}, r"counted must have shape \(50,\), got \(3,\)"),
    ],
)
def test_impossible_training_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_next_token(lm(), **{"ids": tokens(50), "steps": 1, "length": 10} | change)


def test_a_score_of_no_token_is_refused():
    with pytest.raises(ValueError, match="counted must be True somewhere in the pieces, got none"):
        score_next_token(lm(), tokens(50), length=10, counted=torch.zeros(50, dtype=torch.bool))


# Classification


def test_the_classifier_averages_real_tokens_only():
    head = GrassmannSequenceClassifier(5, 3, 8, 8, ffn=8, generator=torch_generator(0), dtype=torch.float64).eval()
    x = normal(2, 9, 5)
    padded = torch.cat([x, normal(2, 4, 5, seed=1)], dim=1)
    mask = torch.tensor([[True] * 9 + [False] * 4] * 2)
    torch.testing.assert_close(head(padded, mask), head(x))
    assert not torch.allclose(head(padded), head(x), atol=1e-8)
    nothing = head(x, torch.zeros(2, 9))
    torch.testing.assert_close(nothing, head.classifier(head.norm(nothing.new_zeros(2, 8))))


def test_heads_learn_what_only_planes_tell():
    """The class is the orientation of one coordinate plane: linear in the wedge, unseen by any linear map of both."""
    a, b = normal(2, 600, 4, dtype=torch.float32)
    labels = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0] > 0).long()
    head = GrassmannPairHead(4, 2, 16, 8, dropout=0.0, generator=torch_generator(0))
    sequence = GrassmannSequenceClassifier(
        4, 2, 16, 8, 1, offsets=(1,), num_heads=2, ffn=16, dropout=0.0, mixing={"causal": True},
        generator=torch_generator(1),
    )  # fmt: skip
    for model, inputs in ((head, (a, b)), (sequence, (torch.stack([a, b], dim=1),))):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(120):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(*(x[:400] for x in inputs)), labels[:400]).backward()
            optimiser.step()
        model.eval()
        answers = model(*(x[400:] for x in inputs)).argmax(dim=-1)
        assert (answers == labels[400:]).double().mean() > 0.85


@pytest.mark.parametrize("head", [GrassmannSequenceClassifier, GrassmannPairHead])
def test_impossible_heads_are_refused(head):
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        head(0, 3)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        head(4, 1)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        GrassmannSequenceClassifier(4, 2, num_layers=0)
    with pytest.raises(ValueError, match="x must have width 4, got 3"):
        GrassmannSequenceClassifier(4, 2, 8, 8)(torch.ones(2, 9, 3))


# What it is compared with


def test_rival_mixers_are_causal_too():
    x = normal(2, 12, 8, dtype=torch.float32)
    for mixer in (
        CausalAttention(8, 2, generator=torch_generator(0)),
        ShiftedMixing(8, 4, (1, 3), generator=torch_generator(0)),
        ShiftedMixing(8, 4, (1, 3), symmetric=True, generator=torch_generator(0)),
        NoMixing(),
    ):
        other = x.clone()
        other[:, 7:] += 1
        assert torch.equal(mixer(x)[:, :7], mixer(other)[:, :7])


def test_the_rival_without_wedge_is_the_mean_of_one_matrix_over_pairs():
    mixer = ShiftedMixing(6, 4, (1, 3), generator=torch_generator(0)).double()
    x = normal(1, 7, 6)
    z, t = mixer.reduction(x)[0], 5
    g = sum(mixer.pair(torch.cat([z[t], z[t - o]])) for o in (1, 3)) / 2
    alpha = torch.sigmoid(mixer.gating(torch.cat([x[0, t], g])))
    torch.testing.assert_close(mixer(x)[0, t], mixer.layer_norm(alpha * x[0, t] + (1 - alpha) * g))
