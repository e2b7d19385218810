"""A batch is a function of its rows: threads, order, cache and broken neighbours change nothing."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer.cli import main
from ktransfer.data.dataset import Dataset, check_broken
from ktransfer.data.loader import ImageLoader, cache_place, typical_short_side
from ktransfer.data.opening import open_dataset
from ktransfer.errors import BrokenImage, StageError, UsageError
from ktransfer.images.decoding import square

BROKEN = {3: "known format", 7: "empty file"}
COUNT = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for row in range(COUNT):
        pixels = random.integers(0, 256, (20 + 4 * row, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{row:02}.{'jpg' if row % 2 else 'png'}")
    (root / "03.jpg").write_text("not an image")
    (root / "07.jpg").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_dataset(str(root))


def expected(data: Dataset, rows: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    empty = np.zeros((size, size, 3), np.uint8)
    squares = [empty if row in BROKEN else square(data.read(row, size), size) for row in rows]
    return torch.tensor(np.stack(squares)).permute(0, 3, 1, 2), torch.tensor([row not in BROKEN for row in rows])


@pytest.mark.parametrize("cache_bytes", [0, None])
@pytest.mark.parametrize("workers", [1, 5])
def test_a_batch_depends_on_its_rows_alone(data: Dataset, workers: int, cache_bytes: int | None) -> None:
    images = ImageLoader(data, 12, workers, cache_bytes)
    orders = [[5, 3, 5, 0], list(range(COUNT)), list(reversed(range(COUNT))), [7], [3, 1]]
    for _ in range(2):
        for rows in orders:
            pixels, valid = images.batch(torch.tensor(rows))
            truth, sound = expected(data, rows, 12)
            assert pixels.dtype == torch.uint8 and valid.dtype == torch.bool
            assert torch.equal(pixels, truth) and torch.equal(valid, sound)
    for (rows, pixels, valid, waited), order in zip(
        images.batches(torch.tensor(order) for order in orders), orders, strict=True
    ):
        truth, sound = expected(data, order, 12)
        assert rows.tolist() == order and torch.equal(pixels, truth) and torch.equal(valid, sound) and waited >= 0
    assert images.broken.keys() == BROKEN.keys()
    assert all(part in images.broken[row] for row, part in BROKEN.items())


def counted(data: Dataset) -> tuple[Dataset, list[int]]:
    reads: list[int] = []

    def read(row: int, short_side: int | None) -> np.ndarray:
        reads.append(row)
        return data.read(row, short_side)

    return replace(data, read=read), reads


def test_cache_reads_each_image_once_and_only_when_all_fit(data: Dataset) -> None:
    everything = torch.arange(COUNT)
    for budget, times in ((COUNT * 3 * 64, 1), (COUNT * 3 * 64 - 1, 2)):
        watched, reads = counted(data)
        images = ImageLoader(watched, 8, 2, budget)
        images.batch(everything)
        images.batch(everything.flip(0))
        assert len(reads) == times * (COUNT - len(BROKEN)) + len(BROKEN)


def test_results_are_the_callers_own(data: Dataset) -> None:
    images = ImageLoader(data, 8, 2)
    first = images.batch(torch.arange(4))[0]
    first.zero_()
    assert torch.equal(images.batch(torch.arange(4))[0], expected(data, [0, 1, 2, 3], 8)[0])


def test_two_batches_are_prepared_ahead(data: Dataset) -> None:
    watched, reads = counted(data)
    stream = ImageLoader(watched, 8, 2, 0).batches(torch.tensor([row]) for row in (0, 1, 2, 4, 5, 6))
    next(stream)
    deadline = time.monotonic() + 5
    while len(reads) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert sorted(reads) == [0, 1, 2]
    stream.close()
    time.sleep(0.05)
    assert sorted(reads) == [0, 1, 2]


def test_waiting_is_measured(data: Dataset) -> None:
    def slow(row: int, short_side: int | None) -> np.ndarray:
        time.sleep(0.05)
        return np.zeros((8, 8, 3), np.uint8)

    stream = ImageLoader(replace(data, read=slow), 8, 1, 0).batches([torch.tensor([0])])
    assert 0.03 < next(stream)[3] < 5


def test_what_a_thread_raises_reaches_the_consumer(data: Dataset) -> None:
    def fail(row: int, short_side: int | None) -> np.ndarray:
        if row == 2:
            raise MemoryError("no memory")
        return data.read(row, short_side)

    images = ImageLoader(replace(data, read=fail), 8, 2)
    stream = images.batches(torch.tensor([row]) for row in range(3))
    assert [next(stream)[0].item(), next(stream)[0].item()] == [0, 1]
    with pytest.raises(MemoryError):
        next(stream)
    with pytest.raises(MemoryError):
        images.batch(torch.tensor([2]))
    assert images.broken == {}


def test_close_stops_what_is_under_way(data: Dataset) -> None:
    release, running, done = threading.Event(), threading.Event(), list[int]()

    def read(row: int, short_side: int | None) -> np.ndarray:
        if row > 0:
            running.set()
            release.wait(5)
        done.append(row)
        return np.zeros((8, 8, 3), np.uint8)

    stream = ImageLoader(replace(data, read=read), 8, 1, 0).batches(torch.tensor([row]) for row in range(20))
    next(stream)
    running.wait(5)
    threading.Timer(0.05, release.set).start()
    stream.close()
    assert done == [0, 1]


def test_rows_out_of_range_and_empty_batches(data: Dataset) -> None:
    images = ImageLoader(data, 8, 2)
    for row in (-1, COUNT):
        with pytest.raises(IndexError):
            images.batch(torch.tensor([row]))
    pixels, valid = images.batch(torch.empty(0, dtype=torch.int64))
    assert pixels.shape == (0, 3, 8, 8) and valid.shape == (0,)
    assert list(images.batches([])) == []


def test_typical_short_side(data: Dataset) -> None:
    sides = [min(20 + 4 * row, 40) for row in range(COUNT) if row not in BROKEN]
    assert typical_short_side(data) == np.percentile(sides, 10, method="lower") == 28
    assert typical_short_side(replace(data, short_side=None)) == 28
    assert typical_short_side(data, sample=2) == 20

    def broken(row: int) -> int:
        raise BrokenImage("empty file")

    with pytest.raises(StageError, match=r"none of 24 images can be read \(23.jpg: empty file\)"):
        typical_short_side(replace(data, short_side=broken))


def test_check_broken(data: Dataset) -> None:
    broken = {9: "ninth", 3: "third", 7: "seventh", 5: "fifth"}
    check_broken(broken, 400, 0.01, data)
    check_broken({}, 0, 0.0, data)
    with pytest.raises(StageError) as caught:
        check_broken(broken, 399, 0.01, data)
    message = str(caught.value)
    assert "4 of 399" in message and "1.00%" in message and "--max-broken" in message and "\n" not in message
    assert "03.jpg: third; 05.jpg: fifth; 07.jpg: seventh;" in message and "ninth" not in message


def test_files_of_a_path_stay_on_their_rows(data: Dataset) -> None:
    assert [Path(key).stem for key in data.keys] == [f"{row:02}" for row in range(COUNT)]


@pytest.mark.parametrize("cache", ["auto", "ram", "off"])
def test_where_they_are_kept_changes_nothing(data: Dataset, cache: str) -> None:
    watched, reads = counted(data)
    images = ImageLoader(watched, 8, 2, cache=cache)
    assert images.kept_on == (None if cache == "off" else torch.device("cpu"))
    for _ in range(2):
        pixels, valid = images.batch(torch.arange(COUNT))
        truth, sound = expected(data, list(range(COUNT)), 8)
        assert torch.equal(pixels, truth) and torch.equal(valid, sound)
    sound_ones = COUNT - len(BROKEN)
    assert len(reads) == sound_ones * (2 if cache == "off" else 1) + len(BROKEN)


def test_a_cache_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktransfer.data.loader.available_bytes", lambda: 40_000)
    cpu = torch.device("cpu")
    assert cache_place("auto", 52, 8, cpu) == cpu  # 52 x 192 bytes are just less than a quarter
    assert cache_place("auto", 53, 8, cpu) is None
    assert cache_place("ram", 208, 8, cpu) == cpu
    assert cache_place("off", 1, 8, cpu) is None
    with pytest.raises(UsageError, match=r"--cache-images ram: 209 images of 8 x 8 take 0.0 GB, .* are free; give"):
        cache_place("ram", 209, 8, cpu)
    with pytest.raises(UsageError, match=r"--cache-images device: cpu has no memory of its own; give auto, ram or off"):
        cache_place("device", 1, 8, cpu)


def test_a_gpu_with_room_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (40_000, 80_000))
    monkeypatch.setattr("ktransfer.data.loader.available_bytes", lambda: 10**9)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert cache_place("auto", 104, 8, gpu) == gpu  # half of what is free
    assert cache_place("auto", 105, 8, gpu) == cpu
    assert cache_place("device", 208, 8, gpu) == gpu
    assert cache_place("ram", 1, 8, gpu) == cpu
    with pytest.raises(UsageError, match="--cache-images device: 209 images"):
        cache_place("device", 209, 8, gpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["device", "ram", "off"])
def test_on_a_gpu_they_are_the_same(data: Dataset, cache: str) -> None:
    images = ImageLoader(data, 12, 3, cache=cache, device=torch.device("cuda"))
    assert (images.kept_on is not None) == (cache != "off")
    orders = [[5, 3, 5, 0], list(range(COUNT)), list(reversed(range(COUNT))), [7], [3, 1]]
    for _ in range(2):
        found = list(images.batches(torch.tensor(order) for order in orders))
        for (_, pixels, valid, _), order in zip(found, orders, strict=True):
            truth, sound = expected(data, order, 12)
            assert pixels.device.type == "cuda" and valid.device.type == "cpu"
            assert torch.equal(pixels.cpu(), truth) and torch.equal(valid, sound)


READ_ALL = """
import sys, numpy as np, torch
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader

count = int(sys.argv[1])
read = lambda row, short_side: np.full((64, 64, 3), row % 256, np.uint8)
keys = tuple(f"{row:06}" for row in range(count))
data = Dataset("made", "made", keys, np.full(count, -1, np.int32), (), "0" * 64, read)
images = ImageLoader(data, 64, 2, cache="off")
for rows, pixels, valid, wait in images.batches(torch.arange(count).split(64)):
    assert int(pixels[0, 0, 0, 0]) == int(rows[0]) % 256
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see the peak of memory")
def test_memory_does_not_grow_with_the_images() -> None:
    peaks = []
    for count in (1000, 10_000):  # 12 and 123 MB of squares
        done = subprocess.run([sys.executable, "-c", READ_ALL, str(count)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("stage", [["pretext"], ["retrain", "--labels", "classes"]])
def test_stages_refuse_before_they_start(stage: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*stage, "--data", "scenes:images=20,size=64", "--device", "cpu", "--cache-images", "device"]
    assert main(["--run", str(tmp_path / "run"), *line]) == 2
    assert "--cache-images device: cpu has no memory of its own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
