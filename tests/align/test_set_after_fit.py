"""What is set after a fit and cannot take effect is refused, or leaves the fit as it is."""

import numpy as np
import pytest

from polyspan.align import (
    InverseGraphConvolution,
    OrthogonalMap,
    RelaxedOrthogonalAdapter,
    SubspaceAligner,
    UnitCoClustering,
    alignment_report,
    choose_aligner,
    plan_upgrade,
)
from polyspan.integrations import FaissTable

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 5)), RNG.normal(size=(60, 5))


@pytest.mark.parametrize(("fitted", "other"), [("local", "full"), ("full", "local")])
def test_an_adjacency_that_was_not_fitted_is_named(fitted, other, tmp_path):
    estimator = InverseGraphConvolution(adjacency=fitted, pool_share=0.1).fit(X)
    estimator.set_params(adjacency=other)
    for use in (estimator.transform, lambda rows: estimator.tune(rows, rows), lambda _: estimator.save(tmp_path / "i")):
        with pytest.raises(ValueError, match=f"adjacency must be '{fitted}', as fitted, got '{other}': fit anew"):
            use(Y)


def test_a_full_fit_is_over_once_a_local_one_was_made():
    estimator = InverseGraphConvolution().fit(X)
    estimator.set_params(adjacency="local", pool_share=0.1).fit(Y)
    with pytest.raises(ValueError, match="adjacency must be 'local', as fitted, got 'full'"):
        estimator.set_params(adjacency="full").transform(X)
    estimator.partial_fit(Y)
    np.testing.assert_array_equal(estimator.transform(X), InverseGraphConvolution().fit(Y).transform(X))


def test_a_rank_that_is_set_after_the_first_anchors_is_refused():
    aligner = OrthogonalMap().fit(X[:30], Y[:30]).set_params(rank=2)
    with pytest.raises(ValueError, match="rank must be set before the first anchors, got rank=2 after them"):
        aligner.partial_fit(X[30:], Y[30:])
    whole = OrthogonalMap(rank=2).fit(X, Y)
    parts = OrthogonalMap(rank=2).partial_fit(X[:30], Y[:30]).partial_fit(X[30:], Y[30:])
    assert parts.residual_ == pytest.approx(whole.residual_, rel=1e-9)


def test_a_forward_map_stays_what_was_fitted():
    aligner = RelaxedOrthogonalAdapter(max_iter=0, random_state=0, device="cpu").fit(X, Y)
    lifted = aligner.transform_old(Y)
    np.testing.assert_array_equal(aligner.set_params(forward="mlp").transform_old(Y), lifted)


def test_an_index_of_more_lists_than_vectors_is_refused_before_it_is_filled(tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(5), 5, 16)
    index.train(RNG.normal(size=(640, 5)).astype(np.float32))
    index.add(X[:12].astype(np.float32))
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    with pytest.raises(ValueError, match=r"must hold a vector for each of its 16 lists, .*got 12; carry the queries"):
        FaissTable(tmp_path / "x.faiss").prepare(5, {"model": "new"}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.faiss"]


def test_a_map_into_a_space_of_its_own_is_named_where_maps_are_judged():
    aligner = RelaxedOrthogonalAdapter(max_iter=0, dim_match="pca", random_state=0, device="cpu")
    said = "must map to the 5 features of the target, got a map to 3"
    with pytest.raises(ValueError, match=f"aligner {said}"):
        alignment_report(aligner.fit(X[:, :3], Y), X[:, :3], Y)
    with pytest.raises(ValueError, match=f"narrow {said}"):
        choose_aligner(X[:, :3], Y, candidates={"narrow": aligner}, directions=("gallery",))
    with pytest.raises(ValueError, match=f"RelaxedOrthogonalAdapter {said}"):
        plan_upgrade(X[:, :3], Y, n_rows=60, candidates={"narrow": aligner}, backfill_shares=())


def test_what_one_fit_alone_has_is_gone_after_another():
    aligner = SubspaceAligner(n_components="auto").fit(X, Y)
    assert aligner.tried_
    assert not hasattr(aligner.set_params(n_components=2).fit(X, Y), "tried_")
    adapter = RelaxedOrthogonalAdapter(lam="auto", max_iter=2, random_state=0).fit(X, Y)
    assert len(adapter.held_losses_)
    assert not hasattr(adapter.set_params(lam=0.5).fit(X, Y), "held_losses_")
    groups = UnitCoClustering(2, method="recursive", random_state=0).fit(X, Y)
    assert len(groups.splits_)
    groups.set_params(method="spectral").fit(X, Y)
    assert not any(hasattr(groups, name) for name in ("splits_", "cuts_", "leaves_"))
