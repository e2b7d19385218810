"""Features by several processes: the same file as by one, whoever is stopped or fails on the way."""

import json
import shutil
import signal

import pytest

SCENES = "scenes:images=40,size=48"
COMPUTE = "ktransfer.networks.teachers:autocast"  # called once for each batch of features


def extract(run, *more):
    return ("--run", run, "extract", "--data", SCENES, "--batch", "3", "--precision", "float32", *more)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, taught, launch):
    run = tmp_path_factory.mktemp("wanted")
    status, said = launch(1, *extract(run, "--teacher", taught / "pretext" / "model.safetensors"))
    assert status == [0], said
    return (run / "features" / "scenes.h5").read_bytes()


@pytest.mark.parametrize("world", [2, 3])
def test_the_file_is_that_of_one_process(run, launch, wanted, world):
    status, said = launch(world, *extract(run))
    assert status == [0] * world and said[1:] == [""] * (world - 1), said
    assert "extract: done; 40 x" in said[0]
    assert (run / "features" / "scenes.h5").read_bytes() == wanted


def test_a_line_of_stages_is_that_of_one_process(tmp_path, taught, launch):
    """Features, labels and probes, each stage making for all processes what it needs."""
    made = []
    for world in (1, 2):
        run = tmp_path / str(world) / "run"
        shutil.copytree(taught, run)
        words = ("cluster", "--k", "3", "--data", SCENES, "assign", "eval", "--epochs", "1", "--precision", "float32")
        status, said = launch(world, "--run", run, *words)
        assert status == [0] * world and said[1:] == [""] * (world - 1), said
        made.append([(run / name).read_bytes() for name in ("clusters/labels.csv", "eval/linear.json")])
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("rank", "kind", "call", "at"),
    [
        (0, "kill", COMPUTE, 4),
        (1, "kill", COMPUTE, 3),
        (1, "error", COMPUTE, 2),
        (0, "error", COMPUTE, 3),
        (0, "error", "ktransfer.artifacts.features:commit", 1),
        (1, "error", "ktransfer.cluster.extraction:same_data", 1),
    ],
)
def test_a_failure_ends_all_and_one_process_goes_on(run, launch, wanted, rank, kind, call, at):
    fault = {"rank": rank, "call": call, "at": at, "kind": kind}
    status, said = launch(3, *extract(run), fault=fault)
    assert said[1:] == ["", ""] and "Traceback" not in said[0]
    voices = [text for text in said[0].splitlines() if text.startswith("ktransfer:")]
    assert len(voices) == (rank != 0 or kind != "kill"), said
    if kind == "kill":
        assert status == [-signal.SIGKILL if who == rank else 1 for who in range(3)]
    else:
        assert status == [1, 1, 1] and "MemoryError: no room" in voices[0]
        assert json.loads((run / "features" / "stage.json").read_text())["scenes"]["state"] == "failed"
    status, said = launch(1, *extract(run))
    assert status == [0], said
    assert (run / "features" / "scenes.h5").read_bytes() == wanted
