"""The feature file: one row per image, written so that a killed extraction goes on where it stopped.

HDF5 writes the whole header first, with every byte of data already allocated; after that rows are plain bytes at a
known offset. So nothing but rows changes on disk while a run lives, and no HDF5 handle crosses a fork.
"""

import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts import hdf5
from ktransfer.errors import StageError, UsageError, remedy, why
from ktransfer.files import PART, beside, commit, reserve, write_json
from ktransfer.progress import bar

SCHEMA = 1
DTYPES = ("float16", "float32")
_SUFFIXES = (".h5", ".hdf5", ".part")
_PROGRESS = ".progress"
_SAVE_SECONDS = 1.0
HEADER_BYTES = 2**14  # more than HDF5 and the attributes need
_MEAN_NUMBERS = 2**22  # of a block that is summed at once
_GAP = 64  # invalid rows in a row that are read with the valid ones around them

Attribute = str | int | float


def encode_keys(keys: Sequence[str]) -> NDArray[Any]:
    """(n,) fixed-length UTF-8 for HDF5; names that are not Unicode keep their bytes (Python's surrogateescape).

    Fixed length, because variable-length strings live in a heap whose layout depends on how they were written.
    """
    import h5py

    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    length = max((len(key) for key in encoded), default=0)
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(length, 1)))


def decode_keys(encoded: NDArray[Any]) -> list[str]:
    """The reverse of `encode_keys`, for fixed-length and for variable-length strings as h5py reads them (bytes)."""
    return [key.decode("utf-8", "surrogateescape") for key in encoded.tolist()]


class Writer:
    """Fills a feature file in row order; made by `create_or_resume`.

    Attributes:
        rows_done: rows that are on disk for certain when it was opened, plus those written since.
    """

    def __init__(self, path: Path, keys: Sequence[str], spec: str, rows_done: int, save_seconds: float) -> None:
        self.rows_done = rows_done
        self._path, self._keys, self._spec = path, keys, spec
        self._part, self._progress = _beside(path)
        with hdf5.opened(self._part) as file:
            self._dtype: np.dtype[Any] = file["features"].dtype
            self._dim = int(file["features"].shape[1])
            self._features_at, self._valid_at = (int(file[name].id.get_offset()) for name in ("features", "valid"))
        self._handle = self._part.open("rb+")
        self._save_seconds, self._saved_at = save_seconds, time.monotonic()

    def write(self, start: int, features: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Write rows start .. start + b - 1; rows of broken images become zeros.

        Args:
            start: must equal `rows_done`.
            features: (b, d) float.
            valid: (b,) bool, false where the image is broken.

        Raises:
            StageError: a row is not finite, does not fit float16, or the disk is full.
        """
        if start != self.rows_done or features.shape != (len(valid), self._dim):
            raise ValueError(f"rows {start}.. of shape {features.shape} do not follow row {self.rows_done}")
        wide = np.where(valid[:, None], features, 0)
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(wide, dtype=self._dtype)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            key = self._keys[start + int(bad[0])]
            if np.isfinite(wide[bad[0]]).all():
                raise StageError(
                    f"the features of {key!r} exceed 65504, the largest float16: give --dtype float32 --overwrite"
                )
            raise StageError(
                f"the features of {key!r} are not finite (NaN or infinity): check the weights of the network"
            )
        with _disk_errors(self._path):
            self._put(self._features_at + start * self._dim * self._dtype.itemsize, rows.tobytes())
            self._put(self._valid_at + start, valid.astype(np.uint8).tobytes())
            self.rows_done += len(valid)
            if time.monotonic() - self._saved_at >= self._save_seconds:
                self._save()

    def valid(self) -> NDArray[np.bool_]:
        """(rows_done,) bool, false where the image is broken; rows from before an interruption included."""
        self._handle.seek(self._valid_at)
        return np.frombuffer(self._handle.read(self.rows_done), np.bool_)

    def finish(self) -> None:
        """Give the finished file its name; all rows must be written."""
        if self.rows_done != len(self._keys):
            raise ValueError(f"{self.rows_done} of {len(self._keys)} rows are written")
        with _disk_errors(self._path):
            self.close()
            commit(self._part, self._path)
            self._progress.unlink(missing_ok=True)

    def close(self) -> None:
        """Save the progress and let go of the file; a later `create_or_resume` goes on."""
        self._save()
        self._handle.close()

    def _put(self, offset: int, data: bytes) -> None:
        self._handle.seek(offset)
        self._handle.write(data)

    def _save(self) -> None:
        # The rows must be durable before the file that vouches for them.
        self._handle.flush()
        os.fsync(self._handle.fileno())
        write_json(self._progress, {"rows": self.rows_done, "spec": self._spec})
        self._saved_at = time.monotonic()


def create_or_resume(
    path: Path,
    keys: Sequence[str],
    targets: NDArray[np.int32],
    dim: int,
    dtype: str,
    attributes: Mapping[str, Attribute],
    *,
    save_seconds: float = _SAVE_SECONDS,
) -> Writer:
    """Open NAME.h5.part for writing: where an unfinished file with the same header is there, after its last sure row.

    A file with any other header is started again. The finished file's bytes do not depend on how often the writer was
    killed.

    Args:
        path: where the finished file goes.
        keys: n distinct keys in row order.
        targets: (n,) int32, -1 where unknown.
        dim: d, numbers per row.
        dtype: "float16" or "float32".
        attributes: teacher, layer, pooling, transform, fingerprint ...; `schema` and `rows_done` are added.
        save_seconds: least time between two savings of the progress.

    Raises:
        UsageError: unknown dtype.
        StageError: the disk is full or not writable.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    header = {**attributes, "schema": SCHEMA, "rows_done": len(keys)}
    encoded = encode_keys(keys)
    spec = _spec(encoded, targets, dim, dtype, header)
    part, progress = _beside(path)
    with _disk_errors(path):
        rows_done = _rows_done(progress, spec) if part.is_file() else None
        if rows_done is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            progress.unlink(missing_ok=True)
            _create(part, encoded, targets, dim, dtype, header)
            write_json(progress, {"rows": 0, "spec": spec})
    return Writer(path, keys, spec, rows_done or 0, save_seconds)


@dataclass(frozen=True)
class Features:
    """An open feature file.

    Attributes:
        path: the file.
        rows: (n, d) float16 or float32, a read-only memory map.
        valid: (n,) bool, false where the image is broken.
        targets: (n,) int32, -1 where unknown.
        attributes: what the file says about itself.
    """

    path: Path
    rows: NDArray[Any]
    valid: NDArray[np.bool_]
    targets: NDArray[np.int32]
    attributes: dict[str, Attribute]

    @cached_property
    def keys(self) -> list[str]:
        """n keys in row order, read when first asked for."""
        with hdf5.opened(self.path) as file:
            return decode_keys(file["key"][:])


def open_features(path: Path) -> Features:
    """Open and check a feature file without reading its rows.

    Raises:
        UsageError: the file is missing, not HDF5, cut off, of another kind or of another schema.
    """
    import h5py

    if not path.is_file():
        raise UsageError(f"{path}: no such feature file; `ktransfer extract` writes one")
    if path.suffix.lower() not in _SUFFIXES and not h5py.is_hdf5(os.fsencode(path)):
        raise UsageError(
            f"{path}: no feature file; features made elsewhere are taken as FILE.npy or FILE.npz (numpy.save), with "
            "--keys, by cluster --features"
        )
    try:
        with hdf5.opened(path) as file:
            _check_layout(path, file)
            data = file["features"]
            offset, shape, dtype = data.id.get_offset(), data.shape, data.dtype
            valid, targets = file["valid"][:], file["target"][:]
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
    except hdf5.ERRORS as error:
        hdf5.refuse(path, error, "extract the features again with --overwrite")
    if offset is None or path.stat().st_size < offset + int(np.prod(shape)) * dtype.itemsize:
        raise UsageError(f"{path}: cut off before its last row; extract the features again with --overwrite")
    rows: NDArray[Any] = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    return Features(path, rows, valid, targets, attributes)


def valid_rows(features: Features) -> Callable[[int, int], NDArray[Any]]:
    """(start, stop) -> (b, d): those of the valid rows, counted without the broken ones, in the file's dtype.

    The file is read, not mapped: mapped pages would count as this process's memory, and a file that is cut off
    meanwhile would kill the process. `Features.rows` that are no memory map are given as they are, without a copy where
    all are valid. Several threads may read at once.

    Raises:
        StageError: when called, the file is shorter than it was.
    """
    read = _reader(features)
    if features.valid.all():
        return read
    places = np.flatnonzero(features.valid)

    def read_valid(start: int, stop: int) -> NDArray[Any]:
        chosen = places[start:stop]
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > _GAP) + 1)
        blocks = [read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs if len(run)]
        return np.concatenate(blocks) if blocks else read(0, 0)

    return read_valid


def mean_row(features: Features) -> NDArray[np.float32]:
    """(d,) the mean of the valid rows, in one pass."""
    count, columns = int(features.valid.sum()), features.rows.shape[1]
    read, step, total = valid_rows(features), max(1, _MEAN_NUMBERS // columns), np.zeros(columns)
    with bar(count, "mean of the features", "rows") as shown:
        for start in range(0, count, step):
            block = read(start, min(start + step, count))
            total += block.sum(axis=0, dtype=np.float64)
            shown.update(len(block))
    return (total / max(1, count)).astype(np.float32)


def _reader(features: Features) -> Callable[[int, int], NDArray[Any]]:
    stored = features.rows
    if not isinstance(stored, np.memmap):
        return lambda start, stop: stored[start:stop]
    handle = os.open(features.path, os.O_RDONLY)
    width, offset = stored.shape[1] * stored.dtype.itemsize, int(stored.offset)

    def read(start: int, stop: int) -> NDArray[Any]:
        block = np.empty((stop - start, stored.shape[1]), stored.dtype)
        room = block.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(room):
            got = os.preadv(handle, [room[done:]], offset + start * width + done)
            if not got:
                raise StageError(
                    f"{features.path}: was cut off while it was read; extract the features again with --overwrite"
                )
            done += got
        return block

    weakref.finalize(read, os.close, handle)
    return read


def _check_layout(path: Path, file: Any) -> None:
    """UsageError unless the data sets and attributes are those of docs/architecture.md, Files on disk."""
    import h5py

    def wrong(rule: str) -> UsageError:
        return UsageError(f"{path}: not a feature file: {rule}; `ktransfer extract` writes one")

    missing = [name for name in ("features", "key", "valid", "target") if not isinstance(file.get(name), h5py.Dataset)]
    if missing:
        raise wrong(f"no data set {', '.join(missing)}")
    if file.attrs.get("schema") != SCHEMA:
        raise wrong(f"schema is {file.attrs.get('schema')}, this version reads {SCHEMA}")
    features = file["features"]
    if features.ndim != 2 or 0 in features.shape:
        raise wrong(f"features has shape {features.shape}, must be (n, d) with n and d at least 1")
    if features.dtype not in (np.dtype("<f2"), np.dtype("<f4")):
        raise wrong(f"features is {features.dtype}, must be little-endian float16 or float32")
    if features.chunks is not None or features.compression is not None or features.external:
        raise wrong("features must be contiguous, without chunks or compression")
    n = features.shape[0]
    if file["valid"].dtype != np.bool_ or file["target"].dtype != np.dtype("<i4"):
        raise wrong("valid must be bool and target int32")
    if h5py.check_string_dtype(file["key"].dtype) is None:
        raise wrong("key must be strings")
    for name in ("key", "valid", "target"):
        if file[name].shape != (n,):
            raise wrong(f"{name} has shape {file[name].shape}, must be ({n},) as features has {n} rows")
    if file.attrs.get("rows_done") != n:
        raise wrong(f"rows_done is {file.attrs.get('rows_done')} of {n}")


def _beside(path: Path) -> tuple[Path, Path]:
    return beside(path, PART), beside(path, _PROGRESS)


def _spec(encoded: NDArray[Any], targets: NDArray[np.int32], dim: int, dtype: str, header: Mapping[str, Any]) -> str:
    """Hex SHA-256 of all that the header of a feature file holds."""
    digest = hashlib.sha256(json.dumps([len(encoded), encoded.dtype.itemsize, dim, dtype, header]).encode())
    digest.update(encoded.tobytes())
    digest.update(np.ascontiguousarray(targets, dtype="<i4").tobytes())
    return digest.hexdigest()


def _rows_done(progress: Path, spec: str) -> int | None:
    """Rows that are surely written, None where there is no progress file for this header."""
    try:
        saved = json.loads(progress.read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # what cannot be read now may be sound, and is no reason to start over
        return None
    return int(saved["rows"]) if saved.get("spec") == spec else None


def allocated_early() -> Any:
    """HDF5's properties of a data set whose place in the file is fixed at once, with nothing written there."""
    import h5py

    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    early.set_obj_track_times(False)
    return early


def _create(
    part: Path, encoded: NDArray[Any], targets: NDArray[np.int32], dim: int, dtype: str, header: Mapping[str, Attribute]
) -> None:
    import h5py

    n = len(encoded)
    # HDF5 meets a full disk with a page of messages, at worst a crash: so the disk is asked first.
    head = encoded.nbytes + n * 5 + HEADER_BYTES
    reserve(part, head + n * dim * np.dtype(dtype).itemsize, head)
    early = allocated_early()
    with hdf5.opened(part, "w") as file:
        for name, value in header.items():
            file.attrs[name] = value
        file.create_dataset("key", data=encoded)
        file.create_dataset("target", data=np.ascontiguousarray(targets, dtype="<i4"))
        for name, kind, shape in (("valid", np.dtype(np.bool_), (n,)), ("features", np.dtype(dtype), (n, dim))):
            file_type = h5py.h5t.py_create(kind, logical=True)
            h5py.h5d.create(file.id, name.encode(), file_type, h5py.h5s.create_simple(shape), early)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StageError(
            f"{path}: cannot write the features ({why(error)}); {remedy(error, 'look at the disk')}, and give the "
            "same command again"
        ) from error


def _plain(value: Any) -> Attribute:
    plain: Attribute = value.item() if isinstance(value, np.generic) else value
    return plain
