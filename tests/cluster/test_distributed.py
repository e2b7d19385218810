"""Clustering by several processes against one: the same labels, one voice, and nobody left waiting."""

import json
import signal

import h5py
import numpy as np
import pytest

from ktransfer.artifacts.features import create_or_resume


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """900 rows around 30 centres, some broken; more rows than four processes can share evenly."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(30, 12))[rng.integers(0, 30, 903)] + rng.normal(size=(903, 12)) * 0.4).astype(np.float32)
    said = {"teacher": "mine", "layer": "hog", "pooling": "none", "transform": "none", "fingerprint": "f"}
    path = tmp_path_factory.mktemp("ranks") / "mine.h5"
    keys = [f"{row}.jpg" for row in range(903)]
    writer = create_or_resume(path, keys, np.full(903, -1, np.int32), 12, "float32", said)
    writer.write(0, rows, np.arange(903) % 31 != 2)
    writer.finish()
    return path


def line(run, file, *more):
    return ("--run", run, "cluster", "--features", file, "--k", "25", *more, "assign")


def labels(run):
    return (run / "clusters" / "labels.bin").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, file, launch):
    run = tmp_path_factory.mktemp("alone") / "run"
    assert launch(1, *line(run, file))[0] == [0]
    return run


def centroids(run):
    with h5py.File(run / "clusters" / "clusters.h5") as made:
        return made["centroids"][:], made["counts"][:], made.attrs["final_objective"]


@pytest.mark.parametrize("world", [2, 4])
def test_as_one_process(tmp_path, file, launch, alone, world):
    for name in ("first", "second"):
        status, said = launch(world, *line(tmp_path / name, file))
        assert status == [0] * world, said
        assert "assign: done" in said[0] and said[1:] == [""] * (world - 1)
    assert labels(tmp_path / "first") == labels(alone)
    for ours, theirs in zip(centroids(tmp_path / "first"), centroids(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    # The same number of processes gives the same bytes.
    made = [(tmp_path / name / "clusters" / "clusters.h5").read_bytes() for name in ("first", "second")]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("more", "last"),
    [
        (("--pca", "5"), ()),
        (("--engine", "faiss", "--start", "kmeans-parallel"), ()),
        (("--algorithm", "minibatch", "--batch-rows", "64"), ()),
        (("--algorithm", "two-level", "--refine", "1"), ("--balanced",)),
    ],
)
def test_with_other_settings(tmp_path, file, launch, more, last):
    for world in (1, 3):
        status, said = launch(world, *line(tmp_path / str(world), file, *more), *last)
        assert status == [0] * world and said[1:] == [""] * (world - 1)
    assert labels(tmp_path / "1") == labels(tmp_path / "3")


@pytest.mark.parametrize(("rank", "kind"), [(0, "kill"), (1, "kill"), (1, "error"), (0, "error"), (0, "stop")])
def test_an_error_ends_all_and_another_number_of_processes_goes_on(tmp_path, file, launch, alone, rank, kind):
    run = tmp_path / "run"
    status, said = launch(3, *line(run, file), fault={"rank": rank, "scan": 4, "kind": kind})
    assert [text.strip() for text in said[1:]] == ["", ""]  # click ends the line after a ^C
    last = said[0].splitlines()[-1]
    voices = [text for text in said[0].splitlines() if text.startswith("ktransfer:")]
    if kind == "kill":
        assert status == [-signal.SIGKILL if who == rank else 1 for who in range(3)]
        assert rank == 0 or "another process of this command ended" in last
    elif kind == "stop":
        assert status[0] == 130 and set(status) <= {130, 1}
        assert last.startswith("ktransfer: stopped; nothing is lost")
    else:
        assert status == [1, 1, 1]
        assert last == f"ktransfer: {f'process {rank}: ' if rank else ''}MemoryError: no room"
        assert json.loads((run / "clusters" / "stage.json").read_text())["cluster"]["state"] == "failed"
    assert len(voices) == (rank != 0 or kind != "kill")
    status, said = launch(2, *line(run, file))
    assert status == [0, 0] and "goes on where it stopped" in said[0]
    assert labels(run) == labels(alone)


def test_another_file_elsewhere_is_noticed(tmp_path, file, launch):
    status, said = launch(2, *line(tmp_path / "run", file), fault={"rank": 1, "kind": "file"})
    assert status == [1, 1] and said[1] == ""
    assert f"process 1: {file}: differs from the file that the first process reads" in said[0].splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("pretext", "--data", "scenes:images=2,size=48"), "too few"),
        (("cluster", "--k", "2000", "--features", "FILE"), "more clusters than"),
        (("cluster", "--kk", "3"), "No such option"),
        (("assign",), "cluster is missing"),
        (("cluster", "--k", "3", "--data", "scenes:images=40,size=48"), "pretext is missing"),
    ],
)
def test_misuse_is_one_line_of_one_process(tmp_path, file, launch, words, why):
    words = [str(file) if word == "FILE" else word for word in words]
    status, said = launch(2, "--run", tmp_path / "run", *words)
    assert status == [2, 2] and said[1] == ""
    assert why in said[0] and len(said[0].splitlines()) == 1
    assert not (tmp_path / "run" / "clusters").exists()
