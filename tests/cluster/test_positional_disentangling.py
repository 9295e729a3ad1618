import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.cluster import PositionalDisentangler, position_r2
from polyspan.cluster._positions import grid_positions, make_targets
from polyspan.errors import WrongContent


@parametrize_with_checks(
    [
        PositionalDisentangler(1),
        PositionalDisentangler(1, solver="sgd", epochs=1, random_state=0),
        PositionalDisentangler(method="leace"),
    ]
)
def test_sklearn_contract(estimator, check):
    check(estimator)


def planted(seed=0, *, n=20, h=6, w=5, d=24, k=3, offset=0.0):
    """Content in d - k directions, k smooth functions of position in the others, all turned."""
    rng = np.random.default_rng(seed)
    where = grid_positions(h, w).reshape(h, w, 2)
    code = np.stack([where[..., 0], where[..., 1], np.cos(np.pi * where[..., 0])][:k], axis=-1)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    X = np.concatenate([rng.normal(size=(n, h, w, d - k)), np.broadcast_to(3 * code, (n, h, w, k))], axis=-1)
    return X @ turn.T + offset, turn[:, d - k :]


def literal_rounds(X, t, rounds, alpha):
    """Every round on all rows: regress, orthonormalise, subtract, again; the formula, without sums."""
    X = X.copy()
    weight = alpha * np.square(X - X.mean(axis=0)).sum() / len(X) / X.shape[1]
    for _ in range(rounds):
        A, T = X - X.mean(axis=0), t - t.mean(axis=0)
        W = np.linalg.solve(A.T @ A + weight * np.eye(X.shape[1]), A.T @ T)
        row = W[:, 0] / np.linalg.norm(W[:, 0])
        column = W[:, 1] - (W[:, 1] @ row) * row
        column /= np.linalg.norm(column)
        X = X - np.outer(X @ row, row) - np.outer(X @ column, column)
    return X


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), rounds=st.integers(1, 5))
def test_rounds_are_one_orthogonal_projector_of_the_announced_rank(seed, rounds):
    X, _ = planted(seed)
    made = PositionalDisentangler(rounds, stop_r2=None).fit(X)
    P = made.projector_
    np.testing.assert_allclose(P @ P, P, atol=1e-10)
    np.testing.assert_allclose(P, P.T, atol=1e-12)
    assert np.linalg.matrix_rank(P) == 24 - 2 * rounds
    np.testing.assert_allclose(made.basis_.T @ made.basis_, np.eye(2 * rounds), atol=1e-10)
    np.testing.assert_allclose(made.transform(made.transform(X)), made.transform(X), atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), offset=st.floats(-5, 5))
def test_erasure_leaves_no_covariance_with_any_target_and_the_mean_where_it_was(seed, offset):
    X, _ = planted(seed, offset=offset)
    made = PositionalDisentangler(method="leace", targets="cosine", order=2, stop_r2=None).fit(X)
    Y = made.transform(X).reshape(-1, 24)
    t = np.tile(make_targets("cosine", 2)(grid_positions(6, 5)), (20, 1))
    assert np.abs((Y - Y.mean(axis=0)).T @ (t - t.mean(axis=0))).max() / len(Y) < 1e-9
    np.testing.assert_allclose(Y.mean(axis=0), X.reshape(-1, 24).mean(axis=0), atol=1e-9)


def test_rounds_from_sums_are_the_rounds_on_rows():
    X, _ = planted()
    rows, t = X.reshape(-1, 24), np.tile(grid_positions(6, 5), (20, 1))
    # Where nothing is left, rounding chooses the direction: three rounds, then the two part.
    made = PositionalDisentangler(3, stop_r2=None).fit(X)
    np.testing.assert_allclose(made.transform(X).reshape(-1, 24), literal_rounds(rows, t, 3, 1.0), atol=1e-7)


def test_erasure_is_the_least_change_that_takes_the_covariance_away():
    """Against its closed form by a matrix root, and cheaper than the orthogonal projector with the same kernel."""
    X, _ = planted()
    rows, t = X.reshape(-1, 24), np.tile(grid_positions(6, 5), (20, 1))
    A, T = rows - rows.mean(axis=0), t - t.mean(axis=0)
    values, V = np.linalg.eigh(A.T @ A / len(A))
    root, inverse = V * np.sqrt(values) @ V.T, V / np.sqrt(values) @ V.T
    U = np.linalg.svd(inverse @ (A.T @ T) / len(A), full_matrices=False)[0]
    expected = rows - A @ (root @ U @ U.T @ inverse).T
    found = PositionalDisentangler(method="leace", stop_r2=None).fit_transform(X).reshape(-1, 24)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    Q = np.linalg.qr(A.T @ T)[0]
    assert np.square(found - rows).sum() < np.square(A @ Q).sum()


def test_r2_is_that_of_a_regression_with_the_share_of_its_parameters_taken_off():
    X, _ = planted()
    rows, t = X.reshape(-1, 24), np.tile(grid_positions(6, 5), (20, 1))
    made = PositionalDisentangler(1, alpha=0, stop_r2=None).fit(X)
    left = np.square(LinearRegression().fit(rows, t).predict(rows) - t).sum() / np.square(t - t.mean(axis=0)).sum()
    n = len(rows)
    assert made.r2_curve_[0] == pytest.approx(1 - left * (n - 1) / (n - 25), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "least"),
    [({"method": "leace", "targets": "cosine", "order": 1}, 0.05), ({"n_rounds": 6}, 0.15)],
)
def test_position_goes_and_content_stays(options, least):
    X, code = planted(n=60)
    made = PositionalDisentangler(**options).fit(X[:30])
    Y = made.transform(X[30:])
    assert position_r2(X) > 0.95
    assert position_r2(Y) < least
    assert made.r2_curve_[-1] < least < made.r2_curve_[0]
    content = X[30:] - X[30:] @ code @ code.T
    lost = np.square(content - (Y - Y @ code @ code.T)).sum() / np.square(content).sum()
    assert lost < 0.5


def test_rounds_end_where_nothing_is_left_to_explain():
    X, _ = planted(k=2, n=60)
    made = PositionalDisentangler(9, stop_r2=0.02).fit(X)
    assert made.n_rounds_ < 9
    assert made.r2_curve_[-1] <= 0.02 < made.r2_curve_[-2]
    noise = np.random.default_rng(0).normal(size=(100, 6, 5, 24))
    assert PositionalDisentangler().fit(noise).n_rounds_ == 0
    np.testing.assert_array_equal(PositionalDisentangler().fit_transform(noise), noise)
    np.testing.assert_array_equal(PositionalDisentangler(method="leace").fit_transform(noise), noise)


def test_published_training_is_no_projector_unless_it_is_kept_orthogonal():
    X, _ = planted(k=2)
    options = {"solver": "sgd", "learning_rate": 5e-3, "batch_rows": 128, "stop_r2": None, "random_state": 0}
    loose = PositionalDisentangler(4, orthogonal=False, **options).fit(X)
    tight = PositionalDisentangler(4, **options).fit(X)
    idempotent = [np.abs(m.projector_ @ m.projector_ - m.projector_).max() for m in (loose, tight)]
    assert idempotent[0] > 1e-3
    assert idempotent[1] < 1e-9
    assert loose.r2_curve_[-1] < loose.r2_curve_[0]
    np.testing.assert_allclose(loose.transform(X), X @ loose.projector_.T, atol=1e-6)
    again = PositionalDisentangler(4, orthogonal=False, **options).fit(X)
    np.testing.assert_array_equal(again.projector_, loose.projector_)


@pytest.mark.parametrize("options", [{"n_rounds": 3}, {"method": "leace"}, {"method": "position_mean"}])
def test_batches_give_what_all_at_once_gives(options):
    X, _ = planted()
    whole = PositionalDisentangler(**options).fit(X)
    parts = PositionalDisentangler(**options)
    for start in range(0, 20, 6):
        parts.partial_fit(X[start : start + 6])
    np.testing.assert_allclose(parts.transform(X), whole.transform(X), atol=1e-8)
    assert parts.n_rows_seen_ == whole.n_rows_seen_ == 600


@pytest.mark.parametrize(
    "options", [{"n_rounds": 2}, {"method": "leace", "targets": "cosine", "order": 2}, {"method": "position_mean"}]
)
def test_batches_after_a_fit_are_in_the_unit_of_its_positions(options):
    X, _ = planted()
    pixels = 14.0 * np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0), indexing="ij"), axis=-1) - 3
    whole = PositionalDisentangler(**options).fit(X, positions=pixels)
    parts = PositionalDisentangler(**options).fit(X[:8], positions=pixels)
    parts.partial_fit(X[8:14], positions=pixels)
    parts.partial_fit(X[14:])  # a grid has no unit: its sides are the fit's lowest and highest
    np.testing.assert_allclose(parts.transform(X, positions=pixels), whole.transform(X, positions=pixels), atol=1e-8)
    if options.get("targets") == "cosine":
        with pytest.raises(ValueError, match=r"positions must lie in \[-3, 67\] for partial_fit, got -2 to 68"):
            parts.partial_fit(X, positions=pixels + 1)


def test_a_fit_by_another_method_leaves_nothing_of_the_first():
    X, _ = planted()
    made = PositionalDisentangler(1).fit(X)
    made.set_params(method="position_mean").fit(X)
    assert not hasattr(made, "projector_")
    assert not hasattr(made, "basis_")
    made.set_params(method="leace").fit(X)
    assert not hasattr(made, "position_means_")


def test_images_of_several_sizes_are_added_up():
    X, _ = planted()
    small, large = X[:, :4, :4], X
    made = PositionalDisentangler(2).partial_fit(small).partial_fit(large)
    rows = np.concatenate([small.reshape(-1, 24), large.reshape(-1, 24)])
    where = np.concatenate([np.tile(grid_positions(4, 4), (20, 1)), np.tile(grid_positions(6, 5), (20, 1))])
    np.testing.assert_allclose(made.projector_, PositionalDisentangler(2).fit(rows, where).projector_, atol=1e-8)


def test_a_mapped_file_half_precision_and_tensors_are_read_as_arrays_are(tmp_path):
    X, _ = planted(n=12)
    np.save(tmp_path / "f.npy", X.astype(np.float16))
    expected = PositionalDisentangler(2).fit(X.astype(np.float16).astype(np.float32))
    for given_x in (tmp_path / "f.npy", X.astype(np.float16), torch.as_tensor(X).half()):
        made = PositionalDisentangler(2).fit(given_x)
        np.testing.assert_allclose(made.projector_, expected.projector_, atol=1e-9)
        assert made.transform(given_x).dtype == np.float32
    assert made.transform(torch.as_tensor(X).bfloat16()).shape == X.shape
    flat = PositionalDisentangler(2).fit(X.reshape(12, 30, 24), grid=(6, 5))
    np.testing.assert_allclose(flat.projector_, PositionalDisentangler(2).fit(X).projector_, atol=1e-10)
    with pytest.raises(ValueError, match=r"grid must be \(6, 5\), as X has it, or None, got \(5, 6\)"):
        PositionalDisentangler(2).fit(X, grid=(5, 6))


def test_tokens_of_a_text_have_one_coordinate():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 20, 8))
    X[..., 0] += np.arange(20) / 4
    made = PositionalDisentangler(1).fit(X, positions=np.arange(20))
    assert abs(made.basis_[0, 0]) > 0.99
    assert position_r2(X, np.arange(20)) > 0.5
    assert position_r2(made.transform(X), np.arange(20)) < 0.05


def test_position_means_are_those_of_each_place_and_unknown_places_are_refused():
    X, _ = planted()
    made = PositionalDisentangler(method="position_mean").fit(X)
    np.testing.assert_allclose(made.transform(X), X - X.mean(axis=0) + X.mean(axis=(0, 1, 2)), atol=1e-9)
    with pytest.raises(ValueError, match="positions must be among those of the fit"):
        made.transform(X[:, :4])
    with pytest.raises(ValueError, match="one linear map, got 'position_mean'"):
        made.as_module()


@pytest.mark.parametrize("options", [{"n_rounds": 3}, {"method": "leace"}])
def test_the_map_folds_into_what_makes_or_takes_the_features(options):
    X, _ = planted(offset=1.0)
    made = PositionalDisentangler(**options).fit(X)
    x = torch.as_tensor(X[0, 0])
    clean = torch.as_tensor(made.transform(X[0, 0]))
    torch.testing.assert_close(made.as_module().double()(x), clean, atol=1e-5, rtol=1e-5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        takes, makes = torch.nn.Linear(24, 3).double(), torch.nn.Linear(5, 24, bias=False).double()
        norm = torch.nn.Module()
        norm.layernorm = torch.nn.LayerNorm(24).double()
        before = torch.randn(7, 5).double()
    torch.testing.assert_close(made.fold_into(takes, side="input")(x), takes(clean))
    got = torch.as_tensor(made.transform(makes(before).detach().numpy()))
    torch.testing.assert_close(made.fold_into(makes)(before).detach(), got)
    folded = made.fold_into(norm)
    torch.testing.assert_close(
        folded.layernorm(x).detach(),
        torch.as_tensor(made.transform(norm.layernorm(x).detach().numpy())),
        atol=1e-5,
        rtol=1e-5,
    )
    assert isinstance(norm.layernorm, torch.nn.LayerNorm)


@pytest.mark.parametrize("method", ["rasa", "leace", "position_mean"])
def test_a_saved_map_transforms_as_before(method, tmp_path):
    X, _ = planted()
    made = PositionalDisentangler(2, method=method).fit(X)
    made.save(tmp_path / "map.safetensors", model="toy")
    back = PositionalDisentangler.load(tmp_path / "map.safetensors")
    np.testing.assert_array_equal(back.transform(X), made.transform(X))
    np.testing.assert_array_equal(back.r2_curve_, made.r2_curve_)
    with pytest.raises(ValueError, match="targets must be named"):
        PositionalDisentangler(2, targets=lambda where: where).fit(X).save(tmp_path / "own.safetensors")
    from polyspan.io import save_fitted

    save_fitted(tmp_path / "x.safetensors", kind="Other", arrays={"a": np.ones(1)}, params={})
    with pytest.raises(WrongContent, match="a fitted Other"):
        PositionalDisentangler.load(tmp_path / "x.safetensors")


def test_cosine_targets_are_products_of_half_waves():
    where = grid_positions(3, 4)
    t = make_targets("cosine", 2)(where)
    assert t.shape == (12, 8)
    r, c = where.T
    expected = [np.cos(np.pi * a * r) * np.cos(np.pi * b * c) for a in range(3) for b in range(3) if a + b]
    np.testing.assert_allclose(t, np.stack(expected, axis=1), atol=1e-12)


def test_rows_that_were_normalised_after_the_fit_are_told():
    X, _ = planted()
    made = PositionalDisentangler(1).fit(X)
    with pytest.warns(UserWarning, match="rows of X have length 1, those of the fit had not"):
        made.transform(X / np.linalg.norm(X, axis=-1, keepdims=True))


def bad(**changes):
    X, _ = planted(n=9)
    return {"X": X} | changes


@pytest.mark.parametrize(
    ("options", "given_", "message"),
    [
        ({}, {"X": np.zeros((9, 31, 24))}, r"grid must be given for 31 patches an image, which is not a square$"),
        ({}, {"X": np.zeros((9, 26, 24))}, "25 is a square: leave out a class token first"),
        ({}, {"X": np.zeros((9, 41, 24))}, "36 is a square: leave out a class token and 4 registers first"),
        ({}, {"X": np.zeros((9, 30, 24)), "grid": (5, 5)}, r"grid must be \(h, w\) with h \* w = 30 patches"),
        ({}, bad(X=bad()["X"][:7]), "X must hold at least 8 images, got 7"),
        ({}, {"X": np.ones((9, 6, 5, 24))}, "X must hold rows that differ, got constant features"),
        ({}, bad(positions=np.zeros((30, 2))), "positions must differ, got the same one"),
        ({}, bad(positions=np.zeros((29, 2))), r"positions must have shape \(30, p\) or \(9, 30, p\), got \(29, 2\)"),
        ({}, bad(positions=np.full((30, 2), np.nan)), "positions must be finite"),
        ({}, {"X": np.zeros((9, 6)), "positions": np.full((9, 2), "a")}, "positions must be numbers"),
        ({}, {"X": np.zeros((9, 6))}, r"positions \(n, p\) of the rows must be given"),
        ({"n_rounds": 13}, bad(), "n_rounds=13 times 2 targets need at least as many features, got n_features=24"),
        (
            {"method": "leace", "targets": "cosine", "order": 5},
            bad(),
            "35 targets of order=5 need at least as many",
        ),
        ({"n_rounds": 0}, bad(), "n_rounds must be a whole number of at least 1, got 0"),
        ({"method": "svd"}, bad(), "method must be one of .* got 'svd'"),
        ({"solver": "lbfgs"}, bad(), "solver must be one of .* got 'lbfgs'"),
        ({"targets": "column"}, bad(), "targets must be one of .* got 'column'"),
        ({"alpha": -1}, bad(), "alpha must be finite and at least 0, got -1"),
        ({"stop_r2": 1}, bad(), r"stop_r2 must lie in \[0, 1\) or be None, got 1"),
        ({"learning_rate": 0}, bad(), "learning_rate must be positive"),
        ({"targets": lambda where: where[:1]}, bad(), "targets must give finite numbers"),
    ],
)
def test_bad_input_is_named(options, given_, message):
    with pytest.raises(ValueError, match=message):
        PositionalDisentangler(**options).fit(**given_)


def test_bad_rows_and_later_batches_are_named():
    X, _ = planted(n=9)
    X[3, 2, 1, 5] = np.nan
    with pytest.raises(ValueError, match="X must be finite, got NaN or infinity in row 101"):
        PositionalDisentangler().fit(X)
    X, _ = planted(n=9)
    made = PositionalDisentangler(2).partial_fit(X)
    with pytest.raises(ValueError, match="X must have 24 features, as before, got 23"):
        made.partial_fit(X[..., 1:])
    with pytest.raises(ValueError, match="positions must have 2 coordinates, as before, got 1"):
        made.partial_fit(X, positions=np.arange(30).reshape(6, 5, 1))
    with pytest.raises(ValueError, match="X must have 24 features, as in fit, got 23"):
        made.transform(X[..., 1:])
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 1\] for partial_fit, got 0 to 29"):
        PositionalDisentangler(2, targets="cosine").partial_fit(X, positions=np.arange(30))
    with pytest.raises(AttributeError, match="partial_fit"):
        PositionalDisentangler(solver="sgd").partial_fit(X)
    with pytest.raises(ValueError, match="model must be a Linear or have layernorm"):
        made.fold_into(torch.nn.ReLU())
    with pytest.raises(ValueError, match="model must have width 24 on its output side, got 3"):
        made.fold_into(torch.nn.Linear(24, 3))
    with pytest.raises(ValueError, match="at least 2 images or rows, got 1"):
        position_r2(X[:1])
