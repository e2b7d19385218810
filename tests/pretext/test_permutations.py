"""The permutation generator and the authors' file format."""

import hashlib
import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer.errors import UsageError
from ktransfer.pretext import permutations


@pytest.fixture(scope="module")
def default():
    return permutations.generate()


def distances(rows):
    return [int((a != b).sum()) for a, b in itertools.combinations(rows, 2)]


def test_the_default_set_is_the_one_that_was_hashed(default):
    assert default.shape == (701, 9) and default.dtype == np.uint8
    assert hashlib.sha256(permutations.to_bytes(default)).hexdigest() == permutations.DEFAULT_SHA256


def test_the_default_set_is_at_least_as_good_as_the_published_one(default):
    summary = permutations.summarise(default)
    assert summary.min_distance >= 3
    assert summary.mean_distance >= 7.99
    assert (default != np.arange(9)).any(axis=1).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**64 - 1), st.integers(5, 6))
def test_rows_are_distinct_permutations_that_keep_the_distance(count, least, seed, tiles):
    rows = permutations.generate(count, least, seed, tiles)
    assert np.array_equal(np.sort(rows, axis=1), np.broadcast_to(np.arange(tiles), rows.shape))
    assert (rows != np.arange(tiles)).any(axis=1).all()
    assert all(distance >= max(least, 2) for distance in distances(rows))


def test_each_step_takes_the_largest_summed_distance():
    rows = permutations.generate(15, 3, 5, 5)
    everything = [np.array(row) for row in itertools.permutations(range(5))][1:]
    for step in range(1, len(rows)):
        chosen = rows[:step]
        allowed = [row for row in everything if min((row != other).sum() for other in chosen) >= 3]
        best = max(sum((row != other).sum() for other in chosen) for row in allowed)
        assert sum((rows[step] != other).sum() for other in chosen) == best


def test_the_seed_decides_and_a_shorter_set_is_the_beginning_of_a_longer_one():
    assert np.array_equal(permutations.generate(20, seed=4), permutations.generate(20, seed=4))
    assert not np.array_equal(permutations.generate(20, seed=4), permutations.generate(20, seed=5))
    assert np.array_equal(permutations.generate(20, seed=4)[:7], permutations.generate(7, seed=4))


def test_all_permutations_but_identity_can_be_had():
    assert len(np.unique(permutations.generate(23, 1, 0, 4), axis=0)) == 23
    assert np.array_equal(permutations.generate(23, 1, 0, 4), permutations.generate(23, 2, 0, 4))


def test_a_search_that_ends_says_how_far_it_came():
    with pytest.raises(UsageError, match=r"7[0-9] permutations .* ends at \d+ with Hamming distance >= 8"):
        permutations.generate(72, 8)


@pytest.mark.parametrize(
    "arguments",
    [
        (0,),
        (-1,),
        (362_880,),
        (181_441, 3),
        (10, 9),
        (5, 10),
        (5, 0),
        (5, 3, -1),
        (5, 3, 2**64),
        (5, 2, 0, 1),
        (5, 2, 0, 10),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments):
    with pytest.raises(UsageError) as error:
        permutations.generate(*arguments)
    assert "\n" not in str(error.value)


def test_summary_agrees_with_counting_pairs():
    rows = permutations.generate(40, 3, 1)
    summary, pairs = permutations.summarise(rows), distances(rows)
    assert (summary.count, summary.tiles) == (40, 9)
    assert summary.histogram == {d: pairs.count(d) for d in sorted(set(pairs))}
    assert summary.mean_distance == pytest.approx(np.mean(pairs))
    assert summary.min_distance == min(pairs)
    assert summary.sha256 == hashlib.sha256(permutations.to_bytes(rows)).hexdigest()
    assert permutations.summarise(rows[:1]).histogram == {}


def test_a_single_permutation_has_no_distances():
    alone = permutations.summarise(permutations.generate(1))
    assert (alone.count, alone.min_distance, alone.mean_distance, alone.histogram) == (1, 0, 0.0, {})


def test_bytes_have_the_authors_layout():
    rows = np.array([[2, 0, 1], [1, 2, 0]], dtype=np.uint8)
    assert permutations.to_bytes(rows) == struct.pack("<8i", 2, 3, 3, 1, 2, 2, 3, 1)


def test_a_written_file_reads_back(tmp_path, default):
    permutations.write(tmp_path / "p.bin", default)
    read = permutations.from_file(tmp_path / "p.bin")
    assert read.dtype == np.uint8 and np.array_equal(read, default)
    assert [path.name for path in tmp_path.iterdir()] == ["p.bin"]
    for tiles in (2, 255):  # bytes hold no more
        rows = np.stack([np.arange(tiles), np.arange(tiles)[::-1]]).astype(np.uint8)
        permutations.write(tmp_path / "p.bin", rows)
        assert np.array_equal(permutations.from_file(tmp_path / "p.bin"), rows)
        permutations.write(tmp_path / "p.bin", rows[:1])
        assert np.array_equal(permutations.from_file(tmp_path / "p.bin"), rows[:1])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes"),
        (b"\x01\x00\x00", "3 bytes"),
        (struct.pack("<2i", 0, 3), "8 bytes"),
        (struct.pack("<2i", -1, 3), "8 bytes"),
        (struct.pack("<4i", 1, 3, 1, 2), "16 bytes"),
        (struct.pack("<6i", 1, 3, 1, 2, 3, 4), "24 bytes"),
        (struct.pack(">5i", 1, 3, 1, 2, 3), "20 bytes"),
        (struct.pack("<8i", 2, 3, 3, 1, 2, 0, 1, 2), "row 2"),
        (struct.pack("<5i", 1, 3, 1, 2, 2), "row 1"),
        (struct.pack("<5i", 1, 3, 257, 2, 3), "row 1"),
        (struct.pack("<8i", 2, 3, 3, 1, 2, 3, 1, 2), "twice"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, data, says):
    (tmp_path / "p.bin").write_bytes(data)
    with pytest.raises(UsageError, match=says) as error:
        permutations.from_file(tmp_path / "p.bin")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            permutations.from_file(path)
