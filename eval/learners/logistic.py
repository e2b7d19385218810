"""Logistic regression on frozen vectors by scikit-learn's L-BFGS, along a path of weight decays."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng

ITERATIONS = 100  # of L-BFGS for each weight decay; each starts where the one before ended


def path(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], decays: Sequence[float], tick: Callable[[], object]
) -> Iterator[Any]:
    """The classifier (scikit-learn's, the same object again and again) after each of `decays`, largest first.

    The loss is the sum of cross-entropies + decay / 2 * the squared length of the weights: C = 1 / decay. Multinomial,
    the bias is not decayed.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) == 1:  # of a handful of images, a part may hold one class alone
        model: Any = DummyClassifier(strategy="most_frequent")
    else:
        model = LogisticRegression(solver="lbfgs", max_iter=ITERATIONS, warm_start=True)
    for decay in decays:
        if isinstance(model, LogisticRegression):
            model.set_params(C=1 / decay)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the limit of iterations is part of the protocol
            model.fit(vectors, labels)
        tick()
        yield model


def fitted(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], decays: Sequence[float], tick: Callable[[], object]
) -> Any:
    """The classifier at the end of the path."""
    *_, last = path(vectors, labels, decays, tick)
    return last


def right_by_decay(
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    held: NDArray[np.bool_],
    decays: Sequence[float],
    tick: Callable[[], object],
) -> NDArray[np.int64]:
    """(decays,) how many of the images that are `held` out, (n,), each classifier of the others gets right."""
    if not held.any() or held.all():
        return np.zeros(len(decays), np.int64)
    models = path(vectors[~held], labels[~held], decays, tick)
    return np.array([(model.predict(vectors[held]) == labels[held]).sum() for model in models])


def last_best(right: NDArray[np.int64]) -> int:
    """The place of the highest number, the last of equals: there the smallest decay, as in the transfer study's code.

    With one image a class no decay gets any right of those held out, and large ones do not learn.
    """
    return len(right) - 1 - int(right[::-1].argmax())


def stratified_folds(labels: NDArray[np.int64], count: int, seed: int, purpose: str) -> NDArray[np.int64]:
    """(n,) in 0..count-1: a fold for each image, every class spread evenly over the folds in a seeded order."""
    place = place_in_class(labels, seed, purpose)
    found: NDArray[np.int64] = (place + labels) % count  # classes of one image do not all fall into the first fold
    return found


def place_in_class(labels: NDArray[np.int64], seed: int, purpose: str) -> NDArray[np.int64]:
    """(n,) int64: 0, 1, ... within each class, in a random order that is a function of (seed, purpose)."""
    drawn = rng.words(seed, purpose, 0, torch.arange(len(labels)), 1)[:, 0].numpy()
    order = np.lexsort((drawn, labels))
    firsts = np.searchsorted(labels[order], labels[order])
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - firsts
    return place
