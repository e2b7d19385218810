"""The whole chain: from the command line, in Python, on the user's own folder, and with the recipes."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from ktransfer.artifacts.features import open_features
from ktransfer.cli import main
from ktransfer.config import build, stage_tables
from ktransfer.stages import STAGES, settings

SCENES = "scenes:images=40,size=48"
TINY = ["--width", "0.05", "--epochs", "1", "--batch", "8"]
STEPS = {"pretext": ["pretext"], "clusters": ["cluster", "assign"], "retrain": ["retrain"], "eval": ["linear"]}
# docs/architecture.md, "Files on disk".
FILES = {
    "pretext": {"stage.json", "metrics.jsonl", "model.safetensors", "puzzles.png"},
    "clusters": {"stage.json", "clusters.h5", "clusters.png", "quality.json", "labels.csv", "labels.h5", "labels.bin"},
    "retrain": {"stage.json", "metrics.jsonl", "model.safetensors"},
    "eval": {"stage.json", "linear.json", "linear.csv", "linear.md"},
}


def line(run, data, labelled=None, k=4, more=()):
    """The arguments of README's chain, in small."""
    found = ["--run", str(run), "pretext", "--data", str(data), "--arch", "vgg16_bn", *TINY, "--permutations", "8"]
    found += [*more, "cluster", "--k", str(k), "retrain", "--arch", "alexnet_bn", *TINY, "--stride", "2", *more]
    found += ["eval", "--epochs", "1", "--batch", "8", *more]
    return found + (["--labelled", str(labelled)] if labelled else [])


def whole(run, name):
    """Every file of a run is there, nothing else is, and every step is done."""
    files = FILES | {"features": {"stage.json", f"{name}.h5"}}
    assert {path.name for path in run.iterdir()} == {*files, ".lock"}
    for stage, names in files.items():
        assert {path.name for path in (run / stage).iterdir()} == names
        record = json.loads((run / stage / "stage.json").read_text())
        assert list(record) == STEPS.get(stage, [name])
        for step in record.values():
            assert step["state"] == "done"
            assert step["versions"]["ktransfer"]
            assert set(step["outputs"]) <= names
            assert all(len(output["sha256"]) == 64 for output in step["outputs"].values())


def results(run):
    """All files whose bytes must not depend on how the chain was called."""
    paths = [path for path in run.rglob("*") if path.is_file() and path.name not in ("stage.json", "metrics.jsonl")]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def test_command_line_and_python_do_the_same(tmp_path, capsys):
    run = tmp_path / "one" / "run"
    assert main(line(run, SCENES)) == 0
    whole(run, "scenes")
    assert "linear probe, top-1 %" in capsys.readouterr().out
    before = results(run)
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(line(run, SCENES)) == 0
    assert "done before, skipped" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

    from ktransfer.cluster import assign, cluster, extract
    from ktransfer.eval import evaluate
    from ktransfer.pretext import pretext
    from ktransfer.retrain import retrain

    again = tmp_path / "two" / "run"
    tiny = {"width": 0.05, "epochs": 1, "batch": 8}
    pretext(again, data=SCENES, arch="vgg16_bn", permutations=8, **tiny)
    extract(again)
    cluster(again, k=4)
    assign(again)
    retrain(str(again), arch="alexnet_bn", stride=2, **tiny)
    assert evaluate(again, epochs=1, batch=8) == {"linear": again / "eval" / "linear.json"}
    whole(again, "scenes")
    assert results(again) == before


def test_a_folder_with_a_broken_image_and_other_files(tmp_path, folder):
    root = tmp_path / "root"
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "val")
    run = tmp_path / "run"
    assert main(line(run, folder, root, more=("--max-broken", "0.1"))) == 1  # cluster's extract allows 1 %
    assert main(["--run", str(run), "extract", "--max-broken", "0.1"]) == 0
    assert main(line(run, folder, root, more=("--max-broken", "0.1"))) == 0
    whole(run, "pics")
    assert not open_features(run / "features" / "pics.h5").valid[5]
    with (run / "clusters" / "labels.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["key"] for row in rows if row["label"] == "-1"] == ["a/05.jpg"]
    assert len(rows) == 24
    records = {stage: json.loads((run / stage / "stage.json").read_text()) for stage in STEPS | {"features": 0}}
    assert len(records["pretext"]["pretext"]["broken"]) == 1
    assert records["features"]["pics"]["broken"][0].startswith("a/05.jpg: ")
    assert records["retrain"]["retrain"]["result"] == {"classes": 4, "images": 23}
    data = json.loads((run / "eval" / "linear.json").read_text())["data"]
    assert data == {"train": 24, "test": 24, "classes": 2}


def test_a_k_that_is_too_large_is_found_before_the_first_stage(tmp_path, capsys):
    assert main(line(tmp_path / "run", SCENES, k=41)) == 2
    assert "--k 41: more clusters than the 40 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_of_a_second_data_set_are_what_retrain_takes(tmp_path, run, folder):
    (folder / "a" / "05.jpg").unlink()
    assert main(["--run", str(run), "cluster", "--k", "3", "assign", "--data", str(folder)]) == 0
    assert main(["--run", str(run), "retrain", "--arch", "alexnet_bn", *TINY, "--stride", "2"]) == 0
    record = json.loads((run / "retrain" / "stage.json").read_text())["retrain"]
    assert record["config"]["data"] == str(folder)
    assert record["result"]["images"] == 23
    # Clustered anew, the labels are out of date, and retrain does not take them.
    assert main(["--run", str(run), "cluster", "--k", "4", "--overwrite"]) == 0
    assert main(["--run", str(run), "retrain", "--arch", "alexnet_bn", *TINY, "--overwrite"]) == 2


def test_real_images(tmp_path):
    home = os.environ.get("KTRANSFER_DATA")
    if not home or not (Path(home) / "caltech101" / "train").is_dir():
        pytest.skip("KTRANSFER_DATA names no folder that holds caltech101")
    source = Path(home) / "caltech101"
    classes = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())[:4]
    for part, count in (("train", 12), ("val", 3)):
        for name in classes:
            (tmp_path / "root" / part / name).mkdir(parents=True)
            for path in sorted((source / part / name).iterdir())[:count]:
                shutil.copy(path, tmp_path / "root" / part / name)
    run = tmp_path / "run"
    assert main(line(run, tmp_path / "root", tmp_path / "root")) == 0
    whole(run, "train")
    found = json.loads((run / "eval" / "linear.json").read_text())
    assert found["data"]["train"] == 48
    assert 4 <= found["data"]["test"] <= 12
    assert list(found["arms"]) == ["random", "run"]


def test_every_recipe_is_valid():
    import ktransfer.recipes

    recipes = sorted(path for place in ktransfer.recipes.__path__ for path in Path(place).glob("*.toml"))
    assert recipes
    for path in recipes:
        tables = stage_tables(path, STAGES)
        assert tables
        for stage, table in tables.items():
            build(settings(stage), table, f"{path.name} [{stage}]")


def test_a_run_without_a_pretext_stage(tmp_path, run):
    """A teacher from elsewhere: the images are named once, for the whole run."""
    teacher = ["--teacher", str(run / "pretext" / "model.safetensors")]
    new = ["--run", str(tmp_path / "new")]
    assert main([*new, "extract", "--data", SCENES, *teacher, "cluster", "--k", "3"]) == 0
    assert main([*new, "retrain", "--arch", "alexnet_bn", *TINY, "--stride", "2"]) == 0
    assert main([*new, "eval", "--epochs", "1", "--batch", "8", "--layers", "conv1"]) == 0


# A stage is planned for the network that a stage before it in the line will make, whatever the run holds by then.
PRETEXT = ("pretext", "--data", SCENES, *TINY)
SMALL = ("--size", "40", "--stride", "2", "--lrs", "0.01", "--epochs", "1", "--batch", "8")
EVALUATE = ("eval", "--labelled", "scenes:images=24,size=48", *SMALL)
LINES = {
    "rotation": (*PRETEXT, "--arch", "alexnet_bn", "--task", "rotation", "--size", "40"),
    "jigsaw": (*PRETEXT, "--arch", "alexnet", "--task", "jigsaw", "--permutations", "8", "--size", "45"),
}
LAYERS = {"rotation": "conv5", "jigsaw": "conv3"}
TARGET = ("retrain", "--arch", "alexnet_bn", *TINY, "--size", "40", "--stride", "2")


def repeatable(folder):
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
        assert repeatable(run / folder) == repeatable(alone / folder)


def test_so_it_is_with_the_target_network(run, tmp_path):
    alone = tmp_path / "alone" / "run"
    assert main(["--run", str(run), "cluster", "--k", "4", *TARGET, *EVALUATE, "--layers", "conv5"]) == 0
    for folder in ("pretext", "features", "clusters", "retrain"):
        shutil.copytree(run / folder, alone / folder)
    assert main(["--run", str(alone), *EVALUATE, "--layers", "conv5"]) == 0
    assert repeatable(run / "eval") == repeatable(alone / "eval")


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
