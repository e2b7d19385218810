"""The feature file against h5py itself, and a killed writer against one that was never stopped."""

import shutil

import h5py
import numpy as np
import pytest

from ktransfer.artifacts import features
from ktransfer.artifacts.features import create_or_resume, open_features
from ktransfer.errors import StageError, UsageError

ATTRIBUTES = {"teacher": "ab" * 32, "layer": "conv4_3", "pooling": "max 4", "fingerprint": "ü", "batch": 7}
KEYS = ["a.jpg", "ordner/größe.png", "日本/絵 1.jpg", 'q",\n.jpg', "x" * 300, "😀.gif", "b.jpg"]
TARGETS = np.array([0, 1, -1, 2, 0, -1, 3], np.int32)
VALID = np.array([True, True, False, True, True, True, True])
ROWS = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)


def fill(writer, stop=7, step=2):
    for start in range(writer.rows_done, stop, step):
        end = min(start + step, stop)
        writer.write(start, ROWS[start:end], VALID[start:end])


def whole(path, dtype="float16", **changes):
    writer = create_or_resume(path, KEYS, TARGETS, 5, dtype, {**ATTRIBUTES, **changes})
    fill(writer)
    writer.finish()
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read_by_us_and_by_h5py(tmp_path, dtype):
    path = whole(tmp_path / "new" / "train.h5", dtype)
    expected = np.where(VALID[:, None], ROWS, 0).astype(dtype)
    read = open_features(path)
    assert isinstance(read.rows, np.memmap)
    assert read.rows.dtype == dtype
    np.testing.assert_array_equal(read.rows, expected)
    np.testing.assert_array_equal(read.valid, VALID)
    np.testing.assert_array_equal(read.targets, TARGETS)
    assert read.keys == KEYS
    assert read.attributes == {**ATTRIBUTES, "schema": 1, "rows_done": 7}
    with pytest.raises(ValueError, match="read-only"):
        read.rows[0] = 0
    with h5py.File(path) as file:
        assert file["features"].chunks is None
        np.testing.assert_array_equal(file["features"][:], expected)
        assert file["key"].asstr()[:].tolist() == KEYS
        assert file["valid"].dtype == bool
        assert file["target"].dtype == np.int32
    assert [found.name for found in path.parent.iterdir()] == ["train.h5"]


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("save_seconds", [0.0, 1e9])
def test_killed_writer_goes_on_and_gives_the_same_bytes(tmp_path, stop, save_seconds):
    expected = whole(tmp_path / "whole.h5").read_bytes()
    path = tmp_path / "killed.h5"
    part = tmp_path / "killed.h5.part"
    writer = create_or_resume(path, KEYS, TARGETS, 5, "float16", ATTRIBUTES, save_seconds=save_seconds)
    fill(writer, stop)
    # As after kill -9: what was buffered beyond the last saving may be anything.
    sure = stop if save_seconds == 0 else 0
    with h5py.File(part) as file:
        begin = file["features"].id.get_offset() + sure * 10
    with part.open("rb+") as handle:
        handle.seek(begin)
        handle.write(b"\xa5" * ((7 - sure) * 10))
    again = create_or_resume(path, KEYS, TARGETS, 5, "float16", ATTRIBUTES)
    assert again.rows_done == sure
    assert not path.exists()
    fill(again, step=3)
    again.finish()
    assert path.read_bytes() == expected


def test_killed_between_header_and_first_saving_starts_again(tmp_path):
    expected = whole(tmp_path / "whole.h5").read_bytes()
    (tmp_path / "train.h5.part").write_bytes(b"half a header")
    (tmp_path / "train.h5.progress").write_text("{")
    assert whole(tmp_path / "train.h5").read_bytes() == expected


def test_killed_while_the_header_is_made_again_forgets_the_old_rows(tmp_path, monkeypatch):
    path = tmp_path / "train.h5"
    writer = create_or_resume(path, KEYS, TARGETS, 5, "float16", ATTRIBUTES)
    fill(writer, 4)
    writer.close()
    (tmp_path / "train.h5.part").unlink()

    def killed(part, *_):
        part.write_bytes(b"half a header")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "_create", killed)
        create_or_resume(path, KEYS, TARGETS, 5, "float16", ATTRIBUTES)
    assert create_or_resume(path, KEYS, TARGETS, 5, "float16", ATTRIBUTES).rows_done == 0


@pytest.mark.parametrize(
    "change",
    [
        {"keys": [*KEYS[:-1], "c.jpg"]},
        {"targets": TARGETS + 1},
        {"dim": 4},
        {"dtype": "float32"},
        {"attributes": {**ATTRIBUTES, "layer": "conv5_3"}},
    ],
)
def test_another_header_starts_again(tmp_path, change):
    settings = {"keys": KEYS, "targets": TARGETS, "dim": 5, "dtype": "float16", "attributes": ATTRIBUTES}
    path = tmp_path / "train.h5"
    writer = create_or_resume(path, **settings)
    fill(writer, 4)
    writer.close()
    assert create_or_resume(path, **settings).rows_done == 4
    assert create_or_resume(path, **{**settings, **change}).rows_done == 0


def test_float16_overflow_and_nan_name_the_image(tmp_path):
    writer = create_or_resume(tmp_path / "train.h5", KEYS, TARGETS, 5, "float16", ATTRIBUTES)
    rows = ROWS[:2].copy()
    rows[1, 2] = 70000
    with pytest.raises(StageError, match=r"größe\.png.*65504.*--dtype float32"):
        writer.write(0, rows, VALID[:2])
    rows[1, 2] = np.nan
    with pytest.raises(StageError, match=r"größe\.png.*not finite"):
        writer.write(0, rows, VALID[:2])
    writer.write(0, rows, np.array([True, False]))
    wide = create_or_resume(tmp_path / "wide.h5", KEYS, TARGETS, 5, "float32", ATTRIBUTES)
    wide.write(0, np.full((1, 5), 70000.0, np.float32), VALID[:1])


def test_rows_must_follow_each_other_and_be_complete(tmp_path):
    writer = create_or_resume(tmp_path / "train.h5", KEYS, TARGETS, 5, "float16", ATTRIBUTES)
    with pytest.raises(ValueError, match="do not follow"):
        writer.write(1, ROWS[1:2], VALID[1:2])
    with pytest.raises(ValueError, match="do not follow"):
        writer.write(0, ROWS[:2, :3], VALID[:2])
    with pytest.raises(ValueError, match="0 of 7"):
        writer.finish()
    with pytest.raises(UsageError, match="float64"):
        create_or_resume(tmp_path / "train.h5", KEYS, TARGETS, 5, "float64", ATTRIBUTES)


def test_disk_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="cannot write the features"):
        create_or_resume(tmp_path / "file" / "train.h5", KEYS, TARGETS, 5, "float16", ATTRIBUTES)


def refused(path):
    with pytest.raises(UsageError) as caught:
        open_features(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


def test_truncation_anywhere_is_noticed(tmp_path):
    path = whole(tmp_path / "train.h5")
    data = path.read_bytes()
    cut = tmp_path / "cut.h5"
    for length in [0, 1, 100, 700, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:length])
        refused(cut)


def test_foreign_files_are_refused(tmp_path):
    assert "no such feature file" in refused(tmp_path / "none.h5")
    assert "no such feature file" in refused(tmp_path)
    text = tmp_path / "text.h5"
    text.write_text("key,label\n")
    assert "not a whole HDF5 file" in refused(text)
    empty = tmp_path / "empty.h5"
    with h5py.File(empty, "w") as file:
        file.create_group("features")
    assert "no data set features, key, valid, target" in refused(empty)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("features", np.zeros((7, 5)), "float64"),
        ("features", np.zeros((7, 5), ">f4"), "little-endian"),
        ("features", np.zeros((0, 5), "f4"), "at least 1"),
        ("features", np.zeros(7, "f4"), "shape"),
        ("valid", np.ones(7, np.uint8), "bool"),
        ("target", np.ones(7, np.int64), "int32"),
        ("target", np.ones(6, np.int32), r"\(7,\)"),
        ("key", np.arange(7), "strings"),
    ],
)
def test_wrong_data_sets_are_refused(tmp_path, name, value, rule):
    path = whole(tmp_path / "train.h5")
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = value
    with pytest.raises(UsageError, match=rule):
        open_features(path)


def test_other_schema_unfinished_and_chunked_are_refused(tmp_path):
    path = whole(tmp_path / "train.h5")
    other = tmp_path / "other.h5"
    for name, value in (("schema", 2), ("rows_done", 3)):
        shutil.copy(path, other)
        with h5py.File(other, "r+") as file:
            file.attrs[name] = value
        assert name in refused(other)
    with h5py.File(path, "r+") as file:
        del file["features"]
        file.create_dataset("features", data=ROWS, chunks=(1, 5))
    assert "contiguous" in refused(path)


def test_a_file_of_the_users_own_making_is_read(tmp_path):
    path = tmp_path / "hog.h5"
    with h5py.File(path, "w") as file:
        file["features"] = ROWS
        file["key"] = KEYS
        file["valid"] = VALID
        file["target"] = TARGETS
        file.attrs["schema"] = 1
        file.attrs["rows_done"] = 7
    read = open_features(path)
    np.testing.assert_array_equal(read.rows, ROWS)
    assert read.keys == KEYS


@pytest.mark.parametrize("name", ["vectors.pt", "vectors.csv", "vectors.parquet", "vectors"])
def test_what_was_never_ours_is_not_to_be_extracted_again(tmp_path, name):
    (tmp_path / name).write_bytes(b"a.jpg,0.1,0.2\n")
    with pytest.raises(UsageError, match=r"no feature file; features made elsewhere are taken as FILE\.npy") as caught:
        open_features(tmp_path / name)
    assert "extract" not in str(caught.value) and "\n" not in str(caught.value)
