from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.linear_model import LinearRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from polyspan.cluster import (
    ElasticNetSubspaceClustering,
    LeastSquaresSubspaceClustering,
    LowRankGaussianMixture,
    ManifoldLinearizingClustering,
    ThresholdingSubspaceClustering,
    clustering_report,
    found_subspaces,
    memberships,
    points_plots,
    seed_stability,
)
from polyspan.cluster.points_plots import plot_subspaces
from polyspan.cluster.reporting import basis_angles
from polyspan.data import planted_subspaces
from polyspan.linalg import clustering_accuracy, principal_angles


@pytest.fixture(scope="module")
def world():
    return planted_subspaces(0, n_per=40, d=20, k=3, n_subspaces=3, noise=0.02)


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(2, 4))
@settings(max_examples=8, deadline=None)
def test_the_truth_of_a_planted_world_scores_one_and_leaves_nothing(seed, k):
    world = planted_subspaces(seed, n_per=30, d=20, k=3, n_subspaces=k)
    bases = found_subspaces(world.points, world.labels, 3)
    told = clustering_report(world.points, world.labels, truth=world.labels, bases=bases)
    assert told["scores"] == {"accuracy": 1.0, "nmi": pytest.approx(1.0), "ari": 1.0}
    assert told["residual_share"] < 1e-12
    assert [c["rank"] for c in told["clusters"]] == [3] * k
    for found, true in zip(bases, world.bases, strict=True):
        assert principal_angles(found, true).max() < 1e-6


def test_scores_are_those_of_the_libraries(world):
    labels = np.random.default_rng(0).integers(3, size=120)
    told = clustering_report(world.points, labels, truth=world.labels.astype(str))
    assert told["scores"]["accuracy"] == clustering_accuracy(world.labels, labels)
    assert told["scores"]["nmi"] == pytest.approx(normalized_mutual_info_score(world.labels, labels))
    assert told["scores"]["ari"] == pytest.approx(adjusted_rand_score(world.labels, labels))


def test_internal_scores_are_their_literal_formulas(world):
    told = clustering_report(world.points, world.labels)
    left = 0.0
    for c in range(3):
        rows = world.points[world.labels == c]
        basis = found_subspaces(rows, np.zeros(len(rows), dtype=int))[0]
        fit = LinearRegression(fit_intercept=False).fit(basis, rows.T)
        left += np.square(rows.T - fit.predict(basis)).sum()
    assert told["residual_share"] == pytest.approx(left / np.square(world.points).sum(), rel=1e-9)
    unit = world.points / np.linalg.norm(world.points, axis=1, keepdims=True)
    cosines = np.abs(unit @ unit.T)
    sines = np.sin(np.arccos(np.minimum(cosines, 1)))
    np.fill_diagonal(sines, 0)
    assert told["silhouette"] == pytest.approx(silhouette_score(sines, world.labels, metric="precomputed"), abs=1e-6)
    bases = found_subspaces(world.points, world.labels)
    degrees = [np.rad2deg(principal_angles(bases[i], bases[j])[0]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert [pair["degrees"] for pair in told["nearest_subspaces"]] == pytest.approx(sorted(degrees))
    assert "scores" not in told


def test_the_silhouette_of_many_rows_is_that_of_a_sample():
    world = planted_subspaces(1, n_per=1_500, d=12, k=2, n_subspaces=2)
    one, two, other = (clustering_report(world.points, world.labels, random_state=s)["silhouette"] for s in (0, 0, 1))
    assert one == two != other
    assert one == pytest.approx(other, abs=0.02)


def test_links_to_other_classes_are_counted():
    C = sp.csr_array(np.array([[0, 1, 0, 0], [3, 0, 1, 0], [0, 0, 0, -2], [0, 0, 0, 0.0]]))
    told = clustering_report(np.eye(4), [0, 0, 1, 1], truth=["a", "a", "b", "b"], representation=C)["scores"]
    assert told["preserving_rate"] == 0.75
    assert told["off_class_share"] == pytest.approx(0.25 / 4)


def test_memberships_are_those_of_fuzzy_c_means_with_residuals(world):
    bases = found_subspaces(world.points, world.labels, 3)
    U = memberships(world.points, bases)
    np.testing.assert_allclose(U.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(U.argmax(axis=1), world.labels)
    x = world.points[0]
    left = np.array([1 - np.square(x @ B).sum() / (x @ x) for B in bases])
    literal = [1 / sum(left[c] / left[j] for j in range(3)) for c in range(3)]
    np.testing.assert_allclose(U[0], literal, rtol=1e-6)
    np.testing.assert_allclose(memberships(np.zeros((1, 20)), bases), 1 / 3)


def test_stability_is_the_mean_over_pairs_and_self_expression_is_done_once(world, monkeypatch):
    kmeans = KMeans(6, n_init=1)
    found = seed_stability(kmeans, world.points, n_seeds=3)
    labels = [KMeans(6, n_init=1, random_state=s).fit_predict(world.points) for s in range(3)]
    np.testing.assert_array_equal(found.labels, labels)
    pairs = [adjusted_rand_score(labels[i], labels[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert (found.mean_ari, found.min_ari) == (pytest.approx(np.mean(pairs)), pytest.approx(min(pairs)))
    assert not hasattr(kmeans, "labels_")
    for made in (ThresholdingSubspaceClustering(5, n_init=1), LeastSquaresSubspaceClustering(5, power=2, n_init=1)):
        expected = [made.set_params(random_state=s).fit_predict(world.points) for s in range(3)]
        fitted = made.set_params(random_state=0).fit(world.points)
        monkeypatch.setattr(type(made), "_express", None)
        np.testing.assert_array_equal(seed_stability(fitted, world.points, n_seeds=3).labels, expected)


def test_an_estimator_of_other_rows_or_parameters_is_fitted_anew_for_its_stability(world):
    order = np.random.default_rng(0).permutation(120)
    other = planted_subspaces(5, n_per=40, d=20, k=3, n_subspaces=3, noise=0.02).points[order]
    made = LeastSquaresSubspaceClustering(3, power=2, n_init=1)
    fitted = clone(made).fit(world.points)
    for rows in (other, other[::2]):
        expected = seed_stability(made, rows, n_seeds=2).labels
        np.testing.assert_array_equal(seed_stability(fitted, rows, n_seeds=2).labels, expected)
        with pytest.raises(ValueError, match="X must be the 120 rows that were fitted"):
            fitted.labels_of_seed(rows, 0)
    assert fitted.set_params(n_init=3, random_state=4).is_fit_of(world.points.tolist())
    assert not fitted.set_params(alpha=0.5).is_fit_of(world.points)


def test_seeds_are_compared_where_a_run_keeps_checkpoints(world, tmp_path):
    given = {"max_epochs": 1, "tcr_epochs": 1, "checkpoint": tmp_path / "run.safetensors", "device": "cpu"}
    given |= {"n_components": 8, "hidden": 16}
    made = ManifoldLinearizingClustering(3, random_state=0, **given).fit(world.points)
    kept = given["checkpoint"].read_bytes()
    labels = seed_stability(made, world.points, n_seeds=2).labels
    np.testing.assert_array_equal(labels[0], made.labels_)
    assert given["checkpoint"].read_bytes() == kept


def test_the_loss_of_a_mixture_that_was_trained_is_drawn_and_goes_with_the_next_fit(world, tmp_path):
    fitted = LowRankGaussianMixture(3, 2, algorithm="denoising", center=False, n_init=1, max_iter=4, random_state=0)
    fitted.fit(world.points)
    widths = []
    for name in ("trained.svg", "likely.svg"):
        bases = list(fitted.bases_)
        path = plot_subspaces(world.points, fitted.labels_, bases, tmp_path / name, fitted=fitted)
        widths.append(float(ElementTree.parse(path).getroot().attrib["width"].removesuffix("pt")))
        fitted.set_params(algorithm="em", max_iter=200).fit(world.points)
    # Both have variances of the components, ranks along the noise and agreement of halves too.
    assert widths[0] / widths[1] == pytest.approx(7 / 6)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_pictures_have_the_same_bytes_each_time(world, tmp_path, suffix):
    fitted = ElasticNetSubspaceClustering(3, random_state=0).fit(world.points)
    one, two = (
        plot_subspaces(world.points, fitted.labels_, fitted.bases_, tmp_path / f"{n}{suffix}", fitted=fitted)
        for n in "ab"
    )
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_bytes()) > 5_000


def test_a_loss_is_drawn_where_there_is_one_and_an_affinity_is_not_needed(world, tmp_path):
    bases = found_subspaces(world.points, world.labels)
    plain = plot_subspaces(world.points, world.labels, bases, tmp_path / "a.svg").read_text()
    assert "Loss; stopped" not in plain
    history = [{"loss": 2.0}, {"loss": 1.0, "epoch": 2}, {"epoch": 3}]
    told = plot_subspaces(world.points, world.labels, bases, tmp_path / "b.svg", history=history).read_text()
    assert "Loss; stopped after step 2" in told
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf"):
        plot_subspaces(world.points, world.labels, bases, tmp_path / "c.gif")
    with pytest.raises(ValueError, match="labels must have one entry a row"):
        plot_subspaces(world.points, world.labels[:5], bases, tmp_path / "c.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "b.svg"]


def test_degenerate_clusterings_have_no_silhouette_and_no_angles():
    X = np.random.default_rng(0).normal(size=(6, 4))
    alone = clustering_report(X, np.zeros(6, dtype=int))
    assert alone["silhouette"] is None
    assert alone["nearest_subspaces"] == []
    each = clustering_report(X, np.arange(6))
    assert each["silhouette"] is None
    assert each["residual_share"] == pytest.approx(0, abs=1e-12)
    assert clustering_report(np.zeros((4, 2)), [0, 0, 1, 1])["residual_share"] == 0.0
    sparse_names = clustering_report(X, np.array([0, 0, 0, 2, 2, 2]), bases=[np.eye(4)[:, :1]] * 3)
    assert [c["label"] for c in sparse_names["clusters"]] == [0, 2]
    assert np.isnan(basis_angles([np.zeros((4, 0)), np.eye(4)[:, :2]])[0]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X: clustering_report(X, np.zeros(4)), r"labels must .* 6 rows, got shape \(4,\); X may be transposed"),
        (lambda X: clustering_report(X, np.zeros(6), truth=[1, 2]), r"truth must have one entry .* got shape \(2,\)"),
        (lambda X: found_subspaces(X, np.zeros(6), -1), "subspace_dim must be at least 1, got -1"),
        (lambda X: clustering_report(X, [0, 0, 0, 2, 2, 2], bases=[X.T[:, :1]]), "bases must .* label, 3, got 1"),
        (lambda X: clustering_report(X[0], [0]), r"X must be of shape \(n, d\), got \(4,\)"),
        (lambda X: seed_stability(KMeans(2), X, n_seeds=1), "n_seeds must be at least 2, got 1"),
        (lambda X: seed_stability(LinearRegression(), X), "estimator must have random_state, got LinearRegression"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(6, 4)))


def test_the_affinity_that_was_clustered_is_drawn_and_stages_of_a_loss_are_told_apart(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(points_plots, "write_picture", lambda figure, path, **_: figures.append(figure))
    labels = np.array([1, 0, 1, 0])
    affinity = sp.csr_array(np.array([[0, 0, 4.0, 0], [0, 0, 0, 2.0], [4.0, 0, 0, 1.0], [0, 2.0, 1.0, 0]]))
    stages = [("first", 1.0), ("first", 0.5), ("second", 900.0), ("second", 800.0)]
    history = [{"stage": stage, "loss": loss} for stage, loss in stages]
    fitted = SimpleNamespace(affinity_matrix_=affinity, history_=history)
    bases = found_subspaces(np.eye(4), labels)
    plot_subspaces(np.eye(4), labels, bases, tmp_path / "a.png", fitted=fitted)
    drawn = np.asarray(figures[0].axes[1].images[0].get_array())
    order = [1, 3, 0, 2]
    np.testing.assert_allclose(drawn, np.minimum(affinity.toarray()[order][:, order] / 4, 1), atol=0.01)
    loss = next(axis for axis in figures[0].axes if axis.get_title().startswith("Loss"))
    assert loss.get_yscale() == "log"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["first", "second"]
    assert [len(line.get_xdata()) for line in loss.get_lines()[:2]] == [2, 2]
    plot_subspaces(np.eye(4), labels, bases, tmp_path / "a.png", history=[3.0, 2.0, -1.0])
    loss = next(axis for axis in figures[1].axes if axis.get_title().startswith("Loss"))
    assert (loss.get_yscale(), loss.get_legend()) == ("linear", None)
