"""The page: one HTML file with its style, programs, data and images inside. It asks nothing of any network: its own
policy forbids that, and lets no program run but those that are in it."""

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ktransfer.artifacts.names import Names
from ktransfer.data.dataset import Dataset
from ktransfer.report.atlas import atlas_of
from ktransfer.report.boxes import boxes_of
from ktransfer.report.chain import in_bytes, missing_of, steps_of, total_time
from ktransfer.report.curves import Chart, occlusion, trainings
from ktransfer.report.evaluations import evaluations
from ktransfer.report.pictures import sheets_of

SCRIPTS = ("charts.js", "boxes.js", "names.js", "cards.js", "opened.js", "atlas.js")
STYLES = ("page.css", "atlas.css")
ASSETS = files("ktransfer.report") / "assets"
RESERVED = 2 * 10**6
"""Bytes for everything but clusters and pictures: mostly Vega."""


def make_page(run: Path, beside: Sequence[Path], images: Dataset | None, names: Names | None, budget: int) -> str:
    """The whole page about a run, as HTML.

    Args:
        beside: runs whose curves and results are shown beside.
        images: those that were clustered, None where they cannot be had.
        names: what people called the clusters.
        budget: bytes of the page.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    runs = [run, *beside]
    steps, trained, found = steps_of(run), trainings(runs), evaluations(runs)
    pictures, boxes = sheets_of(run), boxes_of(run, beside)
    taken = sum(len(one.data) for one in [*pictures, *(one for each in found for one in each.pictures)])
    taken += sum(len(one.data) for one in boxes.images) if boxes else 0
    clusters = atlas_of(run, images, names, max(0, budget - RESERVED - taken))
    scripts = {"own": "\n".join(map(_asset, SCRIPTS)), "vega": _vega()}
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_asset), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"json": in_script, "bytes": in_bytes}
    return environment.get_template("index.html").render(
        run=run,
        beside=beside,
        steps=steps,
        missing=missing_of(run, steps),
        took=total_time(run),
        trainings=trained,
        evaluations=found,
        pictures=pictures,
        puzzles=occlusion(runs),
        boxes=boxes,
        clusters=clusters,
        map=_map() if clusters else None,
        style="\n".join(map(_asset, STYLES)),
        scripts=scripts,
        hashes=[_hash(text) for text in scripts.values()],
    )


def in_script(value: Any) -> Any:
    """JSON that can stand in a script element: no text in it can end that."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(text)  # nosec B704 -- JSON without a character that ends a script


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one program. Its names stay its own."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return f"(()=>{{{bundle}}})();".replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _map() -> Chart:
    """The map of clusters; its data come from the page's program, which knows their names and images."""
    colours = ["cohesion", "margin", "purity", "size"]
    spec = {
        "height": 460,
        "data": {"name": "clusters"},
        "params": [
            {
                "name": "colour",
                "value": colours[0],
                "bind": {"input": "select", "options": colours, "name": "coloured by "},
            },
        ],
        "transform": [{"calculate": "datum[colour]", "as": "shade"}],
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "axis": None, "scale": {"domain": [-0.04, 1.04]}},
            "y": {"field": "y", "type": "quantitative", "axis": None, "scale": {"domain": [-0.06, 1.06]}},
            "tooltip": [{"field": name} for name in ("cluster", "name", "size", "cohesion", "margin", "purity")],
        },
        "layer": [
            {
                "params": [{"name": "zoom", "select": "interval", "bind": "scales"}],
                "mark": {"type": "point", "filled": True, "cursor": "pointer", "opacity": 0.85},
                "encoding": {
                    "size": {"field": "size", "type": "quantitative", "legend": None, "scale": {"range": [40, 500]}},
                    "color": {
                        "field": "shade",
                        "type": "quantitative",
                        "title": None,
                        "scale": {"scheme": "viridis"},
                        "legend": {"orient": "bottom"},
                    },
                },
            },
            {
                "transform": [{"filter": "datum.picture"}],
                "mark": {"type": "image", "width": 34, "height": 34, "cursor": "pointer"},
                "encoding": {"url": {"field": "picture"}},
            },
        ],
    }
    return Chart("Map", spec, "Map of the clusters: those whose centroids are similar lie close together")
