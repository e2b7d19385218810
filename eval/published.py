"""Numbers that others have published, beside which ours can be shown; every one with its source (published.csv)."""

from pathlib import Path
from typing import NamedTuple

from ktransfer import tables

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
    return [Row(**row) for row in tables.read_csv(FILE) if row["protocol"] == protocol]


def published(protocol: str) -> str:
    """Markdown tables of all that stands beside a protocol, with the sources; "" where nothing does."""
    found = rows(protocol)
    lines: list[str] = []
    for name in dict.fromkeys(row.table for row in found):
        here = [row for row in found if row.table == name]
        cells = tables.crossed(f"published: {name}", ((row.method, row.column, row.value) for row in here))
        lines += tables.markdown(*tables.turned(*cells), aligned=True)
        lines += [f"From: {'; '.join(dict.fromkeys(row.source for row in here))}.", ""]
    return "\n".join(lines)
