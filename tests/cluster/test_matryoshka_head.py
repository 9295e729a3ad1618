import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.cluster import (
    NestedMatryoshkaHead,
    block_mask,
    cyclic_mask,
    koleo_loss,
    prototype_loss,
    prototype_targets,
)
from polyspan.cluster.patch_masking import mask_batch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def literal_targets(logits, temperature, rounds=3):
    """The published loop, in plain numbers: prototypes to equal sums, samples to equal sums, three times."""
    Q = np.exp(logits.numpy().astype(np.float64) / temperature).T
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(rounds):
        Q = Q / Q.sum(axis=1, keepdims=True) / K
        Q = Q / Q.sum(axis=0, keepdims=True) / B
    return (Q * B).T


@settings(max_examples=15, deadline=None)
@given(b=st.integers(2, 12), k=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_targets_are_those_of_the_published_loop(b, k, seed):
    logits = torch.rand(b, k, generator=seeded(seed), dtype=torch.float64) * 2 - 1
    found = prototype_targets(logits, temperature=0.06)
    np.testing.assert_allclose(found.numpy(), literal_targets(logits, 0.06), atol=1e-9)
    np.testing.assert_allclose(found.sum(dim=1).numpy(), 1, atol=1e-12)


def test_targets_survive_logits_that_overflow_an_exponential():
    logits = torch.randn(6, 4, generator=seeded()) * 1e4
    found = prototype_targets(logits.half() / 8, temperature=0.04)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))


def test_more_rounds_use_prototypes_equally():
    logits = torch.randn(64, 8, generator=seeded(), dtype=torch.float64)
    uneven = [float(prototype_targets(logits, temperature=0.3, rounds=r).sum(dim=0).std()) for r in (1, 3, 50)]
    assert uneven[0] > uneven[1] > uneven[2]
    assert uneven[2] < 1e-3


def test_the_loss_is_the_cross_entropy_with_soft_targets():
    s, q = torch.randn(5, 7, generator=seeded()), torch.rand(5, 7, generator=seeded(1))
    q = q / q.sum(dim=1, keepdim=True)
    expected = torch.nn.functional.cross_entropy(s / 0.1, q, reduction="none")
    torch.testing.assert_close(prototype_loss(s, q, temperature=0.1), expected)


def test_spreading_is_the_mean_logarithm_of_the_nearest_distance():
    x = torch.randn(9, 4, generator=seeded(), dtype=torch.float64)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    apart = np.linalg.norm(unit[:, None] - unit, axis=-1) + 9 * np.eye(9)
    assert float(koleo_loss(x)) == pytest.approx(-np.log(apart.min(axis=1) + 1e-8).mean())
    same = torch.ones(3, 4, requires_grad=True)
    koleo_loss(same).backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


def test_a_level_sees_its_prefix_and_nothing_else():
    head = NestedMatryoshkaHead(16, 32, hidden=8, bottleneck=6, generator=seeded())
    assert head.widths == (1, 2, 4, 8, 16)
    assert head.num_prototypes == (2, 4, 8, 16, 32)
    z = torch.randn(3, 16, generator=seeded(), requires_grad=True)
    for m, logits in zip(head.widths, head(z), strict=True):
        (gradient,) = torch.autograd.grad(logits.square().sum(), z, retain_graph=True)
        assert (gradient[:, :m] != 0).all()
        assert (gradient[:, m:] == 0).all()
    linear = NestedMatryoshkaHead(16, 32, nesting="linear", hidden=8, bottleneck=6, generator=seeded())
    (gradient,) = torch.autograd.grad(linear(z)[0].square().sum(), z)
    assert (gradient != 0).all()


def test_normalised_logits_are_cosines_and_published_ones_are_not_bounded():
    z = 100 * torch.randn(50, 8, generator=seeded())
    head = NestedMatryoshkaHead(8, 16, hidden=8, bottleneck=6, num_layers=1, generator=seeded())
    assert all(float(logits.detach().abs().max()) <= 1 + 1e-6 for logits in head(z))
    assert not head.last_layers[0].weight_g.requires_grad
    free = NestedMatryoshkaHead(8, 16, hidden=8, bottleneck=6, num_layers=1, normalize=False, generator=seeded())
    assert max(float(logits.detach().abs().max()) for logits in free(z)) > 1
    assert free.last_layers[0].weight_g.requires_grad


def official_state(d=12, widths=(3, 6, 12), K=20, hidden=7, bottleneck=5):
    """A state as the published head has it: learned maps of the whole feature, three-layer MLPs, g and v."""
    g, state = seeded(), {}
    for i, m in enumerate(widths):
        state[f"matryoshka_projections.{i}.weight"] = torch.randn(m, d, generator=g)
        state[f"matryoshka_projections.{i}.bias"] = torch.randn(m, generator=g)
        for j, (a, b) in zip((0, 2, 4), ((m, hidden), (hidden, hidden), (hidden, bottleneck)), strict=True):
            state[f"mlps.{i}.{j}.weight"] = torch.randn(b, a, generator=g)
            state[f"mlps.{i}.{j}.bias"] = torch.randn(b, generator=g)
        k = int(K * (m / widths[-1]))
        state[f"last_layers.{i}.weight_g"] = 1 + torch.rand(k, 1, generator=g)
        state[f"last_layers.{i}.weight_v"] = torch.randn(k, bottleneck, generator=g)
    return state


def test_a_published_state_is_read_and_computes_what_its_layers_say():
    state = official_state()
    head = NestedMatryoshkaHead.from_state_dict({f"dino_head.{key}": value for key, value in state.items()})
    assert head.widths == (3, 6, 12)
    assert head.num_prototypes == (5, 10, 20)
    z = torch.randn(4, 12, generator=seeded(5))
    gelu = torch.nn.functional.gelu
    for i, logits in enumerate(head(z)):
        x = z @ state[f"matryoshka_projections.{i}.weight"].T + state[f"matryoshka_projections.{i}.bias"]
        for j in (0, 2, 4):
            x = gelu(x @ state[f"mlps.{i}.{j}.weight"].T + state[f"mlps.{i}.{j}.bias"])
        v = state[f"last_layers.{i}.weight_v"]
        w = state[f"last_layers.{i}.weight_g"] * v / v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(logits, x @ w.T, atol=1e-3, rtol=1e-4)
    newer = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for key, value in state.items()
    }
    torch.testing.assert_close(NestedMatryoshkaHead.from_state_dict(newer)(z)[0], head(z)[0])


def test_a_state_that_is_no_head_is_told_by_its_keys():
    state = official_state()
    with pytest.raises(ValueError, match=r"left over \['mlps.0.9.extra'\]"):
        NestedMatryoshkaHead.from_state_dict(state | {"mlps.0.9.extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"missing \['mlps.1.2.bias'\]"):
        NestedMatryoshkaHead.from_state_dict({k: v for k, v in state.items() if k != "mlps.1.2.bias"})
    with pytest.raises(ValueError, match=r"state must hold mlps\.2\.0\.weight"):
        NestedMatryoshkaHead.from_state_dict({k: v for k, v in state.items() if k != "mlps.2.0.weight"})
    with pytest.raises(ValueError, match="prefix must name one head where the state holds 0"):
        NestedMatryoshkaHead.from_state_dict({"a": torch.ones(1)})
    both = {f"{p}.{k}": v for k, v in state.items() for p in ("dino_head", "ibot_head")}
    with pytest.raises(ValueError, match="where the state holds 2"):
        NestedMatryoshkaHead.from_state_dict(both)
    assert NestedMatryoshkaHead.from_state_dict(both, prefix="ibot_head.").in_dim == 12
    with pytest.raises(ValueError, match=r"mlps.0.2.weight of shape \(7, 7\), got \(7, 6\)"):
        NestedMatryoshkaHead.from_state_dict(state | {"mlps.0.2.weight": torch.ones(7, 6)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NestedMatryoshkaHead(8, 16, [4, 2]), r"widths must increase within 1 .. in_dim=8, got \[4, 2\]"),
        (lambda: NestedMatryoshkaHead(8, 16, [4, 9]), r"in_dim=8, got \[4, 9\]"),
        (lambda: NestedMatryoshkaHead(8, 16, []), r"got \[\]"),
        (lambda: NestedMatryoshkaHead(8, 6, [2, 8]), "every level 2 prototypes, got 6 for widths .* leaves width 2 1"),
        (lambda: NestedMatryoshkaHead(8, 1), "num_prototypes must be at least 2, got 1"),
        (lambda: NestedMatryoshkaHead(8, 16, nesting="prefix"), "nesting must be one of .* got 'prefix'"),
        (lambda: NestedMatryoshkaHead(8, 16, hidden=0), "hidden must be at least 1, got 0"),
        (lambda: prototype_targets(torch.ones(1, 4)), "logits must have at least 2 rows, got 1"),
        (lambda: prototype_targets(torch.full((2, 4), torch.nan)), "scores must be finite"),
        (lambda: koleo_loss(torch.ones(1, 4)), "x must have at least 2 rows, got 1"),
        (lambda: cyclic_mask(4, 4, 17), r"n_masked must lie in 0 .. 16, got 17"),
        (lambda: block_mask(0, 4, 0), "h and w must be at least 1, got 0 and 4"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_masks_hide_exactly_as_many_patches_as_asked(h, w, share, seed):
    count = round(share * h * w)
    for make in (cyclic_mask, block_mask):
        assert int(make(h, w, count, seeded(seed)).sum()) == count


def test_cyclic_masks_hide_every_place_alike_and_blocks_do_not():
    g = seeded()
    hidden = {make: sum(make(8, 8, 25, g).double() for _ in range(4000)) / 4000 for make in (cyclic_mask, block_mask)}
    # Standard error of a frequency is below 0.008.
    assert float((hidden[cyclic_mask] - 25 / 64).abs().max()) < 5 * math.sqrt(0.25 / 4000)
    assert float(hidden[block_mask].max()) > 0.85
    assert float(hidden[block_mask].min()) < 0.05


def test_the_visible_block_is_one_piece():
    mask = block_mask(10, 12, 80, seeded(3))
    rows, columns = torch.where(~mask)
    area = int((rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1))
    assert 40 <= area <= 40 + int(columns.max() - columns.min())


def test_a_batch_has_masks_on_its_share_with_ratios_from_all_over_the_range():
    masks = mask_batch(40, (8, 8), kind="cyclic", ratio=(0.1, 0.65), probability=0.5, generator=seeded())
    counts = masks.sum(dim=1)
    used = counts[counts > 0].sort().values / 64
    assert len(used) == 20
    assert (used.diff() >= -1e-6).all()
    edges = 0.1 + 0.55 * torch.arange(21) / 20
    assert ((used >= edges[:-1] - 1 / 64) & (used <= edges[1:] + 1e-6)).all()
