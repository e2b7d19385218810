"""`ktransfer predict`: what a target network says of many images, as a table."""

import csv
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.data.dataset import Dataset, of_files
from ktransfer.data.folders import ENDINGS
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.progress import bar, say
from ktransfer.training.device import choose_device
from ktransfer.training.options import MachineOptions

from .classifier import load_model

LISTED = 20
"""Broken images that are listed with their reasons."""


def predict(
    model: str | Path, data: str, out: Path, top: int = 1, batch: int = 64, device: str = "auto", workers: int = 0
) -> Path:
    """Label the centre square of each image, and write a table: key, label, probability, and so on to `top`.

    Args:
        model: a weight file of ours, or a run folder.
        data: images, as `open_dataset` takes them, or one image file.
        out: the table, *.csv; cells of broken images are empty.
        top: labels of an image, at least 1; all where the network has fewer.
        batch: images at once.
        device: auto, cpu, cuda or cuda:N.
        workers: threads that read images; 0: one a core.

    Raises:
        UsageError: one line for what is wrong; nothing was written.
    """
    _check_out(out, data)
    where = choose_device(MachineOptions(device=device))
    network = load_model(model).to(where)
    found = _opened(data)
    top = min(top, network.network.classes)
    images = ImageLoader(found, network.network.size, workers, cache="off", device=where)
    labels = np.full((len(found), top), -1, np.int64)
    probabilities = np.zeros((len(found), top), np.float32)
    with bar(len(found), "predict") as shown:
        for rows, pixels, valid, _ in images.batches(iter(torch.arange(len(found)).split(batch))):
            kept = rows[valid].numpy()
            best, places = network.probabilities(pixels[valid.to(where)]).topk(top)
            labels[kept], probabilities[kept] = places.cpu().numpy(), best.cpu().numpy()
            shown.update(len(rows))
    files.write_whole(out, lambda part: _write(part, found.keys, labels, probabilities, network.names))
    broken = images.broken
    for row in list(broken)[:LISTED]:
        say(f"predict: {found.keys[row]}: {broken[row]}")
    more = f", {len(broken) - LISTED} of them not listed here" if len(broken) > LISTED else ""
    say(f"predict: done; {len(found)} images, {len(broken)} broken{more}; {out}")
    return out


def _check_out(out: Path, data: str) -> None:
    if out.suffix != ".csv":
        raise UsageError(f"--out {out}: must end with .csv")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder is not there'}; name a file")
    if Path(data).exists() and out.exists() and out.samefile(data):
        raise UsageError(f"--out {out}: is the list of the images; choose another name")


def _opened(data: str) -> Dataset:
    path = Path(data).expanduser()
    if path.suffix.lower() not in ENDINGS or not path.is_file():
        return open_dataset(data)
    return of_files(data, path.parent, path.stem, [path.name], [path.stat().st_size], [""])


def _write(
    part: Path,
    keys: tuple[str, ...],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    names: tuple[str, ...],
) -> None:
    with part.open("w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle, lineterminator="\n")
        ends = ["", *(f"_{place}" for place in range(2, labels.shape[1] + 1))]
        table.writerow(["key", *(f"{name}{end}" for end in ends for name in ("label", "probability"))])
        for key, own, shares in zip(keys, labels.tolist(), probabilities, strict=True):
            cells = [cell for label, share in zip(own, shares, strict=True) for cell in (names[label], f"{share:.6g}")]
            table.writerow([key, *(cells if own[0] >= 0 else [""] * len(cells))])
