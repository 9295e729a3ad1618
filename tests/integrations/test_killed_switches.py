"""Cut over, roll back and forget of stores in files, killed by the system at every change of a folder."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyspan.align import OrthogonalMap
from polyspan.integrations import Encoder, Upgrade, open_vector_table
from polyspan.io import read_json, swap_in, sweep_temporaries, write_array

N, D = 120, 6
OLD = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
NEW = OLD @ np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0].astype(np.float32)
TEXTS = dict(enumerate(f"text {i}" for i in range(N)))
POINTS = 18
"""More than any verb changes a folder, so that the last run is not killed."""

# One process imports the library and forks one for each kill, which comes before change number 0, 1, 2 of a folder.
WORK = """
import os, signal, sys
from polyspan.integrations import Upgrade, open_vector_table

def kill_at(number):
    done = []
    def counted(real):
        def call(*arguments, **options):
            if len(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(real)
            return real(*arguments, **options)
        return call
    for name in ("replace", "rename", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

name, place, points, *verbs = sys.argv[1:]
for verb in verbs:
    for number in range(int(points)):
        child = os.fork()
        if child == 0:
            try:
                folder = f"{place}/{verb} {number}"
                upgrade = Upgrade(folder + "/state", open_vector_table(folder + "/" + name))
                kill_at(number)
                getattr(upgrade, {"cut": "cut_over", "roll": "roll_back", "forget": "forget"}[verb.split()[0]])()
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def make_store(path):
    if path.suffix == ".parquet":
        lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
        pq.write_table(pa.table({"id": list(range(N)), "vector": lists}), path)
    elif path.suffix == ".faiss":
        faiss = pytest.importorskip("faiss")
        index = faiss.IndexFlatL2(D)
        index.add(OLD)
        faiss.write_index(index, str(path))
    else:
        write_array(path, OLD)


def upgrade_in(folder, name):
    encoder = Encoder("new-model", lambda texts: NEW[[int(text.split()[1]) for text in texts]])
    return Upgrade(folder / "state", open_vector_table(folder / name), encoder=encoder, texts=TEXTS)


def end_state(folder):
    """Every file of a folder with its bytes; of the upgrade's own notes all but the times."""
    sweep_temporaries(folder / "state", older_than_s=0)
    for place in folder.glob("*.upgrade"):
        sweep_temporaries(place, older_than_s=0)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "state/upgrade.json" in found:
        notes = read_json(folder / "state" / "upgrade.json")
        found["state/upgrade.json"] = notes | {"steps": sorted(notes["steps"])}
    return found


STARTS = {
    "cut over": "checked",
    "roll back": "cut",
    "roll back what was killed": "swapped",
    "forget the old": "cut",
    "forget the next": "checked",
}
"""Each verb with the state that it begins from."""


def checked(folder, name):
    """A store whose next vectors passed the check."""
    folder.mkdir()
    make_store(folder / name)
    upgrade = upgrade_in(folder, name)
    upgrade.plan(n_anchors=60, k=3, old_model="old-model", candidates={"far": OrthogonalMap()})
    upgrade.begin("gallery")
    upgrade.fill(verbose=False)
    assert upgrade.check(n_embedded=0).ok


def call(upgrade, verb):
    getattr(upgrade, {"cut": "cut_over", "roll": "roll_back", "forget": "forget"}[verb.split()[0]])()


@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "x.faiss"])
def test_a_verb_that_is_killed_at_any_change_of_a_folder_ends_when_said_again(tmp_path, name):
    checked(tmp_path / "checked", name)
    shutil.copytree(tmp_path / "checked", tmp_path / "cut")
    upgrade_in(tmp_path / "cut", name).cut_over()
    old, new = ((tmp_path / place / name).read_bytes() for place in ("checked", "cut"))
    # What a cut-over leaves that was killed when the file was in its place and nothing was tidied yet.
    swapped = shutil.copytree(tmp_path / "checked", tmp_path / "swapped")
    work, suffix = swapped / f"{name}.upgrade", (swapped / name).suffix
    swap_in(swapped / name, work / f"next{suffix}", work / f"before{suffix}")
    folders = {verb: [tmp_path / f"{verb} {number}" for number in range(POINTS)] for verb in STARTS}
    for verb, places in folders.items():
        for place in places:
            shutil.copytree(tmp_path / STARTS[verb], place)
    child = subprocess.run(
        [sys.executable, "-c", WORK, name, str(tmp_path), str(POINTS), *STARTS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    ends = np.array([int(line) for line in child.stdout.split()]).reshape(len(STARTS), POINTS)
    for verb, codes in zip(STARTS, ends.tolist(), strict=True):
        killed, places = codes.count(-signal.SIGKILL), folders[verb]
        assert codes == [-signal.SIGKILL] * killed + [0] * (POINTS - killed), child.stderr
        assert 3 < killed < POINTS
        for place in places[: killed + 1]:
            assert (place / name).read_bytes() in (old, new), "a whole file stands there, the old or the new one"
            call(upgrade_in(place, name), verb)
        unbroken = end_state(places[killed])
        assert unbroken[name] == (new if verb in ("cut over", "forget the old") else old)
        for place in places[:killed]:
            assert end_state(place) == unbroken, f"killed before change {place.name}"
            facts = upgrade_in(place, name).table.facts()
            assert (facts.next_dim, facts.has_before) == (None, verb == "cut over")
            assert facts.space["model"] == ("old-model" if unbroken[name] == old else "new-model")
