"""A PostgreSQL table, with pgvector or plain arrays, as a store that can be upgraded: next vectors are a column."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from polyspan.errors import UnreadableFile, WrongContent, require

from .vector_tables import BATCH_ROWS, TableBatch, TableFacts, check_verb

NEXT, BEFORE = "__next", "__before"
KINDS = ("vector", "halfvec", "_float4", "_float8")
OPERATORS = {"cosine": "cosine", "ip": "dot", "l2": "l2"}


class PostgresTable:
    """A table of PostgreSQL; keys are the values of its id column.

    The column of vectors is ``vector`` or ``halfvec`` of pgvector, or an array of ``real`` or ``double precision``.
    Next vectors stand in the column ``VECTOR__next``, null where none is filled in yet; two renames in one transaction
    are the cut-over, and the old vectors are then ``VECTOR__before``. An index goes with its column: build one on the
    next vectors before you cut over (``CREATE INDEX CONCURRENTLY``). Stamps are comments of the columns.

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
        self._sql = psycopg.sql
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

    def _run(self, text: str, /, *values: Any, **names: Any) -> Any:
        parts = {name: self._sql.Identifier(value) for name, value in names.items()}
        return self.connection.execute(self._sql.SQL(text).format(table=self._table, **parts), values)

    def _read_columns(self) -> dict[str, tuple[str, int]]:
        """Return the type of every column, and its type modifier, which is pgvector's width."""
        found = self.connection.execute(
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

    def _width(self, column: str) -> int:
        kind, width = self._read_columns()[column]
        if kind in ("vector", "halfvec") and width > 0:
            return width
        found = self._run("SELECT {column} FROM {table} WHERE {column} IS NOT NULL LIMIT 1", column=column).fetchone()
        return 0 if found is None else len(_numbers(found[0]))

    def _note(self, column: str) -> dict[str, Any]:
        found = self.connection.execute(
            "SELECT col_description(to_regclass(%s), attnum) FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attname = %s",
            [*[self._table.as_string(self.connection)] * 2, column],
        ).fetchone()
        text = "" if found is None or found[0] is None else found[0]
        return json.loads(text) if text.startswith('{"polyspan"') else {}

    def _put_note(self, column: str, note: Mapping[str, Any]) -> None:
        text = self._sql.Literal(json.dumps({"polyspan": 1} | dict(note)))
        name = self._sql.Identifier(column)
        self.connection.execute(self._sql.SQL("COMMENT ON COLUMN {}.{} IS {}").format(self._table, name, text))

    def _metric(self) -> str | None:
        """Return the metric of an index on the vectors in use, if there is one."""
        rows = self.connection.execute(
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
            n_pending=self._count("{next} IS NULL") if under_way else None,
            next_space=self._note(self._next).get("space") if under_way else None,
            has_before=self._has(self._before),
            state={"n_rows": n, "cut_over": self._has(self._before)},
        )

    def _count(self, where: str) -> int:
        return self._run("SELECT count(*) FROM {table} WHERE " + where, next=self._next).fetchone()[0]

    def stamp(self, space: Mapping[str, Any]) -> None:
        """Keep with the vectors in use what space they are of, as a comment of their column."""
        self._put_note(self.column, self._note(self.column) | {"space": dict(space)})

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Add the column of next vectors, stamped, in one transaction; other work under way is refused."""
        wanted = {"polyspan": 1, "space": dict(space), "work": dict(work), "dim": dim}
        if not self._has(self._next):
            if self._has(self._before):
                raise ValueError(f"{self.place} must have no upgrade that is cut over and not forgotten, got one")
            repeated = self._run("SELECT count(*) - count(DISTINCT {id}) FROM {table}", id=self.id_column).fetchone()[0]
            if repeated:
                raise WrongContent(
                    self.place, found=f"{repeated} ids missing or repeated", expected="an id of its own for each row"
                )
            kind = self._columns[self.column][0]
            declared = f"{kind}({int(dim)})" if kind in ("vector", "halfvec") else f"{kind[1:]}[]"
            with self.connection.transaction():
                self._run("ALTER TABLE {table} ADD COLUMN {next} " + declared, next=self._next)
                self._put_note(self._next, wanted)
        elif self._note(self._next) != wanted:
            raise ValueError(f"{self.place} is being upgraded in another way; forget that upgrade first")

    def _select(self, what: str, where: str, batch_rows: int, **names: str) -> Iterator[list[tuple]]:
        """Read by a cursor on the server, in one view of the table."""
        texts = ", {text}" if self.text_column is not None else ""
        query = self._sql.SQL(
            "SELECT {id}, {column}" + texts + what + " FROM {table} WHERE " + where + " ORDER BY {id}"
        )
        parts = {"id": self.id_column, "column": self.column, "text": self.text_column or "", **names}
        query = query.format(table=self._table, **{k: self._sql.Identifier(v) for k, v in parts.items() if v})
        with self.connection.transaction(), self.connection.cursor(name="polyspan_upgrade") as cursor:
            cursor.itersize = batch_rows
            cursor.execute(query)
            while rows := cursor.fetchmany(batch_rows):
                yield rows

    def _read(self, rows: list[tuple]) -> TableBatch:
        if any(row[1] is None for row in rows):
            bad = next(row[0] for row in rows if row[1] is None)
            raise WrongContent(self.place, found="a null vector", expected="one in every row", where=f"id {bad}")
        keys = np.array([row[0] for row in rows], dtype=object)
        vectors = [_numbers(row[1]) for row in rows]
        if len({len(vector) for vector in vectors}) != 1:
            raise WrongContent(self.place, found="vectors of several lengths", expected="one length", where=self.column)
        texts = None if self.text_column is None else [str(row[2]) for row in rows]
        return TableBatch(keys, np.array(vectors, dtype=np.float32), texts)

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield the rows in use, by id."""
        for rows in self._select("", "TRUE", batch_rows):
            yield self._read(rows)

    def sync(self) -> None:
        """Every write is on the disk already."""

    def pending(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield rows whose next vector is null; each batch is asked for anew, so that no transaction stays open."""
        after: Any = None
        while True:
            where = "{next} IS NULL" + ("" if after is None else " AND {id} > %s")
            texts = ", {text}" if self.text_column is not None else ""
            names = {"id": self.id_column, "column": self.column, "next": self._next}
            if self.text_column is not None:
                names["text"] = self.text_column
            found = self._run(
                "SELECT {id}, {column}"
                + texts
                + " FROM {table} WHERE "
                + where
                + f" ORDER BY {{id}} LIMIT {batch_rows}",
                *([] if after is None else [after]),
                **names,
            ).fetchall()
            if not found:
                return
            after = found[-1][0]
            yield self._read(found)

    def fill(self, batch: TableBatch, rows: np.ndarray) -> None:
        """Write next vectors by id in one transaction, through a temporary table that goes with it."""
        kind = self._columns[self.column][0]
        declared = kind if kind in ("vector", "halfvec") else f"{kind[1:]}[]"
        opened, closed = ("[", "]") if kind in ("vector", "halfvec") else ("{", "}")
        with self.connection.transaction():
            self._run(
                "CREATE TEMPORARY TABLE polyspan_fill ON COMMIT DROP AS SELECT {id} AS id, "
                "NULL::" + declared + " AS v FROM {table} LIMIT 0",
                id=self.id_column,
            )
            with self.connection.cursor().copy("COPY polyspan_fill (id, v) FROM STDIN") as copy:
                for key, row in zip(batch.keys.tolist(), np.asarray(rows, dtype=np.float64).tolist(), strict=True):
                    copy.write_row((key, opened + ",".join(map(repr, row)) + closed))
            self._run(
                "UPDATE {table} SET {next} = polyspan_fill.v FROM polyspan_fill WHERE {table}.{id} = polyspan_fill.id",
                next=self._next,
                id=self.id_column,
            )

    def seal(self) -> None:
        """Look for rows without a next vector: others may have added some."""
        left = self._count("{next} IS NULL")
        if left:
            raise ValueError(f"every row must have a next vector, got {left} rows without one")

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every row with its next vector, or NaN."""
        d = self._width(self._next)
        for rows in self._select(", {next}", "TRUE", batch_rows, next=self._next):
            made = [[np.nan] * d if row[-1] is None else _numbers(row[-1]) for row in rows]
            yield self._read(rows), np.array(made, dtype=np.float32)

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
            self._run("ALTER TABLE {table} DROP COLUMN {old}", old=self._before if has_before else self._next)

    def _rename(self, names: Mapping[str, str]) -> None:
        with self.connection.transaction():
            for old, new in names.items():
                self._run("ALTER TABLE {table} RENAME COLUMN {old} TO {new}", old=old, new=new)


def _numbers(value: Any) -> list[float]:
    """Return the components of a vector, which arrives as text where the driver knows no pgvector."""
    if isinstance(value, str):
        return [float(part) for part in value.strip("[]").split(",")]
    return list(value)
