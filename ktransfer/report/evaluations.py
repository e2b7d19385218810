"""The results of evaluations: their tables as they were written, and charts of scores by layer with their intervals."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer.files import read_json
from ktransfer.report.curves import Chart
from ktransfer.report.pictures import Picture, png

PICTURES = 4 * 10**6
"""Bytes of images of evaluations that a page holds at most."""


class Table(NamedTuple):
    """A table: header, and rows of cells, each with its text and whether it is within the noise of the best one."""

    header: list[str]
    rows: list[list[tuple[str, bool]]]


class Evaluation(NamedTuple):
    """What a protocol found, in one or several runs."""

    title: str
    tables: list[Table]
    notes: list[str]
    charts: list[Chart]
    pictures: list[Picture]


def evaluations(runs: Sequence[Path]) -> list[Evaluation]:
    """The evaluations of all runs by protocol: those of the same one share tables and charts."""
    found: dict[str, list[Path]] = {}
    for run in runs:
        for path in sorted((run / "eval").glob("*.json")):
            if path.name != "stage.json":
                found.setdefault(path.stem, []).append(path)
    room = [PICTURES]
    return [_evaluation(paths, room) for _, paths in sorted(found.items())]


def _evaluation(paths: list[Path], room: list[int]) -> Evaluation:
    """What the files of a protocol hold; `room` are the bytes that are left for images."""
    results = [read_json(path) for path in paths]
    title = str(results[0].get("title", paths[0].stem))
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    notes: dict[str, None] = {}
    pictures = []
    for path in paths:
        page = path.with_suffix(".md")
        read, said = tables_of(page.read_text(encoding="utf-8")) if page.is_file() else ([], [])
        for header, *rows in read:
            tables.setdefault(tuple(header), []).extend(row for row in rows if row not in tables[tuple(header)])
        notes |= dict.fromkeys(said)
        for image in sorted(path.with_suffix("").glob("*.png")):
            if image.stat().st_size <= room[0]:
                room[0] -= image.stat().st_size
                pictures.append(Picture(image.stem.replace("-", " "), png(image.read_bytes())))
    shown = [table(list(header), rows) for header, rows in tables.items()]
    return Evaluation(title, shown, list(notes), _charts(results, title), pictures)


def tables_of(text: str) -> tuple[list[list[list[str]]], list[str]]:
    """The tables of a Markdown page, each a header and rows of cells, and the lines between them."""
    tables: list[list[list[str]]] = []
    notes: list[str] = []
    before = False
    for line in text.splitlines():
        inside = line.lstrip().startswith("|")
        if inside and not before:
            tables.append([])
        if inside:
            tables[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif line.strip():
            notes.append(line.strip())
        before = inside
    return [[rows[0], *rows[2:]] for rows in tables if len(rows) > 2], notes


def table(header: list[str], body: list[list[str]]) -> Table:
    """A table with marks: in a column, the interval of what is within the noise of the best reaches that of the best.

    Numbers are read as "12.3 ± 0.4".
    """
    near: set[tuple[int, int]] = set()
    for column in range(1, len(header)):
        cells = {place: read for place, row in enumerate(body) if column < len(row) and (read := _number(row[column]))}
        if len(cells) < 2:
            continue
        best = max(cells, key=lambda place: cells[place][0])
        least = cells[best][0] - cells[best][1]
        near |= {(place, column) for place, (value, half) in cells.items() if place != best and value + half >= least}
    return Table(header, [[(cell, (y, x) in near) for x, cell in enumerate(row)] for y, row in enumerate(body)])


def _number(cell: str) -> tuple[float, float] | None:
    read = re.fullmatch(r"(-?\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)", cell)
    return (float(read[1]), float(read[2])) if read else None


def _charts(results: list[dict[str, Any]], title: str) -> list[Chart]:
    """A chart of each measure that has scores at several layers."""
    charts = []
    arms = {name: facts for result in results for name, facts in (result.get("arms") or {}).items()}
    for measure, label in (results[0].get("measures") or {}).items():
        values = []
        for arm, facts in arms.items():
            scores = facts.get("scores") if isinstance(facts, dict) else None
            for layer, score in scores.items() if isinstance(scores, dict) else ():
                if isinstance(score, dict) and isinstance(score.get(measure), int | float):
                    value = {"network": arm, "layer": layer, "value": 100 * score[measure]}
                    low, high = score.get(f"{measure}_interval") or (score[measure],) * 2
                    values.append(value | {"low": 100 * low, "high": 100 * high})
        if len({value["layer"] for value in values}) > 1:
            charts.append(_chart(values, label, title))
    return charts


def _chart(values: list[dict[str, Any]], label: str, title: str) -> Chart:
    layers, arms = ([*dict.fromkeys(value[name] for value in values)] for name in ("layer", "network"))
    across = {"field": "layer", "type": "nominal", "sort": layers, "title": None, "axis": {"labelAngle": 0}}
    offset = {"field": "network", "sort": arms}
    tips = [{"field": name} for name in ("network", "layer")]
    tips += [{"field": name, "format": ".1f"} for name in ("value", "low", "high")]
    colour = {
        "field": "network",
        "type": "nominal",
        "sort": arms,
        "title": None,
        "legend": {"orient": "top", "columns": 3, "labelLimit": 400},
    }
    ends = [min(value["low"] for value in values), max(value["high"] for value in values)]
    y = {"type": "quantitative", "title": label, "scale": {"domain": ends, "nice": True}}
    spec = {
        "data": {"values": values},
        "height": 260,
        "encoding": {"x": across, "xOffset": offset, "color": colour, "tooltip": tips},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"y": y | {"field": "value"}},
            },
        ],
    }
    best = max(values, key=lambda value: value["value"])
    says = f"{label} of the {title}; best {best['value']:.1f}, {best['network']} at {best['layer']}"
    return Chart(f"{label} by layer, with 95 % intervals", spec, says)
