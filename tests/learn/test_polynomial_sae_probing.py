import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split

from polyspan.learn import PolySAE
from polyspan.learn.polynomial_sae_probing import latent_separation, sparse_probe
from polyspan.learn.polynomial_sae_steering import spliced, steer


def coded(n=400, m=12, seed=0):
    """Codes of which column 3 fires in class 1, and columns 5 and 7 in halves of class 2."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=n)
    Z = rng.random((n, m)) * (rng.random((n, m)) < 0.2)
    Z[:, [3, 5, 7]] = 0
    half = rng.random(n) < 0.5
    Z[y == 1, 3] = 0.3 + 0.2 * rng.random((y == 1).sum())
    Z[(y == 2) & half, 5] = 1
    Z[(y == 2) & ~half, 7] = 1
    return Z, np.array(["none", "one", "two"])[y]


# Probes.


def test_a_probe_finds_the_columns_that_tell_a_class():
    Z, y = coded()
    one = sparse_probe(Z, y, random_state=0)
    assert one.classes.tolist() == ["none", "one", "two"]
    assert one.latents[1].tolist() == [3]
    assert one.f1_by_class[1] == 1
    assert one.f1_by_class[2] < 0.8
    two = sparse_probe(Z, y, k=2, random_state=0)
    assert sorted(two.latents[2].tolist()) == [5, 7]
    assert two.f1_by_class[2] == 1
    assert two.f1 == pytest.approx(two.f1_by_class.mean())
    sparse = sparse_probe(csr_array(Z), y, k=2, random_state=0)
    np.testing.assert_array_equal(sparse.latents, two.latents)
    assert sparse.f1 == two.f1


def test_a_probe_of_two_classes_is_a_logistic_regression_on_one_column():
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=300)
    X = rng.normal(size=(300, 4)) + np.array([0, 0, 1.5, 0]) * y[:, None]
    found = sparse_probe(X, y, random_state=3)
    train, test = train_test_split(
        np.arange(300), test_size=0.3, stratify=y, random_state=np.random.RandomState(3)
    )  # fmt: skip
    column = X[:, [2]] / X[train, 2].std()
    expected = LogisticRegression(class_weight="balanced").fit(column[train], y[train]).predict(column[test])
    assert found.latents.tolist() == [[2]]
    assert found.f1 == pytest.approx(f1_score(y[test], expected))
    assert found.accuracy == pytest.approx((expected == y[test]).mean())


def test_rows_held_out_choose_no_column():
    rng = np.random.default_rng(1)
    # With labels that are pure chance, a choice that saw the rows held out would score above chance.
    scores = [
        sparse_probe(rng.normal(size=(60, 500)), np.arange(60) % 2, random_state=seed).accuracy for seed in range(30)
    ]
    assert np.mean(scores) == pytest.approx(0.5, abs=0.07)


def test_separation_is_the_wasserstein_distance():
    Z, y = coded(120)
    found, classes = latent_separation(csr_array(Z), y)
    for i, label in enumerate(classes):
        expected = [wasserstein_distance(column[y == label], column[y != label]) for column in Z.T]
        np.testing.assert_allclose(found[i], expected, rtol=1e-9, atol=1e-12)
    two, label = latent_separation(Z, y == "one")
    assert label.tolist() == [True]
    np.testing.assert_allclose(two[0], found[1])


def test_labels_that_cannot_be_are_refused():
    Z, y = coded(40)
    for call in (sparse_probe, latent_separation):
        with pytest.raises(ValueError, match="labels must be one a row, 40, got 39"):
            call(Z, y[1:])
        with pytest.raises(ValueError, match="labels must name at least 2 classes, got 1"):
            call(Z, np.zeros(40))
        with pytest.raises(ValueError, match="NaN"):
            call(np.where(Z > 0.5, np.nan, Z), y)
    with pytest.raises(ValueError, match="k must be between 1 and the 12 columns, got 13"):
        sparse_probe(Z, y, k=13)
    with pytest.raises(ValueError, match="test_share must lie between 0 and 1, got 1"):
        sparse_probe(Z, y, test_share=1.0)
    with pytest.raises(ValueError, match="labels must name at least 2 rows a class, got 1 of 7"):
        sparse_probe(Z, np.array([7] + [1] * 20 + [2] * 19))


# Steering.


class Layered(torch.nn.Module):
    """Two layers; the first gives a tuple, as those of some transformers do."""

    class First(torch.nn.Module):
        def forward(self, x):
            return x * 2, "state"

    def __init__(self):
        super().__init__()
        self.first, self.second = self.First(), torch.nn.Identity()

    def forward(self, x):
        out, state = self.first(x)
        assert state == "state"
        return self.second(out)


def test_a_direction_is_added_inside_of_the_block_and_no_longer():
    model, x = Layered(), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    push = np.arange(4.0)
    for layer in ("first", "second"):
        with steer(model, layer, push, strength=3):
            torch.testing.assert_close(model(x), 2 * x + 3 * torch.arange(4.0))
        torch.testing.assert_close(model(x), 2 * x)
    with steer(model, "first", push), pytest.raises(RuntimeError, match="stop"):
        raise RuntimeError("stop")
    torch.testing.assert_close(model(x), 2 * x)
    half = model.double()
    with steer(half, "first", push):
        assert half(x.half()).dtype == torch.float16


def test_reconstructions_stand_in_for_what_a_layer_gives():
    x = torch.randn(30, 5, 4, generator=torch.Generator().manual_seed(0))
    rows = 2 * x.reshape(-1, 4).numpy()
    sae = PolySAE(n_components=12, k=2, max_tokens=3000, batch_size=50, random_state=0).fit(100 * rows)
    assert sae.scale_ != 1
    model = Layered()
    with spliced(model, "first", sae):
        found = model(50 * 2 * x)
    expected = sae.inverse_transform(sae.transform(100 * rows)).reshape(30, 5, 4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(model(x), 2 * x)


def test_layers_and_directions_that_do_not_fit_are_refused():
    model = Layered()
    with pytest.raises(ValueError, match=r"layer must name a submodule of the model, such as \['first', 'second'\]"):
        steer(model, "third", np.zeros(4)).__enter__()
    said = "direction must have the layer's width, 4"
    with steer(model, "first", np.zeros(3)), pytest.raises(ValueError, match=said):
        model(torch.zeros(1, 1, 4))
