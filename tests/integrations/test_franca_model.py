import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from polyspan.integrations import convert_franca_checkpoint
from polyspan.io import write_members

D, DEPTH, HEADS, PATCH, SIDE = 24, 3, 3, 7, 3
RESEARCH = pytest.mark.filterwarnings("ignore:weights published by the authors of Franca")


def official(gated=True, chunk=None, seed=0):
    """Weights by the names of the authors' code; ``chunk`` puts so many blocks under one number."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, D), "mask_token": draw(1, D), "pos_embed": draw(1, 1 + SIDE**2, D),
        "patch_embed.proj.weight": draw(D, 3, PATCH, PATCH), "patch_embed.proj.bias": draw(D),
        "norm.weight": 1 + draw(D), "norm.bias": draw(D),
    }  # fmt: skip
    hidden = (int(4 * D * 2 / 3) + 7) // 8 * 8 if gated else 4 * D
    mlp = (
        {"mlp.w12": (2 * hidden, D), "mlp.w3": (D, hidden)}
        if gated
        else {"mlp.fc1": (hidden, D), "mlp.fc2": (D, hidden)}
    )
    for i in range(DEPTH):
        head = f"blocks.{i // chunk}.{i}." if chunk else f"blocks.{i}."
        for name, shape in {"attn.qkv": (3 * D, D), "attn.proj": (D, D), **mlp}.items():
            state |= {f"{head}{name}.weight": draw(*shape), f"{head}{name}.bias": draw(shape[0])}
        for name in ("norm1", "norm2"):
            state |= {f"{head}{name}.weight": 1 + draw(D), f"{head}{name}.bias": draw(D)}
        state |= {f"{head}ls1.gamma": draw(D), f"{head}ls2.gamma": draw(D)}
    return state


def literal(state, images):
    """The published forward pass, one line at a time, for blocks that are not in chunks."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    for i in range(DEPTH):
        b = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + state[f"{b}.ls1.gamma"] * linear(a.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        h = norm(x, f"{b}.norm2")
        if f"{b}.mlp.w12.weight" in state:
            first, second = linear(h, f"{b}.mlp.w12").chunk(2, dim=-1)
            h = linear(F.silu(first) * second, f"{b}.mlp.w3")
        else:
            h = linear(F.gelu(linear(h, f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        x = x + state[f"{b}.ls2.gamma"] * h
    return norm(x, "norm")


def images(n=2):
    return torch.randn(n, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(9))


@RESEARCH
@pytest.mark.parametrize("gated", [True, False])
def test_the_model_computes_what_the_authors_code_does(gated):
    state = official(gated)
    made = convert_franca_checkpoint(state, num_heads=HEADS)
    with torch.no_grad():
        found = made(images()).last_hidden_state
    torch.testing.assert_close(found, literal(state, images()), rtol=1e-4, atol=1e-4)
    assert (made.config.image_size, made.config.use_swiglu_ffn, made.training) == (PATCH * SIDE, gated, False)


@RESEARCH
@pytest.mark.parametrize(
    "given",
    [
        official(chunk=2),
        {"teacher": {f"backbone.{n}": v for n, v in official().items()} | {"dino_head.mlp.0.weight": torch.ones(2)}},
        {"model": {f"module.{n}": v.numpy() for n, v in official().items()}},
        {n: v for n, v in official().items() if n != "mask_token"},
    ],
)
def test_layouts_of_training_and_of_release_are_one_model(given):
    plain, other = (convert_franca_checkpoint(state, num_heads=HEADS) for state in (official(), given))
    with torch.no_grad():
        assert torch.equal(plain(images()).last_hidden_state, other(images()).last_hidden_state)


@RESEARCH
def test_a_file_is_read_as_its_weights_are(tmp_path):
    write_members(tmp_path / "franca.safetensors", {name: value.numpy() for name, value in official().items()})
    ours, theirs = (
        convert_franca_checkpoint(s, num_heads=HEADS) for s in (tmp_path / "franca.safetensors", official())
    )
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name].numpy(), value.numpy())


def test_the_licence_of_published_weights_is_told():
    with pytest.warns(UserWarning, match="for research only, not commercially"):
        convert_franca_checkpoint(official(), num_heads=HEADS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("pos_embed"), "a whole vision transformer, got none of pos_embed"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.1.")], "got none of blocks.1"),
        (lambda s: s.pop("blocks.2.ls1.gamma"), r"got none for \['encoder.layer.2.layer_scale1.lambda1'\]"),
        (lambda s: s.update(register_tokens=torch.ones(1, 4, D)), r"left over \['register_tokens'\]"),
        (lambda s: s.update(pos_embed=torch.ones(1, 9, D)), "a square grid, got 8 patches"),
        (
            lambda s: s.update({"norm.bias": torch.ones(D + 1)}),
            r"of another shape \[\('layernorm.bias', \(25,\), \(24,\)",
        ),
    ],
)
def test_what_is_missing_left_over_or_of_another_shape_is_listed(change, told):
    state = official()
    change(state)
    with pytest.raises(ValueError, match=told):
        convert_franca_checkpoint(state, num_heads=HEADS)


def test_heads_that_no_shape_tells_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide the width 24, got 0"):
        convert_franca_checkpoint(official())
    with pytest.raises(ValueError, match="num_heads must divide the width 24, got 5"):
        convert_franca_checkpoint(official(), num_heads=5)
