"""Standard errors of a comparison, the stability of what it chooses, and the tree of its groups."""

import numpy as np
import pytest
from sklearn.linear_model import Lasso
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.align import UnitCoClustering, compare_networks, unit_correlations
from polyspan.align.unit_bipartition import best_cut, recursive_bipartition
from polyspan.align.unit_bootstrap import BlockMoments, merged_moments
from polyspan.align.unit_sharing import SparseUnitMapping, support_stability
from polyspan.linalg import PairedMoments


@parametrize_with_checks([UnitCoClustering(method="recursive")])
def test_sklearn_contract(estimator, check):
    check(estimator)


def moments(X, Y):
    return PairedMoments(X.shape[1], Y.shape[1]).update(X, Y)


# Moments by blocks


def test_blocks_drawn_so_many_times_have_the_moments_of_their_rows_repeated():
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, 3)) + 1e4, rng.normal(size=(n, 2))) for n in (5, 1, 9)]
    counts = [2, 0, 3]
    blocks = [moments(X, Y) for X, Y in parts] + [PairedMoments(3, 2)]
    made = merged_moments(blocks, [*counts, 4])
    repeated = [
        np.concatenate([part[i] for part, c in zip(parts, counts, strict=True) for _ in range(c)]) for i in (0, 1)
    ]
    expected = moments(*repeated)
    assert (made.n_rows, made.weight) == (expected.n_rows, expected.weight)
    for name in ("mean_in", "mean_out", "cov_in", "cross", "cov_out", "spread_in", "spread_out"):
        np.testing.assert_allclose(getattr(made, name), getattr(expected, name), rtol=1e-9, atol=1e-7)


def test_rows_of_one_input_stay_in_one_block_and_every_second_input_in_one_half():
    n_items, positions = 37, 4
    X = np.repeat(np.arange(n_items, dtype=np.float64), positions).reshape(n_items, positions, 1)
    blocks = BlockMoments(1, 1, 6, np.random.default_rng(0))
    for part in np.split(X, [1, 20]):
        blocks.add(part, part)
    even, odd = blocks.halves()
    assert (even.n_rows, odd.n_rows) == (19 * positions, 18 * positions)
    assert even.mean_in[0] == pytest.approx(np.arange(0, n_items, 2).mean())
    sizes = [block.n_rows for block in blocks.blocks]
    assert all(size % positions == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= positions, "as many inputs to each block"


# Standard errors


def test_the_error_of_a_match_is_that_of_so_many_images_and_not_of_so_many_positions():
    """Positions of an image repeat it, so that the error is Gauss's for n images, (1 - r²) / sqrt(n).

    Its estimate has 18 degrees of freedom by the blocks and 49 by the draws: a relative deviation of
    sqrt(1/36 + 1/98) = 0.19 a unit, and of 0.05 for the root mean square over 16 independent units.
    """
    rng, n, r, d = np.random.default_rng(1), 400, 0.6, 16
    A, noise = rng.normal(size=(2, n, d))
    B = r * A + np.sqrt(1 - r**2) * noise
    networks = [_Repeats(rows, 9) for rows in (A, B)]
    found = compare_networks(*networks, [np.arange(n)], layers=["inner"], nulls=(), alphas=(0.1,), random_state=0)[0]
    assert (found.n_items, found.n_rows) == (n, 9 * n)
    gauss = (1 - r**2) / np.sqrt(n)
    assert np.sqrt(np.mean(found.bipartite_errors**2)) == pytest.approx(gauss, rel=0.2)
    assert found.errors["mean_bipartite"] == pytest.approx(gauss / np.sqrt(d), rel=0.6)
    apart = compare_networks(*(np.repeat(x, 9, axis=0) for x in (A, B)), nulls=(), alphas=(0.1,), random_state=0)[0]
    assert np.sqrt(np.mean(apart.bipartite_errors**2)) == pytest.approx(gauss / 3, rel=0.2)


def test_tokens_of_one_sequence_stay_together_where_padding_is_left_out():
    """Sequences of l tokens that are alike weigh as much as (sum l)² / sum l² of equal length."""
    rng, n, r, d = np.random.default_rng(2), 400, 0.6, 16
    A, noise = rng.normal(size=(2, n, d))
    B = r * A + np.sqrt(1 - r**2) * noise
    lengths = rng.integers(4, 13, n)
    batches = [
        {"at": np.arange(n)[part], "keep": np.arange(12) < lengths[part, None]} for part in (slice(150), slice(150, n))
    ]
    networks = [_Repeats(rows, 12) for rows in (A, B)]
    options = {"layers": ["inner"], "nulls": (), "alphas": (0.1,), "mask": "keep", "random_state": 0}
    found = compare_networks(*networks, batches, **options)[0]
    assert (found.n_items, found.n_rows) == (n, lengths.sum())
    gauss = (1 - r**2) / np.sqrt(lengths.sum() ** 2 / np.sum(lengths**2))
    assert np.sqrt(np.mean(found.bipartite_errors**2)) == pytest.approx(gauss, rel=0.2)


def _Repeats(rows, times):
    """A model whose layer gives an image's row at so many positions."""
    import torch
    from torch import nn

    class Repeats(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, at, keep=None):
            return self.inner(torch.as_tensor(rows[np.asarray(at)])[:, None].expand(-1, times, -1))

    return Repeats().eval()


def test_a_table_whose_rows_are_positions_has_the_errors_of_its_inputs():
    rng = np.random.default_rng(4)
    X = rng.normal(size=(240, 3))
    Y = X @ rng.normal(size=(3, 3)) + rng.normal(size=(240, 3))
    plain = compare_networks(X, Y, random_state=0)[0]
    copies = [np.repeat(Z, 4, axis=0) for Z in (X, Y)]
    apart = compare_networks(*copies, random_state=0)[0]
    joined = compare_networks(*copies, rows_per_item=4, random_state=0)[0]
    assert (plain.n_items, apart.n_items, joined.n_items, joined.n_rows) == (240, 960, 240, 960)
    # Four copies of each row say what one says: the same blocks are drawn, and the same shuffles. Only the ridge of all
    # units together weighs less against more rows.
    known = [name for name in plain.errors if name != "unexplained_all"]
    assert len(known) >= 7
    assert {name: joined.errors[name] for name in known} == pytest.approx(
        {name: plain.errors[name] for name in known}, rel=1e-6
    )
    assert joined.nulls == pytest.approx(plain.nulls, rel=1e-6)
    np.testing.assert_allclose(joined.bipartite_errors, plain.bipartite_errors, rtol=1e-6)
    # Taken as inputs of their own they would look like four times as many: errors of half the size.
    assert apart.errors["mean_semi"] < 0.75 * joined.errors["mean_semi"]
    # Chunks hold whole inputs, however many fit into a batch.
    small = compare_networks(*copies, rows_per_item=4, batch_rows=10, random_state=0)[0]
    assert small.n_items == 240
    assert small.mean_bipartite == pytest.approx(plain.mean_bipartite)


def test_errors_of_all_numbers_are_the_spread_over_literally_redrawn_inputs():
    """Against a bootstrap of single rows, which needs all of them at hand; both have a relative deviation of 0.2."""
    rng = np.random.default_rng(2)
    Z = rng.normal(size=(1200, 5))
    X, Y = (np.maximum(Z @ rng.normal(size=(5, 5)) + rng.normal(size=(1200, 5)), 0) for _ in range(2))
    found = compare_networks(X, Y, nulls=(), alphas=(0.1,), random_state=0)[0]
    drawn = {"mean_bipartite": [], "cka": []}
    for _ in range(100):
        rows = rng.integers(1200, size=1200)
        between = unit_correlations(moments(X[rows], Y[rows])).between
        drawn["mean_bipartite"].append(between[np.arange(5), found.bipartite.indices].mean())
        drawn["cka"].append(_cka(X[rows], Y[rows]))
    for name, values in drawn.items():
        assert 0.5 < found.errors[name] / np.std(values, ddof=1) < 2.0
    assert set(found.errors) == {
        *("mean_bipartite", "mean_semi", "mean_held_out", "unexplained_single", "unexplained_all"),
        *("cka", "svcca", "pwcca"),
    }
    assert all(0 < value < 0.1 for value in found.errors.values())


def _cka(X, Y):
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return np.sum((X.T @ Y) ** 2) / np.linalg.norm(X.T @ X) / np.linalg.norm(Y.T @ Y)


def test_errors_of_too_few_inputs_are_not_known_and_none_are_made_where_none_are_asked_for():
    rng = np.random.default_rng(3)
    A, B = rng.normal(size=(2, 3, 4))
    few = compare_networks(_Repeats(A, 8), _Repeats(B, 8), [np.arange(3)], layers=["inner"], nulls=(), random_state=0)[
        0
    ]
    assert np.isnan(few.bipartite_errors).all()
    assert few.to_json()["errors"]["cka"] is None
    X, Y = rng.normal(size=(2, 100, 4))
    plain = compare_networks(X, Y, nulls=(), n_bootstraps=0, random_state=0)[0]
    assert plain.errors == {}
    assert {row.stability for row in plain.sparse} == {None}
    assert plain.to_json()["matching"][0]["correlation_error"] is None


# Stability of the few


def test_units_that_are_chosen_again_are_those_of_scikit_learns_lasso_on_the_same_draws():
    rng = np.random.default_rng(4)
    Z = rng.normal(size=(60, 3))
    X, Y = Z @ rng.normal(size=(3, 8)) + 0.5 * rng.normal(size=(60, 8)), Z @ rng.normal(size=(3, 4))
    draws = [rng.integers(60, size=60) for _ in range(5)]
    mapping = SparseUnitMapping(0.1, alphas=(0.1, 0.02), tol=1e-12).fit(X, Y)
    found = support_stability(mapping, [moments(X[rows], Y[rows]) for rows in draws], np.array([0, 2, 3]))

    def support(rows, alpha, j):
        A, B = ((x[rows] - x[rows].mean(0)) / x[rows].std(0) for x in (X, Y))
        return set(np.flatnonzero(Lasso(alpha, tol=1e-12, max_iter=100_000).fit(A, B[:, j]).coef_))

    for i, alpha in enumerate((0.1, 0.02)):
        for at, j in enumerate((0, 2, 3)):
            own = support(np.arange(60), alpha, j)
            others = [support(rows, alpha, j) for rows in draws]
            expected = np.mean([len(own & other) / len(own | other) for other in others])
            assert found[i, at] == pytest.approx(expected, abs=1e-12)


def test_a_lone_twin_is_always_chosen_and_one_of_many_alike_is_not():
    rng = np.random.default_rng(5)
    X = rng.normal(size=(600, 6))
    twins = compare_networks(X, X[:, ::-1], nulls=(), alphas=(0.1,), random_state=0)[0]
    assert twins.sparse[0].stability == 1.0
    alike = rng.normal(size=(600, 1)) + 0.3 * rng.normal(size=(600, 12))
    vague = compare_networks(alike, rng.normal(size=(600, 6)), nulls=(), alphas=(0.05,), random_state=0)[0]
    assert vague.sparse[0].stability < 0.5, "noise chooses"


# A tree of groups


def tree(seed=0, n=3000):
    """Two families of units, one of them of two kinds, in both networks: (a, b) units 8, 6 and 5, 4 and 3, 3."""
    rng = np.random.default_rng(seed)
    family, kind = rng.normal(size=(n, 2)), rng.normal(size=(n, 3))
    of = np.array([0, 1, 1])
    groups = [np.repeat(np.arange(3), sizes) for sizes in ((8, 5, 3), (6, 4, 3))]
    sides = [family[:, of[g]] + kind[:, g] + 0.5 * rng.normal(size=(n, len(g))) for g in groups]
    return sides, groups


def test_a_planted_tree_is_found_from_the_root_down():
    (X, Y), groups = tree()
    truth = np.concatenate(groups)
    for k, expected in ((2, np.minimum(truth, 1)), (3, truth)):
        found = UnitCoClustering(k, method="recursive").fit(X, Y)
        assert adjusted_rand_score(expected, np.append(found.labels_in_, found.labels_out_)) == 1
    assert found.table_.tolist() == [[8, 6], [5, 4], [3, 3]]
    assert found.splits_[0] == 0
    split = found.splits_[1]
    assert set(found.leaves_.tolist()) == {1, 2, 3, 4} - {int(split)}
    assert found.leaves_[0] == 3 - split, "the family of one kind is a leaf at once"
    assert found.cuts_[0] < found.cuts_[1]
    told = compare_networks(X, Y, n_clusters=3, nulls=(), n_bootstraps=0, random_state=0)[0]
    first, second = told.hierarchy
    assert {first.left, first.right} == {(8, 6), (8, 7)}
    assert {second.left, second.right} == {(5, 4), (3, 3)}
    assert (first.left, first.right)[second.node - 1] == (8, 7)


def test_a_cut_is_the_least_of_all_bipartitions_where_the_graph_has_two_parts():
    rng = np.random.default_rng(6)
    for _ in range(10):
        side = rng.permutation(9) < rng.integers(2, 8)
        A = rng.uniform(0, 0.1, (9, 9)) + (side[:, None] == side) * rng.uniform(0.6, 1, (9, 9))
        A = (A + A.T) / 2

        def cost(S, A=A):
            cut = A[np.ix_(S, ~S)].sum()
            return cut / A[S].sum() + cut / A[~S].sum()

        subsets = [(np.arange(9) < 0) | np.array([b == "1" for b in f"{i:09b}"]) for i in range(1, 2**8)]
        found, first = best_cut(A)
        assert found == pytest.approx(min(map(cost, subsets)), rel=1e-12)
        assert cost(first) == pytest.approx(found, rel=1e-12)


def test_parts_that_nothing_joins_are_cut_for_nothing_and_before_all_others():
    A = np.kron(np.eye(4), np.ones((3, 3)))
    found = recursive_bipartition(A, 4)
    np.testing.assert_allclose(found.cuts, 0, atol=1e-12)
    assert adjusted_rand_score(np.repeat(np.arange(4), 3), found.labels) == 1
    whole = recursive_bipartition(A, 12)
    assert sorted(whole.labels.tolist()) == list(range(12)), "down to single units"
    assert recursive_bipartition(A, 1).labels.tolist() == [0] * 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X: UnitCoClustering(method="tree").fit(X, X), "method must be one of"),
        (lambda X: compare_networks(X, X, n_blocks=5), "n_blocks must be even and n_bootstraps not 1, got 5 and 50"),
        (lambda X: compare_networks(X, X, n_blocks=2), "n_blocks must be at least 4, got 2"),
        (lambda X: compare_networks(X, X, n_bootstraps=1), "n_bootstraps not 1, got 20 and 1"),
        (lambda X: compare_networks(X, X, n_bootstraps=-1), "n_bootstraps must be at least 0, got -1"),
        (lambda X: compare_networks(X, X, rows_per_item=0), "rows_per_item must be at least 1, got 0"),
        (lambda X: compare_networks(X, X, rows_per_item=7), "rows_per_item must divide the 40 rows of 'units', got 7"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(40, 3)))
