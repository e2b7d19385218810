"""One process at a time, and one thread of it: by `flock`, or by a file with host and process where there is none.

Some file systems (Lustre, some kinds of NFS) have no `flock`. There a file beside the lock says who holds it; that of a
process of this machine which has ended is taken over, that of another machine has to be removed by hand.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OWNER = ".owner"
TRIES, PAUSE = 20, 0.05  # seconds
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class Busy(Exception):
    """Another process holds the lock; the message is the way out, `who` is known where there is no flock."""

    def __init__(self, way_out: str, who: str = "") -> None:
        super().__init__(way_out)
        self.who = who


def take(handle: int, path: Path) -> Callable[[], None]:
    """Lock the open file `handle` at `path`; what lets go of it, to be called after the handle is closed.

    Raises:
        Busy: another process holds it.
        OSError: neither a lock nor a file beside it can be made.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise Busy("wait for it") from error
        if error.errno not in _NO_FLOCK:
            raise
        return _by_file(path.with_name(path.name + OWNER))
    return lambda: None


def taken(path: Path) -> bool:
    """Whether a process holds the lock at `path`; False where that cannot be told."""
    if (text := _read(path.with_name(path.name + OWNER))) and not _ended(parsed(text)):
        return True
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN)
    return False


def holder() -> dict[str, Any]:
    """This process: its machine, since when that is up, its number, and when it began."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _read("/proc/sys/kernel/random/boot_id"), "pid": pid} | _began(pid)


def named(found: dict[str, Any]) -> str:
    """A holder in words."""
    return f"process {found['pid']} on {found['host']}" if {"pid", "host"} <= found.keys() else "another process"


def _by_file(owner: Path) -> Callable[[], None]:
    own = json.dumps(holder())
    tries = 0
    while not _created(owner, own):
        text = _read(owner)
        if not text and (tries := tries + 1) < TRIES:  # let go of between the two, or just being made
            time.sleep(PAUSE)
            continue
        found = parsed(text)
        if not _ended(found):
            raise Busy(f"wait for it, remove {owner} if that one has ended,", named(found))
        grave = owner.with_name(f"{owner.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            owner.replace(grave)
            if _read(grave) != text:  # and this is already its own
                with contextlib.suppress(FileExistsError):
                    os.link(grave, owner)
            grave.unlink()

    def release() -> None:
        if _read(owner) == own:
            owner.unlink(missing_ok=True)

    return release


def _created(owner: Path, text: str) -> bool:
    """Whether the file was not there, and is now, whole from its first moment."""
    part = owner.with_name(f"{owner.name}.{os.getpid()}-{threading.get_ident()}.part")
    part.write_text(text, encoding="utf-8")
    try:
        os.link(part, owner)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # No hard links either: the file is there before its text, for an instant.
        with contextlib.suppress(FileExistsError), owner.open("x", encoding="utf-8") as handle:
            handle.write(text)
            return True
        return False
    finally:
        part.unlink()
    return True


def parsed(text: str) -> dict[str, Any]:
    """A holder that was written as JSON; nothing of what is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _ended(found: dict[str, Any]) -> bool:
    """Whether a holder is known to have ended: a process of this machine that is not there any more."""
    pid = found.get("pid")
    if found.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    boot = _read("/proc/sys/kernel/random/boot_id")
    if boot and found.get("boot") and boot != found["boot"]:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    # Another process may have its number by now.
    return "began" in found and _began(pid).get("began") not in (None, found["began"])


def _began(pid: int) -> dict[str, str]:
    text = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return {"began": text[19]} if len(text) > 19 else {}


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
