"""The overview: what was done in a run, with which settings, what it made, and what is missing."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer.config import in_words
from ktransfer.report.curves import read_metrics
from ktransfer.run import in_use, records
from ktransfer.stages import STAGES, command_of, settings
from ktransfer.status import CHAIN, in_time

WORDS = {
    "pretext": "a deep network learns to solve puzzles, without labels",
    "extract": "the teacher's features of every image",
    "cluster": "images with similar features are grouped",
    "assign": "the nearest group of every image is its pseudo-label",
    "retrain": "the target network learns the pseudo-labels",
    "selftrain": "a detector labels images, and a student learns them",
    "eval": "how good the networks are",
    "export": "the target network for other programs",
}
NEXT: dict[str, dict[str, Any]] = {
    "pretext": {"data": "IMAGES"},
    "extract": {},
    "cluster": {"k": 200},
    "assign": {},
    "retrain": {"arch": "alexnet"},
    "eval": {"labelled": "ROOT"},
}
HIDDEN = ("overwrite",)
DIGITS = 12


class Setting(NamedTuple):
    """A setting as it was: its name as an option, its value, what it means, and whether it is not the default."""

    name: str
    value: str
    meaning: str
    changed: bool


class Made(NamedTuple):
    """A file that a step made."""

    name: str
    size: str
    digest: str


class StepShown(NamedTuple):
    """A step of a run, for people."""

    stage: str
    name: str
    words: str
    state: str
    error: str
    begun: str
    took: str
    speed: str
    device: str
    settings: list[Setting]
    made: list[Made]
    results: list[tuple[str, str]]
    broken: list[str]
    versions: str


class Missing(NamedTuple):
    """A stage of the chain that the run lacks, and the command that makes it."""

    stage: str
    words: str
    command: str


def steps_of(run: Path) -> list[StepShown]:
    """All steps that were begun, in the order of the stages."""
    works = in_use(run)
    folders = dict.fromkeys(row.folder for stage, row in STAGES.items() if stage != "report")
    return [
        _shown(run, command_of(folder, name), folder, name, record, works)
        for folder in folders
        for name, record in records(run / folder).items()
    ]


def missing_of(run: Path, steps: list[StepShown]) -> list[Missing]:
    """The stages of the chain that are not done; none where the run is of another kind, such as a self-training."""
    done = {step.stage for step in steps if step.state == "done"}
    if not done & set(CHAIN) and steps:
        return []
    needed = [stage for stage in CHAIN if stage not in done]
    later = [place for place, stage in enumerate(CHAIN) if stage in done]
    # What comes before the first stage that is done was brought from elsewhere.
    first = min(later, default=0)
    return [
        Missing(stage, WORDS[stage], in_words(run, stage, NEXT[stage]))
        for stage in needed
        if CHAIN.index(stage) > first
    ]


def total_time(run: Path) -> str:
    """How long all steps took together."""
    folders = {row.folder for stage, row in STAGES.items() if stage != "report"}
    return in_time(sum(record["seconds"] for folder in folders for record in records(run / folder).values()))


def in_bytes(count: int) -> str:
    """A size as people say it: 812 B, 1.2 MB."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 100 else f"{size:.0f} {units[0]}"


def _shown(run: Path, stage: str, folder: str, name: str, record: dict[str, Any], works: bool) -> StepShown:
    state = "stopped" if record["state"] == "running" and not works else record["state"]
    outputs = record["outputs"].items()
    return StepShown(
        stage,
        "" if name == stage else name,
        WORDS.get(stage, ""),
        state,
        record.get("error") or "",
        str(record.get("started", ""))[:16].replace("T", " "),
        in_time(record["seconds"]),
        _speed(run / folder, stage),
        record.get("device", ""),
        _settings(stage, record["config"]),
        [Made(file, in_bytes(facts["bytes"]), facts["sha256"][:DIGITS]) for file, facts in outputs],
        _facts(record.get("result")),
        list(record.get("broken") or []),
        ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items()),
    )


def _speed(folder: Path, stage: str) -> str:
    rates = sorted(row["images_per_second"] for row in read_metrics(folder) if "images_per_second" in row)
    return f"{rates[len(rates) // 2]:,.0f} images a second" if rates and stage in ("pretext", "retrain") else ""


def _settings(stage: str, config: dict[str, Any]) -> list[Setting]:
    """Those that differ from the defaults first; a setting that is gone has no meaning any more."""
    known = {field.name: field for field in dataclasses.fields(settings(stage))} if stage in STAGES else {}
    found = []
    for name, value in config.items():
        if name in HIDDEN:
            continue
        field = known.get(name)
        meaning = str(field.metadata["help"]) if field else ""
        found.append(Setting(name.replace("_", "-"), _value(value), meaning, field is None or value != field.default))
    return sorted(found, key=lambda one: not one.changed)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _facts(result: Any) -> list[tuple[str, str]]:
    """The numbers and words among what a step says of itself."""
    if not isinstance(result, dict):
        return []
    flat: dict[str, Any] = {}
    for name, value in result.items():
        if isinstance(value, dict):
            flat |= {f"{name} {key}": one for key, one in value.items()}
        else:
            flat[name] = value
    plain = {name: value for name, value in flat.items() if isinstance(value, str | int | float) and value != ""}
    return [(name.replace("_", " "), _value(value)) for name, value in plain.items()]
