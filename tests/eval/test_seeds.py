"""Repetitions as one result, against numpy."""

import numpy as np
import pytest

from ktransfer.eval.seeds import merged
from ktransfer.eval.table import to_csv, to_markdown


def repetition(value):
    cell = {"top1": value, "top1_interval": [value - 0.02, value + 0.04], "lr": value}
    return {"task": "random", "arch": "alexnet", "width": 1.0, "scores": {"conv1": cell}}


def test_one_stays_as_it_is():
    assert merged([repetition(0.5)]) == repetition(0.5)


def test_means_and_deviations_over_seeds():
    values = [0.5, 0.62, 0.59]
    found = merged([repetition(value) for value in values])
    cell = found["scores"]["conv1"]
    assert cell["top1"] == pytest.approx(np.mean(values))
    assert cell["top1_interval"] == pytest.approx([np.mean(values) - 0.02, np.mean(values) + 0.04])
    assert cell["top1_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert cell["top1_seeds"] == values
    assert cell["lr"] == 0.5
    result = {
        "protocol": "linear/1",
        "title": "linear probe",
        "measures": {"top1": "top-1 %"},
        "data": {"train": 1, "test": 1, "classes": 2},
        "chance": 0.5,
        "arms": {"random": found},
    }
    assert "| 57.0 ± 3.0 (seeds 6.2) |" in to_markdown(result)
    assert to_csv(result).splitlines()[1].endswith(",0.570000,0.550000,0.610000,0.062450")
