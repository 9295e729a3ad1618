"""Rules that no linter knows: one door for files, no pickle, no global chance, light imports, every member checked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "polyspan"
FILES = sorted(SOURCE.rglob("*.py"))

OPENERS = {
    "open", "np.load", "np.save", "np.savez", "np.memmap", "np.fromfile", "numpy.load", "torch.load", "torch.save",
    "joblib.load", "joblib.dump", "load_npz", "save_npz", "loadmat", "savemat", "ParquetFile", "read_table",
    "write_table", "safe_open", "load_file", "save_file", "os.open", "faiss.read_index", "faiss.write_index",
}  # fmt: skip
METHODS = {"read_text", "write_text", "read_bytes", "write_bytes"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}


def dotted(node):
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def calls(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_io_opens_files(path):
    if path.is_relative_to(SOURCE / "io"):
        return
    for node, name in calls(path):
        last = name.rsplit(".", 1)[-1]
        door = (
            name in OPENERS
            or (last in OPENERS and last != "open")
            or (last == "open" and isinstance(node.func, ast.Name))
        )
        # A catalogue entry is a resource of the package itself, not a user's file.
        own = path.is_relative_to(SOURCE / "catalog") and last == "read_text"
        method = last in METHODS and isinstance(node.func, ast.Attribute) and not own
        # /dev/null takes what a closed pipe no longer wants.
        null = name == "os.open" and any(dotted(a) == "os.devnull" for a in node.args)
        assert null or not (door or method), f"line {node.lineno} calls {name}; files go through polyspan.io"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_pickled(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & PICKLES, f"line {node.lineno} imports a pickler"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_global_chance(path):
    for node, name in calls(path):
        assert not name.startswith("np.random.") or name.split(".")[-1] in {
            "default_rng", "Generator", "SeedSequence", "RandomState", "get_state",
        }, f"line {node.lineno} uses the global generator {name}"  # fmt: skip
        assert name not in {"torch.manual_seed", "random.seed", "np.random.seed"}, f"line {node.lineno} seeds the world"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_exceptions_are_defined_in_one_place(path):
    if path.name == "errors.py":
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef):
            bases = {dotted(base).rsplit(".", 1)[-1] for base in node.bases}
            assert not any(base.endswith(("Error", "Exception")) for base in bases), f"{node.name} is an exception"


def loaded_after(code):
    probe = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split())


def test_importing_polyspan_loads_no_numpy():
    assert not loaded_after("import polyspan") & {"numpy", "torch", "scipy", "sklearn"}


@pytest.mark.parametrize(
    "argv", [["--help"], ["align", "--help"], ["cluster", "--help"], ["align", "fit", "--help"], ["list"]]
)
def test_help_and_lists_load_no_torch(argv):
    head = "import contextlib, io\nfrom polyspan.cli import run\n"
    code = head + f"with contextlib.redirect_stdout(io.StringIO()): run({argv!r})"
    assert not loaded_after(code) & {"torch", "sklearn", "scipy"}


def test_the_catalogue_loads_no_numpy():
    assert not loaded_after("from polyspan import catalog; catalog.entries()") & {"numpy", "torch"}
