import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from collections import Counter
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest

from polyspan import catalog
from polyspan.claims import find_claim
from polyspan.errors import MissingExtra, require

ENTRIES = catalog.entries()
WORKING = [e for e in ENTRIES if e.status == "working"]
SOURCE = Path(catalog.__file__).parents[1]
SLUGS = {
    "canonicalize", "clhe", "concrete-merging", "convergent-learning", "cospadi", "crate", "diffusion-subspace", "dolg",
    "dual-space", "dynamic-subspace-learners", "flora-nd", "frame-projections", "franca", "gaunt", "grassmann-class",
    "grassmann-mixing", "householder-projector", "hydra", "information-koopman", "invgc", "lambda-orthogonality",
    "lhdsc", "lp-sensitivity", "mbat", "metricgrids", "mhs-vm", "mlc", "multiview-video", "omg",
    "orthogonal-compatible-alignment", "plato-3d", "polysae", "ramp", "rotation-continuity", "s2cag",
    "self-organizing-gaussians", "sub-moe", "treesynth", "ulsam", "unified-embedding", "weyl-polyhedron", "xfactors",
}  # fmt: skip


def by_slug(found):
    return found.slug


def file_of(found):
    return SOURCE / (found.module.removeprefix("polyspan.").replace(".", "/") + ".py")


def test_all_42_systems_are_there_newest_first():
    assert len(SLUGS) == len(ENTRIES) == 42
    assert {e.slug for e in ENTRIES} == SLUGS
    assert [e.date for e in ENTRIES] == sorted((e.date for e in ENTRIES), reverse=True)


def test_importing_the_catalogue_and_searching_it_load_no_arrays():
    code = (
        "import sys; from polyspan import catalog; catalog.search('graph'); catalog.entry('s2cag'); "
        "assert not {'numpy', 'torch', 'scipy', 'sklearn'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_an_entry_cannot_be_changed_and_the_list_is_a_copy():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ENTRIES[0].status = "working"
    catalog.entries().clear()
    assert len(catalog.entries()) == 42


@pytest.mark.parametrize("found", ENTRIES, ids=by_slug)
def test_an_entry_is_complete(found):
    assert found.n_authors == len(found.authors)
    assert all(name == name.strip() and name for name in found.authors)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+|", found.code)
    assert found.module.startswith(f"polyspan.{found.family}.")
    assert found.family in catalog.FAMILIES
    assert all(name.isidentifier() for name in found.names)
    assert all((found.title, found.names, found.aliases, found.object))
    assert all(command.startswith("polyspan ") for command in found.commands)
    assert bool(found.snippet) == bool(found.command) == (found.status == "working")


@pytest.mark.parametrize("found", ENTRIES, ids=by_slug)
def test_a_summary_is_two_plain_sentences(found):
    assert found.summary.endswith(".")
    assert len(re.findall(r"[.](?:\s|$)", found.summary)) == 2
    assert len(found.summary) < 400


@pytest.mark.parametrize("found", ENTRIES, ids=by_slug)
def test_the_arxiv_number_is_of_the_month_of_the_date(found):
    assert re.fullmatch(r"\d{4}\.\d{5}" if found.date.year >= 2015 else r"\d{4}\.\d{4}", found.arxiv)
    months = 12 * (2000 + int(found.arxiv[:2])) + int(found.arxiv[2:4]) - (12 * found.date.year + found.date.month)
    # A paper sent in on the last day of a month is numbered in the next.
    assert months == 0 or (months == 1 and found.date.day >= 28)


def test_the_extras_are_ones_that_pip_knows():
    known = set(metadata("polyspan").get_all("Provides-Extra"))
    assert {extra for e in ENTRIES for extra in e.extras} <= known


def test_no_two_systems_answer_to_one_name():
    owners = {}
    for found in ENTRIES:
        for called in (found.slug, found.title, *found.aliases, *found.names):
            key = re.sub(r"[\W_]", "", called.casefold())
            assert owners.setdefault(key, found.slug) == found.slug, f"{called} is claimed twice"
    for kind in ("slug", "title", "arxiv", "module", "summary"):
        assert max(Counter(getattr(e, kind) for e in ENTRIES).values()) == 1, kind
    for found in ENTRIES:
        assert len({a.casefold() for a in found.aliases}) == len(found.aliases), found.slug


@pytest.mark.parametrize("found", ENTRIES, ids=by_slug)
def test_a_system_is_found_by_every_name_it_has(found):
    for called in (found.slug, found.title, *found.aliases, *found.names):
        assert catalog.entry(called) is found
        assert catalog.entry(called.upper().replace("-", " ")) is found
    assert catalog.search(found.title)[0] is found


def test_accents_and_punctuation_do_not_matter():
    assert catalog.entry("plucker mixing").slug == "grassmann-mixing"
    assert catalog.entry("lambda orthogonality").slug == "lambda-orthogonality"
    assert catalog.entry("S2 CAG").slug == "s2cag"


def test_a_misspelt_name_gives_the_nearest():
    with pytest.raises(ValueError, match="got 'canonicalise'; did you mean canonicalize"):
        catalog.entry("canonicalise")
    with pytest.raises(ValueError, match="did you mean grassmann-class or grassmann-mixing"):
        catalog.entry("grasman-clas")
    with pytest.raises(ValueError, match="got 'zzzzqqqq'; polyspan list shows all"):
        catalog.entry("zzzzqqqq")


@pytest.mark.parametrize(
    ("words", "slug"),
    [
        ("attributed graphs", "s2cag"),
        ("hubness", "invgc"),
        ("merge fine-tuned checkpoints", "concrete-merging"),
        ("6d rotations", "rotation-continuity"),
        ("gaussian splat", "omg"),
        ("Plucker", "grassmann-mixing"),
        ("migrate my embedding model", "canonicalize"),
        ("compress a language model", "cospadi"),
        ("recommend items for a playlist", "clhe"),
        ("search an index with a backward-compatible model", "orthogonal-compatible-alignment"),
        ("unlabelled time series", "frame-projections"),
        ("adversarial", "ramp"),
        ("vision mamba", "mhs-vm"),
        ("json records", "mbat"),
        ("image retrieval", "dolg"),
    ],
)
def test_plain_words_find_a_system_among_the_first_two(words, slug):
    assert slug in [e.slug for e in catalog.search(words)[:2]]


def test_the_beginning_of_a_word_finds_it_but_the_whole_word_counts_more():
    assert {e.slug for e in catalog.search("koop")} == {e.slug for e in catalog.search("koopman")}
    whole, begun = catalog.search("rotation"), catalog.search("rotat")
    assert {e.slug for e in whole} <= {e.slug for e in begun}
    ranked = [e.slug for e in catalog.search("dynamic")]  # the newer one has only "dynamics", in an alias too
    assert ranked.index("dynamic-subspace-learners") < ranked.index("information-koopman")


def test_a_rare_word_outweighs_a_frequent_one():
    assert catalog.search("subspace hubness")[0].slug == "invgc"
    assert catalog.search("hubness subspace")[0].slug == "invgc"


@pytest.mark.parametrize("words", ["xylophone", "", "  ", "the", "of a", "?!"])
def test_words_that_tell_nothing_find_nothing(words):
    assert catalog.search(words) == []


def test_an_encoder_ranks_all_systems_by_cosine():
    def encoder(texts):
        assert all(isinstance(text, str) for text in texts)
        counts = [[t.casefold().count("rotation"), t.casefold().count("graph"), 1.0] for t in texts]
        return np.array(counts, dtype=np.float32) * np.arange(1, len(texts) + 1)[:, None]  # lengths must not matter

    ranked = catalog.search("rotation " * 9, encoder=encoder)
    texts = {e.slug: f"{e.title}. {e.summary} {', '.join(e.aliases)}".casefold() for e in ENTRIES}

    def tangent(e):
        x, y = texts[e.slug].count("rotation"), texts[e.slug].count("graph")
        return (9 * x + 1) / np.sqrt((x * x + y * y + 1) * 82)

    assert len(ranked) == 42
    cosines = [tangent(e) for e in ranked]
    np.testing.assert_array_less(np.diff(cosines), 1e-6)
    assert ranked[0].slug == max(ENTRIES, key=tangent).slug


def test_an_encoder_that_returns_too_few_vectors_is_told():
    with pytest.raises(ValueError, match="encoder must return one vector of one width a text, 43 in all, got 2"):
        catalog.search("graph", encoder=lambda texts: np.ones((2, 3)))


@pytest.mark.parametrize("found", WORKING, ids=by_slug)
def test_a_working_system_has_its_module_its_names_and_its_claim(found):
    module = importlib.import_module(found.module)
    family = importlib.import_module(f"polyspan.{found.family}")
    assert module.__doc__
    for name in found.names:
        assert getattr(family, name).__module__.startswith(f"polyspan.{found.family}.")
    assert importlib.import_module(f"polyspan.claims.{found.slug.replace('-', '_')}").CLAIM.slug == found.slug
    assert find_claim(found.aliases[0]).slug == found.slug


@pytest.mark.parametrize("found", [e for e in ENTRIES if e.status == "planned"], ids=by_slug)
def test_a_planned_system_has_no_module_that_should_make_it_working(found):
    assert not file_of(found).exists(), f"{file_of(found)} is there: give {found.slug}.toml the status working"


@pytest.mark.parametrize("found", WORKING, ids=by_slug)
def test_a_snippet_runs_as_it_is_shown(found, capsys):
    assert found.snippet.count("\n") <= 8
    exec(compile(found.snippet, f"{found.slug}.toml", "exec"), {"__name__": "__main__"})
    printed = re.fullmatch(r"[\w ]+: ([\d.]+)\n", capsys.readouterr().out)
    assert printed, "a snippet says in words what it measured"
    assert float(printed[1]) > 0.7


@pytest.mark.parametrize("found", WORKING, ids=by_slug)
def test_its_commands_exist_and_the_shown_one_parses(found):
    from polyspan.cli import app

    for command in found.commands:
        _, _, unused = app.parse_commands(shlex.split(command)[1:])
        assert not unused, f"{command} is no command"
    called, bound, _ = app.parse_args(shlex.split(found.command)[1:], exit_on_error=False, print_error=False)
    assert callable(called)
    assert bound.arguments


def test_a_missing_package_is_named_with_the_command_that_brings_it():
    with pytest.raises(MissingExtra, match=r'drawing needs no_such_package; run: pip install "polyspan\[graphs\]"'):
        require("no_such_package", extra="graphs", purpose="drawing")
