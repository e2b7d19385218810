"""A student from a teacher's features: this project beside lightly-train, both from nothing to trained weights.

    python -m venv peer && peer/bin/pip install lightly-train       # AGPL-3.0; an environment of its own
    python benchmarks/transfer.py --peer peer/bin/python --data IMAGES --teacher vits --epochs 10

The same images, student (ResNet-18), crop, batch, precision and cores; a teacher of the same architecture with random
weights, as only speed is measured: `vits` is a ViT-S/14, `toy` costs next to nothing (here it is the pixels).
lightly-train asks the teacher in every step about the crop that the student sees; here it is asked once about each
image, and what it said is in a file.
Each command is timed whole, from the start of Python to its end, in turn; medians over --rounds, and the ratio of each.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE, BATCH = 84, 64
VIT = "vit_small_patch14_dinov2"
TEACHERS = {"toy": "dinov2/_vittest14", "vits": "dinov2/vits14-noreg-notpretrained"}
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
THEIRS = """
import lightly_train
if __name__ == "__main__":
    lightly_train.pretrain(out={out!r}, data={data!r}, model="torchvision/resnet18", method="distillationv1",
        method_args={{"teacher": {teacher!r}}}, transform_args={{"image_size": ({size}, {size})}}, batch_size={batch},
        epochs={epochs}, precision={precision!r}, accelerator="cpu", num_workers={workers})
"""


def main() -> None:
    """Time both, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of an environment with lightly-train")
    parser.add_argument("--data", required=True, help="a folder of images")
    parser.add_argument("--teacher", choices=list(TEACHERS), default="vits")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bfloat16")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = random_vit(Path(folder))
        seconds: dict[str, list[float]] = {"lightly-train": [], "ktransfer": []}
        for number in range(given.rounds):
            place = Path(folder) / str(number)
            place.mkdir()
            seconds["lightly-train"].append(timed(theirs(given, place)))
            seconds["ktransfer"].append(timed(ours(given, place, weights)))
            print({name: round(values[-1], 1) for name, values in seconds.items()}, flush=True)
    ratios = [theirs / ours for theirs, ours in zip(*seconds.values(), strict=True)]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{os.cpu_count()} cores, {given.epochs} epochs, teacher {given.teacher}, {given.precision}")
    for name, values in seconds.items():
        print(f"{name:14} {statistics.median(values):8.1f} s")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio {statistics.median(ratios):.2f} ({spread}); the largest process held {memory:.1f} GB")


def random_vit(folder: Path) -> Path:
    """Random weights of timm's ViT-S/14, as a file."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = folder / "teacher.safetensors"
    save_file(timm.create_model(VIT, img_size=SIZE, num_classes=0).state_dict(), path)
    return path


def theirs(given: argparse.Namespace, place: Path) -> list[str]:
    """lightly-train's distillation, in a file, as its workers import it."""
    script = place / "peer.py"
    script.write_text(
        THEIRS.format(
            out=str(place / "peer"),
            data=given.data,
            teacher=TEACHERS[given.teacher],
            size=SIZE,
            batch=BATCH,
            epochs=given.epochs,
            precision=PRECISIONS[given.precision],
            workers=os.cpu_count(),
        )
    )
    return [given.peer, str(script)]


def ours(given: argparse.Namespace, place: Path, weights: Path) -> list[str]:
    """The same as one line of this project."""
    teacher = ["timm:" + VIT, "--weights", str(weights), "--size", str(SIZE)] if given.teacher == "vits" else ["pixels"]
    line = [sys.executable, "-m", "ktransfer", "--run", str(place / "run"), "extract", "--data", given.data]
    line += ["--teacher", *teacher]
    line += ["--precision", given.precision, "retrain", "--objective", "features", "--arch", "resnet18"]
    line += ["--size", str(SIZE), "--batch", str(BATCH), "--epochs", str(given.epochs), "--precision", given.precision]
    return [*line, "--grey", "0.2", "--jitter", "0.5"]


def timed(line: list[str]) -> float:
    """Seconds of a command, whose output is shown where it fails."""
    started = time.perf_counter()
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
