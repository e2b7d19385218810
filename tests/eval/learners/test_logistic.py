"""Logistic regression along a path of decays, against scikit-learn and scipy; folds."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from ktransfer.eval.learners.logistic import fitted, last_best, path, place_in_class, right_by_decay, stratified_folds
from ktransfer.eval.protocols import logreg, lowshot


def nothing():
    pass


def planted(count=240, classes=4, numbers=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    rows = np.random.default_rng(9).normal(size=(classes, numbers))[labels] + rng.normal(size=(count, numbers))
    return rows.astype(np.float32), labels


@pytest.mark.parametrize("decay", [100.0, 1.0, 0.03])
def test_the_minimum_of_the_loss_that_is_stated(decay):
    rows, labels = planted()
    classes, (count, numbers) = 4, rows.shape
    model = fitted(rows, labels, [1e4, 100 * decay, decay], nothing)

    def loss(flat):
        weights, bias = flat[: classes * numbers].reshape(classes, numbers), flat[classes * numbers :]
        logits = rows @ weights.T + bias
        logits = logits - logits.max(1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -logs[np.arange(count), labels].sum() + decay / 2 * (weights**2).sum()

    wanted = minimize(loss, np.zeros(classes * (numbers + 1)), method="L-BFGS-B", options={"maxiter": 2000})
    mine = loss(np.concatenate([model.coef_.ravel(), model.intercept_]))
    assert mine == pytest.approx(wanted.fun, rel=2e-4)
    theirs = LogisticRegression(C=1 / decay, max_iter=1000).fit(rows, labels)
    assert (model.predict(rows) == theirs.predict(rows)).mean() > 0.99


def test_right_predictions_of_images_that_no_classifier_learns_from():
    rows, labels = planted()
    held = np.arange(240) % 5 == 0
    ticks = []
    right = right_by_decay(rows, labels, held, [1000.0, 1.0], lambda: ticks.append(1))
    assert len(ticks) == 2
    for decay, found in zip((1000.0, 1.0), right, strict=True):
        theirs = LogisticRegression(C=1 / decay, max_iter=1000).fit(rows[~held], labels[~held])
        assert abs(found - (theirs.predict(rows[held]) == labels[held]).sum()) <= 1
    wrong = np.where(held, (labels + 1) % 4, labels)
    assert right_by_decay(rows, wrong, held, [1.0], nothing)[0] < right[1]
    assert right_by_decay(rows, labels, np.zeros(240, bool), [1.0], nothing).tolist() == [0]
    assert right_by_decay(rows, labels, np.ones(240, bool), [1.0], nothing).tolist() == [0]


def test_of_equals_the_smallest_decay():
    assert last_best(np.array([3, 7, 7, 2])) == 2
    assert last_best(np.zeros(5, np.int64)) == 4


def test_one_class_alone():
    rows, _ = planted(5)
    *_, model = path(rows, np.full(5, 3), [1.0, 0.1], nothing)
    assert model.predict(rows).tolist() == [3] * 5


def test_decays():
    assert len(logreg.DECAYS) == 45 and logreg.DECAYS[0] == 1e5 and logreg.DECAYS[-1] == 1e-6
    np.testing.assert_allclose(np.diff(np.log10(logreg.DECAYS)), -11 / 44, atol=1e-5)
    assert lowshot.DECAYS == (1e5, 1e4, 1e3, 100, 10, 1, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)


def test_folds_share_every_class_evenly():
    labels = np.repeat([0, 1, 2, 3], [9, 7, 1, 1])
    folds = stratified_folds(labels, 3, 0, "test")
    assert set(folds.tolist()) == {0, 1, 2}
    for label in range(4):
        sizes = np.bincount(folds[labels == label], minlength=3)
        assert sizes.max() - sizes.min() <= 1
    assert folds[16] != folds[17]  # classes of one image
    assert (folds == stratified_folds(labels, 3, 0, "test")).all()
    assert (folds != stratified_folds(labels, 3, 1, "test")).any()
    assert (folds != stratified_folds(labels, 3, 0, "other")).any()


def test_places_in_a_class_are_random_and_complete():
    labels = np.random.default_rng(0).integers(0, 3, 50)
    place = place_in_class(labels, 7, "test")
    for label in range(3):
        assert sorted(place[labels == label]) == list(range((labels == label).sum()))
    firsts = [np.flatnonzero((labels == 0) & (place_in_class(labels, seed, "test") == 0))[0] for seed in range(30)]
    assert len(set(firsts)) > 8
