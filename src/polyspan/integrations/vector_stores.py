"""Vector stores by their address."""

from pathlib import Path

from .vector_tables import VectorTable


def open_vector_table(
    address: str | Path,
    *,
    table: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    text_column: str | None = None,
    member: str | None = None,
) -> VectorTable:
    """Open a store by its address.

    Parameters
    ----------
    address : str or path
        A file of vectors (``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather``, ``.fvecs``), a
        FAISS index (``.faiss``, ``.index``), a LanceDB folder, a folder of a local Qdrant (it holds ``meta.json``), the
        ``http`` address of a Qdrant server, or a ``postgresql`` address.
    table : str, optional
        LanceDB's or PostgreSQL's table, Qdrant's collection or alias; needed where there are several.
    column, id_column, text_column : str, optional
        Where vectors, ids and the text that was embedded stand.
    member : str, optional
        Which array of ``.npz`` or ``.safetensors``.

    Raises
    ------
    ValueError
        Nothing of that kind is known, or a name is missing.
    FileError
        A file cannot be used.
    """
    text = str(address)
    if text.startswith(("postgresql:", "postgres:")):
        from .postgres_tables import PostgresTable

        return PostgresTable(text, _needed(table), column=column, id_column=id_column, text_column=text_column)
    if text.startswith(("http:", "https:")) or (Path(text) / "meta.json").is_file():
        from .qdrant_tables import QdrantTable

        return QdrantTable(text, _needed(table), vector=column, text_field=text_column)
    path = Path(text)
    if path.is_dir():
        from .lance_tables import LanceTable

        return LanceTable(path, table, column=column, id_column=id_column, text_column=text_column)
    from .file_tables import FAISS_FILES, FaissTable, FileTable

    if path.suffix.lower() in FAISS_FILES:
        return FaissTable(path)
    return FileTable(path, column=column, id_column=id_column, text_column=text_column, member=member)


def _needed(table: str | None) -> str:
    if table is None:
        raise ValueError("table must be given: the table or collection that holds the vectors, got None")
    return table
