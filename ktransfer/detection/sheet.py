"""What a training is shown: augmented images with their boxes or masks, as one image."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from ktransfer import files
from ktransfer.data.loader import ImageLoader
from ktransfer.detection import geometry, masks
from ktransfer.detection.data import Detection
from ktransfer.detection.losses import truth
from ktransfer.detection.strengths import Boxed, augment

COLUMNS = 4


def draw_augmented(
    path: Path, data: Detection, source: ImageLoader, strength: str, seed: int, rows: Tensor, maps: Tensor | None = None
) -> None:
    """Write images as they are and, below each row of them, as epochs 0 and 1 show them (PNG).

    Args:
        rows: (n,) int64, n > 0, of `data` and of `source`, which can be read.
        seed: that of the training.
        maps: (n, s, s) uint8, drawn in place of boxes.
    """
    pixels = source.batch(rows)[0].cpu()
    known = truth(data, source.size, torch.device("cpu"))
    most = max([1, *(len(known.boxes[row]) for row in rows.tolist())])
    boxes, kept = torch.zeros(len(rows), most, 4), torch.zeros(len(rows), most, dtype=torch.bool)
    for place, row in enumerate(rows.tolist()):
        own = known.boxes[row]
        boxes[place, : len(own)], kept[place, : len(own)] = own, True
    plain = Boxed(pixels, known.extents[rows], boxes, kept & (maps is None))
    moves = [(plain, geometry.identity(len(rows))), *(augment(plain, strength, rows, seed, epoch) for epoch in (0, 1))]
    shown = [batch for batch, _ in moves]
    if maps is not None:
        shown = [
            batch._replace(pixels=_painted(batch.pixels, masks.moved(maps, moved, plain.extents, batch.extents)))
            for batch, moved in moves
        ]
    tiles: list[Tensor] = []
    for start in range(0, len(rows), COLUMNS):
        for batch in shown:
            tiles += [_drawn(batch, place) for place in range(start, min(start + COLUMNS, len(rows)))]
            tiles += [torch.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    grid = make_grid(torch.stack(tiles), nrow=COLUMNS, padding=4)
    files.write_whole(path, lambda part: to_pil_image(grid).save(part, format="PNG"))


def _painted(pixels: Tensor, maps: Tensor) -> Tensor:
    """(b, 3, s, s) uint8 with the colours of (b, s, s) masks half over them, but for the background."""
    colours = torch.from_numpy(masks.colours())[maps.long()].permute(0, 3, 1, 2)
    return torch.where(maps[:, None] > 0, pixels // 2 + colours // 2, pixels)


def _drawn(batch: Boxed, place: int) -> Tensor:
    """(3, s, s) uint8 with the boxes of one image; where the canvas holds no image it is black."""
    side = batch.pixels.shape[-1]
    middle = torch.arange(side) + 0.5
    width, height = batch.extents[place]
    pixels: Tensor = batch.pixels[place] * ((middle < height)[:, None] & (middle < width))
    boxes = batch.boxes[place][batch.kept[place]]
    if not len(boxes):
        return pixels
    drawn: Tensor = draw_bounding_boxes(pixels, boxes, colors="yellow", width=max(1, side // 160))
    return drawn
