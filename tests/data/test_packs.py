"""A pack against h5py and against the folder of its images; whatever is cut off, foreign or changed is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer import cli
from ktransfer.artifacts.features import create_or_resume
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader, typical_short_side
from ktransfer.data.opening import open_dataset, open_splits
from ktransfer.data.pack import pack
from ktransfer.errors import BrokenImage, StageError, UsageError

SIDE = 48


def draw(path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = (int(side) for side in random.integers(60, 90, 2))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/train` and `/val` with two classes, row 5 of train broken, and packs of both in `jpeg` and `raw`."""
    root = tmp_path_factory.mktemp("packs")
    for part, count in (("train", 24), ("val", 8)):
        for number in range(count):
            draw(root / "images" / part / f"class{number % 2}" / f"{number:02}.jpg", 100 * len(part) + number)
    (root / "images/train/class0/10.jpg").write_bytes(b"no image")
    for name in ("jpeg", "raw"):
        for part in ("train", "val"):
            pack(
                str(root / "images" / part),
                root / name / f"{part}.h5",
                SIDE,
                name == "raw",
                workers=1,
                max_broken=0.1,
            )
    return root


def unpacked(file: Path, folder: Path) -> Path:
    """The images of a pack as files with its keys, found by h5py alone; raw ones as PNG in spite of their name."""
    with h5py.File(file) as found:
        data, offset = found["data"][:], found["offset"][:]
        for row, key in enumerate(found["key"].asstr()[:]):
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = data[offset[row] : offset[row + 1]]
            if found.attrs["encoding"] == "raw" and found["valid"][row]:
                height, width = found["shape"][row]
                Image.fromarray(stored.reshape(height, width, 3)).save(path, format="PNG")
            else:
                path.write_bytes(stored.tobytes())
    return folder


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_equals_the_folder_of_its_images(root: Path, tmp_path: Path, encoding: str) -> None:
    found = open_dataset(str(root / encoding / "train.h5"))
    folder = open_dataset(str(unpacked(root / encoding / "train.h5", tmp_path / "train")))
    source = open_dataset(str(root / "images/train"))
    assert found.keys == folder.keys == source.keys and found.classes == folder.classes == source.classes
    assert found.targets.tolist() == folder.targets.tolist() == source.targets.tolist()
    assert found.name == "train" and len({found.fingerprint, folder.fingerprint, source.fingerprint}) == 3
    assert typical_short_side(found) == typical_short_side(folder) == SIDE
    for size in (SIDE, 30, 11):
        batches = [ImageLoader(data, size, 2).batch(torch.arange(24)) for data in (found, folder)]
        assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
        assert batches[0][1].tolist() == [row != 5 for row in range(24)]


def test_a_broken_image_keeps_its_row_and_its_reason(root: Path) -> None:
    source, found = (open_dataset(str(root / name)) for name in ("images/train", "raw/train.h5"))
    with pytest.raises(BrokenImage) as expected:
        source.read(5, None)
    for attempt in (lambda: found.read(5, SIDE), lambda: found.short_side(5)):
        with pytest.raises(BrokenImage) as reason:
            attempt()
        assert str(reason.value) == str(expected.value)


def test_every_stage_makes_the_same_of_packs_and_of_folders(root: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        unpacked(root / "raw" / f"{part}.h5", tmp_path / "folders" / part)
    shutil.copytree(root / "raw", tmp_path / "packs")
    fast = ["--width", "0.05", "--epochs", "1", "--batch", "8", "--max-broken", "0.1"]
    for name in ("folders", "packs"):
        data = str(tmp_path / name)
        line = ["--run", str(tmp_path / f"{name}.of" / "run"), "pretext", "--data", data, "--arch", "vgg16_bn"]
        line += ["--permutations", "6", *fast, "extract", "--max-broken", "0.1", "cluster", "--k", "4"]
        line += ["retrain", "--arch", "alexnet_bn", "--stride", "2", "--size", "40", *fast]
        line += ["eval", "--layers", "conv2", "--lrs", "0.01", "--epochs", "1", "--batch", "8", "--max-broken", "0.1"]
        assert cli.main(line) == 0
    for file in ("pretext/model.safetensors", "clusters/labels.csv", "retrain/model.safetensors", "eval/linear.csv"):
        ours, theirs = ((tmp_path / f"{name}.of" / "run" / file).read_bytes() for name in ("packs", "folders"))
        assert ours == theirs, file
    # Labels go by keys, so those of a folder serve its pack; features are of the pixels, and belong to one of the two.
    labels = str(tmp_path / "folders.of/run/clusters/labels.csv")
    line = ["--run", str(tmp_path / "crossed"), "retrain", "--data", str(root / "jpeg/train.h5"), "--labels", labels]
    assert cli.main([*line, "--arch", "alexnet_bn", "--stride", "2", "--size", "40", *fast]) == 0


def test_nothing_stays_open(root: Path) -> None:
    path = root / "jpeg/train.h5"
    data = open_dataset(str(path))
    data.read(0, None)
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert str(path) not in opened
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(data.read(1, None), data.read(1, None)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_parts(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = open_splits(str(root / "jpeg"))
    assert (len(train), len(val)) == (24, 8) and train.classes == val.classes == ("class0", "class1")
    assert open_dataset(str(root / "jpeg")).fingerprint == train.fingerprint
    assert "has train.h5 and val.h5: using" in capsys.readouterr().err
    shutil.copy(root / "jpeg/train.h5", tmp_path / "train.h5")
    with pytest.raises(UsageError, match=r"has no folder val or valid .* train.h5 and val.h5"):
        open_splits(str(tmp_path))
    shutil.copytree(root / "images/val", tmp_path / "val")
    mixed = open_splits(str(tmp_path))
    assert mixed[0].fingerprint == train.fingerprint and mixed[1].read(0, None).shape != val.read(0, None).shape
    shutil.copytree(root / "images/train", tmp_path / "train")
    assert open_splits(str(tmp_path))[0].fingerprint == open_dataset(str(root / "images/train")).fingerprint
    with pytest.raises(UsageError, match=r"train.h5 has no folder train"):
        open_splits(str(root / "jpeg/train.h5"))


def test_parts_need_a_class_for_every_image(root: Path, tmp_path: Path) -> None:
    lines = [
        f"{path},{label}" for path, label in (("class0/00.jpg", "x"), ("class1/01.jpg", "y"), ("class0/02.jpg", ""))
    ]
    (root / "images/train/list.csv").write_text("\n".join(["path,label", *lines]))
    pack(str(root / "images/train/list.csv"), tmp_path / "train.h5", SIDE, workers=1)
    shutil.copy(root / "jpeg/val.h5", tmp_path / "val.h5")
    (root / "images/train/list.csv").unlink()
    with pytest.raises(UsageError, match=r"train.h5: class0/02.jpg has no class"):
        open_splits(str(tmp_path))


def cut(length: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        os.truncate(path, int(length * path.stat().st_size))

    return change


def edit(name: str, change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    apply.__name__ = name
    return apply


def put(name: str, where: object, value: object) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        file[name][where] = value

    return edit(f"{name}={value}", change)


def again(name: str, **how: object) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        values = how.pop("data", file[name][:])
        del file[name]
        file.create_dataset(name, data=values, **how)

    return edit(f"{name} again", change)


def linked(file: h5py.File) -> None:
    shutil.copy(file.filename, file.filename + ".other")
    del file["target"]
    file["target"] = h5py.ExternalLink(file.filename + ".other", "target")


def features(path: Path) -> None:
    path.unlink()
    writer = create_or_resume(path, ["a"], np.zeros(1, np.int32), 2, "float16", {"fingerprint": "x"})
    writer.write(0, np.zeros((1, 2)), np.ones(1, bool))
    writer.finish()


REFUSED = {
    "empty": (cut(0), "not a whole HDF5 file"),
    "half a header": (cut(0.01), "not a whole HDF5 file"),
    "half the data": (cut(0.5), "not a whole HDF5 file"),
    "the last byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "not a whole HDF5 file"),
    "text": (lambda path: path.write_text("a.jpg\n"), "not a whole HDF5 file"),
    "features": (features, "no data set class, offset, shape, digest, data"),
    "schema": (edit("schema", lambda file: file.attrs.modify("schema", 2)), "schema is 2, this version reads 1"),
    "attribute": (edit("size", lambda file: file.attrs.pop("size")), "no attribute size"),
    "encoding": (edit("encoding", lambda file: file.attrs.modify("encoding", "png")), "must be jpeg or raw"),
    "missing": (edit("no target", lambda file: file.pop("target")), "no data set target"),
    "chunks": (again("data", chunks=(1000,), compression="gzip"), "data must be contiguous and in the file itself"),
    "link": (edit("link", linked), "target must be contiguous and in the file itself"),
    "kind": (again("target", dtype="<i8"), "target is int64, must be <i4"),
    "strings": (again("key", dtype=h5py.string_dtype()), "key is object, must be strings of fixed length"),
    "axes": (again("shape", data=np.zeros(48, "<i4")), "must have 2 axes"),
    "rows": (again("valid", data=np.ones(23, bool)), r"valid has shape \(23,\), must be \(24,\)"),
    "offset beyond the end": (put("offset", 24, 2**40), "offsets do not grow"),
    "offset before the one before": (put("offset", 3, 1), "offsets do not grow"),
    "offset below zero": (put("offset", 0, -1), "offsets do not grow"),
    "target": (put("target", 0, 2), "a target is not one of 2 classes"),
    "shape": (put("shape", 0, [0, 9]), "an image has no pixels"),
    "other offsets": (put("offset", 1, 7), "more or fewer bytes than its shape says"),
    "key": (put("key", 0, b"class0/99.jpg"), "the fingerprint differs"),
    "digest": (put("digest", 3, 1), "the fingerprint differs"),
    "target within": (put("target", 0, 1), "the fingerprint differs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_whole_pack_is_refused_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, rule = REFUSED[name]
    path = tmp_path / "train.h5"
    shutil.copy(root / "raw/train.h5", path)
    change(path)
    with pytest.raises(UsageError, match=rule) as error:
        open_dataset(str(path))
    assert "\n" not in str(error.value) and "ktransfer pack" in str(error.value)
    assert cli.main(["--run", str(tmp_path / "run"), "pretext", "--data", str(path)]) == 2
    assert str(path) in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_hdf5_that_claims_more_than_the_file_holds_is_refused(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.h5"
    shutil.copy(root / "raw/train.h5", path)
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    with h5py.File(path, "r+") as file:
        del file["key"]
        kind = h5py.h5t.py_create(np.dtype("S100"))
        h5py.h5d.create(file.id, b"key", kind, h5py.h5s.create_simple((2**40,)), early)
    with pytest.raises(UsageError, match="cut off before the end of key"):
        open_dataset(str(path))


def stored_at(path: Path) -> int:
    with h5py.File(path) as file:
        return int(file["data"].id.get_offset())


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_changed_bytes_are_noticed_when_they_are_read(root: Path, tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "train.h5"
    shutil.copy(root / encoding / "train.h5", path)
    with path.open("rb+") as handle:
        handle.seek(stored_at(path) + 5)
        handle.write(b"\xa5\x5a")
    data = open_dataset(str(path))
    for _ in range(2):
        with pytest.raises(StageError, match=r"the bytes of class0/00.jpg are not those that were packed"):
            data.read(0, None)
    assert data.read(1, None).shape[2] == 3
    with pytest.raises(StageError, match="not those that were packed"):
        ImageLoader(data, 20, 2).batch(torch.arange(24))


def test_a_file_that_goes_away_is_a_failure_and_not_a_broken_image(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.h5"
    shutil.copy(root / "raw/train.h5", path)
    data: Dataset = open_dataset(str(path))
    assert data.reader is not None
    os.truncate(path, path.stat().st_size // 2)
    data.read(0, None)
    for read in (lambda: data.read(23, None), lambda: data.reader(23)(None)):
        with pytest.raises(StageError, match="was cut off while it was read"):
            read()
    path.unlink()
    with pytest.raises(StageError, match="cannot be read"):
        data.read(0, None)
