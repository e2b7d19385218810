"""What a protocol needs to learn from and to judge by, in images that can be read (`ktransfer.data.enough`)."""

from collections.abc import Hashable
from functools import partial

from ktransfer.data.dataset import Dataset
from ktransfer.data.enough import LEARNED, TEST, TRAIN, need, need_kinds
from ktransfer.detection.data import Detection
from ktransfer.detection.enough import need_boxes, need_pixels

from .config import EvalConfig
from .learners.probe import hold_out


def labelled(splits: tuple[Dataset, Dataset], config: EvalConfig) -> None:
    """Two labels to learn, and an image to judge by.

    Raises:
        UsageError: one line.
    """
    train, test = splits
    need_kinds(train, range(len(train)), partial(_label, train), TRAIN)
    rows = range(len(test)) if test.tags is None else (test.tags == 1).any(1).nonzero()[0]
    need(test, rows, 1, TEST if test.tags is None else f"{TEST} with a label")


def held_out(splits: tuple[Dataset, Dataset], config: EvalConfig, share: float, learned: int = 1) -> None:
    """`labelled`, an image among those that are held out to choose by, and `learned` among the others.

    Raises:
        UsageError: one line.
    """
    labelled(splits, config)
    train = splits[0]
    learning, held = (part.numpy() for part in hold_out(len(train), share, config.seed))
    need(train, learning, learned, f"{TRAIN} beside those that are held out")
    chosen = held if train.tags is None else held[(train.tags[held] == 1).any(1)]
    with_label = "" if train.tags is None else " with a label"
    need(train, chosen, 1, f"{TRAIN}{with_label} that are held out ({share:.0%}) to choose by")


def tuned(splits: tuple[Dataset, Dataset], config: EvalConfig, share: float) -> None:
    """`held_out` for networks that learn, maybe with batch norm.

    Raises:
        UsageError: one line.
    """
    held_out(splits, config, share, LEARNED)
    need(splits[1], range(len(splits[1])), LEARNED, TEST)


def boxed(splits: tuple[Detection, Detection], config: EvalConfig) -> None:
    """Images with a box to learn from, and one to judge by.

    Raises:
        UsageError: one line.
    """
    need_boxes(*splits, config.canvas)


def masked(splits: tuple[Detection, Detection], config: EvalConfig) -> None:
    """Images with a pixel of known class, to learn from and to judge by.

    Raises:
        UsageError: one line.
    """
    need_pixels(*splits, config.canvas)


def _label(data: Dataset, row: int) -> Hashable:
    return int(data.targets[row]) if data.tags is None else (data.tags[row] == 1).tobytes()
