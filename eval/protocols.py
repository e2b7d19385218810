"""The protocols by name: each is a module of this room with the same few names in it.

PROTOCOL   its name and version, such as "knn/1"; the version changes whenever a number can
TITLE      the first cell of its tables, such as "k nearest neighbours"
MEASURES   {measure: words for the table}; the first is the one that comparisons are made by
check      (networks, parts, config, run) -> None; UsageError for what can be known before the work
judge      (arm, parts, config, folder, device) -> what is written for one network (see `Judged`)
open_data  (spec) -> parts; where it is missing, `ktransfer.dataset.open_parts`
"""

import importlib
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import torch

from ktransfer.dataset import open_parts
from ktransfer.networks import Network

from .arms import Arm
from .config import EvalConfig


class Judged(TypedDict):
    """What a protocol says of one network.

    Attributes:
        scores: column of the table (a layer, a number of labels, ...) -> {measure: value, measure + "_interval": [low,
            high] of the 95 % interval, and whatever else belongs to it}. Shares lie in 0..1.
        broken: pictures that could not be read, with the reason.
        files: pictures that were drawn, names below the folder of the protocol in the run's eval/.
    """

    task: str
    arch: str
    width: float
    scores: dict[str, dict[str, Any]]
    broken: list[str]
    files: NotRequired[list[str]]


class Module(Protocol):
    """See the head of this file."""

    PROTOCOL: str
    TITLE: str
    MEASURES: dict[str, str]

    def check(self, networks: list[Network], parts: Any, config: EvalConfig, run: Path) -> None:
        """Find what is wrong before the work."""

    def judge(self, arm: Arm, parts: Any, config: EvalConfig, folder: Path, device: torch.device) -> Judged:
        """Judge one network."""


def load(name: str) -> Module:
    """The module of a protocol."""
    found: Module = importlib.import_module(f".{name}", __package__)
    return found


def open_data(name: str, spec: str) -> Any:
    """The labelled pictures as the protocol takes them: parts that have a `fingerprint`, a `len` and `classes`.

    Raises:
        UsageError: they are not there, or not as the protocol needs them.
    """
    return getattr(load(name), "open_data", open_parts)(spec)
