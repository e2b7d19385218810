"""Linear SVMs against scikit-learn's LinearSVC, solved to the end, and against the conditions of a minimum."""

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from ktransfer.eval.learners import hinge


def problem(count, numbers, classes, seed=0, noise=1.0):
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, classes, count)
    rows = draws.normal(size=(classes, numbers))[labels] + noise * draws.normal(size=(count, numbers))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    return rows.astype(np.float32), np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)


@pytest.mark.parametrize("turned", [1024, 1])
@pytest.mark.parametrize(("count", "numbers"), [(400, 12), (40, 60)])
@pytest.mark.parametrize("cost", [0.01, 1.0, 100.0])
def test_scores_are_those_of_scikit_learn(count, numbers, cost, turned, monkeypatch):
    monkeypatch.setattr(hinge, "TURNED", turned)
    given, signs = problem(count, numbers, 5)
    learn, ask = given[: count // 2], given[count // 2 :]
    rows = hinge.prepared(learn)
    assert (rows.axes is None) == (turned == 1)
    found = rows.of(ask) @ hinge.minimise(rows, signs[: count // 2], np.full((count // 2, 5), cost))
    for column in range(5):
        model = LinearSVC(C=cost, dual=True, tol=1e-9, max_iter=1_000_000, random_state=0)
        theirs = model.fit(learn, signs[: count // 2, column]).decision_function(ask)
        np.testing.assert_allclose(found[:, column], theirs, atol=1.5 * hinge.LENGTH)


def test_rows_may_weigh_differently_and_not_at_all():
    given, signs = problem(300, 8, 3)
    draws = np.random.default_rng(1)
    costs = draws.choice([0.0, 1.0, 2.0], signs.shape)
    found = hinge.minimise(hinge.prepared(given), signs, costs)
    rows = hinge.prepared(given)
    for column in range(3):
        model = LinearSVC(C=1, dual=True, tol=1e-9, max_iter=1_000_000, random_state=0)
        model.fit(given, signs[:, column], sample_weight=costs[:, column])
        np.testing.assert_allclose(
            rows.numbers @ found[:, column], model.decision_function(given), atol=1.5 * hinge.LENGTH
        )


def test_neither_the_start_nor_the_company_moves_the_minimum(monkeypatch):
    given, signs = problem(300, 20, 6, noise=2.0)
    rows, costs = hinge.prepared(given), np.full(signs.shape, 10.0)
    whole = hinge.minimise(rows, signs, costs)
    far = hinge.minimise(rows, signs, costs, 50 * np.random.default_rng(0).normal(size=whole.shape))
    monkeypatch.setattr(hinge, "AT_ONCE", 300)
    alone = hinge.minimise(rows, signs, costs)
    for other in (far, alone):
        assert np.linalg.norm(other - whole, axis=0).max() < 2 * hinge.LENGTH
    gaps = np.maximum(1 - signs * (rows.numbers @ whole), 0)
    gradient = whole - 2 * rows.numbers.T @ (costs * gaps * signs)
    assert np.linalg.norm(gradient, axis=0).max() <= hinge.LENGTH


def test_what_can_be_told_apart_at_any_cost():
    rows = np.eye(3, dtype=np.float32)
    found = hinge.minimise(hinge.prepared(rows), 2 * np.eye(3) - 1, np.full((3, 3), 1e6))
    assert (hinge.prepared(rows).numbers @ found) == pytest.approx(2 * np.eye(3) - 1, abs=1e-3)
    none = hinge.minimise(hinge.prepared(rows), 2 * np.eye(3) - 1, np.zeros((3, 3)), np.ones((3, 3)))
    assert np.abs(none).max() < hinge.LENGTH


def test_a_problem_that_is_solved_to_the_last_digit_does_not_harm_the_others():
    """Where no row is within its margin the function is |w|^2 / 2, and one step of conjugate gradients is exact."""
    given, signs = problem(40, 60, 2)
    rows, costs = hinge.prepared(given), np.full((40, 2), 100.0)
    start = np.zeros((rows.numbers.shape[1], 2))
    start[:, 0] = np.linalg.lstsq(rows.numbers, 3 * signs[:, 0], rcond=None)[0]
    with np.errstate(all="raise"):
        found = hinge.minimise(rows, signs, costs, start)
    np.testing.assert_allclose(found, hinge.minimise(rows, signs, costs), atol=2 * hinge.LENGTH)
