"""``polyspan doctor``: what is installed, what a system needs, what is wrong with a file."""

from pathlib import Path

from ._output import FILE, show_json, show_table

EXTRAS = {
    "hf": ("transformers", "peft", "accelerate"),
    "vectors": ("faiss", "lancedb", "qdrant_client"),
    "hdf5": ("h5py",),
    "postgres": ("psycopg",),
    "text": ("sentence_transformers",),
    "graphs": ("networkx", "torch_geometric"),
    "equivariant": ("e3nn",),
    "scenes": ("plyfile", "PIL"),
    "images": ("skimage", "PIL"),
    "video": ("av",),
    "dask": ("dask", "distributed"),
    "ray": ("ray",),
}


def doctor(file: Path | None = None, *, json: bool = False) -> int:
    """Say what is installed, or what is wrong with a file.

    Parameters
    ----------
    file : Path
        A file of vectors, a graph, a fitted map: says what it holds, or the first thing that is wrong with it. Of a
        FAISS index or a folder of LanceDB or Qdrant it says what takes it, without opening it.
    json : bool
        Print JSON.
    """
    if file is not None:
        from polyspan.io import inspect_file

        store = _store(file)
        if store is not None:
            told = {"path": str(file), "holds": store, "usable": True, "taken_by": "polyspan upgrade plan"}
            if json:
                show_json(told)
            else:
                show_table(str(file), ("what", "found"), [(k, str(v)) for k, v in told.items()])
            return 0
        found = inspect_file(file)
        if json:
            show_json(found)
        else:
            show_table(str(file), ("what", "found"), [(str(k), str(v)) for k, v in found.items()])
        return 0 if found["usable"] else FILE
    from polyspan import catalog
    from polyspan.run import machine_facts

    facts = machine_facts()
    extras = {name: {package: _installed(package) for package in packages} for name, packages in EXTRAS.items()}
    needs = {e.slug: list(e.extras) for e in catalog.entries() if e.extras}
    if json:
        show_json({"machine": facts["machine"], "versions": facts["versions"], "extras": extras, "needs": needs})
        return 0
    rows = [(f"machine: {k}", str(v)) for k, v in facts["machine"].items()]
    rows += [(f"version: {k}", str(v)) for k, v in facts["versions"].items()]
    for name, packages in extras.items():
        missing = [package for package, there in packages.items() if not there]
        users = ", ".join(slug for slug, wanted in needs.items() if name in wanted)
        state = "installed" if not missing else f'missing {", ".join(missing)}: pip install "polyspan[{name}]"'
        rows.append((f"extra: {name}", state + (f"; used by {users}" if users else "")))
    show_table("", ("what", "found"), rows)
    return 0


def _store(path: Path) -> str | None:
    """Return what kind of vector store stands there, by its name and folder; it is not opened."""
    if path.is_file() and path.suffix in (".faiss", ".index"):
        return "a FAISS index"
    if path.is_dir() and (path / "meta.json").is_file():
        return "a local Qdrant"
    if path.is_dir() and any(path.glob("*.lance")):
        return "a LanceDB database"
    return None


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
