import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import ortho_group

from polyspan.cli import run
from polyspan.cli._output import EXTRA, FILE, STUCK, USAGE
from polyspan.errors import MissingExtra, NotConverged
from polyspan.io import read_array, write_array


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYSPAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def spaces(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 8)).astype(np.float32)
    Y = X @ ortho_group.rvs(8, random_state=0).astype(np.float32) + 0.05 * rng.normal(size=(120, 8)).astype(np.float32)
    write_array(tmp_path / "old.npy", X)
    write_array(tmp_path / "new.npy", Y)
    return tmp_path, X, Y


def fit(folder, *more):
    return run(
        ["align", "fit", str(folder / "old.npy"), str(folder / "new.npy"), "-o", str(folder / "map.safetensors"), *more]
    )


def test_from_two_files_to_a_map_to_moved_vectors_to_a_score(spaces, capsys):
    folder, _, Y = spaces
    assert fit(folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["held_out"]["recall"]["twin@1"] == 1.0
    assert report["n_anchors"] == 120
    assert (
        run(
            [
                "align",
                "apply",
                str(folder / "map.safetensors"),
                str(folder / "old.npy"),
                "-o",
                str(folder / "moved.npy"),
            ]
        )
        == 0
    )
    moved = read_array(folder / "moved.npy")
    cosine = np.sum(moved * Y, axis=1) / np.linalg.norm(moved, axis=1) / np.linalg.norm(Y, axis=1)
    assert cosine.min() > 0.95
    capsys.readouterr()
    assert (
        run(
            [
                "align",
                "score",
                str(folder / "map.safetensors"),
                str(folder / "old.npy"),
                str(folder / "new.npy"),
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["recall"]["twin@1"] == 1.0


def test_the_way_back_undoes_the_way_there(spaces):
    folder, X, _ = spaces
    assert fit(folder, "--metric", "dot") == 0
    there, back = folder / "there.npy", folder / "back.npy"
    assert run(["align", "apply", str(folder / "map.safetensors"), str(folder / "old.npy"), "-o", str(there)]) == 0
    assert run(["align", "apply", str(folder / "map.safetensors"), str(there), "-o", str(back), "--inverse"]) == 0
    np.testing.assert_allclose(read_array(back), X, atol=1e-4)


def test_ids_of_a_table_are_kept(spaces):
    folder, X, _ = spaces
    ids = np.array([f"item {i}" for i in range(len(X))])
    write_array(folder / "table.parquet", X, ids=ids)
    assert fit(folder) == 0
    assert (
        run(
            [
                "align",
                "apply",
                str(folder / "map.safetensors"),
                str(folder / "table.parquet"),
                "-o",
                str(folder / "moved.parquet"),
            ]
        )
        == 0
    )
    import pyarrow.parquet as pq

    found = pq.read_table(folder / "moved.parquet")
    assert found.column("id").to_pylist() == ids.tolist()


@pytest.mark.slow
def test_an_apply_that_is_killed_in_the_middle_goes_on_and_ends_with_the_same_bytes(spaces):
    import signal
    import time

    folder, _, _ = spaces
    assert fit(folder) == 0
    write_array(folder / "large.npy", np.random.default_rng(2).normal(size=(600_000, 8)).astype(np.float32))
    words = [
        sys.executable,
        "-m",
        "polyspan.cli",
        "align",
        "apply",
        "map.safetensors",
        "large.npy",
        "--batch-rows",
        "2000",
    ]
    started = subprocess.Popen(
        [*words, "-o", "out.npy"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = folder / ".out.npy.partial"
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline and started.poll() is None and not (partial.exists() and partial.stat().st_size > 0)
    ):
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (folder / "out.npy").exists()
    subprocess.run([*words, "-o", "out.npy"], cwd=folder, check=True, capture_output=True)
    subprocess.run([*words, "-o", "whole.npy"], cwd=folder, check=True, capture_output=True)
    assert (folder / "out.npy").read_bytes() == (folder / "whole.npy").read_bytes()
    assert not partial.exists()


def test_auto_tries_every_family_and_a_picture_is_drawn_twice_alike(spaces, capsys):
    folder, _, _ = spaces
    assert fit(folder, "--method", "auto", "--plot", str(folder / "a.svg"), "--json") == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert {row["aligner"] for row in table} >= {"orthogonal", "ridge", "mean-shift", "no-map"}
    assert fit(folder, "--method", "auto", "--plot", str(folder / "b.svg")) == 0
    assert (folder / "a.svg").read_bytes() == (folder / "b.svg").read_bytes()


def test_files_that_are_not_paired_are_said(spaces, capsys):
    folder, _, Y = spaces
    write_array(folder / "new.npy", np.random.default_rng(1).permutation(Y))
    assert fit(folder) == 0
    assert "do not seem to belong together" in capsys.readouterr().err


def test_a_map_for_another_model_is_refused(spaces, capsys):
    folder, _, _ = spaces
    assert fit(folder, "--source-model", "mini-1", "--target-model", "mini-2") == 0
    code = run(
        [
            "align",
            "apply",
            str(folder / "map.safetensors"),
            str(folder / "old.npy"),
            "-o",
            str(folder / "x.npy"),
            "--source-model",
            "other",
        ]
    )
    assert code == FILE
    assert "'mini-1'" in capsys.readouterr().err
    assert not (folder / "x.npy").exists()


def test_a_broken_file_is_one_line_and_its_own_exit_code(tmp_path, capsys):
    (tmp_path / "old.npy").write_bytes(b"\x93NUMPY\x01\x00")
    write_array(tmp_path / "new.npy", np.eye(3))
    assert fit(tmp_path) == FILE
    said = capsys.readouterr().err
    assert said.startswith("polyspan: CorruptFile:")
    assert said.count("\n") == 1
    assert "old.npy" in said


@pytest.mark.parametrize(
    "argv",
    [
        ["align", "fit"],
        ["nonsense"],
        ["claim"],
        ["show", "zzzz"],
        ["list", "--family", "none"],
        ["claim", "weyl-polyhedron"],
    ],
)
def test_wrong_use_is_one_line_and_exit_code_two(argv, capsys):
    assert run(argv) == USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(MissingExtra("x"), EXTRA), (NotConverged("x"), STUCK), (KeyboardInterrupt(), 130)]
)
def test_other_expected_ends_have_their_codes(error, code, monkeypatch, capsys):
    from polyspan.cli import systems

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(systems, "show_table", fail)
    assert run(["list"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_list_and_show_tell_what_there_is(capsys):
    assert run(["list", "attributed", "graph", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["slug"] == "s2cag"
    assert run(["list", "--working"]) == 0
    names, *rows = capsys.readouterr().out.splitlines()
    assert names == "system\tstatus\tfamily\twhat it does"
    assert "canonicalize\tworking\talign" in {row.rsplit("\t", 1)[0] for row in rows}
    assert run(["show", "GCR"]) == 0
    assert "arXiv:2308.01547" in capsys.readouterr().out
    assert run(["show", "canonicalize", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["date"] == "2026-02-19"


def test_a_claim_writes_evidence_and_check_turns_a_verdict_into_an_exit_code(home, capsys, monkeypatch):
    import polyspan.claims.canonicalize as module

    monkeypatch.setattr(module, "ResidualMLPMap", lambda **_: module.RidgeMap())  # beside the claim, and long to train

    def against_least_squares(pair, seed):
        arms = module.trial(pair, seed)
        return arms | {"baseline": arms["least squares"]}

    small = {"trial": against_least_squares, "levels": {"quick": ("planted",)}}
    claim = module.CLAIM.__class__(**{**vars(module.CLAIM), **small})
    monkeypatch.setattr(module, "CLAIM", claim)
    assert run(["claim", "canonicalize", "--seeds", "4", "--json", "--check"]) == 0
    evidence = json.loads(capsys.readouterr().out)[0]
    assert evidence["verdict"] == "holds"
    assert (home / "evidence" / "canonicalize.quick.json").exists()
    assert run(["claim", "canonicalize", "--seeds", "2", "--check"]) == 1
    assert "open" in capsys.readouterr().out


def test_of_all_claims_those_that_lack_a_package_are_left_out_and_a_named_one_is_an_error(home, capsys, monkeypatch):
    from polyspan import claims

    def lacking(claim, **_):
        raise MissingExtra(f"{claim.slug} needs a package")

    monkeypatch.setattr(claims, "measure_claim", lacking)
    assert run(["claim", "--family", "align"]) == 0
    assert "canonicalize\tleft out: canonicalize needs a package" in capsys.readouterr().out
    assert not list((home / "evidence").glob("*.json"))
    assert run(["claim", "canonicalize"]) == 4
    assert "canonicalize needs a package" in capsys.readouterr().err


def test_a_claim_runs_on_a_users_own_file(tmp_path, capsys):
    from polyspan.claims.canonicalize import planted
    from polyspan.io import write_members

    write_members(tmp_path / "mine.npz", planted(3)._asdict())
    assert run(["claim", "canonicalize", "--data", str(tmp_path / "mine.npz"), "--seeds", "3", "--json"]) == 0
    worlds = json.loads(capsys.readouterr().out)[0]["worlds"]
    assert [(w["role"], w["verdict"]) for w in worlds][1] == ("control", "fails")


def test_doctor_says_what_is_there_and_what_is_wrong_with_a_file(tmp_path, capsys):
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extras"]["dask"]["distributed"] is True
    assert "numpy" in found["versions"]
    write_array(tmp_path / "x.npy", np.zeros((3, 4)))
    assert run(["doctor", str(tmp_path / "x.npy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no")
    assert run(["doctor", str(tmp_path / "bad.npz")]) == FILE


def test_results_go_to_stdout_and_talk_to_stderr_also_in_a_pipe(spaces):
    folder, _, _ = spaces
    done = subprocess.run(
        [sys.executable, "-m", "polyspan.cli", "align", "fit", "old.npy", "new.npy", "-o", "m.safetensors", "--json"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["map"] == "m.safetensors"


def test_a_reader_that_stops_listening_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m polyspan.cli list | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
