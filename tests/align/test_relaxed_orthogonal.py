import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from polyspan.align import (
    OrthogonalMap,
    RelaxedOrthogonalAdapter,
    RelaxedOrthogonalLinear,
    alignment_report,
    choose_aligner,
    load_aligner,
    orthogonality_penalty,
    relaxed_orthogonality,
)
from polyspan.align._paired_training import Maps, contrast, losses, same_kind
from polyspan.align.relaxed_linear import spectral_orthogonality
from polyspan.claims.lambda_orthogonality import planted
from polyspan.errors import WrongContent
from polyspan.linalg import mean_average_precision, random_orthogonal
from polyspan.testing import ModuleCase, check_module

FAST = {"max_iter": 2, "device": "cpu", "random_state": 0}


def unit(A):
    return A / np.linalg.norm(A, axis=1, keepdims=True)


def pair(n=240, d_new=12, d_old=12, n_classes=6, seed=0):
    """New and old unit vectors of one set of items, the old ones turned and blurred; and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    new = rng.normal(size=(n_classes, d_new))[labels] + 0.7 * rng.normal(size=(n, d_new))
    turn = random_orthogonal(max(d_new, d_old), rng=rng)[:d_new, :d_old]
    return unit(new), unit(new @ turn + 0.8 * rng.normal(size=(n, d_old))), labels


@parametrize_with_checks(
    [
        RelaxedOrthogonalAdapter(**FAST),
        RelaxedOrthogonalAdapter("orthogonal", **FAST),
        RelaxedOrthogonalAdapter("affine", forward="mlp", hidden=4, init="random", dim_match="pad", **FAST),
        RelaxedOrthogonalAdapter(lam="auto", **FAST),
        RelaxedOrthogonalAdapter("srip", **FAST),
    ]
)
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 5), (5, 12), (7, 7)])
def test_the_layer_keeps_the_promises_of_a_layer_and_starts_as_an_isometry(d_in, d_out):
    def inputs(batch, generator):
        return (torch.randn(batch, d_in, generator=generator),)

    check_module(ModuleCase(lambda **kw: RelaxedOrthogonalLinear(d_in, d_out, **kw), inputs))
    layer = RelaxedOrthogonalLinear(d_in, d_out, generator=torch.Generator().manual_seed(0))
    assert layer.deviation() < 1e-5
    plain = nn.Linear(d_in, d_out)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, d_in)
    torch.testing.assert_close(plain(x), layer(x))
    assert RelaxedOrthogonalLinear(d_in, d_out, bias=False).bias is None
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RelaxedOrthogonalLinear(0, d_out)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    lam=st.floats(0, 5),
    steepness=st.floats(0.1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_penalty_is_the_papers_formula(rows, cols, lam, steepness, seed):
    W = np.random.default_rng(seed).normal(size=(rows, cols))
    gram = W @ W.T if rows <= cols else W.T @ W
    N = math.sqrt(((gram - np.eye(len(gram))) ** 2).sum())
    expected = N / (1 + math.exp(-steepness * (N - lam)))
    found = relaxed_orthogonality(torch.tensor(W), lam, steepness=steepness)
    assert float(found) == pytest.approx(expected, rel=1e-9)
    relative = relaxed_orthogonality(torch.tensor(W), lam / math.sqrt(min(W.shape)), steepness=steepness, relative=True)
    assert float(relative) == pytest.approx(expected, rel=1e-9)


def test_the_penalty_has_its_true_gradient_and_none_at_an_isometry():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: relaxed_orthogonality(w, 1.5, steepness=2), (W,))
    Q = torch.eye(4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(relaxed_orthogonality(Q, 0.5), Q)
    np.testing.assert_array_equal(grad, np.zeros((4, 4)))
    assert float(relaxed_orthogonality(W[0], math.inf).detach()) == 0


def test_a_bound_on_the_slope_cuts_the_gradient_and_not_the_value():
    W = (2 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    free = relaxed_orthogonality(W, 6.0, steepness=10)  # N is 6: the bump is at its top, 0.5 + 10 * 6 / 4
    cut = relaxed_orthogonality(W, 6.0, steepness=10, max_slope=2.0)
    assert float(free.detach()) == pytest.approx(float(cut.detach()))
    steep, gentle = (torch.autograd.grad(value, W)[0] for value in (free, cut))
    torch.testing.assert_close(gentle * (0.5 + 15) / 2, steep)


def literal_srip(W, v, n_iter):
    A = W @ W.T - np.eye(len(W)) if W.shape[0] <= W.shape[1] else W.T @ W - np.eye(W.shape[1])
    u = v
    for _ in range(n_iter - 1):
        u = A @ u
    return np.linalg.norm(A @ u) / np.linalg.norm(u), np.linalg.norm(A, 2)


@settings(max_examples=25)
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), n_iter=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_the_spectral_penalty_is_a_power_iteration_and_never_above_the_spectral_norm(rows, cols, n_iter, seed):
    rng = np.random.default_rng(seed)
    W, v = rng.normal(size=(rows, cols)), rng.normal(size=min(rows, cols))
    expected, norm = literal_srip(W, v, n_iter)
    found = float(spectral_orthogonality(torch.tensor(W), n_iter=n_iter, start=torch.tensor(v)))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found <= norm * (1 + 1e-12)


def test_many_products_find_the_spectral_norm_whatever_its_sign():
    Q = random_orthogonal(5, rng=np.random.default_rng(0))
    for values in ((1.0, 1.0, 1.0, 1.0, 1.5), (1.0, 1.0, 1.0, 0.9, 0.1)):
        W = Q * np.array(values)
        found = float(spectral_orthogonality(torch.tensor(W), n_iter=60, generator=torch.Generator().manual_seed(0)))
        assert found == pytest.approx(np.linalg.norm(W @ W.T - np.eye(5), 2), rel=1e-9)


def test_the_spectral_penalty_has_its_true_gradient_and_none_at_an_isometry():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: spectral_orthogonality(w, start=v), (W,))
    Q = torch.eye(4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(spectral_orthogonality(Q), Q)
    np.testing.assert_array_equal(grad, np.zeros((4, 4)))
    half = spectral_orthogonality(2 * torch.eye(3, dtype=torch.float16))
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="n_iter must be at least 1, got 0"):
        spectral_orthogonality(W, n_iter=0)
    with pytest.raises(ValueError, match=r"start must have shape \(2, 3\), got \(2, 4\)"):
        spectral_orthogonality(W, start=torch.ones(2, 4))
    with pytest.raises(ValueError, match="weight must be a matrix"):
        inspect.unwrap(spectral_orthogonality)(v[0])


def test_the_spectral_penalty_keeps_the_map_nearer_to_the_rotations_than_none_does():
    X, Y, labels = pair(seed=4)
    settings = {"max_iter": 60, "learning_rate": 3e-3, "device": "cpu", "random_state": 0}
    held, again, free = (
        RelaxedOrthogonalAdapter(mode, **settings).fit(X, Y, labels) for mode in ("srip", "srip", "affine")
    )
    np.testing.assert_array_equal(held.weights_, again.weights_)
    # The penalty has slope 1 where the map begins; the other terms pull the free map to a deviation above 1.
    worst = [np.abs(model.singular_values_**2 - 1).max() for model in (held, free)]
    assert 1e-4 < worst[0] < 0.5 * worst[1]
    assert held.lam_ is None
    assert all(epoch["penalty"] > 0 for epoch in held.history_)


def test_the_penalty_of_a_model_is_the_sum_over_its_linear_layers():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), RelaxedOrthogonalLinear(3, 5))
    parts = [relaxed_orthogonality(model[i].weight, 0.53, relative=True) for i in (0, 2)]
    torch.testing.assert_close(orthogonality_penalty(model), sum(parts))
    torch.testing.assert_close(orthogonality_penalty(model, names=["0"]), parts[0])
    torch.testing.assert_close(model[2].penalty(), parts[1])
    with pytest.raises(ValueError, match=r"linear layers of the model, \['0', '2'\], got \['1'\]"):
        orthogonality_penalty(model, names=["1"])
    with pytest.raises(ValueError, match=r"got \[\]"):
        orthogonality_penalty(nn.ReLU())


def test_without_labels_the_contrast_is_the_cross_entropy_of_pairs():
    q, c = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = nn.functional.cosine_similarity(q[:, None], c[None], dim=-1) / 0.2
    own = torch.arange(9)
    mine = contrast(q, c, same_kind(own).double(), 0.2)
    torch.testing.assert_close(mine, nn.functional.cross_entropy(scores, own), atol=1e-5, rtol=1e-5)


def test_the_terms_agree_with_loops_over_items():
    rng = np.random.default_rng(2)
    new, placed, old = rng.normal(size=(3, 5, 4))
    W, F = rng.normal(size=(2, 4, 4))
    kinds = [0, 1, 0, 2, 1]
    maps = Maps(*(torch.tensor(p) for p in (W, W[0], F, F[1])), None, None, None)
    found = losses(maps, *map(torch.tensor, (new, placed, old)), same_kind(torch.tensor(kinds)).double(), 0.3)

    def literal(queries, candidates):
        total = 0.0
        for i in range(5):
            e = [math.exp(unit(queries[i : i + 1])[0] @ unit(candidates[j : j + 1])[0] / 0.3) for j in range(5)]
            mine = [j for j in range(5) if kinds[j] == kinds[i]]
            total -= sum(math.log(e[j] / sum(e)) for j in mine) / len(mine) / 5
        return total

    adapted, lifted = new @ W + W[0], old @ F + F[1]
    expected = [
        np.mean([np.sum((a - b) ** 2) for a, b in zip(lifted, adapted, strict=True)]),
        np.mean([np.sum((a - b) ** 2) for a, b in zip(adapted, placed, strict=True)]),
        literal(lifted, adapted) + literal(lifted, placed),
    ]
    np.testing.assert_allclose([float(term) for term in found], expected, rtol=1e-5)


def test_without_training_the_maps_are_procrustes_and_least_squares():
    X, Y, labels = pair()
    fitted = RelaxedOrthogonalAdapter(max_iter=0).fit(X, Y, labels)
    np.testing.assert_allclose(fitted.transform(X), OrthogonalMap().fit(X, Y).transform(X), atol=1e-10)
    free = np.linalg.lstsq(np.c_[Y, np.ones(len(Y))], fitted.transform(X), rcond=None)[0]
    best = np.linalg.norm(np.c_[Y, np.ones(len(Y))] @ free - fitted.transform(X))
    assert np.linalg.norm(fitted.transform_old(Y) - fitted.transform(X)) < 1.01 * best


@pytest.mark.parametrize(("d_new", "d_old"), [(12, 12), (8, 12), (12, 8)])
def test_the_orthogonal_mode_is_an_isometry_after_training(d_new, d_old):
    X, Y, labels = pair(d_new=d_new, d_old=d_old)
    fitted = RelaxedOrthogonalAdapter("orthogonal", shift=False, max_iter=5, device="cpu", random_state=0)
    fitted.fit(X, Y, labels)
    assert fitted.deviation_ < 1e-12
    assert fitted.history_[-1]["deviation"] < 1e-5
    Z = fitted.transform(X)
    if d_new <= d_old:
        np.testing.assert_allclose(Z @ Z.T, X @ X.T, atol=1e-10)
    start = RelaxedOrthogonalAdapter("orthogonal", shift=False, max_iter=0).fit(X, Y, labels)
    assert np.linalg.norm(fitted.weights_ - start.weights_) > 1e-3


def test_a_larger_threshold_leaves_the_rotations_further_and_lowers_the_other_terms():
    X, Y, labels = pair(seed=3)
    settings = {"max_iter": 60, "steepness": 10.0, "learning_rate": 3e-3, "device": "cpu", "random_state": 0}
    ladder = [
        RelaxedOrthogonalAdapter("orthogonal", **settings),
        RelaxedOrthogonalAdapter(lam=0.1, **settings),
        RelaxedOrthogonalAdapter(lam=0.3, **settings),
        RelaxedOrthogonalAdapter("affine", **settings),
    ]
    fits = [model.fit(X, Y, labels) for model in ladder]
    left = [model.deviation_ for model in fits]
    free = [sum(model.history_[-1][name] for name in ("forward", "backward", "contrast")) for model in fits]
    assert left == sorted(left)
    assert free == sorted(free, reverse=True)
    assert fits[1].deviation_ < 1.1 * fits[1].lam_ < 0.6 * fits[-1].deviation_


def test_training_by_labels_finds_more_of_a_label_on_items_held_out_than_the_closed_forms():
    data = planted(0, n=600)

    def precision(max_iter):
        model = RelaxedOrthogonalAdapter(max_iter=max_iter, batch_size=256, device="cpu", random_state=0)
        model.fit(data.anchors_new, data.anchors_old, data.anchor_labels)
        found, lifted = model.transform(data.test_new), model.transform_old(data.test_old)
        return mean_average_precision(found, lifted, data.test_labels, data.test_labels, exclude_self=True)

    assert precision(30) > precision(0) + 0.1


def test_a_learnt_threshold_is_the_one_of_least_loss_on_anchors_held_out():
    X, Y, labels = pair(seed=5)
    fitted = RelaxedOrthogonalAdapter(lam="auto", max_iter=20, device="cpu", random_state=0).fit(X, Y, labels)
    best = min(fitted.held_losses_, key=lambda row: row[1])[0]
    assert fitted.lam_ == pytest.approx(best * math.sqrt(12))
    assert len({loss for _, loss in fitted.held_losses_}) == 5


@pytest.mark.parametrize("forward", ["linear", "mlp"])
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_the_scale_of_the_vectors_does_not_matter(forward, scale):
    X, Y, labels = pair(seed=6)
    a, b = (
        RelaxedOrthogonalAdapter(forward=forward, hidden=8, device="cpu", random_state=0, max_iter=4) for _ in range(2)
    )
    a.fit(X, Y, labels)
    b.fit(scale * X, Y / scale, labels)
    np.testing.assert_allclose(b.transform(scale * X) * scale, a.transform(X), atol=1e-4)
    np.testing.assert_allclose(b.transform_old(Y / scale) * scale, a.transform_old(Y), atol=1e-4)


@pytest.mark.parametrize(("d_new", "d_old"), [(10, 6), (6, 10)])
@pytest.mark.parametrize("dim_match", ["rect", "pad", "pca", "truncate"])
def test_widths_that_differ_are_matched_as_asked(d_new, d_old, dim_match):
    X, Y, labels = pair(d_new=d_new, d_old=d_old, seed=7)
    model = RelaxedOrthogonalAdapter(dim_match=dim_match, **FAST)
    if dim_match == "truncate":
        with pytest.warns(UserWarning, match=r"drops \d+\.\d% of the variance"):
            model.fit(X, Y, labels)
    else:
        model.fit(X, Y, labels)
    width = {"rect": d_old, "pad": 10}.get(dim_match, 6)
    Z, lifted, placed = model.transform(X), model.transform_old(Y), model.place_old(Y)
    assert Z.shape == lifted.shape == placed.shape == (len(X), width)
    if placed.shape == Y.shape or dim_match == "truncate":
        np.testing.assert_array_equal(placed, Y[:, :width])
    if dim_match == "pca" and d_old > d_new:
        assert placed.var(axis=0).sum() > Y[:, :width].var(axis=0).sum()
    assert model.score(X, Y) > 0.5
    if dim_match == "truncate" and d_new > d_old:
        np.testing.assert_allclose(model.transform(np.c_[X[:, :6], np.zeros((len(X), 4))]), Z, atol=1e-12)


def test_there_and_back_is_the_identity_for_equal_widths():
    X, Y, labels = pair(seed=8)
    fitted = RelaxedOrthogonalAdapter(**FAST).fit(X, Y, labels)
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(X)), X, atol=1e-10)
    with pytest.raises(ValueError, match="12 features, got 3"):
        fitted.inverse_transform(X[:, :3])


@pytest.mark.parametrize(
    "model",
    [
        RelaxedOrthogonalAdapter(**FAST),
        RelaxedOrthogonalAdapter("orthogonal", forward="mlp", hidden=5, **FAST),
        RelaxedOrthogonalAdapter("affine", dim_match="pca", normalize=True, **FAST),
        RelaxedOrthogonalAdapter(lam="auto", dim_match="pad", **FAST),
    ],
)
def test_a_saved_adapter_maps_both_sides_alike(model, tmp_path):
    X, Y, labels = pair(d_new=6, d_old=9, seed=9)
    path = model.fit(X, Y, labels).save(tmp_path / "map.safetensors", source="new", target="old")
    again, about = load_aligner(path)
    assert isinstance(again, RelaxedOrthogonalAdapter)
    assert about == {"source": "new", "target": "old"}
    for name, rows in (("transform", X), ("transform_old", Y), ("place_old", Y)):
        found = getattr(again, name)(rows.astype(np.float32))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, getattr(model, name)(rows.astype(np.float32)))
    assert (again.lam_, again.deviation_, again.contrast_) == (model.lam_, model.deviation_, model.contrast_)
    with pytest.raises(WrongContent, match="RelaxedOrthogonalAdapter"):
        OrthogonalMap.load(path)


def test_it_changes_places_with_other_aligners():
    X, Y, labels = pair(seed=10)
    candidates = {"relaxed": RelaxedOrthogonalAdapter(**FAST), "orthogonal": OrthogonalMap()}
    choice = choose_aligner(X, Y, labels, metric="map", candidates=candidates, directions=("gallery",))
    assert {row.aligner for row in choice.table} == {"relaxed", "orthogonal"}
    fitted = RelaxedOrthogonalAdapter(**FAST).fit(X, Y)
    assert alignment_report(fitted, X, Y)["warnings"] == []
    shuffled = np.random.default_rng(0).permutation(len(Y))
    told = alignment_report(RelaxedOrthogonalAdapter(**FAST).fit(X, Y[shuffled]), X, Y[shuffled])["warnings"]
    assert "do not seem to belong together" in told[0]


def test_it_repeats_by_seed_and_leaves_global_chance_alone():
    X, Y, labels = pair(seed=11)
    settings = {"init": "random", "batch_size": 50, "max_iter": 3, "device": "cpu"}
    state = torch.random.get_rng_state()
    a, b, c = (RelaxedOrthogonalAdapter(random_state=s, **settings).fit(X, Y, labels).weights_ for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_labels_of_any_kind_serve_and_without_them_items_are_contrasted_as_pairs():
    X, Y, labels = pair(seed=12)
    named = np.array([f"class {c}" for c in labels])
    by_name, by_number, by_pair = (RelaxedOrthogonalAdapter(**FAST).fit(X, Y, k) for k in (named, labels, None))
    np.testing.assert_array_equal(by_name.weights_, by_number.weights_)
    assert (by_number.contrast_, by_pair.contrast_) == ("labels", "pairs")
    with pytest.warns(UserWarning, match="one class only"):
        alone = RelaxedOrthogonalAdapter(**FAST).fit(X, Y, np.zeros(len(X)))
    np.testing.assert_allclose(alone.weights_, by_pair.weights_)
    every = RelaxedOrthogonalAdapter(**FAST).fit(X, Y, np.arange(len(X)))  # classes of one item: no positive but itself
    np.testing.assert_allclose(every.weights_, by_pair.weights_, atol=1e-3)


def test_a_new_encoder_worse_than_the_old_is_told():
    X, Y, labels = pair(n=600, seed=13)
    with pytest.warns(UserWarning, match="presumes a better new encoder; are X and y swapped"):
        RelaxedOrthogonalAdapter(**FAST).fit(Y, X, labels)


def test_a_loss_that_is_lost_gives_back_the_best_maps_before():
    X, Y, _ = pair(seed=14)
    model = RelaxedOrthogonalAdapter("affine", learning_rate=1e22, max_iter=4, device="cpu", random_state=0)
    for rows_a_step in (40, 512):
        with pytest.warns(UserWarning, match="no longer finite after 0 epochs"):
            model.set_params(batch_size=rows_a_step).fit(X, Y)
        np.testing.assert_allclose(model.transform(X), OrthogonalMap().fit(X, Y).transform(X), atol=1e-5)
        assert model.n_iter_ == len(model.history_) == 0


def test_a_threshold_out_of_reach_is_told():
    X, Y, labels = pair(seed=15)
    with pytest.warns(UserWarning, match=r"lam=40 is above sqrt\(12\)"):
        RelaxedOrthogonalAdapter(lam=40, lam_scale="absolute", **FAST).fit(X, Y, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": -1.0}, "lam must be at least 0, got -1.0"),
        ({"lam": math.nan}, "lam must be a finite number or 'auto', got nan"),
        ({"lam": math.inf}, "no threshold at all is mode='affine'"),
        ({"lam": "learn"}, "got 'learn'"),
        ({"mode": "strict"}, "mode must be one of .* got 'strict'"),
        ({"dim_match": "crop"}, "dim_match must be one of"),
        ({"steepness": 0}, "steepness must be positive, got 0"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"loss_weights": (1, 1)}, "three non-negative numbers"),
        ({"loss_weights": (1, 1, -1)}, "three non-negative numbers"),
        ({"max_iter": -1}, "max_iter must be at least 0, got -1"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change, message):
    X, Y, _ = pair(n=20)
    with pytest.raises(ValueError, match=message):
        RelaxedOrthogonalAdapter(**change).fit(X, Y)


def test_rows_and_labels_that_cannot_be_used_are_refused():
    X, Y, labels = pair(n=20)
    with pytest.raises(ValueError, match=r"labels must have shape \(20,\), one an anchor, got \(19,\)"):
        RelaxedOrthogonalAdapter(**FAST).fit(X, Y, labels[:-1])
    with pytest.raises(ValueError, match="labels must have no NaN"):
        RelaxedOrthogonalAdapter(**FAST).fit(X, Y, np.full(20, np.nan))
    with pytest.raises(ValueError, match="at least 2 anchors, got 1"):
        RelaxedOrthogonalAdapter(**FAST).fit(X[:1], Y[:1])
    fitted = RelaxedOrthogonalAdapter(**FAST).fit(X, Y[:, :5])
    with pytest.raises(ValueError, match="5 features of old vectors, got 12"):
        fitted.transform_old(Y)
    with pytest.raises(ValueError, match="finite, got NaN or infinity at row 1"):
        fitted.transform_old(np.array([[0.0] * 5, [np.nan] * 5]))
    for lam, steepness, slope in ((-1, 1, None), (math.nan, 1, None), (1, 0, None), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be"):
            relaxed_orthogonality(torch.eye(2), lam, steepness=steepness, max_slope=slope)


def test_few_and_constant_anchors_need_no_warning():
    rng = np.random.default_rng(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = RelaxedOrthogonalAdapter(**FAST).fit(*rng.normal(size=(2, 3, 9)))
        assert np.isfinite(few.transform(rng.normal(size=(4, 9)))).all()
        still = RelaxedOrthogonalAdapter(**FAST).fit(np.ones((6, 3)), np.zeros((6, 2)))
        assert np.isfinite(still.transform(np.ones((2, 3)))).all()
