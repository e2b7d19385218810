"""The protocols by name: each is a module of this folder with the same few names in it.

PROTOCOL   its name and version, such as "knn/1"; the version changes whenever a number can
TITLE      the first cell of its tables, such as "k nearest neighbours"
MEASURES   {measure: words for the table}; the first is the one that comparisons are made by
check      (networks, splits, config, run) -> None; UsageError for what can be known before the work
enough     (splits, config) -> None; UsageError where nothing is left to learn from or to judge by, as images cannot be
           read; where it is missing, `enough.labelled`
check_arms (arms, config) -> None; UsageError for what can be known of the weights before the work; optional
evaluate      (arm, splits, config, folder, device) -> what is written for one network (see `Result`); `folder` is for
           what is written on the way, and is removed when the outcome is kept
open_data  (spec, exif) -> splits; where it is missing, `ktransfer.dataset.open_splits`
inputs     (arms, splits, config) -> {name: SHA-256} of what else it reads of the runs; optional
relate     ({arm: what was written}, config) -> None; adds in place what is said of one beside the others; optional
LOWER_IS_BETTER, NEITHER_IS_BETTER  measures of which less is better, and such that only describe; optional
RELATIVE   measures relative to the first network of the table; none where it is missing
NOTE       what the table says where chance means nothing, with {counts} for the numbers of images; optional
MULTI_LABEL  True where it takes images with several labels (`Dataset.tags`); False where it is missing
"""

import importlib
from pathlib import Path
from typing import Any, Protocol

import torch

from ktransfer.data.opening import open_splits
from ktransfer.errors import UsageError
from ktransfer.networks import Network

from ..arms import Arm
from ..config import PROTOCOLS, EvalConfig
from ..result import Result


class Module(Protocol):
    """See the head of this file."""

    PROTOCOL: str
    TITLE: str
    MEASURES: dict[str, str]

    def check(self, networks: list[Network], splits: Any, config: EvalConfig, run: Path) -> None:
        """Find what is wrong before the work."""

    def evaluate(self, arm: Arm, splits: Any, config: EvalConfig, folder: Path, device: torch.device) -> Result:
        """Evaluate one network."""


def load(name: str) -> Module:
    """The module of a protocol."""
    found: Module = importlib.import_module(f".{name}", __package__)
    return found


def open_data(name: str, spec: str, exif: str | None = None) -> Any:
    """The labelled images as the protocol takes them: splits that have a `fingerprint`, a `len` and `classes`.

    Args:
        exif: of those that find things in images, how these are taken (`ktransfer.detection.frames`).

    Raises:
        UsageError: they are not there, or not as the protocol needs them.
    """
    opener, more = getattr(load(name), "open_data", open_splits), {"exif": exif} if exif else {}
    splits = opener(spec, **more)
    if getattr(splits[0], "tags", None) is not None and not getattr(load(name), "MULTI_LABEL", False):
        able = ", ".join(other for other in PROTOCOLS if getattr(load(other), "MULTI_LABEL", False))
        raise UsageError(
            f"--protocol {name}: {spec} has images with several labels; choose a protocol that takes them: {able}"
        )
    return splits
