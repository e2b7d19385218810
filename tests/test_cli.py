"""The front door: help without torch, and one line, exit code 2 and nothing written for every misuse."""

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktransfer import __version__, cli, stages
from ktransfer import run as runs
from ktransfer.pretext import permutations
from ktransfer.run import locked

FAST = ("--width", "0.05", "--epochs", "1", "--batch", "8")
PUZZLE = ("pretext", "--arch", "vgg16_bn", "--size", "48", "--permutations", "6", *FAST)
TARGET = ("retrain", "--arch", "alexnet_bn", "--stride", "2", "--size", "40", *FAST)
PROBE = ("eval", "--layers", "conv2", "--lrs", "0.01", "--epochs", "1", "--batch", "8")


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and content; the lock file alone may come into being where a run folder exists."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((54, 50), Image.Resampling.NEAREST).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled images, flat ones, and a whole run made by one line of the chain."""
    root = tmp_path_factory.mktemp("cli")
    for number in range(24):
        draw(root / "images/train" / f"class{number % 2}" / f"{number}.jpg", number)
        draw(root / "flat" / f"{number}.jpg", 100 + number)
    for number in range(8):
        draw(root / "images/val" / f"class{number % 2}" / f"{number}.jpg", 200 + number)
    (root / "empty").mkdir()
    (root / "note.txt").write_text("not what you think\n")
    permutations.write(root / "four.bin", permutations.generate(3, 2, tiles=4))
    line = whole(root)
    assert cli.main(line) == 0
    return root


def whole(root: Path) -> list[str]:
    data = str(root / "images")
    return ["--run", str(root / "run"), *PUZZLE, "--data", data, "cluster", "--k", "4", *TARGET, *PROBE]


@pytest.fixture
def refused(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a line below `made`; it must fail with so many lines for people and change nothing at all."""

    def run(*words: str, code: int = 2, lines: int = 1) -> str:
        monkeypatch.chdir(made)
        before, folders = snapshot(made), sorted(path for path in made.rglob("*") if path.is_dir())
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == code
        said = capsys.readouterr()
        ours = [line for line in said.err.splitlines() if line.startswith("ktransfer: ")]
        # What a folder turned out to hold may be said before; nothing else may.
        told = (": using ", "are training images too")
        others = [line for line in said.err.splitlines() if line not in ours and not any(one in line for one in told)]
        assert len(ours) == lines and not others and not said.out, said
        assert snapshot(made) == before
        assert sorted(path for path in made.rglob("*") if path.is_dir()) == folders
        return "\n".join(line.removeprefix("ktransfer: ") for line in ours)

    return run


def ask(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    script = code or "import sys; from ktransfer.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["pretext", "--help"], ["eval", "-h"], []])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys; from ktransfer.cli import main; code = main();"
        "heavy = {'torch', 'torchvision', 'faiss', 'h5py', 'numpy', 'sklearn', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = ask(*words, code=code)
    assert done.returncode == (0 if words else 2), done.stderr
    assert __version__ in done.stdout if words == ["--version"] else "Usage" in done.stdout + done.stderr


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ktransfer", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and __version__ in done.stdout


def test_help_lists_every_setting(capsys):
    for stage in cli.STAGES:
        assert cli.main([stage, "--help"]) == 0
        said = capsys.readouterr().out
        for field in dataclasses.fields(stages.settings(stage)):
            assert f"--{field.name.replace('_', '-')}" in said, (stage, field.name)


MISUSES = [
    (["--run", "new", "pretext"], "no images were given; name them with --data"),
    (["--run", "new", "extract"], "no images were given"),
    (["--run", "new", "extract", "--data", "flat"], "pretext is missing; make it first"),
    (["--run", "new", "retrain"], "cluster is missing; make it first"),
    (["--run", "new", "eval"], "holds no trained network"),
    (["--run", "new", "cluster"], "no images were given"),
    (["--run", "new", "assign"], "cluster is missing; make it first"),
    (["pretext", "--data", "flat"], "no run folder given; name one: ktransfer --run"),
    (["--run", "new", "pretext", "--data", "empty"], "no images in"),
    (["--run", "new", "pretext", "--data", "imgaes"], "did you mean"),
    (["--run", "new", "pretext", "--data", "note.txt"], "1 images are too few"),
    (["--run", "new", "pretext", "--data", "run/pretext/puzzles.png"], "neither a folder, nor a list"),
    (["--run", "new", *PUZZLE, "--data", "flat", "cluster", "--k", "25"], "--k 25: more clusters than the 24 images"),
    (["--run", "run", "cluster", "--k", "25", "--overwrite"], "--k 25: more clusters than the 24 images"),
    (["--run", "run", "cluster", "--pca", "100000", "--k", "4", "--overwrite"], "--pca 100000"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--tile", "17"], "17"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--size", "12"], "--size 12: tiles of 3 pixels are too small"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--tile", "7"], "--tile 7: too small for any network"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--overfit", "4", "cluster", "--k", "3"], "--overfit: a self-test"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--size", "-3"], "size = -3: must be at least 0"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--epochs", "many"], "'many' is not a valid integer"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--lr", "nan"], "lr = nan: must be a finite number"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--colour", "sepia"], "'sepia' is not one of 'paper', 'released'"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--permutations", "999999"], "999999 permutations"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--permutation-file", "note.txt"], "not a permutation file"),
    (["--run", "new", "pretext", "--data", "flat", "--arch", "vgg61"], "did you mean 'vgg16'?"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--device", "tpu"], "--device tpu"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--device", "cuda:99"], "CUDA devices; give cpu"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--ephocs", "3"], "No such option '--ephocs'"),
    (["--run", "new", "pretxt"], "No such command 'pretxt'"),
    (["--rnu", "new", "pretext"], "No such option '--rnu'"),
    (["--run", "run", "extract", "--layer", "conv9", "--overwrite"], "valid: conv1_1, conv1_2, conv2_1"),
    (["--run", "new", *PUZZLE, "--data", "flat", "extract", "--layer", "conv9"], "valid: conv1_1, conv1_2, conv2_1"),
    (["--run", "new", "extract", "--data", "flat", "--teacher", "note.txt"], "not a weight file of ktransfer"),
    (["--run", "new", "extract", "--data", "flat", "--teacher", "flat/1.jpg"], "not a weight file of ktransfer"),
    (["--run", "new", "extract", "--data", "flat", "--teacher", "flat"], "flat: a folder without config.json"),
    (["--run", "new", "extract", "--data", "flat", "--teacher", "nowhere"], "no such file; give a model.safetensors"),
    (["--run", "new", "cluster", "--features", "note.txt", "--k", "4"], "no feature file"),
    (["--run", "new", "cluster", "--features", "flat/1.jpg", "--k", "4"], "no feature file"),
    (["--run", "new", "cluster", "--features", "run/clusters/clusters.h5", "--k", "4"], "not a feature file"),
    (["--run", "new", "cluster", "--features", "nowhere.h5", "--k", "4"], "no such feature file"),
    (["--run", "run", "assign", "--features", "note.txt", "--overwrite"], "no feature file"),
    (["--run", "run", "assign", "--features", "run/features/train.h5", "--data", "flat"], "both --features and --data"),
    (["--run", "new", *TARGET, "--data", "flat", "--labels", "note.txt"], "labels are read from .csv, .h5, .bin files"),
    (["--run", "new", *TARGET, "--data", "flat", "--labels", "flat/1.jpg"], "labels are read from"),
    (["--run", "new", *TARGET, "--data", "flat", "--labels", "nowhere.csv"], "no such label file"),
    (["--run", "new", *TARGET, "--data", "flat", "--labels", "run/clusters/clusters.h5"], "not a label file"),
    (["--run", "new", *TARGET, "--data", "flat", "--labels", "run/clusters/labels.csv"], "are not images of flat"),
    (["--run", "new", *TARGET, "--data", "flat", "--labels", "classes"], "flat has no class folders"),
    (["--run", "new", *TARGET, "--data", "images", "--labels", "classes", "--arch", "alexnot"], "did you mean"),
    (["--run", "new", "retrain", "--data", "images", "--labels", "classes", "--arch", "resnet18", "--width", "0.5"],
     "only alexnet and alexnet_bn can be scaled"),
    (["--run", "new", *TARGET, "--data", "images", "--labels", "classes", "--size", "4"], "give a larger --size"),
    (["--run", "new", "retrain", "--arch", "list"], "valid: alexnet, alexnet_bn, vgg16, vgg16_bn, "),
    (["--run", "run", "eval", "--labelled", "flat", "--overwrite"], "flat has no folder train"),
    (["--run", "run", *PROBE, "--lrs", "fast", "--overwrite"], "--lrs fast: must be numbers above 0 and up to 1000"),
    (["--run", "run", *PROBE, "--lrs", "0.1,-1", "--overwrite"], "--lrs 0.1,-1: must be numbers above 0 and up to"),
    (["--run", "run", *PROBE, "--lrs", "nan", "--overwrite"], "--lrs nan"),
    (["--run", "run", *PROBE, "--layers", "conv6", "--overwrite"], "--layers conv6: alexnet_bn has no such layer"),
    (["--run", "run", *PROBE, "--beside", "nowhere", "--overwrite"], "--run nowhere: holds no trained network"),
    (["--run", "run", *PROBE, "--learning-rate", "0.1", "--overwrite"], "No such option '--learning-rate'"),
    (["--run", "new", *PUZZLE, "--data", "flat", "cluster", "--k", "4", *TARGET, *PROBE], "flat has no folder train"),
    (["--run", "new", *PUZZLE, "--data", "images", "cluster", "--k", "4", *TARGET, *PROBE, "--layers", "conv6"],
     "--layers conv6: alexnet_bn has no such layer"),
    (["--run", "new", *PUZZLE, "--data", "images", "cluster", "--k", "4", *TARGET, *PROBE, "--beside", "nowhere"],
     "--run nowhere: holds no trained network"),
    (["--run", "note.txt", *PUZZLE, "--data", "flat"], "--run note.txt: cannot be written"),
    (["--run", "note.txt/run", *PUZZLE, "--data", "flat"], "--run note.txt/run: cannot be written"),
    (["--run", "run", *PUZZLE, "--data", "flat"], "data changed. Give pretext --overwrite"),
    (["--run", "run", *PUZZLE, "--lr", "0.5", "--data", "images"], "lr was 0.01, is 0.5. Give pretext --overwrite"),
    (["--run", "run", "cluster", "--k", "3"], "k was 4, is 3"),
    (["--run", "run", "extract", "--data", "images", "--pool", "2"], "pool was 4, is 2. Give extract --overwrite"),
    (["--run", "run", *TARGET, "--crop", "0.5"], "crop was 0.08, is 0.5"),
    (["--run", "run", *PROBE, "--epochs", "2"], "epochs was 1, is 2. Give eval --overwrite"),
    (["--config", "nowhere.toml", "--run", "new", "pretext"], "--config nowhere.toml: No such file or directory"),
    (["--config", "flat", "--run", "new", "pretext"], "--config flat: Is a directory"),
    (["--config", "note.txt", "--run", "new", "pretext"], "not valid TOML"),
    (["--recipe", "cake", "--run", "new", "pretext"], "--recipe cake: no such recipe; give one of laptop, paper, sm"),
    (["--run", "flat/new", *PUZZLE, "--data", "flat"], "--run flat/new: is inside the image folder of pretext"),
    (["--run", "run", "extract", "--data", "flat", "--name", "../x"], "--name ../x: must be a plain file name"),
    (["--run", "new", "pretext", "--data", "flat", "--arch", "alexnet", "--size", "33"], "give a larger --size"),
    (["--run", "new", *PUZZLE, "--data", "flat", "--permutation-file", "four.bin"], "3 permutations of 4 tiles"),
    (["perms", "--count", "0"], "0 permutations"),
    (["perms", "--min-distance", "12"], "minimum Hamming distance 12"),
    (["perms", "--read", "note.txt"], "not a permutation file"),
    (["perms", "--read", "nowhere.bin"], "cannot be read"),
    (["perms", "--count", "5", "--out", "note.txt/perms.bin"], "--out note.txt/perms.bin: cannot be written"),
    (["perms", "--count", "5", "--out", "flat"], "--out flat: cannot be written (Is a directory)"),
    (["scenes", "--out", "note.txt/scenes"], "cannot be written"),
    (["scenes"], "Missing option '--out'"),
    (["scenes", "--out", "flat", "--images", "20"], "flat"),
    (["scenes", "--out", "new", "--images", "0"], "0"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "why"), MISUSES, ids=[" ".join(words)[:90] for words, _ in MISUSES])
def test_misuse(refused, words, why):
    assert why in refused(*words)


def test_torchrun_is_not_mistaken(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused("--run", "new", *PUZZLE, "--data", "flat")


def test_no_gpu(refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for line in ([*PUZZLE, "--data", "flat"], [*TARGET, "--data", "images", "--labels", "classes"]):
        assert "this machine has 0 CUDA devices" in refused("--run", "new", *line, "--device", "cuda")


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return str(path)


def test_all_errors_of_a_config_at_once(refused, tmp_path):
    text = "[pretext]\nephocs = 3\nlr = 'high'\nwidth = 99\n[eval]\nlayer = 'conv1'\n[cluster]\nk = 4.5\n"
    said = refused("--config", config(tmp_path, text), "--run", "new", *PUZZLE, "--data", "flat", lines=5)
    for part in (
        "some.toml [pretext]: no setting 'ephocs'; did you mean 'epochs'?",
        "some.toml [pretext]: lr = 'high': needs a value of type float",
        "some.toml [pretext]: width = 99: must be at most 4",
        "some.toml [eval]: no setting 'layer'; did you mean 'layers'?",
        "some.toml [cluster]: k = 4.5: needs a value of type int",
    ):
        assert part in said


def test_config_of_unknown_stages(refused, tmp_path):
    text = "verbose = true\neval = 3\n[pretxt]\nepochs = 3\n"
    said = refused("--config", config(tmp_path, text), "--run", "new", "pretext", lines=3)
    assert "no stage 'pretxt'; did you mean 'pretext'?" in said and "'eval' must be a table, such as [eval]" in said


def test_two_processes(made):
    before = snapshot(made)
    with locked(made / "run"):
        done = ask(*whole(made))
    assert (
        done.returncode == 2
        and "another ktransfer process is using it" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert snapshot(made) == before


def test_second_run_changes_nothing(made, capsys):
    before = snapshot(made)
    assert cli.main(whole(made)) == 0
    said = capsys.readouterr().err
    assert said.count("done before, skipped") == 5  # pretext, cluster, assign, retrain, eval
    assert snapshot(made) == before


def test_stages_take_from_the_run_what_they_are_not_given(made, capsys):
    before = snapshot(made)
    run = ["--run", str(made / "run")]
    assert cli.main([*run, "extract"]) == cli.main([*run, "cluster", "--k", "4"]) == cli.main([*run, *TARGET]) == 0
    assert cli.main([*run, *PROBE]) == 0
    assert capsys.readouterr().err.count("done before, skipped") == 4  # `retrain` finds its labels in the run
    assert snapshot(made) == before


def test_chain_made_everything(made):
    run = made / "run"
    for stage, steps in {
        "pretext": ["pretext"], "features": ["train"], "clusters": ["cluster", "assign"], "retrain": ["retrain"],
        "eval": ["linear"],
    }.items():  # fmt: skip
        records = json.loads((run / stage / "stage.json").read_text())
        assert list(records) == steps
        for record in records.values():
            assert record["state"] == "done" and record["error"] is None and record["versions"]["ktransfer"]
            assert record["outputs"]
            for name, facts in record["outputs"].items():
                assert hashlib.sha256((run / stage / name).read_bytes()).hexdigest() == facts["sha256"]
    assert not list(run.rglob("*.part")) and not (run / "pretext/checkpoint").exists()


def test_overwrite_clusters_anew_and_labels_with_it(made, tmp_path):
    run = copied(made, tmp_path)
    old = (run / "retrain/model.safetensors").read_bytes()
    line = ["--run", str(run), "cluster", "--k", "3", "--overwrite", *TARGET]
    assert cli.main(line) == 2  # the target network learned other labels
    assert (run / "retrain/model.safetensors").read_bytes() == old
    assert cli.main([*line, "--overwrite"]) == 0
    assert {row.split(",")[1] for row in (run / "clusters/labels.csv").read_text().splitlines()[1:]} == set("012")
    assert (run / "retrain/model.safetensors").read_bytes() != old


def test_a_teacher_made_anew_in_the_line_is_read_anew(made, tmp_path):
    run = copied(made, tmp_path)
    old = (run / "features/train.h5").read_bytes()
    line = [word for word in whole(made) if word not in ("--run", str(made / "run"))]
    line = [*line[: line.index("cluster")], "--seed", "1", "--overwrite", "cluster", "--k", "4", "--overwrite"]
    assert cli.main(["--run", str(run), *line]) == 0
    assert (run / "features/train.h5").read_bytes() != old


def test_overwritten_teacher_does_not_pass_for_the_old_one(made, tmp_path, capsys):
    run = copied(made, tmp_path)
    data = str(made / "images")
    line = ["--run", str(run), *PUZZLE, "--seed", "1", "--data", data, "--overwrite"]
    assert cli.main(line) == 0
    capsys.readouterr()
    assert cli.main(["--run", str(run), "cluster", "--k", "4"]) == 2
    assert "older teacher" in capsys.readouterr().err


LATER = [
    ([*TARGET, "--lr", "0.5"], "retrain in run was made differently: lr was 0.01, is 0.5. Give retrain --overwrite"),
    ([*TARGET, *PROBE, "--epochs", "2"], "epochs was 1, is 2. Give eval --overwrite"),
    ([*TARGET, *PROBE, "--labelled", "other"], "linear in run was made differently: test changed; train changed"),
    (["cluster", "--k", "3"], "cluster in run was made differently: k was 4, is 3"),
]


@pytest.mark.parametrize(("later", "why"), LATER, ids=[" ".join(words[-2:]) for words, _ in LATER])
def test_changes_of_later_stages_are_refused_before_the_first_one_works(refused, made, later, why):
    """The pretext stage would be made again, with the same outcome; nothing may happen to it."""
    if not (made / "other").exists():
        shutil.copytree(made / "images", made / "other")
        draw(made / "other/val/class0/new.jpg", 7)
        draw(made / "other/train/class0/new.jpg", 7)
    line = ["--run", "run", *PUZZLE, "--data", "images", "--overwrite"]
    assert why in refused(*line, *later)


REMADE = [
    ([*PUZZLE, "--seed", "1", "--data", "images", "--overwrite", "cluster", "--k", "4"],
     "cluster in run was made differently: this line makes the extract stage again. Give cluster --overwrite"),
    (["cluster", "--k", "3", "--overwrite", *TARGET], "retrain in run was made differently: this line makes"),
    ([*TARGET, "--lr", "0.5", "--overwrite", *PROBE], "this line makes the retrain stage again. Give eval --overwrite"),
    ([*TARGET, "--lr", "0.5", "--overwrite", "eval"], "this line makes the retrain stage again"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "why"), REMADE)
def test_what_hangs_on_a_stage_made_otherwise_is_refused_before(refused, words, why):
    assert why in refused("--run", "run", *words)


def test_a_stage_made_again_as_it_was_keeps_the_later_ones(made, tmp_path, capsys):
    run = copied(made, tmp_path)
    before = (run / "clusters/clusters.h5").read_bytes()
    assert cli.main(["--run", str(run), *whole(made)[2:-11], "--overwrite", *whole(made)[-11:]]) == 0
    assert (run / "clusters/clusters.h5").read_bytes() == before
    assert capsys.readouterr().err.count("done before, skipped") >= 3


def test_a_self_test_is_no_change(made, capsys):
    line = [word for word in whole(made) if word not in ("--run", str(made / "run"))]
    line = line[: line.index("cluster")]
    before = snapshot(made / "run")
    cli.main(["--run", str(made / "run"), *line, "--overfit", "4", "--lr", "0.05"])
    assert "overfit: step" in capsys.readouterr().err
    assert snapshot(made / "run") == before


def test_overwrite_stays_in_the_command_after_ctrl_c_where_it_is_still_to_be_done(made, tmp_path, capsys, monkeypatch):
    """Stopped in any stage of a line that makes all again, the command that is printed ends where the line would."""
    options = ["--seed", "1", "--overwrite"]
    data = ["--data", str(made / "images")]
    stages = [[*PUZZLE, *data], ["cluster", "--k", "3"], TARGET, PROBE]
    wanted = ["--run", str(tmp_path / "whole"), *(word for stage in stages for word in (*stage, *options))]
    assert cli.main(wanted) == 0
    expected = results(tmp_path / "whole")
    # `extract` is made by `cluster`, whose own overwriting is then still to come.
    places = {"pretext": 3, "features": 3, "clusters": 2, "retrain": 1, "eval": 0}
    finish = runs.Step.finish
    for name, left in places.items():
        run = tmp_path / name / "whole"
        shutil.copytree(made / "run", run)
        line = ["--run", str(run), *wanted[2:]]

        def stop(self, outputs, name=name, **facts):
            if self.folder.name == name:
                raise KeyboardInterrupt
            finish(self, outputs, **facts)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(runs.Step, "finish", stop)
            assert cli.main(line) == 130
        last = capsys.readouterr().err.splitlines()[-1]
        said = shlex.split(last[last.index("ktransfer --run") :])[1:]
        assert said.count("--overwrite") == left
        assert [word for word in said if word != "--overwrite"] == [word for word in line if word != "--overwrite"]
        assert cli.main(said) == 0
        assert results(run) == expected


def results(run: Path) -> dict[str, bytes]:
    names = ("stage.json", "metrics.jsonl", ".lock")
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in names}


def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def test_flags_beat_the_config_and_the_config_beats_the_recipe(made, tmp_path):
    text = "[pretext]\nepochs = 1\nbatch = 4\nsize = 48\nwidth = 0.05\npermutations = 5\nlr = 0.02\n"
    text += f"data = '{made / 'flat'}'\n[extract]\nlayer = 'conv2_1'\npool = 1\n"
    run = tmp_path / "run"
    flags = ["--recipe", "laptop", "--config", config(tmp_path, text), "--run", str(run)]
    assert cli.main([*flags, "pretext", "--lr", "0.03", "cluster", "--k", "3"]) == 0
    settings = json.loads((run / "pretext/stage.json").read_text())["pretext"]["config"]
    assert settings["arch"] == "vgg16_bn"
    assert (settings["batch"], settings["permutations"], settings["lr"]) == (4, 5, 0.03)
    # `cluster` extracts first, with the settings that the file has for that.
    features = json.loads((run / "features/stage.json").read_text())["flat"]["config"]
    assert (features["layer"], features["pool"]) == ("conv2_1", 1)


def test_too_many_broken_images(tmp_path, capsys):
    for number in range(20):
        draw(tmp_path / "some" / f"{number}.png", number)
    for number in range(3):
        (tmp_path / "some" / f"{number}.png").write_bytes(b"")
    line = ["--run", str(tmp_path / "run"), *PUZZLE, "--data", str(tmp_path / "some")]
    for _ in range(2):  # the same command again must not pass
        assert cli.main(line) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("ktransfer: 3 of 20 images") and "raise --max-broken" in said
    assert json.loads((tmp_path / "run/pretext/stage.json").read_text())["pretext"]["state"] == "failed"
    assert not (tmp_path / "run/pretext/model.safetensors").exists()
    assert cli.main([*line, "--max-broken", "0.2"]) == 0
    assert "3 broken images" in capsys.readouterr().err


def test_perms(tmp_path, capsys):
    path = tmp_path / "perms.bin"
    assert cli.main(["perms", "--count", "30", "--min-distance", "4", "--seed", "7", "--out", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = permutations.generate(30, 4, 7)
    distances = [int((a != b).sum()) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    assert said[0] == "30 permutations of 9 tiles"
    assert said[1] == f"Hamming distance: min {min(distances)}, mean {sum(distances) / len(distances):.4f}"
    assert said[2].endswith(", ".join(f"{d}: {distances.count(d)}" for d in sorted(set(distances))))
    assert said[3] == f"sha256 {digest}"
    assert cli.main(["perms", "--read", str(path), "--out", str(tmp_path / "again.bin")]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == said[:4]
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def test_scenes(tmp_path, capsys):
    out = tmp_path / "scenes"
    assert cli.main(["scenes", "--out", str(out), "--images", "20", "--size", "48"]) == 0
    assert str(out) in capsys.readouterr().out
    assert len(list(out.glob("train/*/*.jpg"))) == 20
    assert json.loads((out / "train.json").read_text())["images"] and (out / "val.json").is_file()


def test_unforeseen_errors(monkeypatch, capsys, tmp_path):
    def fail(*_: object) -> None:
        raise RuntimeError("the moon")

    monkeypatch.setattr("ktransfer.pretext.stage.check", fail)
    line = ["--run", str(tmp_path / "run"), "pretext"]
    assert cli.main(line) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "unexpected RuntimeError: the moon" in said and "--debug" in said
    assert cli.main(["--debug", *line]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_reader_that_went_away(made):
    """`ktransfer ... | head` must not end in a traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ktransfer", "perms", "--count", "5"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", [("--run", "", "pretext"), ("--run=", "pretext"), ("--run", "r", "pretext", "--data", "")]
)
def test_an_unset_variable_of_the_shell_is_refused(refused, words):
    assert '"": is empty' in refused(*words)
