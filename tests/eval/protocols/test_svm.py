"""Linear SVMs against scikit-learn's own cross-validation; several labels an image; few images."""

import numpy as np
import pytest
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.svm import LinearSVC

from ktransfer.artifacts.features import Features
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.learners.logistic import stratified_folds
from ktransfer.eval.learners.maps import Frozen, Layer
from ktransfer.eval.learners.neighbours import unit
from ktransfer.eval.metrics import voc_ap
from ktransfer.eval.protocols import svm

CLASSES, NUMBERS = 6, 10
NEAR = 3e-4  # both of two minima are found to half of this (hinge.py)
LAYER = Layer("conv5", NUMBERS, 1, 0, NUMBERS)


def planted(count, seed):
    """Gaussian classes; two rows are broken."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, count).astype(np.int32)
    rows = np.random.default_rng(99).normal(size=(CLASSES, NUMBERS))[targets] + rng.normal(size=(count, NUMBERS))
    valid = ~np.isin(np.arange(count), [1, 6])
    return Frozen([LAYER], Features(None, rows.astype(np.float32), valid, targets, {}), [])


def evaluated(train, test, *tags):
    return svm._one_layer(train, test, LAYER, tags, EvalConfig(), "arm")


def several(count, seed, signal=2.0):
    """Vectors in which each class adds its own direction; tags, a tenth of them not counted."""
    rng = np.random.default_rng(seed)
    tags = (rng.random((count, CLASSES)) < 0.3).astype(np.int8)
    means = signal * np.random.default_rng(98).normal(size=(CLASSES, NUMBERS))
    part = planted(count, seed)
    part.features.rows[:] = tags @ means + rng.normal(size=(count, NUMBERS))
    part.features.rows[~part.features.valid] = 0
    part.features.targets[:] = -1
    tags[rng.random(tags.shape) < 0.1] = -1
    return part, tags


def test_the_cost_is_that_of_cross_validation():
    part = planted(300, 0)
    rows, labels = unit(part.features.rows), part.features.targets.astype(np.int64)
    split = PredefinedSplit(stratified_folds(labels, 3, 4, "eval/svm"))
    reached = [
        cross_val_score(LinearSVC(C=cost, dual=True, max_iter=2000, random_state=4), rows, labels, cv=split).mean()
        for cost in svm.COSTS
    ]
    predictions, cost = svm._single(rows, labels, rows[:50], 4, lambda: None)
    assert cost == svm.COSTS[int(np.argmax(np.round(reached, 9)))]
    theirs = LinearSVC(C=cost, dual=True, max_iter=2000, random_state=4).fit(rows, labels)
    assert (predictions == theirs.predict(rows[:50])).all()


def test_several_labels_an_image():
    (train, tags), (test, wanted) = several(400, 0), several(300, 1)
    cell = evaluated(train, test, tags, wanted)
    assert "top1" not in cell and len(cell["cost"]) == CLASSES
    low, high = cell["map_interval"]
    assert 0.75 < low <= cell["map"] <= high <= 1
    assert 0.4 < cell["shot4"] < cell["shot16"] < cell["map"]
    # By scikit-learn, class by class, without the images that are not counted.
    rows, asked = unit(train.features.rows[train.features.valid]), unit(test.features.rows[test.features.valid])
    tags, wanted = tags[train.features.valid], wanted[test.features.valid]
    found = []
    for column, cost in enumerate(cell["cost"]):
        counted = tags[:, column] >= 0
        model = LinearSVC(C=cost, dual=True, max_iter=2000, class_weight={1: 2, 0: 1}, random_state=0)
        predictions = model.fit(rows[counted], tags[counted, column]).decision_function(asked)
        found.append(voc_ap(predictions, wanted[:, column]))
    assert cell["map"] == pytest.approx(np.mean(found))


def test_shuffled_tags_stay_at_chance():
    (train, tags), (test, wanted) = several(300, 0), several(300, 1)
    rng = np.random.default_rng(0)
    wanted = rng.permutation(wanted)
    cell = evaluated(train, test, rng.permutation(tags), wanted)
    # The 11-point rule flatters guesses: what random scores reach, not the share of "yes".
    guesses = [voc_ap(rng.random(300), wanted[:, column]) for column in range(CLASSES) for _ in range(20)]
    assert abs(cell["map"] - np.mean(guesses)) < 0.06
    assert abs(cell["shot16"] - np.mean(guesses)) < 0.06


def test_what_is_not_counted_does_not_teach():
    part, tags = several(150, 0)
    rows = unit(part.features.rows)
    predictions, costs = svm._several(rows, tags, rows, 0, lambda: None)
    loud = np.where(tags[:, 1:2] < 0, -3 * rows, rows).astype(np.float32)
    loud_predictions = svm._several(loud, tags[:, 1:2], rows, 0, lambda: None)[0]
    np.testing.assert_allclose(loud_predictions, predictions[:, 1:2], atol=NEAR)
    assert (
        np.abs(svm._several(loud, np.abs(tags[:, 1:2]), rows, 0, lambda: None)[0] - predictions[:, 1:2]) > NEAR
    ).any()
    # A class without a "yes" to learn from scores 0 everywhere, and costs None.
    tags[:, 2] = np.minimum(tags[:, 2], 0)
    fewer, cost = svm._several(rows, tags, rows, 0, lambda: None)
    assert cost[2] is None and not fewer[:, 2].any()
    assert [*cost[:2], *cost[3:]] == [*costs[:2], *costs[3:]]
    np.testing.assert_allclose(np.delete(fewer, 2, axis=1), np.delete(predictions, 2, axis=1), atol=NEAR)


def test_few_images_of_each_class():
    labels = np.repeat([0, 1, 2], [40, 3, 17])
    drawn = [svm._drawn(labels, 4, 0, draw) for draw in range(svm.DRAWS)]
    assert all(np.bincount(labels[rows]).tolist() == [4, 3, 4] for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) == svm.DRAWS
    tags = several(200, 0)[1]
    rows = svm._drawn(tags, 4, 0, 0)
    assert ((tags[rows] == 1).sum(axis=0) >= 4).all() and len(rows) <= 4 * CLASSES


def test_a_handful_of_images():
    rows = np.eye(4, dtype=np.float32)
    predictions, _ = svm._single(rows[:2], np.array([5, 7]), rows, 0, lambda: None)
    assert predictions[:2].tolist() == [5, 7]
