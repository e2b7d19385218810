"""A pack: images that `ktransfer pack` made small once, in one HDF5 file whose bytes are read without HDF5.

Everything is little-endian and contiguous; n images, c classes:

    data    (bytes,) uint8   the images one after the other: JPEG files, or height x width x 3 uint8 where `encoding`
                             is "raw"; of a broken image its reason, as UTF-8
    offset  (n + 1,) int64   image i is data[offset[i]:offset[i + 1]]
    shape   (n, 2) int32     height and width as they are stored; 0, 0 where broken
    valid   (n,) bool        false where broken
    digest  (n,) uint64      of the bytes of each image (`digest_of`)
    key     (n,) UTF-8       as the source had it
    target  (n,) int32       row of `class`, -1 unknown
    class   (c,) UTF-8

Attributes: schema, encoding, size, quality (0 where raw), source (fingerprint of what was packed), and fingerprint: the
SHA-256 of the encoding and all tables, thus by `digest` of all images.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts import hdf5
from ktransfer.artifacts.features import decode_keys
from ktransfer.data.dataset import Dataset, file_name
from ktransfer.errors import BrokenImage, StageError, UsageError, remedy, why
from ktransfer.images import decoding, jpegs

SCHEMA = 1
ENCODINGS = ("jpeg", "raw")
# Kind and number of axes of each table, in the order in which they are written; None: strings of fixed length.
TABLES: dict[str, tuple[str | None, int]] = {
    "key": (None, 1),
    "target": ("<i4", 1),
    "class": (None, 1),
    "valid": ("|b1", 1),
    "offset": ("<i8", 1),
    "shape": ("<i4", 2),
    "digest": ("<u8", 1),
}
ATTRIBUTES = {"schema": int, "encoding": str, "size": int, "quality": int, "source": str, "fingerprint": str}


class Pack(NamedTuple):
    """What a pack says about its images: `TABLES` by name, attributes, and where `data` begins in the file."""

    path: Path
    tables: dict[str, NDArray[Any]]
    attributes: dict[str, Any]
    data_at: int


class Place(NamedTuple):
    """One image of a pack, for whatever process is to read it."""

    path: Path
    key: str
    at: int
    length: int
    digest: int
    height: int
    width: int
    valid: bool
    raw: bool


def digest_of(data: bytes) -> int:
    """BLAKE2b of 8 bytes, as a little-endian number: fast enough to be checked whenever an image is read first."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def fingerprint_of(encoding: str, tables: Mapping[str, NDArray[Any]]) -> str:
    """Hex SHA-256 of the encoding and of all tables."""
    digest = hashlib.sha256(f"ktransfer pack {SCHEMA} {encoding}".encode())
    for name in TABLES:
        table = np.ascontiguousarray(tables[name])
        digest.update(f"\0{name} {table.dtype.str} {table.shape}\0".encode())
        digest.update(table.tobytes())
    return digest.hexdigest()


def open_pack(spec: str, path: Path) -> Dataset:
    """The images of a pack; its keys and classes are those of what was packed, its fingerprint is its own.

    Raises:
        UsageError: the file is cut off, no pack, or not as `ktransfer pack` wrote it (data are checked when they are
            read: StageError).
    """
    pack = read_pack(path)
    tables = pack.tables
    keys = tuple(decode_keys(tables["key"]))
    raw = pack.attributes["encoding"] == "raw"
    offset, shape, valid, digest = (tables[name] for name in ("offset", "shape", "valid", "digest"))
    checked = np.zeros(len(keys), bool)

    def place(row: int) -> Place:
        at, end, height, width = int(offset[row]), int(offset[row + 1]), int(shape[row, 0]), int(shape[row, 1])
        number, sound = int(digest[row]), bool(valid[row])
        return Place(path, keys[row], pack.data_at + at, end - at, number, height, width, sound, raw)

    def read(row: int, short_side: int | None) -> NDArray[np.uint8]:
        whole = short_side is None or decoding.reduction(int(shape[row].min()), short_side) == 1
        pixels = read_image(place(row), short_side, not checked[row], jpegs.decode if whole else None)
        checked[row] = True
        return pixels

    def smaller_side(row: int) -> int:
        if not valid[row]:
            read_image(place(row), None)
        return int(shape[row].min())

    return Dataset(
        spec=spec,
        name=file_name(path.stem),
        keys=keys,
        targets=tables["target"].astype(np.int32),
        classes=tuple(decode_keys(tables["class"])),
        fingerprint=pack.attributes["fingerprint"],
        read=read,
        short_side=smaller_side,
        reader=lambda row: partial(read_image, place(row)),
    )


def read_image(
    place: Place, short_side: int | None, check: bool = True, whole: Callable[[bytes], NDArray[np.uint8]] | None = None
) -> NDArray[np.uint8]:
    """One image, (height, width, 3) uint8, by a plain read: nothing is open between two of them, nothing is mapped.

    Args:
        short_side: as for `decoding.decode`; raw pixels ignore it.
        check: compare the bytes with the digest.
        whole: decodes a JPEG instead of `decoding.decode`.

    Raises:
        BrokenImage: it was broken when it was packed, and the reason then.
        StageError: the file is not any more what it was when it was opened.
    """
    try:
        handle = os.open(place.path, os.O_RDONLY)
        try:
            data = os.pread(handle, place.length, place.at)
        finally:
            os.close(handle)
    except OSError as error:
        raise StageError(
            f"{place.path}: cannot be read ({why(error)}); the file must stay in place while it is used: "
            f"{remedy(error, 'check it')}"
        ) from error
    if len(data) != place.length:
        raise StageError(f"{place.path}: was cut off while it was read; make it again with `ktransfer pack`")
    if check and digest_of(data) != place.digest:
        raise StageError(
            f"{place.path}: the bytes of {place.key} are not those that were packed (changed, or a failing disk); "
            "make it again with `ktransfer pack`"
        )
    if not place.valid:
        raise BrokenImage(data.decode("utf-8", "replace"))
    if place.raw:
        return np.frombuffer(data, np.uint8).reshape(place.height, place.width, 3)
    return whole(data) if whole else decoding.decode(data, short_side)


def read_pack(path: Path) -> Pack:
    """Open and check a pack without reading its images.

    Raises:
        UsageError: it is not one, or not whole.
    """
    try:
        size = path.stat().st_size
        with hdf5.opened(path) as file:
            _check_layout(path, file, size)
            tables = {name: file[name][:] for name in TABLES}
            attributes = {name: kind(file.attrs[name]) for name, kind in ATTRIBUTES.items()}
            data_at, length = int(file["data"].id.get_offset()), len(file["data"])
    except hdf5.ERRORS as error:
        hdf5.refuse(path, error, "make it with `ktransfer pack`")
    _check_values(path, tables, attributes, length)
    return Pack(path, tables, attributes, data_at)


def _refusal(path: Path, rule: str) -> UsageError:
    return UsageError(f"{path}: not a pack: {rule}; make one with `ktransfer pack`")


def _check_layout(path: Path, file: Any, size: int) -> None:
    """UsageError unless all data sets are of the right kind, plain bytes inside the file (of `size` bytes)."""
    import h5py

    kinds = TABLES | {"data": ("|u1", 1)}
    missing = [name for name in kinds if not isinstance(file.get(name), h5py.Dataset)]
    if missing:
        raise _refusal(path, f"no data set {', '.join(missing)}")
    if (schema := file.attrs.get("schema")) != SCHEMA:
        raise _refusal(path, f"schema is {schema}, this version reads {SCHEMA}")
    for name in ATTRIBUTES:
        if name not in file.attrs:
            raise _refusal(path, f"no attribute {name}")
    for name, (kind, axes) in kinds.items():
        found = file[name]
        text = h5py.check_string_dtype(found.dtype)
        if (found.dtype != np.dtype(kind)) if kind else (text is None or not text.length):
            raise _refusal(path, f"{name} is {found.dtype}, must be {kind or 'strings of fixed length'}")
        if found.ndim != axes:
            raise _refusal(path, f"{name} has shape {found.shape}, must have {axes} axes")
        # Links, chunks and filters would make of a small file a large one, or of this file another one.
        link = file.get(name, getlink=True)
        contiguous = found.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        if not isinstance(link, h5py.HardLink) or not contiguous or found.external:
            raise _refusal(path, f"{name} must be contiguous and in the file itself")
        at = found.id.get_offset()
        if found.nbytes and (at is None or at + found.nbytes > size):
            raise _refusal(path, f"cut off before the end of {name}")


def _check_values(path: Path, tables: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any], length: int) -> None:
    """UsageError unless the tables agree with each other, with the `length` of data and with the fingerprint."""
    n = len(tables["key"])
    expected = {"key": (n,), "target": (n,), "valid": (n,), "offset": (n + 1,), "shape": (n, 2), "digest": (n,)}
    for name, shape in expected.items():
        if tables[name].shape != shape:
            raise _refusal(path, f"{name} has shape {tables[name].shape}, must be {shape} as there are {n} keys")
    if not n:
        raise _refusal(path, "it holds no images")
    if attributes["encoding"] not in ENCODINGS:
        raise _refusal(path, f"encoding is {attributes['encoding']}, must be {' or '.join(ENCODINGS)}")
    offset, valid, target = tables["offset"], tables["valid"], tables["target"]
    if offset[0] or (offset[1:] <= offset[:-1]).any() or offset[-1] > length:
        raise _refusal(path, f"the offsets do not grow from 0 to at most the {length} bytes of data")
    if target.min() < -1 or target.max() >= len(tables["class"]):
        raise _refusal(path, f"a target is not one of {len(tables['class'])} classes")
    sides = tables["shape"][valid].astype(np.int64)
    if (sides < 1).any():
        raise _refusal(path, "an image has no pixels")
    if attributes["encoding"] == "raw" and (sides.prod(1) * 3 != np.diff(offset)[valid]).any():
        raise _refusal(path, "an image has more or fewer bytes than its shape says")
    if fingerprint_of(attributes["encoding"], tables) != attributes["fingerprint"]:
        raise _refusal(path, "its tables are not those that were written (the fingerprint differs)")
