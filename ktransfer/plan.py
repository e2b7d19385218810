"""A line of stages is planned before its first one starts: everything is checked, and what each will do is known.

The module of a stage (the table in `stages.py`) has these names:

check      (run, options, before) -> its `Plan`; UsageError for all that can be found before the work.
           `before` are the plans of the stages that come earlier in the line.
carry_out  (plan) -> what the stage makes; opens nothing that the plan holds, and checks only what was not there yet
first      (run, options, before, tables) -> what the line must do before it without being named: (stage, options) of
           each, or its plan; `tables` are the settings of a file, by stage. Optional.

The stage's function in Python is `carry_out(check(run, options))`, or plans and carries out such a line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ktransfer import stages
from ktransfer.config import read_by
from ktransfer.errors import UsageError
from ktransfer.images.tolerated import say_tolerated
from ktransfer.run import changes, leaves_nothing, read_record, refusal

if TYPE_CHECKING:
    from ktransfer.data.dataset import Dataset
    from ktransfer.detection.saved import Described
    from ktransfer.networks import Network

NOTHING: Mapping[str, Mapping[str, Any]] = {}
Call = tuple[str, dict[str, Any]]
"""A stage and what it was given."""


class PlannedStep(NamedTuple):
    """A step of a stage, as its check has resolved it.

    Attributes:
        name: that in stage.json.
        settings: the dataclass that is compared with what the step was made with.
        inputs: name -> SHA-256 of what it reads, as far as that is known before the line starts.
        reads: the stages of the run whose outcome it takes.
        cheap: whether it is made again, and not refused, where it was made differently.
        disk: bytes that its files take at most, 0 where that is not known.
        memory: bytes that it holds at most, 0 where that is not known.
    """

    name: str
    settings: Any
    inputs: dict[str, str]
    reads: tuple[str, ...] = ()
    cheap: bool = False
    disk: int = 0
    memory: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage with its settings resolved and its data open. Each stage has its own kind, which adds what it alone
    needs.

    Attributes:
        stage: the stage's name.
        run: the run folder.
        steps: what it does, in order; none where it writes nothing.
        overwrite: whether steps that were made are made again.
        images: those that it reads, where they are known.
        network: what it will make, and `weights` where that will lie.
        detector: the detector that it will make; `labelled` is what that learns from.
        stepwise: whether `overwrite` removes each step when its turn comes, not all of them at the start.
        alone: the option that makes it a self-test, which has nothing for other stages.
    """

    stage: str
    run: Path
    steps: list[PlannedStep] = field(default_factory=list)
    overwrite: bool = False
    images: "Dataset | None" = None
    network: "Network | None" = None
    weights: Path | None = None
    detector: "Described | None" = None
    labelled: str | None = None
    stepwise: bool = False
    alone: str = ""

    @property
    def folder(self) -> str:
        """Where in the run it writes."""
        return stages.STAGES[self.stage].folder


class Outlook(NamedTuple):
    """What a line would do with a step.

    Attributes:
        what: "runs", "goes on", "is made again", "is done" (and skipped) or "is refused".
        why: a phrase for each thing that differs from what the run holds.
        seconds: how long it took before, None where it was never done.
    """

    plan: Plan
    step: PlannedStep
    what: str
    why: list[str]
    seconds: float | None


def latest(before: Sequence[Plan], *names: str) -> Plan | None:
    """The last plan of one of these stages, None where the line has none."""
    return next((plan for plan in reversed(before) if plan.stage in names), None)


def plan_line(wanted: Sequence[Call], run: Path, tables: Mapping[str, Mapping[str, Any]] = NOTHING) -> list[Plan]:
    """Check all stages of a line, and those that they need before, each knowing the plans of those before it.

    Args:
        tables: settings of a file, by stage; what a call gives beats them.

    Raises:
        UsageError: one line for what is wrong.
    """
    line: list[Plan] = []
    named: str | None = None
    for stage, own in wanted:
        given = with_table(stage, tables.get(stage, {}), own)
        named = given.get("data") or named
        takes = stages.STAGES[stage].takes
        if named and takes:
            given.setdefault(takes, named)
        line += _with_first(run, stage, given, line, tables)
        if line[-1].alone and len(wanted) > 1:
            raise UsageError(
                f"{stage} {line[-1].alone}: a self-test makes nothing for other stages; give it as the only stage"
            )
    return line


def _with_first(
    run: Path, stage: str, given: dict[str, Any], before: Sequence[Plan], tables: Mapping[str, Mapping[str, Any]]
) -> list[Plan]:
    """The plan of a stage, and before it those of the stages that it needs."""
    module = stages.module(stage)
    line: list[Plan] = []
    for one in module.first(run, given, before, tables) if hasattr(module, "first") else []:
        if isinstance(one, Plan):
            line.append(one)
        else:
            other, options = one
            line += _with_first(run, other, options, [*before, *line], tables)
    return [*line, module.check(run, given, [*before, *line])]


def carry_out_line(line: Sequence[Plan]) -> list[Any]:
    """Do what was planned, stage by stage; what each made.

    Raises:
        UsageError, StageError: one line each.
    """
    try:
        return [stages.module(plan.stage).carry_out(plan) for plan in line]
    finally:
        say_tolerated()


def with_table(stage: str, table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a call: its own and, for what it does not give, those of a file.

    A file serves several protocols of a stage: what it has for others than the call's is left out. What the call itself
    gives stays, and is refused by the stage's check where nothing reads it.
    """
    merged = {**table, **given}
    config = stages.settings(stage)
    if not hasattr(config, "parts_read"):
        return merged
    read = read_by(config, config.parts_read(merged))
    return {name: value for name, value in merged.items() if name in given or name in read}


def outlooks(line: Sequence[Plan]) -> list[Outlook]:
    """What a line would do with each step, as far as that is known before its first stage starts."""
    anew: set[str] = set()  # stages whose outcome will not be what the run holds
    found: list[Outlook] = []
    for plan in line:
        for step in plan.steps:
            remade = next((source for source in step.reads if source in anew), None)
            old = read_record(plan.run, plan.folder, step.name)
            why = changes(plan.run, plan.folder, step.name, step.settings, step.inputs, partly=True)
            if old and remade:
                why.append(f"this line makes the {remade} stage again")
            if why or remade:
                anew.add(plan.stage)
            done = bool(old and old["state"] == "done")
            if not old or (why and leaves_nothing(plan.run / plan.folder, old)):
                what = "runs"
            elif plan.overwrite or (why and step.cheap):
                what = "is made again"
            elif why:
                what = "is refused"
            else:
                what = "is done" if done else "goes on"
            found.append(Outlook(plan, step, what, why, old["seconds"] if old and done else None))
    return found


def refuse_changes(line: Sequence[Plan]) -> None:
    """Refuse, before the first stage starts, what one of the stages would refuse.

    Raises:
        UsageError: a step of the run was made differently, and `--overwrite` was not given.
    """
    for one in outlooks(line):
        if one.what == "is refused":
            raise refusal(one.plan.run, one.plan.folder, one.step.name, one.why)


def described(line: Sequence[Plan]) -> str:
    """What a line would do, a row for each step, for people."""
    rows: list[tuple[str, ...]] = [("stage", "step", "disk", "memory", "took before", "")]
    for one in outlooks(line):
        sizes = (f"{size / 1e9:.2g} GB" if size else "-" for size in (one.step.disk, one.step.memory))
        took = "-" if one.seconds is None else f"{one.seconds:.3g} s"
        why = f": {'; '.join(one.why)}" if one.why and one.what in ("is refused", "is made again") else ""
        rows.append((one.plan.stage, one.step.name, *sizes, took, f"{one.what}{why}"))
    rows += [(plan.stage, "-", "-", "-", "-", "runs, and writes nothing") for plan in line if not plan.steps]
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    return "\n".join("  ".join([*map(str.ljust, row[:5], widths), row[5]]).rstrip() for row in rows)
