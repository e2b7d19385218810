"""Results of several runs in one table for each protocol, where they were evaluated in the same way."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer import files, tables
from ktransfer.config import read_by
from ktransfer.errors import UsageError, refuse_machine

from .config import PROTOCOLS, EvalConfig
from .intervals import Z95
from .published import published
from .table import cell_text, columns_of, footer, title

SCHEMA = 2
NO_TREATMENT = ("seeds", "random")
"""Settings that say how much was evaluated, not how."""
IMAGES = ("train", "test", "subset")
"""Inputs that are images, or lists of them."""
LEGEND = (
    "±: half of the 95 % interval over the test images; (seeds S): the standard deviation between the seeds. "
    "Bold: the best of a column. ≈: not significantly different from the best at the 95 % level: the two differ by "
    "less than 1.96 "
    "standard errors of a difference, taken from both intervals and, with several seeds, from the deviations between "
    "these. The test takes the images as drawn for each network anew, which is cautious, and does not allow for the "
    "number of rows."
)


class Row(NamedTuple):
    """One network of one result."""

    label: str
    arm: dict[str, Any]
    result: dict[str, Any]


def compare(runs: list[str | Path], show_published: bool = False) -> str:
    """Markdown: for each protocol that any of the runs was evaluated by, one table a measure over all their networks.

    Args:
        runs: run folders; nothing is written.
        show_published: add what others have published (`published.csv`).

    Raises:
        UsageError: a run holds no results, or two results of one protocol were made with other settings or images.
    """
    places = list({Path(run).resolve(): Path(run) for run in runs}.values())
    found = {place: _results(place) for place in places}
    names = [name for name in PROTOCOLS if any(name in results for results in found.values())]
    by_name = {name: {place: found[place][name] for place in places if name in found[place]} for name in names}
    differing = [line for name in names for line in _differences(name, by_name[name])]
    if differing:
        raise UsageError(
            f"--compare: evaluated differently: {'; '.join(differing)}; evaluate them in the same way, or leave one out"
        )
    parts: list[str] = []
    for name in names:
        lines = _tables(by_name[name])
        seeds = {place: result["settings"].get("seeds", 1) for place, result in by_name[name].items()}
        if max(seeds.values()) > 1:
            lines.append(f"Seeds: {', '.join(f'{count} in {place}' for place, count in seeds.items())}.")
        lacking = [str(place) for place in places if place not in by_name[name]]
        if lacking:
            lines.append(f"Not evaluated by {name}: {', '.join(lacking)}.")
        parts += ["\n".join(lines), *([published(name)] if show_published else [])]
    return "\n\n".join([*(part.rstrip() for part in parts if part), LEGEND]) + "\n"


def within_noise(one: dict[str, Any], other: dict[str, Any], measure: str) -> bool:
    """Whether two cells of a table differ in a measure by less than 1.96 standard errors of a difference."""
    return bool(abs(one[measure] - other[measure]) < Z95 * math.hypot(_error(one, measure), _error(other, measure)))


def _error(cell: dict[str, Any], measure: str) -> float:
    """The standard error: of the images, from the interval, and of the seeds."""
    low, high = cell[f"{measure}_interval"]
    seeds = cell.get(f"{measure}_seeds", [0.0])
    return math.hypot((high - low) / 2 / Z95, cell.get(f"{measure}_deviation", 0.0) / len(seeds) ** 0.5)


def _results(run: Path) -> dict[str, dict[str, Any]]:
    """Protocol -> the result of a run."""
    found: dict[str, dict[str, Any]] = {}
    for name in PROTOCOLS:
        path = run / "eval" / f"{name}.json"
        if not path.is_file():
            continue
        try:
            result = files.read_json(path)
            schema = result["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            refuse_machine(path, error)
            raise UsageError(f"{path}: not a result of ktransfer eval ({error}); evaluate {run} again") from error
        if schema != SCHEMA or "inputs" not in result:
            raise UsageError(f"{path}: made by another version of ktransfer; evaluate it again, with eval --overwrite")
        found[name] = result
    if not found:
        raise UsageError(f"--compare {run}: holds no results; make some first: ktransfer --run {run} eval")
    return found


def _differences(name: str, results: dict[Path, dict[str, Any]]) -> list[str]:
    """What keeps the results of one protocol from being compared, against the first of them."""
    first, *others = results
    lines: list[str] = []
    for other in others:
        mine, theirs = _treatment(results[first]), _treatment(results[other])
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                values = f"{key.replace('_', '-')} is {mine.get(key)!r} in {first} and {theirs.get(key)!r} in {other}"
                images = f"the {key[5:]} images of {first} and {other} differ"
                lines.append(f"{name}: {images if key.startswith('data ') else values}")
    return lines


def _treatment(result: dict[str, Any]) -> dict[str, Any]:
    """Everything that must be the same."""
    read = read_by(EvalConfig, [result["protocol"].partition("/")[0]])
    others = {field.name for field in fields(EvalConfig)} - read  # older results hold these too
    settings = {key: value for key, value in result["settings"].items() if key not in others.union(NO_TREATMENT)}
    shared = {key: value for key, value in result["inputs"].items() if " " not in key}
    data = {f"data {key}" if key in IMAGES else key: value for key, value in shared.items()}
    return {"protocol": result["protocol"], **settings, **data}


def _tables(results: dict[Path, dict[str, Any]]) -> list[str]:
    """The lines of one protocol."""
    rows = _rows(results)
    result = next(iter(results.values()))
    firsts = [next(iter(one["arms"].values())) for one in results.values()]
    alike = all(first == firsts[0] for first in firsts)
    lines: list[str] = []
    for measure, words in result["measures"].items():
        columns = columns_of({str(place): row.arm for place, row in enumerate(rows)}, measure)
        if not columns or (measure in result.get("relative", ()) and not alike):
            continue  # of labels of another kind, or relative to other networks
        best: Callable[..., Any] | None = min if measure in result.get("lower_is_better", ()) else max
        if measure in result.get("neither_is_better", ()):
            best = None
        there = [row for row in rows if any(measure in row.arm["scores"].get(column, {}) for column in columns)]
        cells = [[row.label] for row in there]
        for column in columns:
            for line, text in zip(cells, _marked(there, column, measure, best), strict=True):
                line.append(text)
        lines += [*tables.markdown(*tables.turned([f"{result['title']}, {words}", *columns], cells), aligned=True), ""]
    return [*lines, footer(result)]


def _marked(rows: list[Row], column: str, measure: str, best_of: Callable[..., Any] | None) -> list[str]:
    """The cells of one column, the best and those not clearly different from it marked, where anything is better."""
    found = [row.arm["scores"].get(column, {}) for row in rows]
    there = [cell for cell in found if measure in cell]
    best = best_of(there, key=lambda cell: float(cell[measure])) if best_of and len(there) > 1 else None
    texts: list[str] = []
    for row, cell in zip(rows, found, strict=True):
        text = cell_text(row.arm, column, measure)
        if cell is best:
            text = f"**{text}**"
        elif best is not None and measure in cell and within_noise(cell, best, measure):
            text = f"{text} ≈"
        texts.append(text)
    return texts


def _rows(results: dict[Path, dict[str, Any]]) -> list[Row]:
    """Every network once; the run where it was evaluated is named where two networks would have the same label."""
    rows: list[Row] = []
    for place, result in results.items():
        for name, arm in result["arms"].items():
            label = title(name, arm)
            same = [row for row in rows if row.label == label or row.label.startswith(f"{label}, evaluated in ")]
            if any(row.arm == arm for row in same):
                continue
            rows.append(Row(f"{label}, evaluated in {place}" if same else label, arm, result))
    return rows
