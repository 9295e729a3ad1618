"""Cluster handwritten digits without labels, and look at why training stopped.

The system is the catalogue's ``lhdsc``.
"""

import warnings

import numpy as np

from polyspan.cluster import DeepSelfExpressiveClustering
from polyspan.data import digits
from polyspan.linalg import clustering_accuracy

images, labels = digits()
rows = np.random.default_rng(0).permutation(len(images))[:600]
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="the affinity falls into")
    found = DeepSelfExpressiveClustering(10, subspace_dim=12, random_state=0).fit(images[rows].reshape(-1, 8, 8))

for stage, epochs in found.n_epochs_.items():
    print(f"{stage}: {epochs} epochs, ended by {found.stopped_by_[stage]}")
print(f"the autoencoder leaves {found.reconstruction_share_:.2f} of the mean image's error")
print(f"accuracy {clustering_accuracy(labels[rows], found.labels_):.3f}; sizes {np.bincount(found.labels_)}")
new = np.random.default_rng(0).permutation(len(images))[600:900]
print(
    f"accuracy on 300 new digits {clustering_accuracy(labels[new], found.predict(images[new].reshape(-1, 8, 8))):.3f}"
)
