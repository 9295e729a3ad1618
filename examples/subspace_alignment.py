"""Match the left halves of handwritten digits with their right halves, through what the halves have in common.

Each half is a space of its own, as different as a shape's and a caption's: 32 pixels that share no coordinate with the
other 32. 1,200 digits whose halves are known to belong together are the anchors, 300 others are to be matched.

The system is the catalogue's ``plato-3d``.
"""

import numpy as np

from polyspan.align import SubspaceAligner, crossmodal_scores, local_cka, subspace_report, topk_accuracy
from polyspan.data import digits


def main(n_anchors: int = 1200, n_queries: int = 300) -> None:
    images = digits()[0].reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))[: n_anchors + n_queries]
    left, right = (part[order].reshape(len(order), 32) for part in (images[:, :, :4], images[:, :, 4:]))
    anchors = left[:n_anchors], right[:n_anchors]
    queries = left[n_anchors:], right[n_anchors:]

    report = subspace_report(*anchors, n_components=20)
    print(f"directions shared: {report.n_shared}, first correlations held out {np.round(report.held_out[:5], 2)}")
    print(f"shuffled pairs reach {report.shuffled_held_out:.2f}")
    raw = topk_accuracy(local_cka(*anchors, *queries), 5)
    print(f"{'local CKA, no subspace':>26}  among the first 5: {raw:.1%}")
    for method in ("affine", "local_cka", "cosine"):
        aligner = SubspaceAligner("auto", method=method).fit(*anchors)
        found = crossmodal_scores(aligner, *queries)
        name = f"{method}, {aligner.n_components_} directions"
        print(f"{name:>26}  among the first 5: {found['top_k']:.1%}, matched {found['matching']:.1%}")


if __name__ == "__main__":
    main()
