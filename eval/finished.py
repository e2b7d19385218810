"""Whether an evaluation is of detectors that selftrain finished, and of what; no detector is loaded for knowing it."""

from collections.abc import Sequence
from pathlib import Path

from ktransfer.plan import Plan, latest
from ktransfer.run import read_record

from .arms import FINAL
from .config import EvalConfig

TRUNK = "finished"
STAGE, LAST = "selftrain", "scores"
READ = ("labelled", "beside", "trunk", "threshold", "test_scales", "seed", "seeds", "device", "workers", "max_broken")
"""The settings that are read where they are evaluated."""


def wanted(run: Path, config: EvalConfig, before: Sequence[Plan]) -> bool:
    """Whether `--protocol detect` means these: `--trunk` says so, or is not given and the run has no other network."""
    if config.trunk != EvalConfig.trunk:
        return config.trunk == TRUNK
    others = any(latest(before, stage) or read_record(run, stage, name) for stage, name in FINAL)
    return not others and (latest(before, STAGE) is not None or read_record(run, STAGE, LAST) is not None)


def labelled(run: Path, before: Sequence[Plan]) -> str | None:
    """The labelled images of the run's selftrain, or of the one that comes before in the line."""
    if coming := latest(before, STAGE):
        return coming.labelled
    made = read_record(run, STAGE, LAST)
    return str(made["config"]["labelled"]) if made else None
