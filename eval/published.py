"""Numbers that others have published, beside which ours can be shown; every one with its source (published.csv)."""

import csv
from pathlib import Path
from typing import NamedTuple

from .table import table, turned

FILE = Path(__file__).with_name("published.csv")


class Row(NamedTuple):
    """One number.

    Attributes:
        protocol: of ours that evaluates in the same spirit.
        table: what was measured, on which data, in which unit.
        value: as printed.
    """

    protocol: str
    table: str
    method: str
    column: str
    value: str
    source: str


def rows(protocol: str) -> list[Row]:
    """Those that stand beside a protocol, such as "linear", in the order of the file."""
    with FILE.open(encoding="utf-8", newline="") as handle:
        lines = csv.reader(handle)
        next(lines)
        return [row for row in map(Row._make, lines) if row.protocol == protocol]


def published(protocol: str) -> str:
    """Markdown tables of all that stands beside a protocol, with the sources; "" where nothing does."""
    found = rows(protocol)
    lines: list[str] = []
    for name in dict.fromkeys(row.table for row in found):
        here = [row for row in found if row.table == name]
        columns = list(dict.fromkeys(row.column for row in here))
        methods: dict[str, dict[str, str]] = {}
        for row in here:
            methods.setdefault(row.method, {})[row.column] = row.value
        cells = [[method, *(values.get(column, "-") for column in columns)] for method, values in methods.items()]
        lines += table(*turned([f"published: {name}", *columns], cells))
        lines += [f"From: {'; '.join(dict.fromkeys(row.source for row in here))}.", ""]
    return "\n".join(lines)
