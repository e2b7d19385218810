"""The table: a golden one, and which columns it has."""

import csv
import io
import re

from ktransfer.eval.table import TASKS, to_csv, to_markdown


def found(top1, mean, half=0.01):
    return {
        "numbers": 200,
        "grid": 5,
        "lr": 0.003,
        "held_out": {"0.003": 0.5},
        "top1": top1,
        "top1_interval": [top1 - half, top1 + half],
        "mean_class": mean,
        "mean_class_interval": [mean - 2 * half, mean + 2 * half],
    }


RESULT = {
    "schema": 2,
    "protocol": "linear/1",
    "title": "linear probe",
    "measures": {"top1": "top-1 %", "mean_class": "mean per class %"},
    "data": {"train": 90, "test": 30, "classes": 12},
    "chance": 1 / 12,
    "settings": {},
    "arms": {
        "random": {"task": "random", "arch": "alexnet", "width": 1.0, "scores": {"conv1": found(0.1234, 0.2)}},
        "mine": {
            "task": "pseudo-labels",
            "arch": "alexnet",
            "width": 1.0,
            "scores": {"conv1": found(0.5, 0.4), "conv2": found(0.6789, 0.05, 0.1)},
        },
    },
}

GOLDEN = """\
| linear probe, top-1 %                     | conv1      | conv2       |
|-------------------------------------------|------------|-------------|
| alexnet, random weights                   | 12.3 ± 1.0 | -           |
| alexnet, retrained on pseudo-labels (mine) | 50.0 ± 1.0 | 67.9 ± 10.0 |

| linear probe, mean per class %            | conv1      | conv2       |
|-------------------------------------------|------------|-------------|
| alexnet, random weights                   | 20.0 ± 2.0 | -           |
| alexnet, retrained on pseudo-labels (mine) | 40.0 ± 2.0 | 5.0 ± 20.0  |

linear/1: 90 images to train, 30 to test, 12 classes, chance 8.3%.
"""


def cells(text):
    """The cells of all rows, without the rules; widths are the layout's affair."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_golden_markdown():
    text = to_markdown(RESULT)
    assert cells(text) == cells(GOLDEN)
    assert text.splitlines()[-1] == GOLDEN.splitlines()[-1]
    assert "paper" not in text
    for block in re.split(r"\n\n", text)[:2]:
        assert len({len(line) for line in block.splitlines()}) == 1


def test_csv_holds_the_same_numbers():
    rows = list(csv.DictReader(io.StringIO(to_csv(RESULT))))
    expected = [("random", "conv1"), ("mine", "conv1"), ("mine", "conv2")]
    assert [(row["arm"], row["column"]) for row in rows[::2]] == expected
    assert [row["measure"] for row in rows] == ["top1", "mean_class"] * 3
    for row in rows:
        layer = RESULT["arms"][row["arm"]]["scores"][row["column"]]
        assert row["protocol"] == "linear/1"
        assert row["task"] == RESULT["arms"][row["arm"]]["task"]
        wanted = [layer[row["measure"]], *layer[f"{row['measure']}_interval"]]
        for name, value in zip(("value", "low", "high"), wanted, strict=True):
            assert abs(float(row[name]) - value) < 1e-6
        assert row["deviation"] == ""


def test_a_measure_has_the_columns_that_have_it():
    arm = RESULT["arms"]["mine"]
    other = arm | {"scores": arm["scores"] | {"sum": {"ece": 0.125, "ece_interval": [0.1, 0.15]}}}
    result = RESULT | {"measures": RESULT["measures"] | {"ece": "error %", "map": "mAP %"}, "arms": {"mine": other}}
    text = to_markdown(result)
    assert [line.count("|") for line in text.splitlines() if line.startswith("| linear")] == [4, 4, 3]
    assert "| 12.5 ± 2.5 |" in text
    assert "mAP" not in text
    both = to_markdown(result | {"arms": {"random": arm, "mine": other}})
    assert [line.count("|") for line in both.splitlines() if "| 12.5 ± 2.5 |" in line] == [3]
    assert "| -" not in both.split("error %")[1]


def test_a_wide_table_is_turned():
    scores = {f"c{place}": found(place / 10, 0.5) for place in range(9)}
    arms = {name: RESULT["arms"][name] | {"scores": scores} for name in ("random", "mine")}
    table = cells(to_markdown(RESULT | {"arms": arms}))
    wanted = ["linear probe, top-1 %", "alexnet, random weights", "alexnet, retrained on pseudo-labels (mine)"]
    assert table[0] == wanted
    assert table[4] == ["c3", "30.0 ± 1.0", "30.0 ± 1.0"]


def test_a_note_in_place_of_chance():
    assert to_markdown(RESULT | {"note": "weights alone."}).splitlines()[-1] == "linear/1: weights alone."
    last = to_markdown(RESULT | {"note": "{counts}of the second."}).splitlines()[-1]
    assert last == "linear/1: 90 images to train, 30 to test, 12 classes, of the second."


def test_every_task_has_a_title():
    for task, words in TASKS.items():
        arm = {"task": task, "arch": "resnet18", "width": 1.0, "scores": {"layer4": found(0.1, 0.1)}}
        assert f"| resnet18, {words} (run) " in to_markdown(RESULT | {"arms": {"run": arm}})


def test_how_many_test_images_were_evaluated():
    cell = RESULT["arms"]["mine"]["scores"]["conv1"] | {"images": 12}
    result = RESULT | {"arms": {"mine": RESULT["arms"]["mine"] | {"scores": {"clean": cell}}}}
    assert "30 to test (12 of them evaluated), 12 classes" in to_markdown(result)
    assert "30 to test, 12 classes" in to_markdown(RESULT)


def test_rows_that_are_normalised_differently_are_named():
    result = RESULT | {"normalised": {"random": "picture", "mine": "imagenet", "other": "picture"}}
    last = to_markdown(result).splitlines()[-1]
    assert "12 classes, images normalised differently (picture: random, other; imagenet: mine), chance 8.3%." in last
    alike = RESULT | {"normalised": {"random": "picture", "mine": "picture"}}
    assert to_markdown(alike) == to_markdown(RESULT)
