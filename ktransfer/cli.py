"""The front door: `ktransfer --run RUN STAGE [options] STAGE [options] ...`.

All stages of a command line are checked first, and then carried out in order. Rooms are imported only
when they are called.
"""

import errno
import importlib
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ktransfer import __version__, stages
from ktransfer.config import build, read_toml
from ktransfer.errors import KTransferError, Reply, Stopped, UsageError
from ktransfer.help import Alone, Door, add_stages
from ktransfer.stages import STAGES

if TYPE_CHECKING:
    from ktransfer.plan import Call, Plan

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(run_folder: Path | None, file: Path | None, recipe: str | None, dry_run: bool, debug: bool) -> None:
    """Turn what a large network learned without labels into a small one, and measure how much was transferred.

    Stages are chained in one line, and each takes from the run what it is not given:

    \b
      ktransfer --run runs/mine  pretext --data IMAGES  cluster --k 200  retrain --arch alexnet  eval --labelled ROOT
    """


@cli.result_callback()
def carry_out(
    calls: "list[Call | None]",
    run_folder: Path | None,
    file: Path | None,
    recipe: str | None,
    dry_run: bool,
    debug: bool,
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
    from ktransfer.run import locked

    before = [_records(one) for one in line]
    with locked(run_folder):
        try:
            plan.carry_out_line(line)
        except KeyboardInterrupt as error:
            kept = {one.stage for one, old in zip(line, before, strict=True) if _untouched(one, old)}
            words = click.get_current_context().obj
            raise Stopped(f"{STOPPED} {_to_go_on(words, wanted, kept)}") from error
    return 0


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
        for stage, table in read_toml(path, STAGES).items():
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


@cli.command()
@click.option("--count", default=701, show_default=True, help="Number of permutations.")
@click.option("--min-distance", default=3, show_default=True, help="Smallest Hamming distance between two of them.")
@click.option("--seed", default=0, show_default=True, help="Seed of the set.")
@click.option(
    "--read", "source", type=click.Path(path_type=Path), help="A .bin file to describe, instead of making a set."
)
@click.option("--out", type=click.Path(path_type=Path), help="File for the set, in the authors' .bin layout.")
def perms(count: int, min_distance: int, seed: int, source: Path | None, out: Path | None) -> None:
    """Make or read a set of permutations of nine tiles."""
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
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write, new or empty.")
@click.option(
    "--images", default=2000, show_default=True, help="Training images; the test set (val) gets a quarter as many."
)
@click.option("--size", default=128, show_default=True, help="Side of an image in pixels.")
@click.option("--seed", default=0, show_default=True, help="Seed of the images.")
def scenes(out: Path, images: int, size: int, seed: int) -> None:
    """Write the embedded data set of drawn scenes.

    It is written as class folders, and as COCO JSON files with boxes and polygons.
    """
    from ktransfer.data.scenes import write_scenes

    write_scenes(out, images, size, seed)
    click.echo(f"written to {out}: train/, val/, train.json, val.json")


@cli.command()
@click.option("--data", required=True, help="Images: a folder, a list of paths (.txt, .csv), a pack, or scenes:.")
@click.option(
    "--size",
    default=256,
    show_default=True,
    help="Short side of the stored images in pixels; none is enlarged or cropped.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The pack to write, *.h5.")
@click.option("--raw", is_flag=True, help="Store uint8 pixels instead of JPEGs: larger, but nothing to decode.")
@click.option("--quality", type=click.IntRange(1, 100), help="Quality of the JPEGs.  [default: 90]")
@click.option(
    "--workers", default=0, type=click.IntRange(0, 256), show_default=True, help="Processes; 0: one per CPU core."
)
@click.option(
    "--max-broken",
    default=0.01,
    type=click.FloatRange(0, 1),
    show_default=True,
    help="Largest share of broken images that is accepted; they keep their rows.",
)
def pack(data: str, size: int, out: Path, raw: bool, quality: int | None, workers: int, max_broken: float) -> None:
    """Resize all images once, into one file.

    Every --data option takes that file. Interrupted and called again, it goes on where it stopped.
    """
    from ktransfer.data.pack import pack as make

    make(data, out, size, raw, quality, workers, max_broken)


@cli.command()
@click.option(
    "--model",
    required=True,
    help="A model.safetensors of retrain or selftrain, a run folder: its own, or an .onnx of export.",
)
@click.option("--data", required=True, help="Images: a folder, one image, a list of paths, a pack, or scenes:.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="What to write: labels as .csv; embeddings as .npy, .h5 or .parquet; boxes and masks as .json.",
)
@click.option("--top", type=click.IntRange(1), help="With .csv: most probable labels of an image.  [default: 1]")
@click.option("--layer", help="Embeddings of this layer; list: show all.  [default: the last one]")
@click.option("--draw", type=click.Path(path_type=Path), help="Boxes and masks: a folder for the images with them.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), help="Boxes and masks: lowest score.  [default: all; drawn: 0.5]"
)
@click.option("--batch", default=64, type=click.IntRange(1), show_default=True, help="Images at once.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--workers", default=0, type=click.IntRange(0, 256), help="Threads that read images; 0: one a core.")
def predict(model: str, data: str, out: Path | None, **given: Any) -> None:
    """Label images with the target network, embed them, or find objects in them.

    The ending of --out says which: .csv has one row an image, with its key, the most probable class (or number of the
    cluster) and the probability; .json has COCO's boxes and masks; the others have a vector for each image.
    """
    from ktransfer.retrain.students.predicting import predict as carry_out

    carry_out(model, data, out, **given)


@cli.command(cls=Alone)
@click.argument("part", type=click.Choice(["decode", "data", "step", "extract", "retrain", "predict"]))
@click.option("--model", help="predict: a run, a model.safetensors or an .onnx; if not given, fresh weights of --arch.")
@click.option("--data", help="Images: a folder, a list of paths, a pack, or scenes:; if not given, generated JPEGs.")
@click.option("--arch", help="The network.  [default: vgg16; retrain, predict: alexnet]")
@click.option(
    "--width", default=1.0, type=click.FloatRange(0.05, 4), show_default=True, help="Factor on the number of channels."
)
@click.option(
    "--size", default=0, type=click.IntRange(0, 2048), help="Side of the images in pixels; 0: the stage's default."
)
@click.option("--batch", default=0, type=click.IntRange(0), help="Images per step; 0: 256, or 16 without a GPU.")
@click.option("--task", default="jigsawpp", show_default=True, help="Pretext task, for data and step.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), show_default=True)
@click.option(
    "--workers", default=0, type=click.IntRange(0, 256), help="Threads that read images; 0: one per CPU core."
)
@click.option(
    "--seconds", default=5.0, type=click.FloatRange(0.1), show_default=True, help="Length of each measurement."
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for all numbers, as JSON.")
def bench(part: str, **given: Any) -> None:
    """Measure the speed of decoding, training, feature extraction and prediction.

    Parts are measured alone and together, and compared with what the machine can do at most.

    decode: images from files to square pixels. data: everything up to the network's input. step: a pretext training
    step. extract: features. retrain: a training step of the target network. predict: the target network by torch and by
    onnxruntime, without reading. Only the file of --json is written.
    """
    from ktransfer.bench.parts import measured

    click.echo(measured(part, **given))


@cli.command()
@click.option(
    "--recipe", type=click.Path(path_type=Path), required=True, help="A TOML file; see docs/reference/self-training.md."
)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder of the study, which is made if it does not exist.",
)
def study(recipe: Path, run: Path) -> None:
    """Run self-training for every combination of a grid of settings.

    Combinations that are done are skipped; the result is one table.
    """
    from ktransfer import distributed
    from ktransfer.retrain.selftraining.study import study as carry_out

    if distributed.is_leader():
        carry_out(recipe, run)


@cli.command()
def doctor() -> None:
    """Print versions, devices and what is missing."""
    from ktransfer.doctor import report

    click.echo(report())


@cli.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="The folder to write."
)
@click.option("--images", default=2000, type=click.IntRange(100), show_default=True, help="Training images.")
def demo(out: Path, images: int) -> None:
    """Run the whole chain on the embedded data set.

    It takes about ten minutes on two cores, and ends with a table of results.
    """
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
        return _fail(f"{what}; finished stages are complete: {remedy}", 1)
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
