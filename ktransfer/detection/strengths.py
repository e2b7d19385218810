"""Augment-S1 .. S4 of Zoph et al. (docs/papers.md), on batches of canvases with their boxes.

S1 mirrors and crops; S2 adds AutoAugment (policy v0); S3 is S2 with a wide range of scales; S4 takes RandAugment
(magnitude 10) instead. Colour operations come first, on the canvas as it is; all moves (policy, mirror, scale, crop)
are one affine map, so that an image is resampled once. All draws are functions of (seed, epoch, row).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ktransfer import rng
from ktransfer.data.augment import in_parts
from ktransfer.detection import geometry, operations

Step = tuple[str, float, float]
"""Operation, probability, level."""


class Strength(NamedTuple):
    """One of the four.

    Attributes:
        scales: the smallest and the largest factor of the scale.
        policy: none, autoaugment or randaugment.
    """

    scales: tuple[float, float]
    policy: str


STRENGTHS = {
    "none": Strength((1.0, 1.0), "none"),
    "S1": Strength((0.8, 1.2), "none"),
    "S2": Strength((0.8, 1.2), "autoaugment"),
    "S3": Strength((0.5, 2.0), "autoaugment"),
    "S4": Strength((0.5, 2.0), "randaugment"),
}
# AutoAugment's policy v0 for detection; one of the five is drawn for each image.
POLICY: tuple[tuple[Step, Step], ...] = (
    (("translate-x", 0.6, 4), ("equalise", 0.8, 10)),
    (("translate-only-boxes", 0.2, 2), ("cutout", 0.8, 8)),
    (("sharpness", 0.0, 8), ("shear-x", 0.4, 0)),
    (("shear-y", 1.0, 2), ("translate-only-boxes", 0.6, 6)),
    (("rotate", 0.6, 10), ("colour", 1.0, 6)),
)
RANDOM = (
    "equalise",
    "solarise",
    "colour",
    "cutout",
    "solarise-add",
    "translate-x",
    "translate-y",
    "shear-x",
    "shear-y",
    "rotate",
)
MAGNITUDE = 10
LAYERS = 2  # operations of RandAugment for each image; not known of the paper
ONLY_BOXES = 1 / 3  # of an operation's probability is what each box has of it
SMALLEST = 1.0  # pixels: boxes with a shorter side are dropped
MOVES = ("translate-x", "translate-y", "shear-x", "shear-y", "rotate")


class Boxed(NamedTuple):
    """Canvases with their boxes.

    Attributes:
        pixels: (b, 3, s, s) uint8; the image is at the top left.
        extents: (b, 2) float32, width and height of the image.
        boxes: (b, m, 4) float32 x1, y1, x2, y2 in pixels of the canvas.
        kept: (b, m) bool, false where there is no box.
    """

    pixels: Tensor
    extents: Tensor
    boxes: Tensor
    kept: Tensor


def boxless(pixels: Tensor, extents: Tensor) -> Boxed:
    """A batch of (b, 3, s, s) canvases whose masks follow: changes within single boxes would leave these behind."""
    return Boxed(pixels, extents, extents.new_zeros(len(pixels), 1, 4), extents.new_zeros(len(pixels), 1).bool())


Finish = Callable[[Tensor, Tensor], Tensor]
"""What is done to augmented pixels (some, 3, s, s) float32 in 0..255 and their extents (some, 2)."""


def augment(
    batch: Boxed, strength: str, rows: Tensor, seed: int, epoch: int, finish: Finish | None = None
) -> tuple[Boxed, Tensor]:
    """Augment a batch.

    Args:
        strength: a key of STRENGTHS; "none" leaves all as it is.
        rows: (b,) int64, which images these are: they key the draws.
        finish: what is done to the pixels, each image's by itself, such as to normalise them; by default they become
            uint8 again.

    Returns:
        The batch, boxes that are cut away no longer `kept`; and (b, 2, 3) float32, the maps by which masks and polygons
        follow (`geometry`). What the policy moves in from beyond the image's edge is grey. All is computed in
        float32, within autocast too.
    """
    with torch.autocast(batch.pixels.device.type, enabled=False):
        return _augment(batch, strength, rows, seed, epoch, finish or _bytes)


def _augment(batch: Boxed, strength: str, rows: Tensor, seed: int, epoch: int, finish: Finish) -> tuple[Boxed, Tensor]:
    chosen = STRENGTHS[strength]
    side, maps = batch.pixels.shape[-1], geometry.identity(len(rows), batch.pixels.device)
    if strength == "none":
        return batch._replace(pixels=finish(batch.pixels, batch.extents)), maps
    layers = _draw(chosen.policy, rows, seed, epoch)
    draws = [rng.uniform(seed, f"detection/operation{layer}", epoch, rows, 4) for layer in range(len(layers))]
    for steps, drawn in zip(layers, draws, strict=True):
        maps = geometry.then(maps, _moves(batch, steps, drawn))
    fitted, window = _fit(batch.extents, chosen.scales, side, rngs=rng.uniform(seed, "detection/fit", epoch, rows, 4))
    maps = geometry.then(maps, fitted)
    boxes = geometry.move_boxes(batch.boxes, maps, window)
    kept = batch.kept & ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST).all(2)
    taken = geometry.route(maps, batch.extents, side)

    def made(part: slice) -> Tensor:
        some = Boxed(*(field[part] for field in batch))
        for layer, (steps, drawn) in enumerate(zip(layers, draws, strict=True)):
            some = _coloured(some, steps[part], drawn[part], rows[part], seed, epoch, layer)
        moved = geometry.follow(some.pixels, geometry.Route(taken.back[part], taken.edge[part], taken.reach[part]))
        return finish(moved, window[part, 2:])

    pixels = in_parts(made, len(rows), batch.pixels[:1].numel(), batch.pixels.device)
    return Boxed(pixels, window[:, 2:], torch.where(kept[..., None], boxes, 0.0), kept), maps


def _bytes(pixels: Tensor, extents: Tensor) -> Tensor:
    return pixels.to(torch.uint8)


def _draw(policy: str, rows: Tensor, seed: int, epoch: int) -> list[list[Step]]:
    """For each layer the operation of each image, with its level and whether it is done (probability 0 or 1)."""
    if policy == "none":
        return []
    if policy == "randaugment":
        numbers = rng.integers(seed, "detection/randaugment", epoch, rows, LAYERS, len(RANDOM)).T.tolist()
        return [[(RANDOM[number], 1.0, MAGNITUDE) for number in layer] for layer in numbers]
    which = rng.integers(seed, "detection/autoaugment", epoch, rows, 1, len(POLICY))[:, 0].tolist()
    coins = rng.uniform(seed, "detection/autoaugment-coin", epoch, rows, 2).T.tolist()
    layers: list[list[Step]] = []
    for layer, coin in enumerate(coins):
        steps = [POLICY[number][layer] for number in which]
        layers.append([_tossed(step, value) for step, value in zip(steps, coin, strict=True)])
    return layers


def _tossed(step: Step, coin: float) -> Step:
    """Operations on single boxes keep their probability: it is tossed for each box."""
    name, probability, level = step
    return (name, probability if name == "translate-only-boxes" else float(coin < probability), level)


def _coloured(batch: Boxed, steps: list[Step], draws: Tensor, rows: Tensor, seed: int, epoch: int, layer: int) -> Boxed:
    """Do the operations that leave boxes where they are, all images of one kind together."""
    pixels = batch.pixels
    for name, probability, level in sorted({step for step in steps if step[0] not in MOVES and step[1] > 0}):
        places = [place for place, step in enumerate(steps) if step == (name, probability, level)]
        # All of them are taken as they are: on a CPU a part of the batch is mostly a single image.
        at = slice(None) if len(places) == len(steps) else torch.tensor(places, device=pixels.device)
        some, extents = pixels[at], batch.extents[at]
        if name == "equalise":
            some = operations.equalise(some, extents)
        elif name == "solarise":
            some = operations.solarise(some, level)
        elif name == "solarise-add":
            some = operations.solarise_add(some, level)
        elif name == "colour":
            some = operations.colour(some, level)
        elif name == "sharpness":
            some = operations.sharpness(some, level)
        elif name == "cutout":
            some = operations.cutout(some, extents, level, draws[at, :2])
        else:
            count = batch.boxes.shape[1]
            tossed = rng.uniform(seed, f"detection/boxes{layer}", epoch, rows[at], 2 * count)
            # Two draws side by side for each box: those of a box are the same however many places there are.
            hits, turns = tossed.unflatten(1, (count, 2)).unbind(2)
            signs = torch.where(turns < 0.5, -1, 1)
            hit = batch.kept[at] & (hits < probability * ONLY_BOXES)
            some = operations.translate_only_boxes(some, batch.boxes[at], hit, level, signs)
        pixels = some if isinstance(at, slice) else pixels.index_copy(0, at, some)
    return batch._replace(pixels=pixels)


def _moves(batch: Boxed, steps: list[Step], draws: Tensor) -> Tensor:
    """(b, 2, 3) the moves of one layer of a policy, around the middle of each image."""
    device = draws.device
    sign = torch.where(draws[:, 3] < 0.5, -1.0, 1.0)

    def amount(name: str, most: float) -> Tensor:
        """`most` times the level, signed, where this is the operation; 0 elsewhere."""
        levels = [level / operations.MOST if kind == name and done > 0 else 0.0 for kind, done, level in steps]
        return torch.tensor(levels, device=device) * most * sign

    pixels = 250 * batch.pixels.shape[-1] / operations.DESIGNED_FOR
    by = torch.stack([amount("translate-x", pixels), amount("translate-y", pixels)], dim=1)
    angle = amount("rotate", math.radians(30))
    cosine, sine = angle.cos(), angle.sin()
    rotation = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    shear = torch.eye(2, device=device).repeat(len(steps), 1, 1)
    shear[:, 0, 1], shear[:, 1, 0] = amount("shear-x", 0.3), amount("shear-y", 0.3)
    centre = batch.extents / 2
    return geometry.then(geometry.around(centre, rotation @ shear), geometry.shift(by))


def _fit(extents: Tensor, scales: tuple[float, float], side: int, rngs: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the images, scale them, and cut out the canvas at a random place of what is larger.

    Returns:
        (b, 2, 3) maps, and (b, 4) where the image then is on its canvas: x1, y1, x2, y2.
    """
    factor = scales[0] + (scales[1] - scales[0]) * rngs[:, :1]
    scale = (factor * side / extents).amin(1, keepdim=True)
    offset = (rngs[:, 1:3] * (scale * extents - side).clamp(min=0)).floor()
    mirrored = rngs[:, 3] < 0.5
    maps = geometry.identity(len(extents), extents.device) * scale[:, :, None]
    maps[:, :, 2] = -offset
    maps[mirrored, 0, 0] *= -1
    maps[mirrored, 0, 2] += (scale * extents)[mirrored, 0]
    corner = (scale * extents - offset).clamp(max=side)
    return maps, torch.cat([torch.zeros_like(corner), corner], dim=1)
