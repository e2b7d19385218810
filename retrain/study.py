"""A study: self-training in every cell of a grid, cell by cell, and one table at the end.

The recipe is a TOML file (docs/selftraining.md has one): what `[grid]` lists is varied, `[selftrain]` holds for all
cells, `[names]` says what values are called in the tables. Each cell is a run of its own below `cells/`; its teacher
is the row's baseline, its student the self-training.
"""

import csv
import io
import itertools
import math
import re
import statistics
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer import files
from ktransfer.config import build
from ktransfer.errors import UsageError
from ktransfer.progress import say

from . import selftraining
from .config import SelftrainConfig

TABLES = ("selftrain", "grid", "names")
MEASURE = "AP"
METHODS = ("teacher", "student")
WORDS = {"teacher": "labelled pictures alone", "student": "with self-training"}
Cell = dict[str, Any]


class Recipe(NamedTuple):
    """What a recipe says: settings of all cells, the values of each axis, and names for values."""

    common: dict[str, Any]
    grid: dict[str, list[Any]]
    names: dict[str, str]


def study(recipe: str | Path, run: str | Path) -> Path:
    """Run every cell that is not done yet, then write `study.md`, `study.csv`, `study.json` and two plots.

    Args:
        recipe: a TOML file, as above.
        run: the folder of the study; killed and given again, it goes on.

    Returns:
        The path of `study.md`.

    Raises:
        UsageError: the recipe, or a cell of it, is wrong; nothing was begun.
        StageError: a cell failed; the cells before it are whole.
    """
    run = Path(run)
    plan = read(Path(recipe))
    wanted = cells(plan)
    plotted = [axis for axis in ("augment", "fraction") if len(plan.grid.get(axis, [])) > 1]
    if plotted:
        _matplotlib()
    for cell in wanted:
        selftraining.check(run / "cells" / slug(cell), plan.common | cell)
    scores: list[dict[str, Any]] = []
    for number, cell in enumerate(wanted, 1):
        say(f"\nstudy: cell {number} of {len(wanted)}: {slug(cell)}")
        path = selftraining.selftrain(run / "cells" / slug(cell), **plan.common, **cell)
        scores.append({"cell": cell, "scores": files.read_json(path)["scores"]})
    files.write_json(run / "study.json", {"schema": 1, "measure": MEASURE, "common": plan.common, "cells": scores})
    rows = table(plan, scores)
    files.write_text(run / "study.csv", to_csv(rows))
    text = to_markdown(plan, rows)
    files.write_text(run / "study.md", text)
    for axis in plotted:
        files.write_text(run / f"{axis}.svg", plot(plan, rows, axis))
    print(text)
    say(f"study: done; {len(wanted)} cells; {run / 'study.md'}")
    return run / "study.md"


def read(path: Path) -> Recipe:
    """A recipe.

    Raises:
        UsageError: no TOML, unknown tables or settings, an axis without values or with one twice, cells that would
            share a folder.
    """
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--recipe {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe {path}: not valid TOML: {error}") from error
    wrong = [name for name in held if name not in TABLES]
    if wrong or not all(isinstance(held.get(name, {}), dict) for name in TABLES):
        raise UsageError(
            f"--recipe {path}: '{(wrong or TABLES)[0]}' is no table of a study; it has {', '.join(TABLES)}"
        )
    grid, common = held.get("grid", {}), held.get("selftrain", {})
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise UsageError(f"--recipe {path}: [grid] needs a list of values for each setting that is varied")
    twice = [axis for axis in grid if axis in common]
    if twice:
        raise UsageError(f"--recipe {path}: '{twice[0]}' stands in [selftrain] and in [grid]; leave it in one")
    if "overwrite" in common | grid:
        raise UsageError(
            f"--recipe {path}: overwrite is no setting of a study; remove the folders of its cells instead"
        )
    for axis, values in grid.items():
        again = [value for place, value in enumerate(values) if value in values[:place]]
        if again:
            raise UsageError(f"--recipe {path}: {axis} lists {again[0]!r} twice; each value makes a cell of its own")
    named: dict[str, Cell] = {}
    for cell in cells(Recipe(common, grid, {})):
        build(SelftrainConfig, common | cell, f"--recipe {path}")
        if named.setdefault(slug(cell), cell) is not cell:
            raise UsageError(
                f"--recipe {path}: two cells would be made in cells/{slug(cell)}; rename a file that differs"
            )
    return Recipe(common, grid, {str(key): str(name) for key, name in held.get("names", {}).items()})


def cells(recipe: Recipe) -> list[Cell]:
    """All combinations, the last axis fastest."""
    return [dict(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]


def slug(cell: Cell) -> str:
    """The name of a cell's folder."""
    parts = [f"{axis}-{re.sub(r'[^A-Za-z0-9.]+', '-', str(value)).strip('-')}" for axis, value in cell.items()]
    return "_".join(parts)


def table(recipe: Recipe, scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each combination but for the seed: AP of teacher and student and the gain, with intervals.

    `METHOD` is the mean over the seeds in per cent, `METHOD_half` half of its 95 % interval (Student's t over the
    seeds; None for one seed), `gain` and `gain_half` those of the differences seed by seed.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    axes = [axis for axis in recipe.grid if axis != "seed"]
    for one in scores:
        groups.setdefault(tuple(one["cell"][axis] for axis in axes), []).append(one["scores"])
    lines: list[dict[str, Any]] = []
    for key, found in groups.items():
        line: dict[str, Any] = dict(zip(axes, key, strict=True))
        values = {method: [100 * one[method][MEASURE] for one in found] for method in METHODS}
        values["gain"] = [after - before for before, after in zip(*values.values(), strict=True)]
        for name, numbers in values.items():
            line |= {name: statistics.fmean(numbers), f"{name}_half": half_interval(numbers)}
        lines.append(line | {"seeds": len(found)})
    return lines


def half_interval(numbers: list[float]) -> float | None:
    """Half of the 95 % interval of a mean by Student's t; None for one number."""
    if len(numbers) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / math.sqrt(len(numbers))


def to_csv(rows: list[dict[str, Any]]) -> str:
    """The table for programs; AP in per cent."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(recipe: Recipe, rows: list[dict[str, Any]]) -> str:
    """Tables like 2 and 3 of Zoph et al.: a column for each fraction (or augmentation), gains beside the students."""
    across = next(
        (axis for axis in ("fraction", "augment", *recipe.grid) if len(recipe.grid.get(axis, [])) > 1), "seed"
    )
    if across == "seed":
        across = next(iter(axis for axis in recipe.grid if axis != "seed"), "seed")
    down = [axis for axis in recipe.grid if axis not in (across, "seed")]
    columns = recipe.grid[across] if across != "seed" else [None]
    lines = [
        f"| {MEASURE} % | " + " | ".join(_words(recipe, across, value) for value in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for key in dict.fromkeys(tuple(row[axis] for axis in down) for row in rows):
        own = [row for row in rows if tuple(row[axis] for axis in down) == key]
        title = ", ".join(_words(recipe, axis, value) for axis, value in zip(down, key, strict=True))
        for method in METHODS:
            cells_of = [_cell(row, method) for row in own]
            lines.append(f"| {', '.join(part for part in (title, WORDS[method]) if part)} | {' | '.join(cells_of)} |")
    seeds = rows[0]["seeds"]
    spread = (
        "± is half of the 95 % interval of the mean over them; in brackets the gain over the row above, seed by seed."
    )
    lines += [
        "",
        f"{seeds} seeds; {spread}" if seeds > 1 else "One seed: no intervals.",
        "",
        "For orientation, Zoph et al. (COCO, EfficientNet-B7, RetinaNet of 640 pixels):",
        "",
        *published(),
    ]
    return "\n".join(lines) + "\n"


def published() -> list[str]:
    """Tables 2 and 3 of the paper as Markdown."""
    text = resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    held = list(csv.DictReader(text.splitlines()))
    lines: list[str] = []
    for number in dict.fromkeys(row["table"] for row in held):
        own = [row for row in held if row["table"] == number]
        columns = list(dict.fromkeys(row["column"] for row in own))
        lines += [f"| Table {number}, AP % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name in dict.fromkeys(row["row"] for row in own):
            lines.append(f"| {name} | " + " | ".join(row["ap"] for row in own if row["row"] == name) + " |")
        lines.append("")
    return lines[:-1]


def plot(recipe: Recipe, rows: list[dict[str, Any]], axis: str) -> str:
    """AP over one axis as SVG: a line for each method and each combination of the others.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure, axes = _matplotlib()(figsize=(6, 4))
    others = [name for name in recipe.grid if name not in (axis, "seed")]
    for key in dict.fromkeys(tuple(row[name] for name in others) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in others) == key]
        title = ", ".join(_words(recipe, name, value) for name, value in zip(others, key, strict=True))
        for method, style in zip(METHODS, ("--", "-"), strict=True):
            axes.errorbar(
                [_words(recipe, axis, row[axis]) for row in own],
                [row[method] for row in own],
                [row[f"{method}_half"] or 0.0 for row in own],
                linestyle=style,
                marker="o",
                capsize=3,
                label=", ".join(part for part in (title, WORDS[method]) if part),
            )
    axes.set_xlabel({"augment": "augmentation", "fraction": "labelled share"}.get(axis, axis))
    axes.set_ylabel(f"{MEASURE} %")
    axes.legend(fontsize=7)
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _matplotlib() -> Callable[..., Any]:
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


def _words(recipe: Recipe, axis: str, value: Any) -> str:
    if value is None:
        return "mean"
    if str(value) in recipe.names:
        return recipe.names[str(value)]
    if axis == "fraction":
        return f"{100 * value:g} %"
    return f"init {value}" if axis == "init" else str(value) if axis == "augment" else f"{axis} {value}"


def _cell(row: dict[str, Any], method: str) -> str:
    half = row[f"{method}_half"]
    text = f"{row[method]:.1f}" + (f" ± {half:.1f}" if half is not None else "")
    if method == "student":
        spread = row["gain_half"]
        text += f" ({row['gain']:+.1f}" + (f" ± {spread:.1f})" if spread is not None else ")")
    return text
