import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from polyspan.errors import CorruptFile, WrongContent
from polyspan.run import Journal, map_tasks

HEADER = {"work": "squares", "version": 1}


def test_what_was_recorded_is_there_when_the_journal_is_opened_again(tmp_path):
    path = tmp_path / "deep" / "work.jsonl"
    first = Journal(path, HEADER)
    first.record("a", {"score": 0.1, "names": ["é", "\u2028"]})
    first.record("b\nc", None)
    again = Journal(path, HEADER)
    assert again.done == first.done == {"a": {"score": 0.1, "names": ["é", "\u2028"]}, "b\nc": None}
    again.remove()
    assert not path.exists()
    Journal.discard(path)


def test_a_value_is_kept_as_it_reads_back(tmp_path):
    journal = Journal(tmp_path / "work.jsonl", HEADER)
    journal.record("a", {"pair": (1, 2), "array": np.arange(2.0), "number": np.float32(0.5)})
    assert journal.done == {"a": {"pair": [1, 2], "array": [0.0, 1.0], "number": 0.5}}
    assert Journal(journal.path, HEADER).done == journal.done


def test_the_last_of_two_records_of_a_key_counts(tmp_path):
    journal = Journal(tmp_path / "work.jsonl", HEADER)
    journal.record("a", 1)
    journal.record("a", 2)
    assert Journal(journal.path, HEADER).done == {"a": 2}


def test_a_journal_torn_at_any_byte_is_repaired_and_goes_on(tmp_path):
    whole = tmp_path / "whole.jsonl"
    journal = Journal(whole, HEADER)
    for i in range(3):
        journal.record(f"{i}", i)
    data = whole.read_bytes()
    for cut in range(len(data)):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(data[:cut])
        finished = max(0, data[:cut].count(b"\n") - 1)
        opened = Journal(torn, HEADER)
        assert opened.done == {f"{i}": i for i in range(finished)}, f"cut at byte {cut}"
        for i in range(finished, 3):
            opened.record(f"{i}", i)
        assert torn.read_bytes() == data, f"cut at byte {cut}"


def test_the_journal_of_other_work_is_refused_and_each_difference_is_named(tmp_path):
    path = tmp_path / "work.jsonl"
    Journal(path, {"work": "squares", "version": 1, "old": True}).record("a", 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other work") as caught:
        Journal(path, {"work": "squares", "version": 2, "new": None})
    told = str(caught.value)
    assert "version: 1 there, 2 now" in told
    assert "old: True there, absent now" in told
    assert "new: absent there, None now" in told
    assert "squares" not in told
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("[1]\n", WrongContent, "line 1"),
        ('{"journal": 99, "header": {}}\n', WrongContent, "line 1"),
        ("{broken\n", CorruptFile, "line 1"),
        ('{"journal": 1, "header": {"work": "squares", "version": 1}}\n{"key": "a"}\n', CorruptFile, "line 2"),
        ('{"journal": 1, "header": {"work": "squares", "version": 1}}\n{"ke\n{"key": "a", "value": 1}\n',
         CorruptFile, "line 2"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, text, error, match):
    path = tmp_path / "work.jsonl"
    path.write_text(text)
    with pytest.raises(error, match=match):
        Journal(path, HEADER)
    assert path.read_text() == text


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ({1}, TypeError), ({1: 2}, TypeError)])
def test_a_value_without_a_json_form_is_refused_by_the_name_of_its_key(tmp_path, value, error):
    journal = Journal(tmp_path / "work.jsonl", HEADER)
    with pytest.raises(error, match="result of 'third'"):
        journal.record("third", value)
    assert Journal(journal.path, HEADER).done == {}


RUNNER = """
    import sys, time
    from polyspan.run import Journal, map_tasks

    def square(i):
        with open(sys.argv[2], "a") as computed:
            computed.write(f"{i}\\n")
        time.sleep(0.1)
        return {"square": i * i, "half": i / 3}

    if __name__ == "__main__":
        journal = Journal(sys.argv[1], {"work": "squares"})
        print(map_tasks(square, range(12), workers=int(sys.argv[3]), journal=journal))
"""


@pytest.mark.parametrize(("workers", "sign"), [(1, signal.SIGKILL), (1, signal.SIGINT), (2, signal.SIGINT)])
def test_a_stopped_run_goes_on_and_ends_as_an_unbroken_one(tmp_path, workers, sign):
    script = tmp_path / "runner.py"
    script.write_text(textwrap.dedent(RUNNER))

    def command(name):
        return [
            sys.executable,
            str(script),
            str(tmp_path / f"{name}.jsonl"),
            str(tmp_path / f"{name}.txt"),
            str(workers),
        ]

    journal, computed = tmp_path / "cut.jsonl", tmp_path / "cut.txt"
    started = subprocess.Popen(
        command("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= 5):
        time.sleep(0.02)
    # To the whole group, as a terminal does.
    os.killpg(started.pid, sign)
    assert started.wait(timeout=30) != 0
    kept = {json.loads(line)["key"] for line in journal.read_bytes().split(b"\n")[1:-1]}
    assert 4 <= len(kept) < 12
    computed.unlink()

    outputs = [subprocess.run(command(name), capture_output=True, check=True).stdout for name in ("cut", "whole")]
    assert outputs[0] == outputs[1]
    assert sorted(map(int, computed.read_text().split())) == sorted(set(range(12)) - set(map(int, kept)))


def test_results_that_came_before_an_error_stay(tmp_path):
    journal = Journal(tmp_path / "work.jsonl", HEADER)

    def inverse(i):
        return 6 / i

    with pytest.raises(ZeroDivisionError) as caught:
        map_tasks(inverse, [3, 2, 0, 1], workers=1, journal=journal)
    assert "in task '0'" in caught.value.__notes__
    assert Journal(journal.path, HEADER).done == {"3": 2.0, "2": 3.0}
