import math

import numpy as np
import pytest

from polyspan.claims import measure, measure_claim, polysae
from polyspan.claims.polysae import (
    CLAIM,
    Activations,
    Brought,
    atoms_found,
    eight_pairs,
    on_language,
    planted,
    properties,
    trial,
    without_features,
)
from polyspan.data import python_reference
from polyspan.data.public import Texts
from polyspan.io import write_members


def few(data, steps=20):
    """Hardly any training, for the mechanics."""
    recipe = data.recipe.copy()
    recipe[4] = steps
    return data._replace(recipe=recipe)


@pytest.fixture
def two_arms(monkeypatch):
    """Train only the arms that are compared, not those that stand beside them in the evidence."""
    arms = polysae._arms
    compared = ("polynomial", "linear, as many parameters")
    monkeypatch.setattr(polysae, "_arms", lambda *given: {name: arms(*given)[name] for name in compared})


@pytest.mark.slow
@pytest.mark.usefixtures("two_arms")
def test_products_explain_more_where_all_pairs_bind_and_keep_the_atoms():
    """That the control refutes it is among the public contracts."""
    found = measure(CLAIM, "planted", seeds=2)
    assert found.means["method"] < 0.85 * found.means["baseline"]
    assert found.gain > CLAIM.margin
    # A linear decoder with more latents loses the atoms.
    assert found.means["atoms found, polynomial"] > found.means["atoms found, linear, as many parameters"] + 0.03


def test_worlds_hold_what_they_say():
    data, plain = planted(0), planted(0, strength=0.0)
    assert isinstance(data, Activations)
    for world in (data, eight_pairs(0)):
        assert ((world.truth > 0).sum(axis=1) == 2).all()
        assert world.truth[world.truth > 0].min() >= 0.75
    # What products add is of rank 8, and about half as long as an atom.
    more = data.test - plain.test
    values = np.linalg.svd(more, compute_uv=False)
    assert values[8] < 1e-4 * values[0] < values[7]
    assert np.sqrt(np.square(more).sum(axis=1).mean()) == pytest.approx(0.5, rel=0.3)
    pairs = eight_pairs(0)
    assert pairs.bound.mean() == pytest.approx(0.5, abs=0.03)
    assert len(np.unique(pairs.truth[pairs.bound] > 0, axis=0)) == 8
    assert len(np.unique(pairs.truth[~pairs.bound] > 0, axis=0)) > 500


def test_true_atoms_are_found_by_themselves_and_less_by_chance():
    data = planted(0)
    assert atoms_found(data.truth, data.truth) == pytest.approx(1, abs=1e-4)
    assert atoms_found(data.truth, data.truth[:, ::-1] * 3) == pytest.approx(1, abs=1e-4)
    assert atoms_found(data.truth, np.random.default_rng(0).normal(size=data.truth.shape)) < 0.1
    assert atoms_found(data.truth, np.zeros((len(data.truth), 3))) == 0


def test_arms_share_rows_steps_and_rate_and_the_wide_one_has_as_many_parameters(monkeypatch):
    from polyspan.learn import PolySAE

    made = []
    fit = PolySAE.fit
    monkeypatch.setattr(PolySAE, "fit", lambda self, X: made.append(self) or fit(self, X))
    found = trial(few(planted(0)), 0)
    assert set(found) >= {"method", "baseline", "linear, as many latents"}
    sizes = [sum(p.numel() for p in sae.module_.parameters()) for sae in made]
    assert [sae.module_.num_latents for sae in made] == [48, 48, 72, 48]
    assert abs(sizes[2] / sizes[0] - 1) < 0.02
    for name in ("k", "learning_rate", "schedule", "batch_size", "max_tokens", "dead_after", "random_state"):
        assert len({getattr(sae, name) for sae in made}) == 1
    assert all(sae.n_iter_ == 20 for sae in made)
    assert trial(few(planted(0)), 0) == found
    assert "published start" in trial(few(eight_pairs(0), steps=2), 0)


def test_no_start_is_made_of_the_worlds_own_draws():
    # An autoencoder that starts at the true atoms has nothing to find.
    from polyspan.claims.polysae import _arms

    data = planted(3)
    for sae in _arms(few(data, steps=1), 3).values():
        codes = sae.fit(data.train[:300]).transform(data.test)
        assert atoms_found(data.truth, codes) < 0.75


def test_real_activations_come_with_properties_of_their_tokens():
    text = python_reference()
    texts = Texts(text[:60_000], text[60_000:90_000], text[:100])
    small = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 400, "steps": 2}
    data = on_language(0, text=texts, n_train=900, n_test=400, **small)
    assert data.train.shape == (900, 16)
    assert data.labels.shape == (400, 7)
    other = on_language(1, text=texts, n_train=900, n_test=400, **small)
    assert not np.array_equal(data.train, other.train)
    recipe = np.array([64, 4, 4, 2, 30, 128, 1e-3, 0])
    found = trial(data._replace(recipe=recipe), 0)
    assert {"probes, polynomial", "probes, linear, as many parameters"} <= set(found)
    assert all(0 <= found[name] <= 1 for name in found if name.startswith("probes"))
    assert all(math.isfinite(value) for value in found.values())
    assert not [name for name in found if name.startswith(("atoms", "bound"))]


def test_properties_are_of_the_token_and_of_the_next():
    found = properties(["ĠThe", "Ġ12", "th", ".", "ĠOf", "cat"])
    assert found.astype(int).tolist() == [
        [1, 1, 0, 0, 1, 1, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0, 1, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("two_arms")
def test_a_user_measures_the_claim_on_activations_and_labels(tmp_path):
    data = planted(1)
    labels = (data.truth[:300, 0] > 0).astype(int)
    path = tmp_path / "mine.npz"
    write_members(path, {"activations": data.test[:300], "labels": labels})
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert 0 < found.worlds[0].means["probes, polynomial"] <= 1
    spoilt = without_features(Brought(data.test, labels), 0)
    np.testing.assert_allclose(np.cov(spoilt.activations.T), np.cov(data.test.T), atol=0.02)
    with pytest.raises(ValueError, match=r"activations must be \(n, d\) with n labels, n at least 100, got \(9, 4\)"):
        trial(Brought(np.zeros((9, 4)), np.zeros(9)), 0)
