"""The settings of `ktransfer pretext`."""

from dataclasses import dataclass
from typing import ClassVar

from ktransfer.config import option
from ktransfer.training.options import TrainOptions


@dataclass(frozen=True)
class PretextConfig(TrainOptions):
    """Train a teacher on a task that unlabelled images provide themselves.

    Defaults are the paper's where it states them; docs/choices.md lists the others.
    """

    first: ClassVar = ("data", "arch", "width", "epochs", "lr")

    data: str | None = option(
        None,
        "images: a folder, a list of paths (.txt, .csv), a pack (.h5), shards (.tar, .parquet), or scenes:",
        execution=True,
    )
    task: str = option(
        "jigsawpp",
        "jigsawpp: puzzles with tiles of other images; jigsaw: the original puzzles; rotation: by how much an image is "
        "rotated; context: where one patch lies beside another",
        choices=("jigsawpp", "jigsaw", "rotation", "context"),
    )
    arch: str = option("vgg16", "vgg16, vgg16_bn, alexnet or alexnet_bn")
    width: float = option(1.0, "factor on the number of channels of every layer", low=0.05, high=4)
    size: int = option(
        0,
        "side of the images in pixels; 0: 255 (rotation, context: 256), or less where the images are smaller",
        low=0,
        high=2048,
    )
    tile: int = option(
        0, "side of a tile in pixels; 0: 3/4 of a cell (rotation: 7/8 of the image, context: 2/9 of it)", low=0
    )
    permutations: int = option(701, "number of permutations, which are the classes of a puzzle", low=2)
    min_distance: int = option(3, "smallest Hamming distance between two permutations", low=1, high=9)
    permutation_file: str | None = option(
        None, "a file of permutations (the authors' .bin layout) to use instead", execution=True
    )
    colour: str = option(
        "paper",
        "how colours are hidden. jigsawpp: 70 % of the images grey; released: 50 % grey, 25 % projected. jigsaw: 30 % "
        "grey; released: none, and no shift of channels. context: paper keeps one channel of each patch, projected "
        "removes the axis from green to magenta. Not for rotation",
        choices=("paper", "released", "projected"),
    )
    limit: int = option(0, "use the first N images of a seeded random order; 0: all", low=0)
    held_out: float = option(
        0.05, "share of the images that are not trained on, and measure the accuracy", low=0, high=0.5
    )
    overfit: int = option(0, "self-test: overfit N images, which a working set-up solves completely, and stop", low=0)
    overwrite: bool = option(False, "remove what the stage has made, and make it again", execution=True)
