"""Curves of the trainings, from metrics.jsonl, as specifications of Vega-Lite."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

POINTS = 400
OCCLUDED = r"held_out_accuracy_(\d+)_occluded"
LABELS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "lr": "learning rate",
    "images_per_second": "images a second",
    "data_wait": "share of time waiting for data",
    "memory_gb": "memory, GB",
}
FIRST = tuple(LABELS)
PLACE = ("step", "epoch")
Row = dict[str, Any]


class Chart(NamedTuple):
    """A chart of the page.

    Attributes:
        title: what stands above it.
        spec: of Vega-Lite, whose width is that of the page.
        says: what it shows, for those who do not see it.
    """

    title: str
    spec: dict[str, Any]
    says: str


class Training(NamedTuple):
    """A training of one or several runs: its name, such as "retrain", and its charts."""

    name: str
    charts: list[Chart]


def read_metrics(folder: Path) -> list[Row]:
    """The lines of a training's metrics.jsonl, but one that is half-written; none where there is no such file."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def trainings(runs: Sequence[Path]) -> list[Training]:
    """All trainings of the runs; those of the same name share their charts."""
    found: dict[str, dict[str, list[Row]]] = {}
    for run in runs:
        for path in sorted(run.rglob("metrics.jsonl")):
            name = path.parent.relative_to(run).as_posix()
            if rows := read_metrics(path.parent):
                found.setdefault(name, {})[run.name] = _thinned(rows)
    order = {name: place for place, name in enumerate(("pretext", "retrain"))}
    names = sorted(found, key=lambda name: (order.get(name, len(order)), name))
    return [Training(name, _charts(name, found[name])) for name in names]


def occlusion(runs: Sequence[Path]) -> list[Chart]:
    """The accuracy of held-out puzzles by number of occluded tiles, at the end of the training, if any."""
    values = []
    for run in runs:
        last = next((row for row in reversed(read_metrics(run / "pretext")) if "held_out_accuracy" in row), {})
        for name, value in last.items():
            if read := re.fullmatch(OCCLUDED, name):
                values.append({"run": run.name, "tiles": int(read[1]), "value": 100 * value})
    if not values:
        return []
    runs_shown = list(dict.fromkeys(str(value["run"]) for value in values))
    spec = {
        "data": {"values": values},
        "height": 200,
        "mark": "bar",
        "encoding": {
            "x": {"field": "tiles", "type": "ordinal", "title": "occluded tiles", "axis": {"labelAngle": 0}},
            "xOffset": {"field": "run", "sort": runs_shown},
            "y": {"field": "value", "type": "quantitative", "title": "accuracy, %"},
            "color": {
                "field": "run",
                "type": "nominal",
                "title": None,
                "sort": runs_shown,
                "legend": {"orient": "top"} if len(runs_shown) > 1 else None,
            },
            "tooltip": [{"field": "run"}, {"field": "tiles"}, {"field": "value", "format": ".1f"}],
        },
    }
    says = "; ".join(f"{one['run']}, {one['tiles']} tiles: {one['value']:.1f} %" for one in values)
    return [Chart("Held-out puzzles solved, by number of occluded tiles", spec, says)]


def _thinned(rows: list[Row]) -> list[Row]:
    """At most `POINTS` of them at even steps, the last one included."""
    if len(rows) <= POINTS:
        return rows
    return [rows[round(place * (len(rows) - 1) / (POINTS - 1))] for place in range(POINTS)]


def _charts(training: str, series: dict[str, list[Row]]) -> list[Chart]:
    found: dict[str, set[float]] = {}
    for rows in series.values():
        for row in rows:
            for name, value in row.items():
                if name not in PLACE and isinstance(value, int | float) and not re.fullmatch(OCCLUDED, name):
                    found.setdefault(name, set()).add(value)
    measures = [name for name, values in found.items() if len(values) > 1]
    ranked = sorted(measures, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return [_chart(training, name, series) for name in ranked]


def _chart(training: str, measure: str, series: dict[str, list[Row]]) -> Chart:
    values = [
        {"run": run, "epoch": row.get("epoch", 0) + 1, "step": row["step"], "value": row[measure]}
        for run, rows in series.items()
        for row in rows
        if isinstance(row.get(measure), int | float)
    ]
    title = LABELS.get(measure, measure.replace("_", " "))
    field = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": measure == "data_wait"}}
    tips = [
        {"field": "run", "title": "run"},
        {"field": "step", "title": "step"},
        {"field": "epoch", "title": "epoch"},
        {"field": "value", "title": title, "format": ".4~g"},
    ]
    spec = {
        "data": {"values": values},
        "height": 200,
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "y": field,
            "color": {
                "field": "run",
                "type": "nominal",
                "title": None,
                "sort": list(series),
                "legend": {"orient": "top", "symbolOpacity": 1} if len(series) > 1 else None,
            },
            "tooltip": tips,
        },
        "params": [{"name": "zoom", "select": {"type": "interval", "encodings": ["x"]}, "bind": "scales"}],
        "mark": {"type": "line", "point": {"size": 18, "opacity": 0.55}, "strokeWidth": 1.8},
    }
    last = {value["run"]: value["value"] for value in values}
    says = "; ".join(f"{run} ends at {value:.4g}" for run, value in last.items())
    return Chart(title, spec, f"{title} of {training} by step: {says}")
