import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.data import planted_gaussian_classes
from polyspan.errors import WrongContent
from polyspan.linalg import projector
from polyspan.nn import GrassmannClassifier, GrassmannHead, RiemannianSGD

FEW = {"max_iter": 60, "zero_features": "ignore"}


@pytest.mark.filterwarnings("ignore:.*fewer independent features:UserWarning")
@pytest.mark.filterwarnings("ignore:.*more than half of in_features:UserWarning")
@parametrize_with_checks([GrassmannClassifier(1, **FEW), GrassmannClassifier(1, init="random", **FEW)])
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def data():
    return planted_gaussian_classes(0, n_per=60, n_test=40)


def test_planted_subspaces_are_told_apart_where_one_vector_a_class_fails(data):
    four, one = (GrassmannClassifier(k, random_state=0).fit(data.train, data.train_labels) for k in (4, 1))
    assert four.score(data.test, data.test_labels) > 0.88
    assert one.score(data.test, data.test_labels) < 0.7
    assert four.loss_curve_[-1] < four.loss_curve_[0]
    np.testing.assert_allclose(projector(four.bases_), projector(np.asarray(data.bases)), atol=0.6)


def test_fit_is_the_head_trained_by_the_optimiser(data):
    X, y = data.train.astype(np.float32), data.train_labels
    fitted = GrassmannClassifier(4, max_iter=5, batch_size=len(X), momentum=0.5, random_state=0).fit(X, y)
    head = GrassmannHead(X.shape[1], 8, 4)
    head.reset_from_features(X, y)
    optimiser = RiemannianSGD(head.parameters(), lr=0.1, momentum=0.5)
    for step in range(5):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 + np.cos(np.pi * step / 5)) / 2
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(torch.as_tensor(X)), torch.as_tensor(y)).backward()
        optimiser.step()
    np.testing.assert_allclose(fitted.bases_, head.bases.detach().numpy(), atol=1e-5)
    assert fitted.bases_.dtype == np.float32


def test_probabilities_are_the_softmax_of_the_logits_and_agree_with_the_head(data):
    fitted = GrassmannClassifier(4, max_iter=30, random_state=0).fit(data.train, data.train_labels)
    logits = fitted.to_head()(torch.as_tensor(data.test)).detach()
    np.testing.assert_allclose(fitted.decision_function(data.test), logits.numpy(), rtol=1e-6)
    np.testing.assert_allclose(fitted.predict_proba(data.test), logits.softmax(1).numpy(), rtol=1e-6)
    assert fitted.residual(data.test).min() > 0
    np.testing.assert_allclose(np.diagonal(fitted.principal_angles(), axis1=0, axis2=1), 0, atol=1e-6)


def test_memory_maps_and_sparse_rows_give_what_arrays_give(data, tmp_path):
    X, y = np.where(np.abs(data.train) > 0.5, data.train, 0).astype(np.float32), data.train_labels
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    make = GrassmannClassifier(3, max_iter=20, random_state=1, zero_features="ignore")
    dense = make.fit(X, y).bases_.copy()
    np.testing.assert_array_equal(make.fit(mapped, y).bases_, dense)
    np.testing.assert_array_equal(make.fit(scipy.sparse.csr_array(X), y).bases_, dense)
    np.testing.assert_allclose(make.predict_proba(scipy.sparse.csr_array(X)), make.predict_proba(X), rtol=1e-6)


def test_partial_fit_learns_chunk_by_chunk_and_keeps_momentum(data):
    X, y = data.train, data.train_labels
    whole = GrassmannClassifier(4, random_state=0)
    for _ in range(8):
        whole.partial_fit(X, y, classes=np.arange(8))
    assert whole.score(data.test, data.test_labels) > 0.85
    halves = GrassmannClassifier(4, batch_size=60, random_state=0).partial_fit(X, y, classes=np.arange(8))
    once = GrassmannClassifier(4, batch_size=60, random_state=0).partial_fit(X, y, classes=np.arange(8))
    halves.partial_fit(X[:240], y[:240]).partial_fit(X[240:], y[240:])
    once.partial_fit(X, y)
    np.testing.assert_array_equal(halves.bases_, once.bases_)
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        GrassmannClassifier(4).partial_fit(X, y)
    with pytest.raises(ValueError, match="must be those of the first call"):
        once.partial_fit(X, y, classes=np.arange(9))
    with pytest.raises(ValueError, match="y must hold classes of the first call"):
        once.partial_fit(X, y + 5)


def test_early_stopping_keeps_the_best_held_out_subspaces(data):
    fitted = GrassmannClassifier(4, early_stopping=True, eval_every=5, n_iter_no_change=3, random_state=0)
    fitted.fit(data.train, data.train_labels)
    assert fitted.n_iter_ < 600
    assert fitted.n_iter_ == 5 * len(fitted.validation_scores_)
    assert max(fitted.validation_scores_) > 0.8


def test_warm_start_goes_on_from_the_last_subspaces(data):
    fitted = GrassmannClassifier(4, max_iter=60, warm_start=True, init="random", random_state=0)
    first = fitted.fit(data.train, data.train_labels).loss_curve_
    second = fitted.fit(data.train, data.train_labels).loss_curve_
    assert second[0] < 0.6 * first[0]


def test_unequal_dimensions_one_for_each_class(data):
    fitted = GrassmannClassifier([1, 2, 3, 4, 4, 4, 4, 4], max_iter=40, random_state=0)
    fitted.fit(data.train, data.train_labels)
    ranks = (np.abs(fitted.bases_).sum(axis=1) > 0).sum(axis=1)
    np.testing.assert_array_equal(ranks, [1, 2, 3, 4, 4, 4, 4, 4])


@pytest.mark.parametrize("names", [np.arange(8), np.array(list("abcdefgh")), np.array(list("abcdefgh"), dtype=object)])
def test_a_saved_classifier_answers_and_goes_on_as_before(data, names, tmp_path):
    y = names[data.train_labels]
    fitted = GrassmannClassifier(4, max_iter=20, random_state=0).fit(data.train, y)
    read = GrassmannClassifier.load(fitted.save(tmp_path / "heads.safetensors"))
    np.testing.assert_array_equal(read.predict(data.test), fitted.predict(data.test))
    np.testing.assert_array_equal(read.predict_proba(data.test), fitted.predict_proba(data.test))
    np.testing.assert_array_equal(read.partial_fit(data.train, y).bases_, fitted.partial_fit(data.train, y).bases_)
    from polyspan.io import save_fitted

    save_fitted(tmp_path / "other.safetensors", kind="OrthogonalMap", arrays={"a": np.eye(2)}, params={})
    with pytest.raises(WrongContent):
        GrassmannClassifier.load(tmp_path / "other.safetensors")


def test_no_global_random_state_is_touched(data):
    state, torch_state = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    GrassmannClassifier(4, max_iter=3, random_state=0).fit(data.train, data.train_labels)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)


def test_bad_input_is_named(data):
    X, y = data.train.copy(), data.train_labels
    with pytest.raises(ValueError, match="n_components must be below n_features = 40, got n_components=40"):
        GrassmannClassifier(40).fit(X, y)
    with pytest.raises(ValueError, match="y must hold at least 2 classes, got 1 class"):
        GrassmannClassifier(2).fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
        GrassmannClassifier(2, max_iter=0).fit(X, y)
    with pytest.raises(ValueError, match="init must be 'pca' or 'random', got 'ica'"):
        GrassmannClassifier(2, init="ica").fit(X, y)
    with pytest.raises(ValueError, match="validation_fraction must be between 0 and 1, got 2"):
        GrassmannClassifier(2, validation_fraction=2).fit(X, y)
    with pytest.raises(ValueError, match="early_stopping must leave every class a row"):
        GrassmannClassifier(2, early_stopping=True, random_state=0).fit(X[:3], [0, 1, 2])
    X[7] = 0
    with pytest.raises(ValueError, match=r"X must have no all-zero row, got 1, at rows \[7\]"):
        GrassmannClassifier(2).fit(X, y)
    with pytest.warns(UserWarning, match="fewer independent features"):
        GrassmannClassifier(4, max_iter=2, random_state=0).fit(data.train[:10], y[:10] % 4)
    with pytest.raises(ValueError, match=r"n_components must be an integer, or one for each class, got 2\.5"):
        GrassmannClassifier(2.5).fit(data.train, y)


@pytest.mark.parametrize(("dtype", "sizes"), [(np.float64, (1e-200, 1e200, 1e300)), (np.float32, (1e-30, 1e30))])
def test_rows_count_by_direction_whatever_their_length(data, dtype, sizes):
    X, y = data.train.astype(dtype), data.train_labels
    kept = {"n_components": 3, "max_iter": 8, "random_state": 0}
    expected = GrassmannClassifier(**kept).fit(X, y)
    for size in sizes:
        scaled = (X.astype(np.float64) * size).astype(dtype)
        found = GrassmannClassifier(**kept).fit(scaled, y)
        np.testing.assert_allclose(projector(found.bases_), projector(expected.bases_), atol=1e-3)
        np.testing.assert_allclose(found.predict_proba(scaled), expected.predict_proba(X), atol=1e-3)
        np.testing.assert_allclose(found.residual(scaled), expected.residual(X), atol=1e-3)
