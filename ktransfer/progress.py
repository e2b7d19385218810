"""Progress bars and lines on stderr, of the first process where there are several; stdout is for results."""

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

from tqdm import tqdm

from ktransfer import distributed

T = TypeVar("T")


def bar(total: int, label: str, unit: str = "images", done: int = 0) -> "tqdm[Any]":
    """A bar with ETA and rate that shows itself after half a second; `done` of `total` were done before (a resume)."""
    look = {"unit": f" {unit}", "delay": 0.5, "dynamic_ncols": True, "smoothing": 0.1}
    return tqdm(total=total, initial=done, desc=label, disable=not distributed.is_leader(), **look)


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
    if distributed.is_leader():
        tqdm.write(line, file=sys.stderr)
