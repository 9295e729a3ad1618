"""A journal makes long work resumable: one JSON line a finished piece, on disk before the next begins."""

import json
from pathlib import Path
from typing import Any

from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import append_line, make_folder, read_lines, remove_file, write_text
from polyspan.io.text import dump_json, parse_json

FORMAT = 1


class Journal:
    """Finished pieces of one long work, by key, in an append-only file of JSON lines.

    The first line is the header: what the work is. A last line that is torn (the process was killed while writing) is
    dropped when the journal is opened again. One process at a time may write.

    Parameters
    ----------
    path : path-like
        Made where it does not exist, its folder too.
    header : dict
        JSON types that identify the work: digest of the source, parameters, versions.

    Attributes
    ----------
    done : dict of str to JSON types
        What is recorded, in order, as it reads back from the file.

    Raises
    ------
    ValueError
        The file is the journal of other work; the message names what differs.
    WrongContent
        The file is no journal.
    CorruptFile
        A line other than the last is broken.
    """

    def __init__(self, path: Path | str, header: dict[str, Any]):
        self.path = Path(path)
        self.header: dict[str, Any] = json.loads(dump_json(header, indent=None, name="header"))
        self.done: dict[str, Any] = {}
        if not self.path.exists():
            make_folder(self.path.parent)
            self._begin()
            return
        lines, torn = read_lines(self.path)
        if not lines:
            # Killed before the header was whole: nothing was recorded.
            self._begin()
            return
        self.done = self._checked([parse_json(line, self.path, f"line {i}") for i, line in enumerate(lines, start=1)])
        if torn:
            write_text(self.path, "".join(line + "\n" for line in lines))

    def _begin(self) -> None:
        write_text(self.path, dump_json({"journal": FORMAT, "header": self.header}, indent=None) + "\n")

    def _checked(self, lines: list[Any]) -> dict[str, Any]:
        """Compare the header with this work's and return what was recorded."""
        first = lines[0]
        if not (isinstance(first, dict) and first.get("journal") == FORMAT and isinstance(first.get("header"), dict)):
            raise WrongContent(self.path, found="another first line", expected="a journal's header", where="line 1")
        told = _difference(first["header"], self.header)
        if told:
            raise ValueError(f"journal {self.path} belongs to other work ({told}); remove it to begin anew")
        for number, line in enumerate(lines[1:], start=2):
            if not (isinstance(line, dict) and line.keys() == {"key", "value"} and isinstance(line["key"], str)):
                raise CorruptFile(self.path, found="another entry", expected="key and value", where=f"line {number}")
        return {line["key"]: line["value"] for line in lines[1:]}

    def record(self, key: str, value: Any) -> None:
        """Keep a finished piece, durably, before returning; ``done[key]`` is then as it will read back.

        Raises
        ------
        TypeError, ValueError
            The value has no JSON form, or is NaN or infinite; the key is named.
        """
        line = dump_json({"key": key, "value": value}, indent=None, name=f"result of {key!r}")
        append_line(self.path, line)
        self.done[key] = json.loads(line)["value"]

    def remove(self) -> None:
        """Delete the file: the work is complete and its result stands elsewhere."""
        self.discard(self.path)

    @staticmethod
    def discard(path: Path | str) -> None:
        """Delete a journal without reading it, where there is one."""
        remove_file(path)


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Name every entry in which two headers differ."""
    missing = object()

    def shown(header: dict[str, Any], name: str) -> str:
        return repr(header[name]) if name in header else "absent"

    names = sorted(n for n in then.keys() | now.keys() if then.get(n, missing) != now.get(n, missing))
    return ", ".join(f"{name}: {shown(then, name)} there, {shown(now, name)} now" for name in names)
