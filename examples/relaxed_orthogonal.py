"""Change the encoder behind a search service: new queries search at once, the gallery follows piece by piece.

The images are scikit-learn's handwritten digits, 5 to 9. Two small networks that were trained on the digits 0 to 4
stand for the old and the new encoder. Nothing is embedded again until the last step, and then what gains most first.
A lifted gallery may even be the better one, where it learns from labels and the new encoder saw none of these classes.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from polyspan.align import RelaxedOrthogonalAdapter, backfill_batches, backfill_curve, backfill_order
from polyspan.align.backfilling_plots import plot_backfilling
from polyspan.claims.lambda_orthogonality import on_digits
from polyspan.linalg import mean_average_precision


def main(epochs: int = 40, plot: Path | None = None) -> None:
    data = on_digits(0)

    def precision(queries: np.ndarray, gallery: np.ndarray) -> float:
        labels = data.test_labels
        return mean_average_precision(queries, gallery, labels, labels, exclude_self=True)

    adapter = RelaxedOrthogonalAdapter(max_iter=epochs, batch_size=128, random_state=0)
    adapter.fit(data.anchors_new, data.anchors_old, data.anchor_labels)
    low, high = adapter.singular_values_[[-1, 0]]
    print(
        f"threshold {adapter.lam_:.2f}, attained {adapter.deviation_:.2f}: lengths change {low:.2f} to {high:.2f} fold"
    )

    queries = adapter.transform(data.test_new)
    lifted = adapter.transform_old(data.test_old)
    print(f"old queries, old gallery      {precision(data.test_old, data.test_old):.3f}")
    print(f"new queries, old gallery      {precision(queries, adapter.place_old(data.test_old)):.3f}")
    print(f"new queries, lifted gallery   {precision(queries, lifted):.3f}")
    print(f"new queries, new gallery      {precision(queries, queries):.3f}")

    order = backfill_order(lifted, data.test_labels)
    curves = {
        "farthest first": backfill_curve(lifted, queries, order, data.test_labels),
        "at random": backfill_curve(lifted, queries, np.random.default_rng(0).permutation(order), data.test_labels),
    }
    for name, curve in curves.items():
        print(f"embedded again {name:>14}: {curve.scores[5]:.3f} at half, area {curve.area:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        # The journal makes the work go on where it was stopped; here the budget stops it after 100 items.
        done = sum(len(batch) for batch in backfill_batches(order, Path(folder) / "done.journal", budget=100))
    print(f"{done} of {len(order)} items handed out to be embedded again")
    if plot is not None:
        print("drawn:", plot_backfilling(curves, plot, reference=precision(queries, queries)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plot", type=Path, help="picture of the curves: .svg, .png or .pdf")
    main(**vars(parser.parse_args()))
