"""Results as tables: for the screen and README (Markdown), for programs (CSV), with the paper's rows beside ours."""

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
    """Top-1 and mean accuracy per class of every arm and layer in per cent, +- half of the 95 % interval."""
    arms = result["arms"]
    layers = list(dict.fromkeys(layer for arm in arms.values() for layer in arm["layers"]))
    lines: list[str] = []
    for measure, title in (("top1", "top-1"), ("mean_class", "mean per class")):
        rows = [[_title(name, arm), *(_cell(arm, layer, measure) for layer in layers)] for name, arm in arms.items()]
        lines += [*_table([f"linear probe, {title} %", *layers], rows), ""]
    data = result["data"]
    lines.append(
        f"{result['protocol']}: {data['train']} pictures to train, {data['test']} to test, {data['classes']} classes, "
        f"chance {result['chance']:.1%}."
    )
    if layers == ["conv1", "conv2", "conv3", "conv4", "conv5"]:
        rows = [[name, *(f"{value:.1f}" for value in values)] for name, values in PAPER.items()]
        lines += ["", "For orientation, the paper's own (AlexNet, ImageNet, 1000 classes):", ""]
        lines += _table(["top-1 %", *layers], rows)
    return "\n".join(lines) + "\n"


def to_csv(result: dict[str, Any]) -> str:
    """One line for each arm and layer; accuracies as shares."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ("top1", "top1_low", "top1_high", "mean_class", "mean_class_low", "mean_class_high")
    writer.writerow(["protocol", "arm", "arch", "task", "layer", "numbers", "lr", *columns])
    for name, arm in result["arms"].items():
        for layer, found in arm["layers"].items():
            values = [found["top1"], *found["top1_interval"], found["mean_class"], *found["mean_class_interval"]]
            first = [result["protocol"], name, arm["arch"], arm["task"], layer, found["numbers"], found["lr"]]
            writer.writerow(first + [f"{value:.6f}" for value in values])
    return out.getvalue()


def _title(name: str, arm: dict[str, Any]) -> str:
    return f"{arm['arch']}, {TASKS.get(arm['task'], arm['task'])}" + ("" if name == "random" else f" ({name})")


def _cell(arm: dict[str, Any], layer: str, measure: str) -> str:
    found = arm["layers"].get(layer)
    if not found:
        return "-"
    low, high = found[f"{measure}_interval"]
    return f"{100 * found[measure]:.1f} ± {50 * (high - low):.1f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *(line(row) for row in rows)]
