"""Killed (kill -9) at any instant and given again, self-training and studies end with the bytes of undisturbed ones.

Commands run in forks (tests/support/forker.py), which says what the rules mean.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SELFTRAIN

SMALL = SELFTRAIN | {
    "labelled": "scenes:images=8,size=64",
    "unlabelled": "scenes:images=8,size=64,seed=1",
    "methods": "self,joint",
    "epochs": 2,
    "batch": 2,
}
RECIPE = "\n".join(
    ["[selftrain]", *(f"{name} = {json.dumps(value)}" for name, value in SMALL.items() if name != "fraction")]
)
GRID = "[grid]\nfraction = [0.25, 0.5]"
LINE = ["--run", "mine", "selftrain", *(w for key, value in SMALL.items() for w in (f"--{key}", str(value)))]
STUDY = ["study", "--recipe", "../recipe.toml", "--run", "mine"]
TRAININGS = ("teacher", "student", "joint")
STEPS = ("teacher", "pseudo", "student", "joint", "scores")
LAST = {
    "teacher": "model.safetensors",
    "pseudo": "pseudo.json",
    "student": "model.safetensors",
    "joint": "model.safetensors",
    "scores": "scores.json",
}
ENDINGS = (".safetensors", ".json", ".png", ".csv", ".md", ".svg")
TIMES = ("stage.json",)  # has seconds


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    (root / "recipe.toml").write_text(f"{RECIPE}\n{GRID}\n")
    return root


@pytest.fixture(scope="module")
def launch(home):
    """Run a command in a fork within a folder of `home`; its exit code, or minus the signal."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    forker = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[2] / "support" / "forker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads,
    )

    def run(folder, argv, **order):
        (home / folder).mkdir(exist_ok=True)
        order |= {"argv": argv, "log": str(home / "log"), "cwd": str(home / folder)}
        forker.stdin.write(json.dumps(order) + "\n")
        forker.stdin.flush()
        return json.loads(forker.stdout.readline())["status"]

    yield run
    forker.stdin.close()
    forker.wait()


@pytest.fixture(scope="module")
def whole(home, launch):
    """The files of a self-training that was never stopped."""
    assert launch("whole", LINE) == 0, (home / "log").read_text()
    return contents(home / "whole")


def contents(folder):
    """All results below a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in ENDINGS and path.name not in TIMES]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def killed(home, launch, folder, argv, rules):
    """Kill by each rule in turn, then let it end; the results."""
    for rule in rules:
        status = launch(folder, argv, kill=rule)
        assert status == -signal.SIGKILL, (rule, status, (home / "log").read_text())
    assert launch(folder, argv) == 0, (home / "log").read_text()
    return contents(home / folder)


def test_a_self_training_killed_in_each_step(home, launch, whole):
    assert len(whole) == 11
    rules = [{"step": name, "behind": "last.pt"} for name in TRAININGS]
    rules.insert(1, {"step": "pseudo", "before": "pseudo.json"})
    rules.append({"step": "scores", "before": "scores.json"})
    assert killed(home, launch, "short", LINE, rules) == whole
    assert not list((home / "short").rglob("checkpoint"))


@pytest.mark.slow
def test_a_self_training_killed_everywhere(home, launch, whole):
    dice = random.Random(0)
    rules = []
    for step in STEPS:
        own = [{"event": dice.randint(1, 4)}, {"event": dice.randint(5, 9)}, {"before": LAST[step]}]
        if step in TRAININGS:
            own[2:2] = [{"event": dice.randint(10, 40)}, {"before": "last.pt"}, {"behind": "last.pt"}]
            own[2:2] = [{"before": "augmented.png"}, {"seconds": 0.05}]
        rules += [rule | {"step": step} for rule in (*own, {"done": True}, {"after": True})]
    assert killed(home, launch, "long", LINE, rules) == whole


@pytest.mark.slow
def test_a_study_killed_in_its_cells_and_between_them(home, launch):
    assert launch("study", STUDY) == 0, (home / "log").read_text()
    wanted = contents(home / "study")
    assert {"mine/study.csv", "mine/cells.csv", "mine/study.md", "mine/study.json", "mine/fraction.svg"} <= set(wanted)
    rules = [
        {"step": "teacher", "event": 3},
        {"step": "teacher", "behind": "last.pt"},
        {"step": "student", "before": "model.safetensors"},
        {"step": "scores", "after": True},
        {"step": "pseudo", "done": True},
        {"step": "student", "event": 25},
        {"step": "joint", "behind": "last.pt"},
        {"step": "scores", "before": "study.csv"},
    ]
    assert killed(home, launch, "study-killed", STUDY, rules) == wanted
