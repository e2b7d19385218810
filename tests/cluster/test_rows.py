"""Rows streamed from a feature file against the same rows made in float64 at once; memory, threads, damaged files."""

import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer.artifacts.features import open_features, valid_rows
from ktransfer.cluster import cluster
from ktransfer.cluster import rows as module
from ktransfer.cluster.engines.engine import Rows
from ktransfer.cluster.projection import fit_projection
from ktransfer.cluster.rows import keep, plan_line, plan_memory, read_ahead, rows_of
from ktransfer.errors import StageError, UsageError


def feature_file(path, data, valid):
    """Of the user's own making: what lies in rows that are not valid may be anything."""
    with h5py.File(path, "w") as file:
        file["features"], file["valid"] = data, valid
        file["key"] = [f"{row}.jpg" for row in range(len(data))]
        file["target"] = np.full(len(data), -1, np.int32)
        said = dict.fromkeys(("teacher", "layer", "pooling", "transform", "fingerprint"), "x")
        file.attrs.update(said | {"schema": 1, "rows_done": len(data)})
    return path


def some(tmp_path, count=700, dim=6, dtype=np.float16, broken=True):
    rng = np.random.default_rng(3)
    data = (rng.normal(size=(count, dim)) * [3, 1, 0.5, 0.2, 2, 1][:dim] + 1).astype(dtype)
    valid = np.ones(count, bool)
    if broken:
        valid[[0, 5, 6, count - 1]] = False
        valid[200:400] = False  # a gap that is not read
        valid[450:500:3] = False
        data[~valid] = np.nan
    return feature_file(tmp_path / "f.h5", data, valid), data, valid


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("pca", "normalise"), [(0, False), (0, True), (3, True)])
@pytest.mark.parametrize("broken", [False, True])
def test_rows_are_the_same_however_they_are_read(tmp_path, monkeypatch, dtype, pca, normalise, broken):
    monkeypatch.setattr(module, "PIECE", 600)
    monkeypatch.setattr(module, "WORTH", 30)
    path, data, valid = some(tmp_path, dtype=dtype, broken=broken)
    features = open_features(path)
    projection = fit_projection(features, pca) if pca else None
    wanted = data[valid].astype(np.float64)
    if projection:
        wanted = (wanted - projection.mean) @ projection.components.astype(np.float64)
    if normalise:
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    whole = rows_of(features, projection, normalise).read(0, len(wanted))
    assert whole.dtype == np.float32 and whole.flags.c_contiguous
    np.testing.assert_allclose(whole, wanted, atol=2e-6)
    dice = np.random.default_rng(0)
    rows = rows_of(features, projection, normalise, kept=333)
    assert (rows.count, rows.dim) == whole.shape
    for size in (64, 100, 7):
        for start in range(0, rows.count, size):
            stop = min(start + size, rows.count)
            np.testing.assert_array_equal(rows.read(start, stop), whole[start:stop])
            single = int(dice.integers(rows.count))
            np.testing.assert_array_equal(rows.read(single, single + 1), whole[single : single + 1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 40)), max_size=12), st.integers(0, 60), st.integers(0, 40))
def test_ahead_and_kept_give_what_reading_gives(asked, first, count):
    data = np.arange(300, dtype=np.float32).reshape(100, 3)
    read = keep(read_ahead(lambda start, stop: data[start:stop].copy(), 30000, 100), 3, first, count)
    passes = [(start, 9) for start in range(first, 100, 9)]
    for start, length in [*asked, *passes, *asked, *passes]:
        stop = min(start + length, 100)
        np.testing.assert_array_equal(read(start, stop), data[start:stop])


def test_the_next_block_is_read_meanwhile_and_kept_ones_never_again():
    data = np.zeros((100, 3), np.float32)
    seen = []

    def read(start, stop):
        seen.append((start, stop, threading.current_thread() is threading.main_thread()))
        return data[start:stop].copy()

    both = keep(read_ahead(read, module.WORTH, 90), 3, 0, 40)
    for _ in range(2):
        for start in range(0, 90, 20):
            both(start, min(start + 20, 90))
    first = [(0, 20, True), *((start, min(start + 20, 90), False) for start in range(20, 90, 20))]
    # Rows 0 .. 39 are held: the second time, the first block from the file is not foreseen.
    assert seen == [*first, (40, 60, True), (60, 80, False), (80, 90, False)]


def test_data_in_memory_is_not_copied():
    data = np.zeros((100, 3), np.float32)
    features = module.Features("none.h5", data, np.ones(100, bool), np.full(100, -1, np.int32), {})
    assert np.shares_memory(valid_rows(features)(10, 20), data)


def test_an_error_of_the_thread_comes_up_where_the_block_is_asked_for():
    def read(start, stop):
        if start == 20 and threading.current_thread() is not threading.main_thread():
            raise OSError(5, "Input/output error")
        return np.zeros((stop - start, 3), np.float32)

    ahead = read_ahead(read, module.WORTH, 90)
    assert len(ahead(0, 20)) == 20
    assert len(ahead(60, 80)) == 20  # the block of the error was not wanted
    ahead(0, 20)
    with pytest.raises(OSError, match="Input/output"):
        ahead(20, 40)
    assert len(ahead(40, 60)) == 20


def test_no_thread_survives():
    before = threading.active_count()
    ahead = read_ahead(lambda start, stop: np.zeros((stop - start, 3), np.float32), module.WORTH, 90)
    ahead(0, 20)
    del ahead  # as after an error of the engine
    waited = time.monotonic()
    while threading.active_count() > before:
        assert time.monotonic() - waited < 10


def test_a_file_cut_off_meanwhile_is_an_error(tmp_path):
    path, *_ = some(tmp_path, broken=False)
    features = open_features(path)
    rows = rows_of(features, None, False)
    with path.open("rb+") as handle:
        handle.truncate(features.rows.offset + 650 * 12)
    rows.read(0, 600)
    with pytest.raises(StageError, match="was cut off while it was read") as caught:
        rows.read(600, 700)
    assert "\n" not in str(caught.value)


def test_nan_counts_only_in_valid_rows(tmp_path):
    path, data, valid = some(tmp_path)
    assert np.isnan(data[~valid]).all()
    file = cluster(tmp_path / "run", features=str(path), k=5)
    with h5py.File(file) as made:
        assert made["counts"][:].sum() == valid.sum() and np.isfinite(made["centroids"][:]).all()
    data[10, 1] = np.inf
    with pytest.raises(UsageError, match=r"1 rows hold NaN, infinity or numbers beyond 1e18, first '10\.jpg'"):
        cluster(tmp_path / "new", features=str(feature_file(tmp_path / "g.h5", data, valid)), k=5)


@pytest.mark.parametrize("damage", ["cut", "foreign", "text"])
def test_damaged_files_are_refused_before_anything_is_made(tmp_path, damage):
    path, *_ = some(tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "foreign":
        with h5py.File(path, "r+") as file:
            file.move("features", "embeddings")
    else:
        path.write_text("key,label\n")
    with pytest.raises(UsageError) as caught:
        cluster(tmp_path / "run", features=str(path), k=5)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_budget_is_divided_before_the_start(tmp_path, capsys):
    path, *_ = some(tmp_path, broken=False)
    features = open_features(path)
    plan = plan_memory(features, 10, 6, 4)
    assert plan.kept == plan.rows == 700 and "all rows are kept" in plan_line(plan)
    assert plan.fixed + plan.engine + plan.kept * plan.width <= plan.budget == 4e9
    tight = (
        module.PROCESS_BYTES + module.CENTROID_BYTES * 60 + (module.ROW_BYTES + module.PROJECTED_BYTES) * 700 + 10_000
    ) / 1e9
    plan = plan_memory(features, 10, 6, tight)
    assert plan.kept == 416 and "416 rows are kept" in plan_line(plan) and "284 are streamed" in plan_line(plan)
    with pytest.raises(UsageError, match=r"--memory 0\.5: 10 centroids.*give more by --memory"):
        cluster(tmp_path / "run", features=str(path), k=10, memory=0.5)
    assert not (tmp_path / "run").exists()
    whole = cluster(tmp_path / "a", features=str(path), k=10, memory=4.0).read_bytes()
    assert cluster(tmp_path / "b", features=str(path), k=10, memory=tight).read_bytes() == whole
    said = capsys.readouterr().err
    assert "all rows are kept" in said and "are streamed" in said


def test_memory_of_a_block_is_used_again_once_nobody_holds_it():
    room_for = module._rooms(1000)
    first, second = room_for(100), room_for(100)
    address, part = first.ctypes.data, first[5:]
    del first
    third = room_for(90)  # not where a part of the first is held
    assert len({address, second.ctypes.data, third.ctypes.data}) == 3
    del part
    again = [room_for(count).ctypes.data for count in (100, 95, 100)]  # pytest holds what stands in an assertion
    assert again == [address] * 3
    held = [room_for(100) for _ in range(5)]
    assert len({block.ctypes.data for block in (second, third, *held)}) == 7
    assert room_for(3).shape == (3, 1000) and room_for(101).shape == (101, 1000)


def test_blocks_that_are_kept_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORTH", 1)
    path, data, valid = some(tmp_path)
    rows = rows_of(open_features(path), None, False)
    held = [rows.read(start, min(start + 60, rows.count)) for start in range(0, rows.count, 60)]
    np.testing.assert_array_equal(np.concatenate(held), data[valid].astype(np.float32))


SCAN = """
import resource, sys
from pathlib import Path
from ktransfer.cluster.engines.engine import blocks
from ktransfer.cluster.rows import rows_of
from ktransfer.artifacts.features import open_features
rows = rows_of(open_features(Path(sys.argv[1])), None, True, kept=1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start, stop in blocks(rows.count, rows.dim):
    rows.read(start, stop)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """A file of 256 MiB, all holes, must not end up in memory: a few blocks of 16 MiB may."""
    path = tmp_path / "large.h5"
    with h5py.File(path, "w") as file:
        count = 2**18
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((count, 512))
        h5py.h5d.create(file.id, b"features", h5py.h5t.py_create(np.dtype("<f2")), space, layout)
        file["valid"], file["target"] = np.ones(count, bool), np.full(count, -1, np.int32)
        file["key"] = np.full(count, b"x", h5py.string_dtype("utf-8", 1))
        file.attrs["schema"], file.attrs["rows_done"] = 1, count
    done = subprocess.run([sys.executable, "-c", SCAN, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 140, done.stdout


def test_rows_of_the_stage_keep_the_contract(tmp_path):
    path, data, valid = some(tmp_path)
    rows = rows_of(open_features(path), None, False)
    assert isinstance(rows, Rows) and rows.weights is None
    assert rows.read(3, 3).shape == (0, 6)
    np.testing.assert_array_equal(rows.read(0, rows.count), data[valid].astype(np.float32))
