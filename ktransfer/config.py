"""Settings: frozen dataclasses beside the code that they configure, filled from flags, a TOML file and defaults.

This module and the dataclasses import nothing heavy, so that the command line can show its help at once.
"""

import dataclasses
import difflib
import math
import shlex
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ktransfer.errors import UsageError

Config = TypeVar("Config")


def option(
    default: Any,
    help: str,  # noqa: A002 (the word that users of click know)
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    execution: bool = False,
    of: tuple[str, ...] = (),
    before: Any = None,
) -> Any:
    """A field of a stage's settings.

    `execution` marks what a resume may change: what cannot change results beyond float rounding (workers, device), and
    paths, whose contents are compared instead. `of` names the only parts of the stage that read it: a change of it
    leaves the others as they are (see `settings_of`). `before` is what a step was made with whose record is older than
    the setting.
    """
    if of:
        help = f"{', '.join(of)}: {help}"  # noqa: A001
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "low": low,
            "high": high,
            "execution": execution,
            "of": of,
            "before": before,
        },
    )


def narrowed(parent: Any, name: str, of: tuple[str, ...]) -> Any:
    """A field of a parent class of settings that only those parts of the stage read."""
    field = next(field for field in dataclasses.fields(parent) if field.name == name)
    return option(field.default, field.metadata["help"], **_limits(field), of=of)


def read_by(config: Any, parts: "typing.Iterable[str]") -> set[str]:
    """The names of the settings that any of these parts of a stage reads; `config` is a dataclass or one's value."""
    wanted = set(parts)
    fields = dataclasses.fields(config)
    return {field.name for field in fields if not field.metadata["of"] or wanted & set(field.metadata["of"])}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Some of a stage's settings: `values` by name, the names of those that can change `results`, and what each was
    `before` there was such a setting."""

    values: Mapping[str, Any]
    results: frozenset[str]
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def settings_of(config: Any, part: str) -> Settings:
    """The settings that one part of a stage reads."""
    return chosen_settings(config, read_by(config, (part,)))


def chosen_settings(config: Any, names: "typing.Iterable[str]") -> Settings:
    """The settings of these names."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    wanted = [name for name in fields if name in set(names)]
    results = frozenset(name for name in wanted if not fields[name].metadata["execution"])
    return Settings({name: getattr(config, name) for name in wanted}, results, settings_before(config))


def all_settings(config: Any) -> dict[str, Any]:
    """The settings of a dataclass, or of `Settings`, by name."""
    return dict(config.values) if isinstance(config, Settings) else dataclasses.asdict(config)


def _limits(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    return {name: field.metadata[name] for name in ("choices", "low", "high", "execution", "before")}


def kind(field: "dataclasses.Field[Any]") -> type:
    """The plain type of a field: str, int, float or bool (`str | None` gives str)."""
    annotation = field.type
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    assert isinstance(annotation, type)
    return annotation


def build(cls: type[Config], given: Mapping[str, Any], where: str) -> Config:
    """Make the settings `cls` of `given` values.

    Raises:
        UsageError: all errors at once, one a line: unknown keys (with the nearest valid one), wrong types, values out
            of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    errors: list[str] = []
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in fields:
            shown = [field.replace("_", "-") for field in fields]
            errors.append(f"{where}: no setting '{key}'; {nearest(name, shown)}")
            continue
        value, error = _checked(fields[name], value)
        if error:
            errors.append(f"{where}: {name.replace('_', '-')} = {given[key]!r}: {error}")
        values[name] = value
    if errors:
        raise UsageError("\n".join(errors))
    return cls(**values)


def nearest(word: str, valid: "Mapping[str, Any] | typing.Iterable[str]") -> str:
    """A hint for an unknown word: the valid one that is near, else all valid ones."""
    names = [str(name) for name in valid]
    alike = {name.replace("_", "-").lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(word.replace("_", "-").lower(), alike, n=1)
    return f"did you mean '{alike[close[0]]}'?" if close else f"valid: {', '.join(sorted(names))}"


def chosen(flag: str, given: str, valid: "typing.Iterable[str]", what: str) -> list[str]:
    """The names that a flag lists, separated by commas, each once.

    Raises:
        UsageError: one of them is not valid.
    """
    names = list(dict.fromkeys(part.strip() for part in given.split(",")))
    for name in names:
        if name not in valid:
            raise UsageError(f"{flag} {name or given}: no such {what}; {nearest(name, valid)}")
    return names


def _checked(field: "dataclasses.Field[Any]", value: Any) -> tuple[Any, str | None]:
    wanted = kind(field)
    if value is None:
        return None, None if field.default is None else f"needs a value of type {wanted.__name__}"
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.generic):
        value = value.item()  # a number of numpy is one as any other; what did not import it has none
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is str and isinstance(value, Path):
        value = str(value)
    if type(value) is not wanted:
        return value, f"needs a value of type {wanted.__name__}"
    if isinstance(value, float) and not math.isfinite(value):
        return value, "must be a finite number"
    choices, low, high = (field.metadata[name] for name in ("choices", "low", "high"))
    if choices and value not in choices:
        return value, f"must be one of {', '.join(choices)}"
    if low is not None and value < low:
        return value, f"must be at least {low}"
    if high is not None and value > high:
        return value, f"must be at most {high}"
    return value, None


def result_settings(config: Any) -> dict[str, Any]:
    """Those of a dataclass, or of `Settings`, that can change results."""
    if isinstance(config, Settings):
        return {name: value for name, value in config.values.items() if name in config.results}
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.metadata["execution"]
    }


def settings_before(config: Any) -> dict[str, Any]:
    """What a step was made with, by name, whose record does not have the setting yet."""
    if isinstance(config, Settings):
        return dict(config.before)
    return {field.name: field.metadata["before"] for field in dataclasses.fields(config)}


def in_words(run: "str | Path", stage: str, options: Mapping[str, Any]) -> str:
    """The command that does the same as a stage called with these options."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", shlex.quote(str(value))]
    return " ".join(["ktransfer", "--run", shlex.quote(str(run)), stage, *flags])


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """What a TOML file, which came by `flag`, holds.

    Raises:
        UsageError: the file is missing, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: not valid TOML: {error}") from error


def stage_tables(path: Path, stages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of a `--config` file, one per stage: {"pretext": {"epochs": 90}}.

    Raises:
        UsageError: the file is missing, is not TOML, or has a table that is no stage.
    """
    tables = read_toml(path, "--config")
    wrong = [
        f"--config {path}: no stage '{name}'; {nearest(name, stages)}"
        if name not in stages
        else f"--config {path}: '{name}' must be a table, such as [{name}]"
        for name, table in tables.items()
        if name not in stages or not isinstance(table, dict)
    ]
    if wrong:
        raise UsageError("\n".join(wrong))
    return tables
