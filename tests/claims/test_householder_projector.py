import numpy as np
import pytest
import torch

from polyspan.claims import measure
from polyspan.claims.householder_projector import (
    CLAIM,
    RANK,
    Pictures,
    on_digits,
    projected,
    published_weight,
    trial,
    truncated,
    untrained,
)
from polyspan.nn import StyleAutoencoder
from polyspan.nn.projector_surgery import projections


def autoencoder():
    return StyleAutoencoder((4, 4), 16, 64, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_on_digits_the_exact_start_keeps_the_pictures_and_other_starts_lose_them():
    arms = trial(on_digits(0), 0)
    assert arms["exact, before fine-tuning"] < 0.5 * arms["published, before fine-tuning"]
    assert arms["method"] < 0.75 * arms["baseline"]
    assert arms["method"] < arms["free product of rank 8"] + 3
    assert arms["directions of 16 that change pictures, projector"] == RANK
    assert arms["directions of 16 that change pictures, SeFa"] == 16


@pytest.mark.slow
def test_where_nothing_was_learnt_before_no_start_is_better():
    control = measure(CLAIM, CLAIM.control, seeds=3)
    assert control.verdict == "fails"
    assert abs(control.means["method"] - control.means["baseline"]) < 5


def test_arms_differ_in_their_projections_only():
    model = autoencoder()
    arms = {start: projected(model, start, 0) for start in ("exact", "published", "random")}
    kept = {name: value for name, value in model.state_dict().items() if "affine.weight" not in name}
    gains = {}
    for start, made in arms.items():
        state = made.state_dict()
        assert all(torch.equal(state[name], value) for name, value in kept.items()), start
        gains[start] = [float(gain) for _, gain in projections(made).values()]
        values = torch.linalg.svdvals(made.generator.layers[0].affine.weight.detach())
        assert float(values[0]) == pytest.approx(gains[start][0], rel=1e-4)
        assert float(values[RANK - 1]) == pytest.approx(gains[start][0], rel=1e-4)
    assert gains["exact"] == gains["published"] == gains["random"]
    assert torch.equal(autoencoder().generator.constant, model.generator.constant)


def test_the_free_product_starts_as_the_truncated_layer():
    model = autoencoder()
    old = model.generator.layers[0].affine
    U, s, Vh = torch.linalg.svd(old.weight.detach(), full_matrices=False)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    made = truncated(model).generator.layers[0].affine(x)
    torch.testing.assert_close(made, x @ (U[:, :RANK] * s[:RANK] @ Vh[:RANK]).T + old.bias, atol=1e-5, rtol=1e-5)


def test_the_published_start_is_the_packed_decomposition_read_as_reflections():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(weight)
    sides = []
    for side in (U, Vh.mT):
        packed, made = torch.geqrf(side)[0], torch.eye(len(side), dtype=torch.float64)
        for v in packed.T:
            made = made - 2 * made @ torch.outer(v, v) / v.dot(v)
        sides.append(made)
    expected = s[:2].mean() * sides[0][:, :2] @ sides[1][:2]
    torch.testing.assert_close(published_weight(weight, 2), expected, atol=1e-10, rtol=0)


def test_a_users_pictures_are_spoilt_by_leaving_out_the_training():
    data = Pictures(np.random.default_rng(0).random((60, 5, 5), dtype=np.float32), np.array([40, 4]))
    spoilt = untrained(data, 0)
    assert spoilt.images is data.images
    assert spoilt.steps.tolist() == [0, 4]
    arms = trial(data, 0)
    assert all(np.isfinite(value) for value in arms.values())
    assert arms["baseline"] == min(arms["published start"], arms["random start"])
