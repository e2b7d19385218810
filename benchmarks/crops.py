"""Images per second and core on the way to a retraining's batches, beside ImageFolder with torchvision's transforms.

Run as `python benchmarks/crops.py [--images N] [--rounds N] [--data DIR] [--json FILE]`, on a quiet machine.

Everything runs on one core. From the same JPEG files, to batches of normalised random crops, mirrored half the time,
(256, 3, 224, 224):

reference    ImageFolder and a DataLoader worker, with the transforms of torchvision's training reference:
             RandomResizedCrop (bilinear, antialiased), RandomHorizontalFlip, PILToTensor, ConvertImageDtype, Normalize
folder       ours from the same files, kept squares of 256
pack 256     ours from a pack as `ktransfer pack` makes it by default
raw 256      ours from a pack of uint8 pixels
cache        ours with the uint8 squares in memory already

The ways take turns; what is printed are medians over the rounds.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from images import batches, measure, one_thread, report
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ktransfer import networks
from ktransfer.bench.photographs import write_photographs
from ktransfer.data.augment import random_resized_crop
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.data.pack import pack

BATCH, SIDE, SIZE = 256, 256, 224


def reference(folder: Path) -> "DataLoader[Any]":
    mean, deviation = networks.IMAGENET
    steps = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(mean, deviation),
    ]
    data = ImageFolder(str(folder), transforms.Compose(steps))
    return DataLoader(data, BATCH, shuffle=True, num_workers=1, persistent_workers=True, worker_init_fn=one_thread)


def loaded(loader: "DataLoader[Any]") -> int:
    return sum(len(crops) for crops, _ in loader)


def crops(images: ImageLoader) -> int:
    finish = partial(networks.normalise, how="imagenet")
    done = 0
    for rows, pixels, _, _ in images.batches(batches(len(images.dataset))):
        done += len(random_resized_crop(pixels, rows, SIZE, 0, 0, "retrain", finish=finish))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a folder of class folders of JPEGs instead of made ones")
    parser.add_argument("--json", type=Path, help="write the rates of all rounds here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        root = options.data or work / "root"
        if options.data is None:
            root.mkdir()
            write_photographs(root / "class", options.images)
        packed = (
            pack(str(root), work / "256.h5", SIDE, workers=1),
            pack(str(root), work / "raw.h5", SIDE, raw=True, workers=1),
        )
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        data = open_dataset(str(root))
        opened = {"folder": data} | {
            way: open_dataset(str(path)) for way, path in zip(("pack 256", "raw 256"), packed, strict=True)
        }
        found = {"reference": partial(loaded, reference(root))}
        found |= {way: partial(crops, ImageLoader(part, SIDE, 1, cache="off")) for way, part in opened.items()}
        found["cache"] = partial(crops, ImageLoader(opened["raw 256"], SIDE, 1, cache="ram"))
        rates = measure(found, options.rounds)
    report(rates, "reference", options.json, {"images": len(data)})


if __name__ == "__main__":
    main()
