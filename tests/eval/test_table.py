"""The table: a golden one, and the paper's rows against the reference."""

import csv
import io
import re

from ktransfer.eval.table import PAPER, TASKS, to_csv, to_markdown

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")


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

linear/1: 90 pictures to train, 30 to test, 12 classes, chance 8.3%.
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


def test_five_layers_of_alexnet_stand_beside_the_papers_own():
    arm = {"task": "random", "arch": "alexnet", "width": 1.0, "scores": {name: found(0.1, 0.1) for name in LAYERS}}
    text = to_markdown(RESULT | {"arms": {"random": arm}})
    table = cells(text[text.index("For orientation") :])
    # Linear classifier on frozen features, ImageNet, top-1 % (reference jigsawpp.md §6.2).
    assert table == [
        ["top-1 %", *LAYERS],
        ["Random", "11.6", "17.1", "16.9", "16.3", "14.1"],
        ["Jigsaw++", "18.2", "28.7", "34.1", "33.2", "28.0"],
        ["CC+Jigsaw++", "18.9", "30.5", "35.7", "35.4", "32.2"],
        ["CC+vgg-Jigsaw++", "19.2", "32.0", "37.3", "37.1", "34.6"],
        ["Supervised", "19.3", "36.3", "44.2", "48.3", "50.5"],
    ]
    assert len(PAPER) == 5


def test_every_task_has_a_title():
    for task, words in TASKS.items():
        arm = {"task": task, "arch": "resnet18", "width": 1.0, "scores": {"layer4": found(0.1, 0.1)}}
        assert f"| resnet18, {words} (run) " in to_markdown(RESULT | {"arms": {"run": arm}})
