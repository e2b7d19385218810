"""Pseudo-label files: `cluster` writes them, `retrain` reads them. Label -1 marks a broken image."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts import hdf5
from ktransfer.artifacts.features import decode_keys, encode_keys
from ktransfer.artifacts.stored import table
from ktransfer.errors import UsageError
from ktransfer.files import write_bytes, write_whole

SCHEMA = 1
_INTEGER = re.compile(r"-1|[0-9]{1,10}")
_LARGEST = 2**31 - 1
MORE = "label_"
"""What the columns of further clusterings are called, counted from 2."""
GROUP = "group"
"""What the column is called that has the names which people gave."""


class Labels(NamedTuple):
    """Pseudo-labels in row order.

    Attributes:
        keys: n keys, None from a `.bin` file, which holds none.
        labels: (n,) int32 in [-1, k).
        k: number of clusters; for `.csv` and `.bin`, which do not hold it, the highest label + 1.
        more: (n, views - 1) int32, the labels of further clusterings of the same images, -1 where there is none.
        names: of the k labels, where people gave them; else none.
    """

    keys: list[str] | None
    labels: NDArray[np.int32]
    k: int
    more: NDArray[np.int32]
    names: tuple[str, ...] = ()


class Assignment(NamedTuple):
    """Which cluster each image belongs to, of labels.h5.

    Attributes:
        keys: n keys.
        clusters: (n,) int32 in [-1, k), -1 for a broken image; whatever the clusters were called.
        distances: (n,) float32, squared Euclidean distance to the centroid, NaN where there is no cluster.
        centroids: SHA-256 of the centroids' file.
        fingerprint: of the data set.
    """

    keys: list[str]
    clusters: NDArray[np.int32]
    distances: NDArray[np.float32]
    centroids: str
    fingerprint: str


def write_labels(
    folder: Path,
    keys: Sequence[str],
    labels: NDArray[np.int32],
    distances: NDArray[np.float32],
    k: int,
    centroids: str,
    fingerprint: str,
    more: NDArray[np.int32] | None = None,
    names: Sequence[str] = (),
    clusters: NDArray[np.int32] | None = None,
) -> list[Path]:
    """Write labels.csv, labels.h5 and labels.bin, each whole or not at all; the same input gives the same bytes.

    Args:
        folder: is made where missing.
        keys: n keys.
        labels: (n,) int32 in [-1, k), -1 for a broken image.
        distances: (n,) float32, squared Euclidean distance to the centroid; where the label is -1, the CSV field is
            empty and the HDF5 number NaN.
        k: number of centroids.
        centroids: SHA-256 of the centroids' file.
        fingerprint: of the data set.
        more: (n, views - 1) int32, the labels of further clusterings, for the CSV (label_2, label_3 ...) and the HDF5.
        names: of the k labels, where people named clusters: a column of the CSV, and `name` of the HDF5.
        clusters: (n,) int32, then: the cluster of each image, which its distance is to; `cluster` of the HDF5.

    Returns:
        The three paths. `labels.bin` is the authors' layout (docs/papers.md): int32 count, int32 labels,
        little-endian.
    """
    if not len(keys) == len(labels) == len(distances):
        raise ValueError(f"{len(keys)} keys, {len(labels)} labels, {len(distances)} distances")
    numbers = np.ascontiguousarray(labels, dtype="<i4")
    shown = np.where((numbers if clusters is None else clusters) >= 0, distances, np.nan).astype("<f4")
    others = np.empty((len(numbers), 0), "<i4") if more is None else np.ascontiguousarray(more, "<i4")
    paths = [folder / f"labels.{suffix}" for suffix in ("csv", "h5", "bin")]
    write_whole(paths[0], lambda part: _write_csv(part, keys, numbers, shown, others, names))
    header: dict[str, str | int] = {"schema": SCHEMA, "k": k, "centroids": centroids, "fingerprint": fingerprint}
    given = {} if clusters is None else {"cluster": np.ascontiguousarray(clusters, "<i4"), "name": encode_keys(names)}
    write_bytes(paths[1], _h5(keys, numbers, shown, others, header, given))
    write_bytes(paths[2], np.array([len(numbers)], dtype="<i4").tobytes() + numbers.tobytes())
    return paths


def read_labels(path: Path) -> Labels:
    """Read pseudo-labels from .csv (columns key, label and label_2, label_3 ..., others are ignored), .h5 or .bin.

    Raises:
        UsageError: missing file, other suffix, malformed content, labels below -1, the same key twice, no labels.
    """
    readers = {".csv": _read_csv, ".h5": _read_h5, ".bin": _read_bin}
    if path.suffix not in readers:
        raise UsageError(f"{path}: labels are read from {', '.join(readers)} files")
    if not path.is_file():
        raise UsageError(f"{path}: no such label file; `ktransfer assign` writes one")
    found = readers[path.suffix](path)
    if not len(found.labels):
        _wrong(path, "it holds no labels")
    if found.labels.min() < -1:
        _wrong(path, f"label {found.labels.min()} is below -1")
    if found.more.min(initial=0) < -1:
        _wrong(path, f"label {found.more.min()} of a further clustering is below -1")
    if found.labels.max() >= found.k:
        _wrong(path, f"label {found.labels.max()} is not below k = {found.k}")
    if found.k == 0:
        _wrong(path, "every label is -1, so there is nothing to learn")
    if found.keys is not None:
        if len(found.keys) != len(found.labels):
            _wrong(path, f"{len(found.keys)} keys for {len(found.labels)} labels")
        seen: set[str] = set()
        for key in found.keys:
            if key in seen:
                _wrong(path, f"key {key!r} occurs twice")
            seen.add(key)
    return found


def read_assignment(path: Path) -> Assignment:
    """Read the clusters and distances of labels.h5.

    Raises:
        UsageError: as `read_labels`.
    """
    found = read_labels(path)
    try:
        with hdf5.opened(path) as file:
            distances = np.asarray(table(file, "distance", "f", 1), np.float32)
            clusters = np.asarray(table(file, "cluster", "i", 1), np.int32) if "cluster" in file else found.labels
            facts = {name: str(file.attrs[name]) for name in ("centroids", "fingerprint")}
    except hdf5.ERRORS as error:
        hdf5.refuse_unreadable(path, error)
        _wrong(path, " ".join(str(error).split()))
    if not len(distances) == len(clusters) == len(found.labels):
        _wrong(path, f"{len(distances)} distances for {len(found.labels)} labels")
    return Assignment(found.keys or [], clusters, distances, **facts)


def _write_csv(
    part: Path,
    keys: Sequence[str],
    labels: NDArray[np.int32],
    distances: NDArray[np.float32],
    more: NDArray[np.int32],
    names: Sequence[str],
) -> None:
    with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        called = [GROUP] if names else []
        rows.writerow(("key", "label", "distance", *(f"{MORE}{view + 2}" for view in range(more.shape[1])), *called))
        for key, label, distance, others in zip(keys, labels.tolist(), distances, more.tolist(), strict=True):
            # str of a numpy float32 is the shortest text that reads back as the same float32.
            called = [names[label] if label >= 0 else ""] if names else []
            rows.writerow((key, label, "" if label < 0 else str(distance), *others, *called))


def _h5(
    keys: Sequence[str],
    labels: NDArray[np.int32],
    distances: NDArray[np.float32],
    more: NDArray[np.int32],
    header: dict[str, str | int],
    given: dict[str, NDArray[Any]],
) -> bytes:
    import h5py

    image = io.BytesIO()  # in memory: HDF5 may crash on a full disk
    with h5py.File(image, "w") as file:
        for name, value in header.items():
            file.attrs[name] = value
        for name, data in (("key", encode_keys(keys)), ("label", labels), ("distance", distances), *given.items()):
            file.create_dataset(name, data=data)
        if more.shape[1]:
            file.create_dataset("more", data=more)
    return image.getvalue()


def _read_csv(path: Path) -> Labels:
    keys: list[str] = []
    labels: list[list[int]] = []
    names: dict[int, str] = {}
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark first.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            rows = csv.reader(handle, strict=True)
            header = next(rows, [])
            if "key" not in header or "label" not in header:
                _wrong(path, f"the first line must name the columns key and label, found {','.join(header)[:80]!r}")
            more = [name for name in header if re.fullmatch(rf"{MORE}[0-9]+", name)]
            at_key, places = header.index("key"), [header.index(name) for name in ("label", *more)]
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    _wrong(path, f"line {rows.line_num} has {len(row)} fields, the header {len(header)}")
                for given in (row[place] for place in places):
                    if not _INTEGER.fullmatch(given) or int(given) > _LARGEST:
                        _wrong(path, f"line {rows.line_num}: label {given!r} is not an integer of -1 or more")
                keys.append(row[at_key])
                labels.append([int(row[place]) for place in places])
                if GROUP in header and labels[-1][0] >= 0:
                    name = row[header.index(GROUP)]
                    if names.setdefault(labels[-1][0], name) != name:
                        _wrong(path, f"line {rows.line_num}: label {labels[-1][0]} is called {name!r}, and not before")
    except csv.Error as error:
        _wrong(path, str(error))
    found = np.array(labels, dtype=np.int32).reshape(len(keys), len(places))
    k = int(found[:, 0].max(initial=-1)) + 1
    # A label that no image has has no name either: that of its number.
    called = tuple(names.get(label, str(label)) for label in range(k)) if names else ()
    return Labels(keys, found[:, 0], k, found[:, 1:], called)


def _read_h5(path: Path) -> Labels:
    import h5py

    try:
        with hdf5.opened(path) as file:
            names = [name for name in ("key", "label") if not isinstance(file.get(name), h5py.Dataset)]
            if names:
                _wrong(path, f"no data set {', '.join(names)}")
            if file.attrs.get("schema") != SCHEMA:
                _wrong(path, f"schema is {file.attrs.get('schema')}, this version reads {SCHEMA}")
            k = file.attrs.get("k")
            if not isinstance(k, int | np.integer):
                _wrong(path, f"k is {k}, must be a number of clusters")
            if file["label"].dtype != np.dtype("<i4") or file["label"].ndim != 1:
                _wrong(path, "label must be (n,) int32")
            if h5py.check_string_dtype(file["key"].dtype) is None or file["key"].ndim != 1:
                _wrong(path, "key must be (n,) strings")
            labels = table(file, "label", "i", 1)
            more = table(file, "more", "i", 2) if "more" in file else np.empty((len(labels), 0), np.int32)
            if more.dtype != np.dtype("<i4") or more.ndim != 2 or len(more) != len(labels):
                _wrong(path, "more must be (n, views - 1) int32")
            if len(file["key"]) != len(labels):
                _wrong(path, f"{len(file['key'])} keys for {len(labels)} labels")
            called = tuple(decode_keys(file["name"][:])) if "name" in file else ()
            return Labels(decode_keys(file["key"][:]), labels, int(k), more, called)
    except hdf5.ERRORS as error:
        hdf5.refuse_unreadable(path, error)
        _wrong(path, f"not a whole HDF5 file ({' '.join(str(error).split())})")


def _read_bin(path: Path) -> Labels:
    data = path.read_bytes()
    if len(data) < 4 or len(data) % 4:
        _wrong(path, f"{len(data)} bytes are not an int32 count and int32 labels")
    numbers: NDArray[Any] = np.frombuffer(data, dtype="<i4")
    if numbers[0] != len(numbers) - 1:
        _wrong(path, f"it states {numbers[0]} labels and holds {len(numbers) - 1}")
    labels = numbers[1:].astype(np.int32)
    return Labels(None, labels, int(labels.max(initial=-1)) + 1, np.empty((len(labels), 0), np.int32))


def _wrong(path: Path, rule: str) -> NoReturn:
    raise UsageError(f"{path}: not a label file: {rule}; `ktransfer assign` writes one")
