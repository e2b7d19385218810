"""A claim that a study decides: what it compares and what is expected, written down before the study runs.

    [claim]
    text = "Clusters of a deeper teacher teach more"
    source = "Noroozi et al. 2018, Table 1"          # optional, as is published: what was found there
    expect = "more"                                  # more or less than nothing, or "same": within the bound
    bound = 1.5                                      # a difference below it does not matter, in the measure's unit
    protocol = "linear"                              # of a study of the chain
    measure = "top1"
    columns = ["conv3", "conv4", "conv5"]            # their mean decides; all of them when not given

    [[claim.contrasts]]                              # rows of the study's tables with their weights
    vgg = 1
    alexnet = -1

A contrast is the weighted sum of its rows in one repetition, averaged over the columns: rows that share seed and images
are compared in pairs. Its interval is Student's over the repetitions, at 95 % for all contrasts together (Bonferroni).

`more` holds where the interval lies above 0. It is refuted where the interval lies below 0, or below the bound. `same`
holds where the interval lies within the bound on both sides, and is refuted where it lies outside. Of several contrasts
each must hold, and one that is refuted refutes the claim. All else is undecided, and the number of repetitions is given
that would decide if mean and spread stayed as they are.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from ktransfer import tables
from ktransfer.config import build, option
from ktransfer.errors import UsageError

MORE, LESS, SAME = "more", "less", "same"
HOLDS, REFUTED, UNDECIDED = "holds", "refuted", "undecided"
MOST_REPETITIONS = 1000
Rows = Mapping[str, Mapping[str, Mapping[tuple[object, ...], float]]]
"""Row -> column -> repetition -> value."""


@dataclass(frozen=True)
class Claim:
    """The table `[claim]` of a recipe, as the module says."""

    text: str = option("", "The claim, in a sentence.")
    expect: str = option(MORE, "What the contrasts are expected to be.", choices=(MORE, LESS, SAME))
    bound: float = option(1.0, "A difference below it does not matter.", low=0.01)
    measure: str = option("", "The measure that decides.")
    protocol: str = option("", "The protocol whose measure it is; the first one when not given.")
    source: str = option("", "Who claims it.")
    published: str = option("", "What they found.")
    contrasts: list[dict[str, float]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)


class Found(NamedTuple):
    """One contrast: mean and interval, the number of repetitions, the verdict, and the repetitions that would decide.

    Without an interval (one repetition) `low` and `high` are None; `needed` is None where the contrast is decided, or
    more than MOST_REPETITIONS would be needed.
    """

    mean: float
    low: float | None
    high: float | None
    repetitions: int
    verdict: str
    needed: int | None


def read(held: object, where: str) -> Claim:
    """A claim from its table.

    Raises:
        UsageError: settings that a claim does not have or lacks, values out of range, no contrast, or one without
            weights.
    """
    if not isinstance(held, dict):
        raise UsageError(f"{where}: [claim] must be a table")
    if lacking := [name for name in ("text", "expect", "bound", "contrasts", "measure") if name not in held]:
        raise UsageError(f"{where}: [claim] lacks '{lacking[0]}'; docs/how-to/run-a-study.md has an example")
    listed = held["contrasts"]
    if not isinstance(listed, list) or not listed or not all(_is_contrast(one) for one in listed):
        said = "must list tables of rows and weights, such as [{ deep = 1, shallow = -1 }]"
        raise UsageError(f"{where}: [claim] contrasts {said}")
    columns = held.get("columns", [])
    if not isinstance(columns, list) or not all(isinstance(one, str) for one in columns):
        raise UsageError(f'{where}: [claim] columns must be a list of names, such as ["conv5"]')
    plain = {name: value for name, value in held.items() if name not in ("contrasts", "columns")}
    return replace(build(Claim, plain, f"{where}: [claim]"), contrasts=listed, columns=columns)


def _is_contrast(held: object) -> bool:
    return isinstance(held, dict) and bool(held) and all(type(weight) in (int, float) for weight in held.values())


def refuse_unknown_rows(claim: Claim, rows: list[str], where: str) -> None:
    """UsageError where a contrast names a row that the study's tables will not have."""
    for contrast in claim.contrasts:
        if unknown := [row for row in contrast if row not in rows]:
            raise UsageError(f"{where}: [claim] has no row '{unknown[0]}'; the rows are {', '.join(rows)}")


def judge(claim: Claim, rows: Rows) -> list[Found]:
    """Each contrast of a claim.

    Raises:
        UsageError: a row or a column is not there, or the rows of a contrast share no repetition.
    """
    return [_judged(claim, _values(claim, contrast, rows)) for contrast in claim.contrasts]


def verdict(found: list[Found]) -> str:
    """That of the whole claim."""
    several = [one.verdict for one in found]
    return REFUTED if REFUTED in several else UNDECIDED if UNDECIDED in several else HOLDS


def _values(claim: Claim, contrast: Mapping[str, float], rows: Rows) -> list[float]:
    """The contrast in each repetition that all its rows have."""
    if missing := [row for row in contrast if row not in rows]:
        raise UsageError(f"[claim] has no row '{missing[0]}'; the rows are {', '.join(rows)}")
    columns = claim.columns or list(rows[next(iter(contrast))])
    for row in contrast:
        if lacking := [column for column in columns if column not in rows[row]]:
            raise UsageError(f"[claim] the row '{row}' has no column '{lacking[0]}'; it has {', '.join(rows[row])}")
    cells = [(weight, rows[row][column]) for row, weight in contrast.items() for column in columns]
    shared = [key for key in cells[0][1] if all(key in values for _, values in cells)]
    if not shared:
        raise UsageError(f"[claim] the rows {', '.join(contrast)} share no repetition; give all of them the same seeds")
    return [math.fsum(weight * values[key] for weight, values in cells) / len(columns) for key in shared]


def _judged(claim: Claim, values: list[float]) -> Found:
    level = 1 - 0.05 / len(claim.contrasts)
    value, half = tables.mean(values, level)
    if half is None:
        return Found(value, None, None, 1, UNDECIDED, None)
    found = _verdict(claim, value, half)
    needed = None
    if found == UNDECIDED:
        spread = statistics.stdev(values)
        counts = range(len(values) + 1, MOST_REPETITIONS + 1)
        halves = ((count, tables.half_interval(spread, count, level)) for count in counts)
        needed = next((count for count, narrower in halves if _verdict(claim, value, narrower) != UNDECIDED), None)
    return Found(value, value - half, value + half, len(values), found, needed)


def _verdict(claim: Claim, value: float, half: float) -> str:
    if claim.expect == SAME:
        if abs(value) + half <= claim.bound:
            return HOLDS
        return REFUTED if abs(value) - half > claim.bound else UNDECIDED
    signed = value if claim.expect == MORE else -value
    if signed - half > 0:
        return HOLDS
    return REFUTED if signed + half < claim.bound else UNDECIDED


def in_json(claim: Claim, found: list[Found]) -> dict[str, object]:
    """What `study.json` holds of it."""
    return {"verdict": verdict(found), **asdict(claim), "found": [one._asdict() for one in found]}


def in_words(claim: Claim, found: list[Found]) -> str:
    """A paragraph of Markdown: the claim, its verdict, and each contrast with its interval."""
    where = f"{claim.measure}{', ' + ', '.join(claim.columns) if claim.columns else ''}"
    lines = [f"**{claim.text}: {verdict(found)}** (expected: {claim.expect}, bound {claim.bound:g}; {where})."]
    lines += [
        f"{contrast_in_words(contrast)}: {found_in_words(one)}."
        for contrast, one in zip(claim.contrasts, found, strict=True)
    ]
    if claim.source:
        lines.append(f"Claimed by {claim.source}{': ' + claim.published if claim.published else ''}.")
    return " ".join(lines)


def contrast_in_words(contrast: Mapping[str, float]) -> str:
    """A weighted sum of rows, such as "deep - shallow"."""
    words = ""
    for row, weight in contrast.items():
        sign = ("-" if weight < 0 else "+") if words else ("-" if weight < 0 else "")
        size = "" if abs(weight) == 1 else f"{abs(weight):g} "
        words += f"{' ' if words else ''}{sign}{' ' if sign else ''}{size}{row}"
    return words


def found_in_words(one: Found) -> str:
    """Mean, interval and what would decide."""
    if one.low is None:
        return f"{one.mean:+.1f}, one repetition"
    said = f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}] over {one.repetitions}, {one.verdict}"
    if one.verdict != UNDECIDED:
        return said
    return f"{said}; {'about ' + str(one.needed) if one.needed else 'more than ' + str(MOST_REPETITIONS)} would decide"
