"""Where clusters lie on a map of two dimensions."""

import numpy as np
from numpy.typing import NDArray

FEW = 12
"""Clusters of which there are too few for t-SNE, which looks at neighbours."""
COORDINATES = 50


def places(points: NDArray[np.float32]) -> NDArray[np.float64]:
    """(k, 2) in [0, 1]: t-SNE of (k, d) points, whose neighbours stay neighbours; of `FEW`, principal components."""
    if len(points) < 2:
        return np.full((len(points), 2), 0.5)
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    # The sign of a component is not determined: its largest number is made positive.
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    main = (left * sizes * signs)[:, :COORDINATES]
    found = main[:, :2]
    if len(points) > FEW:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(points) - 1) / 3)
        found = TSNE(2, perplexity=perplexity, init=_start(found), random_state=0, method="barnes_hut").fit_transform(
            main
        )
    if found.shape[1] < 2:
        found = np.column_stack([found, np.zeros(len(found))])
    low, high = found.min(axis=0), found.max(axis=0)
    scaled: NDArray[np.float64] = (found - low) / np.where(high > low, high - low, 1)
    return np.asarray(scaled, np.float64)


def _start(main: NDArray[np.float64]) -> NDArray[np.float32]:
    """Principal components, small, as t-SNE begins best with."""
    return np.asarray(main / max(float(main[:, 0].std()), 1e-12) * 1e-4, np.float32)
