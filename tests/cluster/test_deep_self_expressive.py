import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from polyspan.cluster import DeepSelfExpressiveClustering
from polyspan.cluster._affinity import RidgeExpression
from polyspan.cluster._coefficients import AllCoefficients, FollowedCoefficients
from polyspan.cluster._conv_autoencoder import ConvAutoencoder
from polyspan.cluster._self_expression import (
    SpectralRounding,
    expression_loss,
    leading_affinity,
    ridge_coefficients,
    structured_norm,
)
from polyspan.data import planted_subspaces
from polyspan.errors import CorruptFile
from polyspan.linalg import clustering_accuracy


@pytest.fixture(scope="module")
def world():
    return planted_subspaces(0, n_per=30, d=20, k=3, n_subspaces=4, noise=0.01)


@pytest.fixture(scope="module")
def pictures():
    """Three pictures of 9 by 7 under 20 mixtures of two lights each: an odd size on purpose."""
    rng = np.random.default_rng(0)
    bases = rng.normal(size=(3, 2, 63))
    made = np.concatenate([rng.normal(size=(20, 2)) @ basis for basis in bases])
    return (made + 0.02 * rng.normal(size=made.shape)).reshape(60, 9, 7).astype(np.float32), np.repeat(np.arange(3), 20)


def made(k=4, **options):
    return DeepSelfExpressiveClustering(k, **({"subspace_dim": 3, "random_state": 0, "device": "cpu"} | options))


@pytest.mark.filterwarnings("ignore:the affinity falls into", "ignore:stage")
@parametrize_with_checks(
    [
        made(2, subspace_dim=2, solver="adam", max_epochs=(0, 300, 20)),
        made(2, subspace_dim=2, solver="ridge", structure=False),
    ],
    expected_failed_checks=lambda estimator: (
        {
            "check_estimators_dtypes": "its integers hold an all-zero row, which has no direction and is refused",
        }
        | ({"check_clustering": "its three blobs in the plane are no subspaces"} if estimator.solver == "adam" else {})
    ),
)
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("solver", ["adam", "ridge"])
def test_independent_subspaces_are_found(world, solver):
    fitted = made(solver=solver).fit(world.points)
    assert clustering_accuracy(world.labels, fitted.labels_) == 1.0
    # Coefficients stay within a point's own subspace for the most part.
    size = np.abs(fitted.representation_matrix_)
    own = size[world.labels[:, None] == world.labels].sum()
    assert own / size.sum() > 0.75


def test_new_points_go_to_the_subspace_they_lie_on(world):
    fitted = made(solver="ridge").fit(world.points)
    rng = np.random.default_rng(1)
    new = np.concatenate([rng.normal(size=(10, 3)) @ basis.T for basis in world.bases])
    assert clustering_accuracy(np.repeat(np.arange(4), 10), fitted.predict(new)) == 1.0
    matched = fitted.predict(world.points)
    assert np.mean(matched == fitted.labels_) > 0.98


def test_permuted_rows_give_permuted_labels_and_labels_given_change_nothing(world):
    fitted = made().fit(world.points)
    order = np.random.default_rng(2).permutation(len(world.points))
    again = made().fit(world.points[order], world.labels[order])
    assert clustering_accuracy(fitted.labels_[order], again.labels_) == 1.0
    others = [
        made().fit(world.points, y).labels_ for y in (world.labels, np.random.default_rng(3).permutation(world.labels))
    ]
    np.testing.assert_array_equal(others[0], fitted.labels_)
    np.testing.assert_array_equal(others[1], fitted.labels_)


def test_unit_rows_make_brightness_irrelevant(world):
    lit = world.points * np.random.default_rng(4).uniform(0.1, 10, size=(len(world.points), 1))
    plain, bright = made(solver="ridge").fit(world.points), made(solver="ridge").fit(lit)
    np.testing.assert_allclose(plain.representation_matrix_, bright.representation_matrix_, atol=1e-9)


def test_ridge_is_what_a_solver_of_each_row_finds(world):
    """Oracle: ridge regression of every point on all others, one at a time."""
    X = world.points[:25] / np.linalg.norm(world.points[:25], axis=1, keepdims=True)
    C = ridge_coefficients(torch.as_tensor(X @ X.T), 0.3).numpy()
    for i in range(len(X)):
        others = np.delete(X, i, axis=0)
        coefficients = np.linalg.solve(others @ others.T + 0.3 * np.eye(len(others)), others @ X[i])
        np.testing.assert_allclose(np.delete(C[i], i), coefficients, atol=1e-10)
    assert not C.diagonal().any()


def test_the_gram_form_is_the_loss_of_the_paper_and_its_gradient():
    """Oracle: the sum over layers, differentiated by torch."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(12, d, generator=generator, dtype=torch.float64) for d in (5, 9)]
    C = torch.randn(12, 12, generator=generator, dtype=torch.float64).requires_grad_()
    literal = sum((C @ V - V).square().sum() for V in layers)
    literal.backward()
    loss, gradient = expression_loss(C.detach(), sum(V @ V.T for V in layers))
    torch.testing.assert_close(loss, literal.detach())
    torch.testing.assert_close(gradient, C.grad)


def test_the_structured_norm_is_the_trace_of_the_paper_and_its_gradient():
    """Oracle: tr(Q' L Q) with the Laplacian written out, differentiated by torch."""
    generator = torch.Generator().manual_seed(1)
    C = torch.randn(10, 10, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(3, (10,), generator=generator)
    Q = torch.nn.functional.one_hot(labels, 3).double()
    W = (C.abs() + C.abs().T).sqrt()
    literal = (Q.T @ (torch.diag(W.sum(1)) - W) @ Q).trace()
    literal.backward()
    loss, gradient = structured_norm(C.detach(), labels)
    torch.testing.assert_close(loss, literal.detach(), atol=1e-6, rtol=1e-9)
    torch.testing.assert_close(gradient, C.grad, atol=1e-6, rtol=1e-9)
    _, at_zero = structured_norm(torch.zeros(4, 4), torch.tensor([0, 0, 1, 1]))
    assert torch.isfinite(at_zero).all()


def test_the_cut_keeps_the_largest_entries_of_each_column_and_ties():
    C = np.array([[0, 3.0, 1, 1], [1, 0, 5, 1], [2, 1, 0, 1], [0, 0, 4, 0]])
    A = (np.abs(C) + np.abs(C.T)) / 2
    expected = np.zeros_like(A)
    for j in range(4):
        least = np.sort(A[:, j])[-1]
        expected[:, j] = np.where(A[:, j] >= least, A[:, j], 0)
    np.testing.assert_allclose(leading_affinity(C, 1).toarray(), (expected + expected.T) / 2)
    np.testing.assert_allclose(leading_affinity(C, None).toarray(), A)
    tied = leading_affinity(np.array([[0, 1.0, 1.0], [1, 0, 0], [1, 0, 0]]), 1).toarray()
    assert tied[0, 1] == tied[0, 2] == 1.0


def test_the_rounding_agrees_with_scikit_learn_on_a_clear_graph():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 15)
    A = rng.uniform(size=(45, 45)) * np.where(labels[:, None] == labels, 1.0, 0.05)
    A = (A + A.T) / 2
    mine = SpectralRounding(3, 10, 0)(sp.csr_array(A))
    theirs = SpectralClustering(3, affinity="precomputed", random_state=0).fit_predict(A)
    assert clustering_accuracy(theirs, mine) == 1.0


@pytest.mark.parametrize(
    ("size", "kernel"), [((9, 7), 3), ((8, 8), 3), ((8, 5), 5), ((6, 6), 2), ((32, 32), 15), ((7, 4), 1)]
)
def test_the_decoder_is_the_adjoint_of_the_encoder(size, kernel):
    """<conv(x), z> = <x, conv'(z)>, whatever the size: the padding is cut off exactly where it was added."""
    net = ConvAutoencoder((2, 3), (kernel,), last_relu=False, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        net.down[0].bias.fill_(100.0)  # keeps the ReLU open
        net.up[0].weight.copy_(net.down[0].weight)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, *size, generator=generator, dtype=torch.float64)
    z = net.layers(x)[0]
    assert z.shape[-2:] == tuple(-(-side // 2) for side in size)
    back = net(x)
    assert back.shape == x.shape
    pure = z - 100.0
    # The decoder of the code itself is what the layer makes of all of z, constant included.
    zero = net.layers(torch.zeros_like(x))[0]
    torch.testing.assert_close((pure * z).sum(), (x * back).sum())
    torch.testing.assert_close(zero, torch.full_like(zero, 100.0))


@pytest.mark.filterwarnings("ignore:the affinity falls into")
def test_images_are_clustered_and_their_autoencoder_learns(pictures):
    images, labels = pictures
    fitted = made(3, subspace_dim=8, max_epochs=(200, 1000, 50)).fit(images)
    assert clustering_accuracy(labels, fitted.labels_) == 1.0
    assert fitted.reconstruction_share_ < 0.5
    assert fitted.n_features_in_ == 63
    flat = made(3, subspace_dim=8, max_epochs=(200, 1000, 50), image_shape=(9, 7)).fit(images.reshape(60, -1))
    np.testing.assert_array_equal(flat.labels_, fitted.labels_)
    assert clustering_accuracy(labels, fitted.predict(images)) == 1.0
    assert [before == after for before, after in fitted.layer_energies_] == [True, True]


def test_stages_stop_by_themselves_and_say_why(world):
    fitted = made(solver="adam").fit(world.points)
    assert fitted.stopped_by_ == {"express": "tolerance", "structure": "labels"}
    assert 50 <= fitted.n_epochs_["express"] < 1000
    losses = [h["loss"] for h in fitted.history_ if h["stage"] == "express"]
    assert losses[-1] < 0.5 * losses[0]
    told = r"stage 'express' took all of its 5 epochs.*max_epochs\[1\].*solver='ridge'"
    with pytest.warns(ConvergenceWarning, match=told):
        short = made(solver="adam", max_epochs=(0, 5, 0)).fit(world.points)
    assert short.stopped_by_["express"] == "max_epochs"
    assert len(short.history_) == 5
    with pytest.warns(ConvergenceWarning, match=r"stage 'structure' took all of its 3 epochs.*max_epochs\[2\]"):
        made(solver="ridge", max_epochs=(0, 0, 3)).fit(world.points)
    # Without a test to meet there is nothing to say.
    assert made(solver="adam", max_epochs=(0, 5, 3), tol=0.0).fit(world.points).stopped_by_["express"] == "max_epochs"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [{}, {"n_per": 25, "d": 20, "n_subspaces": 6, "noise": 0.1}])
def test_rows_of_a_table_are_clustered_by_the_defaults(shape, seed):
    """Points outnumber coordinates: Adam's equal steps end at coefficients that show no subspaces, and say so."""
    world = planted_subspaces(seed, **shape)
    k = len(world.bases)
    options = {"subspace_dim": 4} if shape else {}
    fitted = DeepSelfExpressiveClustering(k, random_state=seed, device="cpu", **options).fit(world.points)
    assert fitted.solver_ == "ridge"
    assert clustering_accuracy(world.labels, fitted.labels_) > 0.95
    if shape:
        with pytest.warns(ConvergenceWarning, match="solver='ridge'"):
            steps = made(k, subspace_dim=4, solver="adam").fit(world.points)
        assert clustering_accuracy(world.labels, steps.labels_) < 0.5


def test_the_solver_is_adam_where_the_layers_are_wider_than_the_points_are_many(world, pictures):
    wide = made(subspace_dim=3).fit(np.hstack([world.points] * 7)[:100])
    assert wide.solver_ == "adam"
    assert made(3, subspace_dim=8, layers="input").fit(pictures[0]).solver_ == "adam"
    trained = made(3, subspace_dim=8, train_encoder=True, max_epochs=(5, 5, 0), tol=0.0)
    with pytest.warns(UserWarning, match="say little"):
        assert trained.fit(pictures[0][:, :3, :3].copy()).solver_ == "adam"


def test_the_second_stage_lowers_its_norm_and_keeps_what_lies_within(world):
    first, second = made(structure=False).fit(world.points), made().fit(world.points)
    apart = world.labels[:, None] != world.labels
    a, b = np.abs(first.representation_matrix_), np.abs(second.representation_matrix_)
    assert b[apart].sum() < a[apart].sum()
    np.testing.assert_array_equal(a[~apart], b[~apart])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the affinity falls into")
def test_published_mode_is_the_code_to_the_letter(pictures):
    images, _ = pictures
    with pytest.warns(UserWarning, match="collapses"):
        fitted = made(3, mode="published", subspace_dim=8, channels=(3, 3, 5), kernels=(3, 3, 3)).fit(images)
    assert fitted.n_epochs_ == {"pretrain": 100, "express": 180, "structure": 520}
    assert set(fitted.stopped_by_.values()) == {"max_epochs"}
    assert fitted.representation_matrix_.diagonal().any()
    assert fitted.layer_energies_[0][0] == pytest.approx(float(np.square(images).sum()), rel=1e-5)


def test_training_the_encoder_with_unit_rows_does_not_reward_shrinking(pictures):
    images, labels = pictures
    fitted = made(3, subspace_dim=8, train_encoder=True, max_epochs=(100, 200, 0), tol=0.0).fit(images)
    assert clustering_accuracy(labels, fitted.labels_) > 0.9
    assert fitted.layer_energies_[1][1] > 0.3 * fitted.layer_energies_[1][0]


def test_a_module_serves_as_the_encoder(world):
    class Double(nn.Module):
        def forward(self, x):
            return torch.cat([x, 2 * x], dim=1)

    plain = made(solver="ridge").fit(world.points)
    joined = made(solver="ridge", encoder=Double()).fit(world.points)
    # The same rows twice, with the penalty for two layers: the same coefficients.
    np.testing.assert_allclose(joined.representation_matrix_, plain.representation_matrix_, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the affinity falls into", "ignore:stage", "ignore:.*collapses", "ignore:the auto")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "ridge", "layers": "last", "structure": False},
        pytest.param({"mode": "published"}, marks=pytest.mark.slow),
        {"encoder": "none"},
    ],
)
def test_a_saved_clustering_comes_back_whole(pictures, tmp_path, options):
    images, _ = pictures
    fitted = made(3, subspace_dim=8, max_epochs=(40, 60, 10), **options).fit(images)
    back = DeepSelfExpressiveClustering.load(fitted.save(tmp_path / "fit.safetensors"))
    same_fit(back, fitted)
    np.testing.assert_array_equal(back.predict(images), fitted.predict(images))
    with pytest.raises(ValueError, match="as in fit"):
        back.predict(images.transpose(0, 2, 1))


def same_fit(back, fitted):
    assert {k: v for k, v in back.get_params().items() if k != "encoder"} == {
        k: v for k, v in fitted.get_params().items() if k != "encoder"
    }
    for name in ("labels_", "first_labels_", "representation_matrix_"):
        np.testing.assert_array_equal(getattr(back, name), getattr(fitted, name))
        assert getattr(back, name).dtype == getattr(fitted, name).dtype
    assert (back.affinity_matrix_ != fitted.affinity_matrix_).nnz == 0
    for name in ("history_", "n_epochs_", "stopped_by_", "solver_", "layer_energies_"):
        assert getattr(back, name) == getattr(fitted, name)
    np.testing.assert_equal(back.reconstruction_share_, fitted.reconstruction_share_)
    for ours, theirs in zip(back.subspaces_, fitted.subspaces_, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_encoder_of_ones_own_is_given_to_load(world, tmp_path):
    encoder = nn.Linear(20, 6).double().requires_grad_(False)
    fitted = made(solver="ridge", encoder=encoder, structure=False).fit(world.points)
    path = fitted.save(tmp_path / "fit.safetensors")
    with pytest.raises(ValueError, match="encoder must be given to load"):
        DeepSelfExpressiveClustering.load(path)
    back = DeepSelfExpressiveClustering.load(path, encoder=encoder)
    same_fit(back, fitted)
    np.testing.assert_array_equal(back.predict(world.points), fitted.predict(world.points))
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    (tmp_path / "torn.safetensors").write_bytes(blob)
    with pytest.raises(CorruptFile):
        DeepSelfExpressiveClustering.load(tmp_path / "torn.safetensors")


def test_a_loss_that_is_no_number_is_kept_in_the_file(world, tmp_path):
    with pytest.warns(UserWarning, match="no longer finite"):
        fitted = made(solver="adam", learning_rate=1e200, structure=False).fit(world.points)
    back = DeepSelfExpressiveClustering.load(fitted.save(tmp_path / "fit.safetensors"))
    np.testing.assert_equal(back.history_, fitted.history_)


def test_float32_stays_and_agrees_with_float64(world):
    narrow = made(solver="ridge", structure=False).fit(world.points.astype(np.float32))
    wide = made(solver="ridge", structure=False).fit(world.points)
    assert narrow.representation_matrix_.dtype == np.float32
    np.testing.assert_allclose(narrow.representation_matrix_, wide.representation_matrix_, atol=2e-4)


def test_one_cluster_is_one_cluster(world):
    assert not made(1).fit(world.points).labels_.any()


@pytest.mark.filterwarnings("ignore:the affinity falls into")
def test_duplicated_rows_and_too_small_clusters_are_said(world):
    with pytest.warns(UserWarning, match="stands 5 times"):
        made(solver="ridge", encoder="none").fit(np.concatenate([world.points, np.repeat(world.points[:1], 4, axis=0)]))
    with pytest.warns(UserWarning, match="fewer than subspace_dim=9"):
        made(subspace_dim=9, solver="ridge", structure=False).fit(world.points[:30])


def test_parts_without_a_link_are_said():
    X = np.kron(np.eye(4), np.ones((6, 2))) + 1e-3 * np.random.default_rng(0).normal(size=(24, 8))
    with pytest.warns(UserWarning, match=r"falls into \d parts, more than n_clusters=2"):
        made(2, subspace_dim=2, solver="ridge", structure=False).fit(X)


def test_a_loss_that_explodes_is_said_and_the_last_good_coefficients_stay(world):
    with pytest.warns(UserWarning, match="no longer finite"):
        fitted = made(solver="adam", learning_rate=1e200, structure=False).fit(world.points)
    assert fitted.stopped_by_["express"] == "diverged"
    assert np.isfinite(fitted.representation_matrix_).all()


def test_an_autoencoder_that_learns_nothing_is_said(pictures):
    with pytest.warns(UserWarning, match="say little"):
        made(3, max_epochs=(1, 60, 0), tol=0.0).fit(pictures[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n_clusters": 0}, "n_clusters must be a whole number"),
        ({"n_clusters": 121}, "n_clusters must be at most"),
        ({"subspace_dim": 120}, "subspace_dim must be below"),
        ({"mode": "best"}, "mode must be one of"),
        ({"pretrain": "x"}, "pretrain must be one of"),
        ({"layers": "some"}, "layers must be one of"),
        ({"solver": "sgd"}, "solver must be one of"),
        ({"encoder": "vit"}, "encoder must be"),
        ({"encoder": "conv"}, "image_shape must be given"),
        ({"image_shape": (3, 3)}, "image_shape must hold the 20 numbers"),
        ({"tol": 1.0}, "tol must lie"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"learning_rate": np.inf}, "learning_rate must be positive"),
        ({"max_epochs": (1, 2)}, "max_epochs must be three"),
        ({"max_epochs": 5}, "max_epochs must be three"),
        ({"max_epochs": (1.5, 2, 3)}, "max_epochs must be three"),
        ({"max_epochs": ("a", 1, 1)}, "max_epochs must be three"),
        ({"min_epochs": -1}, "min_epochs must be a whole number"),
        ({"min_epochs": "x"}, "min_epochs must be a whole number"),
        ({"ridge": "x"}, "ridge must be positive"),
        ({"tol": "x"}, "tol must lie"),
        ({"image_shape": 20}, r"image_shape must be \(h, w\)"),
        ({"image_shape": (4, "a")}, r"image_shape must be \(h, w\)"),
        ({"image_shape": (4.0, 5)}, r"image_shape must be \(h, w\)"),
        ({"image_shape": (4, 5), "channels": 5}, "channels must be one or more"),
        ({"image_shape": (4, 5), "channels": (0,)}, "channels must be one or more"),
        ({"image_shape": (4, 5), "kernels": (3, 3)}, "channels and kernels must be equally many"),
        ({"solver": "ridge", "train_encoder": True}, "solver must be 'adam' or 'auto'"),
    ],
)
def test_bad_parameters_are_named(world, options, told):
    with pytest.raises(ValueError, match=told):
        made(**({"k": options.pop("n_clusters")} if "n_clusters" in options else {}), **options).fit(world.points)


def test_an_encoder_is_given_rows_in_its_own_float_width(world):
    narrow = mixing().float()
    fitted = made(solver="ridge", encoder=narrow, structure=False).fit(world.points)
    wide = made(solver="ridge", encoder=mixing(), structure=False).fit(world.points)
    assert fitted.representation_matrix_.dtype == np.float64
    np.testing.assert_allclose(fitted.representation_matrix_, wide.representation_matrix_, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        (nn.Threshold(1e9, float("nan")), "encoder must return finite numbers"),
        (nn.Flatten(0), "encoder must return a row for each of"),
    ],
    ids=["nan", "flat"],
)
def test_an_encoder_that_returns_no_rows_is_said(world, encoder, told):
    with pytest.raises(ValueError, match=told):
        made(encoder=encoder).fit(world.points)


@pytest.mark.filterwarnings("ignore:the auto", "ignore:stage", "ignore:the affinity falls into")
def test_images_of_the_wrong_form_are_said(pictures):
    images = pictures[0]
    short = {"max_epochs": (5, 5, 0), "tol": 0.0, "subspace_dim": 8}
    listed = made(3, **short).fit([*images])
    np.testing.assert_array_equal(listed.labels_, made(3, **short).fit(images).labels_)
    with pytest.raises(ValueError, match=r"images of one size, got \(3, 3\) and \(4, 4\)"):
        made(2).fit([np.ones((3, 3)), np.ones((4, 4))])
    with pytest.raises(ValueError, match=r"X must be rows .* got shape \(4, 1, 1, 2, 2\)"):
        made(2).fit(np.ones((4, 1, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"X must hold numbers, got datetime64\[s\]"):
        made(2).fit(np.ones((30, 3), "datetime64[s]"))
    last = np.repeat(images[:, :8, :6, None], 3, axis=3) * np.array([1, 0.5, 2], dtype=np.float32)
    with pytest.warns(UserWarning, match="taken as 8 channels of 6 by 3 pixels"):
        made(3, **short).fit(last)


def test_rows_that_cannot_be_clustered_are_named(world):
    dark = world.points.copy()
    dark[7] = 0
    with pytest.raises(ValueError, match=r"all-zero row.*row 7"):
        made().fit(dark)
    dark[7] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        made().fit(dark)
    fitted = made(solver="ridge", encoder="none", image_shape=(4, 5)).fit(world.points)
    with pytest.raises(ValueError, match="as in fit"):
        fitted.predict(world.points.reshape(-1, 5, 4))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"solver": "adam"}, "120 rows need 806,400 bytes, 1,000 are free; solver='ridge' needs no such matrix"),
        ({"solver": "ridge"}, "120 rows need 806,400 bytes, 1,000 are free; sparse subspace clustering"),
        ({"train_encoder": True, "encoder": nn.Linear(20, 6).double()}, "1,000 are free; train_encoder=False"),
    ],
    ids=["adam", "ridge", "trained"],
)
def test_more_rows_than_memory_are_refused_with_the_bytes(world, monkeypatch, options, told):
    monkeypatch.setattr("polyspan.cluster._deep_stages.available_memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=told):
        made(**options).fit(world.points)


def test_points_no_more_than_their_numbers_are_told_what_needs_no_matrix(world, monkeypatch):
    monkeypatch.setattr("polyspan.cluster._deep_stages.available_memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"outnumber the 20 numbers.*layers='input'"):
        made(2, subspace_dim=2, solver="ridge").fit(world.points[:20])


def test_distances_of_all_pairs_are_refused_with_the_bytes(pictures, monkeypatch):
    monkeypatch.setattr("polyspan.cluster._deep_stages.available_memory_bytes", lambda: 110_000)
    with pytest.raises(
        ValueError, match=r"pretrain must be 'reconstruction'.*60 rows.*144,000 bytes, 110,000 are free"
    ):
        made(3, subspace_dim=8, pretrain="distance").fit(pictures[0])


def test_adam_is_refused_before_anything_of_n_by_n_is_made(monkeypatch):
    monkeypatch.setattr("polyspan.cluster._deep_stages.available_memory_bytes", lambda: 2**28)
    X = np.random.default_rng(0).normal(size=(20_000, 6))
    tracemalloc.start()
    with pytest.raises(ValueError, match="solver='ridge' needs no such matrix"):
        made(solver="adam").fit(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * X.nbytes


def mixing():
    made = nn.Linear(20, 15).double().requires_grad_(False)
    made.weight.copy_(torch.randn(15, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    made.bias.zero_()
    return made


def ridge_expression(X, alpha):
    return RidgeExpression(X, alpha, zero_diagonal=True)  # ty: ignore[no-matching-overload]


def both(monkeypatch, X, k, **options):
    """Fit the same rows with whole matrices, and following pairs alone."""
    whole = made(k, solver="ridge", **options).fit(X)
    monkeypatch.setattr("polyspan.cluster.deep_self_expressive.WHOLE_ROWS", 20)
    pairs = made(k, solver="ridge", **options).fit(X)
    monkeypatch.undo()
    assert isinstance(whole.representation_matrix_, np.ndarray)
    assert isinstance(pairs.representation_matrix_, RidgeExpression)
    return whole, pairs


@pytest.mark.filterwarnings("ignore:the affinity falls into", "ignore:a row stands", "ignore:stage")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structure": False},
        {"subspace_dim": 1, "structure": False},
        {"zero_diagonal": False, "structure": False},
        {"zero_diagonal": False, "subspace_dim": 6},
        {"ridge": 30.0},
        {"normalize_layers": False},
        {"encoder": mixing()},
        # Until no coefficient between clusters is left, with many clusterings on the way.
        {"tol": 0.0, "max_epochs": (0, 0, 240), "clustering_refresh": 24},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_followed_pairs_give_what_whole_matrices_give(monkeypatch, noise, options):
    world = planted_subspaces(3, n_per=30, d=20, k=3, n_subspaces=4, noise=noise)
    whole, pairs = both(monkeypatch, world.points, 4, **options)
    np.testing.assert_allclose(pairs.affinity_matrix_.toarray(), whole.affinity_matrix_.toarray(), atol=1e-12)
    assert (pairs.n_epochs_, pairs.stopped_by_) == (whole.n_epochs_, whole.stopped_by_)
    assert pairs.history_[0] == whole.history_[0]
    # Which of more parts than clusters share a label rounding decides.
    if connected_components(whole.affinity_matrix_, directed=False)[0] <= 4:
        assert clustering_accuracy(whole.labels_, pairs.labels_) == 1.0
        assert clustering_accuracy(whole.first_labels_, pairs.first_labels_) == 1.0
        assert clustering_accuracy(whole.predict(world.points), pairs.predict(world.points)) == 1.0
    else:
        assert not options.get("structure", True)
    if options == {"structure": False}:
        np.testing.assert_allclose(pairs.representation_matrix_.dense(), whole.representation_matrix_, atol=1e-12)


def test_followed_pairs_of_float32_give_what_whole_matrices_give(monkeypatch, world):
    whole, pairs = both(monkeypatch, world.points.astype(np.float32), 4)
    assert clustering_accuracy(whole.labels_, pairs.labels_) == 1.0
    assert pairs.affinity_matrix_.dtype == whole.affinity_matrix_.dtype
    np.testing.assert_allclose(pairs.affinity_matrix_.toarray(), whole.affinity_matrix_.toarray(), atol=1e-7)


@pytest.mark.filterwarnings("ignore:the affinity falls into", "ignore:a row stands")
def test_copies_and_points_without_a_link_are_followed_as_they_are_in_whole_matrices(monkeypatch, world):
    rng = np.random.default_rng(0)
    copies = np.concatenate([world.points, np.repeat(world.points[:2], 40, axis=0)])
    axes = np.eye(20)[np.arange(60) % 20] * rng.choice([-1, 1], size=(60, 1))
    for X, k in ((copies, 4), (axes, 2)):
        whole, pairs = both(monkeypatch, X, k, structure=False)
        np.testing.assert_allclose(
            pairs.affinity_matrix_.sum(axis=0), whole.affinity_matrix_.sum(axis=0), rtol=1e-9, atol=1e-12
        )


def test_columns_whose_cut_is_in_doubt_are_followed_further(monkeypatch):
    """Labels that part a point from all that it is tied to leave it nothing among the pairs followed first."""
    world = planted_subspaces(1, n_per=40, d=12, k=3, n_subspaces=3, noise=0.2)
    X = world.points / np.linalg.norm(world.points, axis=1, keepdims=True)
    expression = ridge_expression(X, 0.1)
    pairs = FollowedCoefficients(expression, 2, rate=0.05)
    whole = AllCoefficients(torch.as_tensor(expression.dense()), 2, rate=0.05, hollow=True, relative=True)
    first = len(pairs._known)
    labels = np.random.default_rng(0).integers(0, 2, size=120)
    for _ in range(12):
        pairs.step(labels)
        whole.step(labels)
    np.testing.assert_allclose(pairs.affinity().toarray(), whole.affinity().toarray(), atol=1e-14)
    assert len(pairs._known) > first
    monkeypatch.setattr("polyspan.cluster._coefficients.available_memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"ties among its affinities.*1,000 are free; .*structure=False"):
        FollowedCoefficients(expression, 2, rate=0.05)


def test_a_step_never_passes_zero():
    expression = ridge_expression(np.random.default_rng(0).normal(size=(30, 5)), 0.1)
    coefficients = AllCoefficients(torch.as_tensor(expression.dense()), 3, rate=0.5, hollow=True, relative=True)
    before, labels = np.abs(coefficients.matrix()), np.arange(30) % 2
    for _ in range(5):
        coefficients.step(labels)
        after = np.abs(coefficients.matrix())
        assert (after <= before).all()
        before = after
    apart = labels[:, None] != labels
    assert not after[apart].any()
    assert after[~apart].any()


def test_memory_is_linear_in_the_points_of_the_closed_form():
    rng, peaks = np.random.default_rng(0), []
    made(2, solver="ridge", subspace_dim=2, structure=False).fit(rng.normal(size=(20, 2)))  # what is loaded late
    for n in (2_500, 7_500):
        bases = np.linalg.qr(rng.normal(size=(4, 10, 3)))[0]
        X = np.concatenate([rng.normal(size=(n // 4, 3)) @ basis.T for basis in bases])
        X += 0.01 * rng.normal(size=X.shape)
        tracemalloc.start()
        fitted = made(subspace_dim=6, n_init=1).fit(X.astype(np.float32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert clustering_accuracy(np.repeat(np.arange(4), n // 4), fitted.labels_) > 0.99
    # A matrix of n by n in float32 would be 225 MB.
    assert peaks[1] < 0.3 * 7_500**2 * 4
    assert peaks[1] < 3 * peaks[0]


@pytest.mark.parametrize("ridge", [0.1, 1000.0])
def test_the_second_stage_does_the_same_to_small_coefficients(world, ridge):
    """Least squares of many points, or with a large penalty, is small; a step must not be long beside it."""
    fitted = made(solver="ridge", ridge=ridge).fit(world.points)
    assert clustering_accuracy(world.labels, fitted.first_labels_) == 1.0
    assert clustering_accuracy(world.labels, fitted.labels_) == 1.0
    assert fitted.stopped_by_["structure"] == "labels"


@pytest.mark.parametrize("n", [15, 60])
def test_a_free_diagonal_is_honoured_by_the_closed_form(world, n):
    """Oracle: C = G (G + a I)^-1."""
    X = world.points[:n] / np.linalg.norm(world.points[:n], axis=1, keepdims=True)
    fitted = made(1, solver="ridge", ridge=0.3, zero_diagonal=False, structure=False, subspace_dim=2).fit(X)
    G = X @ X.T
    np.testing.assert_allclose(fitted.representation_matrix_, G @ np.linalg.inv(G + 0.3 * np.eye(n)), atol=1e-10)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_rows_of_any_size_are_clustered(world, scale):
    plain, sized = made(solver="ridge").fit(world.points), made(solver="ridge").fit(scale * world.points)
    assert clustering_accuracy(plain.labels_, sized.labels_) == 1.0
    assert clustering_accuracy(plain.predict(world.points), sized.predict(scale * world.points)) == 1.0


def test_a_clustering_without_whole_matrices_comes_back_whole(monkeypatch, world, tmp_path):
    fitted = both(monkeypatch, world.points, 4)[1]
    back = DeepSelfExpressiveClustering.load(fitted.save(tmp_path / "fit.safetensors"))
    np.testing.assert_array_equal(back.representation_matrix_.dense(), fitted.representation_matrix_.dense())
    np.testing.assert_array_equal(back.labels_, fitted.labels_)
    assert (back.affinity_matrix_ != fitted.affinity_matrix_).nnz == 0
    np.testing.assert_array_equal(back.predict(world.points), fitted.predict(world.points))
