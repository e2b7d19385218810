"""Few-shot episodes with the prototype classifier on frozen vectors (docs/papers.md)."""

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng

WAYS, QUERIES, EPISODES = 5, 15, 600


def episodes(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
    shots: int,
    seed: int,
) -> NDArray[np.float64]:
    """(600,) right predictions: 5 random classes, the mean of `shots` training images each; the nearest mean wins.

    Shares; squared Euclidean distance; 15 random test images of each class; of equal distances the first class wins.
    Classes with fewer images are not drawn; (0,) where fewer than 5 are left. What is drawn depends on the labels and
    the seed alone, so that all networks and layers get the same episodes.
    """
    count = 1 + int(max(train_labels.max(initial=-1), test_labels.max(initial=-1)))
    enough = (np.bincount(train_labels, minlength=count) >= shots) & (
        np.bincount(test_labels, minlength=count) >= QUERIES
    )
    known = np.flatnonzero(enough)
    if len(known) < WAYS:
        return np.empty(0)
    index = torch.arange(EPISODES)
    ways = known[rng.shuffles(seed, f"eval/episodes {shots}", 0, index, len(known))[:, :WAYS].numpy()]
    support = _drawn(train_labels, ways, shots, seed, f"eval/support {shots}")
    asked = _drawn(test_labels, ways, QUERIES, seed, f"eval/queries {shots}")
    right = np.empty(EPISODES)
    for number in range(EPISODES):
        means = train[support[number]].astype(np.float64).mean(axis=1)  # (5, d)
        wide = test[asked[number]].astype(np.float64)  # (5, 15, d)
        far = np.stack([((wide - mean) ** 2).sum(axis=-1) for mean in means], axis=-1)
        right[number] = (far.argmin(axis=-1) == np.arange(WAYS)[:, None]).mean()
    return right


def _drawn(
    labels: NDArray[np.int64], ways: NDArray[np.int64], count: int, seed: int, purpose: str
) -> NDArray[np.int64]:
    """(episodes, ways, count) rows of (episodes, ways) classes, without repetition."""
    found = np.empty((*ways.shape, count), np.int64)
    for label in np.unique(ways):
        rows = np.flatnonzero(labels == label)
        number, way = np.nonzero(ways == label)
        chosen = rng.shuffles(seed, purpose, int(label), torch.from_numpy(number), len(rows))[:, :count]
        found[number, way] = rows[chosen.numpy()]
    return found
