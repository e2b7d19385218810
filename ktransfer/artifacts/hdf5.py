"""HDF5 files: opened without locks, and what it means where one cannot be opened.

Files of ours get their name when they are whole, and the run folder has a lock of its own. HDF5's would only keep sound
files from being read: where another process holds them, or a file system has no locks.
"""

from pathlib import Path
from typing import Any, NoReturn

from ktransfer.errors import Unreadable, UsageError, refuse_machine

ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError)
"""What h5py raises for files that are damaged, or something else."""
_WRITING = "already open for write"


def opened(path: Path, mode: str = "r") -> Any:
    """An h5py.File, as a context.

    Raises:
        ERRORS: it cannot be opened; `refuse` says why.
    """
    import h5py

    return h5py.File(path, mode, locking=False)


def refuse(path: Path, error: BaseException, way_out: str) -> NoReturn:
    """Say why a file could not be read.

    Args:
        way_out: what to do where it is no whole HDF5 file.

    Raises:
        UsageError: one line; `Unreadable` where the file may be sound.
    """
    refuse_unreadable(path, error)
    raise UsageError(f"{path}: not a whole HDF5 file ({_one_line(error)}); {way_out}") from error


def refuse_unreadable(path: Path, error: BaseException) -> None:
    """Raise `Unreadable` where a file could not be read, and may be sound."""
    refuse_machine(path, error)
    if _WRITING in _one_line(error):
        raise Unreadable(
            f"{path}: another program has it open for writing, or ended while it had; close that one, or give "
            f"h5clear -s {path}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
