"""Whether there is anything to learn from or to judge by: found out before the work, by reading a few images.

Of sound data as many images are read as are needed, of broken ones all that are tried before these are found.
"""

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.data.dataset import COMPARED, Dataset
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.machine import cores

TRAIN, TEST = "training images", "test images"
LEARNED = 2  # images that batch norm needs, and that `readable` leaves

Rows = Iterable[int] | NDArray[np.integer[Any]]


class Found(NamedTuple):
    """What `look` finds: how many of `tried` images will do, and why one of the others will not."""

    enough: int
    tried: int
    reason: str


def look(data: Dataset, rows: Rows, least: int, use: Callable[[int], bool]) -> Found:
    """Try images one after the other until `least` of them will do.

    Args:
        rows: the images that may be tried, in this order.
        use: row -> whether it will do; may raise `BrokenImage`.
    """

    def tried(row: int) -> tuple[bool, str]:
        try:
            return use(row), ""
        except BrokenImage as error:
            return False, f"{data.keys[row]}: {error}"

    left, enough, count, reason = iter(map(int, rows)), 0, 0, ""
    with ThreadPoolExecutor(cores()) as pool:
        while enough < least and (some := list(islice(left, least - enough))):
            for good, why in pool.map(tried, some):
                enough, count, reason = enough + good, count + 1, reason or why
    return Found(enough, count, reason)


def need(data: Dataset, rows: Rows, least: int, what: str) -> None:
    """Refuse where fewer than `least` of the images `rows` can be read.

    Args:
        what: which images these are, such as "test images".

    Raises:
        UsageError: one line.
    """
    refuse(data, look(data, rows, least, reading(data)), least, what)


def need_kinds(data: Dataset, rows: Rows, kinds: Callable[[int], Hashable], what: str) -> None:
    """Refuse where the images `rows` that can be read are all of one kind, the label.

    Raises:
        UsageError: one line.
    """
    seen: dict[Hashable, None] = {}
    read = reading(data)

    def another(row: int) -> bool:
        kind = kinds(row)
        if kind in seen or not read(row):
            return False
        seen[kind] = None
        return True

    found = look(data, rows, 1, another)  # one at a time, as the second depends on the first
    if found.enough:
        left = [row for row in map(int, rows) if kinds(row) not in seen]
        found = look(data, left, 1, another)
        if not found.enough:
            why = f" ({found.reason})" if found.reason else ""
            raise UsageError(
                f"{data.spec}: its {what} that can be read all have one label{why}; give images of at least two"
            )
    refuse(data, found, 1, what)


def refuse(data: Dataset, found: Found, least: int, what: str, will: str = "can be read") -> None:
    """UsageError where `found` is less than the `least` that is needed.

    Args:
        what: which images these are. will: what those do that are enough.
    """
    if found.enough >= least:
        return
    why = f" ({found.reason})" if found.reason else ""
    if found.enough:
        there = f"only {found.enough} of its {found.tried} {what} {will}, and {least} are needed"
    else:
        there = f"none of its {found.tried} {what} {will}" if found.tried else f"has no {what}"
    raise UsageError(f"{data.spec}: {there}{why}; repair them or give others")


def reading(data: Dataset) -> Callable[[int], bool]:
    """What reads an image small, for `look`."""

    def read(row: int) -> bool:
        data.read(row, COMPARED)
        return True

    return read
