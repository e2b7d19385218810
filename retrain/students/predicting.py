"""`ktransfer predict`: what a target network says of many images, as a table or as embeddings."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.data.dataset import Dataset, of_files
from ktransfer.data.folders import ENDINGS
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.detection.frames import OBEY
from ktransfer.errors import UsageError
from ktransfer.images.tolerated import say_tolerated
from ktransfer.progress import bar, say
from ktransfer.run import input_hash
from ktransfer.training.device import choose_device
from ktransfer.training.options import MachineOptions

from . import vectors
from .classifier import LIST, Classifier, Tap
from .loading import classifier_of, is_detector, load_detector, weights_at
from .onnx_student import ENDING

LISTED = 20
"""Broken images that are listed with their reasons."""
TABLE, JSON = ".csv", ".json"
DETECTED = 8
"""Images that a detector sees at once, at most."""


def predict(
    model: str | Path,
    data: str,
    out: Path | None,
    top: int | None = None,
    layer: str | None = None,
    draw: Path | None = None,
    threshold: float | None = None,
    exif: str | None = None,
    batch: int = 64,
    device: str = "auto",
    workers: int = 0,
) -> Path:
    """Look at each image, of a classifier at its centre square, and write what the network says of it.

    Args:
        model: a weight file of ours, a run folder, or an exported .onnx.
        data: images, as `open_dataset` takes them, or one image file.
        out: its ending says what is written. .csv: a table of key, label, probability, and so on to `top`, cells of
            broken images being empty; .npy, .h5, .parquet: embeddings; .json: COCO's boxes and masks of a detector or
            segmenter.
        top: labels of an image, at least 1 (the default); all where the network has fewer.
        layer: whose embeddings; the last one if not given; list: say which there are.
        draw: a folder for the images with their boxes and masks.
        threshold: lowest score of a box (`detector.write`).
        exif: "obey" or "ignore": whether a detector takes images as their EXIF turns them, or as they are stored; as
            those that it learned from if not given.
        batch: images at once.
        device: auto, cpu, cuda or cuda:N.
        workers: threads that read images; 0: one a core.

    Returns:
        `out`.

    Raises:
        UsageError: one line for what is wrong; nothing was written.
        Reply: `layer` is "list".
    """
    weights = weights_at(model)
    if is_detector(weights):
        others: dict[str, object] = {"top": top, "layer": layer}
        return _find(weights, data, out, others, draw, threshold, exif, batch, device, workers)
    if layer == LIST:
        classifier_of(weights).tap(layer)
    out = _checked_out(out, data, top, layer)
    for name, value in (("draw", draw), ("threshold", threshold), ("exif", exif)):
        if value is not None:
            raise UsageError(f"--{name} {value}: {weights} finds no objects; leave it out")
    network = classifier_of(weights)
    where = _device(weights, device)
    if out.suffix == TABLE:
        network.refuse_without_classes()
    tap = None if out.suffix == TABLE else network.tap(layer)
    network = network.to(where)
    images = ImageLoader(_opened(data), network.network.size, workers, cache="off", device=where)
    if tap is None:
        _label(network, images, out, top or 1, batch)
    else:
        vectors.write(out, _embedded(network, tap, images, input_hash(weights), batch))
    _say_done(images.dataset, images.broken, out)
    return out


def _find(
    weights: Path,
    data: str,
    out: Path | None,
    others: dict[str, object],
    draw: Path | None,
    threshold: float | None,
    exif: str | None,
    batch: int,
    device: str,
    workers: int,
) -> Path:
    """The same by a detector or segmenter."""
    from .detector import write

    if out is None or out.suffix != JSON:
        raise UsageError(f"--out {out or ''}: {weights} finds objects; name a .json, in COCO's format")
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"--{name} {value}: {weights} finds objects and tells no classes of images; leave it out")
    _check_place(out, data)
    if draw is not None and draw.exists() and not draw.is_dir():
        raise UsageError(f"--draw {draw}: is a file; name a folder")
    detector = load_detector(weights, _device(weights, device))
    images = _opened(data, (exif or detector.described.exif) == OBEY)
    broken = write(detector, images, out, draw, threshold, min(batch, DETECTED), workers)
    _say_done(images, broken, out)
    return out


def _checked_out(out: Path | None, data: str, top: int | None, layer: str | None) -> Path:
    if out is None:
        raise UsageError("predict: no --out given; name a .csv for labels, or a .npy, .h5 or .parquet for embeddings")
    if out.suffix == JSON:
        raise UsageError(f"--out {out}: .json is for detectors and segmenters; name a .csv, .npy, .h5 or .parquet")
    if out.suffix not in (TABLE, *vectors.WRITERS):
        raise UsageError(f"--out {out}: must end with .csv for labels, or with {', '.join(vectors.WRITERS)}")
    vectors.check(out)
    if top is not None and out.suffix != TABLE:
        raise UsageError(f"--top {top}: {out.name} holds embeddings; name a .csv, or leave --top out")
    if layer is not None and out.suffix == TABLE:
        raise UsageError(f"--layer {layer}: {out.name} holds labels; name a .npy, .h5 or .parquet for embeddings")
    _check_place(out, data)
    return out


def _check_place(out: Path, data: str) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder is not there'}; name a file")
    for path in (out, vectors.keys_of(out)) if out.suffix == ".npy" else (out,):
        if Path(data).exists() and path.exists() and path.samefile(data):
            what = "the list of the images" if path.suffix in (TABLE, ".txt") else "the file of the images"
            raise UsageError(f"--out {out}: is {what}; choose another name")


def _device(weights: Path, device: str) -> torch.device:
    if weights.suffix != ENDING:
        return choose_device(MachineOptions(device=device))
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: {weights.name} runs on the CPU; give the run, or leave it out")
    return torch.device("cpu")


def _opened(data: str, turned: bool = True) -> Dataset:
    path = Path(data).expanduser()
    if path.suffix.lower() not in ENDINGS or not path.is_file():
        return open_dataset(data, turned)
    return of_files(data, path.parent, path.stem, [path.name], [path.stat().st_size], [""], turned)


def _embedded(network: Classifier, tap: Tap, images: ImageLoader, digest: str, batch: int) -> vectors.Embedded:
    data, size = images.dataset, network.network.size

    def batches(start: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        with bar(len(data), f"embed {tap.layer}", done=start) as shown:
            for rows, pixels, valid, _ in images.batches(iter(torch.arange(start, len(data)).split(batch))):
                yield network.embeddings(pixels, tap).cpu().numpy(), valid.numpy()
                shown.update(len(rows))

    dim = network.embeddings(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=images.device), tap).shape[1]
    facts = {
        "teacher": digest,
        "layer": tap.layer,
        "pooling": f"token {tap.token}" if tap.token in ("cls", "mean") else "mean",
        "transform": f"short side {size}, centre square, normalised by {network.network.normalise}",
        "fingerprint": data.fingerprint,
    }
    return vectors.Embedded(data, dim, facts, batches)


def _label(network: Classifier, images: ImageLoader, out: Path, top: int, batch: int) -> None:
    found, top = images.dataset, min(top, network.network.classes)
    labels = np.full((len(found), top), -1, np.int64)
    probabilities = np.zeros((len(found), top), np.float32)
    with bar(len(found), "predict") as shown:
        for rows, pixels, valid, _ in images.batches(iter(torch.arange(len(found)).split(batch))):
            shown.update(len(rows))
            if not valid.any():
                continue
            kept = rows[valid].numpy()
            best, places = network.probabilities(pixels[valid.to(images.device)]).topk(top)
            labels[kept], probabilities[kept] = places.cpu().numpy(), best.cpu().numpy()
    files.write_whole(out, lambda part: _write(part, found.keys, labels, probabilities, network.names))


def _say_done(data: Dataset, broken: dict[int, str], out: Path) -> None:
    for row in list(broken)[:LISTED]:
        say(f"predict: {data.keys[row]}: {broken[row]}")
    more = f", {len(broken) - LISTED} of them not listed here" if len(broken) > LISTED else ""
    say(f"predict: done; {len(data)} images, {len(broken)} broken{more}; {out}")
    say_tolerated()


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
