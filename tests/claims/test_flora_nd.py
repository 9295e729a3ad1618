import numpy as np
import peft
import pytest
import torch

from polyspan.claims import measure
from polyspan.claims.flora_nd import (
    ADAPTED,
    CLAIM,
    RANKS,
    RIVALS,
    Domains,
    arms,
    flattened,
    network,
    on_digits,
    pointwise,
    trial,
)


def few(seed, *, side=3, dearer=0):
    """Hardly any training, for the mechanics."""
    data = on_digits(seed, side=side)
    return Domains(data.source[:150], data.source_labels[:150], data.target[:120], data.target_labels[:120],
                   np.array([side, 1, 1, dearer]))  # fmt: skip


def added(model):
    """How many parameters an arm trains in the adapted layers."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "head" not in name)


@pytest.mark.slow
def test_on_digits_the_core_gains_on_lora_and_on_kernels_of_one_pixel_it_does_not():
    main, control = (measure(CLAIM, world, seeds=2) for world in ("digits", CLAIM.control))
    assert main.means["method"] > main.means["LoRA"] + 0.05
    assert main.means["method"] > main.means["LoHa"]
    assert main.means["method"] > main.means["not adapted"] + 0.3
    assert control.verdict != "holds"
    assert control.gain < CLAIM.margin


def test_every_arm_adapts_the_same_layers_by_about_as_many_parameters_and_begins_where_the_network_is():
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    for side in (3, 1):
        base = network(10, side, 0)
        before = base(x)
        sizes = {}
        state = torch.get_rng_state()
        for name, adapt in arms(side, True).items():
            model = adapt(network(10, side, 0), 3).eval()
            torch.testing.assert_close(model(x), before, msg=f"{name} begins elsewhere")
            sizes[name] = added(model)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert any("head" in n for n in trained), name
            if name != "all parameters":
                assert all("head" in n or any(f"{layer}." in n for layer in ADAPTED) for n in trained), name
        assert torch.equal(torch.get_rng_state(), state)
        rivals = [sizes[name] for name in RIVALS if name in sizes]
        assert sizes["Tucker core"] <= min(rivals)
        assert max(rivals) < 1.1 * sizes["Tucker core"]
        assert len(rivals) == len(RANKS[side]) - 1


def test_no_label_of_the_images_left_out_reaches_training():
    data = few(0)
    rows = np.random.default_rng([0, 2]).permutation(120)[60:]
    labels = data.target_labels.copy()
    labels[rows] = (labels[rows] + 1) % 10
    plain, changed = trial(data, 0), trial(data._replace(target_labels=labels), 0)
    assert plain != changed
    scores = ("method", "baseline", *RIVALS, "not adapted")
    assert all(0 <= plain[name] <= 1 for name in scores)


def test_the_dearer_arms_come_where_the_recipe_asks_and_seeds_repeat():
    state = torch.get_rng_state()
    plain, dear = trial(few(1), 1), trial(few(1, dearer=1), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(dear) - set(plain) == {"DoRA", "all parameters", "head alone"}
    assert {name: dear[name] for name in plain} == plain
    assert trial(few(1), 1) == plain


def test_the_control_has_the_same_images_and_kernels_of_one_pixel():
    main, control = on_digits(3), pointwise(3)
    for name in ("source", "source_labels", "target", "target_labels"):
        assert np.array_equal(getattr(main, name), getattr(control, name))
    assert control.recipe[0] == 1
    assert np.array_equal(flattened(main, 0).recipe, control.recipe)
    assert network(10, 1, 0).conv2.kernel_size == (1, 1)


def test_the_rival_of_rows_and_columns_is_a_low_rank_matrix_of_those():
    model = arms(3, False)["LoRA of rows and columns"](network(10, 3, 0), 0)
    plus = model.conv3.parametrizations.weight[0]
    torch.nn.init.normal_(plus.B, generator=torch.Generator().manual_seed(0))
    delta = (model.conv3.weight - model.conv3.parametrizations.weight.original).detach()
    s = torch.linalg.svdvals(delta.permute(0, 2, 1, 3).reshape(96, 96))
    assert s[2] > 0.01 * s[0]
    assert s[3] < 1e-5 * s[0]
    assert isinstance(arms(3, False)["LoRA"](network(10, 3, 0), 0), peft.PeftModel)
