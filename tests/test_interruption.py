"""Killed at any instant and started again, every stage ends with the bytes of a run that was never stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

Launch = Callable[..., int]

STAGES = {
    "pretext": ("pretext", "--data", "../images", "--arch", "vgg16_bn", "--size", "48", "--permutations", "6"),
    "extract": ("extract", "--batch", "8"),
    "cluster": ("cluster", "--k", "5", "--pca", "6"),
    "assign": ("assign",),
    "retrain": ("retrain", "--arch", "alexnet_bn", "--stride", "2", "--size", "40"),
    "eval": ("eval", "--labelled", "../images", "--layers", "conv2,conv4", "--lrs", "0.001,0.01"),
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
    "cluster": "clusters.png",
    "assign": "labels.bin",
    "retrain": "model.safetensors",
    "eval": "linear.md",
}
FINAL = (
    "pretext/model.safetensors",
    "pretext/puzzles.png",
    "features/train.h5",
    "clusters/clusters.h5",
    "clusters/quality.json",
    "clusters/clusters.png",
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
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 36 images to train (one of them broken) and 16 to test; runs lie two folders below."""
    root = tmp_path_factory.mktemp("interruption")
    for part, count in (("train", 18), ("val", 8)):
        for kind, name in enumerate(("round", "square")):
            for number in range(count):
                draw(root / "images" / part / name / f"{number:02d}.jpg", kind, hash((part == "val", kind, number)))
    (root / "images/train/round/07.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def launch(images: Path) -> Iterator[Launch]:
    """Run a command line in a fork, below `images`; the log of the last one is `images / "log"`."""
    script = Path(__file__).parent / "support" / "forker.py"
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    cache = {"XDG_CACHE_HOME": str(images / "cache")}
    forker = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads | cache,
    )
    assert forker.stdin and forker.stdout

    def run(folder: str, argv: list[str], **order: Any) -> int:
        (images / folder).mkdir(exist_ok=True)
        order |= {"argv": argv, "log": str(images / "log"), "cwd": str(images / folder)}
        forker.stdin.write(json.dumps(order) + "\n")
        forker.stdin.flush()
        return int(json.loads(forker.stdout.readline())["status"])

    yield run
    forker.stdin.close()
    forker.wait()


@pytest.fixture(scope="module")
def undisturbed(images: Path, launch: Launch) -> dict[str, bytes]:
    """The final files of a run that was never stopped."""
    code = launch("whole", chain())
    assert code == 0, (images / "log").read_text()
    found = artefacts(images / "whole/mine")
    assert set(found) == set(FINAL)
    return found


def instants(stage: str, dice: random.Random) -> list[dict[str, Any]]:
    """When to kill a stage: early, somewhere, before its last file is there, before it counts as done, and after."""
    found: list[dict[str, Any]] = [{"event": dice.randint(1, 5)}, {"event": dice.randint(6, 12)}]
    if stage in TRAINING:
        found.append({"event": dice.randint(13, 50)})
    if stage in ("pretext", "retrain", "eval"):
        found += [{"before": "last.pt"}, {"behind": "last.pt"}]
    if stage == "extract":  # the first time it says that nothing is done yet
        found += [{"behind": "train.h5.progress"}] * 2
    found += [{"before": LAST[stage]}, {"done": True}, {"after": True}]
    return [rule | {"step": STEPS.get(stage, stage)} for rule in found]


def seconds_of(run: Path, stage: str) -> float:
    folder = {"extract": "features", "cluster": "clusters", "assign": "clusters"}.get(stage, stage)
    return float(json.loads((run / folder / "stage.json").read_text())[STEPS.get(stage, stage)]["seconds"])


def test_killed_before_and_after_every_step(images: Path, launch: Launch, undisturbed: dict[str, bytes]) -> None:
    dice = random.Random(1)
    for stage in STAGES:
        for rule in instants(stage, dice):
            status = launch("killed", chain(), kill=rule)
            assert status == -signal.SIGKILL, (rule, (images / "log").read_text())
    assert launch("killed", chain()) == 0
    assert differing(images / "killed/mine", undisturbed) == []


def test_killed_at_any_time(images: Path, launch: Launch, undisturbed: dict[str, bytes]) -> None:
    dice = random.Random(2)
    landed = 0
    for stage, words in STAGES.items():
        line = ["--run", "mine", *words, *TRAINING.get(stage, ())]
        longest = seconds_of(images / "whole/mine", stage)
        for _ in range(3):
            rule = {"step": STEPS.get(stage, stage), "seconds": dice.uniform(0, 0.6 * longest)}
            status = launch("timed", line, kill=rule)
            # How far it comes in that time is the machine's affair: it may also have ended before.
            assert status in (0, -signal.SIGKILL), (images / "log").read_text()
            landed += status != 0
        assert launch("timed", line) == 0
    assert landed >= 6
    assert differing(images / "timed/mine", undisturbed) == []


@pytest.mark.parametrize(
    ("stage", "instant"),
    [
        ("pretext", {"before": "last.pt"}),
        ("extract", {"event": 30}),
        ("cluster", {"event": 12}),
        ("retrain", {"seconds": 0.05}),
        ("eval", {"event": 60}),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    images: Path, launch: Launch, undisturbed: dict[str, bytes], stage: str, instant: dict[str, Any]
) -> None:
    folder = f"stopped-{stage}"
    rule = instant | {"step": STEPS.get(stage, stage), "signal": signal.SIGINT}
    assert launch(folder, chain(), kill=rule) == 130
    said = (images / "log").read_text()
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("ktransfer: stopped;") and last.endswith(f"ktransfer {' '.join(chain())}"), said
    assert launch(folder, chain()) == 0
    assert differing(images / folder / "mine", undisturbed) == []


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk(images: Path, launch: Launch, undisturbed: dict[str, bytes], stage: str) -> None:
    folder = images / f"full-{stage}"
    shutil.copytree(images / "whole/mine", folder / "mine")
    for name in list(STAGES)[list(STAGES).index(stage) :]:
        forget(folder / "mine", name)
    before = artefacts(folder / "mine")
    assert len(before) == {"pretext": 0, "extract": 2, "cluster": 3, "assign": 6, "retrain": 9, "eval": 10}[stage]
    # No file but small ones can be written: that is how a full disk looks from inside.
    assert launch(folder.name, chain(), largest=4000) == 1
    said = (images / "log").read_text()
    lines = [line for line in said.splitlines() if line.startswith("ktransfer: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert "File too large" in lines[0] and "give the same command again" in lines[0], said
    after = artefacts(folder / "mine")
    assert {name: after.get(name) for name in before} == before
    assert launch(folder.name, chain()) == 0
    assert differing(folder / "mine", undisturbed) == []


def forget(run: Path, stage: str) -> None:
    """Make a run as it was before a stage."""
    folder = {"extract": "features", "cluster": "clusters", "assign": "clusters"}.get(stage, stage)
    record = run / folder / "stage.json"
    steps = json.loads(record.read_text())
    for name in steps.pop(STEPS.get(stage, stage))["outputs"]:
        (run / folder / name).unlink()
    record.write_text(json.dumps(steps))


def artefacts(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in FINAL if (run / name).is_file()}


def differing(run: Path, wanted: dict[str, bytes]) -> list[str]:
    found = artefacts(run)
    return [name for name in FINAL if found.get(name) != wanted[name]]
