"""The recipe of a study of the chain, a TOML file, and the cells and steps that follow from it.

    [pretext] .. [eval]   settings of every cell; the stages that have a table are carried out, in order
    [arms.NAME.STAGE]     more settings, or other ones, of an arm; leave = ["pretext"] in [arms.NAME] leaves stages
                          or, as "extract.pool", common settings out
    [grid]                "STAGE.SETTING" = [values]: every combination is a cell; seed = [0, 1] is that of all stages
    [names]               what values and settings are called in the tables
    [claim]               what is expected, and what would refute it (`claim.py`)

`extract` comes by itself before `cluster`, and `assign` before `retrain`. Random weights are evaluated once a
repetition, in the first cell, where `[eval] random` says nothing.

A step is what a cell makes in one folder of its run. It is known by its settings and by the step before it, so cells
that agree up to a step share it, and a changed recipe makes anew what depends on the change alone.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer import stages
from ktransfer.config import build, nearest, read_toml
from ktransfer.errors import UsageError
from ktransfer.plan import Call

from .claim import Claim, refuse_unknown_rows
from .claim import read as read_claim

CHAIN = ("pretext", "extract", "cluster", "assign", "retrain", "eval")
OTHERS = ("arms", "grid", "names", "claim")
SEED = "seed"
RANDOM_ROW = "random weights"
LEAVE = "leave"
ARM = "arm"
Tables = Mapping[str, Mapping[str, Any]]


class Step(NamedTuple):
    """What is made in one folder of a run: its name, the calls that make it, and the step before it."""

    name: str
    folder: str
    calls: tuple[Call, ...]
    before: "Step | None"

    def line(self) -> "list[Step]":
        """All steps up to this one, the first one first."""
        return [*(self.before.line() if self.before else []), self]


class Cell(NamedTuple):
    """One combination: arm and values of the grid by axis, without those that only repeat; these; and its last step."""

    values: dict[str, Any]
    repeated: dict[str, Any]
    step: Step


class Recipe(NamedTuple):
    """A recipe as it was read, with its cells in the order of arms and grid."""

    common: Tables
    arms: dict[str, Tables]
    grid: dict[str, list[Any]]
    names: dict[str, str]
    cells: list[Cell]
    claim: Claim | None


def read(path: Path) -> Recipe:
    """A recipe and its cells.

    Raises:
        UsageError: no TOML, unknown tables, stages or settings, an axis without values or with one twice.
    """
    where = f"--recipe {path}"
    held = read_toml(path, "--recipe")
    if wrong := [name for name in held if name not in (*CHAIN, *OTHERS)]:
        raise UsageError(f"{where}: no table '{wrong[0]}'; {nearest(wrong[0], (*CHAIN, *OTHERS))}")
    if not all(isinstance(table, dict) for table in held.values()):
        raise UsageError(f"{where}: all of it must stand in tables, such as [pretext]")
    common = {stage: held[stage] for stage in CHAIN if stage in held}
    arms = _arms(held.get("arms", {}), where)
    grid = held.get("grid", {})
    for axis, values in grid.items():
        stage, _, setting = axis.partition(".")
        if axis != SEED and (stage not in CHAIN or not setting):
            raise UsageError(f'{where}: [grid] {axis}: must be seed or STAGE.SETTING, such as "cluster.k"')
        if not isinstance(values, list) or not values:
            raise UsageError(f"{where}: [grid] {axis}: needs a list of values")
        if again := [value for place, value in enumerate(values) if value in values[:place]]:
            raise UsageError(f"{where}: [grid] {axis} lists {again[0]!r} twice; each value makes a cell of its own")
    names = {str(key): str(name) for key, name in held.get("names", {}).items()}
    found: dict[str, Cell] = {}
    for arm in arms:
        for values in itertools.product(*grid.values()):
            given = dict(zip(grid, values, strict=True))
            apart = {axis: value for axis, value in given.items() if not repeats(axis)}
            first = arm == next(iter(arms)) and all(value == grid[axis][0] for axis, value in apart.items())
            cell = _cell(common, arms[arm], {ARM: arm} if len(arms) > 1 else {}, given, first, where)
            found.setdefault(json.dumps([cell.values, cell.repeated], default=str), cell)
    recipe = Recipe(common, arms, grid, names, list(found.values()), _claim(held, where))
    if recipe.claim:
        rows = [*dict.fromkeys(row_of(recipe, cell) for cell in recipe.cells), RANDOM_ROW]
        refuse_unknown_rows(recipe.claim, rows, where)
    return recipe


def _claim(held: Mapping[str, Any], where: str) -> Claim | None:
    return read_claim(held["claim"], where) if "claim" in held else None


def repeats(axis: str) -> bool:
    """Whether an axis only repeats: it is the seed of all stages or of one."""
    return axis.rpartition(".")[2] == SEED


def _arms(held: Any, where: str) -> dict[str, Tables]:
    if not isinstance(held, dict) or not all(isinstance(tables, dict) for tables in held.values()):
        raise UsageError(f"{where}: [arms] must hold tables, such as [arms.hog.extract]")
    for name, tables in held.items():
        for stage, table in tables.items():
            if stage == LEAVE:
                if not isinstance(table, list) or not {str(one).partition(".")[0] for one in table} <= set(CHAIN):
                    said = f"must list stages ({', '.join(CHAIN)}) or STAGE.SETTING; it is {table}"
                    raise UsageError(f"{where}: [arms.{name}] {LEAVE} {said}")
            elif stage not in CHAIN or not isinstance(table, dict):
                raise UsageError(f"{where}: [arms.{name}] {stage}: must be a stage's table; {nearest(stage, CHAIN)}")
    return dict(held) or {"": {}}


def _cell(common: Tables, arm: Tables, named: dict[str, Any], values: dict[str, Any], first: bool, where: str) -> Cell:
    """One combination; values of stages that its arm leaves out are no part of it."""
    left = set(arm.get(LEAVE) or ())
    tables = {
        stage: {
            **{key: value for key, value in common.get(stage, {}).items() if f"{stage}.{key}" not in left},
            **arm.get(stage, {}),
        }
        for stage in _stages(common, arm)
    }
    if list(tables)[-1:] != ["eval"]:
        raise UsageError(f"{where}: a study needs the stage eval at its end; add a table [eval]")
    settings = {
        stage: {key.replace("-", "_"): value for key, value in table.items()} for stage, table in tables.items()
    }
    settings["eval"].setdefault("random", first)
    mine = {axis: value for axis, value in values.items() if axis == SEED or axis.partition(".")[0] in settings}
    for axis, value in mine.items():
        stage, _, setting = axis.partition(".")
        if axis != SEED:
            settings[stage][setting.replace("-", "_")] = value
    for stage, given in settings.items():
        if SEED in mine and hasattr(stages.settings(stage), SEED):
            given.setdefault(SEED, mine[SEED])
        if "overwrite" in given:
            raise UsageError(f"{where}: [{stage}] overwrite is not a setting of a study; remove its folder instead")
        build(stages.settings(stage), given, f"{where}: [{stage}]")
    step: Step | None = None
    for folder, group in itertools.groupby(settings, key=lambda stage: stages.STAGES[stage].folder):
        calls = tuple((stage, settings[stage]) for stage in group)
        known = json.dumps([calls, step.name if step else None], sort_keys=True, default=str)
        step = Step(f"{folder}-{hashlib.sha256(known.encode()).hexdigest()[:12]}", folder, calls, step)
    assert step is not None
    apart = {axis: value for axis, value in mine.items() if not repeats(axis)}
    again = {axis: value for axis, value in mine.items() if repeats(axis)}
    return Cell(named | apart, again, step)


def _stages(common: Tables, arm: Tables) -> list[str]:
    """The stages of an arm, with those that come by themselves."""
    left = arm.get(LEAVE) or ()
    wanted = {stage for stage in CHAIN if (stage in common or stage in arm) and stage not in left}
    given = {**common.get("cluster", {}), **arm.get("cluster", {})}
    if "cluster" in wanted and "features" not in given:
        wanted.add("extract")
    if {"cluster", "retrain"} <= wanted:
        wanted.add("assign")
    return [stage for stage in CHAIN if stage in wanted]


def words(recipe: Recipe, axis: str, value: Any) -> str:
    """What a value of an axis is called: by [names], else with its setting."""
    name = recipe.names.get(str(value), str(value))
    return name if axis == ARM else f"{recipe.names.get(axis, axis.partition('.')[2] or axis)} {name}"


def row_of(recipe: Recipe, cell: Cell) -> str:
    """What a cell is called in a table."""
    found = ", ".join(words(recipe, axis, value) for axis, value in cell.values.items())
    return re.sub(r"\|", "/", found) or "all"
