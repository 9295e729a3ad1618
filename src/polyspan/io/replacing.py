"""A file of vectors written again with other vectors and everything else as it was."""

from contextlib import closing
from pathlib import Path

from polyspan.errors import WrongContent

from . import _tables
from ._door import PathLike
from ._slabs import npz_names, tensor_slabs
from .arrays import table_writer
from .atomic import atomic_path
from .embeddings import BATCH_ROWS, EmbeddingReader, EmbeddingWriter


def replace_vectors(
    source: PathLike,
    target: PathLike,
    vectors: PathLike,
    *,
    column: str | None = None,
    member: str | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Path:
    """Write ``source`` to ``target`` with the rows of ``vectors`` for its own, atomically and in flat memory.

    Of a table all other columns, their order and the metadata are kept. Widths may differ.

    Parameters
    ----------
    source, target : path-like
        Two files of one suffix that :class:`EmbeddingReader` and :class:`EmbeddingWriter` take.
    vectors : path-like
        A ``.npy`` of shape (n, d) with as many rows.
    column, member : str, optional
        Where the vectors stand in ``source``; a ``.npz`` or ``.safetensors`` must hold nothing else.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where row counts differ, or other arrays would be lost.
    """
    source, target = Path(source), Path(target)
    if source.suffix.lower() != target.suffix.lower():
        raise ValueError(f"target must end in {source.suffix} like source, got {target.name!r}")
    old = EmbeddingReader(source, column=column, member=member, batch_rows=batch_rows)
    new = EmbeddingReader(vectors, batch_rows=batch_rows)
    if new.n_rows != old.n_rows:
        raise WrongContent(vectors, found=f"{new.n_rows} rows", expected=f"{old.n_rows}, as in {source}")
    if old.suffix in _tables.TABLES:
        _replace_column(source, target, new, old.column or _tables.VECTOR, batch_rows)
        return target
    name = _tables.VECTOR
    if old.suffix in (".npz", ".safetensors"):
        # Without a name a reader refuses a file of several arrays.
        EmbeddingReader(source)
        name = (npz_names(source) if old.suffix == ".npz" else [*tensor_slabs(source, refuse_types=False).slabs])[0]
    made = EmbeddingWriter(target, dim=new.dim, dtype=new.dtype, n_rows=new.n_rows, column=name)
    with made as writer, closing(new.batches()) as batches:
        for batch in batches:
            writer.write(batch.rows)
    return target


def _replace_column(source: Path, target: Path, new: EmbeddingReader, column: str, batch_rows: int) -> None:
    import pyarrow as pa

    with _tables.open_table(source) as table, atomic_path(target) as temp:
        at = table.schema.get_field_index(column)
        field = table.schema.field(at)
        item = pa.from_numpy_dtype(new.dtype)
        kind = pa.field(column, pa.list_(item, new.dim), nullable=field.nullable, metadata=field.metadata)
        schema = table.schema.set(at, kind)
        with table_writer(target, temp, schema) as writer, closing(new.batches()) as rows:
            held, first = None, 0
            for _, batch in table.batches(table.schema.names, batch_rows):
                parts, wanted = [], batch.num_rows
                while wanted:
                    if held is None or first == len(held):
                        held, first = next(rows).rows, 0
                    parts.append(held[first : first + wanted])
                    first, wanted = first + len(parts[-1]), wanted - len(parts[-1])
                lists = [_tables.arrow_vectors(part, item) for part in parts]
                columns = [*batch.columns]
                columns[at] = pa.concat_arrays(lists).cast(kind.type)
                writer.write_batch(pa.record_batch(columns, schema=schema))
