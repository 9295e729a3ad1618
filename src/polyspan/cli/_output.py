"""Where words go: results to stdout, talk to stderr; and the exit codes."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

USAGE, FILE, EXTRA, STUCK, INTERRUPTED = 2, 3, 4, 5, 130


def say(text: str) -> None:
    """Tell the user something that is not the result."""
    print(text, file=sys.stderr, flush=True)


def show_json(result: Any) -> None:
    """Print a result as JSON on stdout; NaN and infinity become null, which JSON can say."""
    print(json.dumps(_plain(result), indent=2, sort_keys=True, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout: drawn in a terminal, tab-separated in a pipe, names first where rows need them."""
    if not sys.stdout.isatty():
        for row in ([columns] if len(columns) > 2 else []) + list(rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def check_target(path: Path | None, option: str, *suffixes: str) -> None:
    """Refuse where a result cannot go by its name, before any work."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} must end in {' or '.join(suffixes)}, got {path.name!r}")
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {path}")
