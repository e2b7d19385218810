"""`ktransfer pack` against Pillow image by image; killed, on a full disk or with other workers: the same bytes."""

import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image, ImageOps

from ktransfer import cli
from ktransfer.data import packing
from ktransfer.data.opening import open_dataset
from ktransfer.data.pack import _begin_worker, pack
from ktransfer.errors import BrokenImage, StageError, UsageError
from ktransfer.images import decoding


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def turned(image: Image.Image, orientation: int) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds, none of which is decoded at a reduced scale for a short side of 40."""
    root = tmp_path_factory.mktemp("zoo") / "zoo"
    root.mkdir()
    photo(50, 75).save(root / "wide.jpg", quality=95)
    photo(91, 47).save(root / "tall.jpg", quality=95)
    photo(40, 60).save(root / "exact.png")
    photo(7, 300).save(root / "strip.png")
    photo(20, 30).save(root / "small.jpg")
    photo(60, 48).convert("L").save(root / "grey.png")
    photo(60, 80).convert("CMYK").save(root / "ink.jpg", quality=95)
    for orientation in range(1, 9):
        image = photo(48, 96, orientation)
        image.save(root / f"turned{orientation}.jpg", quality=95, exif=turned(image, orientation))
    (root / "empty.jpg").write_bytes(b"")
    data = io.BytesIO()
    photo(60, 60).save(data, "JPEG")
    (root / "half.jpg").write_bytes(data.getvalue()[:300])
    return root


def small(path: Path, size: int) -> np.ndarray:
    """The same by Pillow alone."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = size / min(image.size)
    if scale < 1:
        width, height = (int(side * scale + 0.5 + 1e-9) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def test_raw_pixels_are_those_of_pillow(zoo: Path, tmp_path: Path) -> None:
    path = pack(str(zoo), tmp_path / "zoo.h5", 40, raw=True, workers=1, max_broken=0.2)
    source, found = open_dataset(str(zoo)), open_dataset(str(path))
    assert found.keys == source.keys and len(found) == 17
    broken = {}
    for row, key in enumerate(found.keys):
        try:
            pixels = found.read(row, None)
        except BrokenImage as error:
            broken[key] = str(error)
        else:
            np.testing.assert_array_equal(pixels, small(zoo / key, 40), key)
    assert broken.keys() == {"empty.jpg", "half.jpg"}
    assert broken["empty.jpg"] == "empty file" and broken["half.jpg"].startswith("damaged")
    sides = {key: found.read(row, None).shape[:2] for row, key in enumerate(found.keys) if key not in broken}
    assert sides["wide.jpg"] == (40, 60) and sides["tall.jpg"] == (77, 40) and sides["strip.png"] == (7, 300)
    assert sides["small.jpg"] == (20, 30) and sides["turned6.jpg"] == (80, 40) and sides["turned3.jpg"] == (40, 80)
    with h5py.File(path) as file:
        assert {name: file.attrs[name] for name in ("encoding", "size", "quality", "source")} == {
            "encoding": "raw", "size": 40, "quality": 0, "source": source.fingerprint,
        }  # fmt: skip
        assert file["shape"][:].tolist() == [list(sides.get(key, (0, 0))) for key in found.keys]


@pytest.mark.parametrize("quality", [None, 40])
def test_jpegs_are_those_of_pillow(zoo: Path, tmp_path: Path, quality: int | None) -> None:
    path = pack(str(zoo), tmp_path / "zoo.h5", 40, quality=quality, workers=1, max_broken=0.2)
    with h5py.File(path) as file:
        assert file.attrs["quality"] == (quality or 90)
        data, offset, keys = file["data"][:], file["offset"][:], file["key"].asstr()[:]
        for row in np.flatnonzero(file["valid"][:]):
            expected = io.BytesIO()
            Image.fromarray(small(zoo / keys[row], 40)).save(expected, "JPEG", quality=quality or 90)
            assert data[offset[row] : offset[row + 1]].tobytes() == expected.getvalue(), keys[row]


def test_large_jpegs_are_decoded_at_a_reduced_scale(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    photo(200, 300).save(tmp_path / "big/a.jpg", quality=95)
    found = open_dataset(str(pack(str(tmp_path / "big"), tmp_path / "big.h5", 40, raw=True, workers=1))).read(0, None)
    image = Image.open(tmp_path / "big/a.jpg")
    image.draft("RGB", (75, 50))
    assert image.size == (75, 50)
    np.testing.assert_array_equal(found, np.asarray(image.resize((60, 40), Image.Resampling.BILINEAR)))
    assert np.abs(found.astype(int) - small(tmp_path / "big/a.jpg", 40)).mean() < 1


def test_what_no_jpeg_can_hold_loses_its_ends(tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    line = np.repeat(np.arange(66_000) // 300, 3).reshape(1, -1, 3).astype(np.uint8)
    Image.fromarray(line).save(tmp_path / "long/a.png")
    raw = open_dataset(str(pack(str(tmp_path / "long"), tmp_path / "raw.h5", raw=True, workers=1))).read(0, None)
    assert raw.shape == (1, 66_000, 3)
    found = open_dataset(str(pack(str(tmp_path / "long"), tmp_path / "jpeg.h5", workers=1))).read(0, None)
    assert found.shape == (1, 65_500, 3)
    assert np.abs(found.astype(int) - raw[:, 250:-250]).max() < 16


def test_scenes_and_packs_can_be_packed(tmp_path: Path) -> None:
    scenes = open_dataset("scenes:images=14,size=32")
    large = pack(scenes.spec, tmp_path / "large.h5", raw=True, workers=1)
    found = open_dataset(str(large))
    assert found.keys == scenes.keys and found.classes == scenes.classes
    assert found.targets.tolist() == scenes.targets.tolist() and found.name == "large"
    assert all(np.array_equal(found.read(row, None), scenes.read(row, None)) for row in range(14))
    straight = open_dataset(str(pack(scenes.spec, tmp_path / "a.h5", 16, raw=True, workers=1)))
    through = open_dataset(str(pack(str(large), tmp_path / "b.h5", 16, raw=True, workers=1)))
    assert straight.fingerprint == through.fingerprint  # the same keys, classes and pixels


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images in two classes, of which row 33 is broken, and `whole.h5`, the pack of them at 24."""
    root = tmp_path_factory.mktemp("many")
    for number in range(70):
        path = root / "many" / "ab"[number // 35] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(30, 30 + number, number).save(path)
    next(iter(sorted((root / "many/a").iterdir()))).write_text("no image")
    pack(str(root / "many"), root / "whole.h5", 24, workers=1, max_broken=0.1)
    return root


def test_workers_change_nothing(many: Path, tmp_path: Path) -> None:
    path = pack(str(many / "many"), tmp_path / "a.h5", 24, workers=2, max_broken=0.1)
    assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()} and path == tmp_path / "a.h5"


def test_workers_decode_one_giant_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Lock(contextlib.nullcontext[bool]):
        def __enter__(self) -> bool:
            entered.append(True)
            return True

    monkeypatch.setattr(decoding, "_GIANTS", decoding._GIANTS)  # put back afterwards
    monkeypatch.setattr(decoding, "_GIANT_PIXELS", 99)
    decoding.share_giants(Lock())
    data = io.BytesIO()
    photo(10, 10).save(data, "PNG")
    decoding.decode(data.getvalue())
    assert entered == [True]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_begin_worker, initargs=(context.Lock(), context.Event())) as pool:
        kind = pool.submit(
            eval, "type(__import__('ktransfer.images.decoding').images.decoding._GIANTS).__module__"
        ).result()
    assert kind == "multiprocessing.synchronize"


KILLED = """
import os, signal, sys
from ktransfer import files
from ktransfer.data import packing
from ktransfer.data.pack import pack

place, count, workers = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
packing._SAVE_SECONDS = 0.0 if count % 2 else 1e9


def struck(module, name):
    inner = getattr(module, name)

    def call(*arguments, **options):
        global count
        count -= 1
        if count == 0 and not place.startswith("after"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*arguments, **options)
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, call)


where = {"append": (packing.Unfinished, "append"), "after append": (packing.Unfinished, "append"),
         "after save": (packing.Unfinished, "_save"), "save": (files, "write_json"), "head": (packing, "_lay_around"),
         "after head": (packing, "_lay_around"), "commit": (files, "commit"), "forget": (packing, "forget"),
         "new": (packing, "_write_head"), "after new": (packing, "_write_head")}
struck(*where[place])
pack(sys.argv[1], sys.argv[2], 24, workers=workers, max_broken=0.1)
"""
INSTANTS = [
    ("new", 1), ("after new", 1), ("append", 1), ("after append", 1), ("save", 2), ("after append", 3), ("append", 4),
    ("after save", 3), ("after append", 5), ("head", 1), ("after head", 1), ("after new", 1), ("commit", 1),
    ("forget", 1),
]  # fmt: skip


def killed(source: Path, out: Path, place: str, count: int, workers: int = 1) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-c", KILLED, str(source), str(out), place, str(count), str(workers)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_at_any_instant_and_given_again(many: Path, tmp_path: Path) -> None:
    expected = (many / "whole.h5").read_bytes()
    starts = [
        killed(many / "many", tmp_path / str(number) / "a.h5", *instant) for number, instant in enumerate(INSTANTS)
    ]
    for number, (started, instant) in enumerate(zip(starts, INSTANTS, strict=True)):
        assert started.wait() == -signal.SIGKILL, instant
        folder = tmp_path / str(number)
        assert (folder / "a.h5").exists() == (instant[0] == "forget")
        part = folder / "a.h5.part"
        if part.exists():  # what was written after the last saving may be anything
            with part.open("ab") as handle:
                handle.write(b"\xa5" * 999)
        pack(str(many / "many"), folder / "a.h5", 24, workers=1, max_broken=0.1)
        assert bytes_of(folder) == {"a.h5": expected}, instant


def test_killed_again_and_again(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, count in random.Random(0).sample(INSTANTS[2:9], 4):
        assert killed(many / "many", tmp_path / "a.h5", place, count).wait() in (0, -signal.SIGKILL)
    pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1, max_broken=0.1)
    assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()}


def test_workers_of_a_killed_process_end(many: Path, tmp_path: Path) -> None:
    started = killed(many / "many", tmp_path / "a.h5", "after append", 1, workers=2)
    workers: set[int] = set()
    while started.poll() is None:
        found = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        workers |= {int(pid) for pid in found}
        time.sleep(0.02)
    assert len(workers) >= 2 and started.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < until, workers
        time.sleep(0.05)


def test_it_goes_on_and_says_so(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.h5"
    with pytest.raises(StageError, match=r"1 of 70 images .* a/0.png: not an image .* raise --max-broken"):
        pack(str(many / "many"), out, 24, workers=1)
    assert not out.exists()
    pack(str(many / "many"), out, 24, workers=1, max_broken=0.1)
    assert "goes on after 70 of 70 images" in capsys.readouterr().err
    assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()}
    before = out.stat().st_mtime_ns
    pack(str(many / "many"), out, 24, workers=1, max_broken=0.1)
    assert "done before, skipped" in capsys.readouterr().err and out.stat().st_mtime_ns == before
    for options, what in (({"size": 25}, "size"), ({"quality": 80}, "quality"), ({"raw": True}, "encoding, quality")):
        with pytest.raises(UsageError, match=rf"was packed differently \({what}\)"):
            pack(str(many / "many"), out, **{"size": 24, "workers": 1, "max_broken": 0.1} | options)
    with pytest.raises(UsageError, match=r"was packed differently \(source, key, target, class\)"):
        pack("scenes:images=14,size=32", out, 24, workers=1)


def test_other_settings_begin_anew(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError):
        pack(str(many / "many"), tmp_path / "a.h5", 20, raw=True, workers=1)
    pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1, max_broken=0.1)
    assert "starts over" in capsys.readouterr().err
    assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()}


def test_leftovers_of_no_use_begin_anew(many: Path, tmp_path: Path) -> None:
    for damage in (".part", ".rows", ".progress"):
        with pytest.raises(StageError):
            pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1)
        path = tmp_path / f"a.h5{damage}"
        if damage == ".progress":
            path.write_text("{")
        else:
            os.truncate(path, path.stat().st_size // 2)
        pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1, max_broken=0.1)
        assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()}
        (tmp_path / "a.h5").unlink()


def test_two_do_not_write_one_file(many: Path, tmp_path: Path) -> None:
    data = open_dataset(str(many / "many"))
    first = packing.Unfinished(tmp_path / "a.h5", data, packing.Recipe(24, 90))
    with pytest.raises(UsageError, match="another ktransfer process is writing it"):
        pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1, max_broken=0.1)
    first.close()
    pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1, max_broken=0.1)
    assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()}


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_full_disk(many: Path, tmp_path: Path, share: float) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = int((many / "whole.h5").stat().st_size * share)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        with pytest.raises(StageError, match=r"a.h5: cannot go on \(File too large\)"):
            pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1, max_broken=0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pack(str(many / "many"), tmp_path / "a.h5", 24, workers=1, max_broken=0.1)
    assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()}


def test_disk_is_asked_first(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(UsageError, match=r"pack \(70 images\) needs 0.00 GB.* make room"):
        pack(str(many / "many"), tmp_path / "new/a.h5", 24, workers=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--out", "a.hdf"], "name it a.h5"),
        (["--out", "a.h5", "--size", "0"], "--size 0: give the short side"),
        (["--out", "a.h5", "--raw", "--quality", "90"], "--quality: raw pixels have none"),
        (["--out", "a.h5", "--quality", "101"], "101"),
        (["--out", "a.h5", "--max-broken", "2"], "2"),
        (["--out", "a.h5", "--workers", "-1"], "-1"),
        (["--out", "note.txt/a.h5"], "--out note.txt/a.h5: cannot be written"),
        (["--out", "folder.h5"], "--out folder.h5: exists, and is not a complete pack"),
        (["--out", "other.h5"], "--out other.h5: exists, and is not a complete pack"),
        (["--out", "lost.h5"], "--out lost.h5: exists, and is not a complete pack"),
        ([], "Missing option '--out'"),
        (["--out", "a.h5", "--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_misuse(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], rule: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("x")
    Path("other.h5").write_text("x")
    Path("folder.h5").mkdir()
    Path("lost.h5").symlink_to("nowhere.h5")
    assert cli.main(["pack", "--data", str(many / "many"), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and rule in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.h5", "lost.h5", "note.txt", "other.h5"]


def test_command(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(many / "many"), "--size", "24", "--out", str(tmp_path / "a.h5"), "--workers", "1"]
    assert cli.main(["pack", *words]) == 1
    assert "1 of 70 images" in capsys.readouterr().err
    assert cli.main(["pack", *words, "--max-broken", "0.05"]) == 0
    assert "pack: done; 70 images" in capsys.readouterr().err
    assert bytes_of(tmp_path) == {"a.h5": (many / "whole.h5").read_bytes()}


GUARDLESS = """
import sys
from ktransfer.data.pack import pack
pack(sys.argv[1], sys.argv[2], 24, workers=2, max_broken=0.1)
"""


def test_a_script_without_a_guard_is_told_so(many: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(GUARDLESS)
    words = [sys.executable, "script.py", str(many / "many"), "out/a.h5"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("or give workers=1")
    last = done.stderr.rstrip().splitlines()[-1]
    assert "a worker process could not begin" in last and "__name__ == '__main__'" in last and "memory" not in last
    pack(str(many / "many"), tmp_path / "out/a.h5", 24, workers=1, max_broken=0.1)
    assert bytes_of(tmp_path / "out") == {"a.h5": (many / "whole.h5").read_bytes()}
