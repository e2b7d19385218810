"""What a study found, as tables and plots shaped like those of the papers, which stand beside them.

Every row of a table has a baseline, as in Tables 2, 3, 4 and 7 of Zoph et al.: what a student or a joint training
reaches is compared with the labelled images alone in the same cell; and these, from other weights, with the same from
random ones.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer import tables
from ktransfer.errors import UsageError
from ktransfer.study.claim import Claim, Rows

FILE = Path(__file__).with_name("published.csv")

MEASURES = ("mask_AP", "mask_AP50", "AP", "AP50", "mIoU")
"""The measures that a study can show; its tables have the first one that all cells have."""
PUBLISHED = ("AP", "mask_AP")
"""Those beside which the published tables can stand."""
BASELINE = "teacher"
WORDS = {
    "teacher": "labelled images alone",
    "student": "with self-training",
    "joint": "with joint training",
    "both": "with both",
}
STYLES = {"teacher": "--", "student": "-", "joint": ":", "both": "-."}
LABELS = {"augment": "augmentation", "fraction": "labelled share"}
METHOD = "method"
HE, ZOPH = "He et al. 2019, Table 1", "Zoph et al. 2020, Table"
SHAPES = {
    "augment": (f"{ZOPH} 2",),
    "fraction": (f"{ZOPH} 3", "He et al. 2019, less data"),
    "epochs": (HE,),
    "samples": (HE,),
    METHOD: (f"{ZOPH} 7",),
    "": (f"{ZOPH} 4",),
}
"""What stands in the columns of a table -> the published tables of that shape; "" where all is in one column."""
Cell = dict[str, Any]


class Recipe(NamedTuple):
    """What a recipe says: settings of all cells, the values of each axis, names for values, and what is expected."""

    common: dict[str, Any]
    grid: dict[str, list[Any]]
    names: dict[str, str]
    claim: Claim | None = None


class Line(NamedTuple):
    """A method in a cell of the grid, without its seed, by one measure.

    Attributes:
        values: seed -> per cent.
    """

    cell: Cell
    method: str
    measure: str
    values: dict[Any, float]


def lines_of(recipe: Recipe, scores: list[dict[str, Any]]) -> list[Line]:
    """The lines of the cells that were evaluated, in the order of the grid.

    Args:
        scores: for each cell `cell` (the values of its axes) and `scores` (method -> measure -> share).
    """
    found: dict[tuple[Any, ...], Line] = {}
    for one in scores:
        cell = {axis: one["cell"][axis] for axis in recipe.grid if axis != "seed"}
        for method, measured in one["scores"].items():
            for measure in (name for name in MEASURES if name in measured):
                line = found.setdefault((*cell.values(), method, measure), Line(cell, method, measure, {}))
                line.values[one["cell"].get("seed")] = 100 * measured[measure]
    return list(found.values())


def rows_of(recipe: Recipe, lines: list[Line]) -> Rows:
    """The lines as rows that a claim can compare, such as "S1, with self-training", with their measures as columns."""
    rows: dict[str, dict[str, dict[tuple[object, ...], float]]] = {}
    for line in lines:
        name = row_name(recipe, line.cell, line.method)
        rows.setdefault(name, {})[line.measure] = {(seed,): value for seed, value in line.values.items()}
    return rows


def row_name(recipe: Recipe, cell: Cell, method: str) -> str:
    """What a method in a cell is called in a claim; the seed is no part of it."""
    apart = [words(recipe, axis, value) for axis, value in cell.items() if axis != "seed"]
    return ", ".join([*apart, WORDS[method]])


def measure_of(lines: list[Line]) -> str:
    """The first measure that every method has in every cell."""
    wanted = len({(*line.cell.values(), line.method) for line in lines})
    return next(name for name in MEASURES if sum(line.measure == name for line in lines) == wanted)


def gain(line: Line, other: Line | None) -> tuple[float, float | None] | None:
    """The mean of what a line has over another one, seed by seed, and half of its interval; None without another."""
    return None if other is None else tables.mean([value - other.values[seed] for seed, value in line.values.items()])


def baseline(line: Line, lines: list[Line]) -> Line | None:
    """Of a student or joint training the labelled images alone; of these the same from random weights."""
    if line.method != BASELINE:
        return _like(line, line.cell, lines)
    return from_random(line, lines)


def from_random(line: Line, lines: list[Line]) -> Line | None:
    """The labelled images alone, from random weights, in the same cell; None where that is the line itself, or where
    the study does not vary the weights."""
    other = _like(line, line.cell | {"init": "random"}, lines) if "init" in line.cell else None
    return None if other is line else other


def _like(line: Line, cell: Cell, lines: list[Line]) -> Line | None:
    wanted = (cell, BASELINE, line.measure)
    return next((other for other in lines if (other.cell, other.method, other.measure) == wanted), None)


def to_csv(lines: list[Line]) -> str:
    """A row for each line: mean, gain over its baseline and over random weights, each with half of its interval, all in
    per cent; empty where there is none."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        row: dict[str, Any] = {**line.cell, METHOD: line.method, "measure": line.measure}
        for name, found in (
            ("mean", tables.mean(list(line.values.values()))),
            ("gain", gain(line, baseline(line, lines))),
            ("over_random", gain(line, from_random(line, lines))),
        ):
            row |= dict(zip((name, f"{name}_half"), found or (None, None), strict=True))
        rows.append(row | {"seeds": len(line.values)})
    return tables.to_csv(rows)


def cells_csv(lines: list[Line]) -> str:
    """A row for each method, cell and seed, with all measures in per cent."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        for seed, value in line.values.items():
            own = {**line.cell, "seed": seed, METHOD: line.method}
            rows.setdefault(tuple(own.values()), own)[line.measure] = value
    return tables.to_csv(list(rows.values()))


def varied(recipe: Recipe) -> list[str]:
    """The axes that have a table and a plot of their own."""
    return [axis for axis in SHAPES if len(recipe.grid.get(axis, [])) > 1]


def to_markdown(recipe: Recipe, lines: list[Line]) -> str:
    """A table for each axis of `SHAPES` that is varied, with its values as columns, and the published ones beside."""
    measure = measure_of(lines)
    own = [line for line in lines if line.measure == measure]
    across = varied(recipe) or [""]
    if len({line.method for line in own}) > 2:
        across.append(METHOD)
    text: list[str] = []
    for axis in across:
        text += [*_table(recipe, own, axis), ""]
    seeds = len(own[0].values)
    spread = f"{seeds} seeds; ± is half of the 95 % interval of the mean over them" if seeds > 1 else "One seed"
    text.append(
        f"{spread}. In brackets the gain, seed by seed: of a training with unlabelled images over the labelled ones "
        "alone, of these over the same from random weights."
    )
    if measure not in PUBLISHED:
        return "\n".join(text) + "\n"
    text += ["", "For orientation, what others found for boxes on COCO with networks and schedules far larger:"]
    for source in dict.fromkeys(source for axis in across for source in SHAPES[axis]):
        text += ["", *published(source)]
    return "\n".join(text) + "\n"


def _table(recipe: Recipe, lines: list[Line], across: str) -> list[str]:
    """The lines of one table: the values of `across` are columns, all else makes rows."""

    def place(line: Line) -> tuple[str, str]:
        """The row and the column of a line, in words."""
        parts = {axis: words(recipe, axis, value) for axis, value in line.cell.items()}
        parts[METHOD] = WORDS[line.method]
        column = parts.pop(across, "mean")
        return ", ".join(parts.values()) or "all", column

    cells = [(*place(line), _cell(line, lines)) for line in lines]
    return tables.markdown(*tables.crossed(f"{lines[0].measure} %", cells))


def _cell(line: Line, lines: list[Line]) -> str:
    text = tables.plus_minus(*tables.mean(list(line.values.values())))
    found = gain(line, baseline(line, lines))
    return text if found is None else f"{text} ({tables.plus_minus(*found, sign='+')})"


def published(source: str) -> list[str]:
    """One of the tables in published.csv as Markdown.

    Args:
        source: paper and table, as `SHAPES` names them.
    """
    own = [row for row in tables.read_csv(FILE) if row["source"] == source]
    cells = [(row["row"], row["column"], row["ap"]) for row in own]
    return tables.markdown(*tables.crossed(f"{source} ({own[0]['made_with']}), AP %", cells))


def plot(recipe: Recipe, lines: list[Line], axis: str) -> str:
    """The first measure over one axis as SVG: a line for each method and each combination of the other axes.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure, axes = matplotlib()(figsize=(8, 4))
    measure = measure_of(lines)
    own = [line for line in lines if line.measure == measure]
    series: dict[tuple[str, str], list[Line]] = {}
    for line in own:
        title = ", ".join(words(recipe, name, value) for name, value in line.cell.items() if name != axis)
        series.setdefault((title, line.method), []).append(line)
    colours = {title: f"C{number}" for number, title in enumerate(dict.fromkeys(title for title, _ in series))}
    for (title, method), found in series.items():
        points = [tables.mean(list(line.values.values())) for line in found]
        axes.errorbar(
            [words(recipe, axis, line.cell[axis]) for line in found],
            [value for value, _ in points],
            [half or 0.0 for _, half in points],
            linestyle=STYLES[method],
            color=colours[title],
            marker="o",
            capsize=3,
            label=", ".join(part for part in (title, WORDS[method]) if part),
        )
    axes.set_xlabel(LABELS.get(axis, axis))
    axes.set_ylabel(f"{measure} %")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def matplotlib() -> Callable[..., Any]:
    """What makes a figure and its axes.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("study: matplotlib is not installed; pip install 'ktransfer[report]'") from error
    # The same bytes for the same numbers.
    matplotlib.rcParams["svg.hashsalt"] = "ktransfer"

    def subplots(figsize: tuple[float, float]) -> tuple[Any, Any]:
        figure = Figure(figsize=figsize)
        return figure, figure.subplots()

    return subplots


def words(recipe: Recipe, axis: str, value: Any) -> str:
    """What a value of an axis is called in tables and plots."""
    if str(value) in recipe.names:
        return recipe.names[str(value)]
    if axis == "fraction":
        return f"{100 * value:g} %"
    return f"init {value}" if axis == "init" else str(value) if axis == "augment" else f"{axis} {value}"
