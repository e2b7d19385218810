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

WIDE = 8
"""Columns that a table has at most."""


def to_markdown(result: dict[str, Any]) -> str:
    """A table for each measure, in per cent, +- half of the 95 % interval, and the deviation over seeds."""
    arms = result["arms"]
    lines: list[str] = []
    for measure, words in result["measures"].items():
        columns = columns_of(arms, measure)
        if not columns:
            continue  # of labels of another kind
        rows = [
            [title(name, arm), *(cell_text(arm, column, measure) for column in columns)]
            for name, arm in arms.items()
            if any(measure in found for found in arm["scores"].values())
        ]
        lines += [*table(*turned([f"{result['title']}, {words}", *columns], rows)), ""]
    return "\n".join([*lines, footer(result)]) + "\n"


def footer(result: dict[str, Any]) -> str:
    """What a result was measured on."""
    data = result["data"]
    seen = {cell["images"] for arm in result["arms"].values() for cell in arm["scores"].values() if "images" in cell}
    evaluated = f" ({max(seen)} of them evaluated)" if seen and max(seen) < data["test"] else ""
    counts = f"{data['train']} images to train, {data['test']} to test{evaluated}, {data['classes']} classes, "
    note = result.get("note", f"{counts}chance {result['chance']:.1%}.").replace("{counts}", counts)
    return f"{result['protocol']}: {note}"


def columns_of(arms: dict[str, Any], measure: str) -> list[str]:
    """The columns in which any of the networks has a measure, in order."""
    return list(
        dict.fromkeys(column for arm in arms.values() for column, found in arm["scores"].items() if measure in found)
    )


def turned(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table with its columns as rows where there are more than `WIDE` of them."""
    if len(header) - 1 <= WIDE:
        return header, rows
    flipped = [list(line) for line in zip(header, *rows, strict=True)]
    return flipped[0], flipped[1:]


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


def cell_text(arm: dict[str, Any], column: str, measure: str) -> str:
    """What stands in a cell: per cent, half of the interval, and the deviation over seeds where there are several."""
    found = arm["scores"].get(column)
    if not found or measure not in found:
        return "-"
    low, high = found[f"{measure}_interval"]
    deviation = found.get(f"{measure}_deviation")
    spread = "" if deviation is None else f" (seeds {100 * deviation:.1f})"
    value = round(100 * found[measure], 1) + 0.0  # no "-0.0"
    return f"{value:.1f} ± {50 * (high - low):.1f}{spread}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *(line(row) for row in rows)]
