"""Images per second and core on the way to Jigsaw++ puzzles, beside the per-image pipeline that peers use.

Run as `python benchmarks/images.py [--images N] [--rounds N] [--data DIR] [--json FILE]`, on a quiet machine.

Everything runs on one core (the process and its workers are pinned to it), so that the rate is that of a core, whatever
the machine has. From the same JPEG files, to batches of normalised tiles (256, 9, 3, 64, 64):

peers        Pillow and torchvision transforms in a DataLoader worker: short side 256, centre 255, nine cells, a random
             64 x 64 part of each, each normalised by itself, a random permutation; without the grey images, shifted
             channels and foreign tiles of Jigsaw++, which ours have
lightly      the same with the jigsaw transform of `lightly`, where it is installed (docs/performance.md says how)
folder       ours from the same files
pack 256     ours from a pack as `ktransfer pack` makes it by default
pack 255     ours from a pack of exactly the size that is wanted
raw 255      ours from a pack of uint8 pixels
cache        ours with the uint8 squares in memory already
squares      the squares of `pack 256` alone, without puzzles; `puzzles` the puzzles alone

The ways take turns; what is printed are medians over the rounds. Without --data the images are made, 500 x 375, with
JPEGs as large as ImageNet's (ktransfer/bench/photographs.py).
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ktransfer.bench.photographs import write_photographs
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.data.pack import pack
from ktransfer.pretext.permutations import generate
from ktransfer.pretext.puzzles import JIGSAWPP, make_puzzles

BATCH, SIZE, CELL, TILE, CODES = 256, 255, 85, 64, 701


class PeerPuzzles(Dataset[Tensor]):
    """One image at a time, as datasets of the field do it."""

    def __init__(self, files: list[Path], cut: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.cut = files, cut
        self.square = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(SIZE)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return self.cut(self.square(image.convert("RGB")))


def own(tile: Tensor) -> Tensor:
    return (tile - tile.mean()) / tile.std()


class Tiles:
    """Nine tiles in one of the orders `codes`, with torchvision's transforms."""

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = codes
        self.tile = transforms.Compose([transforms.RandomCrop(TILE), transforms.ToTensor(), transforms.Lambda(own)])

    def __call__(self, square: Image.Image) -> Tensor:
        corners = [(cell % 3 * CELL, cell // 3 * CELL) for cell in range(9)]
        tiles = [self.tile(square.crop((x, y, x + CELL, y + CELL))) for x, y in corners]
        return torch.stack([tiles[cell] for cell in self.codes[int(torch.randint(len(self.codes), (1,)))]])


def peer_cuts(codes: np.ndarray) -> dict[str, Callable[[Image.Image], Tensor]]:
    cuts: dict[str, Callable[[Image.Image], Tensor]] = {"peers": Tiles(codes)}
    if importlib.util.find_spec("lightly"):
        jigsaw = importlib.import_module("lightly.transforms.jigsaw").Jigsaw
        tile = transforms.Compose([transforms.ToTensor(), transforms.Lambda(own)])
        cuts["lightly"] = jigsaw(n_grid=3, img_size=SIZE, crop_size=TILE, transform=tile)
    return cuts


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def peers(loader: "DataLoader[Any]") -> int:
    return sum(len(tiles) for tiles in loader)


def batches(count: int) -> Iterator[Tensor]:
    return iter(torch.randperm(count).split(BATCH))


def squares(images: ImageLoader) -> int:
    return sum(len(pixels) for _, pixels, _, _ in images.batches(batches(len(images.dataset))))


def following(count: int) -> Iterator[Tensor]:
    """Batches as pretext reads them: one image more, for the foreign tiles of the last one."""
    rows = torch.randperm(count)
    return (torch.cat([part, rows[:1]]) for part in rows.split(BATCH))


def puzzles(images: ImageLoader, codes: Tensor) -> int:
    done = 0
    for rows, pixels, valid, _ in images.batches(following(len(images.dataset))):
        done += len(make_puzzles(pixels[:-1], pixels[1:], rows[:-1], valid[1:], codes, JIGSAWPP, 0, 0).tiles)
    return done


def puzzles_alone(pixels: Tensor, count: int, codes: Tensor) -> int:
    rows, sound = torch.arange(len(pixels) - 1), torch.ones(len(pixels) - 1, dtype=torch.bool)
    done = 0
    while done < count:
        done += len(make_puzzles(pixels[:-1], pixels[1:], rows, sound, codes, JIGSAWPP, 0, 0).tiles)
    return done


def pack_all(folder: Path, work: Path) -> dict[str, Path]:
    alone: dict[str, Any] = {"workers": 1}  # each process of a pool would import this file, and torch with it
    return {
        "pack 256": pack(str(folder), work / "256.h5", 256, **alone),
        "pack 255": pack(str(folder), work / "255.h5", 255, **alone),
        "raw 255": pack(str(folder), work / "raw.h5", 255, raw=True, **alone),
    }


def ways(folder: Path, packed: dict[str, Path]) -> dict[str, Callable[[], int]]:
    """Name -> a pass over all images, which returns how many it did."""
    data = open_dataset(str(folder))
    table = generate(CODES, 3)
    codes = torch.from_numpy(table).long()
    found: dict[str, Callable[[], int]] = {}
    for name, cut in peer_cuts(table).items():
        files = [folder / key for key in data.keys]
        options = {"num_workers": 1, "persistent_workers": True, "worker_init_fn": one_thread}
        found[name] = partial(peers, DataLoader(PeerPuzzles(files, cut), BATCH, shuffle=True, **options))
    opened = {"folder": data} | {name: open_dataset(str(path)) for name, path in packed.items()}
    for name, dataset in opened.items():
        found[name] = partial(puzzles, ImageLoader(dataset, SIZE, 1, cache="off"), codes)
    kept = ImageLoader(opened["pack 256"], SIZE, 1, cache_bytes=len(data) * 3 * SIZE**2)
    found["cache"] = partial(puzzles, kept, codes)
    found["squares"] = partial(squares, ImageLoader(opened["pack 256"], SIZE, 1, cache="off"))
    first = kept.batch(torch.arange(min(BATCH + 1, len(data))))[0]
    found["puzzles"] = partial(puzzles_alone, first, len(data), codes)
    return found


def measure(found: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):  # the first warms up: pages, workers, the cache
        for name, way in found.items():
            began = time.perf_counter()
            done = way()
            if turn:
                rates[name].append(done / (time.perf_counter() - began))
    return rates


def report(rates: dict[str, list[float]], peer: str, path: Path | None, facts: dict[str, Any]) -> None:
    """Print medians and ratios to the peer, and write everything as JSON."""
    print(f"images/s on one core, medians of {len(rates[peer])} rounds; times the rate of {peer}; range")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, rate in medians.items():
        lowest, highest = min(rates[name]), max(rates[name])
        print(f"{name:10} {rate:9.1f} {rate / medians[peer]:7.1f}x   {lowest:.1f} .. {highest:.1f}")
    if path:
        facts = {"machine": platform.machine(), "torch": torch.__version__} | facts
        path.write_text(json.dumps({"facts": facts, "rates": rates}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a flat or nested folder of JPEGs instead of made ones")
    parser.add_argument("--json", type=Path, help="write the rates of all rounds here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = options.data or write_photographs(work / "images", options.images)
        packed = pack_all(folder, work)
        # Threads and workers that are started from here on inherit it.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        found = ways(folder, packed)
        rates = measure(found, options.rounds)
        stored = {path.name: path.stat().st_size for path in sorted(work.glob("*.h5"))}
    print(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in stored.items()))
    report(rates, "peers", options.json, {"images": options.images, "bytes": stored})


if __name__ == "__main__":
    main()
