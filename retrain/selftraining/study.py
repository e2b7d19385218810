"""A study: self-training in every cell of a grid, cell by cell, and one table at the end.

The recipe is a TOML file (docs/reference/self-training.md has one): what `[grid]` lists is varied, `[selftrain]` holds
for all cells, `[names]` says what values are called in the tables. Each cell is a run of its own below `cells/`.
"""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ktransfer import files
from ktransfer.config import build, read_toml
from ktransfer.errors import KTransferError, StageError, UsageError
from ktransfer.progress import say, show
from ktransfer.run import leaves_nothing, read_record
from ktransfer.study import claim

from ..config import SelftrainConfig
from . import parts, stage, steps, tables
from .tables import Cell, Recipe

TABLES = ("selftrain", "grid", "names", "claim")


def study(recipe: str | Path, run: str | Path) -> Path:
    """Run every cell that is not done yet, then write `study.md`, `study.csv`, `cells.csv`, `study.json` and plots.

    Args:
        recipe: a TOML file, as above.
        run: the folder of the study; killed and given again, it goes on; with more values in the recipe it makes what
            these add.

    Returns:
        The path of `study.md`.

    Raises:
        UsageError: the recipe, or a cell of it, is wrong, or a cell was made differently; nothing was begun.
        StageError: some cells failed, which are named; all others are whole.
    """
    run = Path(run)
    plan = read(Path(recipe))
    wanted = {slug(cell): cell for cell in cells(plan)}
    plotted = tables.varied(plan)
    if plotted:
        tables.matplotlib()
    for name, cell in wanted.items():
        _check(run / "cells" / name, plan.common | cell, f"--recipe {recipe}: cell {name}")
    scores: list[dict[str, Any]] = []
    failed: list[str] = []
    for number, (name, cell) in enumerate(wanted.items(), 1):
        say(f"\nstudy: cell {number} of {len(wanted)}: {name}")
        try:
            path = stage.selftrain(run / "cells" / name, **plan.common, **cell)
        except KTransferError as error:
            failed.append(f"{name} ({error})")
            say(f"study: cell {name} failed: {error}")
            continue
        scores.append({"cell": cell, "scores": files.read_json(path)["scores"]})
    if failed:
        raise StageError(
            f"study: {len(failed)} of {len(wanted)} cells failed: {'; '.join(failed)}; the others are complete: remove "
            "the cause, or take the values out of the recipe, and give the same command again"
        )
    lines = tables.lines_of(plan, scores)
    held = {"schema": 1, "measure": tables.measure_of(lines), "common": plan.common, "cells": scores}
    text = tables.to_markdown(plan, lines)
    if plan.claim:
        judged = claim.judge(plan.claim, tables.rows_of(plan, lines))
        held["claim"] = claim.in_json(plan.claim, judged)
        text += f"\n{claim.in_words(plan.claim, judged)}\n"
    files.write_json(run / "study.json", held)
    files.write_text(run / "study.csv", tables.to_csv(lines))
    files.write_text(run / "cells.csv", tables.cells_csv(lines))
    files.write_text(run / "study.md", text)
    for axis in plotted:
        files.write_text(run / f"{axis}.svg", tables.plot(plan, lines, axis))
    show(text)
    say(f"study: done; {len(wanted)} cells; {run / 'study.md'}")
    return run / "study.md"


def _check(run: Path, options: dict[str, Any], where: str) -> None:
    """Find what is wrong with a cell, or was made differently, before the first one begins."""
    try:
        planned = stage.check(run, options).steps
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    for step in planned:
        old, found = read_record(run, parts.STAGE, step.name), steps.otherwise(run, step)
        if old and found and not step.cheap and not leaves_nothing(run / parts.STAGE, old):
            raise UsageError(
                f"{where}: its {step.name} was made differently: {'; '.join(found)}. Remove {run} to make the cell "
                "again, or choose another --run"
            )


def read(path: Path) -> Recipe:
    """A recipe.

    Raises:
        UsageError: no TOML, unknown tables or settings, an axis without values or with one twice, cells that would
            share a folder.
    """
    held = read_toml(path, "--recipe")
    wrong = [name for name in held if name not in TABLES]
    if wrong or not all(isinstance(held.get(name, {}), dict) for name in TABLES):
        raise UsageError(
            f"--recipe {path}: '{(wrong or TABLES)[0]}' is not a table of a study, which has {', '.join(TABLES)}"
        )
    grid, common = held.get("grid", {}), held.get("selftrain", {})
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise UsageError(f"--recipe {path}: [grid] needs a list of values for each setting that is varied")
    twice = [axis for axis in grid if axis in common]
    if twice:
        raise UsageError(f"--recipe {path}: '{twice[0]}' is in [selftrain] and in [grid]; leave it in one of them")
    if "overwrite" in common | grid:
        raise UsageError(
            f"--recipe {path}: overwrite is not a setting of a study; remove the folders of its cells instead"
        )
    for axis, values in grid.items():
        again = [value for place, value in enumerate(values) if value in values[:place]]
        if again:
            raise UsageError(f"--recipe {path}: {axis} lists {again[0]!r} twice; each value makes a cell of its own")
    if "segment" in grid.get("task", []) and len(grid["task"]) > 1:
        raise UsageError(f"--recipe {path}: [grid] task: boxes and masks have different measures; make a study of each")
    named: dict[str, Cell] = {}
    for cell in cells(Recipe(common, grid, {})):
        build(SelftrainConfig, common | cell, f"--recipe {path}")
        if named.setdefault(slug(cell), cell) is not cell:
            raise UsageError(
                f"--recipe {path}: two cells would be written to cells/{slug(cell)}; rename a file that differs"
            )
    names = {str(key): str(name) for key, name in held.get("names", {}).items()}
    recipe = Recipe(common, grid, names, _claim(held["claim"], f"--recipe {path}") if "claim" in held else None)
    for axis, values in grid.items():
        called = [tables.words(recipe, axis, value) for value in values]
        again = [name for place, name in enumerate(called) if name in called[:place]]
        if again:
            raise UsageError(f"--recipe {path}: two values of {axis} are called '{again[0]}'; give [names] that differ")
    if recipe.claim:
        rows = [tables.row_name(recipe, cell, method) for cell in cells(recipe) for method in tables.WORDS]
        claim.refuse_unknown_rows(recipe.claim, list(dict.fromkeys(rows)), f"--recipe {path}")
    return recipe


def _claim(held: object, where: str) -> claim.Claim:
    """A claim whose only column is its measure."""
    stated = claim.read(held, where)
    if stated.measure not in tables.MEASURES:
        raise UsageError(
            f"{where}: [claim] measure must be one of {', '.join(tables.MEASURES)}; it is {stated.measure!r}"
        )
    return replace(stated, columns=[stated.measure])


def cells(recipe: Recipe) -> list[Cell]:
    """All combinations, the last axis fastest."""
    return [dict(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())]


def slug(cell: Cell) -> str:
    """The name of a cell's folder."""
    parts = [f"{axis}-{re.sub(r'[^A-Za-z0-9.]+', '-', str(value)).strip('-')}" for axis, value in cell.items()]
    return "_".join(parts)
