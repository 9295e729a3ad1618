"""What the systems of this family refuse, or say, when they are given what they cannot use."""

import re
import warnings
from inspect import unwrap

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from polyspan.align import (
    ActivationCollector,
    CanonicalCorrelation,
    CompatibleClassifier,
    IdentityMap,
    InverseGraphConvolution,
    MeanShift,
    Mesh,
    OrthogonalMap,
    PointNetEncoder,
    RelaxedOrthogonalAdapter,
    ResidualMLPMap,
    RidgeMap,
    SparseUnitMapping,
    SubspaceAligner,
    UnitCoClustering,
    alignment_report,
    choose_aligner,
    class_prototypes,
    compare_networks,
    compatibility_matrix,
    crossmodal_scores,
    duplicate_ceiling,
    evaluate_compatibility,
    hubness,
    kernel_agreement,
    local_cka,
    match_units,
    mean_pairwise_cosine,
    normalize_points,
    pairing_p_value,
    read_shape,
    relaxed_orthogonality,
    topk_accuracy,
    train_point_encoder,
    unit_mutual_information,
)
from polyspan.errors import CorruptFile
from polyspan.linalg import PairedMoments

N, D = 60, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
Y = X @ np.linalg.qr(RNG.normal(size=(D, D)))[0] + 0.1 * RNG.normal(size=(N, D))
LABELS = np.arange(N) % 3
BROKEN = X.copy()
BROKEN[7, 2] = np.nan
FEW = SparseUnitMapping().fit(X, Y)
TURN = OrthogonalMap()
TURN.fit(X, Y)


def adapter(**options):
    return RelaxedOrthogonalAdapter(**{"max_iter": 1, "random_state": 0, "device": "cpu", **options})


def mlp(**options):
    return ResidualMLPMap(**{"max_iter": 1, "random_state": 0, **options})


def debias(*args, **options):
    return InverseGraphConvolution(*args, **options).fit(X)


# Types are checked in tests only; where a wrong one is told of without that too, the test takes the check off.
REFUSED = {
    "labels with NaN": (
        lambda: evaluate_compatibility(X, X, np.where(LABELS == 0, np.nan, LABELS), LABELS, True),
        "query_labels must have no NaN, got one at row 0",
    ),
    "an empty gallery": (
        lambda: evaluate_compatibility(X, X[:0], LABELS, LABELS[:0]),
        "gallery must hold at least one row",
    ),
    "part of a list": (
        lambda: unwrap(evaluate_compatibility)(X, X, LABELS, LABELS, ks=(1.5,)),
        "ks must be a whole number",
    ),
    "no block": (lambda: evaluate_compatibility(X, X, LABELS, LABELS, query_rows=0), "query_rows must be at least 1"),
    "a negative block": (
        lambda: evaluate_compatibility(X, X, LABELS, LABELS, query_rows=-3),
        "query_rows must be at least 1",
    ),
    "a reference of other queries": (
        lambda: evaluate_compatibility(X, X, LABELS, LABELS, True, reference=X[:5]),
        r"reference must hold one row a query \(60\), got 5",
    ),
    "models of other items": (
        lambda: compatibility_matrix([X, X[:5]], LABELS),
        "models must hold the same items, got 60 rows and 5 in number 1",
    ),
    "complex vectors": (lambda: class_prototypes(X * 1j, LABELS), "embeddings must hold real numbers, got complex128"),
    "vectors as text": (lambda: class_prototypes(X.astype(str), LABELS), "embeddings must hold real numbers, got <U"),
    "labels below 0": (lambda: class_prototypes(X, LABELS - 1), "labels must be at least 0, got -1 to 1"),
    "part of an epoch": (lambda: adapter(max_iter=1.5).fit(X, Y), "max_iter must be a whole number, got 1.5"),
    "part of a batch": (lambda: adapter(batch_size=2.5).fit(X, Y), "batch_size must be a whole number, got 2.5"),
    "no threshold": (lambda: adapter(lam=None).fit(X, Y), "lam must be a finite number or 'auto', got None"),
    "labels of two kinds": (
        lambda: adapter().fit(X, Y, [None if mark == 0 else int(mark) for mark in LABELS]),
        "labels must be of one kind, got NoneType, int",
    ),
    "old vectors as text": (
        lambda: adapter().fit(X, Y).transform_old(Y.astype(str)),
        "Y must hold real numbers, got <U",
    ),
    "no old vectors": (lambda: adapter().fit(X, Y).transform_old(Y[:0]), r"Y must hold at least one row .* \(0, 5\)"),
    "a penalty of a vector": (
        lambda: unwrap(relaxed_orthogonality)(torch.ones(4), 1.0),
        r"weight must be a matrix .* \(4,\)",
    ),
    "a constant view": (lambda: CanonicalCorrelation(2).fit(X, Y * 0 + 1), "y must vary from row to row"),
    "a ridge as text": (lambda: CanonicalCorrelation(2, reg="x").fit(X, Y), "reg must be a number, got 'x'"),
    "a power as text": (lambda: SubspaceAligner(2, rho_power="x").fit(X, Y), "rho_power must be a number, got 'x'"),
    "part of an item": (
        lambda: unwrap(SubspaceAligner.retrieve)(SubspaceAligner(2).fit(X, Y), X, Y, 1.5),
        "k must be between 1 and .* got 1.5",
    ),
    "part of a candidate": (
        lambda: unwrap(SubspaceAligner.match)(SubspaceAligner(2).fit(X, Y), X, Y, candidates=1.5),
        "candidates must be a whole number, got 1.5",
    ),
    "weights of other rows": (
        lambda: OrthogonalMap().fit(X, Y, sample_weight=np.ones(3)),
        r"sample_weight must be one number, or 60 of them, one a row, got shape \(3,\)",
    ),
    "weights of other rows, streamed": (
        lambda: CanonicalCorrelation(2).partial_fit(X, Y, sample_weight=np.ones(3)),
        "sample_weight must be one number, or 60 of them",
    ),
    "three bandwidths": (
        lambda: local_cka(X, Y, X, Y, kernel="rbf", bandwidth=(1, 2, 3)),
        r"bandwidth must be one number or two, one a view, got shape \(3,\)",
    ),
    "equal anchors with a bandwidth": (
        lambda: local_cka(X * 0, Y, X, Y, kernel="rbf", bandwidth=1.0),
        "X_anchor must vary, got rows that are all equal",
    ),
    "scores that are NaN": (lambda: topk_accuracy(BROKEN, 1, LABELS), "scores must be numbers, got NaN in row 7"),
    "no place for duplicates": (lambda: duplicate_ceiling(X, 0), "k must be at least 1, got 0"),
    "points as text": (lambda: normalize_points(X[:, :3].astype(str)), "points must hold real numbers, got <U"),
    "complex points": (lambda: normalize_points(X[:, :3] * 1j), "points must hold real numbers, got complex128"),
    "clouds without points": (
        lambda: PointNetEncoder(4)(torch.zeros(2, 0, 3)),
        r"points must hold at least one point a cloud, got shape \(2, 0, 3\)",
    ),
    "a device nobody knows": (
        lambda: train_point_encoder(RNG.normal(size=(4, 8, 3)), device="zz"),
        "device must be 'auto' or one that torch knows",
    ),
    "no penalty": (lambda: compare_networks(X, Y, alphas=()), "alphas must hold at least one penalty"),
    "one untrained network": (
        lambda: unwrap(compare_networks)(X, Y, untrained=(X,)),
        "untrained must be a pair like a and b",
    ),
    "no position": (lambda: compare_networks(X, Y, max_positions=0), "max_positions must be at least 1, got 0"),
    "a way to reduce": (lambda: compare_networks(X, Y, reduce="x"), "reduce must be one of .* got 'x'"),
    "complex correlations": (lambda: match_units(X * 1j), "between must hold real numbers, got complex128"),
    "part of a bin": (
        lambda: unwrap(unit_mutual_information)(X, Y, n_bins=2.5),
        "n_bins must be a whole number, got 2.5",
    ),
    "units as text": (lambda: unit_mutual_information(X.astype(str), Y), "X must hold real numbers, got <U"),
    "a negative gap": (lambda: SparseUnitMapping(tol=-1).fit(X, Y), "tol must be finite and at least 0, got -1"),
    "no sweep": (lambda: SparseUnitMapping(max_iter=0).fit(X, Y), "max_iter must be at least 1, got 0"),
    "part of a unit": (lambda: SparseUnitMapping(max_units=1.5).fit(X, Y), "max_units must be a whole number"),
    "rows of other widths": (
        lambda: FEW.unexplained(PairedMoments(3, D).update(X[:, :3], Y)),
        r"moments must be of widths \(5, 5\), as fitted, got \(3, 5\)",
    ),
    "part of a start": (lambda: UnitCoClustering(2, n_init=1.5).fit(X, Y), "n_init must be a whole number, got 1.5"),
    "a truth for a number": (lambda: UnitCoClustering(True).fit(X, Y), "n_clusters must be between 1 and"),
    "a rate as text": (lambda: debias("x"), "rate_gallery must be finite, got 'x'"),
    "a share as text": (lambda: debias(adjacency="local", pool_share="x"), "pool_share must lie above 0 .* got 'x'"),
    "part of a row": (lambda: debias(block_rows=2.5), "block_rows must be a whole number, got 2.5"),
    "a bank of zeros": (
        lambda: InverseGraphConvolution().fit(X, queries=np.where(np.arange(N)[:, None] == 3, 0, Y)),
        "queries must have no all-zero row when normalize=True, got one at row 3",
    ),
    "an answer beyond the gallery": (
        lambda: debias().tune(X, Y[:5], relevant=np.arange(5) + 1000),
        "relevant must hold rows of the gallery, 0..59, or -1, got int64 from 1000 to 1004",
    ),
    "half an answer": (lambda: debias().tune(X, Y[:5], relevant=np.arange(5) / 2), "relevant must hold .* float64"),
    "a share of nothing": (
        lambda: debias(adjacency="local", pool_share=0.1).tune(X, Y, pool_shares=(0,)),
        "pool_shares must lie above 0 .* got 0",
    ),
    "a rate below 0 in a grid": (lambda: debias().tune(X, Y, rates=(0, -1)), "rates must be at least 0"),
    "a gallery with NaN": (lambda: hubness(X, BROKEN, 5), "gallery must be finite, got NaN or infinity at row 7"),
    "own rows of other queries": (
        lambda: hubness(X, X, 5, exclude=np.arange(8)),
        r"exclude must be 60 whole numbers, one a query, got shape \(8,\)",
    ),
    "no queries": (lambda: hubness(X[:0], X, 5), r"queries must hold at least one row, got shape \(0, 5\)"),
    "part of a list of hubs": (lambda: unwrap(hubness)(X, X, 2.5), "k must be a whole number, got 2.5"),
    "no block of cosines": (lambda: mean_pairwise_cosine(X, block_rows=0), "block_rows must be at least 1, got 0"),
    "pairs with NaN": (lambda: pairing_p_value(BROKEN, Y), "X must be finite, got NaN or infinity at row"),
    "pairs of other lengths": (lambda: pairing_p_value(X, Y[:-1]), "one row an item, got 60 and 59 rows"),
    "kernels with NaN": (lambda: kernel_agreement(X, X, Y, BROKEN), "texts_b must be finite, got NaN .* at row 7"),
    "kernels of nothing": (lambda: kernel_agreement(X[:0], X, Y[:0], Y), "images_a must hold at least one row"),
    "a direction nobody knows": (
        lambda: unwrap(choose_aligner)(X, Y, directions=("x",)),
        r"directions must be some of .*'x'",
    ),
    "no direction": (lambda: choose_aligner(X, Y, directions=()), "directions must be some of"),
    "no candidate": (lambda: choose_aligner(X, Y, candidates={}), "candidates must hold at least one aligner"),
    "labels of other anchors": (
        lambda: choose_aligner(X, Y, LABELS[:3], metric="map"),
        r"labels must have shape \(60,\), one an anchor, got \(3,\)",
    ),
    "a report on other rows": (
        lambda: alignment_report(OrthogonalMap().fit(X, Y), X, Y[:-1]),
        r"2-d with one row an item, at least 2, got shapes \(60, 5\) and \(59, 5\)",
    ),
    "a swapped report of other widths": (
        lambda: alignment_report(OrthogonalMap().fit(X[:, :3], Y), Y, X[:, :3]),
        "X must have the 3 features that the map takes, got 5, which is what it gives: are X and Y swapped",
    ),
    "a score of NaN": (lambda: RidgeMap().fit(X, Y).score(X, BROKEN), "y must be finite, got NaN or infinity at row 7"),
    "a way back of another width": (
        lambda: IdentityMap().fit(X, Y).inverse_transform(X[:, :3]),
        "Z must have 5 features",
    ),
    "a shift back of another width": (
        lambda: MeanShift().fit(X, Y).inverse_transform(X[:, :3]),
        "Z must have 5 features",
    ),
    "a modality of nothing": (
        lambda: TURN.add_modality("t", X[:0], Y),
        "X must hold at least one row",
    ),
    "part of a rank": (lambda: OrthogonalMap(rank=1.5).fit(X, Y), "rank must be a whole number, got 1.5"),
    "no ridge": (lambda: RidgeMap(None).fit(X, Y), "alpha must be a number, got None"),
    "no hidden unit": (lambda: mlp(hidden=0).fit(X, Y), "hidden must be at least 1, got 0"),
    "epochs below 0": (lambda: mlp(max_iter=-1).fit(X, Y), "max_iter must be at least 0, got -1"),
    "no step": (lambda: mlp(learning_rate=0).fit(X, Y), "learning_rate must be positive, got 0"),
    "no batch": (lambda: mlp(batch_size=0).fit(X, Y), "batch_size must be at least 1, got 0"),
    "no such device": (lambda: mlp(device="zz").fit(X, Y), "device must be 'auto' or one that torch knows"),
    "dates": (lambda: RidgeMap().fit(X.astype("datetime64[s]"), Y), r"X must hold real numbers, got datetime64\[s\]"),
    "dates to be carried": (
        lambda: RidgeMap().fit(X, Y).transform(X.astype("datetime64[s]")),
        "X must hold real numbers, got datetime64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_the_argument_and_what_came(name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


FITTED_ON_PAIRS = (OrthogonalMap, RidgeMap, MeanShift, IdentityMap, mlp, adapter, lambda: SubspaceAligner(2))


@pytest.mark.parametrize("which", range(len(FITTED_ON_PAIRS)))
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_anchors_whose_squares_overflow_or_vanish_are_refused_by_name(which, scale):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ValueError, match=r"X must be of a size whose squares fit into float64"):
            FITTED_ON_PAIRS[which]().fit(X * scale, Y * scale)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_directions_do_not_depend_on_the_size_of_numbers(scale):
    cut = InverseGraphConvolution(0.5).fit(X, queries=Y)
    np.testing.assert_allclose(cut.transform(X * scale), cut.transform(X), rtol=1e-12)
    np.testing.assert_allclose(InverseGraphConvolution(0.5).fit(X * scale).affine_step()[0], cut.affine_step()[0])
    unit = OrthogonalMap(normalize=True).fit(X, Y)
    np.testing.assert_allclose(unit.transform(X * scale), unit.transform(X), rtol=1e-12)
    one, other = (evaluate_compatibility(rows, Y, LABELS, LABELS, True).scores for rows in (X * scale, X))
    assert one == other
    assert mean_pairwise_cosine(X * scale) == pytest.approx(mean_pairwise_cosine(X), rel=1e-12)
    np.testing.assert_allclose(normalize_points(X[:, :3] * scale), normalize_points(X[:, :3]), atol=1e-12)
    assert kernel_agreement(X * 1e100, X, Y, Y)["cka"] == pytest.approx(kernel_agreement(X, X, Y, Y)["cka"])


def test_single_precision_vectors_beyond_its_squares_keep_their_direction():
    cut, narrow = InverseGraphConvolution(0.5).fit(X), X.astype(np.float32)
    for scale in (np.float32(1e30), np.float32(1e-30)):
        np.testing.assert_allclose(cut.transform(narrow * scale), cut.transform(narrow), atol=1e-6)
        scores = evaluate_compatibility(narrow * scale, narrow, LABELS, LABELS, True).scores
        assert scores == evaluate_compatibility(narrow, narrow, LABELS, LABELS, True).scores


def test_overflowing_units_are_no_result():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ValueError, match="moments must be finite"):
            SparseUnitMapping().fit(X * 1e200, Y)


def test_eight_bit_codes_are_taken_with_a_warning():
    codes = np.clip(X * 30, -127, 127).astype(np.int8)
    with pytest.warns(UserWarning, match="X holds int8: quantised codes are taken as they stand"):
        fitted = RidgeMap().fit(codes, Y)
    with pytest.warns(UserWarning, match="X holds int8"):
        carried = fitted.transform(codes)
    np.testing.assert_array_equal(carried, fitted.transform(codes.astype(np.float64)))


def test_few_anchors_are_told_of_where_they_are_streamed_too():
    for made in (CanonicalCorrelation(2), SubspaceAligner(2)):
        made.partial_fit(X[:4], Y[:4], solve=False)
        with pytest.warns(UserWarning, match="8 anchors are fewer than the 10 features of both views"):
            made.partial_fit(X[4:8], Y[4:8])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.partial_fit(X[8:], Y[8:])


def test_anchors_that_are_gathered_only_are_no_fit():
    with pytest.raises(NotFittedError):
        SubspaceAligner(2).partial_fit(X, Y, solve=False).transform(X)


@pytest.mark.parametrize("kind", [OrthogonalMap, SubspaceAligner])
def test_a_map_from_a_file_does_not_forget_its_anchors_without_a_word(tmp_path, kind):
    kind().fit(X, Y).save(tmp_path / "map.safetensors")
    with pytest.raises(ValueError, match="of 60 anchors read from a file, which keeps none of them"):
        kind.load(tmp_path / "map.safetensors").partial_fit(X, Y)


def test_a_batch_of_another_width_changes_nothing():
    fitted = OrthogonalMap()
    fitted.fit(X, Y)
    with pytest.raises(ValueError, match="y must have 5 features as before, got 3"):
        fitted.partial_fit(X, Y[:, :3])
    assert len(fitted.get_feature_names_out()) == 5


def test_a_gallery_that_repeats_lowers_the_ceiling():
    fitted = SubspaceAligner(3).fit(X, Y)
    found = crossmodal_scores(fitted, X[:20], np.repeat(Y[:10], 2, axis=0))
    assert found["ceiling"] == {"at_1": 0.5, "at_k": 1.0}
    assert "rows of the gallery repeat: no more than 50.0% can be found first" in found["warnings"]


def test_rates_set_after_the_fit_are_told_of_once_and_tuned_ones_never():
    cut = InverseGraphConvolution().fit(X + 3)
    limit = cut.rate_limit_gallery_
    assert limit is not None
    cut.set_params(rate_gallery=3 * limit)
    with pytest.warns(UserWarning, match="rate_gallery=.* is above twice its limit"):
        cut.transform(X + 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut.transform(X + 3)
        cut.tune(X + 3, Y + 3, rates=(0.0, 4 * limit))
        cut.transform(X + 3)


def test_one_bank_given_for_both_is_told():
    with pytest.warns(UserWarning, match="queries are the rows of X"):
        InverseGraphConvolution().fit(X, queries=X.copy())


def test_bad_old_vectors_are_named_and_not_described_first():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="old must be finite, got NaN or infinity in row 7"):
            CompatibleClassifier(max_iter=1).fit(X, LABELS, old=BROKEN)


def test_a_module_under_two_names_is_found_by_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.first(x)

    model, x = Twice().eval(), torch.ones(3, 4)
    with ActivationCollector(model, ["first", "second"]) as collect:
        found = collect(x)
    np.testing.assert_array_equal(found["first"], found["second"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("zero.obj", "v 0 0 0\nv 1 0 0\nv 1 1 0\nf 0 1 2\nv 0 1 0\n", "a face with point 0, where points count from 1"),
        ("below.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n1 1 0\n3 0 1 -1\n", "a face with point -1"),
        ("ragged.xyz", "1 2 3\n4 5\n", "lines of 2 and of 3 numbers"),
    ],
)
def test_broken_shapes_say_what_is_broken(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(CorruptFile, match=re.escape(words)):
        read_shape(tmp_path / name)


def test_a_mesh_is_read_as_before(tmp_path):
    (tmp_path / "good.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\nf -3 -2 -1\n")
    assert isinstance(read_shape(tmp_path / "good.obj"), Mesh)
    assert read_shape(tmp_path / "good.obj").triangles.tolist() == [[0, 1, 2], [0, 1, 2]]
