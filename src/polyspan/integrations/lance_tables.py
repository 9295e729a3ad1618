"""A LanceDB table as a store that can be upgraded: next vectors are a column beside the old one."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from polyspan.errors import UnreadableFile, WrongContent, require
from polyspan.io import remove_folder

from ._lance_fill import Held, Spool, row_sums, vector_lists
from .vector_tables import BATCH_ROWS, TableBatch, TableFacts, check_finite_rows, check_verb

STAMP, WORK, PLAN, TEXT = "polyspan:space", "polyspan:work", "polyspan:next", "polyspan:text"
NEXT, BEFORE, MADE_OF = "__next", "__before", "__made_of"
SCANNED_ROWS, READ_AHEAD_BYTES = 8192, 2**25
"""Rows at a time where no caller says it, and how far Lance may read ahead of whoever takes the rows."""
ATTEMPTS = 3
"""How often the column is written anew where others commit to the table meanwhile."""


class LanceTable:
    """A table of LanceDB in a local folder; keys are the values of its id column.

    Until they are sealed, next vectors stand in ``TABLE.VECTOR.upgrade``, a folder beside the table; the table itself
    holds the note that they are under way. Sealing writes them as the column ``VECTOR__next``, each beside the id and
    the vector that it was made of, in one version of the table: others that write meanwhile make it start anew, and
    what a killed run wrote is removed when LanceDB next removes files of no version. ``VECTOR__made_of`` holds a sum of
    what each next vector was made of, the old vector and the text where one is named: rows that others add or change,
    before the sealing or after it, are found to be pending, all of them, in one pass. Filling them after it is a merge,
    whose time grows with the table. Two renames in one version are the cut-over; the old vectors are then
    ``VECTOR__before``. Indexes of a renamed column keep their data: build one for the new vectors before you search
    many.

    An address such as ``s3://`` can be read and stamped; an upgrade of it is refused.

    Parameters
    ----------
    folder : path-like
        Of the database.
    table : str, optional
        Left out, the only one.
    column : str, optional
        The vectors; left out, the only list of numbers of fixed size, or ``vector``.
    id_column : str, optional
        Left out, ``id``; values must differ.
    text_column : str, optional
        The text that was embedded.
    """

    def __init__(
        self,
        folder: Path | str,
        table: str | None = None,
        *,
        column: str | None = None,
        id_column: str | None = None,
        text_column: str | None = None,
    ):
        lancedb = require("lancedb", extra="vectors", purpose="a LanceDB table")
        self._lance: Any = require("lance", extra="vectors", purpose="a LanceDB table")
        database = lancedb.connect(str(folder))
        names = list(database.list_tables().tables)
        if table is None and len(names) != 1:
            raise ValueError(f"table must name one of {', '.join(names) or 'no tables'} in {folder}, got None")
        name = names[0] if table is None else table
        if name not in names:
            raise UnreadableFile(folder, found=f"tables {', '.join(names) or 'none'}", expected=f"a table {name}")
        self.place, self.table = f"{folder}:{name}", database.open_table(name)
        self.column = self._vector_column(column)
        self.id_column, self.text_column = id_column or "id", text_column
        for wanted in (self.id_column, *([text_column] if text_column else [])):
            if wanted not in self.table.schema.names:
                raise WrongContent(
                    self.place, found=f"columns {', '.join(self.table.schema.names)}", expected=f"a column {wanted}"
                )
        self._is_local = "://" not in str(folder)
        self._folder = Path(folder) / f"{name}.{quote(self.column, safe='')}.upgrade"
        self._filling: Spool | None = None

    def _vector_column(self, column: str | None) -> str:
        import pyarrow.types as t

        lists = [f.name for f in self.table.schema if t.is_fixed_size_list(f.type) and t.is_floating(f.type.value_type)]
        plain = [name for name in lists if not name.endswith((NEXT, BEFORE))]
        if column is None and len(plain) != 1 and "vector" not in plain:
            raise WrongContent(
                self.place,
                found=f"columns of vectors: {', '.join(plain) or 'none'}",
                expected="one, or column= naming it",
            )
        chosen = column or (plain[0] if len(plain) == 1 else "vector")
        if chosen not in lists:
            raise WrongContent(
                self.place, found=f"column {chosen!r}", expected=f"a column of vectors: {', '.join(lists) or 'none'}"
            )
        return chosen

    @property
    def _next(self) -> str:
        return self.column + NEXT

    @property
    def _before(self) -> str:
        return self.column + BEFORE

    @property
    def _made_of(self) -> str:
        return self.column + MADE_OF

    def _has(self, name: str) -> bool:
        return name in self.table.schema.names

    def _note(self, column: str, key: str) -> Any:
        found = (self.table.schema.field(column).metadata or {}).get(key.encode())
        return None if found is None else json.loads(found)

    def facts(self) -> TableFacts:
        """Look at the newest version of the table."""
        self.table.checkout_latest()
        metric = next(
            (
                self.table.index_stats(index.name).distance_type
                for index in self.table.list_indices()
                if index.columns == [self.column]
            ),
            None,
        )
        n, plan, n_pending = self.table.count_rows(), self._plan(), None
        if plan is not None:
            n_pending = self._n_pending(None if self._has(self._next) else self._spool().held())
        return TableFacts(
            n_rows=n,
            dim=self.table.schema.field(self.column).type.list_size,
            metric=metric,
            exact=True,
            unit=False,
            space=self._note(self.column, STAMP),
            next_dim=None if plan is None else plan["dim"],
            n_pending=n_pending,
            next_space=None if plan is None else plan["space"],
            has_before=self._has(self._before),
            state={"n_rows": n, "cut_over": self._has(self._before), "files": self._files()},
        )

    def _files(self) -> str:
        """Return a digest of which files hold ids, texts, vectors in use and next ones, and which rows are deleted.

        Files of Lance are never written again, so that it changes with whatever is written into these columns; renaming
        a column, its notes and other columns leave it as it is. Compacting the table changes it too.
        """
        dataset = self.table.to_lance()
        names = [self.id_column, self.column, self._next, *([self.text_column] if self.text_column else [])]
        wanted = {dataset.lance_schema.field(name).id() for name in names if self._has(name)}
        found = []
        for fragment in dataset.get_fragments():
            held = [file.path for file in fragment.metadata.files if wanted & set(file.fields)]
            found.append([fragment.fragment_id, sorted(held), str(fragment.metadata.deletion_file)])
        return hashlib.sha256(json.dumps([sorted(wanted), found]).encode()).hexdigest()

    def _plan(self) -> dict[str, Any] | None:
        """Return width, stamp and work of the next vectors; the column tells of them once it is there."""
        if not self._has(self._next):
            return self._note(self.column, PLAN)
        if not self._has(self._made_of):
            raise WrongContent(
                self.place, found=f"{self._next} alone", expected=f"{self._made_of} beside it; drop both to begin anew"
            )
        dim = self.table.schema.field(self._next).type.list_size
        notes = {name: self._note(self._next, key) for name, key in (("space", STAMP), ("work", WORK), ("text", TEXT))}
        return {"dim": dim, **notes}

    def _planned(self) -> dict[str, Any]:
        plan = self._plan()
        if plan is None:
            raise ValueError(f"{self.place} must be prepared for an upgrade first, got none under way")
        return plan

    def _n_pending(self, held: Held | None) -> int:
        """Count rows without a next vector of theirs: in what is held, or without it in the table."""
        if held is not None and not len(held):
            return self.table.count_rows()
        text = self._planned()["text"]
        columns = [self.id_column, self.column, *([text] if text else []), *([] if held else [self._made_of])]
        batches = self._scanner(columns, SCANNED_ROWS).to_batches()
        return sum(int((~self._is_made(batch, held)).sum()) for batch in batches)

    def _sums(self, batch: Any) -> np.ndarray:
        """Return the sum (b,) of each row's vector, and of its text where the upgrade began with one."""
        text = self._planned()["text"]
        texts = None if text is None else batch.column(text).to_pylist()
        return row_sums(_to_rows(batch.column(self.column)), texts)

    def _is_made(self, batch: Any, held: Held | None) -> np.ndarray:
        """Tell which rows of a batch (b,) have a next vector that was made of what they are now."""
        if held is not None:
            return self._places(held, batch) >= 0
        noted = batch.column(self._made_of)
        known = noted.is_valid().to_numpy(zero_copy_only=False)
        return known & (noted.fill_null(0).to_numpy(zero_copy_only=False) == self._sums(batch))

    def _spool(self) -> Spool:
        """Return where next vectors stand that are not in the table yet."""
        import pyarrow as pa

        self._check_local()
        plan = self._planned()
        if self._filling is None or not self._filling.is_of(plan):
            item = self.table.schema.field(self.column).type.value_type
            kind = self.table.schema.field(self.id_column).type
            self._filling = Spool(self._folder, plan, kind, pa.list_(item, plan["dim"]))
        return self._filling

    def _places(self, held: Held, batch: Any) -> np.ndarray:
        return held.find(batch.column(self.id_column), self._sums(batch))

    def stamp(self, space: Mapping[str, Any]) -> None:
        """Keep with the vectors in use what space they are of, as metadata of their column."""
        self.table.checkout_latest()
        self._write_notes(self.column, {STAMP: space})

    def _write_notes(self, column: str, notes: Mapping[str, Any]) -> None:
        """Write notes in one version of the table; None removes one."""
        self.table.update_field_metadata({"path": column, "metadata": _as_notes(notes)})

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Note in the table that next vectors are under way; other work than that under way is refused."""
        self._check_local()
        self.table.checkout_latest()
        wanted = {"dim": dim, "space": dict(space), "work": dict(work), "text": self.text_column}
        plan = self._plan()
        if plan is None:
            if self._has(self._before):
                raise ValueError(f"{self.place} must have no upgrade that is cut over and not forgotten, got one")
            self._check_ids(self.table.to_lance())
            # What stands there is of an upgrade that the table knows no more.
            remove_folder(self._folder)
            self._write_notes(self.column, {PLAN: wanted})
        elif plan != wanted:
            raise ValueError(f"{self.place} is being upgraded in another way; forget that upgrade first")

    def _check_local(self) -> None:
        if not self._is_local:
            raise ValueError(f"{self.place} must be in a local folder to be upgraded, got an address")

    def _check_ids(self, dataset: Any) -> None:
        """Look for ids that are missing or not unique: rows are written by them."""
        ids = dataset.to_table(columns=[self.id_column]).column(self.id_column)
        if ids.null_count or len(ids.unique()) < len(ids):
            raise WrongContent(self.place, found="an id missing or twice", expected="an id of its own for each row")

    def _scanner(self, columns: list[str], batch_rows: int, where: str | None = None) -> Any:
        return self.table.to_lance().scanner(
            columns,
            filter=where,
            batch_size=batch_rows,
            batch_readahead=1,
            fragment_readahead=1,
            io_buffer_size=READ_AHEAD_BYTES,
            scan_in_order=True,
            with_row_id=not columns,
        )

    def _batches(self, columns: list[str], batch_rows: int, where: str | None = None) -> Iterator[Any]:
        """Yield batches of one version of the table; fragments may be of a few rows, and batches are not."""
        import pyarrow as pa

        plan = self._plan()
        texts = [self.text_column, None if plan is None else plan["text"]]
        columns = list(dict.fromkeys([*columns, *(name for name in texts if name is not None)]))
        held, n_held = [], 0
        for found in self._scanner(columns, min(batch_rows, SCANNED_ROWS), where).to_batches():
            piece = found
            while n_held + piece.num_rows >= batch_rows:
                cut = batch_rows - n_held
                whole = pa.Table.from_batches([*held, piece.slice(0, cut)]).combine_chunks()
                piece, held, n_held = piece.slice(cut), [], 0
                yield from whole.to_batches()
            if piece.num_rows:
                held.append(piece)
                n_held += piece.num_rows
        if held:
            yield from pa.Table.from_batches(held).combine_chunks().to_batches()

    def _read(self, batch: Any) -> TableBatch:
        texts = None
        if self.text_column is not None:
            texts = batch.column(self.text_column).to_pylist()
            bad = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
            if bad is not None:
                raise WrongContent(
                    self.place,
                    found=f"{texts[bad]!r}" if texts[bad] is not None else "a null text",
                    expected="a text in every row",
                    where=f"{self.text_column} of id {batch.column(self.id_column)[bad].as_py()!r}",
                )
        vectors = batch.column(self.column)
        if vectors.null_count:
            raise WrongContent(self.place, found="a null vector", expected="a vector in every row", where=self.column)
        keys, rows = np.array(batch.column(self.id_column).to_pylist()), _to_rows(vectors)
        check_finite_rows(self.place, keys, rows)
        return TableBatch(keys, rows, texts)

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield the rows in use."""
        for batch in self._batches([self.id_column, self.column], batch_rows):
            yield self._read(batch)

    def sync(self) -> None:
        """Every write is on the disk already."""

    def pending(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield rows without a next vector, in a version of the table that does not move under the reader."""
        self.table.checkout_latest()
        held = None if self._has(self._next) else self._spool().held()
        columns = [self.id_column, self.column, *([self._made_of] if held is None else [])]
        for batch in self._batches(columns, batch_rows):
            left = batch if held is not None and not len(held) else batch.filter(self._left(batch, held))
            if left.num_rows:
                yield self._read(left)

    def _left(self, batch: Any, held: Held | None) -> Any:
        import pyarrow as pa

        return pa.array(~self._is_made(batch, held))

    def fill(self, batch: TableBatch, rows: np.ndarray) -> None:
        """Keep next vectors by id: beside the table, or in one version of it once it has the column of them.

        ``batch`` must be as it was read: next vectors count as long as the table holds the vectors in ``batch.rows``.
        """
        import pyarrow as pa

        if not len(batch.keys):
            return
        self.table.checkout_latest()
        plan = self._planned()
        ids = pa.array(batch.keys.tolist(), type=self.table.schema.field(self.id_column).type)
        stored = self.table.schema.field(self.column).type.value_type
        sums = row_sums(np.asarray(batch.rows, dtype=_read_dtype(stored)), self._texts_of(batch, plan["text"]))
        if not self._has(self._next):
            self._spool().add(ids, sums, rows)
            return
        lists = vector_lists(rows, self.table.schema.field(self._next).type)
        made = pa.table({self.id_column: ids, self._next: lists, self._made_of: pa.array(sums)})
        self.table.merge_insert(self.id_column).when_matched_update_all().execute(made)

    def _texts_of(self, batch: TableBatch, text: str | None) -> list[Any] | None:
        """Return the texts that a batch was made of: those it was read with, or what the table holds now."""
        if text is None or (batch.texts is not None and self.text_column == text):
            return batch.texts if text is not None else None
        found: dict[Any, Any] = {}
        wanted = set(batch.keys.tolist())
        for piece in self._scanner([self.id_column, text], SCANNED_ROWS).to_batches():
            pairs = zip(piece.column(self.id_column).to_pylist(), piece.column(text).to_pylist(), strict=True)
            found |= {key: said for key, said in pairs if key in wanted}
        return [found.get(key) for key in batch.keys.tolist()]

    def seal(self) -> None:
        """Write the column of next vectors, all or none of them; where it stands, look for rows without one."""
        self.table.checkout_latest()
        if self._has(self._next):
            self._refuse_missing(self._n_pending(None))
        for left in reversed(range(ATTEMPTS)):
            if self._has(self._next):
                break
            self._write_column(last=not left)
            self.table.checkout_latest()
        self._tidy()

    def _refuse_missing(self, n: int) -> None:
        if n:
            raise ValueError(f"every row must have a next vector, got {n} rows without one")

    def _write_column(self, *, last: bool) -> None:
        """Write the column into the version at hand; where others committed another, only ``last`` raises."""
        import pyarrow as pa

        plan, spool = self._planned(), self._spool()
        dataset, held = self.table.to_lance(), spool.held()
        self._check_ids(dataset)
        self._refuse_missing(self._n_pending(held))
        notes = _as_notes({STAMP: plan["space"], WORK: plan["work"], TEXT: plan["text"]})
        notes = {key: value for key, value in notes.items() if value is not None}
        schema = pa.schema([pa.field(self._next, spool.kind, metadata=notes), pa.field(self._made_of, pa.uint32())])
        raised: list[BaseException] = []

        @self._lance.batch_udf(output_schema=schema)
        def made(batch: Any) -> Any:
            try:
                places = held.find(batch.column(self.id_column))
                if (places < 0).any():
                    raise WrongContent(self.place, found="other ids", expected="those that were filled")
                return pa.record_batch([held.take(places), pa.array(held.sums(places))], schema=schema)
            except BaseException as error:
                raised.append(error)
                raise

        try:
            dataset.add_columns(made, read_columns=[self.id_column], batch_size=SCANNED_ROWS)
        except OSError as error:
            if raised:
                # Lance makes an OSError of whatever is raised inside, Ctrl-C too.
                raise raised[0] from None
            self.table.checkout_latest()
            if self.table.version == dataset.version:
                # Lance adds the place in its source.
                found = str(error).splitlines()[0].partition(", /")[0][:200]
                raise UnreadableFile(self.place, found=found, expected="a table that can be written to") from error
            if last:
                raise ValueError(
                    f"{self.place} must stand still while the next vectors are written, got other commits"
                ) from error

    def _tidy(self) -> None:
        """Remove what only an upgrade that is not sealed needs: the note first, for it is what says there is one."""
        if self._note(self.column, PLAN) is not None:
            self._write_notes(self.column, {PLAN: None})
        remove_folder(self._folder)
        self._filling = None

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every row with its next vector; NaN where it has none or has changed."""
        self.table.checkout_latest()
        columns, plan = [self.id_column, self.column], self._planned()
        if self._has(self._next):
            for batch in self._batches([*columns, self._next, self._made_of], batch_rows):
                rows = np.array(_to_rows(batch.column(self._next)))
                rows[~self._is_made(batch, None)] = np.nan
                yield self._read(batch), rows
            return
        spool = self._spool()
        held, dtype = spool.held(), _read_dtype(spool.kind.value_type)
        for batch in self._batches(columns, batch_rows):
            places = self._places(held, batch)
            rows = np.full((len(places), plan["dim"]), np.nan, dtype=dtype)
            rows[places >= 0] = _to_rows(held.take(places[places >= 0]))
            yield self._read(batch), rows

    def switch(self, verb: str) -> None:
        """Cut over, roll back or forget, each in one version of the table.

        What others commit at the same time is kept; :meth:`cut_over_if` refuses to cut over then.
        """
        check_verb(verb)
        self.table.checkout_latest()
        has_next, has_before = self._has(self._next), self._has(self._before)
        if verb == "cut over":
            if has_before and not has_next:
                return
            if not has_next:
                raise ValueError(f"{self.place} must have next vectors that are sealed to cut over to, got none")
            self._rename({self.column: self._before, self._next: self.column})
        elif verb == "roll back":
            if not has_before:
                raise ValueError(f"{self.place} must have been cut over and not forgotten, got no {self._before}")
            self._rename({self.column: self._next, self._before: self.column})
        else:
            self._tidy()
            gone = [self._before if has_before else self._next, self._made_of]
            if gone := [name for name in gone if self._has(name)]:
                self.table.drop_columns(gone)

    def cut_over_if(self, unchanged: Callable[[], Any]) -> None:
        """Cut over as ``unchanged`` finds the table: it raises where that is not to be.

        Commits are numbered. If another one came between the look and the renames, these are taken back in a further
        version, and it is refused; readers may see the next vectors between these two versions.

        Raises
        ------
        ValueError
            Another commit came in between.
        """
        self.table.checkout_latest()
        seen = self.table.version
        unchanged()
        self.switch("cut over")
        if self.table.version != seen + 1:
            self.switch("roll back")
            raise ValueError(f"{self.place} must stand still while it is cut over, got other commits; check again")

    def _rename(self, names: Mapping[str, str]) -> None:
        self.table.alter_columns(*({"path": old, "rename": new} for old, new in names.items()))


def _as_notes(notes: Mapping[str, Any]) -> dict[str, str | None]:
    """Return notes as the metadata of a column holds them."""
    return {key: None if value is None else json.dumps(value, sort_keys=True) for key, value in notes.items()}


def _read_dtype(item: Any) -> np.dtype:
    """Return the dtype in which numbers of an Arrow type are read."""
    return np.result_type(item.to_pandas_dtype(), np.float32)


def _to_rows(column: Any) -> np.ndarray:
    """Return a fixed-size list column (b, d); null lists are rows of NaN."""
    d, nulls = column.type.list_size, column.is_null().to_numpy(zero_copy_only=False)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if not nulls.any():
        return flat.reshape(-1, d).astype(_read_dtype(column.type.value_type), copy=False)
    rows = np.full((len(column), d), np.nan, dtype=_read_dtype(column.type.value_type))
    rows[~nulls] = flat.reshape(-1, d)
    return rows
