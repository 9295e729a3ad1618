import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.cluster import (
    ImageJitter,
    NestedMatryoshkaClustering,
    NestedMatryoshkaHead,
    PositionalDisentangler,
    _matryoshka_training,
)
from polyspan.cluster._matryoshka_encoders import RandomCrop, RowJitter, encode
from polyspan.cluster._matryoshka_training import Training
from polyspan.data import digits
from polyspan.errors import NotConverged, WrongContent
from polyspan.io import EmbeddingReader
from polyspan.linalg import clustering_accuracy

TINY = {"n_components": 16, "hidden": 16, "bottleneck": 8, "n_layers": 1, "device": "cpu", "random_state": 0}


# One of the checks asks for one component, which a layer norm makes constant.
@pytest.mark.filterwarnings("ignore:Number of distinct clusters:sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([NestedMatryoshkaClustering(2, max_steps=6, **TINY)])
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def images():
    X, y = digits()
    rows = np.flatnonzero(y < 4)[:320]
    return X[rows].reshape(-1, 8, 8), y[rows]


@pytest.fixture(scope="module")
def fitted(images):
    options = TINY | {"hidden": 32, "max_steps": 40, "batch_size": 64, "n_prototypes": 32, "lr": 3e-3}
    return NestedMatryoshkaClustering(4, **options).fit(images[0])


def test_groups_of_backbone_features_are_found():
    X, y = make_blobs(240, 24, centers=4, cluster_std=2.0, random_state=0)
    options = TINY | {"max_steps": 60, "batch_size": 64, "lr": 3e-3}
    made = NestedMatryoshkaClustering(4, **options).fit(X)
    assert clustering_accuracy(y, made.labels_) > 0.9


def test_levels_run_from_coarse_to_fine_and_labels_are_nearest_centres(images, fitted):
    X, y = images
    assert fitted.widths_ == (1, 2, 4, 8, 16)
    assert fitted.n_prototypes_ == (2, 4, 8, 16, 32)
    assert fitted.level_labels_.shape == (320, 5)
    apart = np.linalg.norm(fitted.transform(X)[:, None] - fitted.cluster_centers_, axis=-1)
    np.testing.assert_array_equal(fitted.labels_, apart.argmin(axis=1))
    used = [len(np.unique(level)) for level in fitted.level_labels_.T]
    assert used[0] <= 2 < used[-1]
    np.testing.assert_array_equal(fitted.predict(X), fitted.labels_)
    np.testing.assert_array_equal(fitted.predict(X, level=1), fitted.level_labels_[:, 1])
    np.testing.assert_array_equal(fitted.predict(X, level=-1), fitted.level_labels_[:, -1])
    assert clustering_accuracy(y, fitted.labels_) > 0.6
    alone = NestedMatryoshkaClustering(None, **TINY, max_steps=2).fit(X)
    np.testing.assert_array_equal(alone.labels_, alone.level_labels_[:, -1])
    np.testing.assert_array_equal(alone.predict(X), alone.labels_)


def test_training_lowers_the_loss_and_uses_its_prototypes(fitted):
    first, last = fitted.history_[0], fitted.history_[-1]
    assert last["dino"] < first["dino"]
    assert last["used"][-1] > 8
    assert fitted.n_steps_ == last["step"] == 40


def test_features_are_prefixes_of_one_another_in_the_float_width_of_the_input(images, fitted):
    X, _ = images
    Z = fitted.transform(X)
    assert Z.shape == (320, 16)
    assert Z.dtype == np.float32
    np.testing.assert_array_equal(fitted.transform(X, width=4), Z[:, :4])
    wide = fitted.transform(X.astype(np.float64))
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, Z, atol=1e-4)
    assert list(fitted.get_feature_names_out()[:1]) == ["nestedmatryoshkaclustering0"]


def test_labels_and_global_generators_are_left_alone(images):
    X, y = images
    make = NestedMatryoshkaClustering(4, max_steps=4, encoder="transformer", patch_size=4, drop_path=0.3, **TINY)
    states = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    plain = make.fit(X).transform(X)
    np.testing.assert_array_equal(make.fit(X, y).transform(X), plain)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[1])


def test_maps_files_datasets_and_streams_give_what_an_array_gives(images, tmp_path):
    X = images[0].reshape(320, 64)
    options = TINY | {"max_steps": 6, "batch_size": 64}
    expected = NestedMatryoshkaClustering(4, **options).fit(X)
    np.save(tmp_path / "x.npy", X)
    sets = torch.utils.data.TensorDataset(torch.as_tensor(X), torch.zeros(320))
    for source in (tmp_path / "x.npy", np.load(tmp_path / "x.npy", mmap_mode="r"), sets, torch.as_tensor(X)):
        found = NestedMatryoshkaClustering(4, **options).fit(source)
        np.testing.assert_array_equal(found.labels_, expected.labels_)
    reader = EmbeddingReader(tmp_path / "x.npy", batch_rows=100)
    streamed = NestedMatryoshkaClustering(4, **options).fit(reader)
    np.testing.assert_array_equal(streamed.predict(X), streamed.labels_)
    np.testing.assert_array_equal(streamed.predict(reader), streamed.labels_)


def test_a_folder_of_pictures_is_read(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"{number:02}.png")
    for shape in ((8, 8), (3, 8, 8)):
        made = NestedMatryoshkaClustering(2, image_shape=shape, max_steps=2, **TINY).fit(tmp_path)
        assert made.n_features_in_ == np.prod(shape)
        np.testing.assert_array_equal(made.predict(tmp_path), made.labels_)
    with pytest.raises(ValueError, match=r"image_shape must be .* to read a folder"):
        NestedMatryoshkaClustering(2, **TINY).fit(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none must hold pictures"):
        NestedMatryoshkaClustering(2, image_shape=(8, 8), **TINY).fit(tmp_path / "none")


def test_a_run_that_was_killed_goes_on_to_the_same_result(images, tmp_path, monkeypatch):
    X, _ = images
    path = tmp_path / "c.safetensors"
    options = TINY | {"max_steps": 12, "batch_size": 64}
    whole = NestedMatryoshkaClustering(4, **options).fit(X)
    once, passes = Training._pass, []

    def killed(self):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return once(self)

    monkeypatch.setattr(Training, "_pass", killed)
    with pytest.raises(KeyboardInterrupt):
        NestedMatryoshkaClustering(4, checkpoint=path, **options).fit(X)
    monkeypatch.undo()
    resumed = NestedMatryoshkaClustering(4, checkpoint=path, **options).fit(X)
    np.testing.assert_array_equal(resumed.transform(X), whole.transform(X))
    assert resumed.history_ == whole.history_
    with pytest.raises(ValueError, match=r"belongs to another fit, with lr=\S+ in place of 1.0"):
        NestedMatryoshkaClustering(4, checkpoint=path, **(options | {"lr": 1.0})).fit(X)
    with pytest.raises(ValueError, match=r"belongs to another fit, with random_state=\d+ in place of 99"):
        NestedMatryoshkaClustering(4, checkpoint=path, **(options | {"random_state": 99})).fit(X)


def test_a_saved_clusterer_predicts_as_before(images, fitted, tmp_path):
    X, _ = images
    back = NestedMatryoshkaClustering.load(fitted.save(tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(back.predict(X), fitted.labels_)
    np.testing.assert_array_equal(back.transform(X), fitted.transform(X))
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
    made = NestedMatryoshkaClustering(4, encoder=own, max_steps=2, **TINY).fit(X)
    made.save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="encoder must be given to load"):
        NestedMatryoshkaClustering.load(tmp_path / "own.safetensors")
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12))
    with pytest.raises(WrongContent, match="other weights"):
        NestedMatryoshkaClustering.load(tmp_path / "own.safetensors", encoder=other)
    again = NestedMatryoshkaClustering.load(tmp_path / "own.safetensors", encoder=own)
    np.testing.assert_array_equal(again.predict(X), made.labels_)
    assert not any(torch.equal(a, b) for a, b in zip(own.parameters(), made.module_.encoder.parameters(), strict=True))


def test_a_clusterer_that_was_read_goes_on_from_the_checkpoint_of_the_one_that_was_written(images, tmp_path):
    X, _ = images
    path = tmp_path / "run.safetensors"
    made = NestedMatryoshkaClustering(4, max_steps=2, widths=(4, 16), checkpoint=path, **TINY).fit(X)
    back = NestedMatryoshkaClustering.load(made.save(tmp_path / "m.safetensors"))
    assert back.get_params() == made.get_params() | {"checkpoint": None}
    np.testing.assert_array_equal(back.set_params(checkpoint=path).fit(X).labels_, made.labels_)


def test_patches_are_learned_with_masks_and_small_crops_and_can_be_disentangled(images):
    X, _ = images
    options = TINY | {"max_steps": 4, "batch_size": 32, "patch_size": 2}
    made = NestedMatryoshkaClustering(
        None, encoder="transformer", mask="cyclic", n_local=2, global_scale=(0.32, 1.0), augment=None, **options
    ).fit(X)
    assert made.history_[0]["ibot"] > 0
    P = made.patch_features(X)
    assert P.shape == (320, 16, 16)
    cleaned = PositionalDisentangler(2).fit(P)
    assert cleaned.r2_curve_[-1] < cleaned.r2_curve_[0]
    plain = NestedMatryoshkaClustering(4, max_steps=2, **TINY).fit(X)
    with pytest.raises(ValueError, match="encoder must give features of patches, as 'transformer' does"):
        plain.patch_features(X)


def literal_losses(training, x, monkeypatch):
    """Losses written from the formula, pair by pair, image by image, on the views that training drew."""
    plan, drawn, masks = training.plan, [], []
    view, make = training._view, _matryoshka_training.mask_batch
    monkeypatch.setattr(training, "_view", lambda y: drawn.append(view(y)) or drawn[-1])
    monkeypatch.setattr(_matryoshka_training, "mask_batch", lambda *a, **k: masks.append(make(*a, **k)) or masks[-1])
    cut, crops = RandomCrop.__call__, []
    monkeypatch.setattr(RandomCrop, "__call__", lambda self, y, g: crops.append(cut(self, y, g)) or crops[-1])
    parts, _ = training._losses(x)
    first, second = drawn
    crops = crops[2:]  # the first two are the large views
    teacher, student, b = training.teacher, training.student, len(x)

    def softmax_loss(s, q):
        return -(q * torch.log_softmax(s / plan.student_temperature, dim=1)).sum(dim=1)

    def balanced(logits):
        Q = torch.exp(logits.double() / plan.teacher_temperature[0]).T
        K, B = Q.shape
        for _ in range(3):
            Q = Q / Q.sum(dim=1, keepdim=True) / K
            Q = Q / Q.sum(dim=0, keepdim=True) / B
        return (Q * B).T.float()

    with torch.no_grad():
        whole = torch.cat([first, second])
        z, patches = encode(teacher.encoder, whole)
        own, own_patches = encode(student.encoder, whole, masks[0])
        dino = ibot = 0.0
        for level in range(len(student.head.widths)):
            q = balanced(teacher.head.level(z, level))
            s = student.head.level(own, level)
            dino += softmax_loss(s[:b], q[b:]).mean() + softmax_loss(s[b:], q[:b]).mean()
            for crop in crops:
                small = student.head.level(encode(student.encoder, crop)[0], level)
                dino += softmax_loss(small, q[:b]).mean() + softmax_loss(small, q[b:]).mean()
            hidden = balanced(teacher.patch_head.level(patches[masks[0]], level))
            guesses = student.patch_head.level(own_patches[masks[0]], level)
            each, start = softmax_loss(guesses, hidden), 0
            for image in range(2 * b):
                count = int(masks[0][image].sum())
                if count:
                    ibot += each[start : start + count].mean() / (2 * b)
                start += count
        dino = dino / (2 * len(crops) + 2)
    return parts, float(dino), float(ibot)


def test_losses_are_those_of_the_formula_pair_by_pair(images, monkeypatch):
    X, _ = images
    kept = {}

    def stop(self):
        kept["training"] = self
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run", stop)
    options = TINY | {
        "batch_size": 16,
        "patch_size": 2,
        "mask": "cyclic",
        "n_local": 2,
        "augment": None,
        "global_scale": (0.4, 1),
    }
    with pytest.raises(KeyboardInterrupt):
        NestedMatryoshkaClustering(4, encoder="transformer", **options).fit(X)
    training = kept["training"]
    x = training.source.tensor(X[:16].reshape(16, -1), "cpu")
    parts, dino, ibot = literal_losses(training, x, monkeypatch)
    assert parts[0].item() == pytest.approx(dino, rel=1e-4)
    assert parts[1].item() == pytest.approx(ibot, rel=1e-4)


def test_a_vision_model_of_hugging_face_is_trained_along(images):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, num_channels=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config)
    options = TINY | {"max_steps": 2, "batch_size": 32, "patch_size": 4}
    made = NestedMatryoshkaClustering(None, encoder=model, mask="block", **options).fit(images[0])
    assert made.patch_features(images[0]).shape == (320, 4, 16)
    assert made.history_[0]["ibot"] > 0


def test_views_draw_from_their_generator_alone():
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for views in (RowJitter(), RandomCrop((0.2, 0.5), (4, 4)), ImageJitter()):
        made = [views(x, torch.Generator().manual_seed(3)) for _ in range(2)]
        assert torch.equal(*made)
        assert torch.isfinite(made[0]).all()
    whole = RandomCrop((1.0, 1.0), (8, 8))
    torch.testing.assert_close(whole(x.new_ones(2, 1, 8, 8), torch.Generator()), torch.ones(2, 1, 8, 8))


def test_a_teacher_that_collapses_ends_the_fit(images, monkeypatch):
    monkeypatch.setattr("polyspan.cluster._matryoshka_training.LEAST_STEPS", 1)
    constant = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
    torch.nn.init.zeros_(constant[1].weight)
    with pytest.raises(NotConverged, match="collapsed"):
        NestedMatryoshkaClustering(
            4, encoder=constant, max_steps=4, momentum=1.0, teacher_temperature=(0.001, 0.001), **TINY
        ).fit(images[0])


def test_a_head_of_one_width_is_an_ordinary_head(images):
    made = NestedMatryoshkaClustering(4, widths=[16], max_steps=2, **TINY).fit(images[0])
    assert made.level_labels_.shape == (320, 1)
    assert isinstance(made.module_.head, NestedMatryoshkaHead)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters must be a whole number of at least 1, got 0"),
        ({"n_clusters": 400}, "X must have at least n_clusters=400 rows, got 320"),
        ({"n_prototypes": 1}, "n_prototypes must be a whole number of at least 2, got 1"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2, got 1"),
        ({"widths": [8, 4]}, "widths must increase"),
        ({"widths": [8, 32]}, "widths must increase within 1 .. in_dim=16"),
        ({"widths": [1, 16], "n_prototypes": 16}, "num_prototypes must leave every level 2 prototypes"),
        ({"lr": 0}, "lr must be positive and finite, got 0"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\], got 1.5"),
        ({"koleo_weight": -1}, "koleo_weight must be finite and at least 0, got -1"),
        ({"mask_ratio": (0, 2)}, "mask_ratio must be two numbers above 0 and at most 1"),
        ({"local_side": 0}, "local_side must lie above 0"),
        ({"encoder": "resnet"}, "encoder must be 'auto', 'transformer' or a Module, got 'resnet'"),
        ({"mask": "random"}, "mask must be one of .* got 'random'"),
        ({"mask": "cyclic"}, "encoder must give features of patches for a mask"),
        ({"augment": "crop"}, "augment must be callable, 'image', 'auto' or None, got 'crop'"),
        ({"encoder": "transformer", "patch_size": 3}, "patch_size must divide the sides of the images, 8 and 8, got 3"),
        ({"image_shape": (8, 7)}, "image_shape must hold 64 pixels"),
    ],
)
def test_bad_parameters_are_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        NestedMatryoshkaClustering(**(TINY | {"max_steps": 1} | options)).fit(images[0])


def test_bad_input_is_named(images, fitted):
    X, _ = images
    rows = X.reshape(320, 64)
    with pytest.raises(ValueError, match="image_shape must be given, or X be images, for n_local"):
        NestedMatryoshkaClustering(2, n_local=1, **TINY).fit(rows)
    with pytest.raises(ValueError, match="image_shape must be given, or X be images, for augment='image'"):
        NestedMatryoshkaClustering(2, augment="image", **TINY).fit(rows)
    with pytest.raises(ValueError, match="for encoder='transformer'"):
        NestedMatryoshkaClustering(2, encoder="transformer", **TINY).fit(rows)
    with pytest.raises(ValueError, match="at least 2 distinct rows"):
        NestedMatryoshkaClustering(2, **TINY).fit(np.ones((20, 5)))
    with pytest.raises(ValueError, match="width must be between 1 and 16, got 17"):
        fitted.transform(X, width=17)
    with pytest.raises(ValueError, match="level must be between -5 and 4, got 5"):
        fitted.predict(X, level=5)
    with pytest.raises(ValueError, match=r"X must have 64 features|expecting 64 features"):
        fitted.predict(rows[:, :9])
    with pytest.warns(UserWarning, match="n_prototypes=600 is far above the 16 rows of a batch"):
        NestedMatryoshkaClustering(2, n_prototypes=600, batch_size=16, max_steps=1, **TINY).fit(rows)
    with pytest.warns(UserWarning, match="batch_size=999 is larger than the 320 rows"):
        NestedMatryoshkaClustering(2, batch_size=999, max_steps=1, **TINY).fit(rows)


def test_training_that_leaves_the_finite_numbers_is_said(images):
    with pytest.raises(NotConverged, match=r"no longer finite after [0-9]+ steps; try a smaller lr"):
        NestedMatryoshkaClustering(4, **TINY | {"max_steps": 60}, lr=1e30).fit(images[0])
