"""The errors that end a command. Every message is one line: what was given, which rule it breaks, the way out.

What the machine refuses (a full disk, a file that another process holds, ...) has a way out of its own for each reason
that it gives, and says nothing of what is in a file: `refuse_machine` comes before any advice to make one again.
"""

import errno
import os
import re


class KTransferError(Exception):
    """Base of all errors that are meant for people; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(KTransferError):
    """What was asked for cannot be done (exit code 2); found before the work wherever that is possible."""

    exit_code = 2


class Unreadable(UsageError):
    """A file cannot be read now, for a reason that says nothing of what is in it."""


class StageError(KTransferError):
    """A stage failed while it ran (exit code 1): what earlier stages wrote stays whole."""


class Reply(KTransferError):
    """No error: what was asked for is the message, which goes to stdout, and nothing else is done (exit code 0)."""

    exit_code = 0


class Stopped(KTransferError):
    """Ctrl-C between two steps: the run can go on, and the message says how."""

    exit_code = 130


class BrokenImage(KTransferError):
    """One image cannot be read; the message is the reason that is recorded for it."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HELD = "another process holds it; wait until that one is done, or end it"
_NETWORK = "its network disk does not answer: check the connection"
_PLACE = "check the path"
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "your quota is used up: remove files of yours, or ask for more",
    errno.EFBIG: "a file may not grow as large there: raise the limit (ulimit -f), or choose another disk",
    errno.EROFS: "that file system cannot be written: choose another place, or mount it for writing",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "its owner or the system forbids it: choose another place",
    errno.EMFILE: "this process may not open more files: raise the limit (ulimit -n), or give fewer --workers",
    errno.ENFILE: "the machine has no room for another open file: end other programs",
    errno.ENOMEM: "end other programs, or give fewer --workers",
    errno.ESTALE: "the server of its network disk has dropped it: mount it again if it stays so",
    errno.EIO: "the disk failed: look at the system's log, and copy what is on it to another one",
    errno.EAGAIN: _HELD,
    errno.EBUSY: _HELD,
    errno.EDEADLK: _HELD,
    errno.ETXTBSY: _HELD,
    errno.ENOLCK: "its file system gives no locks: give the same command with HDF5_USE_FILE_LOCKING=FALSE",
    errno.ENOSYS: "its file system cannot do that: choose another place",
    errno.EOPNOTSUPP: "its file system cannot do that: choose another place",
    errno.ETIMEDOUT: _NETWORK,
    errno.ENOTCONN: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.EREMOTEIO: _NETWORK,
    errno.ENOENT: _PLACE,
    errno.ENOTDIR: "one of its folders is a file: check the path",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its links lead in a circle: correct them",
}
_OF_THE_NAME = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_NUMBER = re.compile(r"(?:os error |errno = |Errno )(\d+)")


def number_of(error: BaseException) -> int | None:
    """The number by which the system says why something failed, also where a library passes it on as text."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None


def why(error: BaseException) -> str:
    """What failed, in the system's words or those of a library, on one line."""
    number = number_of(error)
    said = getattr(error, "strerror", None) if number is None else os.strerror(number)
    return " ".join(str(said or error).split()) or type(error).__name__


def remedy(error: BaseException, otherwise: str) -> str:
    """The way out, by the system's reason; `otherwise` where it gives none."""
    return REMEDIES.get(number_of(error) or 0, otherwise)


def refuse_machine(path: object, error: BaseException) -> None:
    """Raise `Unreadable` where the machine is the reason that a file could not be read, and not what is in it.

    What is not there, or a folder, is for the caller to explain.
    """
    if (number := number_of(error)) in REMEDIES and number not in _OF_THE_NAME:
        raise Unreadable(f"{path}: cannot be read ({why(error)}); {remedy(error, '')}") from error
