import os
import pty
import subprocess
import sys

import pytest

from polyspan.run import Progress, progress

# By its full name: the package shows the function of that name.
MODULE = sys.modules["polyspan.run.progress"]


@pytest.fixture
def clock(monkeypatch):
    """Let a test say what time it is."""
    now = [0.0]
    monkeypatch.setattr(MODULE.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("POLYSPAN_PROGRESS", raising=False)
    return now


def test_items_pass_through_unchanged_and_lazily(clock):
    taken = iter(progress(iter("abc"), label="letters"))
    assert next(taken) == "a"
    assert list(taken) == ["b", "c"]


def test_without_a_terminal_there_is_at_most_a_line_in_ten_seconds_and_only_on_stderr(clock, capsys):
    for _i in progress(range(100), label="layers"):
        clock[0] += 1.0
    out, err = capsys.readouterr()
    assert out == ""
    # The clock moves before an item counts as done.
    assert err.splitlines() == [f"layers: {n} of 100" for n in range(10, 101, 10)]


def test_a_stream_of_unknown_length_is_counted(clock, capsys):
    for _i in progress(iter(range(25)), label="rows"):
        clock[0] += 1.0
    assert capsys.readouterr().err.splitlines() == ["rows: 10", "rows: 20"]


@pytest.mark.parametrize(("label", "enabled", "setting"), [("", True, ""), ("x", False, ""), ("x", True, "off")])
def test_it_is_silent_without_a_label_when_disabled_and_when_switched_off(
    clock, capsys, monkeypatch, label, enabled, setting
):
    monkeypatch.setenv("POLYSPAN_PROGRESS", setting)
    for _i in progress(range(50), label=label, enabled=enabled):
        clock[0] += 5.0
    assert capsys.readouterr() == ("", "")


def test_facts_stand_beside_the_count_and_tables_are_aligned(clock, capsys):
    with Progress("fit", 30) as shown:
        for step in range(20):
            clock[0] += 1.0
            shown.advance(loss=1 / (step + 3))
        shown.table([{"world": "planted", "gain": 0.31250}, {"world": "no", "gain": -1.0}])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["fit: 10 of 30  loss 0.08333", "fit: 20 of 30  loss 0.04545"]
    assert lines[2:] == ["  world    gain", "planted  0.3125", "     no      -1"]


def test_work_inside_work_that_is_shown_is_silent_and_the_next_is_shown_again(clock, capsys):
    for _i in progress(range(2), label="outer"):
        for _j in progress(range(3), label="inner"):
            clock[0] += 11.0
    for _i in progress(range(1), label="next"):
        clock[0] += 11.0
    assert capsys.readouterr().err.splitlines() == ["outer: 1 of 2", "outer: 2 of 2", "next: 1 of 1"]


def test_a_loop_left_early_or_by_an_error_frees_the_display(clock, capsys):
    for _i in progress(range(5), label="left"):
        break
    with pytest.raises(ZeroDivisionError):
        list(progress((1 / i for i in (1, 0)), label="failed"))
    for _i in progress(range(1), label="after"):
        clock[0] += 11.0
    assert capsys.readouterr().err.splitlines() == ["after: 1 of 1"]


def test_in_a_terminal_a_bar_is_drawn_on_stderr_and_stdout_holds_results_only():
    script = (
        "import time\nfrom polyspan.run import Progress\n"
        "with Progress('layers [a]', 3) as shown:\n"
        "    for i in range(3):\n        time.sleep(0.15); shown.advance(loss=0.5); print('result', i)\n"
    )
    main, terminal = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "POLYSPAN_PROGRESS"} | {
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True
        )
        drawn = os.read(main, 65536).decode()
    finally:
        os.close(terminal)
        os.close(main)
    assert done.stdout.decode().splitlines() == ["result 0", "result 1", "result 2"]
    assert "layers [a]" in drawn
    assert "loss 0.5" in drawn
    assert "result" not in drawn
