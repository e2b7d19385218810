"""How `ktransfer pack` writes its file (`packs.py` says how that is laid out), so that it can be killed at any time.

How long the data will be is known at the end only, but HDF5 fixes the length of a contiguous data set when it makes it.
So the bytes of the images are appended to FILE.part behind a gap as large as HDF5's header, and what is known of each
image to FILE.rows. When all are there, HDF5 writes FILE.head, a file of that length with a hole for the data, and its
header is laid into the gap. FILE.progress says how many images are safely on disk.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from ktransfer import files
from ktransfer.artifacts import hdf5, lock
from ktransfer.artifacts.features import HEADER_BYTES, allocated_early, encode_keys
from ktransfer.data import packs
from ktransfer.data.dataset import Dataset
from ktransfer.errors import StageError, UsageError, remedy, why
from ktransfer.progress import say

_LEAST = 2**13  # a shorter data set would share a block with others, and its place depend on its length
_SAVE_SECONDS = 1.0
_ROW = np.dtype([("end", "<i8"), ("digest", "<u8"), ("height", "<i4"), ("width", "<i4"), ("valid", "?")])


class Recipe(NamedTuple):
    """What decides about the bytes of an image; quality is 0 for raw pixels."""

    size: int
    quality: int


class Packed(NamedTuple):
    """An image as it is stored; where it is broken, `data` is the reason."""

    data: bytes
    digest: int
    height: int
    width: int
    valid: bool


class Unfinished:
    """FILE.part, FILE.rows and FILE.progress: new, or as an interrupted run of the same kind left them.

    Attributes:
        rows_done: images that are written.
    """

    def __init__(self, out: Path, data: Dataset, recipe: Recipe) -> None:
        self._out, self._data, self._recipe = out, data, recipe
        self._part, self._rows, self._progress, self._head = beside(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._row_file = self._rows.open("ab+")
        except OSError as error:
            raise _unwritable(out, error) from error
        with ExitStack() as stack:
            stack.callback(self._row_file.close)
            try:
                self._let_go = lock.take(self._row_file.fileno(), self._rows)
            except lock.Busy as busy:
                who = f" ({busy.who})" if busy.who else ""
                raise UsageError(
                    f"--out {out}: another ktransfer process is writing it{who}; {busy} or choose another file"
                ) from busy
            except OSError as error:
                raise _unwritable(out, error) from error
            stack.callback(self._let_go)
            self._spec = _spec(data, recipe)
            self._data_at, records = self._saved()
            self.rows_done = len(records)
            self._end = int(records["end"][-1]) if len(records) else 0
            self._data_file = self._part.open("rb+")
            # What was written after the last saving may be anything.
            self._row_file.truncate(self.rows_done * _ROW.itemsize)
            self._data_file.truncate(self._data_at + self._end)
            self._data_file.seek(0, os.SEEK_END)
            self._saved_at = time.monotonic()
            stack.pop_all()

    def append(self, packed: Sequence[Packed]) -> None:
        """Write the next images."""
        records = np.zeros(len(packed), _ROW)
        for slot, image in enumerate(packed):
            self._end += len(image.data)
            records[slot] = (self._end, image.digest, image.height, image.width, image.valid)
            self._data_file.write(image.data)
        self._row_file.write(records.tobytes())
        self.rows_done += len(packed)
        if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self._save()

    def broken(self) -> dict[int, str]:
        """Row and reason of each broken image."""
        self._save()
        records = self._records()
        return {row: self._reason(records, row) for row in np.flatnonzero(~records["valid"]).tolist()}

    def finish(self) -> None:
        """Write the header and give the finished file its name; all rows must be written."""
        if self.rows_done != len(self._data):
            raise ValueError(f"{self.rows_done} of {len(self._data)} images are written")
        self._save()
        records = self._records()
        length = max(self._end, _LEAST)
        at = _write_head(self._head, *header(self._data, self._recipe, records), length)
        if at != self._data_at:
            raise StageError(
                f"{self._out}: HDF5 placed the data differently than before; remove {self._part} and start over"
            )
        _lay_around(self._head, self._data_file, at, length)
        self._data_file.close()
        self._head.unlink()
        files.commit(self._part, self._out)
        forget(self._out)

    def close(self) -> None:
        """Save what is there and let go of the files."""
        with ExitStack() as stack:  # also where the disk is full
            stack.callback(self._let_go)
            stack.callback(self._row_file.close)
            stack.callback(self._data_file.close)
            if not self._data_file.closed:
                self._save()

    def _saved(self) -> tuple[int, NDArray[Any]]:
        """Where the data begin, and what is known of the images that are safely written."""
        try:
            saved = json.loads(self._progress.read_text("utf-8"))
            same = saved["spec"] == self._spec
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            saved, same = None, False
        if same:
            records = self._records()[: saved["rows"]]
            end = int(records["end"][-1]) if len(records) else 0
            there = self._part.stat().st_size if self._part.is_file() else -1
            if len(records) == saved["rows"] and there >= saved["at"] + end:
                return saved["at"], records
        elif saved is not None:
            say(f"pack: starts over, as {self._part} was started with other images, settings or versions")
        self._progress.unlink(missing_ok=True)
        at = _write_head(self._part, *header(self._data, self._recipe, None), _LEAST)
        files.write_json(self._progress, {"rows": 0, "at": at, "spec": self._spec})
        return at, np.zeros(0, _ROW)

    def _records(self) -> NDArray[Any]:
        whole = os.fstat(self._row_file.fileno()).st_size // _ROW.itemsize * _ROW.itemsize
        return np.frombuffer(os.pread(self._row_file.fileno(), whole, 0), _ROW)

    def _reason(self, records: NDArray[Any], row: int) -> str:
        begin, end = (int(records["end"][row - 1]) if row else 0), int(records["end"][row])
        return os.pread(self._data_file.fileno(), end - begin, self._data_at + begin).decode("utf-8", "replace")

    def _save(self) -> None:
        # The bytes must be durable before the file that vouches for them.
        for handle in (self._data_file, self._row_file):
            handle.flush()
            os.fsync(handle.fileno())
        files.write_json(self._progress, {"rows": self.rows_done, "at": self._data_at, "spec": self._spec})
        self._saved_at = time.monotonic()


def beside(out: Path) -> tuple[Path, Path, Path, Path]:
    """FILE.part, FILE.rows, FILE.progress and FILE.head."""
    part, rows, progress, head = (files.beside(out, end) for end in (files.PART, ".rows", ".progress", ".head"))
    return part, rows, progress, head


def forget(out: Path) -> None:
    """Remove what an unfinished pack leaves."""
    for path in beside(out):
        path.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(f"--out {out}: cannot be written ({why(error)}); {remedy(error, 'choose another place')}")


def _spec(data: Dataset, recipe: Recipe) -> str:
    """Hex SHA-256 of all that the bytes of the file depend on, as far as it is known before they are made."""
    import h5py

    versions = [PIL.__version__, features.version("libjpeg_turbo"), h5py.version.hdf5_version]
    tables, attributes = header(data, recipe, None)
    digest = hashlib.sha256(json.dumps([versions, attributes]).encode())
    for name in ("key", "target", "class"):
        digest.update(f"{tables[name].dtype.itemsize} {len(tables[name])}".encode() + tables[name].tobytes())
    return digest.hexdigest()


def header(
    data: Dataset, recipe: Recipe, records: NDArray[Any] | None
) -> tuple[dict[str, NDArray[Any]], dict[str, str | int]]:
    """Tables and attributes (see `packs`); without records, of the same size."""
    known = np.zeros(len(data), _ROW) if records is None else records
    tables: dict[str, NDArray[Any]] = {
        "key": encode_keys(data.keys),
        "target": np.ascontiguousarray(data.targets, "<i4"),
        "class": encode_keys(data.classes),
        "valid": known["valid"],
        "offset": np.concatenate([np.zeros(1, "<i8"), known["end"]]),
        "shape": np.stack([known["height"], known["width"]], axis=1),
        "digest": known["digest"],
    }
    encoding = packs.ENCODINGS[0 if recipe.quality else 1]
    attributes: dict[str, str | int] = {
        "schema": packs.SCHEMA,
        "encoding": encoding,
        "size": recipe.size,
        "quality": recipe.quality,
        "source": data.fingerprint,
        "fingerprint": "0" * 64 if records is None else packs.fingerprint_of(encoding, tables),
    }
    return tables, attributes


def _write_head(
    path: Path, tables: Mapping[str, NDArray[Any]], attributes: Mapping[str, str | int], length: int
) -> int:
    """Write a whole pack but for its data, a hole of `length` bytes; where that begins."""
    import h5py

    # HDF5 meets a full disk with a page of messages, at worst a crash: so the disk is asked first.
    needed = sum(table.nbytes for table in tables.values()) + HEADER_BYTES
    files.reserve(path, needed + length, needed)
    early = allocated_early()
    with hdf5.opened(path, "w") as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        for name, table in tables.items():
            file.create_dataset(name, data=table)
        kind = h5py.h5t.py_create(np.dtype("u1"), logical=True)
        data = h5py.h5d.create(file.id, b"data", kind, h5py.h5s.create_simple((length,)), early)
        return int(data.get_offset())


def _lay_around(head: Path, data_file: Any, at: int, length: int) -> None:
    """Copy what `head` holds before and behind its hole to the same places of the file with the data."""
    data_file.truncate(at + length)
    with head.open("rb") as source:
        for begin, end in ((0, at), (at + length, head.stat().st_size)):
            source.seek(begin)
            data_file.seek(begin)
            while (left := end - source.tell()) > 0:
                data_file.write(source.read(min(left, files.PROBE)))
    data_file.flush()
