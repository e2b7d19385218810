"""Tables of results: Markdown for people, CSV for programs. Every stage makes its tables by these functions."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Cells = tuple[list[str], list[list[str]]]
"""A header and the rows below it, all of the same length."""

WIDE = 8
"""Columns that a table has at most where it can be turned."""


def crossed(corner: str, cells: Iterable[tuple[str, str, str]]) -> Cells:
    """(row, column, text) of each cell as a table, in the order of their first appearance; "-" where there is none.

    Args:
        corner: what stands above the names of the rows.
    """
    rows: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row, column, text in cells:
        columns.setdefault(column)
        rows.setdefault(row, {})[column] = text
    return [corner, *columns], [[row, *(found.get(column, "-") for column in columns)] for row, found in rows.items()]


def turned(header: list[str], rows: list[list[str]]) -> Cells:
    """A table with its columns as rows where there are more than `WIDE` of them."""
    if len(header) - 1 <= WIDE:
        return header, rows
    flipped = [list(line) for line in zip(header, *rows, strict=True)]
    return flipped[0], flipped[1:]


def markdown(header: list[str], rows: list[list[str]], aligned: bool = False) -> list[str]:
    """The lines of a Markdown table.

    Args:
        aligned: also where it is read as plain text, all cells of a column having one width.
    """
    if not aligned:
        head, *body = (f"| {' | '.join(row)} |" for row in [header, *rows])
        return [head, "|---" * len(header) + "|", *body]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    head, *body = (f"| {' | '.join(row)} |" for row in padded)
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]


def mean(values: list[float], level: float = 0.95) -> tuple[float, float | None]:
    """The mean of some numbers and half of its interval (95 %) by Student's t; None for one number."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), half_interval(statistics.stdev(values), len(values), level)


def half_interval(deviation: float, count: int, level: float = 0.95) -> float:
    """Half of Student's interval of a mean of `count` numbers, at least 2, with this standard deviation."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, count - 1)) * deviation / math.sqrt(count)


def plus_minus(value: float, half: float | None, sign: str = "") -> str:
    """A value and half of its 95 % interval, if there is one, with one decimal; `sign` "+" shows that of a gain too."""
    return f"{value:{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def to_csv(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """A header and a line for each row; what a row lacks, or is None, is empty.

    Args:
        columns: all names that stand in the rows, in their order, when not given.
    """
    out = io.StringIO()
    header = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else columns
    writer = csv.DictWriter(out, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, such as one of published numbers."""
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))
