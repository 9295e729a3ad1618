"""Every public function of the ground floor keeps the same promises; a new one without a case fails here."""

import inspect

import numpy as np
import pytest

from polyspan import linalg
from polyspan.testing import LinalgCase, check_linalg, public_members

D, K, N = 7, 3, 11


def normal(*shape):
    return lambda rng: rng.normal(size=shape)


def basis(rng, d=D, k=K):
    return np.linalg.qr(rng.normal(size=(d, k)))[0]


def tangent(rng):
    S = basis(rng)
    E = 0.3 * rng.normal(size=(D, K))
    return S, E - S @ (S.T @ E)


def span(Q):
    return Q @ (Q.mT if hasattr(Q, "mT") else np.swapaxes(Q, -1, -2))


def memberships(rng):
    weights = rng.uniform(0.1, 1, size=(N, 3))
    return weights / weights.sum(axis=1, keepdims=True)


def symmetric(rng, n=6):
    A = rng.normal(size=(n, n))
    return A + A.T


def gram(rng):
    Z = rng.normal(size=(N, 4))
    return Z @ Z.T


def coded(rng):
    A = rng.normal(size=(D, 9))
    codes = rng.normal(size=(N, 9)) * (rng.uniform(size=(N, 9)) < 0.4)
    return A / np.linalg.norm(A, axis=0), rng.normal(size=(N, D)), codes


def two_tables(rng):
    return rng.normal(size=(40, 4)), rng.normal(size=(40, 3))


CASES = {
    "nearest_isometry": LinalgCase(lambda rng: (rng.normal(size=(D, K)),)),
    "nearest_rotation": LinalgCase(lambda rng: (rng.normal(size=(4, 4)),)),
    "orthonormal_basis": LinalgCase(lambda rng: (rng.normal(size=(D, K)),)),
    "complete_basis": LinalgCase(lambda rng: (basis(rng),), result=lambda Q: span(Q[..., K:])),
    "projector": LinalgCase(lambda rng: (basis(rng),)),
    "project": LinalgCase(lambda rng: (rng.normal(size=(N, D)), basis(rng))),
    "project_out": LinalgCase(lambda rng: (rng.normal(size=(N, D)), basis(rng))),
    "principal_angles": LinalgCase(lambda rng: (basis(rng), basis(rng, k=2))),
    "principal_vectors": LinalgCase(
        lambda rng: (basis(rng), basis(rng, k=2)), result=lambda out: (out[0], span(out[1]), span(out[2]))
    ),
    "subspace_distance": LinalgCase(lambda rng: (basis(rng), basis(rng))),
    "pairwise_subspace_distance": LinalgCase(
        lambda rng: (np.stack([basis(rng) for _ in range(4)]),), batched=False, tol=1e-7
    ),
    "compact_wy": LinalgCase(lambda rng: (rng.normal(size=(D, K)),), result=tuple),
    "householder_product": LinalgCase(lambda rng: (rng.normal(size=(D, K)),)),
    "apply_householder": LinalgCase(lambda rng: (rng.normal(size=(D, K)), rng.normal(size=(N, D)))),
    "householder_vectors": LinalgCase(lambda rng: (basis(rng),)),
    "coding_rate": LinalgCase(lambda rng: (rng.normal(size=(N, D)),)),
    "coding_rate_gradient": LinalgCase(lambda rng: (rng.normal(size=(N, D)),)),
    "class_coding_rate": LinalgCase(lambda rng: (rng.normal(size=(N, D)), memberships(rng))),
    "rate_reduction": LinalgCase(lambda rng: (rng.normal(size=(N, D)), memberships(rng))),
    "leverage_scores": LinalgCase(lambda rng: (rng.normal(size=(N, D)),)),
    "ridge_leverage_scores": LinalgCase(lambda rng: (rng.normal(size=(N, D)),), kwargs={"lam": 0.5}),
    "grassmann_tangent": LinalgCase(lambda rng: (basis(rng), rng.normal(size=(D, K)))),
    "grassmann_exp": LinalgCase(tangent),
    "grassmann_log": LinalgCase(lambda rng: (basis(rng), basis(rng))),
    "grassmann_retract": LinalgCase(tangent),
    "grassmann_transport": LinalgCase(lambda rng: (*tangent(rng), rng.normal(size=(D, K)))),
    "stiefel_tangent": LinalgCase(lambda rng: (basis(rng), rng.normal(size=(D, K)))),
    "stiefel_exp": LinalgCase(tangent),
    "stiefel_log": LinalgCase(
        lambda rng: ((S := basis(rng)), linalg.stiefel_exp(S, 0.3 * tangent_at(S, rng))), tol=1e-6
    ),
    "stiefel_retract": LinalgCase(tangent),
    "fix_signs": LinalgCase(lambda rng: (rng.normal(size=(D, K)),)),
    "randomized_svd": LinalgCase(
        lambda rng: (rng.normal(size=(N, D)), K), kwargs={"rng": "rng"}, batched=False, result=tuple
    ),
    "truncated_eigh": LinalgCase(lambda rng: (symmetric(rng, 30), K), batched=False, torch=False, result=tuple),
    "truncated_svd": LinalgCase(lambda rng: (rng.normal(size=(40, 30)), K), batched=False, torch=False, result=tuple),
    "cca": LinalgCase(two_tables, batched=False, result=tuple),
    "svcca": LinalgCase(two_tables, batched=False),
    "pwcca": LinalgCase(two_tables, batched=False),
    "linear_cka": LinalgCase(lambda rng: (rng.normal(size=(N, D)), rng.normal(size=(N, 4)))),
    "kernel_cka": LinalgCase(lambda rng: (gram(rng), gram(rng))),
    "sinkhorn": LinalgCase(lambda rng: (rng.normal(size=(N, D)),), kwargs={"tol": 1e-12}),
    "doubly_stochastic": LinalgCase(lambda rng: (symmetric(rng),), kwargs={"tol": 1e-12}),
    "orthogonal_matching_pursuit": LinalgCase(lambda rng: coded(rng)[:2], kwargs={"n_nonzero": 3}, batched=False),
    "ksvd_update": LinalgCase(coded, batched=False, result=tuple),
    "mod_update": LinalgCase(lambda rng: coded(rng)[1:], batched=False, result=tuple),
    "procrustes": LinalgCase(
        lambda rng: (rng.normal(size=(N, 4)), rng.normal(size=(N, 4))), batched=False, result=lambda f: f.rotation
    ),
    "ridge_map": LinalgCase(
        lambda rng: (rng.normal(size=(N, 4)), rng.normal(size=(N, 2))),
        batched=False,
        torch=False,
        result=lambda f: f.alpha,
    ),
    "top_k": LinalgCase(
        lambda rng: (rng.normal(size=(4, D)), rng.normal(size=(N, D)), 3), batched=False, result=lambda out: out.scores
    ),
}


def tangent_at(S, rng):
    return linalg.stiefel_tangent(S, rng.normal(size=S.shape))


EXEMPT = {
    "random_orthogonal": "takes no array: its tests draw from both kinds of generator",
    "random_stiefel": "takes no array: its tests draw from both kinds of generator",
    "procrustes_from_moments": "takes gathered moments, which are float64 NumPy whatever went in",
    "ridge_from_moments": "takes gathered moments, which are float64 NumPy whatever went in",
    "cca_from_moments": "takes gathered moments, which are float64 NumPy whatever went in",
    "linear_cka_from_moments": "takes gathered moments, which are float64 NumPy whatever went in",
    "normalized_adjacency": "takes SciPy's sparse matrices",
    "knn_graph": "returns SciPy's sparse matrices",
    "factored_modularity": "compares labels and counts",
    "graph_modularity": "compares labels and counts",
    "factored_conductance": "compares labels and counts",
    "discretize_embedding": "returns labels",
    "clustering_accuracy": "compares labels",
    "align_labels": "compares labels",
    "label_hits": "compares labels",
    "recall_at_k": "counts",
    "reciprocal_rank": "counts",
    "mean_average_precision": "counts",
}

FUNCTIONS = {name: f for name, f in public_members("polyspan.linalg").items() if inspect.isfunction(f)}


def test_every_function_has_a_case_or_a_reason():
    assert set(FUNCTIONS) == set(CASES) | set(EXEMPT)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_function_keeps_the_promises_of_the_ground_floor(name):
    check_linalg(FUNCTIONS[name], CASES[name])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_docstring_says_what_a_function_is_for(name):
    text = inspect.getdoc(FUNCTIONS[name])
    assert text
    assert text[0].isupper()
    assert text.split("\n")[0].endswith((".", ":", "?"))


def test_numpy_alone_loads_no_torch():
    import subprocess
    import sys

    code = (
        "import numpy, sys; from polyspan import linalg; linalg.nearest_isometry(numpy.eye(3)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
