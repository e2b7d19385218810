"""Files that are whole or not there: temporary name, fsync, rename."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PART = ".part"
PROBE = 2**20


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place; nothing half-written is ever read.

    Raises:
        OSError: it cannot be written, also where a library behind `write` has other words for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
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
    """`write_whole` for text, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_whole` for JSON: indented, keys in the order given, non-ASCII as it is."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or is nested thousands of levels deep.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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
