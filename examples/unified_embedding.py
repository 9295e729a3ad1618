"""Learn clicks from a file of users, items and words, in an embedding table much smaller than their number.

The log is generated: 60,000 rows in a Parquet file, of 3,000 users, 2,000 items and lists of search words. Two models
of equal size learn from it batch by batch: one table for all columns, and a table a column.

The system is the catalogue's ``unified-embedding``.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from polyspan.learn import UnifiedEmbeddingClassifier


def write_log(path: Path, n: int, seed: int) -> pa.Table:
    """Write users, items, words and hours, and a click that hangs on a taste of each user, item and word."""
    rng, taste = np.random.default_rng(seed), np.random.default_rng(99)
    users, items = (np.minimum(rng.zipf(1.3, size=n), size) - 1 for size in (3_000, 2_000))
    words = [rng.integers(300, size=rng.integers(4)).tolist() for _ in range(n)]
    likes = [taste.normal(size=size) for size in (3_000, 2_000, 300)]
    logits = likes[0][users] + likes[1][items] + np.array([likes[2][w].mean() if w else 0.0 for w in words])
    columns = {
        "user": pa.array([f"user-{u}" for u in users]).dictionary_encode(),
        "item": pa.array([f"item-{i}" for i in items]).dictionary_encode(),
        "words": pa.array([[f"word-{w}" for w in some] for some in words], pa.list_(pa.string())),
        "hour": pa.array(rng.integers(24, size=n)),
        "click": pa.array(rng.random(n) < 1 / (1 + np.exp(-logits))),
    }
    table = pa.table(columns)
    pq.write_table(table, path, row_group_size=10_000)
    return table


def main(n: int = 60_000, n_embeddings: int = 256) -> None:
    with tempfile.TemporaryDirectory() as folder:
        past = Path(folder) / "past.parquet"
        write_log(past, n, seed=0)
        later = write_log(Path(folder) / "later.parquet", n // 4, seed=1)
        for scheme, said in (("hash", "a table a column"), ("multiplex", "one table for all")):
            model = UnifiedEmbeddingClassifier(
                n_embeddings=n_embeddings, chunk_dim=8, scheme=scheme, max_len=4, max_epochs=2, random_state=0
            )
            model.fit_file(past, "click", batch_rows=10_000)
            score = roc_auc_score(later["click"].to_numpy(), model.predict_proba(later)[:, 1])
            size = model.network_.embedding.nbytes / 1024
            print(f"{said:>18}: {size:.0f} KiB, area under the ROC curve {score:.4f}")
        for name, found in model.collision_report(later).items():
            print(
                f"{name:>18}: {found.n_values:,} values, {found.same_share:.0%} of them share their row with another, "
                f"{found.others_share:.0%} of its rows are read by other columns too"
            )


if __name__ == "__main__":
    main()
