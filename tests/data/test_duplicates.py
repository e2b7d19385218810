"""Images that are in two parts: by their bytes, under whatever name, in files and in packs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktransfer.data.duplicates import shared, tell_shared
from ktransfer.data.opening import open_dataset, open_splits
from ktransfer.data.pack import pack


def put(path: Path, seed: int, pixels: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (pixels, pixels, 3)).astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(6):
        put(tmp_path / "d/train" / "ab"[number % 2] / f"{number}.png", number)
    for number in range(4, 9):  # two are training images, under other names
        put(tmp_path / "d/val" / "ab"[number % 2] / f"x{number}.png", number)
    return tmp_path / "d"


def test_under_other_names_and_in_packs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = open_splits(str(root))
    found = [(train.keys[one], val.keys[two]) for one, two in shared(train, val)]
    assert found == [("a/4.png", "a/x4.png"), ("b/5.png", "b/x5.png")]
    assert tell_shared("d", train, val) == 2
    assert (
        capsys.readouterr().err == "d: 2 of its 5 test images are training images too, byte for byte, such as "
        "a/x4.png, b/x5.png: what is measured on these says nothing of new images\n"
    )
    for part in ("train", "val"):
        pack(str(root / part), tmp_path / "p" / f"{part}.h5", 32, workers=1)
    assert shared(*open_splits(str(tmp_path / "p"))) == shared(train, val)


def test_equal_sizes_and_ends_are_not_enough(tmp_path: Path) -> None:
    data = bytearray(np.random.default_rng(0).bytes(30_000))
    for name in ("one/a/1.png", "two/a/1.png", "two/a/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    data[15_000] ^= 1
    (tmp_path / "two/a/1.png").write_bytes(data)
    one, two = (open_dataset(str(tmp_path / name)) for name in ("one", "two"))
    assert shared(one, two) == [(0, 1)]
    (tmp_path / "two/a/2.png").unlink()  # meanwhile
    assert shared(one, two) == []


def test_nothing_to_compare() -> None:
    train, val = open_splits("scenes:images=24,size=32")
    assert tell_shared("scenes", train, val) == 0
