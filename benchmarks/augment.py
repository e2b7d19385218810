"""Images per second of CPU time on the way to a detector's training, beside torchvision's transforms.

Run as `python benchmarks/augment.py [--data ROOT] [--size S] [--side N] [--images N] [--rounds N] [--json FILE]` on a
quiet machine, ROOT with COCO files such as det_animals7; without it images of 500 x 375 are made. From the same JPEG
files to normalised images (3, S, S) float32 with their boxes, augmented as S4 says (RandAugment: two of ten
operations at magnitude 10; scale 0.5 to 2, crop, mirror):

v2           image by image: Pillow, torchvision's v2 functions and transforms on Pillow's images and
             BoundingBoxes, each move of the policy interpolated as ours are
v2 nearest   the same with the policy's moves by nearest pixels, as torchvision's own RandAugment does by default
ours         canvases decoded by one thread, batches of 16 augmented and normalised
cached       the same with the canvases in memory, as `--cache-images` has them from the second epoch on
decode       our decoding alone, to uint8 canvases

Both do the same operations as often, with the same constants. What differs: torchvision resamples an image for each
move, ours once for all of them; torchvision's policy sees the file's pixels and its last resampling smooths what it
shrinks, our policy sees the canvas and what it shrinks from there is not smoothed; torchvision puts the rest of a small
image all around it, ours below and at the right; torchvision leaves single images, ours are batches.

A rate is that of all threads' CPU time, so it is that of a core. First of all it is checked that white rectangles come
to lie in their boxes, and their boxes close around them, in both.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from images import report
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ktransfer import networks
from ktransfer.bench.photographs import write_photographs
from ktransfer.data.loader import ImageLoader
from ktransfer.detection import canvas, geometry
from ktransfer.detection.data import Detection, subset
from ktransfer.detection.losses import truth
from ktransfer.detection.opening import open_detection
from ktransfer.detection.operations import DESIGNED_FOR, FILL
from ktransfer.detection.strengths import LAYERS, MOVES, RANDOM, SMALLEST, STRENGTHS, Boxed, augment
from ktransfer.images import decoding
from ktransfer.retrain.selftraining.student import _filled

BATCH = 16
Pair = tuple[Image.Image, tv_tensors.BoundingBoxes]
Found = tuple[Tensor, tv_tensors.BoundingBoxes]


class Peer:
    """S4 on one image at a time, by torchvision."""

    def __init__(self, size: int, moves: v2.InterpolationMode) -> None:
        self.moves = moves
        self.fit = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.ScaleJitter((size, size), STRENGTHS["S4"].scales),
                v2.RandomCrop(size, pad_if_needed=True, fill=FILL),
                v2.ToImage(),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(*networks.IMAGENET),
                v2.SanitizeBoundingBoxes(min_size=SMALLEST, labels_getter=None),
            ]
        )

    def __call__(self, image: Image.Image, boxes: tv_tensors.BoundingBoxes, names: Sequence[str] = RANDOM) -> Found:
        for name in random.choices(names, k=LAYERS):
            image, boxes = self.operation(name, image, boxes)
        found: Found = self.fit(image, boxes)
        return found

    def operation(self, name: str, image: Image.Image, boxes: tv_tensors.BoundingBoxes) -> Pair:
        """One of RandAugment's operations at magnitude 10, lengths in proportion to the image's long side."""
        sign, share = random.choice((-1, 1)), max(image.size) / DESIGNED_FOR
        angle, shift, shear = 0.0, [0, 0], [0.0, 0.0]
        match name:
            case "equalise":
                return F.equalize(image), boxes
            case "solarise":
                return F.solarize(image, 256), boxes
            case "solarise-add":
                return image.point([min(255, level + 110) if level < 128 else level for level in range(256)] * 3), boxes
            case "colour":
                return F.adjust_saturation(image, 1.9), boxes
            case "cutout":
                x, y = (random.uniform(0, side) for side in image.size)
                half = 100 * share
                corners = (round(x - half), round(y - half), round(x + half), round(y + half))
                image.paste((FILL, FILL, FILL), corners)
                return image, boxes
            case "rotate":
                angle = 30.0 * sign
            case "translate-x":
                shift = [round(250 * share) * sign, 0]
            case "translate-y":
                shift = [0, round(250 * share) * sign]
            case "shear-x":
                shear = [16.7 * sign, 0.0]  # degrees: a slope of 0.3
            case "shear-y":
                shear = [0.0, 16.7 * sign]
        move = partial(F.affine, angle=angle, translate=shift, scale=1.0, shear=shear)
        return move(image, interpolation=self.moves, fill=[FILL] * 3), move(boxes)


def peers(files: list[Path], boxes: list[Tensor], peer: Peer) -> int:
    for path, own in zip(files, boxes, strict=True):
        with Image.open(path) as image:
            image = image.convert("RGB")
        peer(image, framed(own, image))
    return len(files)


def framed(boxes: Tensor, image: Image.Image) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))


class Ours:
    """S4 on batches."""

    def __init__(self, data: Detection, size: int, cache: str) -> None:
        self.source = canvas.canvases(data, size, 1, cache)
        self.truth = truth(data, size, torch.device("cpu"))
        self.boxes, self.kept, _ = _filled(self.truth)

    def __call__(self) -> int:
        rows = torch.randperm(len(self.source.dataset))
        for chosen, pixels, _, _ in self.source.batches(iter(rows.split(BATCH))):
            given = Boxed(pixels, self.truth.extents[chosen], self.boxes[chosen], self.kept[chosen])
            augment(given, "S4", chosen, 0, 0, partial(canvas.normalise, how="imagenet"))
        return len(rows)


def decoded(source: ImageLoader) -> int:
    rows = torch.randperm(len(source.dataset))
    return sum(len(pixels) for _, pixels, _, _ in source.batches(iter(rows.split(BATCH))))


def check(ours: Ours, peer: Peer) -> None:
    """White rectangles, one in each of 200 images, are where their boxes say after each one's moves.

    Raises:
        SystemExit: they are not.
    """
    side = ours.truth.size
    box = (torch.tensor([0.3, 0.2, 0.7, 0.7]) * side).round()
    x1, y1, x2, y2 = (int(value) for value in box)
    black = torch.zeros(200, 3, side, side, dtype=torch.uint8)
    black[:, :, y1:y2, x1:x2] = 255
    given = Boxed(black, torch.full((200, 2), float(side)), box.expand(200, 1, 4), torch.ones(200, 1, dtype=torch.bool))
    moved, maps = augment(given, "S4", torch.arange(200), 0, 0)
    masks = geometry.move_pixels(black[:, :1], maps, given.extents, fill=0) * canvas.inside(moved.extents, side)
    lies(
        "ours",
        [(masks[place, 0] > 127, moved.boxes[place, 0]) for place in moved.kept[:, 0].nonzero().flatten().tolist()],
    )
    random.seed(0)
    image = F.to_pil_image(black[0])
    seen = [peer(image, framed(box[None], image), MOVES) for _ in range(200)]
    lies("v2", [(pixels[0] > 1.2, own[0]) for pixels, own in seen if len(own)])


def lies(name: str, found: list[tuple[Tensor, Tensor]]) -> None:
    """Check masks (s, s) bool against their boxes x1, y1, x2, y2."""
    beyond, overlaps = 0.0, []
    for mask, box in found:
        if not mask.any():
            continue
        y, x = mask.nonzero().unbind(1)
        hull = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        beyond = max(beyond, float((box - hull)[:2].max()), float((hull - box)[2:].max()))
        overlaps.append(float(box_iou(hull[None], box[None])))
    overlap = statistics.median(overlaps)
    print(
        f"{name}: of {len(found)} boxes none is left by more than {beyond:.1f} pixels, half of them cover {overlap:.3f}"
    )
    if beyond > 2 or overlap < 0.9:
        raise SystemExit(f"{name}: boxes do not lie where their pixels do")


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Images per second of CPU time, of all threads, the ways in turns; the first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            random.seed(turn)
            torch.manual_seed(turn)
            began = time.process_time()
            done = way()
            if turn:
                rates[name].append(done / (time.process_time() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a root of COCO files, such as det_animals7, instead of made ones")
    parser.add_argument("--images", type=int, default=256, help="the first so many of its training part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=320, help="of the canvases, and of what v2 crops")
    parser.add_argument("--side", type=int, default=0, help="enlarge the files first to so many pixels; 0: as they are")
    parser.add_argument("--json", type=Path, help="write the rates of all rounds here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        root = options.data or made(Path(work) / "made", options.images)
        data, _ = open_detection(str(root))
        data = subset(data, np.arange(min(options.images, len(data))))
        files = [next(path for path in (root / key, root / "images" / key) if path.is_file()) for key in data.keys]
        if options.side:
            data, files = enlarged(data, files, options.side, Path(work))
        run(data, files, options)


def made(root: Path, count: int) -> Path:
    """A root of made images, 500 x 375, with two boxes each."""
    root.mkdir()
    files = sorted(write_photographs(root / "images", count).iterdir())
    images = [{"id": n, "file_name": path.name, "width": 500, "height": 375} for n, path in enumerate(files)]
    boxes = [
        {"image_id": n // 2, "category_id": 1, "bbox": [40 + 200 * (n % 2), 60, 180, 240]} for n in range(2 * count)
    ]
    notes = [{"id": n} | box for n, box in enumerate(boxes)]
    for part in ("train", "val"):
        held = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "thing"}]}
        (root / f"instances_{part}.json").write_text(json.dumps(held))
    return root


def enlarged(data: Detection, files: list[Path], side: int, work: Path) -> tuple[Detection, list[Path]]:
    """The images with a long side of `side` pixels as JPEGs of quality 90 in `work`, with their boxes."""
    made: list[Path] = []
    for number, path in enumerate(files):
        made.append(work / f"{number}.jpg")
        with Image.open(path) as image:
            ImageOps.contain(image.convert("RGB"), (side, side)).save(made[-1], quality=90)
    sizes = np.array([Image.open(path).size for path in made], np.int32)
    factors = np.tile(sizes / data.sizes, 2).astype(np.float32)
    objects = tuple(one._replace(boxes=one.boxes * factor) for one, factor in zip(data.objects, factors, strict=True))
    read = lambda row, short_side: decoding.decode(made[row], short_side)  # noqa: E731
    return replace(data, read=read, sizes=sizes, objects=objects), made


def run(data: Detection, files: list[Path], options: argparse.Namespace) -> None:
    boxes = [torch.from_numpy(one.boxes[~one.crowd]) for one in data.objects]
    peer = Peer(options.size, v2.InterpolationMode.BILINEAR)
    ours = Ours(data, options.size, "off")
    check(ours, peer)
    ways: dict[str, Callable[[], int]] = {
        "v2": partial(peers, files, boxes, peer),
        "v2 nearest": partial(peers, files, boxes, Peer(options.size, v2.InterpolationMode.NEAREST)),
        "ours": ours,
        "cached": Ours(data, options.size, "ram"),
        "decode": partial(decoded, ours.source),
    }
    rates = measure(ways, options.rounds)
    report(rates, "v2", options.json, {"images": len(data), "size": options.size, "side": options.side})


if __name__ == "__main__":
    main()
