import re

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.errors import NotConverged, WrongContent
from polyspan.nn import CRATE, CrateClassifier, load_crate

FEW = {"dim": 8, "depth": 1, "n_heads": 2, "max_iter": 3, "batch_size": 16}


@parametrize_with_checks([CrateClassifier(**FEW), CrateClassifier(**FEW, optimizer="lion", pool="mean")])
def test_sklearn_contract(estimator, check):
    check(estimator)


def stripes(n=240, seed=0):
    """Images of 8 by 8 whose class is the row that is lit, with noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n)
    X = 0.3 * rng.normal(size=(n, 8, 8))
    X[np.arange(n), 2 * y] += 1
    return X.astype(np.float32), np.array(["a", "b", "c", "d"])[y]


def brief(**options):
    kept = {
        "dim": 16,
        "depth": 2,
        "n_heads": 2,
        "max_iter": 60,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "pool": "mean",
    }
    return CrateClassifier(**(kept | {"random_state": 0} | options))


@pytest.fixture(scope="module")
def fitted():
    return brief().fit(*stripes())


def test_lit_rows_are_learnt_and_the_global_generators_stay(fitted):
    states = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    again = brief().fit(*stripes())
    assert np.array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[1])
    X, y = stripes(seed=1)
    assert fitted.score(X, y) > 0.95
    assert again.loss_curve_ == fitted.loss_curve_
    assert np.array_equal(again.predict_proba(X), fitted.predict_proba(X))
    assert fitted.predict_proba(X).dtype == np.float32
    assert fitted.loss_curve_[-1] < fitted.loss_curve_[0] / 2


def test_images_flat_rows_and_memory_maps_are_the_same_to_it(fitted, tmp_path):
    X, y = stripes()
    np.save(tmp_path / "x.npy", X.reshape(len(X), -1))
    for other in (X.reshape(len(X), -1), X[:, None], np.load(tmp_path / "x.npy", mmap_mode="r")):
        assert brief().fit(other, y).loss_curve_ == fitted.loss_curve_


def test_colours_and_patches_are_taken_as_given():
    X, y = stripes(80)
    made = brief(max_iter=2, patch_size=(2, 4), block={"step": "exact"}).fit(np.stack([X, X, X], 1), y)
    assert made.image_shape_ == (3, 8, 8)
    assert made.model_.patch_size == (2, 4)
    assert made.model_.blocks[0].attention.step == "exact"
    flat = brief(max_iter=2, image_shape=(3, 8, 8)).fit(np.stack([X, X, X], 1).reshape(80, -1), y)
    assert flat.model_.channels == 3


def test_moving_images_by_whole_pixels_repeats_their_edges():
    from polyspan.nn.image_training import moved

    images = torch.arange(2 * 1 * 4 * 5, dtype=torch.float32).reshape(2, 1, 4, 5)
    seen = moved(images, 1, torch.Generator().manual_seed(0))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    for i in range(2):
        options = [padded[i, 0, r : r + 4, c : c + 5] for r in range(3) for c in range(3)]
        assert any(np.array_equal(seen[i, 0].numpy(), option) for option in options)
    assert torch.equal(moved(images, 0, torch.Generator()), images)


def test_a_fit_that_was_stopped_goes_on_to_the_same_result(fitted, tmp_path, monkeypatch):
    from polyspan.nn.image_training import ImageTraining

    path, step = tmp_path / "c.safetensors", ImageTraining._step

    def stops(self, x, y):
        if len(self.losses) == 45:
            raise KeyboardInterrupt
        return step(self, x, y)

    monkeypatch.setattr(ImageTraining, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        brief(checkpoint=path, checkpoint_every=20).fit(*stripes())
    steps = []
    monkeypatch.setattr(ImageTraining, "_step", lambda self, x, y: (steps.append(1), step(self, x, y))[1])
    with pytest.raises(ValueError, match=r"must belong to this fit, got another \['learning_rate'\]; remove it"):
        brief(checkpoint=path, learning_rate=1e-3).fit(*stripes())
    resumed = brief(checkpoint=path, checkpoint_every=20).fit(*stripes())
    assert len(steps) == 20
    assert resumed.loss_curve_ == fitted.loss_curve_
    assert not path.exists()


def test_a_classifier_is_kept_in_a_file(fitted, tmp_path):
    X, _ = stripes(seed=2)
    read = CrateClassifier.load(fitted.save(tmp_path / "m.safetensors"))
    assert np.array_equal(read.predict_proba(X), fitted.predict_proba(X))
    assert np.array_equal(read.predict(X), fitted.predict(X))
    assert read.get_params() == fitted.get_params()
    assert read.n_iter_ == 60
    assert isinstance(load_crate(tmp_path / "m.safetensors"), CRATE)
    from polyspan.nn import save_crate

    with pytest.raises(WrongContent):
        CrateClassifier.load(save_crate(fitted.model_, tmp_path / "n.safetensors"))


def test_features_maps_and_rates_come_from_the_network(fitted):
    X, _ = stripes(30, seed=3)
    images = torch.as_tensor((X - fitted.mean_) / fitted.spread_)[:, None]
    with torch.no_grad():
        expected = fitted.model_.forward_features(images).mean(dim=1).numpy()
    np.testing.assert_allclose(fitted.features(X), expected, atol=1e-5)
    np.testing.assert_allclose(fitted.attention_maps(X), fitted.model_.attention_maps(images).numpy(), atol=1e-6)
    told = fitted.layer_report(X)
    assert told.n_items == 30
    assert (told.rate_within > 0).all()


def test_asking_for_low_rates_lowers_them():
    X, y = stripes()
    plain, asked = brief().fit(X, y), brief(rate_weights=[0.0, 0.03]).fit(X, y)
    before, after = plain.layer_report(X), asked.layer_report(X)
    assert (after.rate_within - after.rate)[1] < (before.rate_within - before.rate)[1] - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and at least 0, got -1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'lion', got 'sgd'"),
        ({"rate_weights": [1.0]}, "rate_weights must be 2 numbers, one a layer, got 1"),
        ({"image_shape": (4, 4)}, r"image_shape must be \(h, w\) or \(c, h, w\) with 64 values, got \(4, 4\)"),
        ({"patch_size": 3}, r"image_size must be a multiple of patch_size, got \(8, 8\) and \(3, 3\)"),
        ({"n_heads": 5}, "num_heads must divide dim=16"),
    ],
)
def test_parameters_out_of_range_are_told(options, message):
    X, y = stripes(40)
    with pytest.raises(ValueError, match=message):
        brief(**options).fit(X.reshape(40, -1), y)


def test_one_class_a_class_mismatch_and_a_diverging_loss_are_told(fitted):
    X, y = stripes(40)
    with pytest.raises(ValueError, match="y must hold at least 2 classes, got 1 class: a"):
        brief().fit(X, np.full(40, "a"))
    with pytest.raises(ValueError, match="X has 16 features, but CrateClassifier is expecting 64"):
        fitted.predict(X[:, :4, :4].reshape(40, -1))
    with pytest.raises(NotConverged, match="the loss is no longer finite after"):
        brief(learning_rate=1e30, warmup=0.0).fit(X, y)


@pytest.mark.parametrize("shape", [(4, 4), (4, 16), (4, 4, 4), (64, 1), (3, 8, 8)])
def test_images_of_another_shape_are_refused_even_with_as_many_pixels(fitted, shape):
    X = np.zeros((2, *shape), dtype=np.float32)
    told = re.escape(f"X must hold images of shape (1, 8, 8), (c, h, w) as fitted, got {shape}")
    for method in (fitted.predict, fitted.features, fitted.attention_maps, fitted.layer_report):
        with pytest.raises(ValueError, match=told):
            method(X)


def test_images_of_another_shape_than_image_shape_are_refused():
    X, y = stripes(40)
    with pytest.raises(ValueError, match=r"X must hold images of image_shape \(4, 16\), got \(8, 8\)"):
        brief(image_shape=(4, 16)).fit(X, y)
    assert brief(image_shape=(1, 8, 8), max_iter=1).fit(X, y).image_shape_ == (1, 8, 8)


def test_constant_images_are_fitted_without_a_warning():
    made = brief(max_iter=2).fit(np.ones((20, 8, 8), dtype=np.float32), np.arange(20) % 2)
    assert made.spread_ == 1
    assert np.isfinite(made.predict_proba(np.ones((3, 8, 8), dtype=np.float32))).all()
