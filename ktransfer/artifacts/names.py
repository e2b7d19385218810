"""Names of clusters, as people give them in the report's page: `names.csv`.

A row with a cluster and no key names that cluster; clusters of the same name are one group. A row with a key moves that
image to a group. `junk` is "yes" where there is nothing to learn from.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ktransfer.errors import UsageError

COLUMNS = ("cluster", "key", "name", "junk")
OF = "clustering"
"""A further column: the first digits of the SHA-256 of the clusters that were named."""
DIGITS = 12
JUNK = None


class Names(NamedTuple):
    """What a file of names says.

    Attributes:
        clusters: cluster -> name of its group, `JUNK` where it has nothing to learn from.
        images: key -> the same, of images that were moved.
        clustering: the first digits of the SHA-256 of the clusters' file, empty where the file does not say.
    """

    clusters: Mapping[int, str | None]
    images: Mapping[str, str | None]
    clustering: str


def read_names(path: Path) -> Names:
    """Read names.csv, as UTF-8.

    Raises:
        UsageError: missing, malformed, or contradicting itself.
    """
    clusters: dict[int, str | None] = {}
    images: dict[str, str | None] = {}
    of: set[str] = set()
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark first.
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = csv.DictReader(handle, strict=True)
            header = rows.fieldnames or []
            if missing := [name for name in COLUMNS if name not in header]:
                _wrong(path, f"no column {', '.join(missing)}")
            for row in rows:
                if None in row.values() or None in row:
                    _wrong(path, f"line {rows.line_num} has not as many fields as the header, {len(header)}")
                _read_row(path, rows.line_num, row, clusters, images)
                of |= {row[OF]} if row.get(OF) else set()
    except OSError as error:
        raise UsageError(f"--names {path}: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        _wrong(path, str(error))
    if len(of) > 1:
        _wrong(path, f"its rows are of different clusterings, {' and '.join(sorted(of))}")
    return Names(clusters, images, next(iter(of), ""))


def grouped(
    path: Path, names: Names, keys: Sequence[str], clusters: NDArray[np.int32], k: int, digest: str
) -> tuple[NDArray[np.int32], list[str]]:
    """The group of each image, and what the groups are called: in the order of their first clusters.

    A cluster without a name stays a group of its own, "cluster 17".

    Args:
        path: the file of names, for messages.
        names: what it says.
        keys: n keys.
        clusters: (n,) int32 in [-1, k).
        k: number of clusters.
        digest: SHA-256 of the clusters' file.

    Returns:
        (n,) int32, -1 for junk and broken images; and the names of the groups that have an image.

    Raises:
        UsageError: the names are of another clustering, or of images or clusters that there are not.
    """
    if names.clustering and not digest.startswith(names.clustering):
        raise UsageError(f"--names {path}: its names are of another clustering; make the report again, and name these")
    if strange := [str(cluster) for cluster in names.clusters if cluster >= k]:
        raise UsageError(f"--names {path}: there is no cluster {strange[0]}, but 0 to {k - 1}")
    if strange := sorted(names.images.keys() - set(keys)):
        raise UsageError(f"--names {path}: {strange[0]} is none of the images that are labelled")
    meant = [names.clusters.get(cluster, f"cluster {cluster}") for cluster in range(k)]
    groups = {name: place for place, name in enumerate(dict.fromkeys([*meant, *names.images.values()]))}
    groups[JUNK] = -1
    of_cluster = np.array([groups[name] for name in meant] + [-1], np.int32)  # the last one is that of broken images
    found = of_cluster[clusters]
    for row, key in enumerate(keys) if names.images else ():
        if key in names.images and clusters[row] >= 0:
            found[row] = groups[names.images[key]]
    used = np.unique(found[found >= 0])
    called = {place: name for name, place in groups.items() if name is not None}
    places = np.full(len(groups) + 1, -1, np.int32)
    places[used] = np.arange(len(used))
    return places[found], [called[int(place)] for place in used]


def _read_row(
    path: Path, line: int, row: dict[str, str], clusters: dict[int, str | None], images: dict[str, str | None]
) -> None:
    cluster, key, name, junk = (row[column].strip() if column != "key" else row[column] for column in COLUMNS)
    if junk not in ("", "no", "yes"):
        _wrong(path, f"line {line}: junk is {junk!r}; give yes or nothing")
    if junk != "yes" and not name:
        _wrong(path, f"line {line}: neither a name nor junk")
    meant = JUNK if junk == "yes" else name
    if key:
        if images.setdefault(key, meant) != meant:
            _wrong(path, f"line {line}: {key} was moved elsewhere before")
    elif not re.fullmatch("[0-9]{1,9}", cluster):
        _wrong(path, f"line {line}: cluster is {cluster!r}, not a number")
    elif clusters.setdefault(int(cluster), meant) != meant:
        _wrong(path, f"line {line}: cluster {cluster} has another name before")


def _wrong(path: Path, rule: str) -> NoReturn:
    raise UsageError(f"--names {path}: not a file of names: {rule}; `ktransfer report` makes a page that saves one")
