"""The table of stages, and of what else the ground floor asks of a room. Rooms are imported only when they are
called."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """One row.

    Attributes:
        module: has `check` and `carry_out` (`plan.py`), and the stage's function.
        function: the stage as users of Python call it, and as the room exports it.
        settings: the dataclass of its settings, in the `config` of the room.
        folder: where in a run it writes.
        takes: the setting that gets the images which a stage before it in the line named, where it names none.
        aside: whether it may run while other stages work in the run: it changes nothing but its own folder.
    """

    module: str
    function: str
    settings: str
    folder: str
    takes: str | None = None
    aside: bool = False


STAGES = {
    "pretext": Stage("ktransfer.pretext.stage", "pretext", "PretextConfig", "pretext"),
    "extract": Stage("ktransfer.cluster.extraction", "extract", "ExtractConfig", "features", "data"),
    "cluster": Stage("ktransfer.cluster.stage", "cluster", "ClusterConfig", "clusters", "data"),
    "assign": Stage("ktransfer.cluster.assignment", "assign", "AssignConfig", "clusters"),
    "retrain": Stage("ktransfer.retrain.stage", "retrain", "RetrainConfig", "retrain", "data"),
    "selftrain": Stage("ktransfer.retrain.selftraining.stage", "selftrain", "SelftrainConfig", "selftrain"),
    "eval": Stage("ktransfer.eval.stage", "evaluate", "EvalConfig", "eval", "labelled"),
    "report": Stage("ktransfer.report.stage", "report", "ReportConfig", "report", aside=True),
    "export": Stage("ktransfer.retrain.students.exporting", "export", "ExportConfig", "export"),
}
# What the leader of several processes has the others do -> module and function (ktransfer/distributed.py).
ORDERS = {
    "open": ("ktransfer.cluster.distributed", "open_share"),
    "scan": ("ktransfer.cluster.distributed", "scan_share"),
    "extract": ("ktransfer.cluster.extraction", "extract_share"),
    "read": ("ktransfer.training.reading", "read_share"),
    "pretext": ("ktransfer.pretext.stage", "train_along"),
    "retrain": ("ktransfer.retrain.stage", "train_along"),
    "maps": ("ktransfer.eval.learners.maps", "map_share"),
}
# What `ktransfer bench` measures -> module of its `work`.
WORKERS = {
    "step": "ktransfer.pretext.speed",
    "extract": "ktransfer.cluster.speed",
    "retrain": "ktransfer.retrain.speed",
    "predict": "ktransfer.retrain.students.speed",
}
# The C++ extension, which may not have been built.
EXTENSION = "ktransfer.cluster.engines._exact"


def settings(stage: str) -> Any:
    """The dataclass of a stage's settings; imports nothing heavy."""
    room = ".".join(STAGES[stage].module.split(".")[:2])
    return getattr(importlib.import_module(f"{room}.config"), STAGES[stage].settings)


def module(stage: str) -> Any:
    """The module of a stage; imports its room."""
    return importlib.import_module(STAGES[stage].module)


def command_of(folder: str, step: str) -> str:
    """The stage that makes a step of a folder: that of its name, else (a data set, a protocol) that of the folder."""
    if step in STAGES and STAGES[step].folder == folder:
        return step
    return next((stage for stage, row in STAGES.items() if row.folder == folder), step)


def servant(do: str) -> Callable[[dict[str, Any]], None]:
    """The function that carries out an order of the leader; imports its room."""
    where, name = ORDERS[do]
    found: Callable[[dict[str, Any]], None] = getattr(importlib.import_module(where), name)
    return found


def worker(part: str) -> Callable[..., Any]:
    """What `ktransfer bench` measures of a room; imports it."""
    found: Callable[..., Any] = importlib.import_module(WORKERS[part]).work
    return found
