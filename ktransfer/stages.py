"""The stages: in which room each lives, and what a line of them needs before its first one starts.

Rooms are imported only when they are called.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer.config import read_by
from ktransfer.errors import UsageError

# Stage -> (module of its settings, their class, module of its function, function, its check).
STAGES = {
    "pretext": ("ktransfer.pretext.config", "PretextConfig", "ktransfer.pretext.stage", "pretext", "check"),
    "extract": ("ktransfer.cluster.config", "ExtractConfig", "ktransfer.cluster.extraction", "extract", "check"),
    "cluster": ("ktransfer.cluster.config", "ClusterConfig", "ktransfer.cluster.stage", "cluster", "check_cluster"),
    "assign": ("ktransfer.cluster.config", "AssignConfig", "ktransfer.cluster.stage", "assign", "check_assign"),
    "retrain": ("ktransfer.retrain.config", "RetrainConfig", "ktransfer.retrain.stage", "retrain", "check"),
    "selftrain": (
        "ktransfer.retrain.config",
        "SelftrainConfig",
        "ktransfer.retrain.selftraining.stage",
        "selftrain",
        "check",
    ),
    "eval": ("ktransfer.eval.config", "EvalConfig", "ktransfer.eval.stage", "evaluate", "check"),
}
# Stage -> the stage whose outcome it reads, and the option that gives it something else instead.
SOURCES = {
    "extract": ("pretext", "teacher"),
    "cluster": ("extract", "features"),
    "assign": ("cluster", None),
    "retrain": ("assign", "labels"),
}
INHERIT_DATA = {"extract": "data", "cluster": "data", "retrain": "data", "eval": "labelled"}
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
}
Call = tuple[str, dict[str, Any]]


class Part(NamedTuple):
    """A step of a stage as the stage's check has resolved it."""

    step: str
    """Its name in stage.json."""
    config: Any
    inputs: dict[str, str]
    """SHA-256 of what it reads, as far as that is known before the line starts."""
    cheap: bool = False
    """Whether it is done anew, and not refused, where it was made otherwise."""


class Planned(NamedTuple):
    """A stage of the line: one call of its function."""

    stage: str
    given: dict[str, Any]
    config: Any
    parts: list[Part]


def settings(stage: str) -> Any:
    """The dataclass of a stage's settings; imports nothing heavy."""
    module, name, *_ = STAGES[stage]
    return getattr(importlib.import_module(module), name)


def function(stage: str) -> Callable[..., Any]:
    """The function that carries a stage out; imports its room."""
    _, _, module, name, _ = STAGES[stage]
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def servant(do: str) -> Callable[[dict[str, Any]], None]:
    """The function that carries out an order of the leader; imports its room."""
    module, name = ORDERS[do]
    found: Callable[[dict[str, Any]], None] = getattr(importlib.import_module(module), name)
    return found


def worker(part: str) -> Callable[..., Any]:
    """What `ktransfer bench` measures of a room; imports it."""
    found: Callable[..., Any] = importlib.import_module(WORKERS[part]).work
    return found


def plan(wanted: list[Call], run: Path) -> list[Planned]:
    """Check all stages of the line, each knowing the settings of those before it.

    Raises:
        UsageError: one line for what is wrong.
    """
    line: list[Planned] = []
    for stage, given in wanted:
        check = getattr(importlib.import_module(STAGES[stage][2]), STAGES[stage][4])
        checked = check(run, given, {planned.stage: planned.config for planned in line})
        if stage == "eval":
            for one in checked:
                part = Part(one.protocol, one.settings, one.fingerprints())
                line.append(Planned(stage, one.given, one.settings, [part]))
            continue
        if stage == "selftrain":
            line.append(Planned(stage, given, checked.config, checked.parts))
            continue
        config, data = checked if isinstance(checked, tuple) else (checked, None)
        step = stage
        if stage == "extract":
            step = config.name or data.name
        inputs = {"data": data.fingerprint} if data is not None else {}
        line.append(Planned(stage, given, config, [Part(step, config, inputs)]))
        if getattr(config, "overfit", 0) and len(wanted) > 1:
            raise UsageError(f"{stage} --overfit: a self-test, which makes nothing for other stages; give it alone")
    return line


def refuse_changes(line: list[Planned], run: Path) -> None:
    """Refuse before the first stage starts what would be refused when a later one's turn comes.

    Raises:
        UsageError: a step of the run was made otherwise, and `--overwrite` was not given.
    """
    from ktransfer.run import FOLDERS, changes, leaves_nothing, read_record, refusal

    anew: set[str] = set()  # stages whose outcome will not be what the run holds
    for stage, given, config, parts in line:
        if getattr(config, "overfit", 0):  # a self-test, which neither reads nor writes the run
            continue
        folder = FOLDERS[stage]
        source, instead = SOURCES.get(stage, (None, None))
        if stage == "eval":
            source = "retrain" if read_record(run, "retrain", "retrain") else "pretext"
            source = "selftrain" if getattr(config, "trunk", None) == "finished" else source
        if stage == "selftrain" and config.init == "run":
            source = "retrain"
        remade = source in anew and not (instead and given.get(instead))
        for step, settings_of_step, inputs, cheap in parts:
            old = read_record(run, folder, step)
            found = changes(run, folder, step, settings_of_step, inputs, partly=True)
            if old and remade:
                found.append(f"this line makes the {source} stage anew")
            allowed = cheap or given.get("overwrite")
            if old and found and not allowed and not leaves_nothing(run / folder, old):
                raise refusal(run, folder, step, found)
            if found or remade:
                anew.add(stage)


def with_table(stage: str, table: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a call: its own, and those of a file for the stage.

    A file serves several protocols of eval: what it has for others than the call's is left out. What the call itself
    gives stays, and is refused by the stage's check where nothing reads it.
    """
    merged = table | given
    if stage != "eval":
        return merged
    config = settings(stage)
    names = str(merged.get("protocol", config.protocol)).split(",")
    read = read_by(config, [*(name.strip() for name in names), *(["supervised"] if merged.get("supervised") else [])])
    return {name: value for name, value in merged.items() if name in given or name in read}


def inherit_data(wanted: list[Call]) -> None:
    """Images named once in a line serve the stages after."""
    latest: str | None = None
    for stage, given in wanted:
        if given.get("data"):
            latest = given["data"]
        if latest and stage in INHERIT_DATA:
            given.setdefault(INHERIT_DATA[stage], latest)


def complete(wanted: list[Call], run: Path, tables: dict[str, dict[str, Any]]) -> list[Call]:
    """Add the stages that others run first: `assign` before `retrain`, and an `extract` that has its own settings."""
    found: list[Call] = []
    for stage, given in wanted:
        before = [name for name, _ in found]
        if stage == "cluster" and "extract" not in before and not given.get("features"):
            again = any(name == "pretext" and options.get("overwrite") for name, options in found)
            again = again or ("pretext" in before and _outdated(run, given.get("data")))
            if again or "extract" in tables:
                data = {"data": given["data"]} if given.get("data") else {}
                found.append(("extract", data | tables.get("extract", {}) | ({"overwrite": True} if again else {})))
        told = "assign" in tables or "cluster" in before
        there = "assign" in before or (not told and _assigned(run))
        asks = given.get("arch") == "list"
        if stage == "retrain" and not given.get("labels") and not there and not asks:
            again = any(name == "cluster" and options.get("overwrite") for name, options in found)
            again = again or ("cluster" in before and not _assigned(run))
            found.append(("assign", tables.get("assign", {}) | {"overwrite": again}))
        found.append((stage, given))
    return found


def _outdated(run: Path, data: str | None) -> bool:
    """Whether the run's features of these images come from an older teacher than its own."""
    from ktransfer.data.opening import open_dataset
    from ktransfer.run import read_record

    teacher = read_record(run, "pretext", "pretext")
    made = read_record(run, "features", open_dataset(data).name) if data and teacher else None
    if not made or not teacher or made["config"]["teacher"]:
        return False
    weights = teacher["outputs"].get("model.safetensors", {})  # none while it is unfinished
    return bool(made["inputs"]["teacher"] != weights.get("sha256"))


def _assigned(run: Path) -> bool:
    """Whether the run's pseudo-labels, of whatever images, belong to its centroids."""
    from ktransfer.run import input_hash, read_record

    made, centroids = read_record(run, "clusters", "assign"), run / "clusters" / "clusters.h5"
    if not made or made["state"] != "done" or not centroids.is_file():
        return False
    return bool(made["inputs"]["centroids"] == input_hash(centroids))
