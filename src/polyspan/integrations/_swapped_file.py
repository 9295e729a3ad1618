"""What stores of one file have in common: the new file is made beside the old one, and the two are swapped."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import UnreadableFile
from polyspan.io import PartialRows, filled_rows, make_folder, read_json, remove_file, swap_in, write_json

from .vector_tables import BATCH_ROWS, TableBatch, TableFacts, check_verb


class SwappedFile:
    """What a store of one file has in common: places, stamps, partial rows, and the swap.

    All that an upgrade writes stands in ``NAME.upgrade`` beside the file; there the old file stands as
    ``before.SUFFIX`` once it is cut over, and no other file of the folder is touched. Of a symbolic link the file that
    it names is upgraded. Stamps are kept by the content of a file, so that they stay true wherever it is moved.
    """

    numbered = True

    def __init__(self, path: Path | str):
        # A rename onto a link would leave the file that it names as it was.
        self.path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
        if not self.path.is_file():
            raise UnreadableFile(path, found="no such file", expected="a store of vectors")
        self.work = self.path.with_name(self.path.name + ".upgrade")
        self.before, self.next, self._after = (
            self.work / f"{name}{self.path.suffix}" for name in ("before", "next", "after")
        )
        self._rows: PartialRows | None = None

    def _content(self, path: Path) -> str:
        """Return what names a file's content, wherever it stands."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """Return what changes when the vectors in use do."""
        return {"content": self._content(self.path), "modified_ns": self.path.stat().st_mtime_ns}

    def _build(self, rows: Path) -> None:
        """Write ``self.next`` from a ``.npy`` of its vectors."""
        raise NotImplementedError

    def _source(self, batch_rows: int, start: int = 0) -> Iterator[TableBatch]:
        raise NotImplementedError

    def _size(self) -> tuple[int, int, str]:
        """Return rows, components and the dtype in which next vectors are kept."""
        raise NotImplementedError

    def _stamps(self) -> dict[str, Any]:
        place = self.work / "spaces.json"
        return read_json(place) if place.exists() else {}

    def _put_stamp(self, content: str, space: Mapping[str, Any]) -> None:
        make_folder(self.work)
        write_json(self.work / "spaces.json", self._stamps() | {content: dict(space)})

    def _plan(self) -> dict[str, Any] | None:
        place = self.work / "next.json"
        # A cut-over that was killed after the swap leaves the plan behind; it is done with.
        return read_json(place) if place.exists() and not self._is_cut_over() else None

    def _is_cut_over(self) -> bool:
        """Whether the swap was done and not undone: before it the next file is there, or the kept one is in use."""
        return self.before.exists() and not self.next.exists() and not self.before.samefile(self.path)

    def _common(self, *, metric: str | None, exact: bool, unit: bool) -> TableFacts:
        n, dim, _ = self._size()
        plan, content = self._plan(), self._content(self.path)
        pending = None if plan is None else n - self._filled()
        return TableFacts(
            n_rows=n,
            dim=dim,
            metric=metric,
            exact=exact,
            unit=unit,
            space=self._stamps().get(content),
            next_dim=None if plan is None else plan["dim"],
            n_pending=pending,
            next_space=None if plan is None else plan["space"],
            has_before=self._is_cut_over() or self._after.exists(),
            state=self._state(),
        )

    def _filled(self) -> int:
        if self._rows is not None:
            return self._rows.filled
        return filled_rows(self.work / "rows.npy")

    def _open(self, plan: Mapping[str, Any]) -> PartialRows:
        if self._rows is None:
            self._check_unchanged(plan)
            n, _, dtype = self._size()
            work = {"source": plan["source"], **plan["work"]}
            self._rows = PartialRows(self.work / "rows.npy", n_rows=n, dim=plan["dim"], dtype=dtype, work=work)
        return self._rows

    def _check_unchanged(self, plan: Mapping[str, Any]) -> None:
        if plan["source"] != self._state():
            raise ValueError(
                f"{self.path} must not change while it is upgraded, got other contents; forget the upgrade, begin anew"
            )

    def sync(self) -> None:
        """Put what was filled on the disk and let go of it, so that another run may go on."""
        if self._rows is not None:
            self._rows.sync()
            self._rows.close()
            self._rows = None

    def stamp(self, space: Mapping[str, Any]) -> None:
        """Keep with the vectors in use what space they are of."""
        self._put_stamp(self._content(self.path), space)

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Make room for the next vectors, stamped; other work than that under way is refused."""
        plan = self._plan()
        wanted = {"dim": dim, "space": dict(space), "work": dict(work)}
        if plan is None:
            if self._is_cut_over():
                raise ValueError(
                    f"{self.path} must have no upgrade that is cut over and not forgotten, got {self.before.name}"
                )
            make_folder(self.work)
            self._drop_unused()
            wanted["source"] = self._state()
            write_json(self.work / "next.json", wanted)
        elif any(plan[name] != wanted[name] for name in wanted):
            changed = sorted(name for name in wanted if plan.get(name) != wanted[name])
            raise ValueError(
                f"{self.path} is being upgraded in another way ({', '.join(changed)} differ); forget that upgrade first"
            )
        self._open(self._planned())

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield the rows in use, in the order of the file."""
        yield from self._source(batch_rows)

    def pending(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield rows in use that have no next vector yet, in the order of the file."""
        self._check_unchanged(self._planned())
        start, n = self._filled(), self._size()[0]
        if start < n:
            yield from self._source(batch_rows, start)

    def _planned(self) -> dict[str, Any]:
        plan = self._plan()
        if plan is None:
            raise ValueError(f"{self.path} must be prepared for an upgrade first, got none under way")
        return plan

    def fill(self, batch: TableBatch, rows: np.ndarray) -> None:
        """Write the next vectors of a batch: the next rows of the file, or rows already filled anew."""
        partial = self._open(self._planned())
        keys = np.asarray(batch.keys)
        if len(keys) and keys.max() < partial.written:
            self._drop_unused()
            partial.rewrite(keys, rows)
        else:
            partial.append(int(keys[0]), rows)

    def seal(self) -> None:
        """Write the new file, whole and synced, into the folder of the upgrade."""
        plan = self._planned()
        self._check_unchanged(plan)
        self._open(plan)
        self.sync()
        n, filled = self._size()[0], self._filled()
        if filled != n:
            raise ValueError(f"every row must have a next vector, got {filled} of {n}")
        if not self.next.exists():
            self._build(self.work / "rows.npy")
        # Also of a file that was whole when a run was killed before its stamp.
        self._put_stamp(self._content(self.next), plan["space"])

    def _check_sealed(self) -> None:
        if not self.next.exists():
            raise ValueError(
                f"{self.path} must have next vectors that are sealed, got {self._filled()} of {self._size()[0]} filled "
                "in; fill again"
            )

    def switch(self, verb: str) -> None:
        """Cut over, roll back or forget: renames in one folder, so that a whole file stands at the path always."""
        check_verb(verb)
        if verb == "cut over":
            self._cut_over()
        elif verb == "roll back":
            self._roll_back()
        else:
            self._drop_unused()
            self._clear()

    def _cut_over(self) -> None:
        if not self._is_cut_over():
            if not self.next.exists():
                raise ValueError(f"{self.path} must have next vectors that are sealed, got none")
            swap_in(self.path, self.next, self.before)
        self._clear()

    def _roll_back(self) -> None:
        if self._is_cut_over():
            if self._content(self.path) not in self._stamps():
                raise ValueError(
                    f"{self.path} must hold what the cut-over put there, got other contents, which a roll back would "
                    f"remove; the old vectors are in {self.before}"
                )
            # What a run that was killed left there would stand in the way.
            remove_file(self._after)
            # The plan must not come to life when the old vectors are in use.
            self._clear()
            swap_in(self.path, self.before, self._after)
        elif not self._after.exists():
            raise ValueError(f"{self.path} must have been cut over and not forgotten, got no old vectors of its own")
        remove_file(self._after)

    def _drop_unused(self) -> None:
        """Remove whole files that are not in use; the kept one first, which the next one tells from one cut over."""
        if self.work.exists():
            for place in (self.before, self.next, self._after):
                remove_file(place)

    def _clear(self) -> None:
        self.sync()
        if self.work.exists():
            for name in ("next.json", "rows.npy.journal", "rows.npy"):
                remove_file(self.work / name)
