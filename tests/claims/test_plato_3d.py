import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from polyspan.align import SubspaceAligner, crossmodal_scores, local_cka, subspace_report, topk_accuracy
from polyspan.align.pair_scorers import ContrastiveProjections, PrincipalSubspaceAligner, RelativeRepresentation
from polyspan.claims import measure, measure_claim
from polyspan.claims.plato_3d import (
    CLAIM,
    FAMILIES,
    METHOD,
    Paired,
    all_shared,
    on_articles,
    on_digits,
    on_shapes,
    planted,
    procrustes,
    ridge,
    scored,
    share_all,
    subspace,
    trial,
)
from polyspan.io import write_members

NEEDS_DATA = pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)


@cache
def on(world):
    return measure(CLAIM, world, seeds=3)


def test_both_arms_try_as_many_settings():
    assert sum(map(len, METHOD.values())) == sum(map(len, FAMILIES.values())) == 36
    assert "36" in CLAIM.method
    assert "36" in CLAIM.baseline


@pytest.mark.slow
def test_where_louder_factors_are_private_only_the_subspace_finds_the_shared_ones():
    found = on("planted")
    assert found.verdict == "holds"
    assert found.gain > 0.3
    assert found.means["local CKA"] < 0.1
    assert found.means["subspace, local CKA"] > 0.9


@pytest.mark.slow
def test_where_all_is_shared_there_is_nothing_to_leave_out():
    found = on(CLAIM.control)
    assert found.verdict == "fails"
    assert found.means["ridge map"] > 0.9
    assert subspace_report(*all_shared(0)[:2]).n_shared == 24


@pytest.mark.slow
def test_on_halves_of_digits_it_beats_every_map_of_the_full_spaces_and_the_whitened_map_about_equals_it():
    found = on("digits")
    assert found.means["method"] > found.means["ridge map"] + 0.05
    assert found.means["subspace, local CKA"] > 1.8 * found.means["local CKA"]
    assert abs(found.means["method"] - found.means["white, all directions"]) < 0.05
    assert on_digits(0).queries_y.shape == (300, 32)


def test_shuffled_anchors_leave_chance_only():
    data = planted(1)
    rng = np.random.default_rng(0)
    scores = trial(data._replace(anchors_y=rng.permutation(data.anchors_y)), 0)
    assert max(scores.values()) < 0.12


def test_a_second_view_that_is_the_first_one_turned_is_found_by_both_arms():
    data = share_all(planted(1), 0)
    np.testing.assert_allclose(data.queries_x @ data.queries_x.T, data.queries_y @ data.queries_y.T, atol=1e-9)
    scores = trial(data, 0)
    assert min(scores["method"], scores["baseline"]) > 0.99


def test_arms_equal_their_formulas():
    X, Y, A, B = data = Paired(*(part[:50] for part in planted(2, d_x=9, d_y=7, own=3)))

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    Xc, Yc, Ac, Bc = X - X.mean(0), Y - Y.mean(0), A - X.mean(0), B - Y.mean(0)
    alpha = 0.1 * np.sum(Xc**2) / 9
    carried = Ac @ np.linalg.solve(Xc.T @ Xc + alpha * np.eye(9), Xc.T @ Yc)
    np.testing.assert_allclose(ridge(data, alpha=0.1, centred=True), unit(carried) @ unit(Bc).T)
    np.testing.assert_allclose(ridge(data, alpha=0.1, centred=False), unit(carried + Y.mean(0)) @ unit(B).T)
    U, _, Vt = np.linalg.svd(Xc.T @ Yc, full_matrices=False)
    np.testing.assert_allclose(procrustes(data, scaling="centre"), unit(Ac @ U @ Vt) @ unit(Bc).T)
    white = [
        unit(Z @ np.linalg.svd(C, full_matrices=False)[2].T / np.linalg.svd(C)[1]) for Z, C in ((Ac, Xc), (Bc, Yc))
    ]
    assert white[0].shape == (50, 9)
    whole = scored(data, lambda: PrincipalSubspaceAligner(9, reg=0.0))
    literal = Ac @ np.linalg.lstsq(Xc, Yc, rcond=None)[0]
    scale = np.linalg.svd(Yc, full_matrices=False)
    target, found = (Z @ scale[2].T / scale[1] for Z in (Bc, literal))
    np.testing.assert_allclose(whole, unit(found) @ unit(target).T, atol=1e-7)
    sides = []
    for anchors, queries in ((Xc, Ac), (Yc, Bc)):
        known, asked = (unit(rows) @ unit(anchors[[0, 24, 49]]).T for rows in (anchors, queries))
        sides.append(unit((asked - known.mean(0)) / known.std(0)))
    np.testing.assert_allclose(scored(data, lambda: RelativeRepresentation(3)), sides[0] @ sides[1].T, atol=1e-9)
    np.testing.assert_array_equal(
        subspace(data, k=3, route="affine", reg=0.01), SubspaceAligner(3, reg=0.01).fit(X, Y).similarity(A, B)
    )


def test_trained_projections_learn_what_is_planted_and_repeat():
    data = planted(3, own=2, loud=1.0, noise=0.2)
    once, again = (scored(data, lambda: ContrastiveProjections(max_iter=20, device="cpu")) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert topk_accuracy(once, 5) > 0.5


@pytest.mark.slow
def test_a_user_measures_the_claim_on_a_file_of_pairs(tmp_path):
    data = planted(4)
    write_members(tmp_path / "mine.npz", data._asdict())
    found = measure_claim(CLAIM, data=tmp_path / "mine.npz", seeds=3)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].verdict == "holds"
    assert found.control_ok


@NEEDS_DATA
def test_on_shapes_the_subspace_multiplies_local_cka_and_beats_the_affine_map_of_the_full_spaces():
    X, Y, A, B = on_shapes(0, n_anchors=1000)
    raw = topk_accuracy(local_cka(X, Y, A, B), 5)
    found = {
        (k, m): crossmodal_scores(SubspaceAligner(k, method=m).fit(X, Y), A, B)
        for k in (5, 10, 50)
        for m in ("affine", "local_cka")
    }
    full = max(topk_accuracy(ridge(Paired(X, Y, A, B), alpha=a, centred=False), 5) for a in (1e-3, 1e-2, 1e-1))
    assert found[10, "local_cka"]["top_k"] > 4 * raw
    assert found[10, "affine"]["top_k"] > full + 0.1
    assert found[10, "affine"]["top_k"] > found[50, "affine"]["top_k"]
    assert found[5, "local_cka"]["top_k"] > found[5, "affine"]["top_k"] + 0.05
    assert 0.7 < found[10, "affine"]["ceiling"]["at_1"] < 1
    assert "queries repeat" in found[10, "affine"]["warnings"][-1]


@NEEDS_DATA
def test_on_articles_the_subspace_helps_local_cka_and_not_least_squares():
    data = on_articles(0)
    scores = trial(data, 0)
    assert scores["subspace, local CKA"] > 1.4 * scores["local CKA"]
    assert scores["subspace, affine"] < scores["ridge map"]


@pytest.mark.slow
@NEEDS_DATA
def test_neighbours_in_the_shared_subspace_are_of_one_category_more_than_in_the_private_one_or_the_whole():
    from polyspan.align import CanonicalCorrelation
    from polyspan.data import dataset
    from polyspan.linalg import label_hits, top_k

    found = dataset("shapes3d-text")
    order = np.random.default_rng(0).permutation(len(found.shapes))
    fitting, others = order[:4000], order[4000:]
    fitted = CanonicalCorrelation(10).fit(found.shapes[fitting], found.texts[fitting])
    category = found.attributes[others, 0]
    raw = found.shapes[others]
    spaces = {
        "raw": raw - fitted.x_mean_,
        "shared": fitted.transform(raw),
        "private": (raw - fitted.x_mean_) @ fitted.private_weights("x"),
    }

    def precision(rows):
        near = top_k(rows, rows, 10, exclude=np.arange(len(rows))).indices
        return float(np.mean(label_hits(category, category, near)))

    scores = {name: precision(np.ascontiguousarray(rows)) for name, rows in spaces.items()}
    assert scores["shared"] > scores["raw"] + 0.25
    assert scores["shared"] > scores["private"] + 0.08
