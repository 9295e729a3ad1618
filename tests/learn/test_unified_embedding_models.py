import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.learn import CategoricalHasher, UnifiedEmbeddingClassifier, UnifiedEmbeddingRegressor
from polyspan.learn._cross_network import CrossHead
from polyspan.learn._table_files import TableFile
from polyspan.learn.unified_embedding_plots import plot_collisions
from polyspan.run import measure_peak

SMALL = {"n_embeddings": 512, "chunk_dim": 4, "hidden": (16,), "random_state": 0}


def expected_to_fail(estimator):
    """Continuous columns that are named as categories: every value at predict is one that was never seen."""
    if isinstance(estimator.categorical, str):
        return {}
    reason = "a continuous column taken as a category tells nothing of values not seen"
    missing = "NaN in a column that is named as categories is a value like any other"
    return {
        "check_classifiers_train": reason,
        "check_class_weight_classifiers": reason,
        "check_estimators_nan_inf": missing,
    }


@parametrize_with_checks(
    [
        UnifiedEmbeddingClassifier(n_embeddings=64, chunk_dim=4, hidden=(16,), max_epochs=6),
        UnifiedEmbeddingRegressor(n_embeddings=64, chunk_dim=4),
        UnifiedEmbeddingClassifier(
            n_embeddings=64, chunk_dim=4, categorical=[0], hidden=(), max_epochs=2, optimizer="row-adagrad"
        ),
    ],
    expected_failed_checks=expected_to_fail,
)
def test_sklearn_contract(estimator, check):
    check(estimator)


def numpy_state():
    return str(np.random.get_state())  # noqa: NPY002 - it must stay as it is


def clicks(n=1500, seed=0):
    """Labels that hang on a text column, a whole-number column and a number; a date and a list that tell nothing."""
    rng = np.random.default_rng(seed)
    cities = rng.choice(["Rome", "Oslo", "Lima", "Bonn"], size=n).astype(object)
    items = rng.integers(12, size=n)
    price = rng.normal(5, 3, size=n)
    taste = np.random.default_rng(99).normal(size=(4, 12))
    city = np.unique(cities, return_inverse=True)[1]
    logits = 2 * taste[city, items] + (price - 5) / 3
    clicked = rng.random(n) < 1 / (1 + np.exp(-2 * logits))
    cities[rng.random(n) < 0.01] = None
    day = [datetime.date(2024, 1, 1 + int(d)) for d in rng.integers(28, size=n)]
    tags = [[f"t{j}" for j in rng.integers(9, size=rng.integers(4))] for _ in range(n)]
    X = {"city": cities, "item": items, "price": price, "day": day, "tags": tags}
    return X, np.where(clicked, "yes", "no")


def part(X, rows):
    return {name: [column[i] for i in rows] if isinstance(column, list) else column[rows] for name, column in X.items()}


@pytest.fixture(scope="module")
def fitted():
    X, y = clicks()
    return UnifiedEmbeddingClassifier(**SMALL).fit(X, y)


def test_it_learns_from_text_numbers_dates_and_lists_together(fitted):
    X, y = clicks(seed=1)
    assert fitted.categorical_features_ == ["city", "item", "day", "tags"]
    assert fitted.dense_features_ == ["price"]
    assert roc_auc_score(y == "yes", fitted.predict_proba(X)[:, 1]) > 0.75
    np.testing.assert_allclose(fitted.predict_proba(X).sum(axis=1), 1)
    assert set(fitted.predict(X)) == {"yes", "no"}


def test_tables_of_every_kind_predict_alike(fitted):
    X, _ = clicks(60, seed=2)
    expected = fitted.predict_proba(X)
    table = pa.table(X)
    shuffled = {name: X[name] for name in ("tags", "price", "day", "item", "city")}
    for other in (table, table.to_batches()[0], {**shuffled, "extra": np.zeros(60)}):
        np.testing.assert_array_equal(fitted.predict_proba(other), expected)
    new = {**X, "city": np.array(["a city never seen"] * 60, dtype=object)}
    assert np.isfinite(fitted.predict_proba(new)).all()


def test_a_missing_column_is_refused_or_taken_as_missing_values(fitted):
    X, _ = clicks(20)
    short = {name: column for name, column in X.items() if name != "city"}
    with pytest.raises(ValueError, match=r"X must hold every column of the fit, missing \['city'\]"):
        fitted.predict(short)
    lenient = UnifiedEmbeddingClassifier(**SMALL, absent="missing", max_epochs=1).fit(*clicks(100))
    nothing = {**X, "city": np.full(20, None)}
    np.testing.assert_array_equal(lenient.predict_proba(short), lenient.predict_proba(nothing))


def test_two_fits_of_one_seed_are_equal_and_no_global_state_moves():
    X, y = clicks(300)
    states = torch.random.get_rng_state(), numpy_state(), torch.get_default_dtype()
    one, two = (UnifiedEmbeddingClassifier(**SMALL, max_epochs=2).fit(X, y).predict_proba(X) for _ in range(2))
    other = UnifiedEmbeddingClassifier(**{**SMALL, "random_state": 1}, max_epochs=2).fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - other).max() > 1e-4
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (numpy_state(), torch.get_default_dtype()) == states[1:]


def test_several_classes_and_their_weights():
    X, y = clicks(400)
    three = np.where(np.asarray(X["item"]) % 3 == 0, "third", y)
    model = UnifiedEmbeddingClassifier(**SMALL, n_lookups={"item": 2}, class_weight={"yes": 1, "no": 1, "third": 1e-6})
    assert model.fit(X, three).predict_proba(X).shape == (400, 3)
    assert "third" not in model.predict(X)
    assert model.network_.embedding.features["item"].n_lookups == 2
    balanced = UnifiedEmbeddingClassifier(**SMALL, class_weight="balanced", max_epochs=1).fit(X, three)
    assert balanced.score(X, three) > 0.2


def test_a_regressor_learns_in_the_targets_own_scale():
    X, _ = clicks()
    y = 1e4 + 500 * np.asarray(X["price"]) + 2000 * (np.asarray(X["item"]) % 2)
    model = UnifiedEmbeddingRegressor(**SMALL).fit(X, y)
    assert model.score(X, y) > 0.9


def test_early_stopping_keeps_the_best_epoch():
    X, y = clicks(600)
    model = UnifiedEmbeddingClassifier(
        **SMALL, early_stopping=True, max_epochs=60, n_iter_no_change=3, learning_rate=0.02
    ).fit(X, y)
    losses = model.validation_losses_
    assert len(losses) == model.n_iter_ < 60
    assert int(np.argmin(losses)) == len(losses) - 4
    longer = UnifiedEmbeddingClassifier(
        **SMALL, early_stopping=True, max_epochs=int(np.argmin(losses)) + 1, learning_rate=0.02
    ).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), longer.predict_proba(X))


def test_the_network_is_dcn_v2():
    generator = torch.Generator().manual_seed(0)
    net = CrossHead(3, 2, num_cross=2, hidden=(5,), generator=generator)
    x = torch.randn(4, 3, generator=generator)
    y = x
    for layer in net.cross:
        y = x * (y @ layer.weight.T + layer.bias) + y
    y = torch.relu(y @ net.hidden[0].weight.T + net.hidden[0].bias)
    expected = y @ net.out.weight.T + net.out.bias
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("optimizer", ["adam", "row-adagrad"])
def test_training_goes_on_from_disk_as_if_it_had_not_stopped(tmp_path, optimizer):
    X, y = clicks(200)
    model = UnifiedEmbeddingClassifier(**SMALL, optimizer=optimizer, batch_size=50)
    model.partial_fit(X, y, classes=["no", "yes"])
    path = model.save(tmp_path / "model.safetensors")
    again = UnifiedEmbeddingClassifier.load(path)
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    later = part(X, range(100))
    model.partial_fit(later, y[:100])
    again.partial_fit(later, y[:100])
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert again.get_params()["hidden"] == (16,)


def test_a_regressor_with_numbers_only_comes_back_from_disk(tmp_path):
    X = np.random.default_rng(0).normal(size=(60, 2))
    model = UnifiedEmbeddingRegressor(**SMALL, max_epochs=2).fit(X, X[:, 0])
    again = UnifiedEmbeddingRegressor.load(model.save(tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    with pytest.raises(ValueError, match=r"a categorical column is needed, the fit had only numbers: \['x0', 'x1'\]"):
        again.reader_overlap()


# Files.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    X, y = clicks(900)
    path = tmp_path_factory.mktemp("tables") / "clicks.parquet"
    data = pa.table({**X, "clicked": y})
    data = data.set_column(0, "city", data["city"].dictionary_encode())
    pq.write_table(data, path, row_group_size=200)
    return path


def test_a_file_is_learnt_like_the_table_in_it(table):
    X, y = clicks(seed=1)
    model = UnifiedEmbeddingClassifier(**SMALL, batch_size=16).fit_file(table, "clicked", batch_rows=128)
    assert model.feature_names_in_.tolist() == list(X)
    assert model.classes_.tolist() == ["no", "yes"]
    assert model.n_iter_ == 10
    assert roc_auc_score(y == "yes", model.decision_function(X)) > 0.7
    whole = np.asarray(clicks(900)[0]["price"])
    np.testing.assert_allclose([model._mean[0], model._scale[0]], [whole.mean(), whole.std()], rtol=1e-12)


@pytest.mark.parametrize("scheme", ["hash", "collisionless"])
def test_schemes_that_need_vocabularies_take_them_from_the_file(table, scheme):
    model = UnifiedEmbeddingClassifier(**SMALL, scheme=scheme, max_epochs=1)
    model.fit_file(table, "clicked", columns=["item", "city"], batch_rows=100)
    features = model.network_.embedding.features
    assert {name: spec.vocabulary_size for name, spec in features.items()} == {"item": 12, "city": 5}
    if scheme == "collisionless":
        assert model.network_.embedding.num_embeddings == 13 + 6


def test_a_killed_training_goes_on_from_its_checkpoint(table, tmp_path):
    options = {**SMALL, "early_stopping": True, "batch_size": 32}
    whole = UnifiedEmbeddingClassifier(**options, max_epochs=4).fit_file(table, "clicked", batch_rows=256)
    kept = tmp_path / "kept.safetensors"
    UnifiedEmbeddingClassifier(**options, max_epochs=2).fit_file(table, "clicked", batch_rows=256, checkpoint=kept)
    model = UnifiedEmbeddingClassifier(**options, max_epochs=4)
    model.fit_file(table, "clicked", batch_rows=256, checkpoint=kept)
    X, _ = clicks(50)
    np.testing.assert_array_equal(model.predict_proba(X), whole.predict_proba(X))
    assert model.validation_losses_ == whole.validation_losses_
    assert len(model.validation_losses_) == 4
    other = UnifiedEmbeddingClassifier(**{**options, "chunk_dim": 8})
    with pytest.raises(ValueError, match=r"checkpoint must be of this training, got kept.safetensors with chunk_dim=4"):
        other.fit_file(table, "clicked", checkpoint=kept)
    with pytest.raises(ValueError, match="with another file or target"):
        UnifiedEmbeddingClassifier(**options).fit_file(table, "city", checkpoint=kept)


def test_text_tables_are_typed_by_their_cells(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,c,d,y\n1,0.5,007,3,1.5\n2,,8,,2.5\n2,1e3,x,4,0\n")
    with TableFile(path, "y", None, 2) as found:
        (_, first, y), (start, _, _) = found.batches()
    assert start == 2
    assert first["a"].tolist() == [1, 2]
    np.testing.assert_array_equal(first["b"], [0.5, np.nan])
    assert first["c"].tolist() == ["007", "8"]
    assert first["d"].tolist() == [3, None]
    assert y.tolist() == [1.5, 2.5]
    model = UnifiedEmbeddingRegressor(**SMALL, max_epochs=1, categorical=["a", "b", "c", "d"]).fit_file(
        path, "y", batch_rows=2
    )
    np.testing.assert_allclose(
        [model._target_mean, model._target_scale], [np.mean([1.5, 2.5, 0]), np.std([1.5, 2.5, 0])]
    )
    assert np.isfinite(model.predict({"a": [9], "b": [None], "c": ["zz"], "d": [1]})).all()


@pytest.mark.slow
def test_a_file_of_four_times_the_rows_takes_no_more_memory(tmp_path):
    peaks = []
    for n in (100_000, 400_000):
        rng = np.random.default_rng(0)
        path = tmp_path / f"{n}.parquet"
        names = np.array([f"a long name of a value that takes its place {i}" for i in range(500)])
        columns = {f"c{j}": pa.array(names[rng.integers(500, size=n)]) for j in range(4)}
        pq.write_table(pa.table({**columns, "y": rng.integers(2, size=n)}), path, row_group_size=20_000)
        del columns
        model = UnifiedEmbeddingClassifier(
            n_embeddings=1000, chunk_dim=4, n_cross=0, hidden=(), max_epochs=1, batch_size=8192, early_stopping=False
        )
        model.fit_file(path, "y", batch_rows=20_000)
        peaks.append(measure_peak(lambda m=model, p=path: m.fit_file(p, "y", batch_rows=20_000)).peak_bytes)
    assert peaks[1] < 1.2 * peaks[0] + 8 * 2**20


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ({"n_iter_no_change": 0}, "n_iter_no_change must be at least 1, got 0"),
        ({"n_cross": -1}, "n_cross must be at least 0, got -1"),
        ({"max_len": 0}, "max_len must be at least 1, got 0"),
        ({"max_len": {"tags": 2}}, r"max_len must be at least 1, got \{'tags': 2\}"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"table_learning_rate": -1}, "table_learning_rate must be above 0, got -1"),
        ({"batch_size": 0}, "batch_size must be 'auto' or at least 1, got 0"),
        ({"early_stopping": "yes"}, "early_stopping must be 'auto', True or False, got 'yes'"),
        ({"validation_fraction": 1.0}, "validation_fraction must be between 0 and 1, got 1.0"),
        ({"optimizer": "sgd"}, "optimizer must be 'adam' or 'row-adagrad', got 'sgd'"),
        ({"absent": "no"}, "absent must be 'error' or 'missing', got 'no'"),
        ({"scheme": "robe"}, "scheme must be one of .*, got 'robe'"),
        ({"categorical": "all"}, "categorical must be 'auto' or name columns, got 'all'"),
        ({"categorical": ["city", "z"]}, r"categorical must name columns of X, got \['z'\]"),
        ({"salt_groups": {"z": "g"}}, r"salt_groups must name columns of X, got \['z'\]"),
        ({"n_embeddings": 1}, "at least 2 rows a shard"),
        ({"class_weight": "even"}, "class_weight must be 'balanced', a dict or None, got 'even'"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    X, y = clicks(30)
    with pytest.raises(ValueError, match=message):
        UnifiedEmbeddingClassifier(**{**SMALL, **options}).fit(X, y)


def test_targets_and_numbers_that_cannot_be_learnt_are_refused(fitted):
    X, y = clicks(30)
    with pytest.raises(ValueError, match="y must hold at least 2 classes, got 1 class: 'no'"):
        UnifiedEmbeddingClassifier(**SMALL).fit(X, np.full(30, "no"))
    with pytest.raises(ValueError, match="X and y must have one length, got 30 rows and 29 targets"):
        UnifiedEmbeddingClassifier(**SMALL).fit(X, y[:29])
    with pytest.raises(ValueError, match=r"column 'price' of numbers .*contains NaN"):
        UnifiedEmbeddingClassifier(**SMALL).fit({**X, "price": np.full(30, np.nan)}, y)
    with pytest.raises(ValueError, match="column 'price' must hold numbers, as at the fit"):
        fitted.predict({**X, "price": ["cheap"] * 30})
    with pytest.raises(ValueError, match="y must be finite, got NaN or infinity in 1 rows"):
        UnifiedEmbeddingRegressor(**SMALL).fit(X, [np.inf] + [0.0] * 29)
    with pytest.raises(ValueError, match="y must hold numbers"):
        UnifiedEmbeddingRegressor(**SMALL).fit(X, y)
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        UnifiedEmbeddingClassifier(**SMALL).partial_fit(X, y)
    with pytest.raises(ValueError, match=r"y must hold classes of the first call, .* got .'maybe'"):
        UnifiedEmbeddingClassifier(**SMALL).partial_fit(X, y, classes=["no", "yes"]).partial_fit(X, ["maybe"] * 30)
    with pytest.raises(ValueError, match="class_weight must be a dict in partial_fit, got 'balanced'"):
        UnifiedEmbeddingClassifier(**SMALL, class_weight="balanced").partial_fit(X, y, classes=["no", "yes"])


def test_lists_that_are_too_long_are_cut_and_counted():
    X = {"tags": [["a", "b", "c"], ["a"], [], None] * 10}
    model = UnifiedEmbeddingRegressor(**SMALL, max_len=2, max_epochs=1).fit(X, np.arange(40.0))
    assert model.n_truncated_ == 10


def test_files_that_do_not_fit_are_refused(table, tmp_path):
    with pytest.raises(ValueError, match=r"columns must be of clicks.parquet, which has .*, got \['z'\]"):
        UnifiedEmbeddingClassifier().fit_file(table, "z")
    with pytest.raises(ValueError, match="columns must be others than the target 'clicked'"):
        UnifiedEmbeddingClassifier().fit_file(table, "clicked", columns=["clicked"])
    with pytest.raises(ValueError, match="path must end in one of"):
        UnifiedEmbeddingClassifier().fit_file(tmp_path / "t.npy", "y")
    with pytest.raises(ValueError, match="batch_rows must be at least 1, got 0"):
        UnifiedEmbeddingClassifier().fit_file(table, "clicked", batch_rows=0)
    with pytest.raises(ValueError, match="class_weight must be a dict for files"):
        UnifiedEmbeddingClassifier(class_weight="balanced").fit_file(table, "clicked")
    pq.write_table(pa.table({"a": [1, 2], "y": ["u", None]}), tmp_path / "gaps.parquet")
    with pytest.raises(ValueError, match="target 'y' must have a value in every row, got 1 nulls"):
        UnifiedEmbeddingClassifier().fit_file(tmp_path / "gaps.parquet", "y")
    pq.write_table(pa.table({"a": pa.array([], pa.int64()), "y": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="the file must have at least one row, got 0"):
        UnifiedEmbeddingClassifier().fit_file(tmp_path / "none.parquet", "y")


def test_collisions_are_drawn_with_equal_bytes(fitted, tmp_path):
    found, overlap = fitted.collision_report(clicks(100)[0]), fitted.reader_overlap()
    assert overlap.shape == (4, 4)
    one, two = (plot_collisions(found, overlap, tmp_path / f"{i}.svg").read_bytes() for i in range(2))
    assert one == two
    assert b"city" in one or b"<svg" in one
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf"):
        plot_collisions(found, overlap, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"overlap must be 4 by 4, got shape \(2, 2\)"):
        plot_collisions(found, overlap[:2, :2], tmp_path / "a.svg")


@pytest.mark.parametrize(
    "y",
    [np.array(["2020-01-01", "2020-01-02"] * 4, "M8[D]"), [datetime.date(2020, 1, 1 + i % 2) for i in range(8)]],
    ids=["NumPy", "Python"],
)
def test_a_target_of_dates_is_refused_before_any_training(y):
    X = {"a": list("abcdefgh")}
    with pytest.raises(ValueError, match="got dates"):
        UnifiedEmbeddingClassifier().fit(X, y)
    with pytest.raises((ValueError), match="y must hold numbers"):
        UnifiedEmbeddingRegressor().fit(X, y)


def test_a_table_of_tensors_is_read_like_one_of_arrays():
    rng = np.random.default_rng(0)
    X = {"kind": rng.integers(-3, 9, size=80), "size": rng.normal(size=80).astype(np.float32)}
    tensors = {"kind": torch.from_numpy(X["kind"]), "size": torch.from_numpy(X["size"]).requires_grad_()}
    y = X["kind"] > X["size"]
    options = {"n_embeddings": 32, "chunk_dim": 2, "hidden": (4,), "max_epochs": 2, "random_state": 0}
    mine, plain = (UnifiedEmbeddingClassifier(**options).fit(given, y) for given in (tensors, X))
    assert (mine.categorical_features_, mine.dense_features_) == (["kind"], ["size"])
    np.testing.assert_array_equal(mine.predict_proba(tensors), plain.predict_proba(X))
    half = {"kind": torch.tensor([1.5, 2.0]).to(torch.bfloat16)}
    np.testing.assert_array_equal(
        CategoricalHasher().fit_transform(half), CategoricalHasher().fit_transform({"kind": [1.5, 2]})
    )
