import warnings

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from polyspan.align import (
    CompatibleClassifier,
    CompatibleOutput,
    OrthogonalCompatibleHead,
    OrthogonalCompatibleLoss,
    class_prototypes,
    evaluate_compatibility,
    prototype_separability,
)
from polyspan.errors import NotConverged, WrongContent
from polyspan.io import save_fitted
from polyspan.run import torch_generator

SMALL = {
    "hidden": (24,),
    "embedding_dim": 6,
    "extra_dim": 4,
    "batch_size": 32,
    "random_state": 0,
    "device": "cpu",
    "learning_rate": 1e-2,
}
MAPS = ("cayley", "matrix-exp", "householder", "retraction")


def small(**options):
    return CompatibleClassifier(**{**SMALL, "max_iter": 6, **options})


def blobs(seed=0, n=240, C=4, d=8, spread=1.0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % C
    centres = 3 * rng.normal(size=(C, d))
    return (centres[y] + spread * rng.normal(size=(n, d))).astype(np.float32), y


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def chain():
    """A first model of three classes and its update with four."""
    X, y = blobs()
    first = small().fit(X[y < 3], y[y < 3])
    return X, y, first, small(max_iter=15).fit(X, y, old=first)


@parametrize_with_checks([CompatibleClassifier(hidden=(32,), max_iter=12, random_state=0, device="cpu")])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("how", MAPS)
def test_the_transform_is_orthogonal_at_the_start_and_after_steps(how):
    head = OrthogonalCompatibleHead(9, 5, 3, 4, orthogonal_map=how, generator=torch_generator(0))
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
    z, y = torch.randn(30, 9, generator=torch_generator(1)), torch.arange(30) % 3
    start = head.transform.matrix().detach().clone()
    for _ in range(12):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(z).logits, y).backward()
        optimiser.step()
        head.retract_()
    Q = head.transform.matrix().detach()
    # One retraction leaves what three Newton-Schulz steps from a long stride of Adam leave.
    torch.testing.assert_close(Q @ Q.T, torch.eye(9), atol=2e-3 if how == "retraction" else 1e-5, rtol=0)
    assert torch.linalg.matrix_norm(Q - start) > 0.05


def test_exponential_and_cayley_maps_equal_torchs_own_parametrisations():
    for how, theirs in (("matrix-exp", "matrix_exp"), ("cayley", "cayley")):
        head = OrthogonalCompatibleHead(6, 4, 3, 2, orthogonal_map=how, generator=torch_generator(0)).double()
        layer = nn.utils.parametrizations.orthogonal(
            nn.Linear(6, 6, bias=False, dtype=torch.float64), orthogonal_map=theirs
        )
        with torch.no_grad():
            head.transform.raw.normal_(generator=torch_generator(1))
            layer.parametrizations.weight.original.copy_(head.transform.raw)
            layer.parametrizations.weight[0].base.copy_(torch.eye(6))
            head.transform.base.copy_(torch.eye(6))
        mine, other = head.transform.matrix().detach(), layer.weight.detach()
        # torch's Cayley map is the inverse of ours: its skew matrix has the other sign.
        off = min(float((mine - other).abs().max()), float((mine - other.T).abs().max()))
        assert off < 1e-10


def test_a_free_matrix_far_from_orthogonal_comes_back_in_a_few_calls():
    head = OrthogonalCompatibleHead(6, 4, 3, 2, orthogonal_map="retraction", generator=torch_generator(0))
    with torch.no_grad():
        head.transform.raw.mul_(7.0)
    for _ in range(5):
        head.retract_()
    Q = head.transform.matrix().detach()
    torch.testing.assert_close(Q @ Q.T, torch.eye(6), atol=1e-5, rtol=0)


def test_the_transform_changes_no_cosine_and_folds_into_the_classifier():
    head = OrthogonalCompatibleHead(12, 5, 3, 4, generator=torch_generator(0)).double()
    with torch.no_grad():
        head.transform.raw.normal_(generator=torch_generator(1))
        # The base was drawn in single precision.
        head.transform.base.copy_(torch.linalg.qr(head.transform.base)[0])
    out = head(torch.randn(20, 12, dtype=torch.float64, generator=torch_generator(2)))
    torch.testing.assert_close(out.transformed @ out.transformed.T, out.embedding @ out.embedding.T)
    plain = out.embedding @ (head.classifier.weight @ head.transform.matrix()).T
    torch.testing.assert_close(out.logits, plain)
    torch.testing.assert_close(out.compatible, out.embedding[:, :5])
    torch.testing.assert_close(out.embedding.norm(dim=1), torch.ones(20, dtype=torch.float64))


def test_without_transform_or_projection_the_head_is_a_cosine_cut():
    head = OrthogonalCompatibleHead(7, 5, 3, 2, project=False, use_transform=False)
    z = torch.randn(4, 7, generator=torch_generator(0))
    out = head(z)
    assert torch.equal(out.transformed, out.embedding)
    torch.testing.assert_close(out.embedding, torch.nn.functional.normalize(z, dim=1))
    assert sorted(dict(head.named_parameters())) == ["classifier.weight"]
    head.retract_()


def test_a_generator_fixes_the_weights_and_the_bias_is_the_authors():
    made = [OrthogonalCompatibleHead(6, 4, 3, 2, bias=True, generator=torch_generator(3)) for _ in range(2)]
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        made[0].transform.bias.fill_(2.0)
    z = torch.randn(3, 6)
    torch.testing.assert_close(made[0](z).transformed, made[1](z).transformed + 2.0)


def literal_loss(o, h_d, P, y, eps, tau, weights):
    """Every term by the formula, item by item, in plain Python."""
    ce, bct, cos = [], [], []
    for i, c in enumerate(y):
        u = h_d[i] / np.linalg.norm(h_d[i])
        for into, scores, factor in ((ce, o[i], 1.0), (bct, P @ u / tau, weights[c])):
            logp = scores - np.log(np.sum(np.exp(scores)))
            into.append(factor * ((1 - eps) * -logp[c] + eps * np.mean(-logp)))
        cos.append(weights[c] * (1 - P[c] @ u / np.linalg.norm(P[c])))
    return {"ce": np.mean(ce), "bct": np.mean(bct), "cos": np.mean(cos)}


@pytest.mark.parametrize(("tau", "weights"), [(1.0, None), (0.1, np.array([1.0, 0.2, 0.0]))])
def test_the_loss_equals_its_formula(tau, weights):
    rng = np.random.default_rng(0)
    o, h, P, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 6)), rng.normal(size=(3, 4)), np.arange(7) % 3
    loss = OrthogonalCompatibleLoss(P, tau=tau, class_weights=weights, dtype=torch.float64)
    out = CompatibleOutput(*map(torch.as_tensor, (o, h[:, :4], h, h)))
    found = {name: float(term) for name, term in loss(out, torch.as_tensor(y)).items()}
    expected = literal_loss(o, h[:, :4], P, y, 0.1, tau, np.ones(3) if weights is None else weights)
    expected["total"] = 5 * expected["ce"] + 10 * expected["bct"] + 5 * expected["cos"]
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_prototype_term_without_a_temperature_has_a_floor():
    """Logits in [-1, 1] leave at least log(1 + (C - 1) exp(-2)) without smoothing."""
    P = torch.eye(10)
    loss = OrthogonalCompatibleLoss(P, label_smoothing=0.0)
    out = CompatibleOutput(torch.zeros(10, 10), torch.eye(10), torch.eye(10), torch.eye(10))
    terms = loss(out, torch.arange(10))
    assert terms["bct"] > np.log(1 + 9 * np.exp(-2.0))
    assert terms["cos"] == pytest.approx(0.0, abs=1e-6)


def test_a_class_without_a_prototype_is_left_out_of_the_alignment():
    P = np.eye(3)
    P[2] = 0
    out = CompatibleOutput(*(torch.randn(4, 3, generator=torch_generator(i)) for i in range(4)))
    terms = OrthogonalCompatibleLoss(P, reduction="none")(out, torch.tensor([0, 2, 1, 2]))
    assert (terms["bct"][[1, 3]] == 0).all()
    assert (terms["cos"][[1, 3]] == 0).all()
    assert (terms["bct"][[0, 2]] > 0).all()


def test_prototypes_are_means_of_unit_rows_and_batches_add_up():
    X, y = blobs(n=50)
    by_hand = np.stack([unit(X[y == c]).mean(axis=0) for c in range(4)])
    with pytest.warns(UserWarning, match=r"embeddings holds vectors of length .* scaled to length 1"):
        found = class_prototypes(X, y)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    U = unit(X).astype(np.float64)
    batches = ((torch.as_tensor(U[i : i + 7]), torch.as_tensor(y[i : i + 7])) for i in range(0, 50, 7))
    np.testing.assert_allclose(class_prototypes(batches), class_prototypes(U, y), atol=1e-12)
    assert (np.linalg.norm(found, axis=1) < 1).all()
    np.testing.assert_allclose(np.linalg.norm(class_prototypes(U, y, renormalize=True), axis=1), 1.0)


def test_separability_is_the_share_that_is_nearest_to_its_own_prototype():
    rows = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [1.0, 0.05]])
    P = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(prototype_separability(rows, [0, 0, 1, 1], P), [1.0, 0.5, 0.0])


def test_an_update_is_comparable_with_the_old_index_where_an_independent_model_is_not(chain):
    X, y, first, second = chain
    old = first.transform(X)
    assert second.transform(X).shape == (len(X), 10)
    np.testing.assert_allclose(np.linalg.norm(second.transform(X), axis=1), 1.0, atol=1e-5)
    alone = small(max_iter=15, random_state=7).fit(X, y)
    with_update = evaluate_compatibility(second.transform(X, width=6), old, y, y, True, reference=old)
    without = evaluate_compatibility(alone.transform(X), old, y, y, True, reference=old)
    assert with_update.compatible
    assert with_update.scores.map > without.scores.map + 0.3
    assert not without.compatible
    assert second.predict(X).tolist() == pytest.approx(y.tolist())


def test_shuffled_prototypes_and_the_turned_vector_are_not_comparable(chain):
    X, y, first, second = chain
    old = first.transform(X)
    good = evaluate_compatibility(second.transform(X, width=6), old, y, y, True).scores.map
    with torch.no_grad():
        turned = second.encoder_(torch.as_tensor(X)).transformed.numpy()[:, :6]
    assert evaluate_compatibility(turned, old, y, y, True).scores.map < good - 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrong = small(max_iter=15).fit(X, y, old=old[np.random.default_rng(0).permutation(len(old))])
    assert evaluate_compatibility(wrong.transform(X, width=6), old, y, y, True).scores.map < good - 0.3


def test_old_may_be_a_model_its_vectors_or_a_function(chain):
    X, y, first, _ = chain
    made = [small(max_iter=2).fit(X, y, old=o).transform(X) for o in (first, first.transform(X), first.transform)]
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


def test_no_extra_dimensions_is_the_older_method_and_no_old_model_a_plain_classifier(chain):
    X, y, first, _ = chain
    same = small(extra_dim=0, use_transform=False).fit(X, y, old=first)
    assert same.transform(X).shape[1] == first.transform(X).shape[1] == 6
    assert first.prototypes_ is None
    assert all(epoch["bct"] == epoch["cos"] == 0 for epoch in first.history_)
    assert first.score(X[y < 3], y[y < 3]) > 0.9


def test_a_module_of_ones_own_is_copied_and_its_dropout_uses_no_global_chance():
    X, y = blobs(n=60, d=9)
    backbone = nn.Sequential(nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2), nn.Dropout(0.2), nn.Flatten())
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    states = torch.random.get_rng_state(), str(np.random.get_state()), torch.get_default_dtype()  # noqa: NPY002
    fitted = small(backbone=backbone, max_iter=2).fit(X, y)
    again = small(backbone=backbone, max_iter=2).fit(X, y)
    np.testing.assert_array_equal(fitted.transform(X), again.transform(X))
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[1] == str(np.random.get_state())  # noqa: NPY002
    assert states[2] == torch.get_default_dtype()
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_low_precision_separability_and_every_map_train():
    X, y = blobs(n=120)
    old = unit(X[:, :5])
    for options in (
        {"precision": "bfloat16"},
        {"prototype_weights": "separability"},
        {"orthogonal_map": "retraction"},
        {"orthogonal_map": "householder", "bias": True},
    ):
        made = small(max_iter=3, **options).fit(X, y, old=old)
        assert made.transform(X).dtype == np.float32
        assert made.history_[-1]["total"] < made.history_[0]["total"]
    assert made.separability_.shape == (4,)
    assert made.old_unit_


def test_weights_by_separability_let_go_of_classes_that_the_old_encoder_cannot_tell():
    X, y = blobs(n=200)
    old = unit(np.where((y >= 2)[:, None], unit(np.random.default_rng(0).normal(size=(200, 5))), np.eye(5)[y]))
    free, held = (small(prototype_weights=how).fit(X, y, old=old) for how in ("separability", "equal"))
    assert free.separability_[:2].min() > 0.95 > free.separability_[2:].max()
    assert free.history_[-1]["bct"] < held.history_[-1]["bct"]


def test_a_last_batch_of_one_row_joins_the_one_before():
    X, y = blobs(n=33)
    assert small(batch_size=16, max_iter=1).fit(X, y).n_iter_ == 1
    assert small(batch_size=32, max_iter=1).fit(X, y).n_iter_ == 1


def test_a_fitted_encoder_comes_back_from_its_file(chain, tmp_path):
    X, y, _, second = chain
    path = second.save(tmp_path / "new.safetensors", model="second")
    back = CompatibleClassifier.load(path)
    np.testing.assert_array_equal(back.transform(X), second.transform(X))
    np.testing.assert_array_equal(back.predict(X), second.predict(X))
    np.testing.assert_array_equal(back.class_means_, second.class_means_)
    third = small(max_iter=1).fit(X, y, old=back)
    assert third.old_dim_ == 10
    backbone = nn.Linear(8, 12)
    own = small(backbone=backbone, max_iter=1).fit(X, y)
    path = own.save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"backbone must be the module that .* got None"):
        CompatibleClassifier.load(path)
    np.testing.assert_array_equal(
        CompatibleClassifier.load(path, backbone=nn.Linear(8, 12)).transform(X), own.transform(X)
    )
    with pytest.raises(WrongContent, match="weights that fit the backbone"):
        CompatibleClassifier.load(path, backbone=nn.Linear(8, 13))
    save_fitted(tmp_path / "other.safetensors", kind="OrthogonalMap", arrays={"a": np.ones(2)}, params={})
    with pytest.raises(WrongContent, match="a fitted CompatibleClassifier"):
        CompatibleClassifier.load(tmp_path / "other.safetensors")


class Interrupted(nn.Module):
    """A backbone that is interrupted at one of its calls, once."""

    def __init__(self, at):
        super().__init__()
        self.linear, self.drop, self.calls, self.at = nn.Linear(8, 12), nn.Dropout(0.1), 0, at

    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
        return self.drop(self.linear(x))

    def extra_repr(self):
        return ""


def test_an_interrupted_fit_goes_on_and_ends_where_an_uninterrupted_one_does(chain, tmp_path):
    X, y, first, _ = chain
    path = tmp_path / "state.safetensors"
    backbone = Interrupted(at=20)
    options = {"backbone": backbone, "checkpoint": path, "max_iter": 5}
    with pytest.raises(KeyboardInterrupt):
        small(**options).fit(X, y, old=first)
    assert path.exists()
    with pytest.raises(ValueError, match="checkpoint must be of this data and these settings"):
        small(**{**options, "learning_rate": 0.5}).fit(X, y, old=first)
    backbone.at = 0
    resumed = small(**options).fit(X, y, old=first)
    assert not path.exists()
    whole = small(**{**options, "checkpoint": None}).fit(X, y, old=first)
    np.testing.assert_array_equal(resumed.transform(X), whole.transform(X))
    assert resumed.history_ == whole.history_


class Explodes(nn.Linear):
    """A layer that returns NaN from one training call on."""

    calls, at = 0, 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x) * (float("nan") if self.training and self.calls >= self.at else 1.0)


def test_a_loss_of_nan_ends_training_at_the_epoch_before():
    X, y = blobs(n=64)
    backbone = Explodes(8, 12)
    backbone.at = 5
    with pytest.warns(UserWarning, match="no longer finite after 2 epochs; try a learning_rate below"):
        fitted = small(backbone=backbone, max_iter=9).fit(X, y)
    assert fitted.n_iter_ == 2
    assert np.isfinite(fitted.transform(X)).all()
    backbone.at = 1
    with pytest.raises(NotConverged, match="no longer finite after 0 epochs"):
        small(backbone=backbone).fit(X, y)


def test_old_vectors_that_are_not_unit_are_scaled_and_told_of():
    X, y = blobs(n=60)
    with pytest.warns(UserWarning, match=r"old holds vectors of length .* search the old index by cosine"):
        long = small(max_iter=1).fit(X, y, old=X[:, :5])
    assert long.old_unit_ is False
    np.testing.assert_array_equal(long.transform(X), small(max_iter=1).fit(X, y, old=unit(X[:, :5])).transform(X))


def test_classes_that_were_renamed_are_told_of(chain):
    X, y, first, _ = chain
    with pytest.warns(UserWarning, match=r"2 of 3 classes of one name lie elsewhere.*renamed or reordered"):
        small(max_iter=1).fit(X, np.array([1, 0, 2, 3])[y], old=first)


OLD = unit(np.random.default_rng(0).normal(size=(240, 5)))


@pytest.mark.parametrize(
    ("options", "old", "words"),
    [
        ({}, OLD[:100], r"old must have one vector a row of X \(240\), got 100"),
        ({}, np.ones(240), "old must be 2-d, one vector a row"),
        ({}, np.where(np.arange(240)[:, None] == 3, 0.0, OLD), "old must have no all-zero row, got one at row 3"),
        ({}, np.where(np.arange(240)[:, None] == 4, np.nan, OLD), "old must be finite, got NaN or infinity in row 4"),
        ({"hidden": (4,)}, OLD, "old_dim must be at most in_features=4, got 5.*widen the backbone"),
        ({"hidden": ()}, None, "hidden must hold at least one positive width"),
        ({"backbone": "resnet"}, None, "backbone must be 'mlp' or a torch module, got 'resnet'"),
        ({"backbone": nn.Unflatten(1, (2, 4))}, None, r"backbone must turn \(n, 8\) into \(n, features\)"),
        ({"orthogonal_map": "qr"}, None, "orthogonal_map must be one of .* got 'qr'"),
        ({"precision": "float16"}, None, "precision must be one of"),
        ({"prototype_weights": "auto"}, None, "prototype_weights must be one of"),
        ({"batch_size": 1}, None, "batch_size must be at least 2, got 1"),
        ({"extra_dim": -1}, OLD, "extra_dim must be at least 0, got -1"),
        ({"max_iter": 0}, None, "max_iter must be at least 1, got 0"),
        ({"warmup": 7}, None, "warmup must be between 0 and max_iter=6 epochs, got 7"),
        ({"learning_rate": 0}, None, "learning_rate must be positive, got 0"),
        ({"weight_decay": -1}, None, "weight_decay must be finite and at least 0, got -1"),
        ({"w_bct": -2}, None, "w_bct must be at least 0 and finite, got -2"),
    ],
)
def test_bad_input_to_the_classifier_is_named(options, old, words):
    X, y = blobs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=words):
            small(**options).fit(X, y, old=old)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((4, 5, 3, 2), {}, "old_dim must be at most in_features=4, got 5"),
        ((8, 5, 3, 2), {"project": False}, r"in_features must be old_dim \+ extra_dim = 7 where project=False, got 8"),
        ((8, 5, 1, 2), {}, "num_classes must be at least 2, got 1"),
        ((8, 0, 3, 2), {}, "old_dim must be at least 1, got 0"),
        ((8, 5, 3, -1), {}, "extra_dim must be at least 0, got -1"),
        ((8, 5, 3, 2), {"orthogonal_map": "qr"}, "orthogonal_map must be one of"),
    ],
)
def test_bad_input_to_the_head_is_named(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        OrthogonalCompatibleHead(*arguments, **options)


@pytest.mark.parametrize(
    ("prototypes", "options", "words"),
    [
        (np.eye(3), {"tau": 0}, "tau must be positive, got 0"),
        (np.eye(3), {"w_cos": float("nan")}, "w_cos must be at least 0 and finite, got nan"),
        (np.eye(3), {"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        (np.eye(3), {"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        (np.eye(3), {"class_weights": [1.0, -1.0, 0.0]}, "class_weights must be 3 finite numbers"),
        (np.eye(3), {"class_weights": [1.0]}, "class_weights must be 3 finite numbers"),
        (np.full((3, 3), np.nan), {}, "prototypes must be finite"),
        (np.ones(3), {}, "prototypes must be 2-d"),
        (None, {"class_weights": [1.0]}, "class_weights must come with prototypes"),
    ],
)
def test_bad_input_to_the_loss_is_named(prototypes, options, words):
    with pytest.raises(ValueError, match=words):
        OrthogonalCompatibleLoss(prototypes, **options)


def test_labels_and_widths_that_do_not_fit_the_loss_are_named():
    loss = OrthogonalCompatibleLoss(np.eye(3))
    out = CompatibleOutput(*(torch.randn(2, 3) for _ in range(4)))
    with pytest.raises(ValueError, match=r"target must lie in 0..2, got 0 to 3"):
        loss(out, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"prototypes must have shape \(3, 2\).* got \(3, 3\)"):
        loss(out._replace(compatible=torch.randn(2, 2)), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("rows", "labels", "n_classes", "words"),
    [
        (np.eye(3), [0, 1], None, r"labels must have one entry a row of embeddings \(3\), got 2"),
        (np.eye(3), [0, 1, 3], None, r"every class must have a row, got none of 1 classes, the first \[2\]"),
        (np.eye(3), [0, 1, 2], 2, "labels must be between 0 and n_classes - 1 = 1, got 0 to 2"),
        (np.eye(3), [0, -1, 2], None, "labels must be at least 0, got -1 to 2"),
        (np.eye(3), [0.0, 1.0, 2.0], None, "labels must be one-dimensional integers"),
        (np.eye(3), None, None, "labels must be given with an array of embeddings"),
        (np.zeros((3, 2)), [0, 1, 2], None, "embeddings must have no all-zero row, got one at row 0"),
        ([(np.eye(2), [0, 1]), (np.eye(3), [0, 1, 1])], None, None, "embeddings must have one width, got 2 and then 3"),
        ([(np.eye(2), [0, 1, 1])], None, None, "labels must have one entry a row"),
        ([], None, None, "embeddings must hold at least one row"),
    ],
)
def test_bad_input_to_prototypes_is_named(rows, labels, n_classes, words):
    with pytest.raises(ValueError, match=words):
        class_prototypes(rows, labels, n_classes)


def test_empty_classes_may_be_allowed():
    found = class_prototypes(np.eye(3), [0, 1, 3], 5, allow_empty=True)
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_features_that_a_relu_has_put_out_still_get_a_direction():
    head = OrthogonalCompatibleHead(6, 4, 3, 2, generator=torch_generator(0))
    torch.testing.assert_close(head.embed(torch.zeros(2, 6)).norm(dim=1), torch.ones(2))


def test_a_row_of_zeros_has_a_gradient_that_is_no_explosion():
    head = OrthogonalCompatibleHead(6, 4, 3, 2, project=False)
    z = torch.zeros(2, 6, requires_grad=True)
    loss = OrthogonalCompatibleLoss(np.eye(4)[:3])
    loss(head(z), torch.tensor([0, 1]))["total"].backward()
    assert torch.isfinite(z.grad).all()
