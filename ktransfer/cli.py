"""The front door: `ktransfer --run RUN STAGE [options] STAGE [options] ...`.

All stages of a command line are checked first, and then carried out in order. Rooms are imported only
when they are called.
"""

import contextlib
import importlib
import io
import itertools
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ktransfer import __version__, stages
from ktransfer.config import build, stage_tables
from ktransfer.errors import KTransferError, Reply, Stopped, UsageError, remedy, why
from ktransfer.help import Door, add_stages
from ktransfer.machine import keep_streams
from ktransfer.stages import STAGES
from ktransfer.tools import TOOLS

if TYPE_CHECKING:
    from ktransfer.plan import Call, Plan

NO_THREAD = "start new thread"  # of Python and of OpenMP, where the address space is limited
LAST_WORDS = 1.0  # seconds: torchrun stops all processes when one ends, and the first is to say why before
STOPPED = "stopped; nothing is lost. To continue: ktransfer"


@click.group(cls=Door, chain=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="ktransfer")
@click.option(
    "--run", "run_folder", type=click.Path(path_type=Path), help="The run folder, which all stages read and write."
)
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="Settings of any stages, as TOML; options of the command line take precedence.",
)
@click.option("--recipe", help="Settings that come with ktransfer: paper, laptop or small.")
@click.option("--dry-run", is_flag=True, help="Check all stages and show what each would do, without doing it.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: a line of JSON on stderr for every message, and every five seconds for what a bar shows.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(log_format: str, **_: Any) -> None:
    """Turn what a large network learned without labels into a small one, and measure how much was transferred.

    Stages are chained in one line, and each takes from the run what it is not given:

    \b
      ktransfer --run runs/mine  pretext --data IMAGES  cluster --k 200  retrain --arch alexnet  eval --labelled ROOT
    """
    if log_format == "json":
        from ktransfer import progress

        progress.speak_json(True)


@cli.result_callback()
def carry_out(
    calls: "list[Call | None]",
    run_folder: Path | None,
    file: Path | None,
    recipe: str | None,
    dry_run: bool,
    **_: Any,
) -> int:
    """Plan all stages of the line, then carry out the plans in order; the exit code.

    Under torchrun the first process does, and the others serve it.
    """
    wanted = [call for call in calls if call is not None]
    if not wanted:
        return 0
    if run_folder is None and wanted[0][1].get("compare"):
        run_folder = Path(wanted[0][1]["compare"].partition(",")[0])
    if run_folder is None:
        raise UsageError(f"{wanted[0][0]}: no run folder given; name one: ktransfer --run runs/mine {wanted[0][0]} ...")
    from ktransfer import distributed

    with distributed.joined():
        if not distributed.is_leader():
            return distributed.serve(stages.servant)
        with distributed.leading():
            return _lead(wanted, run_folder, _tables(file, recipe), dry_run)


def _lead(wanted: "list[Call]", run_folder: Path, tables: dict[str, dict[str, Any]], dry_run: bool) -> int:
    from ktransfer import plan

    line = plan.plan_line(wanted, run_folder, tables)
    _refuse_among_images(line, run_folder)
    if dry_run:
        click.echo(plan.described(line))
        return int(any(one.what == "is refused" for one in plan.outlooks(line))) * UsageError.exit_code
    plan.refuse_changes(line)
    before = [_records(one) for one in line]
    with contextlib.nullcontext() if all(STAGES[one.stage].aside for one in line) else _alone(line, run_folder):
        try:
            plan.carry_out_line(line)
        except KeyboardInterrupt as error:
            kept = {one.stage for one, old in zip(line, before, strict=True) if _untouched(one, old)}
            words = click.get_current_context().obj
            raise Stopped(f"{STOPPED} {_to_go_on(words, wanted, kept)}") from error
    return 0


@contextlib.contextmanager
def _alone(line: "list[Plan]", run_folder: Path) -> Iterator[None]:
    """Keep others out of the run, and tell `status` what works in it."""
    from ktransfer import progress
    from ktransfer.run import PROGRESS, locked

    with locked(run_folder), progress.kept_in(run_folder / PROGRESS, [one.stage for one in line]):
        yield


def _refuse_among_images(line: "list[Plan]", run_folder: Path) -> None:
    for one in line:
        images = Path(one.images.spec) if one.images is not None else None
        if images and images.is_dir() and run_folder.resolve().is_relative_to(images.resolve()):
            raise UsageError(
                f"--run {run_folder}: is inside the image folder of {one.stage}, {images}; choose another folder"
            )


def _records(planned: "Plan") -> list[Any]:
    from ktransfer.run import read_record

    return [read_record(planned.run, planned.folder, step.name) for step in planned.steps]


def _untouched(planned: "Plan", old: list[Any]) -> bool:
    """Whether `--overwrite` has removed nothing of a stage yet, or still has something to remove."""
    same = [one == other for one, other in zip(old, _records(planned), strict=True)]
    return any(same) if planned.stepwise else all(same)


def _to_go_on(words: list[str], calls: "list[Call]", same: set[str]) -> str:
    """The command that goes on after Ctrl-C: `--overwrite` stays for the stages that were not begun (`same`)."""
    kept = iter([stage in same for stage, given in calls if given.get("overwrite")])
    return shlex.join(word for word in words if word != "--overwrite" or next(kept, True))


def _tables(file: Path | None, recipe: str | None) -> dict[str, dict[str, Any]]:
    """The settings of `--recipe` and, over them, of `--config`; every table is checked, called for or not."""
    tables: dict[str, dict[str, Any]] = {}
    for path in (_recipe(recipe) if recipe else None, file):
        if path is None:
            continue
        errors: list[str] = []
        for stage, table in stage_tables(path, STAGES).items():
            try:
                build(stages.settings(stage), table, f"{path.name} [{stage}]")
            except UsageError as error:
                errors.append(str(error))
            tables[stage] = tables.get(stage, {}) | {key.replace("-", "_"): value for key, value in table.items()}
        if errors:
            raise UsageError("\n".join(errors))
    return tables


def _recipe(name: str) -> Path:
    folder = Path(importlib.import_module("ktransfer.recipes").__path__[0])
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in names:
        raise UsageError(f"--recipe {name}: no such recipe; give one of {', '.join(names)}")
    return folder / f"{name}.toml"


add_stages(cli)
for _tool in TOOLS:
    cli.add_command(_tool)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; every error is one line, exit code 2 for misuse and 1 for failure."""
    if argv is None:
        keep_streams()
    words = sys.argv[1:] if argv is None else argv
    show: Callable[[], None] = traceback.print_exc if "--debug" in words else lambda: None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: for names of files that are not UTF-8
    try:
        _refuse_empty(words)
        result = cli.main(args=words, prog_name="ktransfer", standalone_mode=False, obj=words)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except Reply as reply:
        click.echo(str(reply))
        return reply.exit_code
    except KTransferError as error:
        show()
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail(f"{STOPPED} {shlex.join(words)}", 130)
    except OSError as error:
        show()
        way = remedy(error, "")
        again = f"{way} and give the same command again" if way else "give the same command again"
        return _fail(f"{error.filename or 'a file'}: {why(error)}; finished stages are complete: {again}", 1)
    except Exception as error:  # the last resort: one line instead of a traceback
        show()
        if isinstance(error, MemoryError) or NO_THREAD in str(error):
            said = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no memory is left'}"
            way = "end other programs, or give a smaller --batch, fewer --workers or less --memory"
            return _fail(f"{said}; finished stages are complete: {way}, and the same command again", 1)
        return _fail(f"unexpected {type(error).__name__}: {error}; --debug shows where; please report it", 1)


def _refuse_empty(words: list[str]) -> None:
    for flag, value in itertools.pairwise([*words, "-"]):
        if flag.startswith("--") and (value == "" or flag.endswith("=")):
            name = flag.removesuffix("=")
            raise UsageError(
                f'{name} "": is empty (perhaps an unset variable of the shell); give it, or leave {name} out'
            )


def _fail(message: str, code: int) -> int:
    from ktransfer import distributed, progress

    if not distributed.is_leader():
        time.sleep(LAST_WORDS)
        return code
    for line in message.splitlines():
        click.echo(progress.in_json(error=line) if progress.speaks_json() else f"ktransfer: {line}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
