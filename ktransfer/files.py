"""Files that are whole or not there: temporary name, fsync, rename."""

import codecs
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PART = ".part"
PROBE = 2**20
LONGEST = 255
"""Bytes of a name of a file, at most."""
_HALVES = re.compile("[\ud800-\udfff]")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place; nothing half-written is ever read.

    Raises:
        OSError: it cannot be written, also where a library behind `write` has other words for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path, PART)
    try:
        try:
            write(part)
        except Exception as error:
            if not isinstance(error, OSError):
                _append(part, bytes(PROBE))
            raise
        commit(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def beside(path: Path, ending: str) -> Path:
    """The file that is called as this one and `ending`, or by a digest of it where that were too long for a name."""
    name = path.name + ending
    if len(os.fsencode(name)) > LONGEST:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{ending}"
    return path.with_name(name)


def commit(part: Path, path: Path) -> None:
    """Make a finished temporary file durable under its final name."""
    with part.open("rb+") as handle:
        os.fsync(handle.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """`write_whole` for bytes."""
    write_whole(path, lambda part: _dump(part, data))


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text, as UTF-8; a byte of a file name that is none stands there as `\\udcNN`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_whole` for JSON: indented, keys in the order given, non-ASCII as it is."""
    write_text(path, as_json(value, indent=2) + "\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON with non-ASCII as it is; a byte of a file name that is not UTF-8 is escaped, and comes back by `json.loads`.

    Python keeps such a byte as half of a surrogate pair, which UTF-8 has no place for.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _HALVES.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


@contextlib.contextmanager
def in_unicode(path: Path) -> Iterator[str]:
    """A file by a name that is Unicode, for libraries that take no other; by its number where its own is not.

    Raises:
        OSError: there is no such file.
    """
    name = str(path)
    if not _HALVES.search(name):
        yield name
        return
    with path.open("rb") as handle:
        yield f"/dev/fd/{handle.fileno()}"


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or is nested thousands of levels deep.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_text(path: Path, errors: str = "strict") -> str:
    """UTF-8, also behind the byte order mark that spreadsheets and editors put first, or UTF-16; line ends as they are.

    Args:
        errors: "surrogateescape" where it holds names of files.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", errors)


def lines_of(text: str) -> list[str]:
    """Lines without their ends, \\n or \\r\\n: a path may hold any other character that Unicode counts as an end."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def reserve(path: Path, size: int, head: int) -> None:
    """Write a file of `size` bytes, all but the first `head` of them a hole: where even that fails, the disk is full.

    Raises:
        OSError: it is.
    """
    with path.open("wb") as handle:
        handle.write(bytes(head))
        handle.truncate(size)
        os.fsync(handle.fileno())


def _dump(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
