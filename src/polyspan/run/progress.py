"""Progress on stderr: a bar in a terminal, a plain line now and then elsewhere, never on stdout."""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0

# One display at a time: work inside of work that is shown already passes in silence.
_display = threading.Lock()


class Progress:
    """Show how far a piece of work is, from ``with`` to its end.

    A bar in a terminal; elsewhere plain lines, at most one in ten seconds. Always on stderr. Inside another Progress
    it shows nothing.

    Parameters
    ----------
    label : str
        What is being done; empty shows nothing.
    total : int, optional
        How many pieces are to come.
    enabled : bool
        Estimators pass their ``verbose`` here.

    Notes
    -----
    ``POLYSPAN_PROGRESS=off`` in the environment silences it everywhere.
    """

    def __init__(self, label: str = "", total: int | None = None, *, enabled: bool = True):
        self.label, self.total, self.count = label, total, 0
        self._wanted = bool(label and enabled) and os.environ.get("POLYSPAN_PROGRESS", "").lower() != "off"
        self._shown = False
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0

    def __enter__(self) -> "Progress":
        self._shown = self._wanted and _display.acquire(blocking=False)
        self._last = time.monotonic()
        if self._shown and sys.stderr.isatty():
            try:
                self._bar, self._task = _rich_bar(self.label, self.total)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._shown:
            return
        self._shown = False
        try:
            if self._bar is not None:
                self._bar.stop()
        finally:
            self._bar = None
            _display.release()

    def advance(self, count: int = 1, **facts: float | str) -> None:
        """Count ``count`` more pieces as done; ``facts`` (``loss=0.12``) stand beside the count."""
        self.count += count
        if not self._shown:
            return
        told = "  ".join(f"{name} {_short(value)}" for name, value in facts.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.count, facts=told)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            of = "" if self.total is None else f" of {self.total}"
            _say(f"{self.label}: {self.count}{of}" + (f"  {told}" if told else ""))

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print rows (of equal keys, which head the columns) as an aligned table, above the bar where there is one."""
        if not (self._shown and rows):
            return
        cells = [list(rows[0])] + [[_short(value) for value in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        text = "\n".join(lines)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            _say(text)


def progress(iterable: Iterable[T], *, label: str = "", total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Pass ``iterable`` through and show how far it is; see :class:`Progress`.

    Parameters
    ----------
    label : str
        What is being done; empty shows nothing.
    total : int, optional
        How many items are to come; ``len(iterable)`` where it has one.
    enabled : bool
        Estimators pass their ``verbose`` here.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # ty: ignore[invalid-argument-type]
    with Progress(label, total, enabled=enabled) as shown:
        for item in iterable:
            yield item
            shown.advance()


def _rich_bar(label: str, total: int | None) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    # What the work itself prints stays on its own stream: stdout belongs to results.
    bar = Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    bar.start()
    return bar, bar.add_task(label, total=total, facts="")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
