"""What an upgrade says next can be done as it stands, from any folder, and what cannot be done is said before work."""

import json
import shlex

import numpy as np
import pytest
from scipy.stats import ortho_group

from polyspan.cli import run
from polyspan.errors import WrongContent
from polyspan.io import read_array, write_array

N, D = 150, 10
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(N, D)).astype(np.float32)
NEW = OLD @ ortho_group.rvs(D, random_state=0).astype(np.float32) + 0.2 * RNG.normal(size=(N, D)).astype(np.float32)
MODULE = """
from polyspan.io import read_array
NEW = read_array({path!r})
calls = []
def encode(texts):
    calls.append(len(texts))
    return NEW[[int(text.split()[1]) for text in texts]]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose name needs quotes, with vectors, texts and an encoder in it, as the working folder."""
    made = tmp_path / "ein 'Ordner' für $HOME"
    made.mkdir()
    write_array(made / "new.npy", NEW)
    write_array(made / "x.npy", OLD)
    (made / "texts.txt").write_text("".join(f"text {i}\n" for i in range(N)))
    (made / "message_encoder.py").write_text(MODULE.format(path=str(made / "new.npy")))
    monkeypatch.syspath_prepend(made)
    monkeypatch.delitem(__import__("sys").modules, "message_encoder", raising=False)
    monkeypatch.chdir(made)
    return made


def said(capsys, line=None, want=0):
    """Run a command line as a shell takes it; return what it prints by the first column, and what it says."""
    assert run(shlex.split(line)[1:]) == want, capsys.readouterr().err
    out, err = capsys.readouterr()
    return dict(row.split("\t", 1) for row in out.splitlines() if "\t" in row), err


PLAN = (
    "polyspan upgrade plan x.npy --encoder message_encoder:encode --texts texts.txt --sample 90 -k 3 --state 'st ate'"
)


def planned(capsys):
    return said(capsys, PLAN)[1].rpartition("next: ")[2].strip()


def test_commands_that_are_printed_lead_through_the_upgrade(folder, capsys):
    assert planned(capsys) == "polyspan upgrade apply 'st ate' --apply"
    told, _ = said(capsys, "polyspan upgrade apply 'st ate' --strategy gallery --batch-rows 70 --seed 3")
    assert told["to do it"] == "polyspan upgrade apply 'st ate' --strategy gallery --batch-rows 70 --seed 3 --apply"
    told, _ = said(capsys, told["to do it"])
    told, _ = said(capsys, told["next"])
    assert told["verdict"] == "good"
    told, _ = said(capsys, told["next"])
    carried = read_array(folder / "x.npy")
    assert np.linalg.norm(carried - NEW, axis=1).min() > 1e-3
    told, _ = said(capsys, told["to go back"])
    np.testing.assert_array_equal(read_array(folder / "x.npy"), OLD)
    told, _ = said(capsys, told["to go on after all"])
    told, _ = said(capsys, told["next"])
    told, _ = said(capsys, told["next"])
    # The way that was chosen, not the one that is recommended; batches are of another size.
    np.testing.assert_allclose(read_array(folder / "x.npy"), carried, atol=1e-5)
    told, _ = said(capsys, told["to remove them"])
    assert "not in use" in told["removed"]


def test_a_share_is_in_the_command_and_is_taken_again_after_a_roll_back(folder, capsys):
    planned(capsys)
    told, _ = said(capsys, "polyspan upgrade apply 'st ate' --strategy backfill --share 0.4")
    assert "--strategy backfill --share 0.4 --apply" in told["to do it"]
    told, _ = said(capsys, told["to do it"])
    for verb in ("check", "cutover"):
        said(capsys, f"polyspan upgrade {verb} 'st ate'")
    once = read_array(folder / "x.npy")
    assert 0.2 < (np.linalg.norm(once - NEW, axis=1) < 1e-3).mean() < 0.6
    told, _ = said(capsys, "polyspan upgrade rollback 'st ate'")
    told, _ = said(capsys, told["to go on after all"])
    for verb in ("check", "cutover"):
        said(capsys, f"polyspan upgrade {verb} 'st ate'")
    np.testing.assert_array_equal(read_array(folder / "x.npy"), once)


@pytest.mark.parametrize("options", ["--strategy dance", "--strategy stay", "--share 0.4 --strategy gallery"])
def test_what_would_be_refused_is_refused_before_it_is_promised(folder, capsys, options):
    planned(capsys)
    _, err = said(capsys, f"polyspan upgrade apply 'st ate' {options}", want=2)
    assert "--strategy must be one of query, gallery, backfill, re-embed" in err or "--share must lie in (0, 1)" in err


def test_a_store_is_found_from_another_folder(folder, capsys, monkeypatch, tmp_path):
    planned(capsys)
    monkeypatch.chdir(tmp_path)
    state = shlex.quote(str(folder / "st ate"))
    told, _ = said(capsys, f"polyspan upgrade apply {state} --strategy re-embed --apply")
    assert told["made now"] == f"{N} vectors"
    assert said(capsys, f"polyspan upgrade check {state}")[0]["verdict"] == "good"


def test_nothing_but_embedding_asks_for_the_texts(folder, capsys):
    planned(capsys)
    (folder / "texts.txt").rename(folder / "away.txt")
    for line in (
        "apply 'st ate' --strategy gallery --apply",
        "check 'st ate'",
        "cutover 'st ate'",
        "rollback 'st ate'",
    ):
        said(capsys, f"polyspan upgrade {line}")
    np.testing.assert_array_equal(read_array(folder / "x.npy"), OLD)
    _, err = said(capsys, "polyspan upgrade apply 'st ate' --strategy re-embed --apply", want=3)
    assert "texts.txt" in err


def test_a_failed_check_says_what_then(folder, capsys):
    planned(capsys)
    said(capsys, "polyspan upgrade apply 'st ate' --strategy gallery --apply")
    told, _ = said(capsys, "polyspan upgrade check 'st ate' --bound 1", want=1)
    assert told["to give these vectors up"] == "polyspan upgrade cutover 'st ate' --forget"
    for option, message in (("--tol -1", "tol must"), ("--sample -1", "n_embedded must"), ("--bound 2", "bound must")):
        assert message in said(capsys, f"polyspan upgrade check 'st ate' {option}", want=2)[1]


def test_queries_are_carried_by_the_command_that_is_printed(folder, capsys):
    planned(capsys)
    told, _ = said(capsys, "polyspan upgrade apply 'st ate' --strategy query --apply")
    write_array(folder / "queries.npy", NEW[:20])
    said(capsys, told["to use it"])
    assert read_array(folder / "carried.npy").shape == (20, D)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-k 0", "-k must be at least 1"),
        ("--loss 1.5", "--loss must be"),
        ("--price -2", "--price must be at least 0"),
        ("--plot plan.xyz", "--plot must end in"),
    ],
)
def test_options_are_looked_at_before_anything_is_embedded(folder, capsys, option, message):
    kept = " ".join(part for part in PLAN.split(" ") if part not in ("-k", "3")) if option.startswith("-k") else PLAN
    _, err = said(capsys, f"{kept} {option}", want=2)
    assert message in err
    assert not (folder / "st ate" / "anchors.json").exists()


def test_texts_are_split_at_line_ends_alone_and_an_id_stands_once(folder, capsys):
    lines = [f"text {i}\x0c part\u2028two" for i in range(N)]
    (folder / "texts.txt").write_text("\r\n".join(lines) + "\r\n", newline="")
    planned(capsys)
    (folder / "texts.txt").write_text("\n".join(lines[:-1]) + "\n")
    assert "texts must have one a row, 150, got 149" in said(capsys, PLAN, want=2)[1]
    rows = [{"id": i, "text": f"text {i}"} for i in range(N)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": 7, "text": "text 8"}]))
    _, err = said(capsys, PLAN.replace("texts.txt", "texts.jsonl"), want=3)
    assert WrongContent.__name__ in err
    assert "id 7 twice" in err
