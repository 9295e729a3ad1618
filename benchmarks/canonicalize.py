"""Race the streamed transform of a file against ``X @ Q`` in memory, and fits with other libraries'; watch memory.

Targets: at least 80 % of the in-memory throughput, and a peak of memory that does not grow with the file. latentis is
raced where it is installed; it asks for much that polyspan has no use for.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes

from _runner import growth, peak_in_child, race, save
from polyspan.align import OrthogonalMap
from polyspan.io import read_array, transform_file, write_array

D = 384
ROWS = (100_000, 400_000)
BATCH = 4096


def streamed_peak(source: Path, target: Path) -> int:
    """Peak of anonymous memory, bytes, of a streamed transform in a fresh process."""
    return peak_in_child(f"""
import numpy as np
from pathlib import Path
from polyspan.align import OrthogonalMap
from polyspan.io import transform_file
X, Y = np.random.default_rng(0).normal(size=(2, 1000, {D})).astype(np.float32)
fitted = OrthogonalMap().fit(X, Y)
def main():
    transform_file(Path({str(source)!r}), Path({str(target)!r}), fitted.transform, dim={D}, batch_rows={BATCH})
""")


def translator() -> Any:
    """The orthogonal translation of latentis, between centred spaces."""
    from latentis.transform.base import Centering
    from latentis.transform.translate.aligner import MatrixAligner, Translator
    from latentis.transform.translate.functional import svd_align_state

    return Translator(
        aligner=MatrixAligner("svd", align_fn_state=svd_align_state), x_transform=Centering(), y_transform=Centering()
    )


def fits_of(A: np.ndarray, B: np.ndarray) -> dict[str, Any]:
    arms: dict[str, Any] = {
        "polyspan OrthogonalMap": lambda: OrthogonalMap().fit(A, B),
        "scipy orthogonal_procrustes": lambda: orthogonal_procrustes(
            A - A.mean(0, dtype=np.float64), B - B.mean(0, dtype=np.float64)
        ),
    }
    if importlib.util.find_spec("latentis") is None:
        print("  latentis is not installed, so it is not raced")
    else:
        a, b = torch.from_numpy(A), torch.from_numpy(B)
        arms["latentis Translator"] = lambda: translator().fit(a, b)
    return arms


def main() -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(2, 2000, D)).astype(np.float32)
    fitted = OrthogonalMap().fit(X, Y)
    Q = fitted.rotation_.astype(np.float32)
    records, fits, peaks = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for n in ROWS:
            source, target = Path(folder) / f"{n}.npy", Path(folder) / "out.npy"
            write_array(source, rng.normal(size=(n, D)).astype(np.float32))
            held = np.asarray(read_array(source, mmap=False))
            records.append(
                race(
                    "transform",
                    {
                        "polyspan, file to file": lambda s=source, t=target: transform_file(
                            s, t, fitted.transform, dim=D, batch_rows=BATCH
                        ),
                        "X @ Q in memory": lambda h=held: h @ Q,
                        "read, multiply, write": lambda s=source, t=target: write_array(
                            t, np.asarray(read_array(s, mmap=False)) @ Q
                        ),
                    },
                    size={"n": n, "d": D},
                )
            )
            del held
            peaks[n] = streamed_peak(source, target)
            print(f"  peak of memory while streaming {n:,} rows: {peaks[n] / 2**20:.1f} MiB")
    for n in (2_000, 20_000):
        A, B = rng.normal(size=(2, n, D)).astype(np.float32)
        fits.append(race("fit", fits_of(A, B), size={"n": n, "d": D}))
    save(
        "canonicalize",
        records + fits,
        throughput_share_of_in_memory=[r["ratio"]["X @ Q in memory"]["median"] for r in records],
        growth_in_rows=growth(records, "n"),
        peak_bytes_by_rows={str(n): peak for n, peak in peaks.items()},
        peak_growth=peaks[ROWS[1]] / peaks[ROWS[0]],
    )


if __name__ == "__main__":
    main()
