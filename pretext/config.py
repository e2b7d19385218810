"""What `ktransfer pretext` can be told."""

from dataclasses import dataclass

from ktransfer.config import option
from ktransfer.training.options import TrainOptions


@dataclass(frozen=True)
class PretextConfig(TrainOptions):
    """Train a teacher on puzzles cut from unlabelled pictures.

    Where the paper is known, the defaults are its own; docs/choices.md lists the rest.
    """

    data: str | None = option(None, "pictures: a folder, a list of paths (.txt, .csv), or scenes:", execution=True)
    task: str = option("jigsawpp", "the puzzle: with foreign tiles, or the original", choices=("jigsawpp", "jigsaw"))
    arch: str = option("vgg16", "vgg16, vgg16_bn, alexnet or alexnet_bn")
    width: float = option(1.0, "scales all channels", low=0.05, high=4)
    size: int = option(0, "side of the puzzle in pixels; 0: 255, or what the pictures have if less", low=0, high=2048)
    tile: int = option(0, "side of a tile in pixels; 0: 3/4 of a cell", low=0)
    permutations: int = option(701, "number of permutations, which are the classes", low=2)
    min_distance: int = option(3, "smallest Hamming distance between two permutations", low=1, high=9)
    permutation_file: str | None = option(
        None, "take them from this file (the authors' .bin layout) instead", execution=True
    )
    colour: str = option(
        "paper",
        "jigsawpp as in the paper: 70 % grey; released: 50 % grey, 25 % projected. jigsaw: 30 % grey; released: none, "
        "and no shift of channels",
        choices=("paper", "released"),
    )
    limit: int = option(0, "use the first N pictures of a seeded order; 0: all", low=0)
    held_out: float = option(0.05, "share of the pictures kept for measuring puzzle accuracy", low=0, high=0.5)
    overfit: int = option(0, "self-test: learn one puzzle of each of N pictures by heart, then stop", low=0)
    overwrite: bool = option(False, "make the stage again", execution=True)
