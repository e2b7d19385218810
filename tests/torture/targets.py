"""All that reads a file, as functions of a folder in which it lies; each has inputs that are sound to begin with."""

import contextlib
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mutators
import numpy as np
import seeds
from seeds import COCO, RECORD, VOC, picture

from ktransfer.errors import KTransferError

Mutate = Callable[[bytes, random.Random], bytes]


class Target(NamedTuple):
    """One reader: the name of its file in a folder, sound inputs, how to change them, and what reads it."""

    file: str
    seeds: Callable[[], list[bytes]]
    mutate: Mutate
    read: Callable[[Path, Path], object]
    """Is given the folder and the file."""


class Escape(BaseException):
    """Something was started, sent or written that reading a file must not do."""


def check(target: Target, data: bytes, folder: Path) -> str:
    """Read `data`: what was refused, or "" where it was read. Anything but an error of ours is raised."""
    file = folder / target.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    try:
        target.read(folder, file)
    except KTransferError as error:
        if "Traceback" in str(error) or len(str(error).splitlines()) > 40:
            raise AssertionError(f"no message for people: {error}") from error
        return str(error)[:200]
    return ""


def guard(*folders: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that ends whatever starts a program, opens a connection, or writes outside of the folder."""
    homes = tuple(map(os.path.realpath, folders))

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "subprocess.Popen",
            "socket.connect",
            "os.fork",
        ):
            raise Escape(f"{event} {given}")
        writes = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink")) and given[
            0
        ] is not None:
            path = given[0] if isinstance(given[0], str | bytes | os.PathLike) else ""
            place = os.path.realpath(os.fsdecode(path)) if path else homes[0]
            if not place.startswith((*homes, "/dev/null")):
                raise Escape(f"{event} {place}")

    return hook


def images_beside(folder: Path, *names: str) -> None:
    """Sound images that a list or annotation may name."""
    for name in names or ("a.jpg", "b.jpg"):
        place = folder / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(picture("JPEG", 40))


def decode(_: Path, file: Path) -> None:
    """Images, as all stages read them; the limit of pixels is lowered, so that bombs cost little here."""
    from ktransfer.errors import BrokenImage
    from ktransfer.images import decoding

    few = 2_000_000
    data = file.read_bytes()
    with mock.patch.object(decoding, "MAX_PIXELS", few), mock.patch.object(decoding.Image, "MAX_IMAGE_PIXELS", few):
        for read in (decoding.decode, lambda it: decoding.decode(it, 8), decoding.short_side):
            with contextlib.suppress(BrokenImage):
                read(data)


def listed(folder: Path, file: Path) -> None:
    """A list of images, and their pixels."""
    from ktransfer.data.opening import open_dataset

    images_beside(folder)
    data = open_dataset(str(file))
    for row in range(min(3, len(data.keys))):
        _tried(lambda row=row: data.read(row, 8))


def tables(folder: Path, file: Path) -> None:
    """train.csv beside val.csv."""
    from ktransfer.data.opening import open_splits

    images_beside(folder)
    (folder / "val.csv").write_text("path,label\na.jpg,x\nb.jpg,y\n")
    open_splits(str(file.parent))


def coco(folder: Path, file: Path) -> None:
    """Boxes, for self-training."""
    from ktransfer.detection import masks
    from ktransfer.detection.losses import truth
    from ktransfer.detection.opening import open_file

    images_beside(folder)
    data = open_file(str(file))
    import torch

    if (data.sizes * 1.0).prod(1).max() < 10**6:
        truth(data, 64, torch.device("cpu"))
        for row in range(len(data.keys)):
            masks.classes_of_pixels(data, row)


def coco_classes(folder: Path, file: Path) -> None:
    """Boxes as labels of whole images."""
    from ktransfer.data.opening import open_splits

    images_beside(folder)
    (folder / "instances_val.json").write_bytes(COCO)
    open_splits(str(file.parent))


def pseudo(folder: Path, file: Path) -> None:
    """Boxes of another detector, ids of images."""
    from ktransfer.detection import data
    from ktransfer.detection.opening import open_file
    from ktransfer.retrain.selftraining import boxes

    images_beside(folder)
    (folder / "own.json").write_bytes(COCO)
    own = open_file(str(folder / "own.json"))
    _tried(lambda: data.load_ids(file, own))
    boxes.read(file, own, 0.1)


def voc(folder: Path, _: Path) -> None:
    """A VOCdevkit whose annotation (or list) it is."""
    from ktransfer.detection.opening import open_detection

    year = folder / "VOC2007"
    images_beside(folder, "VOC2007/JPEGImages/a.jpg", "VOC2007/JPEGImages/b.jpg")
    for name, text in (("trainval", "a\n"), ("test", "b\n")):
        place = year / "ImageSets" / "Main" / f"{name}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.write_text(text)
    for name in "ab":
        place = year / "Annotations" / f"{name}.xml"
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.write_bytes(VOC)
    open_detection(str(folder))


def features(_: Path, file: Path) -> None:
    """Features of ours, and their numbers."""
    from ktransfer.artifacts.features import mean_row, open_features, valid_rows

    found = open_features(file)
    valid_rows(found)(0, 2)
    mean_row(found)


def foreign(folder: Path, file: Path) -> None:
    """Features made elsewhere."""
    from ktransfer.cluster.foreign import open_foreign

    (folder / "keys.txt").write_text("a\nb\nc\n")
    found = open_foreign(str(file), str(folder / "keys.txt") if file.suffix == ".npy" else None, None)
    np.asarray(found.rows[:2])


def centroids(_: Path, file: Path) -> None:
    """clusters.h5."""
    from ktransfer.artifacts.centroids import nearest, read_centroids

    found = read_centroids(file)
    columns = found.centroids.shape[1] if found.projection is None else len(found.projection.mean)
    nearest(found, np.zeros((2, columns), np.float32))


def pack(_: Path, file: Path) -> None:
    """A pack, and its images."""
    from ktransfer.data.opening import open_dataset

    data = open_dataset(str(file))
    for row in range(min(4, len(data.keys))):
        _tried(lambda row=row: data.read(row, 8))


def labels(_: Path, file: Path) -> None:
    """Pseudo-labels."""
    from ktransfer.artifacts.labels import read_labels

    read_labels(file)


def permutations(_: Path, file: Path) -> None:
    """A set of permutations."""
    from ktransfer.pretext.permutations import from_file, summarise

    summarise(from_file(file))


def network(_: Path, file: Path) -> None:
    """A network of ours."""
    from ktransfer import networks
    from ktransfer.detection import saved
    from ktransfer.networks.checkpoints import read_tensors

    _tried(lambda: saved.describe(file))
    _tried(lambda: read_tensors(file))
    networks.load(file, networks.describe(file))


def checkpoint(_: Path, file: Path) -> None:
    """A checkpoint of another project."""
    from ktransfer.networks.checkpoints import read_tensors

    read_tensors(file)


def resumed(_: Path, file: Path) -> None:
    """Our own checkpoint of a training."""
    import torch
    from torch import nn

    from ktransfer.training.checkpoint import Checkpoint

    model = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    Checkpoint(file.parent.parent, model, optimiser, None).restore(torch.device("cpu"))


def settings(_: Path, file: Path) -> None:
    """A recipe of a line, and of a study."""
    from ktransfer import cli
    from ktransfer.retrain.selftraining import study

    _tried(lambda: study.cells(study.read(file)))
    cli._tables(file, None)


def record(folder: Path, _: Path) -> None:
    """stage.json: what a command looks up before it starts, and the report of `status`."""
    from ktransfer import run
    from ktransfer.pretext.config import PretextConfig
    from ktransfer.status import status

    _tried(lambda: status(folder))
    run.changes(folder, "pretext", "pretext", PretextConfig(data="scenes:"), {"data": "1"})
    _tried(lambda: run.done_record(folder, "pretext", "pretext", "pretext"))


def progress(folder: Path, _: Path) -> None:
    """What `status` reads of a run at work."""
    from ktransfer import run
    from ktransfer.status import status

    (folder / "pretext").mkdir(exist_ok=True)
    (folder / "pretext" / "stage.json").write_bytes(RECORD)
    with run.locked(folder):
        status(folder)


def logged(_: Path, file: Path) -> None:
    """metrics.jsonl of a training that goes on."""
    from ktransfer.training.log import Log

    Log(file, 3, False)


def results(folder: Path, _: Path) -> None:
    """Results that `eval --compare` shows."""
    from ktransfer.eval import compare

    compare([folder, folder])


def hugging_face(_: Path, file: Path) -> None:
    """The configuration of a folder of transformers."""
    from ktransfer.networks.formats import hugging_face as folder_of
    from ktransfer.networks.formats import preprocessing

    (file.parent / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (file.parent / "config.json").touch()
    _tried(lambda: folder_of.open_folder(file.parent))
    preprocessing.read(file.parent, 0)


def subset(folder: Path, file: Path) -> None:
    """A list of the images whose labels lowshot uses."""
    from ktransfer.data.opening import open_dataset
    from ktransfer.eval.protocols import lowshot

    for name in "ab":
        images_beside(folder, f"images/{name}/1.jpg", f"images/{name}/2.jpg")
    lowshot._listed(file, open_dataset(str(folder / "images")))


def index(folder: Path, _: Path) -> None:
    """The index of a folder, as it is kept in the cache."""
    from ktransfer.data import folders

    images_beside(folder, "images/a/1.jpg")
    with mock.patch.object(folders, "_cache_file", lambda root: folder / "index.json"):
        folders.walk(folder / "images")


def _tried(read: Callable[[], object]) -> None:
    with contextlib.suppress(KTransferError):
        read()


def _both(name: str, seeds_of: Callable[[], list[bytes]], mutate: Mutate, read: Any, *files: str) -> dict[str, Target]:
    """A format twice: changed by what it means, and byte by byte."""
    return {
        f"{name} {how}".strip(): Target(file, seeds_of, one, read)
        for file in files
        for how, one in ((file.rpartition(".")[2] if len(files) > 1 else "", mutate), ("bytes", mutators.of_bytes))
    }


TARGETS: dict[str, Target] = {
    "image": Target("a.img", seeds.pictures, mutators.of_bytes, decode),
    "list txt": Target("list.txt", lambda: [b"a.jpg\nb.jpg\n"], mutators.of_lines, listed),
    "list csv": Target("list.csv", lambda: [b"path,label\na.jpg,x\nb.jpg,y\n"], mutators.of_lines, listed),
    "table": Target("train.csv", lambda: [b"path,label\na.jpg,x\nb.jpg,y\n"], mutators.of_lines, tables),
    "coco": Target("train.json", lambda: [COCO], mutators.of_json, coco),
    "coco classes": Target("instances_train.json", lambda: [COCO], mutators.of_json, coco_classes),
    "pseudo-boxes": Target("pseudo.json", lambda: [COCO, b"[1]"], mutators.of_json, pseudo),
    "voc": Target("VOC2007/Annotations/a.xml", lambda: [VOC], mutators.of_xml, voc),
    "voc list": Target("VOC2007/ImageSets/Main/trainval.txt", lambda: [b"a\n"], mutators.of_lines, voc),
    **_both("features", seeds.features, mutators.of_hdf5, features, "f.h5"),
    **_both("centroids", seeds.centroids, mutators.of_hdf5, centroids, "clusters.h5"),
    **_both("pack", seeds.pack, mutators.of_hdf5, pack, "p.h5"),
    **_both("labels h5", seeds.labels_h5, mutators.of_hdf5, labels, "labels.h5"),
    "npy": Target("f.npy", seeds.npy, mutators.of_bytes, foreign),
    "npz": Target("f.npz", seeds.npz, mutators.of_zip, foreign),
    "labels csv": Target("labels.csv", lambda: [b"key,label,distance\na,0,1\nb,1,0.5\n"], mutators.of_lines, labels),
    "labels bin": Target("labels.bin", seeds.labels_bin, mutators.of_bytes, labels),
    "permutations": Target("p.bin", seeds.permutations, mutators.of_bytes, permutations),
    **_both("safetensors", seeds.network, mutators.of_safetensors, network, "model.safetensors"),
    "checkpoint": Target("c.pt", seeds.checkpoints, mutators.of_zip, checkpoint),
    "checkpoint bytes": Target("c.pt", seeds.checkpoints, mutators.of_bytes, checkpoint),
    "resumed": Target("checkpoint/last.pt", seeds.resumed, mutators.of_zip, resumed),
    "toml": Target("r.toml", seeds.recipes, mutators.of_lines, settings),
    "stage.json": Target("pretext/stage.json", lambda: [RECORD], mutators.of_json, record),
    "progress": Target(".progress.json", seeds.progress, mutators.of_json, progress),
    "metrics.jsonl": Target("metrics.jsonl", lambda: [b'{"step": 1}\n{"step": 5}\n'], mutators.of_lines, logged),
    "hugging face": Target("hf/config.json", seeds.hugging_face, mutators.of_json, hugging_face),
    "hugging face size": Target("hf/preprocessor_config.json", seeds.preprocessor, mutators.of_json, hugging_face),
    "subset": Target("subset.txt", lambda: [b"a/1.jpg\nb/1.jpg\n"], mutators.of_lines, subset),
    "index": Target("index.json", seeds.index, mutators.of_bytes, index),
}
