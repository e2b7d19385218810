"""Embeddings of many images as a file: numpy's, HDF5 or Parquet."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.artifacts.features import create_or_resume
from ktransfer.data.dataset import Dataset
from ktransfer.errors import StageError, UsageError

Batches = Callable[[int], Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]]
"""From a row on: (b, d) float32 and (b,) bool, false where the image is broken; in the order of the images."""


class Embedded(NamedTuple):
    """What is written.

    Attributes:
        data: the images.
        dim: d, numbers of an image.
        facts: what the file says of itself: teacher, layer, pooling, transform, fingerprint.
        batches: the vectors.
    """

    data: Dataset
    dim: int
    facts: dict[str, str]
    batches: Batches


def check(out: Path) -> None:
    """Look for what a format needs.

    Raises:
        UsageError: pyarrow is missing.
    """
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"--out {out}: pyarrow is not installed; pip install 'ktransfer[parquet]', or name a .npy")


def keys_of(out: Path) -> Path:
    """The list of keys beside a .npy."""
    return out.with_suffix(".keys.txt")


def write(out: Path, embedded: Embedded) -> None:
    """Fill the file; what it was before stays until it is whole.

    Raises:
        StageError: a vector is not finite.
    """
    WRITERS[out.suffix](out, embedded)


def _npy(out: Path, embedded: Embedded) -> None:
    """(m, d) float32, the m images that could be read; and their keys, one a line, in a second file."""
    kept: list[str] = []

    def fill(part: Path) -> None:
        with part.open("wb") as handle:
            _head(handle, 0, embedded.dim)
            for start, rows, valid in _finite(embedded):
                handle.write(np.ascontiguousarray(rows[valid]).tobytes())
                kept.extend(embedded.data.keys[start + place] for place in np.flatnonzero(valid).tolist())
            handle.seek(0)
            _head(handle, len(kept), embedded.dim)  # as long as before: numpy leaves room for the number of rows

    _whole(out, fill)
    files.write_text(keys_of(out), "".join(f"{key}\n" for key in kept))


def _head(handle: Any, rows: int, dim: int) -> None:
    np.lib.format.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})


def _hdf5(out: Path, embedded: Embedded) -> None:
    """A feature file as `ktransfer extract` writes it; one that was interrupted goes on."""
    data = embedded.data
    writer = create_or_resume(out, data.keys, data.targets, embedded.dim, "float32", embedded.facts)
    for start, rows, valid in _finite(embedded, writer.rows_done):
        writer.write(start, rows, valid)
    writer.finish()


def _parquet(out: Path, embedded: Embedded) -> None:
    """Columns `key` and `embedding`, a list of d float32, null where the image is broken; a group of rows a batch."""
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    kind = arrow.list_(arrow.float32(), embedded.dim)
    schema = arrow.schema([("key", arrow.string()), ("embedding", kind)], metadata=embedded.facts)

    def fill(part: Path) -> None:
        with parquet.ParquetWriter(part, schema) as writer:
            for start, rows, valid in _finite(embedded):
                keys = arrow.array(embedded.data.keys[start : start + len(rows)], arrow.string())
                flat = arrow.array(rows.reshape(-1), arrow.float32())
                vectors = arrow.FixedSizeListArray.from_arrays(flat, type=kind, mask=arrow.array(~valid))
                writer.write_table(arrow.table([keys, vectors], schema=schema))

    _whole(out, fill)


WRITERS: dict[str, Callable[[Path, Embedded], None]] = {".npy": _npy, ".h5": _hdf5, ".parquet": _parquet}


def _finite(embedded: Embedded, start: int = 0) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.bool_]]]:
    for rows, valid in embedded.batches(start):
        wrong = np.flatnonzero(valid & ~np.isfinite(rows).all(axis=1))
        if len(wrong):
            key = embedded.data.keys[start + int(wrong[0])]
            raise StageError(f"predict: the embedding of {key} is not finite; check the weights of the network")
        yield start, rows, valid
        start += len(rows)


def _whole(out: Path, fill: Callable[[Path], None]) -> None:
    try:
        files.write_whole(out, fill)
    except BaseException:  # Ctrl-C too: it lies in a folder of the user's
        files.beside(out, files.PART).unlink(missing_ok=True)
        raise
