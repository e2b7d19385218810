"""Lists of images: one path a line, or a table with a column of paths."""

import csv
from pathlib import Path

from ktransfer.errors import UsageError, remedy, why

PATH_COLUMNS = ("path", "file", "filename", "key")
LABEL_COLUMNS = ("label", "class", "target")


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """Paths and labels ("" where there is none) of a list, as they are written.

    Raises:
        UsageError: it cannot be read, or has no column of paths.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({why(error)}); {remedy(error, 'check it')}") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{path}, line {line}: a NUL character; a list is plain text with one path per line")
    if path.suffix.lower() == ".txt":
        # Not splitlines(): a path may hold any of the other characters that Unicode counts as line ends.
        names = [line.removesuffix("\r") for line in text.split("\n")]
        names = [name for name in names if name.strip()]
        return names, [""] * len(names)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        table = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise UsageError(f"{path} is not a table ({error}); write a header with a column path") from error
    header = [cell.strip().lower() for cell in table[0]] if table else []
    column = next((header.index(name) for name in PATH_COLUMNS if name in header), None)
    if column is None:
        if any(len(row) > 1 for row in table):
            raise UsageError(f"{path} has no column {', '.join(PATH_COLUMNS)}; its first line must name the columns")
        return [row[0] for row in table], [""] * len(table)
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    names, labels = [], []
    for number, row in enumerate(table[1:], start=2):
        if len(row) <= column or not row[column]:
            raise UsageError(f"{path}, row {number} has no {header[column]}; fill it in or leave the row out")
        names.append(row[column])
        labels.append(row[label].strip() if label is not None and len(row) > label else "")
    return names, labels
