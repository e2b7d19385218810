"""Whether an evaluation is of detectors that selftrain finished, and of what; no detector is loaded for knowing it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ktransfer.detection.frames import OBEY
from ktransfer.plan import Plan, latest
from ktransfer.run import read_record

from .arms import FINAL
from .config import EvalConfig

TRUNK = "finished"
STAGE, LAST = "selftrain", "scores"
READ = (
    "labelled",
    "exif",
    "beside",
    "trunk",
    "threshold",
    "test_scales",
    "seed",
    "seeds",
    "device",
    "workers",
    "max_broken",
)
"""The settings that are read where they are evaluated."""


class Finished(NamedTuple):
    """The detectors that the run's selftrain made, or will make where it comes before in the line.

    Attributes:
        labelled: the labelled images that they learned from; None where the run has none.
        coming: what will be made.
        exif: how they take images, where that is not the usual way.
    """

    labelled: str | None
    coming: Plan | None
    exif: str | None


def wanted(run: Path, config: EvalConfig, before: Sequence[Plan]) -> Finished | None:
    """The detectors, where `--protocol detect` means these: `--trunk` says so, or is not given and the run has no other
    network.
    """
    coming, made = latest(before, STAGE), read_record(run, STAGE, LAST)
    if config.trunk == EvalConfig.trunk:
        others = any(latest(before, stage) or read_record(run, stage, name) for stage, name in FINAL)
        if others or not (coming or made):
            return None
    elif config.trunk != TRUNK:
        return None
    if coming:
        return Finished(coming.labelled, coming, _unusual(coming.detector.exif if coming.detector else None))
    learned = made["config"] if made else {}
    return Finished(str(learned["labelled"]) if made else None, None, _unusual(learned.get("exif")))


def _unusual(exif: str | None) -> str | None:
    return None if exif == OBEY else exif
