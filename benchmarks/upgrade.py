"""Race an upgrade of a LanceDB table, end to end, against a plain loop that reads, multiplies and writes.

The plain loop keeps no journal, cannot go on after a kill, syncs nothing and writes a second table; ours puts every
batch on the disk, and then writes it as a column beside the old one, row by row with the id and the vector that it was
made of. Filling is raced; a check of every new vector is timed beside it. Memory is measured in processes of their own.
"""

import shutil
import tempfile
import time
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa

from _runner import growth, peak_in_child, race, save
from polyspan.align import RidgeMap
from polyspan.integrations import LanceTable

D = 384
SIZES = (100_000, 1_000_000)
BATCH = 65_536


def make(folder: Path, n: int) -> None:
    """Fill a table of n unit vectors, batch by batch."""
    rng = np.random.default_rng(0)
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("vector", pa.list_(pa.float32(), D))])
    table = lancedb.connect(str(folder)).create_table("docs", schema=schema)
    for first in range(0, n, 65_536):
        rows = rng.normal(size=(min(65_536, n - first), D)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
        table.add(pa.table({"id": np.arange(first, first + len(rows)), "vector": lists}, schema=schema))


def fitted() -> RidgeMap:
    rng = np.random.default_rng(1)
    X = rng.normal(size=(2000, D))
    return RidgeMap(1.0).fit(X, X @ np.linalg.qr(rng.normal(size=(D, D)))[0])


def ours(folder: Path, aligner: RidgeMap) -> LanceTable:
    """Fill next vectors, from a fresh column to the last row."""
    table = LanceTable(folder, "docs")
    table.switch("forget")
    table.prepare(D, {"model": "new", "dim": D, "normalized": False}, {"map": "m"})
    for batch in table.pending(BATCH):
        table.fill(batch, aligner.transform(batch.rows))
    table.seal()
    return table


def plain(folder: Path, aligner: RidgeMap) -> None:
    """Read, multiply, write to a second table."""
    W = aligner.weights_.astype(np.float32)
    b = (aligner.mean_out_ - aligner.mean_in_ @ aligner.weights_).astype(np.float32)
    database = lancedb.connect(str(folder))
    source = database.open_table("docs")
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("vector", pa.list_(pa.float32(), D))])
    target = database.create_table("moved", schema=schema, mode="overwrite")
    for batch in source.search().select(["id", "vector"]).to_batches(BATCH):
        rows = batch.column("vector").flatten().to_numpy().reshape(-1, D) @ W + b
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
        target.add(pa.table({"id": batch.column("id"), "vector": lists}, schema=schema))


CODE = """
from pathlib import Path
import upgrade
def main():
    upgrade.{name}(Path({folder!r}), aligner)
aligner = upgrade.fitted()
"""


def main() -> None:
    records, checks, peaks = [], {}, {}
    aligner = fitted()
    for n in SIZES:
        folder = Path(tempfile.mkdtemp(prefix="polyspan-upgrade-"))
        try:
            make(folder, n)
            arms = {"polyspan": lambda f=folder: ours(f, aligner), "plain loop": lambda f=folder: plain(f, aligner)}
            records.append(race("fill", arms, size={"rows": n}, repeats=3, warmup=0))
            table, started, worst = LanceTable(folder, "docs"), time.perf_counter(), 0.0
            for batch, rows in table.pairs(BATCH):
                worst = max(worst, float(np.abs(rows - aligner.transform(batch.rows)).max()))
            checks[str(n)] = {"seconds": time.perf_counter() - started, "largest_difference": worst}
            print(f"check of {n:,} rows: {checks[str(n)]}", flush=True)
            for name in ("ours", "plain"):
                peak = peak_in_child(CODE.format(name=name, folder=str(folder)))
                peaks.setdefault(name, {})[str(n)] = peak
                print(f"peak of {name} at {n:,} rows: {peak / 2**20:.0f} MiB", flush=True)
        finally:
            shutil.rmtree(folder)
    rates = {arm: growth(records, "rows", arm) for arm in ("polyspan", "plain loop")}
    save("upgrade", records, growth_in_rows=rates, checks=checks, peak_bytes=peaks)


if __name__ == "__main__":
    main()
