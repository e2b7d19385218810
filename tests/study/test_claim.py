"""Claims of a study: intervals against scipy's, verdicts at their limits, and what a recipe may not say."""

import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from ktransfer.errors import UsageError
from ktransfer.retrain.selftraining import study as selftraining
from ktransfer.study import claim, findings
from ktransfer.study.recipe import read
from tests.study.test_study import GRID, SMALL, recipe

ROWS = {
    "deep": {"conv4": {(0,): 50.0, (1,): 52.0, (2,): 51.0}, "conv5": {(0,): 48.0, (1,): 49.0, (2,): 47.5}},
    "shallow": {"conv4": {(0,): 47.0, (1,): 49.5, (2,): 48.5}, "conv5": {(0,): 44.0, (1,): 46.0, (3,): 40.0}},
    "other": {"conv4": {(0,): 50.5, (1,): 51.5, (2,): 51.0}, "conv5": {(0,): 48.0, (1,): 49.5, (2,): 47.0}},
}


def of(expect="more", bound=1.0, contrasts=({"deep": 1, "shallow": -1},), columns=("conv4",)):
    return claim.Claim("a", expect, bound, "top1", contrasts=list(contrasts), columns=list(columns))


def test_a_contrast_is_paired_and_its_interval_that_of_scipy():
    (found,) = claim.judge(of(), ROWS)
    ours = scipy.stats.ttest_rel([50.0, 52.0, 51.0], [47.0, 49.5, 48.5]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ours.low, ours.high))
    assert (found.repetitions, found.verdict, found.needed) == (3, claim.HOLDS, None)


def test_columns_are_averaged_in_the_repetitions_that_all_rows_have():
    (found,) = claim.judge(of(columns=()), ROWS)
    by_hand = [((50 - 47) + (48 - 44)) / 2, ((52 - 49.5) + (49 - 46)) / 2]
    assert (found.mean, found.repetitions) == (pytest.approx(np.mean(by_hand)), 2)


def test_several_contrasts_share_the_error():
    pair = ({"deep": 1, "shallow": -1}, {"deep": 1, "other": -1})
    found = claim.judge(of("same", 1.0, pair), ROWS)
    ours = scipy.stats.ttest_rel([50.0, 52.0, 51.0], [50.5, 51.5, 51.0]).confidence_interval(0.975)
    assert (found[1].low, found[1].high) == pytest.approx((ours.low, ours.high))
    assert [one.verdict for one in found] == [claim.REFUTED, claim.UNDECIDED]
    assert claim.verdict(found) == claim.REFUTED


@pytest.mark.parametrize(
    ("expect", "bound", "low", "high", "verdict"),
    [
        ("more", 1.0, 0.1, 3.0, claim.HOLDS),
        ("more", 1.0, -0.5, 0.9, claim.REFUTED),  # at most 0.9, less than what matters
        ("more", 1.0, -0.5, 1.1, claim.UNDECIDED),
        ("more", 1.0, -3.0, -0.1, claim.REFUTED),
        ("less", 1.0, -3.0, -0.1, claim.HOLDS),
        ("less", 1.0, 0.1, 3.0, claim.REFUTED),
        ("same", 1.0, -0.9, 0.9, claim.HOLDS),
        ("same", 1.0, -0.9, 1.1, claim.UNDECIDED),
        ("same", 1.0, 1.1, 1.9, claim.REFUTED),
        ("same", 1.0, -1.9, -1.1, claim.REFUTED),
    ],
)
def test_verdicts_at_their_limits(expect, bound, low, high, verdict):
    middle, half = (low + high) / 2, (high - low) / 2
    step = half / scipy.stats.t.ppf(0.975, 2) * math.sqrt(3)
    values = {(0,): middle - step, (1,): middle, (2,): middle + step}
    (found,) = claim.judge(of(expect, bound, [{"a": 1}], ["c"]), {"a": {"c": values}})
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.verdict == verdict


def test_the_repetitions_that_would_decide_do():
    values = {(seed,): value for seed, value in enumerate([3.0, -1.0, 1.5, 0.5])}
    (found,) = claim.judge(of(contrasts=[{"a": 1}], columns=["c"]), {"a": {"c": values}})
    assert found.verdict == claim.UNDECIDED
    spread, middle = np.std([3.0, -1.0, 1.5, 0.5], ddof=1), 1.0
    halves = {n: scipy.stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) for n in (found.needed - 1, found.needed)}
    assert halves[found.needed] < middle <= halves[found.needed - 1]


def test_one_repetition_decides_nothing():
    (found,) = claim.judge(of(contrasts=[{"a": 1}], columns=["c"]), {"a": {"c": {(0,): 30.0}}})
    assert found == (30.0, None, None, 1, claim.UNDECIDED, None)


def test_words():
    assert claim.contrast_in_words({"a": 1, "b": -1}) == "a - b"
    assert claim.contrast_in_words({"a": -0.5, "b": 1, "c": 2}) == "- 0.5 a + b + 2 c"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes/claims").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_recipes_of_the_claims_can_be_read(path):
    held = tomllib.loads(path.read_text())
    assert (selftraining.read(path) if "selftrain" in held else read(path)).claim.text == held["claim"]["text"]


CLAIM = """
[claim]
text = "Clusters are as good as labels"
source = "somebody"
expect = "same"
bound = 50.0
measure = "top1"
columns = ["conv3"]
contrasts = [{ "cc, k 3" = 1, "true labels" = -1 }]
"""


def test_a_study_says_what_became_of_its_claim(tmp_path):
    plan = read(recipe(tmp_path, SMALL + GRID + CLAIM))
    values = {"cc, k 3": {"conv3": {(0,): 20.0, (1,): 22.0}}, "true labels": {"conv3": {(0,): 25.0, (1,): 25.0}}}
    table = findings.Table("linear", "top1", "top-1 %", values)
    judged = claim.judge(plan.claim, findings._rows(plan.claim, [table]))
    assert claim.in_words(plan.claim, judged).startswith("**Clusters are as good as labels: holds**")
    assert json.loads(json.dumps(claim.in_json(plan.claim, judged)))["found"][0]["mean"] == -4.0
    with pytest.raises(UsageError, match="no measure 'top1' of protocol 'knn'"):
        findings._rows(claim.Claim(measure="top1", protocol="knn"), [table])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bound = 50.0", "bound = -1.0", "bound = -1.0: must be at least 0.01"),
        ("bound = 50.0", "", "lacks 'bound'"),
        ('expect = "same"', 'expect = "equal"', "must be one of more, less, same"),
        ('"true labels" = -1', '"label" = -1', "no row 'label'; the rows are cc, k 3"),
        ('[{ "cc, k 3" = 1, "true labels" = -1 }]', "[]", "must list tables of rows and weights"),
        ('[{ "cc, k 3" = 1, "true labels" = -1 }]', '[{ "labels" = true }]', "must list tables of rows and weights"),
        ('columns = ["conv3"]', "columns = 3", "must be a list of names"),
        ('source = "somebody"', 'sauce = "somebody"', "no setting 'sauce'; did you mean 'source'?"),
    ],
)
def test_a_wrong_claim_is_one_line_before_anything_begins(tmp_path, old, new, words):
    with pytest.raises(UsageError) as error:
        read(recipe(tmp_path, SMALL + GRID + CLAIM.replace(old, new)))
    assert words in str(error.value) and "\n" not in str(error.value)
