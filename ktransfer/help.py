"""How the command line shows itself: commands by use and in order, options by group, flags out of settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import click

from ktransfer.config import kind
from ktransfer.stages import STAGES, settings
from ktransfer.training.options import MachineOptions, TrainOptions

SECTIONS = {
    "Stages, in the order in which they are chained": (
        "pretext",
        "extract",
        "cluster",
        "assign",
        "retrain",
        "selftrain",
    ),
    "Evaluation": ("eval", "report"),
    "Use of the target network": ("export", "predict"),
    "Tools": ("status", "study", "demo", "pack", "scenes", "perms", "bench", "doctor"),
}
FIRST = "Most used"
OWN = "Other options of this stage"
PARTS = "For the parts of this stage that are named first"
TRAINING = "Training"
MACHINE = "Machine"
GROUPS = (FIRST, OWN, PARTS, TRAINING, MACHINE)


class Door(click.Group):
    """The group of all commands, which lists them by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used; what no section names comes last."""
        order = [name for names in SECTIONS.values() for name in names]
        return [name for name in order if name in self.commands] + sorted(self.commands.keys() - set(order))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list for each section."""
        for title, names in SECTIONS.items():
            rows = [(name, self.commands[name].get_short_help_str(90)) for name in names if name in self.commands]
            with formatter.section(title):
                formatter.write_dl(rows)


class StageCommand(click.Command):
    """A command whose options are listed by group: `groups` is flag -> group."""

    def __init__(self, *given: Any, groups: dict[str, str], **more: Any) -> None:
        super().__init__(*given, **more)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list for each group."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            if (row := parameter.get_help_record(ctx)) is not None:
                rows[self.groups.get(str(parameter.name), OWN)].append(row)
        for group, found in rows.items():
            if found:
                with formatter.section(group):
                    formatter.write_dl(found)


class Alone(click.Command):
    """A command whose options may follow its argument: in a chain, they would be taken for the next command."""

    def make_context(self, *given: Any, **extra: Any) -> click.Context:
        """As click's, but for that."""
        return super().make_context(*given, **extra | {"allow_interspersed_args": True, "allow_extra_args": False})


def stage_command(stage: str) -> click.Command:
    """The command of a stage: calling it gives the stage's name and what was given."""

    def call(**given: Any) -> tuple[str, dict[str, Any]]:
        return stage, {name: value for name, value in given.items() if value is not None}

    config = settings(stage)
    groups = {field.name: _group(config, field) for field in dataclasses.fields(config)}
    first: Sequence[str] = config.first
    fields = sorted(
        dataclasses.fields(config),
        key=lambda field: (
            first.index(field.name) if field.name in first else len(first) + GROUPS.index(groups[field.name])
        ),
    )
    options: list[click.Parameter] = [_flag(field) for field in fields]
    return StageCommand(stage, callback=call, params=options, help=config.__doc__, groups=groups)


def _group(config: Any, field: "dataclasses.Field[Any]") -> str:
    if field.name in config.first:
        return FIRST
    for group, parent in ((MACHINE, MachineOptions), (TRAINING, TrainOptions)):
        if field.name in {one.name for one in dataclasses.fields(parent)}:
            return group
    return PARTS if field.metadata["of"] else OWN


def _flag(field: "dataclasses.Field[Any]") -> click.Option:
    name = field.name.replace("_", "-")
    wanted = kind(field)
    text = str(field.metadata["help"])
    choices = field.metadata["choices"]
    if wanted is bool:
        shown = f"--{name}" if field.name == "overwrite" else f"--{name}/--no-{name}"
        default = "" if field.name == "overwrite" else f"  [default: {'on' if field.default else 'off'}]"
        return click.Option([shown], default=None, is_flag=True, help=text + default)
    default = "" if field.default is None else f"  [default: {field.default}]"
    kind_of: Any = click.Choice(choices) if choices else wanted
    return click.Option([f"--{name}"], type=kind_of, default=None, help=text + default)


def add_stages(door: click.Group) -> None:
    """All stages as commands of the group."""
    for stage in STAGES:
        door.add_command(stage_command(stage))
