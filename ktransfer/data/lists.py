"""Lists of images: one path a line, or a table with a column of paths."""

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ktransfer.data.dataset import escaped
from ktransfer.data.folders import UNREADABLE, file_size
from ktransfer.errors import UsageError, remedy, why
from ktransfer.files import lines_of, read_text
from ktransfer.progress import say_once

PATH_COLUMNS = ("path", "file", "filename", "key")
LABEL_COLUMNS = ("label", "class", "target")
_DELIMITERS = (",", ";", "\t")
_DECLARED = re.compile('"?sep=(.)"?\r?\n', re.IGNORECASE)
_LABELLED = re.compile(r"(.*?)[\s,;]+([^\s,;/\\\\]+)\s*")


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """Paths and labels ("" where there is none) of a list, as they are written.

    The columns of a table are separated by what its ending says, or what its first line shows to do it.

    Raises:
        UsageError: it cannot be read, or has no column of paths.
    """
    try:
        text = read_text(path, "surrogateescape")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({why(error)}); {remedy(error, 'check it')}") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{path}, line {line}: a NUL character; a list is plain text with one path per line")
    if path.suffix.lower() == ".txt":
        names = [name for name in lines_of(text) if name.strip()]
        return names, [""] * len(names)
    table = _table(path, text)
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


def _table(path: Path, text: str) -> list[list[str]]:
    """Rows of a table that are not empty."""
    own = "\t" if path.suffix.lower() == ".tsv" else ","
    if declared := _DECLARED.match(text):
        own, text = declared[1], text[declared.end() :]
    first = next((line for line in lines_of(text) if line.strip()), "")
    tried = (own, *_DELIMITERS)
    delimiter = next((one for one in tried if _named(first.split(one))), own)
    try:
        # Not splitlines(): see `lines_of`.
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise UsageError(f"{path} is not a table ({error}); write a header with a column path") from error


def _named(cells: Sequence[str]) -> bool:
    return any(cell.strip().strip('"').lower() in PATH_COLUMNS for cell in cells)


def spellings(name: str) -> Iterator[str]:
    """What may be meant by a path of a list, the nearest first: as it is, as a key, without blanks, with slashes."""
    yield name
    for one in dict.fromkeys((name, name.strip())):
        yield one
        yield from escaped([one])
        yield one.replace("\\", "/")


def found(path: Path, names: Sequence[str], labels: Sequence[str]) -> tuple[list[str], list[str], list[int]]:
    """Paths, labels and bytes (-1: missing) of the images of a list, with paths as they lead to files.

    A path that leads nowhere may have blanks around it, the backslashes of Windows, or a label behind it: it is read so
    where there is such a file, and where all paths that lead nowhere can be read in one of these ways; a line says it.
    """

    def size(name: str) -> int:
        return file_size(os.path.join(path.parent, name))  # noqa: PTH118 -- Path objects cost more

    sizes = [size(name) for name in names]
    lost = [row for row, bytes_of in enumerate(sizes) if bytes_of == UNREADABLE]
    new_names, new_labels = list(names), list(labels)
    read = dict[str, int]()
    for row in lost:
        for way, name, label in _other_ways(names[row], labels[row]):
            if (bytes_of := size(name)) != UNREADABLE:
                new_names[row], new_labels[row], sizes[row] = name, label, bytes_of
                read[way] = read.get(way, 0) + 1
                break
    ways = "; ".join(f"{count:,} {way}" for way, count in read.items())
    if read:
        say_once(f"{path}: of its {len(names):,} paths, those that lead nowhere are read otherwise ({ways})")
    return new_names, new_labels, sizes


def _other_ways(name: str, label: str) -> Iterator[tuple[str, str, str]]:
    """In what ways a path may be read, the path and its label."""
    bare = name.strip()
    yield "without blanks around them", bare, label
    yield "with / for \\", bare.replace("\\", "/"), label
    if not label and (parts := _LABELLED.fullmatch(bare)):
        yield "with a label behind them", parts[1], parts[2]
        yield "with a label behind them and / for \\", parts[1].replace("\\", "/"), parts[2]
