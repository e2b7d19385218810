"""What `ktransfer pretext` can be told."""

from dataclasses import dataclass
from typing import ClassVar

from ktransfer.config import option
from ktransfer.training.options import TrainOptions


@dataclass(frozen=True)
class PretextConfig(TrainOptions):
    """Train a teacher on a task that unlabelled images set themselves.

    Where the paper is known, the defaults are its own; docs/choices.md lists the rest.
    """

    first: ClassVar = ("data", "arch", "width", "epochs", "lr")

    data: str | None = option(
        None, "images: a folder, a list of paths (.txt, .csv), a pack (.h5), or scenes:", execution=True
    )
    task: str = option(
        "jigsawpp",
        "puzzles with foreign tiles, the original puzzles, which way up an image is, or where one patch lies beside "
        "another",
        choices=("jigsawpp", "jigsaw", "rotation", "context"),
    )
    arch: str = option("vgg16", "vgg16, vgg16_bn, alexnet or alexnet_bn")
    width: float = option(1.0, "scales all channels", low=0.05, high=4)
    size: int = option(
        0,
        "side of the images in pixels; 0: 255 (rotation, context: 256), or what they have if less",
        low=0,
        high=2048,
    )
    tile: int = option(
        0, "side of a tile in pixels; 0: 3/4 of a cell (rotation: 7/8 of the image, context: 2/9 of it)", low=0
    )
    permutations: int = option(701, "number of permutations, which are the classes of a puzzle", low=2)
    min_distance: int = option(3, "smallest Hamming distance between two permutations", low=1, high=9)
    permutation_file: str | None = option(
        None, "take them from this file (the authors' .bin layout) instead", execution=True
    )
    colour: str = option(
        "paper",
        "jigsawpp as in the paper: 70 % grey; released: 50 % grey, 25 % projected. jigsaw: 30 % grey; released: none, "
        "and no shift of channels. context: paper keeps one channel of each patch, projected takes green against "
        "magenta out. rotation has none of these",
        choices=("paper", "released", "projected"),
    )
    limit: int = option(0, "use the first N images of a seeded order; 0: all", low=0)
    held_out: float = option(0.05, "share of the images kept for measuring accuracy", low=0, high=0.5)
    overfit: int = option(0, "self-test: learn what the task makes of N images by heart, then stop", low=0)
    overwrite: bool = option(False, "make the stage again", execution=True)
