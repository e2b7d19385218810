"""Label files: what is written comes back from all three formats; whatever is malformed is one line."""

import csv
import struct

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer.artifacts.labels import read_labels, write_labels
from ktransfer.errors import UsageError

KEYS = ["a.jpg", 'größe, "1".png', "日本\n絵.jpg", "😀"]
LABELS = np.array([2, -1, 0, 2], np.int32)
DISTANCES = np.array([0.1, 5.0, 1e-9, 3.4e38], np.float32)


def written(folder):
    return write_labels(folder, KEYS, LABELS, DISTANCES, 5, "c0", "f0")


def test_three_files_say_the_same(tmp_path):
    table, store, raw = written(tmp_path / "new")
    for path, keys, k in ((table, KEYS, 3), (store, KEYS, 5), (raw, None, 3)):
        found = read_labels(path)
        np.testing.assert_array_equal(found.labels, LABELS)
        assert found.labels.dtype == np.int32
        assert (found.keys, found.k) == (keys, k)
    assert raw.read_bytes() == struct.pack("<5i", 4, 2, -1, 0, 2)
    with table.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["key"] for row in rows] == KEYS
    assert [row["distance"] for row in rows] == ["0.1", "", "1e-09", "3.4e+38"]
    with h5py.File(store) as file:
        assert dict(file.attrs) == {"schema": 1, "k": 5, "centroids": "c0", "fingerprint": "f0"}
        np.testing.assert_array_equal(file["distance"][:], np.array([0.1, np.nan, 1e-9, 3.4e38], np.float32))
        assert file["key"].asstr()[:].tolist() == KEYS
    assert sorted(path.name for path in table.parent.iterdir()) == ["labels.bin", "labels.csv", "labels.h5"]


def test_same_input_same_bytes(tmp_path):
    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_lengths_must_agree(tmp_path):
    with pytest.raises(ValueError, match="3 keys"):
        write_labels(tmp_path, KEYS[:3], LABELS, DISTANCES, 5, "", "")


# Keys of a data set hold no control characters and no lone surrogates (ktransfer/data/dataset.py).
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


@settings(max_examples=30)
@given(st.dictionaries(NAMES, st.integers(0, 9), min_size=1, max_size=8))
def test_any_name_survives(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("names")
    labels = np.array(list(content.values()), np.int32)
    for path in write_labels(folder, list(content), labels, labels.astype(np.float32), 10, "", "")[:2]:
        assert read_labels(path).keys == list(content)


def refused(path):
    with pytest.raises(UsageError) as caught:
        read_labels(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "columns key and label"),
        ("key;label\na;1\n", "columns key and label"),
        ("name,label\na,1\n", "columns key and label"),
        ("key,label\n", "no labels"),
        ("key,label\na,1\na,2\n", "'a' occurs twice"),
        ("key,label\na,1.0\n", "'1.0'"),
        ("key,label\na,one\n", "line 2"),
        ("key,label\na,\n", "''"),
        ("key,label\na,1\nb,-2\n", "line 3"),
        ("key,label\na,2147483648\n", "2147483648"),
        ("key,label\na\n", "1 fields"),
        ("key,label\na,1,2\n", "3 fields"),
        ('key,label\n"a,1\n', "unexpected end"),
        ("key,label\na,-1\n", "every label is -1"),
    ],
)
def test_malformed_csv(tmp_path, text, rule):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    assert rule in refused(path)


def test_csv_of_a_spreadsheet(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(b"\xef\xbb\xbfscore,label,key\r\n0.5,3,a\r\n\r\n0.1,0,b\r\n")
    found = read_labels(path)
    assert found.keys == ["a", "b"]
    assert found.labels.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "0 bytes"),
        (b"abc", "3 bytes"),
        (struct.pack("<i", 0), "no labels"),
        (struct.pack("<2i", -1, 0), "states -1"),
        (struct.pack("<2i", 2, 0), "states 2"),
        (struct.pack("<2i", 1, -5), "-5 is below -1"),
    ],
)
def test_malformed_bin(tmp_path, data, rule):
    path = tmp_path / "labels.bin"
    path.write_bytes(data)
    assert rule in refused(path)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"label": None}, "no data set label"),
        ({"key": None}, "no data set key"),
        ({"label": np.zeros(4)}, "int32"),
        ({"label": np.array([0, 9, 0, 0], np.int32)}, "9 is not below k = 5"),
        ({"label": np.zeros(3, np.int32)}, "4 keys for 3 labels"),
        ({"key": ["a", "a", "b", "c"]}, "'a' occurs twice"),
        ({"key": np.zeros(4)}, "strings"),
    ],
)
def test_malformed_h5(tmp_path, change, rule):
    path = written(tmp_path)[1]
    with h5py.File(path, "r+") as file:
        for name, value in change.items():
            del file[name]
            if value is not None:
                file[name] = value
    assert rule in refused(path)


def test_damaged_missing_and_other_files(tmp_path):
    path = written(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:200])
    assert "not a whole HDF5 file" in refused(path)
    with h5py.File(path, "w") as file:
        file["key"], file["label"] = KEYS, LABELS
    assert "schema" in refused(path)
    assert "no such label file" in refused(tmp_path / "none.csv")
    assert ".csv, .h5, .bin" in refused(tmp_path / "labels.txt")
