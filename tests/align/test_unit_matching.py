import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression
from sklearn.metrics import adjusted_rand_score, mutual_info_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from polyspan.align import (
    ActivationCollector,
    SparseUnitMapping,
    UnitCoClustering,
    compare_networks,
    match_units,
    unit_correlations,
    unit_mutual_information,
)
from polyspan.errors import CorruptFile
from polyspan.io import write_array
from polyspan.linalg import PairedMoments, linear_cka, pwcca, random_orthogonal, svcca

seeds = st.integers(0, 2**32 - 1)


@parametrize_with_checks([SparseUnitMapping(), UnitCoClustering(random_state=0)])
def test_sklearn_contract(estimator, check):
    check(estimator)


def units(seed, n=600, d=12, factors=None, noise=0.3):
    """Rectified units that share a few factors: correlated, skewed, of different means."""
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(n, factors or d))
    return np.maximum(Z @ rng.normal(size=(factors or d, d)) + noise * rng.normal(size=(n, d)), 0)


def moments(X, Y):
    return PairedMoments(X.shape[1], Y.shape[1]).update(X, Y)


def network(seed, *, inplace=False):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(8 * 16, 10)]
    made = nn.Sequential(*layers)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return made.eval()


IMAGES = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)


# laws


@settings(max_examples=15, deadline=None)
@given(seed=seeds, d=st.integers(2, 20), method=st.sampled_from(["bipartite", "semi", "greedy"]))
def test_permuted_rescaled_and_shifted_units_are_found_again(seed, d, method):
    X = units(seed, d=d)
    rng = np.random.default_rng(seed)
    order = rng.permutation(d)
    Y = rng.uniform(0.1, 50, d) * X[:, order] + 1e3 * rng.normal(size=d)
    found = match_units(unit_correlations(moments(X, Y)).between, method=method)
    np.testing.assert_array_equal(order[found.indices], np.arange(d))
    np.testing.assert_allclose(found.scores, 1, atol=1e-7)


def test_a_copy_with_other_order_needs_one_unit_each_and_makes_groups_of_one_and_one():
    X = np.random.default_rng(1).normal(size=(3000, 8))
    Y = -3 * X[:, ::-1]
    found = SparseUnitMapping(alpha=0.1, alphas=(0.1, 0.01)).fit(X, Y)
    np.testing.assert_array_equal(found.n_nonzero_, 1)
    np.testing.assert_allclose(found.loss_half_mse_, found.alphas_[:, None] ** 2 / 2 * np.ones(8), rtol=1e-6)
    grouped = UnitCoClustering(random_state=0).fit(X, Y)
    np.testing.assert_array_equal(grouped.table_, np.ones((8, 2)))
    np.testing.assert_array_equal(grouped.labels_in_, grouped.labels_out_[::-1])
    matched = match_units(unit_correlations(moments(X, Y)).between, absolute=True)
    np.testing.assert_array_equal(matched.indices, np.arange(8)[::-1])
    np.testing.assert_allclose(matched.scores, -1)


def test_planted_groups_of_units_are_found_with_their_sizes_in_each_network():
    rng = np.random.default_rng(2)
    factors = rng.normal(size=(2000, 3))
    groups_in, groups_out = np.repeat([0, 1, 2], [6, 4, 2]), np.repeat([0, 1, 2], [1, 3, 0])
    X = factors[:, groups_in] + 0.4 * rng.normal(size=(2000, 12))
    Y = factors[:, groups_out] + 0.4 * rng.normal(size=(2000, 4))
    for affinity in ("abs", "squared", "relu"):
        found = UnitCoClustering(affinity=affinity, random_state=0).fit(X, Y)
        assert sorted(map(tuple, found.table_.tolist())) == [(2, 0), (4, 3), (6, 1)]
        both = np.append(found.labels_in_, found.labels_out_)
        assert adjusted_rand_score(np.append(groups_in, groups_out), both) == 1
        assert found.stability_ == 1
        assert found.eigenvalues_[0] == pytest.approx(1)
    assert len(UnitCoClustering(5, random_state=0).fit(X, Y).table_) == 5


def test_a_rotation_takes_the_partners_away_and_leaves_what_all_units_explain():
    X = units(3, n=4000, d=16, noise=1.0)
    Y = X[:, ::-1] + 0.2 * np.random.default_rng(3).normal(size=X.shape)
    Q = random_orthogonal(16, rng=np.random.default_rng(4))
    plain, turned = (compare_networks(X, Z, n_bootstraps=0, random_state=0)[0] for Z in (Y, Y @ Q))
    assert plain.mean_bipartite > turned.mean_bipartite + 0.3
    assert plain.nulls["rotation"] == pytest.approx(turned.mean_bipartite, abs=0.1)
    assert plain.cka == pytest.approx(turned.cka, abs=1e-12)
    total = [np.sum(SparseUnitMapping(0, standardize=False).fit(X, Z).loss_half_mse_[-1]) for Z in (Y, Y @ Q)]
    assert total[0] == pytest.approx(total[1], rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, shape=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_no_one_to_one_matching_beats_bipartite_and_nothing_beats_favourites(seed, shape):
    between = np.random.default_rng(seed).uniform(-1, 1, shape)
    sums = {m: np.nansum(match_units(between, method=m).scores) for m in ("bipartite", "greedy")}
    assert sums["bipartite"] >= sums["greedy"] - 1e-12
    np.testing.assert_array_equal(match_units(between, method="semi").scores, between.max(axis=1))


@settings(max_examples=10, deadline=None)
@given(seed=seeds, alpha=st.floats(1e-4, 0.5))
def test_a_fit_fulfils_the_conditions_of_the_lasso(seed, alpha):
    X, Y = units(seed, n=200, factors=4), units(seed + 1, n=200)
    found = SparseUnitMapping(alpha, alphas=(alpha,), standardize=False, tol=1e-12).fit(X, Y)
    slope = (X - X.mean(0)).T @ (Y - found.predict(X)) / len(X)
    size = alpha + 1e-5 * Y.std()
    assert (np.abs(slope) <= size).all()
    at = found.coef_.T != 0
    np.testing.assert_allclose(slope[at], alpha * np.sign(found.coef_.T[at]), atol=1e-5 * Y.std())


def test_rows_may_come_in_batches_and_in_any_order():
    X, Y = units(5, n=500) + 1e4, units(6, n=500, d=7)
    streamed = PairedMoments(12, 7)
    for rows in np.array_split(np.random.default_rng(0).permutation(500), 7):
        streamed.update(X[rows], Y[rows])
    expected = np.corrcoef(X, Y, rowvar=False)
    found = unit_correlations(streamed)
    np.testing.assert_allclose(found.between, expected[:12, 12:], atol=1e-9)
    np.testing.assert_allclose(found.within_in, expected[:12, :12], atol=1e-9)
    np.testing.assert_allclose(found.within_out, expected[12:, 12:], atol=1e-9)
    one, two = SparseUnitMapping(alpha=0.01).fit(X, Y), SparseUnitMapping(alpha=0.01).fit_moments(streamed)
    np.testing.assert_allclose(one.coef_, two.coef_, atol=1e-4)


# oracles


def test_bipartite_matching_is_scipys():
    between = np.random.default_rng(7).uniform(-1, 1, (9, 9))
    np.testing.assert_array_equal(match_units(between).indices, linear_sum_assignment(between, maximize=True)[1])
    both = linear_sum_assignment(np.abs(between), maximize=True)[1]
    np.testing.assert_array_equal(match_units(between, absolute=True).indices, both)


@pytest.mark.parametrize("standardize", [True, False])
def test_the_path_is_scikit_learns_lasso(standardize):
    X, Y = units(8, n=300, d=40, factors=8), units(9, n=300, d=10)
    found = SparseUnitMapping(standardize=standardize, tol=1e-12).fit(X, Y)
    A, B = ((Z - Z.mean(0)) / (Z.std(0) if standardize else 1) for Z in (X, Y))
    for alpha, weights in zip(found.alphas_, found.coef_path_, strict=True):
        if alpha == 0:
            expected = LinearRegression().fit(A, B).coef_
        elif alpha >= 1e-3:
            expected = Lasso(alpha, tol=1e-12, max_iter=200_000).fit(A, B).coef_
        else:
            continue
        np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert (np.diff(found.loss_half_mse_, axis=0) <= 1e-12).all()


def test_weights_in_units_of_the_data_predict_as_standardised_ones_do():
    X, Y = 5 + 30 * units(10), 0.01 * units(11, d=4)
    found = SparseUnitMapping(alpha=0.01).fit(X, Y)
    at = int(np.flatnonzero(found.alphas_ == 0.01)[0])
    literal = ((X - X.mean(0)) / X.std(0)) @ found.coef_path_[at].T * Y.std(0) + Y.mean(0)
    np.testing.assert_allclose(found.predict(X), literal, atol=1e-10)
    share = np.mean((Y - found.predict(X)) ** 2, axis=0) / Y.var(0)
    np.testing.assert_allclose(found.loss_half_mse_[at], share / 2, atol=1e-10)
    np.testing.assert_allclose(found.unexplained(moments(X, Y)), share, atol=1e-10)
    New, Targets = 5 + 30 * units(12), 0.01 * units(13, d=4)
    other = np.mean((Targets - found.predict(New)) ** 2, axis=0)
    np.testing.assert_allclose(found.unexplained(moments(New, Targets)), other / Targets.var(0), rtol=1e-8)
    relative = found.unexplained(moments(New, Targets), relative_to=moments(X, Y))
    np.testing.assert_allclose(relative, other / Y.var(0), rtol=1e-8)


def test_at_most_so_many_units_are_used_and_refitted_by_least_squares():
    X, Y = units(14, d=20, factors=6), units(15, d=5)
    X[:, 0] = Y[:, 0] + Y[:, 1]
    found = SparseUnitMapping(max_units=3, alphas=tuple(np.geomspace(1, 1e-3, 40)), refit=True).fit(X, Y)
    assert (found.n_units_ <= 3).all()
    assert found.n_units_[0] >= 1
    for j, weights in enumerate(found.coef_):
        used = np.flatnonzero(weights)
        expected = LinearRegression().fit(X[:, used], Y[:, j])
        np.testing.assert_allclose(weights[used], expected.coef_, rtol=1e-6)
    greedy = SparseUnitMapping(max_units=2, alphas=(1e-5,)).fit(X, Y)
    np.testing.assert_array_equal(greedy.n_units_, 2)


def test_mutual_information_sees_what_correlation_does_not_and_is_that_of_histograms():
    rng = np.random.default_rng(16)
    X = rng.normal(size=(4000, 3))
    Y = np.stack([np.abs(X[:, 1]), rng.normal(size=4000), np.maximum(X[:, 0], 0)], axis=1)
    found = unit_mutual_information(X, Y, n_bins=8)
    assert abs(np.corrcoef(X[:, 1], Y[:, 0])[0, 1]) < 0.1
    assert found[1, 0] > 0.5
    assert found[0, 2] > 0.5
    assert abs(found[:, 1]).max() < 0.01
    np.testing.assert_array_equal(match_units(found, method="semi").indices[:2], [2, 0])
    bins = [np.searchsorted(np.unique(np.quantile(x, np.arange(1, 8) / 8)), x) for x in (X[:, 0], Y[:, 2])]
    literal = mutual_info_score(*bins) - np.prod([len(np.unique(b)) - 1 for b in bins]) / 8000
    assert found[0, 2] == pytest.approx(literal, abs=1e-12)


def test_summaries_of_a_comparison_are_those_of_all_rows():
    X, Y = units(17, n=900), units(18, n=900, d=9) + units(17, n=900)[:, :9]
    found = compare_networks(X, Y, batch_rows=100, random_state=0)[0]
    assert found.cka == pytest.approx(float(linear_cka(X, Y)))
    assert found.svcca == pytest.approx(float(svcca(X, Y)), abs=1e-6)
    assert found.pwcca == pytest.approx(float(pwcca(X, Y, rank=0.99)), abs=1e-6)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    ridge = LinearRegression().fit(X[even], Y[even])
    literal = np.mean(np.mean((Y[odd] - ridge.predict(X[odd])) ** 2, axis=0) / Y.var(0))
    assert found.unexplained_all == pytest.approx(literal, rel=0.02)
    best = np.abs(np.corrcoef(X[even], Y[even], rowvar=False)[:12, 12:]).argmax(axis=0)
    on = np.corrcoef(X[odd], Y[odd], rowvar=False)[:12, 12:]
    assert found.unexplained_single == pytest.approx(1 - np.mean(on[best, np.arange(9)] ** 2), rel=1e-9)
    assert found.n_rows == found.n_items == 900
    assert found.p_value == pytest.approx(1 / 21)


# nulls


def test_shuffled_rows_match_no_better_than_the_null_and_a_warning_says_so():
    X, Y = units(19, n=1500, noise=0.1), units(19, n=1500, noise=0.1)[:, ::-1]
    same = compare_networks(X, Y, random_state=0)[0]
    other = compare_networks(X, np.random.default_rng(0).permutation(Y), random_state=0)[0]
    assert same.warnings == []
    assert same.n_above_null == 12
    assert same.mean_bipartite > same.nulls["shuffle"] + 0.8
    assert abs(other.mean_bipartite - other.nulls["shuffle"]) < 0.05
    assert other.n_above_null <= 2
    assert any("no better than shuffled rows" in text for text in other.warnings) == (other.p_value > 0.05)


@pytest.mark.parametrize(("n_shuffles", "told"), [(1, True), (5, True), (18, True), (19, False)])
@pytest.mark.parametrize("paired", [True, False])
def test_shuffles_that_are_too_few_for_any_small_p_give_no_false_alarm(n_shuffles, told, paired):
    X, Y = units(19, n=400, noise=0.1), units(19, n=400, noise=0.1)[:, ::-1]
    Y = Y if paired else np.random.default_rng(0).permutation(Y)
    found = compare_networks(X, Y, n_shuffles=n_shuffles, n_bootstraps=0, nulls=("shuffle",), random_state=0)[0]
    few = [text for text in found.warnings if "cannot tell whether rows belong together" in text]
    assert len(few) == told
    alarm = any("no better than shuffled rows" in text for text in found.warnings)
    assert alarm == (not told and found.p_value > 0.05)
    assert found.p_value == pytest.approx(1 / (n_shuffles + 1)) or not paired
    without = compare_networks(X, Y, n_shuffles=n_shuffles, n_bootstraps=0, nulls=("rotation",), random_state=0)[0]
    assert without.warnings == [], "no shuffles were asked for"


def test_sorted_rows_do_not_spoil_the_shuffle_of_arrays_read_in_batches():
    labels = np.repeat(np.arange(4), 1100)
    X = np.eye(4)[labels] + 0.1 * np.random.default_rng(0).normal(size=(4400, 4))
    found = compare_networks(X, X, batch_rows=1100, random_state=0)[0]
    assert found.nulls["shuffle"] < 0.6 < found.mean_bipartite


def test_the_seed_decides_and_global_chance_is_left_alone():
    X, Y = units(20, n=200), units(21, n=200)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    told = [compare_networks(X, Y, n_bootstraps=4, random_state=seed).to_json() for seed in (0, 0, 1)]
    assert told[0] == told[1]
    assert told[0]["layers"][0]["nulls"] != told[2]["layers"][0]["nulls"]
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


# inputs


def test_files_tensors_and_arrays_give_one_report(tmp_path):
    X, Y = units(22, n=300).astype(np.float32), units(23, n=300).astype(np.float32)
    for name, rows in (("a", X), ("b", Y)):
        write_array(tmp_path / f"{name}.npy", rows)
    told = [
        compare_networks(a, b, n_bootstraps=3, random_state=0)[0].to_json()
        for a, b in ((X, Y), (tmp_path / "a.npy", tmp_path / "b.npy"), (torch.as_tensor(X), torch.as_tensor(Y)))
    ]
    assert told[0] == told[1] == told[2]
    named = compare_networks(
        {"fc": X, "out": Y}, {"fc": Y, "out": X}, layers=[("fc", "out"), "fc"], n_bootstraps=0, random_state=0
    )
    assert [layer.layer_out for layer in named.layers] == ["out", "fc"]
    assert named["fc"].mean_bipartite == pytest.approx(1)
    assert named[1].mean_bipartite == pytest.approx(told[0]["mean_bipartite"])


def test_a_model_is_compared_by_channels_over_all_positions():
    a, b = network(0), network(1)
    found = compare_networks(a, b, IMAGES, layers=["1", ("3", "2")], n_bootstraps=0, random_state=0)
    with torch.no_grad():
        x = torch.as_tensor(IMAGES)
        rows = [m[:2](x).movedim(1, -1).reshape(-1, 6).double().numpy() for m in (a, b)]
    expected = np.corrcoef(*rows, rowvar=False)[:6, 6:]
    np.testing.assert_allclose(found[0].correlations.between, expected, atol=1e-6)
    assert (found["1"].n_items, found["1"].n_rows) == (64, 64 * 64)
    assert set(found[0].nulls) == {"shuffle", "rotation", "scramble"}
    np.testing.assert_array_equal(a[0].weight.detach(), network(0)[0].weight.detach())
    few = compare_networks(a, b, IMAGES, layers=["1"], max_positions=5, nulls=(), random_state=0)[0]
    assert few.n_rows == 64 * 5
    assert few.p_value is None


def test_a_permuted_network_is_put_in_order_and_a_scrambled_or_untrained_one_is_not():
    a = network(0)
    b = network(0)
    order = torch.as_tensor([3, 0, 5, 1, 2, 4])
    b[0].weight.data, b[0].bias.data = a[0].weight.data[order], 2 * a[0].bias.data[order]
    b[0].weight.data *= 2
    batches = [(torch.as_tensor(part), None) for part in np.split(IMAGES, 2)]
    found = compare_networks(a, b, batches, layers=["1"], untrained=(network(2), network(3)), random_state=0)[0]
    np.testing.assert_array_equal(order[found.bipartite.indices], np.arange(6))
    assert found.mean_bipartite > 0.9999
    assert max(found.nulls["scramble"], found.nulls["untrained"]) < 0.95


def test_what_works_in_place_after_a_layer_does_not_change_what_is_collected():
    with ActivationCollector(network(0, inplace=True), ["0"]) as collect:
        found = collect(torch.as_tensor(IMAGES))["0"]
    with torch.no_grad():
        expected = network(0)[0](torch.as_tensor(IMAGES)).movedim(1, -1).reshape(64, 64, 6)
    np.testing.assert_array_equal(found, expected)
    assert found.min() < 0


def test_hooks_are_taken_off_even_after_an_error():
    model = network(0)
    with pytest.raises(RuntimeError), ActivationCollector(model, ["0"]) as collect:
        collect(torch.zeros(2, 3, 8, 8))
    assert not model[0]._forward_hooks


class Tokens(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.unused = nn.Linear(1, 1)
        for parameter in self.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(seed))

    def forward(self, x, attention_mask=None):
        return self.inner(x) + self.inner(-x)


def test_padding_is_left_out_and_a_module_called_twice_has_both_calls():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, 4, generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 6, (20, 1), generator=generator)).long()
    with ActivationCollector(Tokens(0).eval(), ["inner"]) as collect:
        assert collect(x)["inner"].shape == (20, 12, 5)
    batches = [{"x": x, "attention_mask": mask}]
    options = {"layers": [""], "nulls": (), "mask": "attention_mask", "random_state": 0}
    models = [nn.Sequential(nn.Linear(4, 5)).eval() for _ in range(2)]

    class Masked(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, attention_mask):
            return self.inner(x)

    options["layers"] = ["inner"]
    found = compare_networks(*(Masked(m).eval() for m in models), batches, **options)[0]
    assert found.n_rows == int(mask.sum())
    with torch.no_grad():
        rows = [m(x)[mask != 0].double().numpy() for m in models]
    expected = np.corrcoef(*rows, rowvar=False)[:5, 5:]
    np.testing.assert_allclose(found.correlations.between, expected, atol=1e-6)


def test_channels_first_is_told_from_sequences():
    x = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv1d(4, 5, 1), nn.Identity()).eval()
    for channels, shape in (("auto", (3, 5, 7)), ("first", (3, 7, 5)), ("last", (3, 5, 7))):
        with ActivationCollector(model, ["0", "1"], channels=channels) as collect:
            found = collect(x)
        assert found["1"].shape == shape
        assert found["0"].shape == ((3, 5, 7) if channels == "last" else (3, 7, 5))
    with ActivationCollector(model, ["module.0"], reduce="mean") as collect:
        np.testing.assert_allclose(collect(x)["module.0"][:, 0], model(x).mean(-1).detach(), atol=1e-6)


# degenerate and bad


def test_dead_units_are_left_out_and_counted():
    X, Y = units(24, n=400), units(24, n=400)[:, ::-1].copy()
    X[:, 3], Y[:, [0, 5]] = 0.1, 7.0
    found = compare_networks(X, Y, random_state=0)[0]
    assert (found.n_dead_in, found.n_dead_out) == (1, 2)
    assert found.bipartite.indices[3] == -1
    assert np.isnan(found.bipartite.scores[3])
    assert not {0, 5} & set(found.bipartite.indices)
    assert len(found.bipartite.unmatched_in) == 1
    assert found.correlations.live_in.sum() == 11
    assert any("1 units of the first network and 2 of the second" in text for text in found.warnings)
    assert sum(p + q for p, q in found.clusters) == 21
    mapping = SparseUnitMapping().fit(X, Y)
    assert not mapping.coef_path_[:, :, 3].any()
    np.testing.assert_allclose(mapping.predict(X)[:, 5], 7.0)
    assert np.isnan(mapping.unexplained(moments(X, Y))[[0, 5]]).all()
    grouped = UnitCoClustering(3, random_state=0).fit(X, Y)
    assert grouped.labels_in_[3] == -1
    assert (grouped.labels_out_[[0, 5]] == -1).all()


def test_more_units_than_partners_leaves_the_worst_without():
    between = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.1]])
    found = match_units(between)
    np.testing.assert_array_equal(found.indices, [0, 1, -1])
    np.testing.assert_array_equal(found.unmatched_in, [2])
    wide = match_units(between.T, method="semi")
    np.testing.assert_array_equal(wide.indices, [0, 1])
    np.testing.assert_array_equal(wide.unmatched_out, [2])
    dead = match_units(np.full((2, 3), np.nan))
    np.testing.assert_array_equal(dead.indices, [-1, -1])


def test_large_and_small_scales_and_float32_change_nothing():
    X, Y = units(25), units(26) + units(25)
    expected = unit_correlations(moments(X, Y)).between
    for scale in (1e100, 1e-100):
        np.testing.assert_allclose(unit_correlations(moments(scale * X, Y / scale)).between, expected, atol=1e-9)
    found = SparseUnitMapping(alpha=0.01).fit(X.astype(np.float32), Y)
    assert found.predict(X.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(found.predict(X.astype(np.float32)), found.predict(X), rtol=1e-4, atol=1e-4)


def test_equal_units_fewer_rows_than_units_and_one_unit_are_no_trouble():
    X = units(27, n=10, d=30)
    found = SparseUnitMapping(alpha=0.1).fit(np.hstack([X, X]), X[:, :3])
    assert (found.loss_half_mse_[0] < 0.06).all()
    assert np.isfinite(found.predict(np.hstack([X, X]))).all()
    told = compare_networks(X, X, n_bootstraps=3, random_state=0)[0]
    assert any("10 rows are few" in text for text in told.warnings)
    single = compare_networks(X[:, :1], X[:, :1], random_state=0)[0]
    assert np.sum(single.clusters, axis=0).tolist() == [1, 1]
    assert single.mean_bipartite == pytest.approx(1)


def test_a_fit_that_stops_early_says_so():
    X, Y = units(28, d=30, factors=3, noise=0.01), units(29, d=3)
    with pytest.warns(ConvergenceWarning, match="did not reach tol"):
        SparseUnitMapping(alpha=1e-4, tol=1e-14, max_iter=1).fit(X, Y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: match_units(np.eye(2), method="best"), "method must be one of"),
        (lambda: match_units(np.ones(3)), r"shape \(d_A, d_B\)"),
        (lambda: match_units(np.array([[1.0, np.nan], [0.5, 0.2]])), "finite but for whole rows"),
        (lambda: match_units(np.array([[1.0, np.inf], [0.5, 0.2]])), "finite but for whole rows"),
        (lambda: unit_correlations(PairedMoments(2, 2)), "at least 2 rows"),
        (lambda: unit_correlations(moments(np.array([[np.nan], [1.0]]), np.ones((2, 1)))), "finite"),
        (lambda: unit_mutual_information(np.ones((3, 1)), np.ones((4, 1))), "with one n"),
        (lambda: unit_mutual_information(np.ones((3, 1)), np.ones((3, 1)), n_bins=1), "n_bins must be at least 2"),
        (lambda: SparseUnitMapping(0.3).fit(np.eye(3), np.eye(3)), "alpha must be one of alphas"),
        (lambda: SparseUnitMapping(alphas=(-1.0, 1e-3)).fit(np.eye(3), np.eye(3)), "at least 0"),
        (lambda: SparseUnitMapping(max_units=0).fit(np.eye(3), np.eye(3)), "max_units must be at least 1"),
        (lambda: SparseUnitMapping().fit(np.eye(3), np.eye(2)), "inconsistent numbers of samples"),
        (lambda: UnitCoClustering(9).fit(np.eye(3), np.eye(3)), "number of live units 6"),
        (lambda: UnitCoClustering("many").fit(np.eye(3), np.eye(3)), "'eigengap', got 'many'"),
        (lambda: UnitCoClustering(affinity="cosine").fit(np.eye(3), np.eye(3)), "affinity must be one of"),
        (lambda: UnitCoClustering().fit(np.ones((3, 2)), np.ones((3, 2))), "a unit that varies, got none"),
        (lambda: compare_networks(units(0), units(0, n=599)), "one row an input, got 600 and 599"),
        (lambda: compare_networks(units(0)[:1], units(0)[:1]), "at least 8 rows, got 1 sample"),
        (lambda: compare_networks(units(0), np.ones((600, 2))), "b must have a unit that varies"),
        (lambda: compare_networks(units(0), np.ones(600)), r"b must hold numbers of shape \(n, d\)"),
        (lambda: compare_networks(units(0), units(0), nulls=("coin",)), "nulls must be among"),
        (lambda: compare_networks({"x": units(0)}, {"y": units(0), "z": units(0)}), "a name in common"),
        (lambda: compare_networks({"x": units(0)}, {"x": units(0)}, layers=["y"]), r"names in a, \['x'\], got 'y'"),
        (lambda: compare_networks(network(0), units(0)), "both be models or both arrays"),
        (lambda: compare_networks(network(0), network(1)), "inputs and layers must be given"),
        (lambda: compare_networks(network(0), network(1), iter([IMAGES]), layers=["1"]), "starts again"),
        (lambda: compare_networks(network(0), network(1), [], layers=["1"]), "at least one batch"),
        (lambda: compare_networks(network(0), network(1), IMAGES, layers=["1"], mask="m"), "key of every batch"),
        (lambda: compare_networks(network(0), network(1), IMAGES, layers=[("1", "3")]), "reduce='mean' averages"),
        (lambda: ActivationCollector(network(0), ["conv1"]), "got 'conv1'; there are 1"),
        (lambda: ActivationCollector(network(0), ["0"], reduce="max"), "reduce must be one of"),
        (lambda: ActivationCollector(network(0), ["0"], channels="middle"), "channels must be one of"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_misspelt_layer_gives_the_nearest_and_a_silent_one_is_told():
    with pytest.raises(ValueError, match="got 'iner'; there are inner"):
        ActivationCollector(Tokens(0), ["iner"])
    with (
        pytest.raises(ValueError, match="got 'unused', which is not"),
        ActivationCollector(Tokens(0).eval(), ["unused"]) as collect,
    ):
        collect(torch.zeros(2, 3, 4))


def test_an_activation_that_is_not_finite_is_named_by_its_unit():
    X = units(30)
    X[17, 4] = np.nan
    with pytest.raises(ValueError, match=r"a must be finite, got NaN or infinity in unit 4 of 'units'"):
        compare_networks(X, units(31))
    broken = network(0)
    broken[0].bias.data[2] = float("inf")
    with pytest.raises(ValueError, match=r"b must be finite, got NaN or infinity in unit 2 of '1'"):
        compare_networks(network(0), broken, IMAGES, layers=["1"])


def test_a_model_in_training_mode_is_warned_about_and_left_so():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout()).train()
    with pytest.warns(UserWarning, match="training mode"), ActivationCollector(model, ["0"]):
        pass
    assert model.training


def test_convolution_and_dense_layers_may_be_compared_by_means_over_positions():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare_networks(
            network(0), network(1), IMAGES, layers=[("1", "5")], reduce="mean", nulls=("shuffle",), random_state=0
        )[0]
    assert (found.n_rows, found.n_items) == (64, 64)
    assert found.correlations.between.shape == (6, 10)


def test_a_broken_file_is_told_by_its_reader(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CorruptFile):
        compare_networks(tmp_path / "a.npy", units(0))
