"""A stage is planned for the network that a stage before it in the line will make, whatever the run holds by then."""

import json
import shutil

import pytest

from ktransfer.cli import main

SCENES = "scenes:images=40,size=48"
TINY = ("--width", "0.05", "--epochs", "1", "--batch", "8")
PRETEXT = ("pretext", "--data", SCENES, *TINY)
SMALL = ("--size", "40", "--stride", "2", "--lrs", "0.01", "--epochs", "1", "--batch", "8")
EVALUATE = ("eval", "--labelled", "scenes:images=24,size=48", *SMALL)
LINES = {
    "rotation": (*PRETEXT, "--arch", "alexnet_bn", "--task", "rotation", "--size", "40"),
    "jigsaw": (*PRETEXT, "--arch", "alexnet", "--task", "jigsaw", "--permutations", "8", "--size", "45"),
}
LAYERS = {"rotation": "conv5", "jigsaw": "conv3"}
TARGET = ("retrain", "--arch", "alexnet_bn", *TINY, "--size", "40", "--stride", "2")


def made(folder):
    """What must not depend on how the stages were given."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".h5", ".safetensors")}
    records = json.loads((folder / "stage.json").read_text())
    kept = {name: (record["config"], record["inputs"], record["outputs"]) for name, record in records.items()}
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("linear.json")}
    return files, kept, results


@pytest.mark.parametrize("task", LINES)
def test_a_line_ends_as_its_stages_given_one_by_one(tmp_path, capsys, task):
    run, alone = tmp_path / "line" / "run", tmp_path / "alone" / "run"
    extract, evaluate = ("extract", "--layer", LAYERS[task]), (*EVALUATE, "--layers", LAYERS[task])
    assert main(["--run", str(run), *LINES[task], *extract, *evaluate]) == 0
    capsys.readouterr()
    assert main(["--run", str(run), *LINES[task], *extract, *evaluate]) == 0
    assert capsys.readouterr().err.count("done before, skipped") == 3
    shutil.copytree(run / "pretext", alone / "pretext")
    for stage in (extract, evaluate):
        assert main(["--run", str(alone), *stage]) == 0
    for folder in ("features", "eval"):
        assert made(run / folder) == made(alone / folder)


def test_so_it_is_with_the_target_network(run, tmp_path):
    alone = tmp_path / "alone" / "run"
    assert main(["--run", str(run), "cluster", "--k", "4", *TARGET, *EVALUATE, "--layers", "conv5"]) == 0
    for folder in ("pretext", "features", "clusters", "retrain"):
        shutil.copytree(run / folder, alone / folder)
    assert main(["--run", str(alone), *EVALUATE, "--layers", "conv5"]) == 0
    assert made(run / "eval") == made(alone / "eval")


@pytest.mark.parametrize("stage", ["extract --layer", "eval --layers"])
def test_layers_are_those_of_the_coming_network(run, capsys, stage):
    """The run holds a VGG, and the line will make an AlexNet: its layers are valid, those of the VGG no longer."""
    new = ["--run", str(run), *LINES["rotation"], "--overwrite"]
    before = (run / "pretext" / "stage.json").read_bytes()
    more = EVALUATE[1:] if stage.startswith("eval") else ()
    assert main([*new, *stage.split(), "conv4_1", *more]) == 2
    said = capsys.readouterr().err
    assert "conv4_1: alexnet_bn has no such layer" in said
    assert (run / "pretext" / "stage.json").read_bytes() == before
    assert main([*new, *stage.split(), "conv5", *more]) == 0


def test_layers_of_a_target_network_that_is_to_come(run, capsys):
    line = ["--run", str(run), "cluster", "--k", "4", *TARGET, *EVALUATE, "--layers"]
    assert main([*line, "conv4_1"]) == 2
    assert "conv4_1: alexnet_bn has no such layer" in capsys.readouterr().err
    assert not (run / "features").exists()
    assert main([*line, "conv2"]) == 0
