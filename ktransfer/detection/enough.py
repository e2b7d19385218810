"""What a detector or a segmenter needs to learn from and to be judged by, in images that can be read."""

from collections.abc import Callable

from ktransfer.data.enough import LEARNED, TEST, TRAIN, look, refuse
from ktransfer.data.loader import CPU
from ktransfer.detection import canvas
from ktransfer.detection.data import Detection
from ktransfer.detection.masks import IGNORE, classes_of_pixels


def need_boxes(train: Detection | None, test: Detection, size: int) -> None:
    """Refuse where no image with a box can be read, to learn from (where something is trained) or to judge by.

    Args:
        size: of the canvases, pixels.

    Raises:
        UsageError: one line.
    """
    if train is not None:
        read = _on_canvas(train, size)
        boxed = [row for row, one in enumerate(train.objects) if (~one.crowd).any()]
        refuse(train, look(train, boxed, 1, read), 1, f"{TRAIN} with a box")
        refuse(train, look(train, range(len(train)), LEARNED, read), LEARNED, TRAIN)
    counted = [row for row, one in enumerate(test.objects) if (~(one.crowd | one.difficult)).any()]
    refuse(test, look(test, counted, 1, _on_canvas(test, size)), 1, f"{TEST} with a box")


def need_pixels(train: Detection, test: Detection, size: int) -> None:
    """Refuse where no image with a pixel of known class can be read, to learn from or to judge by.

    Args, raises: as for `need_boxes`.
    """
    for split, what, least in ((train, TRAIN, LEARNED), (test, TEST, 1)):
        found = look(split, range(len(split)), least, _known(split, size))
        refuse(split, found, least, what, "can be read and have a pixel of known class")


def _known(data: Detection, size: int) -> Callable[[int], bool]:
    read = _on_canvas(data, size)
    return lambda row: read(row) and bool((classes_of_pixels(data, row) != IGNORE).any())


def _on_canvas(data: Detection, size: int) -> Callable[[int], bool]:
    """What reads an image as a training does: one of other sides than its boxes are for is broken."""
    placed = canvas.canvases(data, size, 1, "off", CPU).dataset

    def read(row: int) -> bool:
        placed.read(row, None)
        return True

    return read
