"""Results as tables: for the screen and README (Markdown), for programs (CSV)."""

import csv
import io
from typing import Any

TASKS = {
    "random": "random weights",
    "jigsaw": "trained on Jigsaw",
    "jigsawpp": "trained on Jigsaw++",
    "rotation": "trained on rotations",
    "context": "trained on context",
    "pseudo-labels": "retrained on pseudo-labels",
    "classes": "trained on true labels",
}

# Top-1 in per cent on ImageNet, AlexNet, 1000 classes (paper, Table of linear classifiers; reference jigsawpp.md §6.2).
PAPER = {
    "Random": (11.6, 17.1, 16.9, 16.3, 14.1),
    "Jigsaw++": (18.2, 28.7, 34.1, 33.2, 28.0),
    "CC+Jigsaw++": (18.9, 30.5, 35.7, 35.4, 32.2),
    "CC+vgg-Jigsaw++": (19.2, 32.0, 37.3, 37.1, 34.6),
    "Supervised": (19.3, 36.3, 44.2, 48.3, 50.5),
}


def to_markdown(result: dict[str, Any]) -> str:
    """A table for each measure, in per cent, +- half of the 95 % interval, and the deviation over seeds."""
    arms = result["arms"]
    columns = list(dict.fromkeys(column for arm in arms.values() for column in arm["scores"]))
    lines: list[str] = []
    for measure, words in result["measures"].items():
        rows = [[title(name, arm), *(_cell(arm, column, measure) for column in columns)] for name, arm in arms.items()]
        lines += [*table([f"{result['title']}, {words}", *columns], rows), ""]
    data = result["data"]
    lines.append(
        f"{result['protocol']}: {data['train']} pictures to train, {data['test']} to test, {data['classes']} classes, "
        f"chance {result['chance']:.1%}."
    )
    if result["protocol"].startswith("linear/") and columns == ["conv1", "conv2", "conv3", "conv4", "conv5"]:
        rows = [[name, *(f"{value:.1f}" for value in values)] for name, values in PAPER.items()]
        lines += ["", "For orientation, the paper's own (AlexNet, ImageNet, 1000 classes):", ""]
        lines += table(["top-1 %", *columns], rows)
    return "\n".join(lines) + "\n"


def to_csv(result: dict[str, Any]) -> str:
    """One line for each arm, column and measure; shares, not per cent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["protocol", "arm", "arch", "task", "column", "measure", "value", "low", "high", "deviation"])
    for name, arm in result["arms"].items():
        for column, found in arm["scores"].items():
            for measure in result["measures"]:
                if measure in found:
                    values = [found[measure], *found[f"{measure}_interval"]]
                    numbers = [f"{value:.6f}" for value in values]
                    deviation = found.get(f"{measure}_deviation")
                    numbers.append("" if deviation is None else f"{deviation:.6f}")
                    writer.writerow([result["protocol"], name, arm["arch"], arm["task"], column, measure, *numbers])
    return out.getvalue()


def title(name: str, arm: dict[str, Any]) -> str:
    """What a row of a table is called."""
    return f"{arm['arch']}, {TASKS.get(arm['task'], arm['task'])}" + ("" if name == "random" else f" ({name})")


def _cell(arm: dict[str, Any], column: str, measure: str) -> str:
    found = arm["scores"].get(column)
    if not found or measure not in found:
        return "-"
    low, high = found[f"{measure}_interval"]
    deviation = found.get(f"{measure}_deviation")
    spread = "" if deviation is None else f" (seeds {100 * deviation:.1f})"
    return f"{100 * found[measure]:.1f} ± {50 * (high - low):.1f}{spread}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *(line(row) for row in rows)]
