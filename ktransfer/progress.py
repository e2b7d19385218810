"""Progress bars and lines on stderr, of the first process where there are several; stdout is for results.

What a bar shows is also kept in a file of the run while a line of stages works in it (`kept_in`), for `ktransfer
status`.
"""

import contextlib
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from tqdm import tqdm

from ktransfer import distributed, files
from ktransfer.machine import CLOSED, Lasting, stderr

T = TypeVar("T")

EVERY = 5.0  # seconds between two states of a bar in the file, and between two lines of one in JSON
_json = False
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_file: Path | None = None
_line: list[str] = []


class State(TypedDict):
    """What is known of a line of stages that works: its stages, the bar that moved last, and when (Unix time)."""

    line: list[str]
    label: str
    done: int
    total: int
    unit: str
    per_second: float
    time: float


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's, which also tells the file and, with `--log-format json`, writes lines instead of itself."""

    told = 0.0

    def update(self, n: float = 1) -> bool:
        """As tqdm's."""
        shown = bool(super().update(n))
        if not self.disable and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            _tell(self)
        return shown

    def display(self, *given: Any, **more: Any) -> bool:
        """As tqdm's; nothing with `--log-format json`."""
        return True if _json else bool(super().display(*given, **more))


def bar(total: int, label: str, unit: str = "images", done: int = 0) -> Bar:
    """A bar with ETA and rate that shows itself after half a second; `done` of `total` were done before (a resume)."""
    look: dict[str, Any] = {"unit": f" {unit}", "delay": 0.5, "dynamic_ncols": True, "smoothing": 0.1}
    look["file"] = io.StringIO() if _json else stderr()
    return Bar(total=total, initial=done, desc=label, disable=_quiet.get() or not distributed.is_leader(), **look)


def track(items: Iterable[T], total: int, label: str, unit: str = "images") -> Iterator[T]:
    """Iterate with a bar."""
    with bar(total, label, unit) as shown:
        for item in items:
            yield item
            shown.update()


@cache
def say_once(line: str) -> None:
    """`say`, but only the first time in this process."""
    say(line)


def say(line: str) -> None:
    """One line for people, above any bar."""
    if distributed.is_leader() and not _quiet.get():
        _print(in_json(message=line)) if _json else tqdm.write(line, file=stderr())


def show(text: str) -> None:
    """A result, on stdout; it stands in a file too, so that nothing is lost where nobody reads it."""
    print(text, file=Lasting(sys.stdout, CLOSED), flush=True)


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Within, this thread shows no bars and says nothing, where that is wanted."""
    before = _quiet.set(wanted or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(before)


def speak_json(wanted: bool) -> None:
    """From now on, lines and bars are JSON objects, one a line, or are for people again."""
    global _json
    _json = wanted


def in_json(**values: Any) -> str:
    """One line of `--log-format json`; `time` is Unix time."""
    return files.as_json({"time": round(time.time(), 3)} | values)


def speaks_json() -> bool:
    """Whether lines are JSON objects."""
    return _json


@contextlib.contextmanager
def kept_in(file: Path, line: Sequence[str]) -> Iterator[None]:
    """Keep the state of the bars in a file while these stages work; it is gone afterwards."""
    global _file, _line
    _file, _line = file, list(line)
    try:
        yield
    finally:
        _file = None
        file.unlink(missing_ok=True)


def _print(line: str) -> None:
    print(line, file=stderr(), flush=True)


def _tell(shown: Bar) -> None:
    known = shown.format_dict
    rate = float(known["rate"] or (known["n"] - known["initial"]) / max(known["elapsed"], 1e-3))
    total = int(shown.total or 0)
    about = {"label": shown.desc.rstrip(": "), "done": int(shown.n), "total": total, "unit": shown.unit.strip()}
    if _json:
        _print(in_json(**about, per_second=round(rate, 2)))
    if _file is not None:
        with contextlib.suppress(OSError):  # a full disk stops the work itself, with its own words
            files.write_json(_file, {"line": _line, **about, "per_second": rate, "time": time.time()})
