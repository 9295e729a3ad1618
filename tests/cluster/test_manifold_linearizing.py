import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.cluster import (
    DoublyStochastic,
    ImageJitter,
    ManifoldLinearizingClustering,
    RateReductionLoss,
    coding_length,
    manifold_plots,
)
from polyspan.cluster._manifold_network import Source, TwoHeads
from polyspan.cluster.manifold_linearizing import numerical_rank
from polyspan.cluster.reporting import basis_angles
from polyspan.data import digits, planted_subspaces
from polyspan.errors import NotConverged, WrongContent
from polyspan.io import EmbeddingReader
from polyspan.linalg import clustering_accuracy, coding_rate

FEW = {"tcr_epochs": 2, "max_epochs": 2, "hidden": 16, "random_state": 0, "device": "cpu"}
SMALL = {"n_components": 12, "hidden": 32, "batch_size": 64, "tcr_epochs": 3, "max_epochs": 3, "random_state": 0}


@pytest.mark.filterwarnings("ignore:the memberships show no structure:UserWarning")
@parametrize_with_checks([ManifoldLinearizingClustering(2, **FEW)])
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def world():
    """Three subspaces in 20 dimensions."""
    return planted_subspaces(0, n_per=70, d=20, k=2, n_subspaces=3, noise=0.02)


@pytest.fixture(scope="module")
def images():
    X, y = digits()
    rows = np.flatnonzero(y < 4)[:400]
    return X[rows], y[rows]


@pytest.fixture(scope="module")
def fitted(world):
    return ManifoldLinearizingClustering(3, **SMALL).fit(world.points)


def scaled(batch, generator):
    """A point's line is all that counts: the view that makes subspaces what they are."""
    factor = torch.randn(len(batch), 1, generator=generator)
    return factor.sign() * (1 + 0.3 * factor.abs()) * batch


def test_planted_subspaces_are_found_and_stay_subspaces_in_the_features(world):
    options = {"n_components": 24, "hidden": 128, "augment": scaled, "random_state": 0, "device": "cpu"}
    made = ManifoldLinearizingClustering(3, **options).fit(world.points)
    assert clustering_accuracy(world.labels, made.labels_) > 0.9
    first, last = (next(h for h in hs if h["stage"] == "main") for hs in (made.history_, made.history_[::-1]))
    assert last["class_rate"] < 0.8 * first["class_rate"]
    assert last["rate"] > 0.9 * first["rate"]
    between = made.cosines_[~np.eye(3, dtype=bool)]
    assert between.max() < 0.7 * np.diag(made.cosines_).min()
    assert made.numerical_rank_.max() < made.overall_rank_


def test_features_are_unit_rows_in_the_float_width_of_the_input(world, fitted):
    Z = fitted.transform(world.points)
    assert Z.shape == (210, 12)
    np.testing.assert_allclose(np.linalg.norm(Z, axis=1), 1, atol=1e-6)
    assert Z.dtype == np.float64
    narrow = fitted.transform(world.points.astype(np.float32))
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, Z, atol=1e-4)
    assert list(fitted.get_feature_names_out()[:1]) == ["manifoldlinearizingclustering0"]


def test_labels_never_reach_the_method(world):
    make = ManifoldLinearizingClustering(3, **SMALL)
    order = np.random.default_rng(0).permutation(len(world.labels))
    plain = make.fit(world.points).labels_
    for y in (world.labels, world.labels[order]):
        np.testing.assert_array_equal(make.fit(world.points, y).labels_, plain)
        np.testing.assert_array_equal(make.fit_predict(world.points, y), plain)
        tensors = torch.as_tensor(world.points, dtype=torch.float32), torch.as_tensor(y)
        pairs = torch.utils.data.TensorDataset(*tensors)
        np.testing.assert_array_equal(make.fit(pairs).labels_, make.fit(tensors[0]).labels_)


def test_a_step_of_training_is_the_written_out_loss(world):
    X = world.points[:60].astype(np.float32)
    options = {"n_components": 6, "hidden": 8, "init": "none", "batch_size": 60, "random_state": 3, "optimizer": "sgd"}
    before = ManifoldLinearizingClustering(3, max_epochs=0, **options).fit(X).module_
    after = ManifoldLinearizingClustering(3, max_epochs=1, lr=1e-3, **options).fit(X)
    source = Source(X)
    source.measure()
    Z, C = before.train()(source.tensor(X, "cpu"))
    kernel = (C @ C.T).abs() / 0.175
    u = -kernel.logsumexp(1) / 2
    for _ in range(3):
        u = (u - (kernel + u).logsumexp(1)) / 2
    gamma = (kernel + u[:, None] + u).exp()
    rates = [torch.logdet(torch.eye(6) + 60 * Z.T @ (g[:, None] * Z) / g.sum()) / 2 for g in gamma.T]
    whole = torch.logdet(torch.eye(6) + Z.T @ Z) / 2
    loss = sum(g.sum() * r for g, r in zip(gamma.T, rates, strict=True)) / 60 - whole
    loss.backward()
    torch.nn.utils.clip_grad_norm_(before.parameters(), 5.0)
    mine = dict(after.module_.named_parameters())
    for name, parameter in before.named_parameters():
        decay = 5e-3 if name.startswith("clusters") else 1e-4
        expected = parameter - 1e-3 * (parameter.grad + decay * parameter)
        torch.testing.assert_close(mine[name], expected, atol=1e-6, rtol=1e-3)
    assert after.history_[0]["rate"] == pytest.approx(whole.item(), rel=1e-4)


def test_the_cluster_head_starts_as_a_copy_and_is_trained(world):
    start = ManifoldLinearizingClustering(3, **(SMALL | {"max_epochs": 0})).fit(world.points)
    trained = ManifoldLinearizingClustering(3, **SMALL).fit(world.points)
    pairs = list(zip(start.module_.features.parameters(), start.module_.clusters.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(trained.module_.features.parameters(), trained.module_.clusters.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_the_first_stage_leaves_the_cluster_head_alone(world, monkeypatch):
    whole = TwoHeads.forward

    def forward(self, x):
        assert not self.training
        return whole(self, x)

    monkeypatch.setattr(TwoHeads, "forward", forward)
    for augment in (None, scaled):
        made = ManifoldLinearizingClustering(3, **SMALL | {"max_epochs": 0}, augment=augment).fit(world.points)
        assert [h["stage"] for h in made.history_] == ["tcr"] * 3
        Z, C = made.module_(torch.as_tensor(world.points[:5] - made._mean, dtype=torch.float32))
        assert torch.equal(Z, C)


def test_the_picture_has_rates_cosines_values_points_and_angles_with_a_key(world, fitted, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(manifold_plots, "write_picture", lambda figure, path, **_: figures.append(figure))
    manifold_plots.plot_linearized(fitted, fitted.transform(world.points), tmp_path / "a.png")
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    assert set(axes) >= {
        "Coding rate",
        "Absolute cosines, by cluster",
        "Singular values of each cluster",
        "Embedding, two widest directions",
        "Smallest angle between subspaces",
    }
    for name in ("Singular values of each cluster", "Embedding, two widest directions"):
        assert [text.get_text() for text in axes[name].get_legend().get_texts()] == ["0", "1", "2"]
    assert len(axes["Embedding, two widest directions"].collections[0].get_offsets()) == 210
    angles = axes["Smallest angle between subspaces"].images[0].get_array()
    np.testing.assert_allclose(angles, basis_angles(fitted.subspaces_))


def test_memory_maps_files_datasets_loaders_and_images_give_what_arrays_give(world, tmp_path):
    X = world.points.astype(np.float32)
    np.save(tmp_path / "x.npy", X)
    make = ManifoldLinearizingClustering(3, **SMALL)
    expected = make.fit(X).labels_
    dataset = torch.utils.data.TensorDataset(torch.as_tensor(X))
    loader = torch.utils.data.DataLoader(dataset, batch_size=7, shuffle=True)
    for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), tmp_path / "x.npy", dataset, loader, torch.as_tensor(X)):
        np.testing.assert_array_equal(make.fit(other).labels_, expected)
        np.testing.assert_array_equal(make.predict(other), make.predict(X))


def test_an_embedding_file_is_streamed(world, tmp_path):
    X = np.tile(world.points.astype(np.float32), (3, 1))
    np.save(tmp_path / "x.npy", X)
    make = ManifoldLinearizingClustering(3, **SMALL)
    reader = EmbeddingReader(tmp_path / "x.npy", batch_rows=200)
    labels = make.fit(reader).labels_
    assert labels.shape == (630,)
    np.testing.assert_array_equal(make.predict(reader), make.predict(X))
    assert np.mean(make.predict(X) == labels) > 0.95
    assert make.transform(reader).shape == (630, 12)


def test_rows_beyond_the_sample_are_assigned_as_new_ones(world):
    whole = ManifoldLinearizingClustering(3, **SMALL).fit(world.points)
    sampled = ManifoldLinearizingClustering(3, membership_rows=80, **SMALL).fit(world.points)
    assert (sampled.n_rows_seen_, whole.n_rows_seen_) == (80, 210)
    assert clustering_accuracy(whole.labels_, whole.predict(world.points)) > 0.97
    assert clustering_accuracy(sampled.labels_, sampled.predict(world.points)) > 0.97


def test_membership_is_doubly_stochastic_and_what_the_prediction_adds_up(world, fitted):
    gamma = fitted.membership(world.points)
    np.testing.assert_allclose(gamma.sum(axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(gamma, gamma.T, atol=1e-7)
    votes = gamma @ np.eye(3)[fitted.labels_]
    np.testing.assert_array_equal(votes.argmax(axis=1), fitted.predict(world.points))
    entropy = -(gamma * np.log(gamma)).sum(axis=1)
    assert fitted.effective_neighbors_ == pytest.approx(np.exp(entropy).mean(), rel=1e-4)
    with pytest.raises(ValueError, match="X must have at most membership_rows=4096 rows, got 4200"):
        fitted.membership(np.tile(world.points, (20, 1)))


def test_eta_is_chosen_for_the_neighbours_that_groups_have(world):
    made = ManifoldLinearizingClustering(3, eta="auto", **(SMALL | {"max_epochs": 0, "batch_size": 210})).fit(
        world.points
    )
    C = torch.as_tensor(made._anchors)
    gamma = DoublyStochastic(made.eta_, 200)(C)
    neighbours = float(torch.special.entr(gamma).sum(1).exp().mean())
    assert neighbours == pytest.approx(210 / 6, rel=0.05)


def test_the_coding_length_is_least_at_the_planted_number():
    world = planted_subspaces(1, n_per=60, d=20, k=2, n_subspaces=3)
    Z = world.points / np.linalg.norm(world.points, axis=1, keepdims=True)
    split = world.labels * 2 + (np.arange(180) % 2)
    joined = np.minimum(world.labels, 1)
    right = coding_length(Z, world.labels)
    assert right < min(coding_length(Z, split), coding_length(Z, joined), coding_length(Z, np.zeros(180)))
    expected = sum((60 + 20) * coding_rate(Z[world.labels == j], 0.1**0.5) - 60 * np.log(1 / 3) for j in range(3))
    assert right == pytest.approx(expected)


def test_coding_lengths_cluster_the_memberships_for_every_number(world, fitted):
    found = fitted.coding_lengths(world.points, [1, 3, 6])
    assert list(found) == [1, 3, 6]
    assert found[1] == pytest.approx(coding_length(fitted.transform(world.points), np.zeros(210)))


def test_geometry_of_the_clusters_is_reported(world, fitted):
    Z = fitted.transform(world.points)
    for j, (rank, basis) in enumerate(zip(fitted.numerical_rank_, fitted.subspaces_, strict=True)):
        rows = Z[fitted.labels_ == j]
        assert basis.shape == (12, rank)
        np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)
        share = np.square(rows @ basis).sum() / np.square(rows).sum()
        assert share > 0.95
        assert np.square(rows @ basis[:, :-1]).sum() / np.square(rows).sum() <= 0.95
    first, second = (Z[fitted.labels_ == j] for j in (0, 1))
    assert fitted.cosines_[0, 1] == pytest.approx(np.abs(first @ second.T).mean(), rel=1e-4)
    assert [numerical_rank(s) for s in (np.ones(20), np.array([1.0, 0]), np.zeros(3))] == [20, 1, 0]


def test_a_saved_fit_answers_as_before_and_starts_another(world, fitted, tmp_path):
    path = fitted.save(tmp_path / "mlc.safetensors")
    read = ManifoldLinearizingClustering.load(path)
    for method in ("transform", "predict", "membership"):
        np.testing.assert_array_equal(getattr(read, method)(world.points), getattr(fitted, method)(world.points))
    np.testing.assert_array_equal(read.labels_, fitted.labels_)
    assert read.history_ == fitted.history_
    again = ManifoldLinearizingClustering(3, **(SMALL | {"init": path, "max_epochs": 0})).fit(world.points)
    np.testing.assert_array_equal(again.transform(world.points), fitted.transform(world.points))
    same = ManifoldLinearizingClustering(3, **(SMALL | {"init": fitted.module_, "max_epochs": 0})).fit(world.points)
    np.testing.assert_array_equal(same.labels_, again.labels_)
    with pytest.raises(ValueError, match="init must be a network of these sizes"):
        ManifoldLinearizingClustering(3, **(SMALL | {"init": path, "hidden": 7})).fit(world.points)
    from polyspan.io import save_fitted

    save_fitted(tmp_path / "other.safetensors", kind="OrthogonalMap", arrays={"a": np.eye(2)}, params={})
    with pytest.raises(WrongContent):
        ManifoldLinearizingClustering.load(tmp_path / "other.safetensors")


class Stopped(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(("optimizer", "passes"), [("adam", 2), ("adam", 5), ("sgd", 4), ("adam", 3)])
def test_a_fit_that_was_stopped_goes_on_to_the_same_result(images, tmp_path, optimizer, passes, monkeypatch):
    from polyspan.cluster import _manifold_training

    options = SMALL | {"image_shape": (8, 8), "augment": ImageJitter(noise=0.1), "optimizer": optimizer, "eta": "auto"}
    unbroken = ManifoldLinearizingClustering(4, **options).fit(images[0])
    path = tmp_path / "half.safetensors"
    keep, kept = _manifold_training.Training._keep, []

    def keep_and_stop(training):
        keep(training)
        kept.append(1)
        if len(kept) == passes:
            raise Stopped

    stopping = ManifoldLinearizingClustering(4, checkpoint=path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(_manifold_training.Training, "_keep", keep_and_stop)
        with pytest.raises(Stopped):
            stopping.fit(images[0])
    resumed = stopping.fit(images[0])
    assert resumed.history_ == unbroken.history_
    assert resumed.eta_ == unbroken.eta_
    np.testing.assert_array_equal(resumed.transform(images[0]), unbroken.transform(images[0]))
    with pytest.raises(ValueError, match=r"belongs to another fit \(n differs\)"):
        stopping.fit(images[0][:300])
    with pytest.raises(ValueError, match=r"belongs to another fit, with lr=0.0003 in place of 1.0"):
        stopping.set_params(lr=1.0).fit(images[0])
    with pytest.raises(ValueError, match="belongs to another fit, with random_state=0 in place of 7"):
        stopping.set_params(lr=3e-4, random_state=7).fit(images[0])


def test_images_are_augmented_in_their_own_shape(images):
    X = images[0]
    seen = []

    def augment(batch, generator):
        seen.append(tuple(batch.shape))
        return batch + 0.1 * torch.randn(batch.shape, generator=generator)

    made = ManifoldLinearizingClustering(4, augment=augment, **SMALL).fit(X.reshape(-1, 8, 8))
    assert set(seen) == {(64, 1, 8, 8)}
    assert len(seen) == 6 * (3 + 3) * 2
    assert made.n_features_in_ == 64
    np.testing.assert_array_equal(made.predict(X.reshape(-1, 1, 8, 8)), made.predict(X))
    np.testing.assert_allclose(made.predict((X * 16).astype(np.uint8)).mean(), made.predict(X * 16).mean())
    with pytest.warns(UserWarning, match="images without augment"):
        ManifoldLinearizingClustering(4, image_shape=(8, 8), **SMALL).fit(X)


def test_two_views_of_digits_sharpen_the_initial_groups():
    X, y = digits()
    options = {"image_shape": (8, 8), "augment": "image", "n_components": 32, "hidden": 128, "batch_size": 256}
    options |= {"tcr_epochs": 10, "random_state": 0, "device": "cpu", "batch_size": 128}
    start = ManifoldLinearizingClustering(10, max_epochs=0, **options).fit(X)
    made = ManifoldLinearizingClustering(10, max_epochs=6, **(options | {"init": start.module_})).fit(X)
    assert clustering_accuracy(y, made.labels_) > clustering_accuracy(y, start.labels_)
    rates, within = ([h[name] for h in made.history_] for name in ("rate", "class_rate"))
    assert within[-1] < 0.88 * within[0]
    assert rates[-1] > 0.98 * rates[0]


def test_a_backbone_of_the_users_is_copied_trained_and_needed_to_load(images, tmp_path):
    backbone = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, stride=2), torch.nn.ReLU())
    kept = [p.clone() for p in backbone.parameters()]
    options = SMALL | {"image_shape": (8, 8), "augment": "image"}
    made = ManifoldLinearizingClustering(4, backbone=backbone, **options).fit(images[0])
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), kept, strict=True))
    assert not torch.equal(made.module_.trunk[0][0].weight, kept[0])
    path = made.save(tmp_path / "own.safetensors")
    read = ManifoldLinearizingClustering.load(path, backbone=backbone)
    np.testing.assert_array_equal(read.predict(images[0]), made.predict(images[0]))
    with pytest.raises(ValueError, match="backbone must be given to load"):
        ManifoldLinearizingClustering.load(path)
    with pytest.raises(WrongContent, match="a network of other sizes"):
        ManifoldLinearizingClustering.load(path, backbone=torch.nn.Identity())


def test_half_precision_trains_and_keeps_unit_rows(world):
    made = ManifoldLinearizingClustering(3, bfloat16=True, **SMALL).fit(world.points)
    np.testing.assert_allclose(np.linalg.norm(made.transform(world.points), axis=1), 1, atol=1e-5)
    assert made.history_[-1]["class_rate"] > 0


def test_the_seed_decides_and_no_global_state_is_touched(world):
    state, torch_state = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    make = ManifoldLinearizingClustering(3, **SMALL)
    first, again = (make.fit(world.points).transform(world.points) for _ in range(2))
    other = make.set_params(random_state=1).fit(world.points).transform(world.points)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e-3])
def test_units_of_the_input_do_not_matter(world, fitted, scale):
    made = ManifoldLinearizingClustering(3, **SMALL).fit(world.points * scale)
    np.testing.assert_allclose(made.transform(world.points * scale), fitted.transform(world.points), atol=2e-3)


def test_jitter_leaves_pixels_alone_where_all_is_switched_off():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 2, 6, 7, generator=generator)
    still = {"degrees": 0.0, "shift": 0.0, "scale": 0.0}
    torch.testing.assert_close(ImageJitter(**still)(images, generator), images)
    seen = ImageJitter(flip=True, **still)(images, generator)
    ways = [
        any(torch.allclose(a, b, atol=1e-5) for b in (image, image.flip(2)))
        for a, image in zip(seen, images, strict=True)
    ]
    assert all(ways)
    lit = ImageJitter(contrast=0.5, shade=0.5, noise=0.1, **still)(images, generator)
    assert lit.shape == images.shape
    assert (lit - images).abs().mean() > 0.05


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n_clusters": 0}, "n_clusters must be a whole number of at least 1, got 0"),
        ({"n_clusters": 110}, "X must have at least 2 rows a cluster, 220 for k=110, got 210"),
        ({"eta": "wide"}, "eta must be a positive number or 'auto', got 'wide'"),
        ({"eta": 0}, "eta must be a positive number or 'auto', got 0"),
        ({"eps2": -1}, "eps2 must be positive and finite, got -1"),
        ({"eps2": "a"}, "eps2 must be a number, got 'a'"),
        ({"n_clusters": True}, "n_clusters must be a whole number of at least 1, got True"),
        ({"optimizer": "lars"}, "optimizer must be 'adam' or 'sgd', got 'lars'"),
        ({"augment": "text"}, "augment must be callable, 'image' or None, got 'text'"),
        ({"augment": "image"}, "image_shape must be given"),
        ({"image_shape": (3, 3), "augment": "image"}, r"image_shape must hold 20 pixels, got \(1, 3, 3\)"),
        ({"image_shape": (3,)}, r"image_shape must be \(h, w\) or \(channels, h, w\)"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2, got 1"),
        ({"lr": float("nan")}, "lr must be finite and at least 0, got nan"),
        ({"membership_rows": 4}, "membership_rows must be at least 2 a cluster, got 4"),
    ],
)
def test_bad_parameters_are_named(world, options, told):
    with pytest.raises(ValueError, match=told):
        ManifoldLinearizingClustering(**({"n_clusters": 3, "max_epochs": 0, "tcr_epochs": 0} | options)).fit(
            world.points
        )


def test_bad_data_is_named_and_odd_sizes_are_said(world, tmp_path):
    make = ManifoldLinearizingClustering(3, **(SMALL | {"batch_size": "auto"}))
    with pytest.raises(ValueError, match="X must hold at least 2 distinct rows, got 50 equal rows"):
        make.fit(np.ones((50, 4)))
    wrong = torch.as_tensor(world.points, dtype=torch.float32).clone()
    wrong[17, 3] = float("nan")
    with pytest.raises(ValueError, match="got NaN or infinity in row 17"):
        make.fit(torch.utils.data.TensorDataset(wrong))
    with pytest.raises(ValueError, match="X must have 20 features, as in fit, got 5"):
        make.fit(world.points).predict(torch.utils.data.TensorDataset(torch.zeros(3, 5)))
    few = {"tcr_epochs": 1, "max_epochs": 1, "hidden": 8, "random_state": 0}
    with pytest.warns(UserWarning, match="batch_size=500 is larger than the 210 rows"):
        ManifoldLinearizingClustering(3, batch_size=500, **few).fit(world.points)
    with pytest.warns(UserWarning, match="n_components=64 exceeds the batch of 32 rows"):
        ManifoldLinearizingClustering(3, batch_size=32, n_components=64, **few).fit(world.points)
    with pytest.warns(UserWarning, match="no structure at eta=1000"):
        ManifoldLinearizingClustering(3, eta=1000, **few).fit(world.points)
    repeated = make.fit(np.repeat(world.points[:5], 20, axis=0))
    assert len(np.unique(repeated.labels_)) == 3


@pytest.mark.parametrize("stage", ["tcr_lr", "lr"])
def test_training_that_leaves_the_finite_numbers_is_said(world, stage):
    with pytest.raises(NotConverged, match=r"no longer finite after [0-9] passes; try a smaller lr"):
        ManifoldLinearizingClustering(3, **SMALL, **{stage: 1e38}).fit(world.points)


def test_an_eta_that_no_width_of_memberships_fits_is_said(world):
    # Features of one dimension are all on one line, and |cos| is 1: at any eta all rows are neighbours.
    options = SMALL | {"n_components": 1, "eta": "auto"}
    told = "eta='auto' ended at 0.01, with 64.0 effective neighbours a row in place of 10.7"
    with (
        pytest.warns(UserWarning, match="the memberships show no structure at eta=0.01"),
        pytest.warns(UserWarning, match=told),
    ):
        ManifoldLinearizingClustering(3, **options).fit(world.points)


def test_a_batch_too_small_for_the_subspaces_is_said(world):
    with pytest.warns(UserWarning, match="n_components=2 is below n_clusters=3, for batches of 4 rows"):
        ManifoldLinearizingClustering(3, **SMALL | {"batch_size": 4, "n_components": "auto"}).fit(world.points)


def test_the_loss_alone_flattens_two_curves():
    t = torch.rand(120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.stack([t.cos(), t.sin(), t**2, torch.ones_like(t)], 1)
    X[60:] = torch.stack([t[60:] ** 2, -t[60:].sin(), -torch.ones(60), t[60:].cos()], 1)
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    members = torch.block_diag(torch.full((60, 60), 1 / 60), torch.full((60, 60), 1 / 60)).double()
    optimiser, loss, values = torch.optim.Adam([W], lr=0.05), RateReductionLoss(0.1), []
    for _ in range(60):
        value = loss(torch.nn.functional.normalize(X @ W, dim=1), members)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    Z = torch.nn.functional.normalize(X @ W, dim=1).detach()
    assert values[-1] < values[0] - 0.3
    assert (Z[:60] @ Z[60:].T).abs().mean() < 0.1
