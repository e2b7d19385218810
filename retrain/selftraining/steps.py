"""The steps of a self-training: which there are, which were made differently, and which `--overwrite` removes."""

import math
from pathlib import Path

from ktransfer.config import settings_of
from ktransfer.plan import PlannedStep
from ktransfer.run import changes, drop, input_hash, read_record

from ..config import SelftrainConfig
from . import joint
from .parts import STAGE, Data


def planned(config: SelftrainConfig, data: Data, init: Path | None) -> list[PlannedStep]:
    """The steps in order, with their settings and with those of their inputs that are known before they begin."""
    begun = {"labelled": data.labelled.fingerprint} | ({"init": input_hash(init)} if init else {})
    others = {"unlabelled": data.unlabelled.fingerprint}
    teacher = {"teacher": input_hash(Path(config.teacher))} if config.teacher else {}
    pseudo = {"pseudo-boxes": input_hash(Path(config.pseudo))} if config.pseudo else {}
    found = [] if config.teacher else [PlannedStep("teacher", settings_of(config, "teacher"), begun)]
    for number in rounds(config):
        if not config.pseudo:
            known = others | (teacher if number == 1 else {})
            found.append(PlannedStep(f"pseudo{end_of(number)}", settings_of(config, "pseudo"), known))
        found.append(PlannedStep(f"student{end_of(number)}", settings_of(config, "student"), begun | others | pseudo))
    if joint.NAME in joint.methods(config):
        found.append(PlannedStep(joint.NAME, settings_of(config, joint.NAME), begun | others | joint.classes(data)))
    if joint.BOTH in joint.methods(config):
        inputs = begun | others | pseudo | joint.classes(data)
        found.append(PlannedStep(joint.BOTH, settings_of(config, joint.BOTH), inputs))
    tested = {"test": data.test.fingerprint}
    return [*found, PlannedStep("scores", settings_of(config, "scores"), tested, cheap=True)]


def rounds(config: SelftrainConfig) -> range:
    """The numbers of the rounds, from 1; none without self-training."""
    return range(1, config.rounds + 1 if joint.SELF in joint.methods(config) else 1)


def end_of(number: int) -> str:
    """What the names of a round's files end with."""
    return "" if number == 1 else f"-{number}"


def otherwise(run: Path, step: PlannedStep) -> list[str]:
    """A phrase for each thing in which a step of the run differs from `step`, as far as a line knows it beforehand."""
    old = read_record(run, STAGE, step.name)
    found = changes(run, STAGE, step.name, step.settings, step.inputs, partly=True)
    # Of weights that are no longer wanted nothing is among what the step reads now.
    return [*found, "init changed"] if old and "init" in old["inputs"].keys() - step.inputs.keys() else found


def remove(run: Path, steps: list[PlannedStep]) -> None:
    """Make room for `--overwrite`: the steps of this line that were made differently go, and what rests on them.

    Where none was, all steps of the line go. Those that another line made stay unless they rest on one that goes.
    """
    differs = [bool(otherwise(run, step)) for step in steps]
    there = [read_record(run, STAGE, step.name) is not None for step in steps]
    changed = [
        step.name for place, step in enumerate(steps) if differs[place] or (not there[place] and any(there[place:]))
    ]
    going = changed or [step.name for step in steps]
    drop(run, STAGE, lambda name: any(_rests(name, other) for other in going))


def _rests(step: str, other: str) -> bool:
    """Whether a step is another one or reads, by itself or by steps between, what that makes."""
    if step == other or joint.NAME in (step, other):  # a joint training reads nothing of other steps
        return step in (other, "scores")
    return _place(other) < _place(step)


def _place(step: str) -> tuple[float, str]:
    """The round of a step, and which it is there."""
    kind, _, number = step.partition("-")
    return {"teacher": 0.0, joint.BOTH: math.inf, "scores": math.inf}.get(kind, float(number or 1)), kind
