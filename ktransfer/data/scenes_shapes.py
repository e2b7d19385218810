"""The outlines of the embedded data set: every class is an arrangement of polygons, and chance varies its proportions.

Coordinates are about -1..1 with y pointing down. Classes come in near pairs that share parts and differ in arrangement
(ladder and comb, chair and table, arrow and tree, ring and spiral), so that parts alone do not give the class away.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Polygon = NDArray[np.float64]


def arc(radius: float, start: float, stop: float, points: int, y: float = 0.0) -> Polygon:
    """(points, 2) along a circle around (0, y); angles in radians."""
    angle = np.linspace(start, stop, points)
    return np.stack([radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def bar(left: float, top: float, right: float, bottom: float) -> Polygon:
    """(4, 2): an upright rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def annulus(outer: float, inner: float, y: float = 0.0) -> Polygon:
    """A disc around (0, y) with a hole, as one polygon: out along the rim, back along the hole, joined by a seam.

    The seam has no width, so that whoever fills the polygon leaves the hole empty.
    """
    turn = 2 * np.pi
    return np.concatenate([arc(outer, 0, turn, 33, y), arc(inner, turn, 0, 25, y)])


def _arrow(rng: Generator) -> list[Polygon]:
    half, base = rng.uniform(0.13, 0.22), rng.uniform(-0.3, 0.0)
    wide = rng.uniform(0.6, 0.8)
    return [np.array([(0, -1), (wide, base), (-wide, base)]), bar(-half, base - 0.02, half, 1)]


def _chair(rng: Generator) -> list[Polygon]:
    wide, thick, seat = rng.uniform(0.5, 0.7), rng.uniform(0.16, 0.22), rng.uniform(-0.1, 0.15)
    return [
        bar(-wide, -1, thick - wide, 1),
        bar(-wide, seat, wide, seat + thick),
        bar(wide - thick, seat, wide, 1),
    ]


def _comb(rng: Generator) -> list[Polygon]:
    teeth, thick, tall = int(rng.integers(4, 7)), rng.uniform(0.07, 0.1), rng.uniform(0.5, 0.7)
    spine = rng.uniform(0.2, 0.3)
    places = np.linspace(thick - 1, 1 - thick, teeth)
    return [bar(-1, -tall, 1, spine - tall), *(bar(x - thick, -tall, x + thick, tall) for x in places)]


def _cross(rng: Generator) -> list[Polygon]:
    half, height = rng.uniform(0.16, 0.28), rng.uniform(-0.2, 0.2)
    return [bar(-half, -1, half, 1), bar(-1, height - half, 1, height + half)]


def _house(rng: Generator) -> list[Polygon]:
    eaves, wall, door = rng.uniform(-0.3, 0.0), rng.uniform(0.65, 0.8), rng.uniform(0.14, 0.24)
    middle, lintel = rng.uniform(-0.25, 0.25), rng.uniform(0.25, 0.4)
    notch = [(middle + door, 1), (middle + door, lintel), (middle - door, lintel), (middle - door, 1)]
    body = np.array([(-wall, eaves), (wall, eaves), (wall, 1), *notch, (-wall, 1)])
    roof = np.array([(0, -1), (1, eaves + 0.02), (-1, eaves + 0.02)])
    return [roof, body, bar(0.4, -0.95, 0.62, eaves)]


def _key(rng: Generator) -> list[Polygon]:
    bow, half, teeth = rng.uniform(0.38, 0.48), rng.uniform(0.09, 0.13), int(rng.integers(2, 4))
    reach, high = rng.uniform(0.4, 0.55), 0.24 / teeth
    places = np.linspace(1 - 0.3 * teeth, 1 - high, teeth)
    shaft = bar(-half, 2 * bow - 1.05, half, 1)
    return [
        annulus(bow, bow * rng.uniform(0.45, 0.6), bow - 1),
        shaft,
        *(bar(0, y - high, reach, y + high) for y in places),
    ]


def _ladder(rng: Generator) -> list[Polygon]:
    rungs, thick, wide = int(rng.integers(3, 6)), rng.uniform(0.07, 0.1), rng.uniform(0.5, 0.65)
    places = np.linspace(-0.72, 0.72, rungs)
    return [
        bar(-wide, -1, 2 * thick - wide, 1),
        bar(wide - 2 * thick, -1, wide, 1),
        *(bar(-wide, y - thick, wide, y + thick) for y in places),
    ]


def _ring(rng: Generator) -> list[Polygon]:
    return [annulus(1, rng.uniform(0.5, 0.72))]


def _spiral(rng: Generator) -> list[Polygon]:
    turns, half, start = rng.uniform(1.8, 2.4), rng.uniform(0.09, 0.12), rng.uniform(0, 2 * np.pi)
    angle = np.linspace(0, 2 * np.pi * turns, 48)
    along = np.stack([np.cos(angle + start), np.sin(angle + start)], axis=1)
    radius = np.linspace(0.16, 1 - half, len(angle))[:, None]
    return [np.concatenate([(radius + half) * along, ((radius - half) * along)[::-1]])]


def _star(rng: Generator) -> list[Polygon]:
    points, inner = int(rng.integers(5, 8)), rng.uniform(0.36, 0.5)
    corners = arc(1, -np.pi / 2, 1.5 * np.pi, 2 * points + 1)[:-1]
    corners[1::2] *= inner
    return [corners]


def _table(rng: Generator) -> list[Polygon]:
    tall, thick, foot = rng.uniform(0.5, 0.75), rng.uniform(0.16, 0.24), rng.uniform(0.62, 0.85)
    leg = thick / 2
    return [
        bar(-1, -tall, 1, thick - tall),
        bar(-foot - leg, -tall, leg - foot, tall),
        bar(foot - leg, -tall, foot + leg, tall),
    ]


def _tree(rng: Generator) -> list[Polygon]:
    layers, half, foot = int(rng.integers(2, 4)), rng.uniform(0.12, 0.2), rng.uniform(0.5, 0.65)
    high = (foot + 1) / layers
    tiers = [
        np.array([(0, high * i - 1 - 0.25 * (i > 0)), (wide, high * (i + 1) - 1), (-wide, high * (i + 1) - 1)])
        for i, wide in enumerate(np.linspace(0.45, 0.75, layers))
    ]
    return [*tiers, bar(-half, foot - 0.02, half, 1)]


SHAPES: dict[str, Callable[[Generator], list[Polygon]]] = {
    "arrow": _arrow,
    "chair": _chair,
    "comb": _comb,
    "cross": _cross,
    "house": _house,
    "key": _key,
    "ladder": _ladder,
    "ring": _ring,
    "spiral": _spiral,
    "star": _star,
    "table": _table,
    "tree": _tree,
}
