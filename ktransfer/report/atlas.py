"""The atlas: of every cluster its images by distance, how tight and how separate it is, its neighbours and its place on
a map."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts.centroids import Centroids, project, read_centroids
from ktransfer.artifacts.features import Features, open_features
from ktransfer.artifacts.labels import Assignment, read_assignment
from ktransfer.artifacts.names import DIGITS, JUNK, Names
from ktransfer.data.dataset import Dataset
from ktransfer.errors import UsageError
from ktransfer.files import sha256
from ktransfer.progress import say
from ktransfer.report.places import places
from ktransfer.report.thumbnails import COLUMNS, Size, fitting, sheets
from ktransfer.run import read_record

NEIGHBOURS = 4
CHOSEN = 5
"""Images that a card shows of each kind: nearest, between, farthest."""
BLOCK = 2**22
KEYS = 0.06
"""Share of a page's bytes that the names of images may take."""


class Atlas(NamedTuple):
    """What the page knows of the clusters.

    Attributes:
        data: for the page's program, as JSON: `side`, `columns`, `chosen`, `clustering`, `names`, `begins` (which names
            these are), and `clusters`.
        images: how many have a cluster.
        shown: how many of them have a thumbnail.
        pictures: whether there are thumbnails at all.
    """

    data: dict[str, Any]
    images: int
    shown: int
    pictures: bool


class Clusters(NamedTuple):
    """What a run holds of its clusters.

    Attributes:
        assignment: which cluster each image belongs to.
        centroids: of the clusters.
        members: of each cluster the rows, the nearest to its centroid first.
        digest: SHA-256 of the centroids' file.
        features: of the images, None where they are gone.
    """

    assignment: Assignment
    centroids: Centroids
    members: list[NDArray[np.int64]]
    digest: str
    features: Features | None


def clusters_of(run: Path) -> Clusters | None:
    """The clusters of a run, None where it has none, or labels of others: then a line says so."""
    where = run / "clusters" / "clusters.h5"
    made = read_record(run, "clusters", "assign")
    if not where.is_file() or not made or made["state"] != "done":
        return None
    found, centroids = read_assignment(run / "clusters" / "labels.h5"), read_centroids(where)
    digest = sha256(where)
    if found.centroids != digest:
        say("report: no clusters: the labels belong to older ones; make them again: assign --overwrite")
        return None
    order = np.lexsort((np.arange(len(found.clusters)), found.distances, found.clusters))
    bounds = np.searchsorted(found.clusters[order], np.arange(len(centroids.centroids) + 1))
    members = [order[start:stop] for start, stop in pairwise(bounds)]
    return Clusters(found, centroids, members, digest, _features(run, made, found))


def atlas_of(run: Path, images: Dataset | None, names: Names | None, budget: int) -> Atlas | None:
    """The atlas of a run's clusters, None where it has none, or labels of others.

    Args:
        images: those that were labelled, None where they cannot be had.
        names: what people called the clusters.
        budget: bytes that it takes at most.
    """
    clusters = clusters_of(run)
    if clusters is None:
        return None
    found, centroids, members, digest, features = clusters
    if names and names.clustering and not digest.startswith(names.clustering):
        raise UsageError("report: the names are of another clustering; move names.csv away, or give --names")
    if images is not None and images.fingerprint != found.fingerprint:
        say(f"report: no images: {images.spec} does not hold those that were labelled; name them with --data")
        images = None
    k = len(members)
    sizes = [len(rows) for rows in members]
    length = sum(len(key) for key in found.keys) / max(1, len(found.keys)) + 12
    room = Size(64, max(1, int(budget * KEYS / length / max(1, k))))
    if images is not None:
        room = fitting(sizes, int(budget * (1 - 2 * KEYS) * 0.75))
    shown = [_spread(rows, room.most, cluster) for cluster, rows in enumerate(members)]
    facts = _facts(found, centroids, members, images)
    for cluster, margin in enumerate(_margins(features, centroids, shown)):
        facts[cluster]["margin"] = margin
    spot = places(centroids.centroids)
    pictures = (
        iter(sheets(images, shown, room.side, int(budget * (1 - 2 * KEYS) * 0.75))) if images is not None else None
    )
    for cluster, rows in enumerate(shown):
        facts[cluster] |= {
            "x": round(float(spot[cluster, 0]), 4),
            "y": round(float(spot[cluster, 1]), 4),
            "keys": [found.keys[row] for row in rows],
            "far": [round(float(found.distances[row]), 4) for row in rows],
            "sheet": next(pictures) if pictures and len(rows) else "",
        }
    given = _names(names)
    data = {
        "clustering": digest[:DIGITS],
        "begins": hashlib.sha256(json.dumps(given).encode()).hexdigest()[:DIGITS],
        "side": room.side,
        "columns": COLUMNS,
        "chosen": CHOSEN,
        "names": given,
        "clusters": facts,
    }
    return Atlas(data, int((found.clusters >= 0).sum()), sum(map(len, shown)), images is not None)


def _names(names: Names | None) -> dict[str, Any]:
    """For the page's program, which has an empty name for junk."""
    if names is None:
        return {"clusters": {}, "images": {}}
    return {
        "clusters": {str(cluster): name or "" for cluster, name in names.clusters.items()},
        "images": {key: "" if name is JUNK else name for key, name in names.images.items()},
    }


def _spread(rows: NDArray[np.int64], most: int, cluster: int) -> NDArray[np.int64]:
    """At most so many of a cluster's rows, by distance: the nearest, the farthest, and some drawn between them."""
    if len(rows) <= most:
        return rows
    ends = most // 3
    drawn = np.random.default_rng([0, cluster]).choice(len(rows) - 2 * ends, most - 2 * ends, replace=False) + ends
    found: NDArray[np.int64] = np.concatenate([rows[:ends], rows[np.sort(drawn)], rows[len(rows) - ends :]])
    return found


def _facts(
    found: Assignment, centroids: Centroids, members: list[NDArray[np.int64]], images: Dataset | None
) -> list[dict[str, Any]]:
    """Size, cohesion, neighbours and, where classes are known, purity of each cluster.

    The cohesion is the share of the images' variance that is gone within the cluster: 1 where all are alike, 0 where
    they are as different as any images.
    """
    points = centroids.centroids.astype(np.float64)
    sizes = np.array([len(rows) for rows in members])
    within = np.array([found.distances[rows].mean(dtype=np.float64) if len(rows) else 0.0 for rows in members])
    share = sizes / max(1, sizes.sum())
    total = float(share @ (within + np.square(points - share @ points).sum(1)))
    near = _nearest(points, NEIGHBOURS)
    facts: list[dict[str, Any]] = []
    for cluster, rows in enumerate(members):
        fact: dict[str, Any] = {
            "size": len(rows),
            "cohesion": round(1 - within[cluster] / total, 4) if total > 0 and len(rows) else None,
            "near": near[cluster].tolist(),
            "purity": None,
            "class": "",
        }
        if images is not None and images.classes:
            targets = images.targets[rows]
            counts = np.bincount(targets[targets >= 0], minlength=len(images.classes))
            if counts.sum():
                fact |= {"purity": round(counts.max() / counts.sum(), 4), "class": images.classes[int(counts.argmax())]}
        facts.append(fact)
    return facts


def _nearest(points: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """(k, count) the other clusters that are nearest to each, nearest first."""
    squares = np.square(points).sum(1)
    gaps = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(gaps, np.inf)
    found: NDArray[np.int64] = np.argsort(gaps, axis=1, kind="stable")[:, : min(count, len(points) - 1)]
    return found


def _features(run: Path, made: dict[str, Any], found: Assignment) -> Features | None:
    """Those that were labelled, None where they are gone."""
    path = Path(made["config"].get("features") or "")
    for place in (path, run / "features" / path.name):
        if place.is_file():
            features = open_features(place)
            return features if features.attributes.get("fingerprint") == found.fingerprint else None
    return None


def _margins(features: Features | None, made: Centroids, shown: list[NDArray[np.int64]]) -> list[float | None]:
    """How much nearer a cluster's shown images are to its centroid than to the next one: the mean of (d2 - d1) / d2.

    As in quality.json; None where there are no features, or one cluster.
    """
    k = len(shown)
    rows = np.concatenate(shown) if shown else np.empty(0, np.int64)
    if features is None or k < 2 or not len(rows):
        return [None] * k
    owners = np.repeat(np.arange(k), [len(one) for one in shown])
    order = np.argsort(rows, kind="stable")  # the file is read from its beginning to its end
    points = made.centroids
    squares = np.square(points).sum(1)
    found = np.zeros(len(rows))
    step = max(1, BLOCK // max(features.rows.shape[1], k))
    for start in range(0, len(rows), step):
        chosen = order[start : start + step]
        block = np.asarray(features.rows[rows[chosen]], np.float32)
        seen = block if made.projection is None else project(made.projection, block)
        if made.normalise:
            seen = seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-12)
        gaps = np.maximum(np.square(seen).sum(1)[:, None] + squares - 2 * seen @ points.T, 0)
        two = np.sqrt(np.partition(gaps, 1, axis=1)[:, :2])
        found[chosen] = (two[:, 1] - two[:, 0]) / np.where(two[:, 1] > 0, two[:, 1], 1)
    sums, counts = np.bincount(owners, found, k), np.bincount(owners, minlength=k)
    return [
        round(total / count, 4) if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
    ]
