"""Images in shards: tar files as WebDataset writes them, and Parquet files as Hugging Face's datasets do.

Nothing is unpacked: of a tar file the places of the images are known, and each is read by itself; of a Parquet file a
group of rows is read at once, and the last groups are kept. A shard is a path that ends with .tar or .parquet; several
are named by a pattern (`train-*.tar`), by braces as WebDataset does (`train-{000..146}.tar`), or by their folder.

tar: a sample is what has the same path up to the first dot of the file name, its class stands in NAME.cls; where no
sample has one, first-level folders are the classes, as in a folder of images. Parquet: the first column of images
({bytes, path}, or bytes named image or img), and a column label, labels or class: numbers with the names that the
file's description gives them, or words.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.data.dataset import UNKNOWN, Dataset, class_names, escaped, file_name
from ktransfer.data.folders import ENDINGS
from ktransfer.errors import BrokenImage, StageError, UsageError
from ktransfer.images import decoding
from ktransfer.progress import track

SHARDS = (".tar", ".parquet")
CLASS_BYTES = 1000  # of a .cls
KEPT_GROUPS = 4
LABELS = ("label", "labels", "class")
IMAGES = ("image", "img")
_BRACES = re.compile(r"\{(\w+)\.\.(\w+)\}|\{([^{}]*,[^{}]*)\}")
_group_lock = threading.Lock()


class Row(NamedTuple):
    """One image: its key, its label ("" where there is none), its place in a shard, and the bytes that it takes there.

    `at` and `length` are bytes of a tar file; in a Parquet file the group of rows, and the row in it.
    """

    key: str
    label: str
    path: Path
    at: int
    length: int


def named(spec: str) -> list[Path] | None:
    """The shards that `--data` names, None where it names none.

    Raises:
        UsageError: one of them does not exist, or the pattern fits nothing.
    """
    if not spec.lower().endswith(SHARDS):
        return None
    spec = os.path.expanduser(spec)  # noqa: PTH111 -- never raises
    found: list[Path] = []
    for one in [spec] if os.path.exists(spec) else expanded(spec):  # noqa: PTH110
        if os.path.exists(one):  # noqa: PTH110
            found.append(Path(os.path.abspath(one)))  # noqa: PTH100
        elif matching := sorted(glob.glob(one)):  # noqa: PTH207
            found += [Path(os.path.abspath(match)) for match in matching]  # noqa: PTH100
        else:
            raise UsageError(f"{spec}: there is no {one}; check the path")
    return found


def expanded(spec: str) -> list[str]:
    """What {000..146} and {a,b} stand for, in order."""
    match = _BRACES.search(spec)
    if not match:
        return [spec]
    first, last, listed = match.groups()
    if listed is not None:
        parts = listed.split(",")
    elif first.isdecimal() and last.isdecimal():
        parts = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        return [spec]
    return list(
        itertools.chain.from_iterable(expanded(spec[: match.start()] + part + spec[match.end() :]) for part in parts)
    )


def inside(folder: Path, names: Sequence[str] = ("",)) -> list[Path]:
    """The shards of a folder, in order; of those whose names begin with one of `names`, the first that there are."""
    listed = sorted(path for path in folder.iterdir() if path.name.lower().endswith(SHARDS))
    for name in names:
        if found := [path for path in listed if re.match(rf"{re.escape(name)}(\W|_|\d|$)" if name else "", path.name)]:
            return found
    return []


def open_shards(spec: str, paths: Sequence[Path], turned: bool = True) -> Dataset:
    """All images of some shards, in the order of the shards; upright, or, where not `turned`, as they are stored.

    Raises:
        UsageError: a shard cannot be read, holds no images, or is cut off; the message names it.
    """
    rows: list[Row] = []
    digest = hashlib.sha256()
    names = [path.name for path in paths]
    short = len(set(names)) == len(names)
    for path in track(paths, len(paths), "read shards", "shards"):
        shard = path.name if short else str(path)
        found = _of_parquet(path, shard) if path.name.lower().endswith(".parquet") else _of_tar(path, shard)
        if not found:
            raise UsageError(f"{path}: holds no images; leave it out")
        if path.name.lower().endswith(".parquet"):
            digest.update(_footer(path))
        rows += found
    keys = escaped([row.key for row in rows])
    labels = escaped([row.label for row in rows])
    classes = class_names(labels)
    if len(classes) < 2:
        classes = ()
    number = {label: index for index, label in enumerate(classes)}
    for key, row in zip(keys, rows, strict=True):
        digest.update(f"{key}\0{row.length}\n".encode())
    digest.update(b"" if turned else b"exif ignored")

    return Dataset(
        spec=spec,
        name=file_name(paths[0].parent.name if len(paths) > 1 else paths[0].stem),
        keys=tuple(keys),
        targets=np.array([number.get(label, UNKNOWN) for label in labels], np.int32),
        classes=classes,
        fingerprint=digest.hexdigest(),
        read=lambda row, short_side: read_image(rows[row], short_side, turned),
        reader=lambda row: partial(read_image, rows[row], turned=turned),
    )


def read_image(row: Row, short_side: int | None, turned: bool = True) -> NDArray[np.uint8]:
    """One image, (height, width, 3) uint8, see `decoding.decode`.

    Raises:
        BrokenImage: it cannot be decoded, or there are no bytes.
        StageError: the shard is not any more what it was when it was opened.
    """
    try:
        data = _group(row.path, row.at)[row.length] if row.path.name.lower().endswith(".parquet") else _bytes(row)
    except (OSError, IndexError) as error:
        raise StageError(
            f"{row.path}: cannot be read ({error}); the file must stay as it is while it is used"
        ) from error
    if not data:
        raise BrokenImage("has no bytes")
    return decoding.decode(data, short_side, turned)


def _bytes(row: Row) -> bytes:
    handle = os.open(row.path, os.O_RDONLY)
    try:
        data = os.pread(handle, row.length, row.at)
    finally:
        os.close(handle)
    if len(data) != row.length:
        raise OSError("it was cut off")
    return data


def _of_tar(path: Path, shard: str) -> list[Row]:
    images: list[tuple[str, int, int]] = []
    classes: dict[str, str] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as file:
            for member in file:
                name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse() or Path(name).name.startswith("."):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"cut off in {name}")
                if name.lower().endswith(ENDINGS):
                    images.append((name, member.offset_data, member.size))
                elif name.endswith(".cls") and member.size <= CLASS_BYTES:
                    row = Row("", "", path, member.offset_data, member.size)
                    classes[_sample(name)] = _bytes(row).decode("utf-8", "replace").strip()
    except tarfile.ReadError as error:
        packed = "; a compressed one must be uncompressed first, as its images cannot be found in it"
        raise UsageError(f"{path}: not a whole tar file ({error}){packed}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); check it") from error
    if not classes:
        folders = [name.partition("/")[0] if "/" in name else "" for name, _, _ in images]
        named = "" not in folders
        classes = {_sample(name): folder for (name, _, _), folder in zip(images, folders, strict=True) if named}
    return [Row(f"{shard}/{name}", classes.get(_sample(name), ""), path, at, length) for name, at, length in images]


def _sample(name: str) -> str:
    """The path of a member up to the first dot of its file name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f"{path}: needs pyarrow; pip install 'ktransfer[parquet]'") from error
    try:
        return parquet.ParquetFile(path, memory_map=False)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UsageError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:200]})") from error


def _of_parquet(path: Path, shard: str) -> list[Row]:
    file = _parquet(path)
    schema = file.schema_arrow
    column = _column(path, schema)
    if file.metadata.num_rows and all(one is None for one in _group(path, 0)):
        raise UsageError(
            f"{path}: column {column} holds paths instead of images; write it with the images inside (`push_to_hub` of "
            "Hugging Face's datasets does, `to_parquet` does not)"
        )
    label = next((name for name in LABELS if name in schema.names), None)
    labels = [""] * file.metadata.num_rows
    if label:
        names = _names_of_classes(schema, label)
        try:
            values = file.read(columns=[label])[label].to_pylist()
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: column {label} cannot be read ({' '.join(str(error).split())[:200]})") from error
        labels = [_label(path, value, names) for value in values]
    rows = ((group, row) for group, count in enumerate(_rows_of_groups(file)) for row in range(count))
    return [Row(f"{shard}/{number:06d}", labels[number], path, group, row) for number, (group, row) in enumerate(rows)]


def _column(path: Path, schema: Any) -> str:
    """The name of the column of images.

    Raises:
        UsageError: there is none.
    """
    import pyarrow.types as types

    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
        if field.name in IMAGES and (types.is_binary(field.type) or types.is_large_binary(field.type)):
            return str(field.name)
    raise UsageError(
        f"{path}: no column of images among {', '.join(schema.names)}; it must have {{bytes, path}}, as datasets of "
        "Hugging Face do, or bytes named image"
    )


def _names_of_classes(schema: Any, label: str) -> list[str]:
    """What the description of Hugging Face's datasets calls the numbers of a column; none where it says nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _label(path: Path, value: Any, names: list[str]) -> str:
    if value is None or (isinstance(value, int) and value < 0):  # of test sets whose labels are kept back
        return ""
    if isinstance(value, int) and names:
        if value >= len(names):
            raise UsageError(f"{path}: label {value}, but its description names {len(names)} classes; check the file")
        return names[value]
    if not isinstance(value, int | str):
        raise UsageError(f"{path}: a label is a {type(value).__name__}; it must be a number or a word")
    return str(value)


def _rows_of_groups(file: Any) -> Iterator[int]:
    return (file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))


def _footer(path: Path) -> bytes:
    """What a Parquet file says of itself, places and sizes of all its columns included, and its length."""
    with path.open("rb") as handle:
        size = handle.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(max(0, size - 8 - length))
        return handle.read(length) + size.to_bytes(8, "little")


def _group(path: Path, group: int) -> list[bytes | None]:
    """The bytes of all images of a group of rows."""
    with _group_lock:  # so that threads which meet in a group read it once
        return _read_group(path, group)


@lru_cache(maxsize=KEPT_GROUPS)
def _read_group(path: Path, group: int) -> list[bytes | None]:
    file = _parquet(path)
    name = _column(path, file.schema_arrow)
    column = file.read_row_group(group, columns=[name])[name].combine_chunks()
    values = column.field("bytes") if column.type.num_fields else column
    return list(values.to_pylist())
