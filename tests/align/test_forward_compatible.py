from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.align import OrthogonalMap, RidgeMap, choose_aligner
from polyspan.align._compatible_fit import Recipe
from polyspan.align._forward_network import Lessons, fastfill_terms, folded, new_network, run_layers, train_forward
from polyspan.align.forward_compatible import FastFillMap, ForwardCompatibleMap
from polyspan.errors import NotConverged, WrongContent

FAST = {"hidden": 32, "max_iter": 20, "warmup": 1, "learning_rate": 1e-2, "batch_size": 128, "random_state": 0}
TINY = {**FAST, "max_iter": 2, "warmup": 0, "hidden": 8, "device": "cpu"}


def fct(**options):
    return ForwardCompatibleMap(**{**FAST, "device": "cpu", **options})


def fastfill(**options):
    return FastFillMap(**{**FAST, "device": "cpu", **options})


def rows(n=400, d=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng, rng.normal(size=(n, d))


@parametrize_with_checks([ForwardCompatibleMap(**TINY), FastFillMap(**TINY)])
def test_sklearn_contract(estimator, check):
    check(estimator)


def test_the_layers_have_the_papers_widths():
    rng, X = rows(20, 3)
    fitted = fct(max_iter=1, warmup=0, hidden=11).fit(X, X[:, :2], rng.normal(size=(20, 5)))
    shapes = {name: [W.shape for W, _ in layers] for name, layers in fitted.layers_.items()}
    assert shapes == {"old": [(3, 6), (6, 4)], "side": [(5, 10), (10, 4)], "mixer": [(8, 11), (11, 11), (11, 2)]}
    assert ForwardCompatibleMap().hidden == 2048
    assert [W.shape for W, _ in fct(max_iter=1, warmup=0).fit(X, X).layers_["side"]] == [(3, 6), (6, 6)]


def test_folded_layers_are_the_network_at_inference():
    generator = torch.Generator().manual_seed(0)
    network = new_network(3, 2, 4, 7, 5, generator).double()
    for name, part in network.state_dict().items():
        if name.endswith(("running_mean", "running_var", "weight", "bias")):
            drawn = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            part.copy_(drawn.abs() + 0.1 if name.endswith("var") else drawn)
    old, side = (torch.randn(6, d, generator=generator, dtype=torch.float64) for d in (3, 2))
    with torch.no_grad():
        expected = network.eval()(old, side).numpy()
    np.testing.assert_allclose(run_layers(folded(network), old.numpy(), side.numpy()), expected, atol=1e-10)


def test_the_loss_of_forward_training_is_the_mean_squared_error_and_batch_norm_rests_for_half_of_it():
    _, X = rows(40)
    generator = torch.Generator().manual_seed(0)
    network = new_network(4, 4, 4, 8, 4, generator)
    lessons = Lessons(X, X, 2 * X, None, None)
    made = Recipe(1e-12, 0.0, 4, 0, 20, "float32", None, False)
    history = train_forward(network, lessons, None, made, generator, "cpu")
    norms = [int(part.num_batches_tracked) for part in network.modules() if isinstance(part, torch.nn.BatchNorm1d)]
    assert norms == [4] * 6  # two batches an epoch, two epochs of four
    with torch.no_grad():
        out = network(*(torch.as_tensor(X, dtype=torch.float32),) * 2).numpy()
    assert history[-1]["total"] == pytest.approx(np.mean((out - 2 * X) ** 2), rel=1e-4)


def test_the_terms_of_fastfill_agree_with_loops_over_items():
    rng = np.random.default_rng(1)
    out, new, labels = rng.normal(size=(5, 4)), rng.normal(size=(5, 3)), [0, 1, 1, 2, 0]
    W, b = rng.normal(size=(3, 3)), rng.normal(size=3)
    out[4, -1] = -50.0  # below the bound
    expected = []
    for o, x, label in zip(out, new, labels, strict=True):
        logits = [sum(W[c, j] * o[j] for j in range(3)) + b[c] for c in range(3)]
        cross = np.log(sum(np.exp(logits))) - logits[label]
        alike = sum((o[j] - x[j]) ** 2 for j in range(3)) + 0.7 * cross
        s = max(o[3], -12.0)
        expected.append((alike / np.exp(s) + s) / 2)
    head = torch.tensor(W), torch.tensor(b)
    found = fastfill_terms(torch.tensor(out), torch.tensor(new), torch.tensor(labels), head, 0.7)
    np.testing.assert_allclose(found["total"], expected, rtol=1e-12)
    plain = fastfill_terms(torch.tensor(out), torch.tensor(new), None, None, 0.7)
    np.testing.assert_array_equal(plain["classes"], np.zeros(5))
    np.testing.assert_allclose(plain["distance"], np.sum((out[:, :3] - new) ** 2, axis=1))


@pytest.mark.parametrize("made", [fct, fastfill])
def test_it_lifts_by_what_no_linear_map_can(made):
    """Of a symmetric distribution the absolute value is uncorrelated with the number, and two ReLUs make it."""
    _, X = rows(1200, 3)
    Y = np.abs(X)
    fitted, ridge = made().fit(X[:1000], Y[:1000]), RidgeMap().fit(X[:1000], Y[:1000])

    def unexplained(model):
        held = Y[1000:]
        return np.linalg.norm(model.transform(X[1000:]) - held) / np.linalg.norm(held - held.mean(axis=0))

    assert unexplained(ridge) > 0.9
    assert unexplained(fitted) < 0.5
    assert fitted.residual_ < 0.5


def test_side_information_is_used_and_then_wanted():
    rng, X = rows(600)
    S = rng.normal(size=(600, 3))
    with_side, without = fct().fit(X[:500], S[:500], S[:500]), fct().fit(X[:500], S[:500])
    assert with_side.score(X[500:], S[500:], S[500:]) > 0.8
    assert without.score(X[500:], S[500:]) < 0.3
    with pytest.raises(ValueError, match="side must hold 3 features of side-information a row, got None"):
        with_side.transform(X)
    with pytest.raises(ValueError, match=r"side must have shape \(600, 3\), got \(600, 2\)"):
        with_side.transform(X, S[:, :2])
    with pytest.raises(ValueError, match="fitted without side-information"):
        without.transform(X, S)
    with pytest.raises(ValueError, match=r"side must have one row an anchor \(600\), got 5"):
        fct().fit(X, S, S[:5])


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_the_scale_of_the_vectors_does_not_matter(scale):
    rng, X = rows(120)
    Y, labels = X[:, :3] @ rng.normal(size=(3, 3)), np.arange(120) % 3
    for made in (fct(max_iter=4), fastfill(max_iter=4)):
        args = (labels,) if isinstance(made, FastFillMap) else ()
        lifted = made.fit(X, Y, *args).transform(X)
        again = made.fit(scale * X, Y / scale, *args).transform(scale * X)
        np.testing.assert_allclose(again * scale, lifted, atol=1e-3 * np.abs(lifted).max())


def noisy(seed):
    """Half of the items, told by the sign of one number, were embedded with ten times the noise."""
    rng, X = rows(1200, 4, seed)
    blurred = X[:, 0] > 0
    Y = X @ rng.normal(size=(4, 4)) + np.where(blurred, 1.0, 0.1)[:, None] * rng.normal(size=(1200, 4))
    return X, Y, blurred


def test_the_order_puts_items_of_uncertain_place_first():
    X, Y, blurred = noisy(3)
    fitted = fastfill(max_iter=40).fit(X[:800], Y[:800])
    order = fitted.backfill_order(X[800:])
    first = order[: np.sum(blurred[800:])]
    # The noise is told by one number, of which a learner misses the edge only.
    assert blurred[800:][first].mean() > 0.85
    # Its variance, four features of 1 or of 0.01, as a share of the mean squared length.
    told, size = fitted.uncertainty(X[800:]), np.mean(np.sum(Y[:800] ** 2, axis=1))
    assert np.median(told[blurred[800:]]) == pytest.approx(4 / size, rel=0.5)
    assert np.median(told[~blurred[800:]]) < 0.1 * np.median(told[blurred[800:]])
    np.testing.assert_array_equal(np.sort(order), np.arange(400))


def classes(seed=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=300)
    Y = rng.normal(size=(3, 4))[labels] + 0.6 * rng.normal(size=(300, 4))
    return Y @ rng.normal(size=(4, 4)) + 0.5 * rng.normal(size=(300, 4)), Y, labels


def test_the_new_classifier_is_taken_or_fitted_and_its_term_falls_with_its_weight():
    X, Y, labels = classes()
    named = np.array(["c", "a", "b"])[labels]
    free, held = (fastfill(class_weight=w).fit(X, Y, named) for w in (0.0, 5.0))
    assert held.history_[-1]["classes"] < free.history_[-1]["classes"]
    size = np.sqrt(np.mean(np.sum(Y**2, axis=1)))
    own = LogisticRegression(max_iter=1000).fit(Y / size, named)
    np.testing.assert_allclose(held.classifier_weights_ * size, own.coef_, atol=1e-12)
    turned = SimpleNamespace(coef_=own.coef_[::-1] / size, intercept_=own.intercept_[::-1], classes_=own.classes_[::-1])
    again = fastfill(class_weight=5.0).fit(X, Y, named, classifier=turned)
    np.testing.assert_allclose(again.transform(X), held.transform(X), atol=1e-3)


def test_a_classifier_of_two_classes_keeps_its_probabilities():
    X, Y, labels = classes()
    two = LogisticRegression().fit(Y, labels > 0)
    fitted = fastfill(max_iter=2).fit(X, Y, labels > 0, classifier=two)
    logits = Y @ fitted.classifier_weights_.T + fitted.classifier_bias_
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, two.predict_proba(Y), atol=1e-10)


def test_a_saved_map_lifts_alike(tmp_path):
    X, Y, labels = classes()
    S = X[:, :2]
    plain = fct(max_iter=2, normalize=True).fit(X, Y, S)
    full = fastfill(max_iter=2).fit(X, Y, labels, S)
    for model in (plain, full):
        path = model.save(tmp_path / "map.safetensors", source="old")
        again = type(model).load(path)
        found = again.transform(X.astype(np.float32), S)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, model.transform(X.astype(np.float32), S))
        assert again.history_ == model.history_
    np.testing.assert_array_equal(again.backfill_order(X, S), full.backfill_order(X, S))
    np.testing.assert_array_equal(again.classifier_weights_, full.classifier_weights_)
    with pytest.raises(WrongContent, match="FastFillMap"):
        OrthogonalMap.load(path)


def test_it_changes_places_with_other_aligners():
    X, Y, labels = classes()
    candidates = {"fct": fct(max_iter=5), "fastfill": fastfill(max_iter=5), "ridge": RidgeMap()}
    choice = choose_aligner(X, Y, labels, metric="map", candidates=candidates, directions=("gallery",))
    assert {row.aligner for row in choice.table} == {"fct", "fastfill", "ridge"}
    with pytest.raises(ValueError, match="has no inverse"):
        fct(max_iter=2).fit(X, Y).inverse_transform(Y)


def test_it_repeats_by_seed_and_leaves_global_chance_alone():
    X, Y, labels = classes()
    state = torch.random.get_rng_state()
    a, b, c = (fastfill(max_iter=3, random_state=s).fit(X, Y, labels).transform(X) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loss_that_is_lost_is_told():
    X, Y, _ = classes()
    with pytest.raises(NotConverged, match=r"no longer finite after [01] epochs; try a learning_rate below 1e"):
        fct(learning_rate=1e30, warmup=0).fit(X, Y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"weight_decay": -1}, "weight_decay must be finite and at least 0, got -1"),
        ({"warmup": 99}, "warmup must be between 0 and max_iter=20 epochs, got 99"),
        ({"class_weight": -1}, "class_weight must be finite and at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change, message):
    X, Y, labels = classes()
    with pytest.raises(ValueError, match=message):
        fastfill(**change).fit(X, Y, labels)


def test_labels_and_classifiers_that_cannot_be_used_are_refused():
    X, Y, labels = classes()
    own = LogisticRegression(max_iter=1000).fit(Y, labels)
    narrow = SimpleNamespace(coef_=own.coef_[:, :2], intercept_=own.intercept_, classes_=own.classes_)
    for args, message in (
        ((labels[:5],), r"labels must have shape \(300,\), one an anchor, got \(5,\)"),
        ((np.zeros(300),), "labels must hold at least 2 classes, got 1 class: 0.0"),
        ((None, None, own), "labels must be given with a classifier, got None"),
        ((labels + 1, None, own), "classifier must know every label, got 1 others, such as 3"),
        ((labels, None, narrow), r"classifier must have weights of shape \(3, 4\) .* got \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fastfill().fit(X, Y, *args)
    with pytest.raises(ValueError, match="at least 2 anchors, got 1"):
        fct().fit(X[:1], Y[:1])
