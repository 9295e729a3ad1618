"""A PostgreSQL table, with pgvector or plain arrays, as a store that can be upgraded: next vectors are a column."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from polyspan.errors import UnreadableFile, WrongContent, require

from .vector_tables import BATCH_ROWS, TableBatch, TableFacts, check_finite_rows, check_verb

NEXT, BEFORE, MADE_OF = "__next", "__before", "__made_of"
KINDS = ("vector", "halfvec", "_float4", "_float8")
OPERATORS = {"cosine": "cosine", "ip": "dot", "l2": "l2"}


class PostgresTable:
    """A table of PostgreSQL; keys are the values of its id column.

    The column of vectors is ``vector`` or ``halfvec`` of pgvector, or an array of ``real`` or ``double precision``.
    Next vectors stand in the column ``VECTOR__next``, null where none is filled in yet; two renames in one transaction
    are the cut-over, and the old vectors are then ``VECTOR__before``. An index goes with its column: build one on the
    next vectors before you cut over (``CREATE INDEX CONCURRENTLY``). Stamps are comments of the columns.

    ``VECTOR__made_of`` holds a sum of the vector, and of the text where one is named, that each next vector was made
    of: rows that others change are found to be pending again. :meth:`digest` lets the server read the whole table; an
    upgrade calls it at the check and at the cut-over. :meth:`cut_over_if` keeps writers waiting from that look until
    the columns have their new names, so that no write is lost between the two.

    Parameters
    ----------
    address : str
        ``postgresql://user@host/database``; a password is better kept in PGPASSWORD or ``~/.pgpass``.
    table : str
        With its schema before a dot, if need be.
    column : str, optional
        Left out, the only column of a vector type.
    id_column : str, optional
        Left out, ``id``; it must be unique and never null.
    text_column : str, optional
        The text that was embedded.
    """

    def __init__(
        self,
        address: str,
        table: str,
        *,
        column: str | None = None,
        id_column: str | None = None,
        text_column: str | None = None,
    ):
        psycopg = require("psycopg", extra="postgres", purpose="a PostgreSQL table")
        self._sql, self._error = psycopg.sql, psycopg.Error
        try:
            self.connection = psycopg.connect(address, autocommit=True)
        except psycopg.OperationalError as error:
            host = address.rpartition("@")[2]  # never repeat a password
            raise UnreadableFile(host, found=str(error).strip()[:200], expected="a server that answers") from error
        self.place, self.id_column, self.text_column = table, id_column or "id", text_column
        schema, _, name = table.rpartition(".")
        self._table = self._sql.Identifier(*([schema, name] if schema else [name]))
        try:
            self._open_columns(table, column, text_column)
        except BaseException:
            self.close()
            raise

    def _open_columns(self, table: str, column: str | None, text_column: str | None) -> None:
        self._columns = self._read_columns()
        if not self._columns:
            raise WrongContent(table, found="no such table", expected="a table that this user may read")
        self.column = self._vector_column(column)
        for wanted in (self.id_column, *([text_column] if text_column else [])):
            if wanted not in self._columns:
                raise WrongContent(table, found=f"columns {', '.join(self._columns)}", expected=f"a column {wanted}")

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    @contextmanager
    def _told(self) -> Generator[None]:
        """Say in our words what the server refuses: rights, views, a full disk, a lost connection."""
        try:
            yield
        except self._error as error:
            found = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise UnreadableFile(
                self.place, found=found, expected="a table that this user may read and change"
            ) from error

    def _ask(self, query: Any, values: Any = ()) -> Any:
        with self._told():
            return self.connection.execute(query, values)

    def _query(self, text: str, **names: str) -> Any:
        """Return SQL with the table, its columns in use, the sums of what next vectors are made of, and ``names``."""
        columns = {"id": self.id_column, "column": self.column, "next": self._next, "made_of": self._made_of}
        columns |= {"text": self.text_column} if self.text_column is not None else {}
        parts = {name: self._sql.Identifier(value) for name, value in (columns | names).items()}
        return self._sql.SQL(text).format(table=self._table, **parts)

    def _run(self, text: str, /, *values: Any, **names: str) -> Any:
        return self._ask(self._query(text, **names), values)

    def _read_columns(self) -> dict[str, tuple[str, int]]:
        """Return the type of every column, and its type modifier, which is pgvector's width."""
        found = self._ask(
            "SELECT attname, typname, atttypmod FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid "
            "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
            [self._table.as_string(self.connection)],
        )
        return {name: (kind, width) for name, kind, width in found.fetchall()}

    def _vector_column(self, column: str | None) -> str:
        known = [name for name, (kind, _) in self._columns.items() if kind in KINDS]
        plain = [name for name in known if not name.endswith((NEXT, BEFORE))]
        if column is None and len(plain) != 1:
            raise WrongContent(
                self.place,
                found=f"columns of vectors: {', '.join(plain) or 'none'}",
                expected="one, or column= naming it",
            )
        chosen = column or plain[0]
        if chosen not in known:
            raise WrongContent(
                self.place, found=f"column {chosen!r}", expected=f"a column of vectors: {', '.join(known) or 'none'}"
            )
        return chosen

    def _has(self, name: str) -> bool:
        return name in self._read_columns()

    @property
    def _next(self) -> str:
        return self.column + NEXT

    @property
    def _before(self) -> str:
        return self.column + BEFORE

    @property
    def _made_of(self) -> str:
        return self.column + MADE_OF

    @property
    def _kind(self) -> str:
        """The type of the column in use: its arrays' element type, or pgvector's type."""
        return self._columns[self.column][0]

    @property
    def _is_pgvector(self) -> bool:
        return self._kind in ("vector", "halfvec")

    def _declared(self) -> str:
        return self._kind if self._is_pgvector else f"{self._kind[1:]}[]"

    def _sum_of(self, vector: str, text: str | None) -> str:
        """Return SQL of a number that tells whether a vector and its text are those that were seen before."""
        numbers = "double precision[]" if self._kind == "_float8" else "real[]"
        told = f"hash_array_extended({vector}::{numbers}, 0)"
        return told if text is None else f"({told} # hashtextextended({text}, 0))"

    @property
    def _sum_in_use(self) -> str:
        return self._sum_of("{table}.{column}", None if self.text_column is None else "{table}.{text}")

    @property
    def _is_pending(self) -> str:
        return f"({{next}} IS NULL OR {{made_of}} IS DISTINCT FROM {self._sum_in_use})"

    def _width(self, column: str) -> int:
        kind, width = self._read_columns()[column]
        if kind in ("vector", "halfvec") and width > 0:
            return width
        found = self._run("SELECT {one} FROM {table} WHERE {one} IS NOT NULL LIMIT 1", one=column).fetchone()
        return 0 if found is None else len(_numbers(found[0]))

    def _note(self, column: str) -> dict[str, Any]:
        found = self._ask(
            "SELECT col_description(to_regclass(%s), attnum) FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attname = %s",
            [*[self._table.as_string(self.connection)] * 2, column],
        ).fetchone()
        text = "" if found is None or found[0] is None else found[0]
        return json.loads(text) if text.startswith('{"polyspan"') else {}

    def _put_note(self, column: str, note: Mapping[str, Any]) -> None:
        text = self._sql.Literal(json.dumps({"polyspan": 1} | dict(note)))
        name = self._sql.Identifier(column)
        self._ask(self._sql.SQL("COMMENT ON COLUMN {}.{} IS {}").format(self._table, name, text))

    def _metric(self) -> str | None:
        """Return the metric of an index on the vectors in use, if there is one."""
        rows = self._ask(
            "SELECT opcname FROM pg_index JOIN pg_opclass ON pg_opclass.oid = ANY(indclass) "
            "JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey) "
            "WHERE indrelid = to_regclass(%s) AND attname = %s",
            [self._table.as_string(self.connection), self.column],
        ).fetchall()
        names = [part for (name,) in rows for part in name.split("_")]
        return next((metric for part, metric in OPERATORS.items() if part in names), None)

    def facts(self) -> TableFacts:
        """Look at the table."""
        under_way, n = self._has(self._next), self._count("TRUE")
        return TableFacts(
            n_rows=n,
            dim=self._width(self.column),
            metric=self._metric(),
            exact=True,
            unit=False,
            space=self._note(self.column).get("space"),
            next_dim=self._note(self._next).get("dim") if under_way else None,
            n_pending=self._count(self._is_pending) if under_way else None,
            next_space=self._note(self._next).get("space") if under_way else None,
            has_before=self._has(self._before),
            state={"n_rows": n, "cut_over": self._has(self._before)},
        )

    def _count(self, where: str) -> int:
        return self._run("SELECT count(*) FROM {table} WHERE " + where).fetchone()[0]

    def digest(self) -> str:
        """Return a digest of ids, vectors, texts and next vectors of all rows, which the server makes."""
        parts = ["{id}", self._sum_in_use]
        if self._has(self._next):
            parts += [self._sum_of("{table}.{next}", None), "{made_of}"]
        row = f"hashtextextended(concat_ws(' ', {', '.join(parts)}), 0)"
        n, total = self._run("SELECT count(*), sum(" + row + "::numeric) FROM {table}").fetchone()
        return f"{n}:{total}"

    def stamp(self, space: Mapping[str, Any]) -> None:
        """Keep with the vectors in use what space they are of, as a comment of their column."""
        self._put_note(self.column, self._note(self.column) | {"space": dict(space)})

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Add the column of next vectors, stamped, in one transaction; other work under way is refused."""
        wanted = {"polyspan": 1, "space": dict(space), "work": dict(work), "dim": dim}
        if not self._has(self._next):
            if self._has(self._before):
                raise ValueError(f"{self.place} must have no upgrade that is cut over and not forgotten, got one")
            self._check_ids()
            declared = f"{self._declared()}({int(dim)})" if self._is_pgvector else self._declared()
            with self._told(), self.connection.transaction():
                self._run("ALTER TABLE {table} ADD COLUMN {next} " + declared)
                self._run("ALTER TABLE {table} ADD COLUMN {made_of} bigint")
                self._put_note(self._next, wanted)
        elif self._note(self._next) != wanted:
            raise ValueError(f"{self.place} is being upgraded in another way; forget that upgrade first")

    def _check_ids(self) -> None:
        """Look for ids that are missing or not unique: rows are read page by page and written by them."""
        repeated = self._run("SELECT count(*) - count(DISTINCT {id}) FROM {table}").fetchone()[0]
        if repeated:
            raise WrongContent(
                self.place, found=f"{repeated} ids missing or repeated", expected="an id of its own for each row"
            )

    def _pages(self, where: str, batch_rows: int) -> Iterator[list[tuple]]:
        """Ask for each page anew, by id: with no transaction open, what is filled meanwhile is there to stay."""
        after: Any = None
        texts = ", {text}" if self.text_column is not None else ""
        while True:
            further = "" if after is None else " AND {id} > %s"
            found = self._run(
                f"SELECT {{id}}, {{column}}{texts} FROM {{table}} WHERE {where}{further} "
                f"ORDER BY {{id}} LIMIT {int(batch_rows)}",
                *([] if after is None else [after]),
            ).fetchall()
            if not found:
                return
            after = found[-1][0]
            yield found

    def _read(self, rows: list[tuple]) -> TableBatch:
        bad = next((row[0] for row in rows if row[1] is None), None)
        if bad is not None:
            raise WrongContent(self.place, found="a null vector", expected="one in every row", where=f"id {bad}")
        vectors = [_numbers(row[1]) for row in rows]
        other = next((i for i, vector in enumerate(vectors) if len(vector) != len(vectors[0])), None)
        if other is not None:
            raise WrongContent(
                self.place,
                found=f"a vector of {len(vectors[other])} numbers",
                expected=f"{len(vectors[0])} as in others",
                where=f"{self.column} of id {rows[other][0]}",
            )
        texts = None
        if self.text_column is not None:
            bad = next((row for row in rows if not isinstance(row[2], str)), None)
            if bad is not None:
                raise WrongContent(
                    self.place,
                    found="a null text" if bad[2] is None else repr(bad[2])[:80],
                    expected="a text in every row",
                    where=f"{self.text_column} of id {bad[0]}",
                )
            texts = [row[2] for row in rows]
        made = np.array(vectors, dtype=np.float64 if self._kind == "_float8" else np.float32)
        if made.ndim != 2:
            raise WrongContent(self.place, found="arrays of arrays", expected="arrays of numbers", where=self.column)
        keys = np.array([row[0] for row in rows], dtype=object)
        check_finite_rows(self.place, keys, made)
        return TableBatch(keys, made, texts)

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield the rows in use, by id."""
        self._check_ids()
        for rows in self._pages("TRUE", batch_rows):
            yield self._read(rows)

    def sync(self) -> None:
        """Every write is on the disk already."""

    def pending(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield rows without a next vector of theirs."""
        for rows in self._pages(self._is_pending, batch_rows):
            yield self._read(rows)

    def fill(self, batch: TableBatch, rows: np.ndarray) -> None:
        """Write next vectors by id in one transaction, through a temporary table that goes with it.

        ``batch`` must be as it was read: next vectors count as long as the table holds its vectors and texts.
        """
        declared = self._declared()
        opened, closed = "[]" if self._is_pgvector else "{}"

        def written(vectors: Any) -> Iterator[str]:
            for vector in np.asarray(vectors, dtype=np.float64).tolist():
                yield opened + ",".join(map(repr, vector)) + closed

        texts = batch.texts if self.text_column is not None and batch.texts is not None else [None] * len(batch.keys)
        made_of = self._sum_of(
            "polyspan_fill.old", None if self.text_column is None else "COALESCE(polyspan_fill.text, {table}.{text})"
        )
        with self._told(), self.connection.transaction():
            self._run(
                f"CREATE TEMPORARY TABLE polyspan_fill ON COMMIT DROP AS SELECT {{id}} AS id, NULL::{declared} AS v, "
                f"NULL::{declared} AS old, NULL::text AS text FROM {{table}} LIMIT 0"
            )
            with self.connection.cursor().copy("COPY polyspan_fill (id, v, old, text) FROM STDIN") as copy:
                pieces = (batch.keys.tolist(), written(rows), written(batch.rows), texts)
                for row in zip(*pieces, strict=True):
                    copy.write_row(row)
            self._run(
                f"UPDATE {{table}} SET {{next}} = polyspan_fill.v, {{made_of}} = {made_of} FROM polyspan_fill "
                "WHERE {table}.{id} = polyspan_fill.id"
            )

    def seal(self) -> None:
        """Look for rows without a next vector: others may have added some."""
        left = self._count(self._is_pending)
        if left:
            raise ValueError(f"every row must have a next vector, got {left} rows without one of theirs")

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every row with its next vector, in one view of the table; NaN where it has none or has changed."""
        d, dtype = self._note(self._next)["dim"], np.float64 if self._kind == "_float8" else np.float32
        texts = ", {text}" if self.text_column is not None else ""
        made = f", CASE WHEN {self._is_pending} THEN NULL ELSE {{next}} END"
        query = self._query("SELECT {id}, {column}" + texts + made + " FROM {table} ORDER BY {id}")
        with self._told(), self.connection.transaction(), self.connection.cursor(name="polyspan_upgrade") as cursor:
            cursor.itersize = batch_rows
            cursor.execute(query)
            while rows := cursor.fetchmany(batch_rows):
                next_rows = [[np.nan] * d if row[-1] is None else _numbers(row[-1]) for row in rows]
                yield self._read(rows), np.array(next_rows, dtype=dtype)

    def switch(self, verb: str) -> None:
        """Cut over, roll back or forget, each in one transaction."""
        check_verb(verb)
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
            with self._told(), self.connection.transaction():
                self._run("ALTER TABLE {table} DROP COLUMN {old}", old=self._before if has_before else self._next)
                self._run("ALTER TABLE {table} DROP COLUMN IF EXISTS {made_of}")

    def cut_over_if(self, unchanged: Callable[[], Any]) -> None:
        """Cut over in one transaction that begins by a lock, if ``unchanged`` raises nothing.

        ``SHARE ROW EXCLUSIVE`` waits for writers that are under way and keeps further ones waiting; readers go on until
        the renames, which wait for them. A writer that has waited then writes into the column of the new vectors: stop
        those that send old ones. A transaction that has read the table and then writes to it deadlocks with the
        renames, and the server ends one of the two; the table is then as it was.
        """
        with self._told(), self.connection.transaction():
            self._run("LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
            unchanged()
            self.switch("cut over")

    def _rename(self, names: Mapping[str, str]) -> None:
        with self._told(), self.connection.transaction():
            for old, new in names.items():
                self._run("ALTER TABLE {table} RENAME COLUMN {old} TO {new}", old=old, new=new)


def _numbers(value: Any) -> list[float]:
    """Return the components of a vector, which arrives as text where the driver knows no pgvector."""
    if isinstance(value, str):
        return [float(part) for part in value.strip("[]").split(",")]
    return list(value)
