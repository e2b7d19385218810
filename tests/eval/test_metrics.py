"""Average precision by hand, against scikit-learn's curves, and its bootstrap against repeated images."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from ktransfer import rng
from ktransfer.eval.metrics import _weighted_ap, mean_ap, voc_ap, voc_map


def test_by_hand():
    # Yes, no, yes, no, no, yes: precision 1 up to a recall of 1/3, 2/3 up to 2/3, 1/2 up to 1.
    wanted = np.array([1, 0, 1, 0, 0, 1])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert voc_ap(scores, wanted) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 / 2) / 11)
    assert voc_ap(scores, 1 - wanted) == pytest.approx(11 * 3 / 5 / 11)
    assert voc_ap(scores, np.array([1, 1, 1, 0, 0, 0])) == 1
    assert voc_ap(scores, np.array([0, 0, 0, 0, 0, 1])) == pytest.approx(1 / 6)


def test_a_recall_of_three_tenths_reaches_the_point_at_three_tenths():
    wanted = np.array([1] * 3 + [0] * 7 + [1] * 7)
    scores = -np.arange(17.0)
    assert voc_ap(scores, wanted) == pytest.approx((4 + 7 * 10 / 17) / 11)


def test_equal_scores_count_together_whatever_their_order():
    wanted = np.array([0, 1, 0, 1, 1, 0, 0, 0])
    assert voc_ap(np.zeros(8), wanted) == pytest.approx(3 / 8)
    scores = np.array([1, 1, 1, 0, 0, 0, 0, 0.0])
    order = np.array([2, 1, 0, 5, 4, 3, 7, 6])
    assert voc_ap(scores, wanted) == voc_ap(scores[order], wanted[order])


def test_what_is_not_counted_might_as_well_not_be_there():
    draws = np.random.default_rng(0)
    scores, wanted = draws.random(60), draws.integers(-1, 2, 60)
    assert voc_ap(scores, wanted) == voc_ap(scores[wanted >= 0], wanted[wanted >= 0])
    assert np.isnan(voc_ap(scores, np.zeros(60, int)))


@pytest.mark.parametrize("seed", range(5))
def test_against_the_curve_of_scikit_learn(seed):
    draws = np.random.default_rng(seed)
    wanted = (draws.random(300) < 0.2).astype(int)
    scores = np.round(draws.normal(size=300) + wanted, 2)  # rounded: equal scores occur
    precision, recall = (part[:-1] for part in precision_recall_curve(wanted, scores)[:2])  # its last point is made up
    positives = wanted.sum()
    points = [precision[np.round(recall * positives) * 10 >= t * positives].max() for t in range(11)]
    assert voc_ap(scores, wanted) == pytest.approx(np.mean(points))
    assert voc_ap(scores, wanted) == pytest.approx(average_precision_score(wanted, scores), abs=0.06)


def test_the_mean_is_over_classes_that_occur():
    draws = np.random.default_rng(1)
    scores, tags = draws.random((50, 4)), draws.integers(-1, 2, (50, 4))
    tags[:, 2] = np.minimum(tags[:, 2], 0)
    assert mean_ap(scores, tags) == pytest.approx(np.mean([voc_ap(scores[:, c], tags[:, c]) for c in (0, 1, 3)]))


def test_weights_are_repetitions():
    draws = np.random.default_rng(2)
    scores, wanted = np.round(draws.random(40), 1), draws.integers(-1, 2, 40)
    weights = draws.integers(0, 4, (6, 40))
    repeated = [voc_ap(np.repeat(scores, row), np.repeat(wanted, row)) for row in weights]
    np.testing.assert_allclose(_weighted_ap(scores, wanted, weights), repeated)
    assert np.isnan(_weighted_ap(scores, wanted, np.where(wanted == 1, 0, weights))).all()


def test_the_interval_is_that_of_images_repeated_as_they_are_drawn():
    draws = np.random.default_rng(4)
    scores, tags = draws.random((40, 3)), draws.integers(-1, 2, (40, 3))
    drawn = rng.integers(7, "eval/bootstrap", 0, torch.arange(81), 40, 40).numpy()
    values = sorted(mean_ap(scores[rows], tags[rows]) for rows in drawn)
    low, high = voc_map(scores, tags, 7, 81)["map_interval"]
    assert low == pytest.approx(values[2]) and high == pytest.approx(values[78])  # 2.5 % of 80 steps from either end


def test_the_interval_holds_the_mean_shrinks_with_images_and_follows_the_seed():
    def drawn(count):
        draws = np.random.default_rng(3)
        tags = draws.integers(0, 2, (count, 3))
        return draws.normal(size=(count, 3)) + tags, tags

    small, large = (voc_map(*drawn(count), seed=0) for count in (60, 3000))
    for found in (small, large):
        low, high = found["map_interval"]
        assert 0 <= low < found["map"] < high <= 1
    assert small["map_interval"][1] - small["map_interval"][0] > 3 * (
        large["map_interval"][1] - large["map_interval"][0]
    )
    assert voc_map(*drawn(60), seed=0) == small
    other = voc_map(*drawn(60), seed=1)
    assert other["map"] == small["map"] and other["map_interval"] != small["map_interval"]
    perfect = np.eye(3, dtype=int)[np.arange(30) % 3]
    assert voc_map(perfect.astype(float), perfect, seed=0) == {"map": 1.0, "map_interval": [1.0, 1.0]}
