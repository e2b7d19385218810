"""Killed at any instant and started again, every stage ends with the bytes of a run that was never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

Launch = Callable[..., int]

TRAINED = {"width": 0.05, "epochs": 4, "batch": 8}
STAGES = {
    "pretext": ("pretext", "--data", "../pictures", "--arch", "vgg16_bn", "--size", "48", "--permutations", "6"),
    "extract": ("extract", "--batch", "8"),
    "cluster": ("cluster", "--k", "5", "--pca", "6"),
    "assign": ("assign",),
    "retrain": ("retrain", "--arch", "alexnet_bn", "--stride", "2", "--size", "40"),
    "eval": ("eval", "--labelled", "../pictures", "--layers", "conv2,conv4", "--lrs", "0.001,0.01"),
}
TRAINING = {
    "pretext": ("--width", "0.05", "--epochs", "4", "--batch", "8", "--max-broken", "0.1"),
    "extract": ("--max-broken", "0.1"),
    "retrain": ("--width", "0.05", "--epochs", "5", "--batch", "8", "--max-broken", "0.1"),
    "eval": ("--epochs", "4", "--batch", "8", "--max-broken", "0.1"),
}
STEPS = {"extract": "train", "eval": "linear"}
LAST = {
    "pretext": "model.safetensors",
    "extract": "train.h5",
    "cluster": "clusters.h5",
    "assign": "labels.bin",
    "retrain": "model.safetensors",
    "eval": "linear.md",
}
FINAL = (
    "pretext/model.safetensors",
    "pretext/puzzles.png",
    "features/train.h5",
    "clusters/clusters.h5",
    "clusters/labels.csv",
    "clusters/labels.h5",
    "clusters/labels.bin",
    "retrain/model.safetensors",
    "eval/linear.json",
    "eval/linear.csv",
    "eval/linear.md",
)


def chain() -> list[str]:
    line = ["--run", "mine"]
    for stage, words in STAGES.items():
        line += [*words, *TRAINING.get(stage, ())]
    return line


def draw(path: Path, kind: int, seed: int) -> None:
    dice = random.Random(seed)
    image = Image.new("RGB", (60, 52), tuple(dice.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = dice.randrange(40), dice.randrange(40)
        shape = pen.ellipse if kind else pen.rectangle
        shape((x, y, x + 14, y + 14), fill=tuple(dice.randrange(256) for _ in range(3)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 36 pictures to train (one of them broken) and 16 to test; runs lie two folders below."""
    root = tmp_path_factory.mktemp("interruption")
    for part, count in (("train", 18), ("val", 8)):
        for kind, name in enumerate(("round", "square")):
            for number in range(count):
                draw(root / "pictures" / part / name / f"{number:02d}.jpg", kind, hash((part == "val", kind, number)))
    (root / "pictures/train/round/07.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def launch(pictures: Path) -> Iterator[Launch]:
    """Run a command line in a fork, below `pictures`; the log of the last one is `pictures / "log"`."""
    script = Path(__file__).with_name("forker.py")
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    cache = {"XDG_CACHE_HOME": str(pictures / "cache")}
    forker = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads | cache,
    )
    assert forker.stdin and forker.stdout

    def run(folder: str, argv: list[str], **order: Any) -> int:
        (pictures / folder).mkdir(exist_ok=True)
        order |= {"argv": argv, "log": str(pictures / "log"), "cwd": str(pictures / folder)}
        forker.stdin.write(json.dumps(order) + "\n")
        forker.stdin.flush()
        return int(json.loads(forker.stdout.readline())["status"])

    yield run
    forker.stdin.close()
    forker.wait()


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, launch: Launch) -> dict[str, bytes]:
    """The final files of a run that was never stopped."""
    code = launch("whole", chain())
    assert code == 0, (pictures / "log").read_text()
    return final(pictures / "whole" / "mine")


def final(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in FINAL}


def test_reference(undisturbed):
    assert set(undisturbed) == set(FINAL)
