"""No clusterer reads labels: true classes, shuffled ones and none give the same answer, for all that is public."""

import warnings

import numpy as np
import pytest
from sklearn.base import ClusterMixin, clone

import polyspan.cluster
from polyspan.cluster import (
    S2CAG,
    DeepSelfExpressiveClustering,
    ElasticNetSubspaceClustering,
    LeastSquaresSubspaceClustering,
    LowRankGaussianMixture,
    ManifoldLinearizingClustering,
    ModularityS2CAG,
    NestedMatryoshkaClustering,
    OMPSubspaceClustering,
    ThresholdingSubspaceClustering,
)
from polyspan.data import planted_subspaces

BUDGET = {"tcr_epochs": 1, "max_epochs": 1, "hidden": 16, "n_components": 8, "batch_size": 30, "device": "cpu"}
CLUSTERERS = [
    S2CAG(3, random_state=0),
    ModularityS2CAG(3, random_state=0),
    ElasticNetSubspaceClustering(3, random_state=0),
    OMPSubspaceClustering(3, n_nonzero=3, random_state=0),
    LeastSquaresSubspaceClustering(3, random_state=0),
    LeastSquaresSubspaceClustering(3, power=2, random_state=0),
    ThresholdingSubspaceClustering(3, random_state=0),
    DeepSelfExpressiveClustering(3, random_state=0, max_epochs=(5, 5, 5), min_epochs=2),
    LowRankGaussianMixture(3, 2, random_state=0, n_init=2),
    LowRankGaussianMixture(3, 2, algorithm="ksubspaces", random_state=0, n_init=2),
    LowRankGaussianMixture(3, 2, algorithm="denoising", random_state=0, n_init=2, max_iter=5),
    ManifoldLinearizingClustering(3, random_state=0, **BUDGET),
    NestedMatryoshkaClustering(3, random_state=0, max_steps=3),
]


def learnt(estimator):
    """Return all arrays and numbers that a fit left behind, seconds apart."""
    found = {name: value for name, value in vars(estimator).items() if name.endswith("_") and not name.startswith("_")}
    return {name: np.asarray(value) for name, value in found.items() if isinstance(value, np.ndarray | float | int)}


@pytest.mark.parametrize("estimator", CLUSTERERS, ids=lambda made: type(made).__name__)
def test_true_classes_shuffled_ones_and_none_give_the_same_fit(estimator):
    world = planted_subspaces(0, n_per=20, d=8, k=2, n_subspaces=3, noise=0.05)
    X = world.points.astype(np.float32)
    shuffled = np.random.default_rng(1).permutation(world.labels)
    assert not np.array_equal(shuffled, world.labels)
    fits = []
    for y in (None, world.labels, shuffled):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # budgets are small on purpose
            made = clone(estimator)
            fits.append(learnt(made.fit(X, y)))
            np.testing.assert_array_equal(clone(estimator).fit_predict(X, y), made.labels_)
    assert "labels_" in fits[0]
    for other in fits[1:]:
        assert other.keys() == fits[0].keys()
        for name, value in fits[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_every_public_clusterer_has_a_case():
    public = [getattr(polyspan.cluster, name) for name in polyspan.cluster.__all__]
    kinds = {kind for kind in public if isinstance(kind, type) and hasattr(kind, "fit_predict")}
    kinds |= {kind for kind in public if isinstance(kind, type) and issubclass(kind, ClusterMixin)}
    bases = {kind for kind in kinds if kind in {base for other in kinds if other is not kind for base in other.__mro__}}
    assert kinds - bases == {type(made) for made in CLUSTERERS}
