"""The commands beside the stages: tools that need no plan. Their modules are imported only when they are called."""

from pathlib import Path
from typing import Any

import click

from ktransfer.errors import FULL, UsageError, remedy, why
from ktransfer.help import Alone


@click.command()
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
            way_out = remedy(error, "choose another place")
            raise UsageError(f"--out {out}: cannot be written ({why(error)}); {way_out}") from error
    click.echo(f"{facts.count} permutations of {facts.tiles} tiles")
    click.echo(f"Hamming distance: min {facts.min_distance}, mean {facts.mean_distance:.4f}")
    click.echo("pairs at each distance: " + ", ".join(f"{key}: {value}" for key, value in facts.histogram.items()))
    click.echo(f"sha256 {facts.sha256}")
    if out:
        click.echo(f"written to {out}")


@click.command()
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


@click.command()
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


@click.command()
@click.option(
    "--model",
    required=True,
    help="A model.safetensors of retrain or selftrain, a run folder: its own, or an .onnx of export.",
)
@click.option("--data", required=True, help="Images: a folder, one image, a list of paths, a pack, shards, or scenes:.")
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
@click.option(
    "--exif",
    type=click.Choice(["obey", "ignore"]),
    help="Boxes and masks: turn images upright, or take them as they are stored.  [default: as in training]",
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


@click.command(cls=Alone)
@click.argument("part", type=click.Choice(["decode", "data", "step", "extract", "retrain", "predict"]))
@click.option("--model", help="predict: a run, a model.safetensors or an .onnx; if not given, fresh weights of --arch.")
@click.option(
    "--data", help="Images: a folder, a list of paths, a pack, shards, or scenes:; if not given, generated JPEGs."
)
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


@click.command()
@click.option(
    "--recipe", type=click.Path(path_type=Path), required=True, help="A TOML file; see docs/how-to/run-a-study.md."
)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder of the study, which is made if it does not exist.",
)
@click.option("--jobs", default=1, type=click.IntRange(1), show_default=True, help="Steps of the chain made at once.")
@click.option("--dry-run", is_flag=True, help="Show the steps of a study of the chain and how long they will take.")
def study(recipe: Path, run: Path, jobs: int, dry_run: bool) -> None:
    """Run the chain, or self-training, for every combination of a grid of settings.

    What combinations share is made once, and what is done is skipped; the result is one table.
    """
    from ktransfer import distributed
    from ktransfer.config import read_toml
    from ktransfer.study.carrying import study as of_chain

    if not distributed.is_leader():
        return
    if "selftrain" not in read_toml(recipe, "--recipe"):
        of_chain(recipe, run, jobs, dry_run)
    elif jobs > 1 or dry_run:
        raise UsageError("study: --jobs and --dry-run are for studies of the chain, not for those with [selftrain]")
    else:
        from ktransfer.retrain.selftraining.study import study as of_selftraining

        of_selftraining(recipe, run)


@click.command()
@click.option("--run", type=click.Path(path_type=Path), required=True, help="The run folder.")
def status(run: Path) -> None:
    """Show what a run holds, what works in it now, until when, and what comes next."""
    from ktransfer.status import status as report

    click.echo(report(run))


@click.command()
def doctor() -> None:
    """Print versions, devices and what is missing."""
    from ktransfer.doctor import report

    click.echo(report())


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="The folder to write."
)
@click.option("--images", default=2000, type=click.IntRange(100), show_default=True, help="Training images.")
def demo(out: Path, images: int) -> None:
    """Run the whole chain on the embedded data set.

    It takes about eleven minutes on two cores, and ends with a table of results and a page about them.
    """
    from ktransfer.demo import run_demo

    run_demo(out, images)


TOOLS = (perms, scenes, pack, predict, bench, study, status, doctor, demo)
