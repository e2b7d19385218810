"""What a study of the chain found: means over the repetitions, gains over the first row, and which are beyond noise.

Repetitions share seed, images and splits, so that gains are paired. The 95 % intervals are Student's over repetitions
(not over test images); a gain is marked where the paired t-test passes Holm's correction for all gains of its table.
"""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer import files, tables
from ktransfer.errors import UsageError
from ktransfer.progress import say
from ktransfer.stages import settings

from . import claim
from .recipe import RANDOM_ROW, SEED, Cell, Recipe, repeats, row_of

LEVEL = 0.05
RANDOM = "random"
Values = dict[tuple[Any, ...], float]
"""Repetition -> per cent."""


class Table(NamedTuple):
    """One measure of one protocol: row -> column -> values."""

    protocol: str
    measure: str
    title: str
    rows: dict[str, dict[str, Values]]


def write(recipe: Recipe, run: Path, cells: Sequence[tuple[Cell, Path]]) -> Path:
    """Write `study.json`, `study.csv`, `study.md` and a plot for each protocol; the path of `study.md`.

    Args:
        cells: with the run folder in which each was evaluated.

    Raises:
        UsageError: the claim's measure or columns are not there; all else was written.
    """
    found = tables_of(recipe, cells)
    flat = [
        {
            "protocol": one.protocol,
            "measure": one.measure,
            "row": row,
            "column": column,
            "repetition": "/".join(map(str, key)),
            "value": round(value, 4),
        }
        for one in found
        for row, columns in one.rows.items()
        for column, values in columns.items()
        for key, value in values.items()
    ]
    held: dict[str, object] = {"schema": 1, "grid": recipe.grid, "arms": list(recipe.arms), "values": flat}
    parts = [*(in_markdown(one) for one in found), repeated_words(recipe)]
    cannot: UsageError | None = None
    if recipe.claim:
        try:
            judged = claim.judge(recipe.claim, _rows(recipe.claim, found))
            held["claim"] = claim.in_json(recipe.claim, judged)
            parts.append(claim.in_words(recipe.claim, judged))
        except UsageError as error:
            cannot = error
    files.write_json(run / "study.json", held)
    files.write_text(run / "study.csv", tables.to_csv(flat))
    text = "\n\n".join(parts) + "\n"
    files.write_text(run / "study.md", text)
    for one in found:
        files.write_text(run / f"{one.protocol}-{one.measure}.svg", plot(one))
    print(text)
    if cannot:
        raise UsageError(f"{cannot}; all else is written: mend the recipe and give the same command again") from cannot
    say(f"study: done; {len(cells)} cells; {run / 'study.md'}")
    return run / "study.md"


def _rows(wanted: claim.Claim, found: Sequence[Table]) -> claim.Rows:
    """The rows of the table that a claim is about."""
    known = {(one.protocol, one.measure): one.rows for one in found}
    place = (wanted.protocol or found[0].protocol, wanted.measure)
    if place not in known:
        listed = ", ".join(f"{protocol} {measure}" for protocol, measure in known)
        raise UsageError(f"[claim] no measure '{wanted.measure}' of protocol '{place[0]}'; there are {listed}")
    return known[place]


def tables_of(recipe: Recipe, cells: Sequence[tuple[Cell, Path]]) -> list[Table]:
    """The values of all protocols and measures."""
    found: dict[tuple[str, str], Table] = {}
    for cell, place in cells:
        given = dict(cell.step.calls)["eval"].get("protocol", settings("eval").protocol)
        for protocol in dict.fromkeys(part.strip() for part in given.split(",")):
            result = files.read_json(place / "eval" / f"{protocol}.json")
            for name, arm in result["arms"].items():
                row = row_of(recipe, cell) if name == place.name else RANDOM_ROW if name == RANDOM else name
                _take(found, protocol, result["measures"], row, arm["scores"], tuple(cell.repeated.values()))
    return list(found.values())


def _take(
    found: dict[tuple[str, str], Table],
    protocol: str,
    measures: dict[str, str],
    row: str,
    scores: dict[str, dict[str, Any]],
    repetition: tuple[Any, ...],
) -> None:
    for measure, title in measures.items():
        for column, cell in scores.items():
            if isinstance(cell.get(measure), int | float):
                table = found.setdefault((protocol, measure), Table(protocol, measure, title, {}))
                scale = 100 if "%" in title else 1
                table.rows.setdefault(row, {}).setdefault(column, {})[repetition] = scale * cell[measure]


def in_markdown(table: Table) -> str:
    """The means, and below them the gains over the first row."""
    first, *others = table.rows
    means = [
        (row, column, tables.plus_minus(*tables.mean(list(values.values()))))
        for row, columns in table.rows.items()
        for column, values in columns.items()
    ]
    lines = tables.markdown(*tables.crossed(f"{table.protocol}, {table.title}", means))
    gains = {(row, column): gain(table, row, first, column) for row in others for column in table.rows[row]}
    known = {place: one for place, one in gains.items() if one}
    if not known:
        return "\n".join(lines)
    sure = beyond({place: one[2] for place, one in known.items()})
    cells = [
        (row, column, tables.plus_minus(one[0], one[1], "+") + (" *" if (row, column) in sure else ""))
        for (row, column), one in known.items()
    ]
    return "\n".join([*lines, "", *tables.markdown(*tables.crossed(f"more than {first}", cells))])


def gain(table: Table, row: str, other: str, column: str) -> tuple[float, float | None, float] | None:
    """The mean of the paired differences, half of its interval, and the p-value of the paired t-test (1 for one pair).

    None where the rows share no repetition.
    """
    mine, theirs = table.rows[row].get(column, {}), table.rows[other].get(column, {})
    pairs = [mine[key] - theirs[key] for key in mine if key in theirs]
    if not pairs:
        return None
    value, half = tables.mean(pairs)
    if half is None:
        return value, None, 1.0
    if statistics.stdev(pairs) == 0:
        return value, half, 1.0 if value == 0 else 0.0
    from scipy.stats import ttest_1samp

    return value, half, float(ttest_1samp(pairs, 0.0).pvalue)


def beyond(chances: dict[Any, float]) -> set[Any]:
    """Those that pass Holm's correction at the level of 5 % for all of them."""
    passed: set[Any] = set()
    for place, (name, chance) in enumerate(sorted(chances.items(), key=lambda one: one[1])):
        if chance > LEVEL / (len(chances) - place):
            break
        passed.add(name)
    return passed


def repeated_words(recipe: Recipe) -> str:
    """What was repeated, for people."""
    axes = {axis: values for axis, values in recipe.grid.items() if repeats(axis)}
    if not axes:
        return "One repetition: no interval, and nothing is known of noise."
    whole = {axis: "the whole chain" if axis == SEED else f"{axis.partition('.')[0]} and what follows" for axis in axes}
    said = " and ".join(f"{len(values)} repetitions of {whole[axis]}" for axis, values in axes.items())
    return (
        f"Mean ± half of the 95 % interval over {said}. *: beyond noise (paired t-test, Holm's correction for all "
        "gains of a table, 5 %)."
    )


def plot(table: Table) -> str:
    """All rows as lines over the columns, with their intervals, as SVG; empty where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return ""
    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "ktransfer", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for row, columns in table.rows.items():
            found = [tables.mean(list(values.values())) for values in columns.values()]
            halves = [half or 0.0 for _, half in found]
            axes.errorbar(list(columns), [value for value, _ in found], halves, label=row, marker="o", capsize=3)
        axes.set_ylabel(f"{table.protocol}, {table.title}")
        axes.legend(fontsize="small")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
    return out.getvalue()
