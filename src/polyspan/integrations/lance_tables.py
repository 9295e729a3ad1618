"""A LanceDB table as a store that can be upgraded: next vectors are a column beside the old one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import UnreadableFile, WrongContent, require

from .vector_tables import BATCH_ROWS, TableBatch, TableFacts, check_verb

STAMP, WORK = "polyspan:space", "polyspan:work"
NEXT, BEFORE = "__next", "__before"


class LanceTable:
    """A table of LanceDB; keys are the values of its id column.

    Next vectors stand in the column ``VECTOR__next``, which is null where none is filled in yet, so that the table
    itself knows what is left. Two renames in one version of the table are the cut-over; the old vectors are then
    ``VECTOR__before``. Indexes of a renamed column keep their data: build one for the new vectors before you search
    many. Rows that others add meanwhile are found to be pending.

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
        under_way = self._has(self._next)
        pending = self.table.count_rows(f"`{self._next}` IS NULL") if under_way else None
        n = self.table.count_rows()
        return TableFacts(
            n_rows=n,
            dim=self.table.schema.field(self.column).type.list_size,
            metric=metric,
            exact=True,
            unit=False,
            space=self._note(self.column, STAMP),
            next_dim=self.table.schema.field(self._next).type.list_size if under_way else None,
            n_pending=pending,
            next_space=self._note(self._next, STAMP) if under_way else None,
            has_before=self._has(self._before),
            state={"n_rows": n, "cut_over": self._has(self._before)},
        )

    def stamp(self, space: Mapping[str, Any]) -> None:
        """Keep with the vectors in use what space they are of, as metadata of their column."""
        self.table.checkout_latest()
        self._write_notes(self.column, {STAMP: space})

    def _write_notes(self, column: str, notes: Mapping[str, Any]) -> None:
        written = {key: json.dumps(value, sort_keys=True) for key, value in notes.items()}
        self.table.update_field_metadata({"path": column, "metadata": written})

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Add the column of next vectors, stamped; other work than that under way is refused."""
        import pyarrow as pa

        self.table.checkout_latest()
        if not self._has(self._next):
            if self._has(self._before):
                raise ValueError(f"{self.place} must have no upgrade that is cut over and not forgotten, got one")
            self._check_ids()
            item = self.table.schema.field(self.column).type.value_type
            kind = pa.list_(item if pa.types.is_floating(item) else pa.float32(), dim)
            self.table.add_columns(pa.field(self._next, kind))
        kept = self._note(self._next, WORK)
        if kept is None:
            self._write_notes(self._next, {STAMP: space, WORK: work})
        elif kept != dict(work) or self._note(self._next, STAMP) != dict(space):
            raise ValueError(f"{self.place} is being upgraded in another way; forget that upgrade first")

    def _check_ids(self) -> None:
        """Look for ids that are missing or not unique: rows are written by them."""
        seen: set = set()
        for batch in self.table.search().select([self.id_column]).to_batches(BATCH_ROWS):
            ids = batch.column(self.id_column)
            values = set(ids.to_pylist())
            if ids.null_count or len(values) < len(ids) or values & seen:
                raise WrongContent(self.place, found="an id missing or twice", expected="an id of its own for each row")
            seen |= values

    def _batches(self, columns: list[str], batch_rows: int, where: str | None = None) -> Iterator[Any]:
        query = self.table.search()
        if where is not None:
            query = query.where(where)
        if self.text_column is not None:
            columns = [*columns, self.text_column]
        for batch in query.select(columns).to_batches(batch_rows):
            if batch.num_rows:
                yield batch

    def _read(self, batch: Any) -> TableBatch:
        texts = None if self.text_column is None else [str(t) for t in batch.column(self.text_column).to_pylist()]
        vectors = batch.column(self.column)
        if vectors.null_count:
            raise WrongContent(self.place, found="a null vector", expected="a vector in every row", where=self.column)
        keys = np.array(batch.column(self.id_column).to_pylist())
        return TableBatch(keys, _to_rows(vectors), texts)

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield the rows in use."""
        for batch in self._batches([self.id_column, self.column], batch_rows):
            yield self._read(batch)

    def sync(self) -> None:
        """Every write is on the disk already."""

    def pending(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield rows whose next vector is null, in a version of the table that does not move under the reader."""
        columns = [self.id_column, self.column]
        for batch in self._batches(columns, batch_rows, f"`{self._next}` IS NULL"):
            yield self._read(batch)

    def fill(self, batch: TableBatch, rows: np.ndarray) -> None:
        """Write next vectors by id, in one version of the table."""
        import pyarrow as pa

        kind = self.table.schema.field(self._next).type
        ids = pa.array(batch.keys.tolist(), type=self.table.schema.field(self.id_column).type)
        flat = pa.array(np.ascontiguousarray(rows, dtype=kind.value_type.to_pandas_dtype()).ravel())
        lists = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1]).cast(kind)
        made = pa.table({self.id_column: ids, self._next: lists})
        self.table.merge_insert(self.id_column).when_matched_update_all().execute(made)

    def seal(self) -> None:
        """Look for rows without a next vector: others may have added some."""
        left = self.table.count_rows(f"`{self._next}` IS NULL")
        if left:
            raise ValueError(f"every row must have a next vector, got {left} rows without one")

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every row with its next vector, or NaN."""
        for batch in self._batches([self.id_column, self.column, self._next], batch_rows):
            yield self._read(batch), _to_rows(batch.column(self._next))

    def switch(self, verb: str) -> None:
        """Cut over, roll back or forget, each in one version of the table."""
        check_verb(verb)
        self.table.checkout_latest()
        has_next, has_before = self._has(self._next), self._has(self._before)
        if verb == "cut over":
            if has_before and not has_next:
                return
            if not has_next:
                raise ValueError(f"{self.place} must have next vectors to cut over to, got none")
            self._rename({self.column: self._before, self._next: self.column})
        elif verb == "roll back":
            if not has_before:
                raise ValueError(f"{self.place} must have been cut over and not forgotten, got no {self._before}")
            self._rename({self.column: self._next, self._before: self.column})
        elif has_before or has_next:
            self.table.drop_columns([self._before if has_before else self._next])

    def _rename(self, names: Mapping[str, str]) -> None:
        self.table.alter_columns(*({"path": old, "rename": new} for old, new in names.items()))


def _to_rows(column: Any) -> np.ndarray:
    """Return a fixed-size list column (b, d); null lists are rows of NaN."""
    d, nulls = column.type.list_size, column.is_null().to_numpy(zero_copy_only=False)
    rows = np.full((len(column), d), np.nan, dtype=np.result_type(column.type.value_type.to_pandas_dtype(), np.float32))
    rows[~nulls] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, d)
    return rows
