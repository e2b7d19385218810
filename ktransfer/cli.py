"""The front door: `ktransfer --run RUN STAGE [options] STAGE [options] ...`.

The stages of a line are first all checked, then carried out one after the other. Rooms are imported only
when they are called.
"""

import dataclasses
import errno
import importlib
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ktransfer import __version__
from ktransfer.config import build, kind, read_toml
from ktransfer.errors import KTransferError, Reply, Stopped, UsageError
from ktransfer.stages import (
    STAGES,
    Call,
    complete,
    function,
    inherit_data,
    plan,
    refuse_changes,
    servant,
    settings,
    with_table,
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LAST_WORDS = 1.0  # seconds: torchrun stops all processes when one ends, and the first is to say why before
STOPPED = "stopped; nothing is lost. This goes on where it was: ktransfer"


@click.group(chain=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="ktransfer")
@click.option(
    "--run", "run_folder", type=click.Path(path_type=Path), help="The run folder: all stages read and write it."
)
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="Settings of any stage, as TOML; flags beat it."
)
@click.option("--recipe", help="Settings that come with ktransfer: paper or laptop.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(run_folder: Path | None, file: Path | None, recipe: str | None, debug: bool) -> None:
    """Turn what a large network learned without labels into a small one, and measure how much came across.

    Stages chain in one line, each taking from the run what it is not given:

    \b
      ktransfer --run runs/mine  pretext --data IMAGES  cluster --k 200  retrain --arch alexnet  eval --labelled ROOT
    """


@cli.result_callback()
def carry_out(
    calls: list[Call | None], run_folder: Path | None, file: Path | None, recipe: str | None, debug: bool
) -> int:
    """Check all stages of the line, then run them in order; the exit code.

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
            return distributed.serve(servant)
        with distributed.leading():
            _carry_out(wanted, run_folder, file, recipe)
    return 0


def _carry_out(calls: list[Call], run_folder: Path, file: Path | None, recipe: str | None) -> None:
    wanted = calls
    tables = _tables(file, recipe)
    wanted = [(stage, with_table(stage, tables.get(stage, {}), given)) for stage, given in wanted]
    inherit_data(wanted)
    wanted = complete(wanted, run_folder, tables)
    for stage, given in wanted:
        images = Path(given.get("data") or ".")
        if given.get("data") and images.is_dir() and run_folder.resolve().is_relative_to(images.resolve()):
            raise UsageError(f"--run {run_folder}: lies inside the images of {stage}, {images}; choose another folder")
    line = plan(wanted, run_folder)
    refuse_changes(line, run_folder)
    from ktransfer.run import FOLDERS, locked, read_record

    def records() -> list[Any]:
        """Of each stage of the line what its steps hold."""
        return [
            [read_record(run_folder, FOLDERS[planned.stage], part.step) for part in planned.parts] for planned in line
        ]

    before = records()
    with locked(run_folder):
        try:
            for planned in line:
                function(planned.stage)(run_folder, **planned.given)
        except KeyboardInterrupt as error:
            same = {planned.stage for planned, old, new in zip(line, before, records(), strict=True) if old == new}
            words = click.get_current_context().obj
            raise Stopped(f"{STOPPED} {_to_go_on(words, calls, same)}") from error


def _to_go_on(words: list[str], calls: list[Call], same: set[str]) -> str:
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
        for stage, table in read_toml(path, STAGES).items():
            try:
                build(settings(stage), table, f"{path.name} [{stage}]")
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
        raise UsageError(f"--recipe {name}: valid: {', '.join(names)}")
    return folder / f"{name}.toml"


def _stage_command(stage: str) -> click.Command:
    def call(**given: Any) -> Call:
        return stage, {name: value for name, value in given.items() if value is not None}

    config = settings(stage)
    # The stage's own options come before those that all stages share.
    fields = sorted(dataclasses.fields(config), key=lambda field: field.name not in vars(config)["__annotations__"])
    options = [_flag(field) for field in fields]
    return click.Command(stage, callback=call, params=list(options), help=config.__doc__)


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


for _stage in STAGES:
    cli.add_command(_stage_command(_stage))


@cli.command()
@click.option("--count", default=701, show_default=True, help="How many permutations.")
@click.option("--min-distance", default=3, show_default=True, help="Smallest Hamming distance between two of them.")
@click.option("--seed", default=0, show_default=True, help="The set is a function of it.")
@click.option(
    "--read", "source", type=click.Path(path_type=Path), help="Describe this .bin file instead of making a set."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the set in the authors' .bin layout.")
def perms(count: int, min_distance: int, seed: int, source: Path | None, out: Path | None) -> None:
    """Make or read a set of permutations of nine tiles, and describe it."""
    from ktransfer.pretext import permutations

    found = permutations.from_file(source) if source else permutations.generate(count, min_distance, seed)
    facts = permutations.summarise(found)
    if out:
        try:
            permutations.write(out, found)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise UsageError(f"--out {out}: cannot be written ({error.strerror}); choose another place") from error
    click.echo(f"{facts.count} permutations of {facts.tiles} tiles")
    click.echo(f"Hamming distance: min {facts.min_distance}, mean {facts.mean_distance:.4f}")
    click.echo("pairs at each distance: " + ", ".join(f"{key}: {value}" for key, value in facts.histogram.items()))
    click.echo(f"sha256 {facts.sha256}")
    if out:
        click.echo(f"written to {out}")


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="An empty or new folder.")
@click.option("--images", default=2000, show_default=True, help="Images of the training part; val gets a quarter.")
@click.option("--size", default=128, show_default=True, help="Side of an image in pixels.")
@click.option("--seed", default=0, show_default=True, help="The images are a function of it.")
def scenes(out: Path, images: int, size: int, seed: int) -> None:
    """Write the embedded data set as class folders and as COCO json with boxes and polygons."""
    from ktransfer.data.scenes import write_scenes

    write_scenes(out, images, size, seed)
    click.echo(f"written to {out}: train/, val/, train.json, val.json")


@cli.command()
@click.option("--data", required=True, help="Images: a folder, a list of paths (.txt, .csv), a pack, or scenes:.")
@click.option("--size", default=256, show_default=True, help="Short side in pixels; nothing is enlarged or cropped.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file, *.h5.")
@click.option("--raw", is_flag=True, help="Store uint8 pixels instead of JPEGs: larger, but nothing to decode.")
@click.option("--quality", type=click.IntRange(1, 100), help="Quality of the JPEGs.  [default: 90]")
@click.option("--workers", default=0, type=click.IntRange(0, 256), show_default=True, help="Processes; 0: one a core.")
@click.option(
    "--max-broken",
    default=0.01,
    type=click.FloatRange(0, 1),
    show_default=True,
    help="Largest share of broken images that is borne; their rows stay.",
)
def pack(data: str, size: int, out: Path, raw: bool, quality: int | None, workers: int, max_broken: float) -> None:
    """Make all images small once, into one file that every --data takes; interrupted, it goes on where it was."""
    from ktransfer.data.pack import pack as make

    make(data, out, size, raw, quality, workers, max_broken)


class _Alone(click.Command):
    """A command whose options may follow its argument: in a chain, they would be taken for the next command."""

    def make_context(self, *given: Any, **extra: Any) -> click.Context:
        """As click's, but for that."""
        return super().make_context(*given, **extra | {"allow_interspersed_args": True, "allow_extra_args": False})


@cli.command(cls=_Alone)
@click.argument("part", type=click.Choice(["decode", "data", "step", "extract", "retrain"]))
@click.option("--data", help="Images: a folder, a list of paths, a pack, or scenes:; made JPEGs when not given.")
@click.option("--arch", help="The network.  [default: vgg16; retrain: alexnet]")
@click.option("--width", default=1.0, type=click.FloatRange(0.05, 4), show_default=True, help="Scales all channels.")
@click.option("--size", default=0, type=click.IntRange(0, 2048), help="Side in pixels; 0: the stage's usual one.")
@click.option("--batch", default=0, type=click.IntRange(0), help="Images a step; 0: 256, without a GPU 16.")
@click.option("--task", default="jigsawpp", show_default=True, help="The pretext task of data and step.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), show_default=True)
@click.option("--workers", default=0, type=click.IntRange(0, 256), help="Threads that read images; 0: one a core.")
@click.option("--seconds", default=5.0, type=click.FloatRange(0.1), show_default=True, help="For each measurement.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write all numbers here.")
def bench(part: str, **given: Any) -> None:
    """Measure a part of the way from images to gradients, alone and together, beside what the machine could do.

    decode: images to squares. data: to what the network takes. step: a pretext step. extract: features. retrain: a
    step of the target network. Nothing is written but --json.
    """
    from ktransfer.bench.measure import command

    click.echo(command(part, **given))


@cli.command()
@click.option(
    "--recipe", type=click.Path(path_type=Path), required=True, help="A TOML file; see docs/reference/self-training.md."
)
@click.option("--run", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
def study(recipe: Path, run: Path) -> None:
    """Self-training in every cell of a grid, skipping what is done, with one table at the end."""
    from ktransfer import distributed
    from ktransfer.retrain.selftraining.study import study as carry_out

    if distributed.is_leader():
        carry_out(recipe, run)


@cli.command()
def doctor() -> None:
    """Print versions, devices and what is missing; try torch and faiss once."""
    from ktransfer.doctor import report

    click.echo(report())


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder.")
@click.option(
    "--images", default=2000, type=click.IntRange(100), show_default=True, help="Images of the training part."
)
def demo(out: Path, images: int) -> None:
    """The whole chain on the embedded data set, with a table at the end: about ten minutes on two cores."""
    from ktransfer.demo import run_demo

    run_demo(out, images)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; every error is one line, exit code 2 for misuse and 1 for failure."""
    words = sys.argv[1:] if argv is None else argv
    show: Callable[[], None] = traceback.print_exc if "--debug" in words else lambda: None
    try:
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
        remedy = "make room and give the same command again" if error.errno in FULL else "give the same command again"
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        return _fail(f"{what}; finished stages are whole: {remedy}", 1)
    except Exception as error:  # the last resort: one line instead of a traceback
        show()
        return _fail(f"unexpected {type(error).__name__}: {error}; --debug shows where; please report it", 1)


def _fail(message: str, code: int) -> int:
    from ktransfer import distributed

    if not distributed.is_leader():
        time.sleep(LAST_WORDS)
        return code
    for line in message.splitlines():
        click.echo(f"ktransfer: {line}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
