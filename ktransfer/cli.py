"""The front door: `ktransfer --run RUN STAGE [options] STAGE [options] ...`.

The stages of a line are first all checked, then carried out one after the other. This is the one module that knows all
rooms, and it imports them only when they are called.
"""

import dataclasses
import errno
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ktransfer import __version__
from ktransfer.config import build, kind, read_toml
from ktransfer.errors import KTransferError, UsageError

# Stage -> (module of its settings, their class, module of its function, function, its check).
STAGES = {
    "pretext": ("ktransfer.pretext.config", "PretextConfig", "ktransfer.pretext.stage", "pretext", "check"),
    "extract": ("ktransfer.cluster.config", "ExtractConfig", "ktransfer.cluster.extraction", "extract", "check"),
    "cluster": ("ktransfer.cluster.config", "ClusterConfig", "ktransfer.cluster.stage", "cluster", "check_cluster"),
    "assign": ("ktransfer.cluster.config", "AssignConfig", "ktransfer.cluster.stage", "assign", "check_assign"),
    "retrain": ("ktransfer.retrain.config", "RetrainConfig", "ktransfer.retrain.stage", "retrain", "check"),
    "eval": ("ktransfer.eval.config", "EvalConfig", "ktransfer.eval.stage", "evaluate", "check"),
}
INHERIT_DATA = {"extract": "data", "cluster": "data", "retrain": "data", "eval": "labelled"}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Call = tuple[str, dict[str, Any]]


def settings(stage: str) -> Any:
    """The dataclass of a stage's settings; imports nothing heavy."""
    module, name, *_ = STAGES[stage]
    return getattr(importlib.import_module(module), name)


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
      ktransfer --run runs/mine  pretext --data PICTURES  cluster --k 200  retrain --arch alexnet  eval --labelled ROOT
    """


@cli.result_callback()
def carry_out(
    calls: list[Call | None], run_folder: Path | None, file: Path | None, recipe: str | None, debug: bool
) -> None:
    """Check all stages of the line, then run them in order."""
    wanted = [call for call in calls if call is not None]
    if not wanted:
        return
    if run_folder is None:
        raise UsageError(f"{wanted[0][0]}: no run folder given; name one: ktransfer --run runs/mine {wanted[0][0]} ...")
    if "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise UsageError("torchrun: several processes are not supported yet; start ktransfer itself, once")
    tables = _tables(file, recipe)
    wanted = [(stage, tables.get(stage, {}) | given) for stage, given in wanted]
    wanted = _complete(wanted, run_folder, tables)
    _inherit_data(wanted)
    for stage, given in wanted:
        pictures = Path(given.get("data") or ".")
        if given.get("data") and pictures.is_dir() and run_folder.resolve().is_relative_to(pictures.resolve()):
            raise UsageError(
                f"--run {run_folder}: lies inside the pictures of {stage}, {pictures}; choose another folder"
            )
    pending: dict[str, Any] = {}  # stage -> its settings, for the checks of the stages after it
    for stage, given in wanted:
        check = getattr(importlib.import_module(STAGES[stage][2]), STAGES[stage][4])
        checked = check(run_folder, given, pending)
        pending[stage] = checked[0] if isinstance(checked, tuple) else checked
    from ktransfer.run import locked

    with locked(run_folder):
        for stage, given in wanted:
            getattr(importlib.import_module(STAGES[stage][2]), STAGES[stage][3])(run_folder, **given)


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


def _inherit_data(wanted: list[Call]) -> None:
    """Pictures named once in a line serve the stages after."""
    latest: str | None = None
    for stage, given in wanted:
        if given.get("data"):
            latest = given["data"]
        if latest and stage in INHERIT_DATA:
            given.setdefault(INHERIT_DATA[stage], latest)


def _complete(wanted: list[Call], run: Path, tables: dict[str, dict[str, Any]]) -> list[Call]:
    """Add the stages that others run first: `assign` before `retrain`, and an `extract` that has its own settings."""
    found: list[Call] = []
    for stage, given in wanted:
        before = [name for name, _ in found]
        anew = any(name == "pretext" and options.get("overwrite") for name, options in found)
        if (
            stage == "cluster"
            and (anew or "extract" in tables)
            and "extract" not in before
            and not given.get("features")
        ):
            found.append(("extract", tables.get("extract", {}) | ({"overwrite": True} if anew else {})))
        told = "assign" in tables or "cluster" in before
        there = "assign" in before or (not told and _assigned(run))
        asks = given.get("arch") == "list"
        if stage == "retrain" and not given.get("labels") and not there and not asks:
            again = any(name == "cluster" and options.get("overwrite") for name, options in found)
            found.append(("assign", tables.get("assign", {}) | {"overwrite": again}))
        found.append((stage, given))
    return found


def _assigned(run: Path) -> bool:
    """Whether the run's pseudo-labels, of whatever pictures, belong to its centroids."""
    from ktransfer.run import input_hash, read_record

    made, centroids = read_record(run, "clusters", "assign"), run / "clusters" / "clusters.h5"
    if not made or made["state"] != "done" or not centroids.is_file():
        return False
    return bool(made["inputs"]["centroids"] == input_hash(centroids))


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
    click.echo(f"{facts.count} permutations of {facts.tiles} tiles")
    click.echo(f"Hamming distance: min {facts.min_distance}, mean {facts.mean_distance:.4f}")
    click.echo("pairs at each distance: " + ", ".join(f"{key}: {value}" for key, value in facts.histogram.items()))
    click.echo(f"sha256 {facts.sha256}")
    if out:
        permutations.write(out, found)
        click.echo(f"written to {out}")


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="An empty or new folder.")
@click.option("--images", default=2000, show_default=True, help="Pictures of the training part; val gets a quarter.")
@click.option("--size", default=128, show_default=True, help="Side of a picture in pixels.")
@click.option("--seed", default=0, show_default=True, help="The pictures are a function of it.")
def scenes(out: Path, images: int, size: int, seed: int) -> None:
    """Write the embedded data set as class folders and as COCO json with boxes and polygons."""
    from ktransfer.scenes import write_scenes

    write_scenes(out, images, size, seed)
    click.echo(f"written to {out}: train/, val/, train.json, val.json")


@cli.command()
def doctor() -> None:
    """Print versions, devices and what is missing; try torch and faiss once."""
    from ktransfer.doctor import report

    click.echo(report())


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder.")
@click.option(
    "--images", default=2000, type=click.IntRange(100), show_default=True, help="Pictures of the training part."
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
        result = cli.main(args=words, prog_name="ktransfer", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except KTransferError as error:
        show()
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        again = shlex.join(word for word in words if word != "--overwrite")
        return _fail(f"stopped; nothing is lost. This goes on where it was: ktransfer {again}", 130)
    except OSError as error:
        show()
        remedy = "make room and give the same command again" if error.errno in FULL else "give the same command again"
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        return _fail(f"{what}; finished stages are whole: {remedy}", 1)
    except Exception as error:  # the last resort: one line instead of a traceback
        show()
        return _fail(f"unexpected {type(error).__name__}: {error}; --debug shows where; please report it", 1)


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        click.echo(f"ktransfer: {line}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
