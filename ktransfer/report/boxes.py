"""A self-training: how good teacher and student are, and images with the boxes that the teacher found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ktransfer.data.dataset import Dataset
from ktransfer.data.opening import open_dataset
from ktransfer.detection.data import Detection
from ktransfer.detection.opening import open_detection
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.files import read_json
from ktransfer.progress import say
from ktransfer.report.curves import Chart
from ktransfer.report.evaluations import Table, table
from ktransfer.report.pictures import jpeg
from ktransfer.run import read_record
from ktransfer.tables import plus_minus

IMAGES, BOXES, SIDE = 36, 60, 420
"""Images that are shown, boxes of each at most, and the longer side of an image."""
MEASURES = ("AP", "AP50", "AP75", "mIoU")


class Box(NamedTuple):
    """A box in pixels; `score` is None where a person drew it."""

    x: float
    y: float
    width: float
    height: float
    name: str
    score: float | None


class Shown(NamedTuple):
    """An image with its boxes; `data` is an address that holds it, `width` and `height` are in pixels of the boxes."""

    key: str
    data: str
    width: int
    height: int
    boxes: list[Box]


class Boxes(NamedTuple):
    """What a self-training made; `threshold` is the score from which its boxes were learned."""

    tables: list[Table]
    charts: list[Chart]
    images: list[Shown]
    threshold: float
    counts: list[tuple[str, int]]


def boxes_of(run: Path, beside: Sequence[Path]) -> Boxes | None:
    """What the self-training of a run made, None where it has none; scores of other runs stand beside."""
    folder = run / "selftrain"
    scores = {one: read_json(one / "selftrain" / "scores.json") for one in (run, *beside) if _has(one, "scores.json")}
    if not scores and not _has(run, "pseudo.json"):
        return None
    arms = {
        f"{arm} ({one.name})" if len(scores) > 1 else arm: facts
        for one, found in scores.items()
        for arm, facts in found["scores"].items()
    }
    pseudo = read_json(folder / "pseudo.json") if _has(run, "pseudo.json") else {}
    images = _images(run, pseudo) if pseudo.get("annotations") else []
    names = {one["id"]: str(one["name"]) for one in pseudo.get("categories", [])}
    found = [one["category_id"] for one in pseudo.get("annotations", [])]
    counts = [(name, found.count(number)) for number, name in names.items()]
    threshold = float(pseudo.get("info", {}).get("threshold") or 0)
    return Boxes(_tables(arms), _charts(arms), images, threshold, counts)


def _has(run: Path, name: str) -> bool:
    return (run / "selftrain" / name).is_file()


def _tables(arms: dict[str, dict[str, Any]]) -> list[Table]:
    measures = [name for name in MEASURES if any(name in facts for facts in arms.values())]
    if not measures:
        return []
    rows = []
    for arm, facts in arms.items():
        cells = [arm]
        for name in measures:
            low, high = facts.get(f"{name}_interval") or (None, None)
            half = None if low is None or high is None else 50 * (high - low)
            cells.append(plus_minus(100 * facts[name], half) if isinstance(facts.get(name), int | float) else "-")
        rows.append(cells)
    return [table(["test images, %", *measures], rows)]


def _charts(arms: dict[str, dict[str, Any]]) -> list[Chart]:
    values = [
        {"network": arm, "class": name, "value": 100 * score}
        for arm, facts in arms.items()
        for name, score in (facts.get("classes") or {}).items()
        if isinstance(score, int | float)
    ]
    if not values:
        return []
    spec = {
        "data": {"values": values},
        "height": 60 + 14 * len(values),
        "mark": "bar",
        "encoding": {
            "y": {"field": "class", "type": "nominal", "title": None, "sort": "-x"},
            "yOffset": {"field": "network", "sort": list(arms)},
            "x": {"field": "value", "type": "quantitative", "title": "%"},
            "color": {
                "field": "network",
                "type": "nominal",
                "title": None,
                "sort": list(arms),
                "legend": {"orient": "top"},
            },
            "tooltip": [{"field": "network"}, {"field": "class"}, {"field": "value", "format": ".1f"}],
        },
    }
    return [Chart("By class", spec, f"scores of {len(arms)} networks by class")]


def _images(run: Path, pseudo: dict[str, Any]) -> list[Shown]:
    """At even steps among those that the teacher labelled."""
    data = _data(run)
    if data is None:
        return []
    places = {key: row for row, key in enumerate(data.keys)}
    there = [one for one in pseudo["images"] if one["file_name"] in places]
    if not there:
        say("report: no images with boxes: those that were labelled are not there; the run holds their names only")
        return []
    chosen = [there[int(place)] for place in np.linspace(0, len(there) - 1, min(IMAGES, len(there)))]
    names = {one["id"]: str(one["name"]) for one in pseudo["categories"]}
    found: dict[Any, list[Box]] = {one["id"]: [] for one in chosen}
    for one in sorted(pseudo["annotations"], key=lambda one: -one["score"]):
        boxes = found.get(one["image_id"])
        if boxes is not None and len(boxes) < BOXES:
            x, y, width, height = map(float, one["bbox"])
            boxes.append(Box(x, y, width, height, names[one["category_id"]], float(one["score"])))
    shown = []
    for one in chosen:
        row = places[one["file_name"]]
        try:
            picture = jpeg(data.read(row, SIDE), SIDE)
        except BrokenImage:
            continue
        boxes = [*found[one["id"]], *_drawn(data, row)]
        shown.append(Shown(one["file_name"], picture, int(one["width"]), int(one["height"]), boxes))
    return shown


def _drawn(data: Dataset, row: int) -> list[Box]:
    """The boxes that people drew, where the images have any."""
    if not isinstance(data, Detection):
        return []
    objects = data.objects[row]
    return [
        Box(float(left), float(top), float(right - left), float(low - top), data.classes[int(label)], None)
        for (left, top, right, low), label in zip(objects.boxes, objects.labels, strict=True)
    ]


def _data(run: Path) -> Dataset | None:
    """The images that the teacher labelled, None where they cannot be had: a line says why."""
    config = (read_record(run, "selftrain", "pseudo") or {"config": {}})["config"]
    try:
        if config.get("unlabelled"):
            return open_dataset(config["unlabelled"])
        return open_detection(config["labelled"])[0] if config.get("labelled") else None
    except UsageError as error:
        say(f"report: no images with boxes: {error}")
        return None
