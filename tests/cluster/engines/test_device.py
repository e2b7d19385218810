"""The exact engine for GPUs, on CPU tensors: its certificate, streaming, synchronisation and failures.

Its labels are tested with the other engines' in test_exact.py, its Triton kernels in test_triton_kernels.py.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ktransfer.cluster.algorithms.lloyd import kmeans
from ktransfer.cluster.arrays import _tensor_reader, device_reader, frame_of, reader, weighed
from ktransfer.cluster.engines import choose, device, device_rows, device_steps, engine
from ktransfer.cluster.engines.device import device_engine
from ktransfer.cluster.engines.device_rounding import doubt, halve, halve_centroids, ratio
from ktransfer.cluster.engines.engine import Rows, faiss_engine
from ktransfer.errors import StageError, UsageError


def rows_of(data, weights=None):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop], weights)


def clumps(n, d, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(12, d))[rng.integers(0, 12, n)] + rng.normal(size=(n, d)) + offset).astype(np.float32)


def same(first, second):
    for field in fields(first):
        if field.name not in ("seconds", "engine", "version"):
            left, right = getattr(first, field.name), getattr(second, field.name)
            assert left.tobytes() == right.tobytes() if isinstance(left, np.ndarray) else left == right, field.name


def kept(monkeypatch, number):
    """So many rows stay on the device, in spans of 40 rows."""
    monkeypatch.setattr(device_rows, "SPAN_NUMBERS", 40 * 24)
    monkeypatch.setattr(device_rows, "STAGE_NUMBERS", 7 * 24)
    monkeypatch.setattr(device, "kept_rows", lambda rows, k, budget: number)


@pytest.mark.parametrize("weights", [None, np.linspace(0.3, 4, 333)])
def test_streamed_rows_give_the_same_bytes(monkeypatch, capsys, weights):
    data = clumps(333, 24)
    kept(monkeypatch, 333)
    expected = kmeans(rows_of(data, weights), 20, 6, engine=device_engine("cpu"))
    assert "stay on the GPU" not in capsys.readouterr().err
    for number in (0, 40, 160):
        kept(monkeypatch, number)
        ticks = []
        found = kmeans(rows_of(data, weights), 20, 6, engine=device_engine("cpu", tell=ticks.append))
        same(expected, found)
        assert ticks == [
            f"k-means, exact engine: {number} of 333 rows stay on the GPU (4611686018.4 GB free), "
            "the others are copied there in each pass"
        ]
    peer = kmeans(rows_of(data, weights), 20, 6, engine=faiss_engine())
    np.testing.assert_array_equal(found.labels, peer.labels)
    np.testing.assert_allclose(found.centroids, peer.centroids, rtol=1e-6)


def test_memory_decides_how_many_rows_stay(monkeypatch):
    rows = Rows(1_300_000, 8192, lambda start, stop: None)
    assert device_rows.kept_rows(rows, 2000, 130 * 10**9) == 1_300_000
    some = device_rows.kept_rows(rows, 2000, 24 * 10**9)
    assert 0 < some < 400_000
    assert some % device_rows.span(rows) == 0
    with pytest.raises(StageError, match=r"2000 centroids of 8192 numbers need .* --engine faiss"):
        device_rows.kept_rows(rows, 2000, 10**9)
    with pytest.raises(StageError, match="the GPU has 0"):
        device_engine("cpu", budget=1000).scan(rows_of(clumps(50, 8)), clumps(5, 8), lambda done: None)


def cut(product):
    """float32, cut off at 24 bits instead of rounded."""
    mantissa, exponent = np.frexp(product)
    return np.ldexp(np.trunc(mantissa * 2**24) / 2**24, exponent)


def tensor_core(rows, centroids, size=4):
    """Products of float16 added as the coarsest tensor core does: aligned to the largest, cut off, 4 at a time."""
    total = np.zeros((len(rows), len(centroids)))
    products = rows[:, None] * centroids[None]
    for start in range(0, products.shape[2], size):
        terms = np.concatenate([total[..., None], products[..., start : start + size]], axis=2)
        least = np.exp2(np.frexp(np.abs(terms).max(axis=2, keepdims=True))[1] - 24.0)
        total = cut((np.trunc(terms / least) * least).sum(axis=2))
    return total


@pytest.mark.parametrize("kind", ["normal", "far", "scaled", "outlier", "tiny", "positive"])
@pytest.mark.parametrize("d", [3, 100, 1000])
def test_scores_are_never_off_by_more_than_the_doubt(kind, d):
    data = clumps(60, d, offset=1e5 if kind == "far" else 0.0)
    if kind == "positive":
        data = np.abs(data)
    if kind == "scaled":
        data *= np.logspace(-9, 9, 60, dtype=np.float32)[:, None]
    if kind == "tiny":
        data *= np.float32(1e-21)
    if kind == "outlier":
        data[:, 0] *= 1e5
    centroids = data[:30] * np.float32(0.7) + data[30:] * np.float32(0.3)
    origin = torch.from_numpy(data.mean(axis=0))
    rows, target = halve(torch.from_numpy(data), origin), halve_centroids(torch.from_numpy(centroids), origin)
    x, c = data.astype(np.float64) - origin.numpy(), centroids.astype(np.float64) - origin.numpy()
    unit = float(target.unit)
    right = (x @ c.T - (c**2).sum(axis=1) / 2) / unit**2
    allowed = doubt(rows, target).numpy() / 2
    wide = rows.half.numpy().astype(np.float64), target.half.numpy().astype(np.float64)
    by = ratio(rows, target).numpy().astype(np.float64)
    for product in (wide[0] @ wide[1].T, device_steps.product(rows.half, target.half).numpy(), tensor_core(*wide)):
        found = np.float32(product * by[:, None] + target.bias.numpy())
        assert (np.abs(found - right) <= allowed[:, None]).all()
    # And it is a bound worth having: not much above what rounding to float16 alone can do.
    scale = np.linalg.norm(x, axis=1) * np.linalg.norm(c, axis=1).max() / unit**2
    assert np.median(allowed / scale) < 2.0**-10 + 4 * d * 2.0**-24 + (1e-2 if kind in ("scaled", "outlier") else 0)


def test_the_recheck_is_needed_and_small(monkeypatch):
    data = clumps(3000, 64)
    seen = []
    settle = device_steps.settle

    def spy(*given):
        seen.append(settle(*given))
        return seen[-1]

    monkeypatch.setattr(device, "settle", spy)
    centroids = data[:300].copy()
    labels = device_engine("cpu").scan(rows_of(data), centroids, lambda done: None).labels
    assert 0 < seen[0] < 300
    monkeypatch.setattr(device, "settle", lambda *given: 0)
    trusted = device_engine("cpu").scan(rows_of(data), np.nextafter(centroids, 9), lambda done: None).labels
    right = faiss_engine().scan(rows_of(data), np.nextafter(centroids, 9), lambda done: None).labels
    assert 0 < (trusted != right).sum() < 30
    assert (labels != right).sum() < 30


@pytest.mark.parametrize("copies", [3, 40])
def test_equal_centroids_give_the_lowest_index(copies):
    data = clumps(200, 16)
    centroids = np.tile(data[:7], (copies, 1))
    found = device_engine("cpu").scan(rows_of(data), centroids, lambda done: None)
    assert found.labels.max() < 7
    np.testing.assert_array_equal(found.labels, faiss_engine().scan(rows_of(data), centroids, lambda done: None).labels)


@pytest.mark.parametrize("size", [3e38, 2e19, 1e-38])
def test_numbers_at_the_ends_of_float32(size):
    """Differences and squares overflow or vanish; nothing becomes NaN, and float64 decides."""
    base = clumps(80, 6, seed=3)
    data = (base / np.abs(base).max()).astype(np.float32) * np.float32(size)
    found = device_engine("cpu").scan(rows_of(data), data[:9].copy(), lambda done: None)
    wide = data.astype(np.float64)
    squares = ((wide[:, None] - wide[:9]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.labels, squares.argmin(axis=1))
    assert not np.isnan(found.distances).any()
    np.testing.assert_allclose(found.sums.sum(axis=0), wide.sum(axis=0), rtol=1e-9)


class Seen(TorchDispatchMode):
    """Operations that make the host wait for a GPU."""

    WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "bincount", "unique", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.split(".")[0]
        indexed = name in ("index", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1] if index is not None
        )
        if name.startswith(self.WAIT) or indexed:
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def test_a_pass_waits_for_the_device_once():
    data = clumps(400, 24)
    stock = device_rows.Stock(rows_of(data), torch.zeros(24), 400)
    far = torch.from_numpy(np.eye(24, dtype=np.float32) * 1000)
    with Seen() as seen:
        device.look(stock, far[:3], None, lambda done: None)
    assert seen.names == ["nonzero"]
    with Seen() as seen:
        device.look(stock, torch.from_numpy(np.tile(data[:50], (8, 1))), None, lambda done: None)
    assert seen.names == ["nonzero", "index"]  # rows in doubt, and those of them with many candidates


def test_out_of_memory_is_one_line(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(device, "look", full)
    with pytest.raises(StageError, match=r"ran out of memory \(CUDA out of memory. Tried .* --engine faiss$"):
        device_engine("cpu").scan(rows_of(clumps(50, 8)), clumps(5, 8), lambda done: None)


def test_without_triton_torch_alone_and_said(monkeypatch):
    said = []
    monkeypatch.setitem(sys.modules, "ktransfer.cluster.engines.choose.triton_kernels", None)
    device._tried.cache_clear()
    assert device._kernels(torch.device("cuda"), said.append) is None
    device._tried.cache_clear()
    assert "without Triton" in said[0]
    assert "torch" in said[0]
    assert device._kernels(torch.device("cpu"), said.append) is None
    assert len(said) == 1


class Kernels:
    """What triton_kernels.py offers, in torch; `off` is added to second scores and to sums."""

    def __init__(self, **off):
        self.off = off

    def nearest_two(self, rows, by, centroids, bias):
        return self.top_two(device_steps.product(rows, centroids), by, bias)

    def top_two(self, scores, by, bias):
        two = (scores * by[:, None] + bias).topk(2, dim=1)
        return two.indices[:, 0].int(), two.values[:, 0], two.values[:, 1] + self.off.get("scores", 0)

    def pair_squares(self, *given):
        squares, lengths = device_steps._pair_squares(*given)
        return squares, lengths + self.off.get("distances", 0)

    def add_rows(self, wide, weights, order, edges, raw, sums):
        labels = torch.searchsorted(edges, torch.arange(len(order)), right=True) - 1
        sums.index_add_(0, labels, wide[order].double() * weights[order, None] + self.off.get("sums", 0))
        distances = torch.empty(len(wide))
        distances[order] = (wide[order] - raw[labels]).double().square().sum(dim=1).float()
        return distances


def test_a_kernel_that_is_wrong_is_noticed():
    device_steps.trial(Kernels(), torch.device("cpu"))
    for what, count in (("scores", 130), ("sums", 130), ("distances", 44)):
        with pytest.raises(ArithmeticError, match=f"{what} of {count} rows"):
            device_steps.trial(Kernels(**{what: 1e5}), torch.device("cpu"))


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_machine_with_gpus_takes_the_exact_engine(monkeypatch, gpus):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(choose, "device_engine", lambda name, tell: device_engine("cpu", tell=tell)._replace(name=name))
    for name in ("auto", "exact"):
        assert choose.choose_engine(name, tell=said.append).name == "cuda"
        assert ("torchrun --nproc-per-node 4" in said[-1]) == (gpus == 4)
        assert ("keeps the rows on the GPU" in said[-1]) == (name == "auto")
    assert choose.choose_engine("faiss", tell=said.append).name.startswith("faiss")


def test_faiss_in_float16_needs_a_gpu():
    with pytest.raises(UsageError, match="faiss sees no GPU"):
        choose.choose_engine("faiss-float16")
    assert "float16" in faiss_engine(float16=True).name


def test_float16_alone_would_err_in_faiss_too(monkeypatch):
    data = clumps(2000, 48)
    centroids = data[:200].copy()
    right = faiss_engine().scan(rows_of(data), centroids, lambda done: None).labels
    found = faiss_engine(float16=True).scan(rows_of(data), centroids, lambda done: None).labels
    np.testing.assert_array_equal(found, right)
    search = engine._search_half
    monkeypatch.setattr(engine, "_search_half", lambda *given: (*search(*given)[:2], np.full(len(given[1]), -1.0)))
    moved = np.nextafter(centroids, 9)
    trusted = faiss_engine(float16=True).scan(rows_of(data), moved, lambda done: None).labels
    assert 0 < (trusted != right).sum() < 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1000, 1), (0, 1e-12)])
def test_rows_of_a_tensor_are_the_same_on_the_device(dtype, offset, scale):
    table = (torch.from_numpy(clumps(90, 5, offset=offset)) * scale).to(dtype)
    frame = frame_of(table, None)
    on_device = _tensor_reader(table, frame)
    for part in ((0, 90), (7, 31)):
        np.testing.assert_array_equal(on_device(*part).numpy(), reader(table, frame)(*part))
    assert device_reader(table, frame) is None  # on the CPU there is nothing to save
    table[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        on_device(0, 9)


def test_rows_that_are_on_the_device_are_not_read_from_the_host():
    data = clumps(150, 12)

    def read(start, stop):
        raise AssertionError("read from the host")

    rows = Rows(150, 12, read, None, lambda start, stop: torch.from_numpy(data[start:stop]))
    found = device_engine("cpu").scan(rows, data[:9].copy(), lambda done: None)
    np.testing.assert_array_equal(found.labels, faiss_engine().scan(rows_of(data), data[:9], lambda done: None).labels)
    weights = np.ones(150)
    assert weighed(rows, weights).on_device is not None
    weights[4] = 0
    assert weighed(rows, weights).on_device is None


class Queue:
    """A stream and an event in one: writes down what is asked of it."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getattr__(self, asked):
        return lambda *given: self.log.append((self.name, asked, *(one.name for one in given)))


def test_copies_wait_for_what_they_overwrite(monkeypatch):
    """The order of a GPU's streams, on the CPU: a buffer or place is written again only when its reader is done."""
    data = clumps(130, 24)
    kept(monkeypatch, 0)
    stock = device_rows.Stock(rows_of(data), torch.zeros(24), 0)
    log = []
    main = Queue(log, "main")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    stock._stream = Queue(log, "copies")
    stock._copied = [Queue(log, "copied 0"), Queue(log, "copied 1")]
    stock._used = [Queue(log, "used 0"), Queue(log, "used 1")]
    stock._stage = [torch.empty(7, 24) for _ in range(2)]
    coming = stock.parts()
    part = next(coming)
    while part is not None:
        ahead = next(coming, None)
        np.testing.assert_array_equal(part.wide.numpy(), data[part.start : part.stop])
        stock.ready(part)
        stock.release(part)
        log.append(("look", part.start))
        part = ahead
    # Each place: allocated after the main stream, then taken again after its last reader.
    places = [entry for entry in log if entry[1] in ("wait_stream", "wait_event") and entry[0] == "copies"]
    assert places == [
        ("copies", "wait_stream", "main"),
        ("copies", "wait_stream", "main"),
        ("copies", "wait_event", "used 0"),
        ("copies", "wait_event", "used 1"),
    ]
    assert log.index(("used 0", "record")) < log.index(("copies", "wait_event", "used 0"))
    assert log.count(("main", "wait_stream", "copies")) == 4  # before each look
    for buffer in ("copied 0", "copied 1"):
        turns = [asked for name, asked, *_ in log if name == buffer]
        assert turns[::2] == ["synchronize"] * (len(turns) // 2)
        assert turns[1::2] == ["record"] * (len(turns) // 2)


BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_the_benchmark_ends_well_without_a_gpu():
    done = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True, check=True)
    assert done.stdout == "benchmarks/gpu.py: torch sees no GPU here, so nothing is measured\n"


@pytest.mark.slow
def test_the_benchmark_runs_on_a_few_rows(tmp_path):
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--quick", "--json", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    assert [line["part"] for line in lines] == ["ceiling", *["right"] * 7, "tiles", *["lloyd"] * 8, *["whole"] * 2] + [
        "faiss"
    ] * 2
    failed = {line["what"]: line["failed"] for line in lines if "failed" in line}
    assert failed in ({}, {"flash-kmeans": "flash_kmeans is not installed"})
    for line in lines[1:8]:
        assert line["equal_float64"] == 1 and line.get("same_bytes", True)
        assert line.get("error_of_bound", 0) <= 1
    table = done.stdout.partition("\nproducts in bfloat16")[2].splitlines()
    assert [line.split()[:2] for line in table[2:9]] == [["right", line["what"].split()[0]] for line in lines[1:8]]
    assert sum(line["what"] in row for row in table[10:] for line in lines[9:]) >= 12


@pytest.mark.slow
def test_the_benchmark_ends_in_time_with_its_table(tmp_path):
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--quick", "--seconds", "0", "--only", "right,whole"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table = done.stdout.partition("\nproducts in bfloat16")[2].splitlines()
    assert len(table) == 3 + 1 + 7 + 2 and table[-1].endswith("rows from the host: not begun after 0 s")
