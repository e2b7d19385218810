"""Where the time of an image goes: CPU time of one thread for each part of its way, in microseconds.

Run as `python benchmarks/parts.py`, and with THP_MEM_ALLOC_ENABLE=0 before it for what huge pages are worth. CPU time
of a thread is steadier than time on a clock where others use the machine too. Medians of so many rounds (--rounds).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ktransfer import networks
from ktransfer.bench.photographs import write_photographs
from ktransfer.data.augment import random_resized_crop
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.data.pack import pack
from ktransfer.data.packs import read_pack
from ktransfer.images import decoding, jpegs
from ktransfer.pretext import puzzles, tiles
from ktransfer.pretext.permutations import generate

COUNT = 256


def each(do: Callable[[], object], rounds: int, count: int = COUNT) -> float:
    do()
    spent = []
    for _ in range(rounds):
        began = time.thread_time()
        do()
        spent.append((time.thread_time() - began) / count * 1e6)
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = write_photographs(Path(name) / "images", COUNT)
        path = pack(str(folder), Path(name) / "255.h5", 255, workers=1)
        data, found = open_dataset(str(path)), read_pack(path)
        stored = np.fromfile(path, np.uint8)[found.data_at :]
        blobs = [
            stored[a:b].tobytes() for a, b in zip(found.tables["offset"], found.tables["offset"][1:], strict=False)
        ]
        whole = [decoding.decode(blob) for blob in blobs]
        out = np.empty((3, 255, 255), np.uint8)
        kept = ImageLoader(data, 255, 1, cache="ram")
        rows = torch.arange(COUNT)
        pixels, valid = kept.batch(rows)
        codes = torch.from_numpy(generate(701, 3)).long()
        drawn = puzzles.draw(rows, valid, codes, puzzles.JIGSAWPP, 255, 0, 0)
        some = puzzles.Draws(*(part[:4] for part in drawn))
        cut = partial(puzzles.cut, pixels[:4], pixels[1:5], some, 64)
        mixed = tiles.recolour(cut(), some.colour)
        squares = torch.randint(0, 256, (COUNT, 3, 256, 256), dtype=torch.uint8)
        normal = partial(networks.normalise, how="imagenet")
        parts: dict[str, tuple[Callable[[], object], int]] = {
            "JPEG of short side 255: Pillow": (lambda: [decoding.decode(blob) for blob in blobs], COUNT),
            "the same: torchvision": (lambda: [jpegs.decode(blob) for blob in blobs], COUNT),
            "resized by one pixel, 255 to 254": (lambda: [decoding.square(image, 254) for image in whole], COUNT),
            "centre square, into planes": (
                lambda: [np.copyto(out, decoding.square(image, 255).transpose(2, 0, 1)) for image in whole],
                COUNT,
            ),
            "batch out of the cache": (lambda: torch.index_select(pixels, 0, rows), COUNT),
            "puzzle: draws": (lambda: puzzles.draw(rows, valid, codes, puzzles.JIGSAWPP, 255, 0, 0), COUNT),
            "puzzle: cut": (lambda: [cut() for _ in range(64)], COUNT),
            "puzzle: colours": (lambda: [tiles.recolour(cut(), some.colour) for _ in range(64)], COUNT),
            "puzzle: normalise": (lambda: [tiles.normalise(mixed) for _ in range(64)], COUNT),
            "puzzle: all of it": (
                lambda: puzzles.make_puzzles(
                    pixels[:-1], pixels[1:], rows[:-1], valid[1:], codes, puzzles.JIGSAWPP, 0, 0
                ),
                COUNT - 1,
            ),
            "random crop of 224, normalised": (
                lambda: random_resized_crop(squares, rows, 224, 0, 0, "retrain", finish=normal),
                COUNT,
            ),
        }
        for label, (do, count) in parts.items():
            print(f"{label:36} {each(do, rounds, count):8.1f}")


if __name__ == "__main__":
    main()
