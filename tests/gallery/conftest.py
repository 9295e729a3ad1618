import copy
import json

import pytest

from polyspan.catalog import entries
from polyspan.gallery import build_gallery

METHOD = [0.91, 0.93, 0.89, 0.92, 0.9]
BASELINE = [0.71, 0.7, 0.69, 0.73, 0.68]


def interval(values):
    return [min(values), max(values)]


def world(name, role, verdict, method, baseline, gain):
    arms = {"method": method, "baseline": baseline, "least squares": [x - 0.05 for x in baseline]}
    return {
        "world": name,
        "role": role,
        "verdict": verdict,
        "gain": sum(gain) / 2,
        "interval": gain,
        "means": {arm: sum(v) / len(v) for arm, v in arms.items()},
        "intervals": {arm: interval(v) for arm, v in arms.items()},
        "trials": arms,
        "seeds": [0, 1, 2, 3, 4],
        "data_digest": "5db2d9e1405b8ccb1fcb2ba3bcb8f6f486e9c96031db909a5a3da87b27b0acd2",
        "wall_s": 1.25,
        "peak_bytes": 3 * 2**20,
    }


GAINS = {"holds": [0.15, 0.25], "fails": [-0.3, -0.1], "open": [-0.1, 0.2]}


@pytest.fixture(scope="session")
def make_evidence():
    """Evidence whose parts fit together: ``make_evidence(slug, verdict="holds", level="quick", role="main")``."""

    def make(slug, verdict="holds", level="quick", role="main"):
        method, baseline = (BASELINE, METHOD) if verdict == "fails" else (METHOD, BASELINE)
        main = world("planted" if role == "main" else "user", role, verdict, method, baseline, list(GAINS[verdict]))
        control = world("two-maps", "control", "fails", BASELINE, METHOD, [-0.05, 0.01])
        return copy.deepcopy({
            "schema": 1,
            "slug": slug,
            "level": level,
            "statement": f"The method of {slug} beats its baseline.",
            "method": "the method in words",
            "baseline": "the strongest fair baseline in words",
            "metric": "recall@1, share of queries",
            "better": "higher",
            "margin": 0.02,
            "why": "It wins where anchors are few.",
            "verdict": verdict,
            "control": "two-maps",
            "control_ok": True,
            "worlds": [main, control],
            "machine": {"python": "3.11.7", "cpu": "some CPU", "cores": 2, "memory_bytes": 8 * 2**30, "gpu": None},
            "versions": {"polyspan": "0.1.0", "numpy": "2.4.6"},
            "created": "2026-11-25T04:00:00Z",
            "wall_s": 3.1,
            "peak_bytes": 5 * 2**20,
        })  # fmt: skip

    return make


@pytest.fixture(scope="session")
def put():
    def write(folder, evidence, name=None):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (name or f"{evidence['slug']}.{evidence['level']}.json")
        path.write_text(json.dumps(evidence), "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def folders(tmp_path_factory, make_evidence, put):
    """The project's evidence about three systems, and a user's about two."""
    own, mine = (tmp_path_factory.mktemp("evidence") / name for name in ("project", "mine"))
    first, second, third, fourth = [e.slug for e in entries()][:4]
    put(own, make_evidence(first))
    put(own, make_evidence(first, "open", "standard"))
    put(own, make_evidence(second, "fails"))
    put(own, make_evidence(third, "open"))
    put(mine, make_evidence(first, "fails"))
    put(mine, make_evidence(first, role="user"), f"{first}.user.json")
    put(mine, make_evidence(fourth))
    return own, mine


@pytest.fixture(scope="session")
def site(tmp_path_factory, folders):
    return build_gallery(tmp_path_factory.mktemp("site") / "out", evidence=list(folders), project=folders[0])
