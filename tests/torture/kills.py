"""Commands killed at every write, rename, fsync or removal, and at any instant; given again, they end the same."""

import json
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import Workplace, spread
from scenarios import SCENARIOS

COUNT, BEFORE, TORN, FULL, FAULT = range(5)  # of preload.c
# By turns, so that a campaign of minutes has some of each.
KINDS = (BEFORE, TORN, "instant", BEFORE, FULL, TORN, BEFORE, FAULT)
UNEXPECTED = ("Traceback", "unexpected ", "this is a bug")


class Find(NamedTuple):
    """Something that must not be."""

    scenario: str
    what: str


class Tally:
    """Counts by scenario and kind, and the finds."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.points: dict[str, int] = {}
        self.finds: list[Find] = []

    def add(self, scenario: str, kind: str) -> None:
        """One more."""
        self.counts[scenario][kind] += 1

    def find(self, scenario: str, what: str) -> None:
        """Something that must not be; it is printed at once."""
        self.finds.append(Find(scenario, what))
        print(f"find: {scenario}: {what}", flush=True)

    def save(self, path: Path) -> None:
        """As JSON."""
        held = {"counts": self.counts, "deeds": self.points, "finds": self.finds}
        path.write_text(json.dumps(held, indent=1))

    def kills(self, scenario: str) -> int:
        """How often it was killed."""
        return sum(self.counts[scenario][kind] for kind in ("before", "half-way", "instant"))


NAMES = {BEFORE: "before", TORN: "half-way", FULL: "full disk", FAULT: "EIO", "instant": "instant"}


def strike(place: Workplace, name: str, kind: Any, at: int, dice: random.Random, tally: Tally) -> None:
    """One command disturbed, given again, and compared."""
    argv = SCENARIOS[name].argv
    place.before(name)
    if kind == "instant":
        order: dict[str, Any] = {"after": dice.uniform(0, 1.2 * place.seconds[name])}
    else:
        order = {"strike": (kind, at)}
    end = place.run("tortured", argv, **order)
    what = f"{NAMES[kind]} {order.get('after') or at}"
    if end.status == -signal.SIGKILL:
        tally.add(name, NAMES[kind])
    elif end.status == 0:  # it did not come to that deed, or what failed was not needed
        tally.add(name, f"{NAMES[kind]}, finished")
    elif end.status in (1, 2) and kind in (FULL, FAULT):
        tally.add(name, NAMES[kind])
        for line in problems(end.said):
            tally.find(name, f"{what}: {line}")
    else:
        tally.find(name, f"{what}: ended with {end.status}: {end.said[-500:]}")
        return
    again = place.run("tortured", argv)
    if again.status:
        tally.find(name, f"{what}: given again, it ends with {again.status}: {again.said[-500:]}")
    elif wrong := place.differing(name):
        tally.find(name, f"{what}: given again, other bytes: {', '.join(wrong)}")


def problems(said: str) -> list[str]:
    """What is wrong with the last words of a command that failed: they must be one line of ours."""
    lines = [line for line in said.splitlines() if line.startswith("ktransfer: ")]
    found = [word for word in UNEXPECTED if word in said]
    if len(lines) != 1 or found:
        return [f"no clear line: {said[-500:]}"]
    return []


def torture(place: Workplace, until: float, tally: Tally, chosen: list[str], out: Path, least: int = 0) -> None:
    """Round after round, one strike for each scenario, until the time is up or every deed had its turn.

    Args:
        out: where the counts are kept.
        least: kills that each scenario gets even after that time.
    """
    dice = random.Random(1)
    left: dict[str, Iterator[tuple[int, int]]] = {name: iter(()) for name in chosen}
    begun = set[str]()
    while left:
        for name in list(left):
            if name not in begun:
                begun.add(name)
                try:
                    place.whole(name)
                except RuntimeError as error:
                    tally.find(name, str(error))
                    del left[name]
                    continue
                tally.points[name] = place.deeds[name]
                left[name] = iter([(at, turn) for turn, at in enumerate(spread(max(1, place.deeds[name])))])
            at, turn = next(left[name], (0, 0))
            if not at or (time.time() > until and tally.kills(name) >= least):
                del left[name]
                continue
            strike(place, name, KINDS[turn % len(KINDS)] if place.preloads else "instant", at, dice, tally)
            tally.save(out)
