"""Every public estimator, claim and reader keeps its contract; a new one is found here by itself."""

import inspect

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator

from polyspan import catalog
from polyspan.align import Aligner
from polyspan.claims import find_claim
from polyspan.testing import check_control, check_trial, public_estimators, public_members

ESTIMATORS = {name: kind for name, kind in public_estimators().items() if kind is not Aligner}
# Claims whose trials take several seconds; their tests are slow ones.
DEAR = {
    "concrete-merging", "convergent-learning", "crate", "diffusion-subspace", "flora-nd", "grassmann-class",
    "grassmann-mixing", "householder-projector", "lambda-orthogonality", "lhdsc", "mhs-vm", "mlc",
    "orthogonal-compatible-alignment", "polysae", "rotation-continuity", "sub-moe", "ulsam", "unified-embedding",
}  # fmt: skip
# Parameters that say how long is trained, of which a dtype does not depend.
SHORT = ("n_rounds", "max_epochs", "max_steps", "max_iter")
WORKING = [entry.slug for entry in catalog.entries() if entry.status == "working"]
CLAIMS = [pytest.param(slug, marks=[pytest.mark.slow] * (slug in DEAR)) for slug in WORKING]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_estimator_is_cloneable_and_its_init_only_assigns(name):
    made = ESTIMATORS[name]()
    copy = clone(made)
    assert copy.get_params().keys() == made.get_params().keys()
    assert not [key for key in vars(made) if key.endswith("_") and not key.startswith("_")]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_estimators_tests_run_scikit_learns_checks(name):
    """The checks themselves run beside each estimator; here stands that they were not forgotten."""
    from pathlib import Path

    stem = name.rsplit(".", 1)[-1]
    texts = [p.read_text("utf-8") for p in Path(__file__).parent.rglob("test_*.py")]
    assert any("parametrize_with_checks" in text and f"{stem}(" in text for text in texts) or stem in {
        "MeanShift",
        "IdentityMap",
    }, f"no test runs parametrize_with_checks on {stem}"


@pytest.mark.parametrize("name", ["align.MeanShift", "align.IdentityMap"])
def test_a_map_that_keeps_the_width_passes_the_checks_whose_target_has_it(name):
    """Scikit-learn's checks fit a one-column target, which such a map must refuse: the refusal is what is checked."""
    passed, refused = 0, []
    for estimator, check in estimator_checks_generator(ESTIMATORS[name]()):
        try:
            check(estimator)
            passed += 1
        except ValueError as error:
            refused.append(str(error))
        except AssertionError as error:  # a check that expects one certain refusal wraps any other
            if not isinstance(error.__cause__, ValueError):
                raise
            refused.append(str(error.__cause__))
    assert passed >= 15
    assert all("one width" in text for text in refused)


@pytest.mark.parametrize("slug", CLAIMS)
def test_a_claim_fails_in_its_control_world(slug):
    # Three seeds are enough here: each claim's own tests look at its worlds more closely. Gains of the masks of
    # concrete-merging differ much from seed to seed.
    check_control(find_claim(slug), seeds=None if slug == "concrete-merging" else 3)


@pytest.mark.parametrize("slug", CLAIMS)
def test_a_claim_repeats_and_shares_its_data(slug):
    check_trial(find_claim(slug))


def test_every_claim_belongs_to_a_working_system_and_says_what_it_measures():
    from pathlib import Path

    import polyspan.claims

    folder = Path(inspect.getfile(polyspan.claims)).parent
    slugs = sorted(p.stem.replace("_", "-") for p in folder.glob("[!_]*.py"))
    assert slugs == sorted(WORKING)
    for slug in slugs:
        claim = find_claim(slug)
        assert claim.statement.endswith(".")
        assert all((claim.method, claim.baseline, claim.metric))
        assert "quick" in claim.levels


def test_every_public_member_has_a_docstring():
    for package in (
        "align", "cluster", "checkpoints", "learn", "nn", "linalg", "io", "run", "data", "claims", "catalog", "gallery",
    ):  # fmt: skip
        for name, member in public_members(f"polyspan.{package}").items():
            if inspect.isclass(member) or inspect.isfunction(member):
                assert inspect.getdoc(member), f"polyspan.{package}.{name} has no docstring"


def test_float32_stays_float32_in_every_transformer():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 4)).astype(np.float32)
    for name, kind in ESTIMATORS.items():
        if hasattr(kind, "transform") and "float32" in get_tags(kind()).transformer_tags.preserves_dtype:
            # Rounds take directions away, and there are four here. Classifiers that transform as well want classes; all
            # others take rows or nothing.
            known = kind().get_params()
            model = kind(**{option: 1 if option == "n_rounds" else 2 for option in SHORT if option in known})
            found = model.fit(X, np.arange(30) % 3 if is_classifier(model) else X).transform(X)
            assert found.dtype == np.float32, f"{name} turned float32 into {found.dtype}"
