"""What was passed over while images were read: one line in the end, however many images there are.

Pillow warns in words of its own, without the name of the file, and where warnings are errors it loses the image. So
what it says while an image of ours is read is kept for that line. What other threads read is left alone.
"""

import atexit
import re
import sys
import threading
import types
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ktransfer.progress import say

_SHOWN = 3
_found: dict[str, set[str]] = {}
_lock = threading.Lock()


class _Ear(threading.local):
    heard: list[str] | None = None


_ear = _Ear()


class _Warnings(types.ModuleType):
    """Stands for `warnings` in the modules of Pillow."""

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    @staticmethod
    def warn(message: Any, category: Any = None, stacklevel: int = 1, *more: Any, **named: Any) -> None:
        """As `warnings.warn`, but for the line in the end while a thread listens; what will be gone is said anyway."""
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if _ear.heard is None or issubclass(kind, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            warnings.warn(message, category, stacklevel + 1, *more, **named)
        else:
            _ear.heard.append(str(message))


def hear_pillow() -> None:
    """From now on, hear what the modules of Pillow that are loaded would warn of."""
    for name, module in list(sys.modules.items()):
        if name.startswith("PIL.") and getattr(module, "warnings", None) is warnings:
            module.warnings = _Warnings("warnings")  # type: ignore[attr-defined]


@contextmanager
def listening() -> Iterator[list[str]]:
    """What Pillow warns of in this thread meanwhile, and whatever else is to be said of an image."""
    outer, heard = _ear.heard, list[str]()
    _ear.heard = heard
    try:
        yield heard
    finally:
        _ear.heard = outer


def remark(what: str) -> None:
    """Say something of the image that this thread reads."""
    if _ear.heard is not None:
        _ear.heard.append(what)


def note(name: str, what: Iterable[str]) -> None:
    """Keep what was passed over in an image; each counts once, however often it is read."""
    if not _found:
        atexit.register(say_tolerated)  # in a script of one's own, the end may be that of the script
    for text in what:
        kind = re.sub(r"\d[\d,]*", "N", text.split(".")[0]).strip()
        with _lock:
            _found.setdefault(kind, set()).add(name)


def taken() -> dict[str, set[str]]:
    """Everything that was kept, kind by kind with the names; from now on, nothing is."""
    with _lock:
        found = dict(_found)
        _found.clear()
    return found


def say_tolerated() -> None:
    """One line for what was passed over since the last one, nothing where there was nothing."""
    atexit.unregister(say_tolerated)
    found = taken()
    if not found:
        return
    names = sorted(set().union(*found.values()))
    kinds = sorted(found, key=lambda kind: (-len(found[kind]), kind))
    more = f"; {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
    shown = "; ".join(f"{kind}: {len(found[kind]):,}" for kind in kinds[:_SHOWN])
    images = "1 image was" if len(names) == 1 else f"{len(names):,} images were"
    examples = ", ".join(_printable(name) for name in names[:_SHOWN])
    say(f"{images} read in spite of flaws of the file ({shown}{more}), such as {examples}")


def _printable(name: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)
