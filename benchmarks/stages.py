"""Whole stages beside their network alone: a pretext step, extraction; and memory as the images become more.

Run as `python benchmarks/stages.py [step] [extract] [memory] [--rounds N] [--json FILE]`, on a quiet machine.

step      VGG-16 pretext steps (--width, --batch) on images from a folder of JPEGs, nothing kept, beside the same step
          with one batch in memory; the share of its time that the loop waited for data
extract   the whole of extraction from that folder, to features in memory, beside bare forward passes of the same
          network on random tensors, up to the same layer
memory    `ktransfer extract` in a process of its own on N and on 10 N images (each linked ten times): peak RSS

Both ways take turns; what is printed are medians over the rounds. The images are made
(ktransfer/bench/photographs.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ktransfer import networks
from ktransfer.bench.measure import Wanted, Work, read_batches
from ktransfer.bench.photographs import write_photographs
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.networks import Network
from ktransfer.stages import worker

CPU = torch.device("cpu")
AND_PEAK = """
import sys
from ktransfer.cli import main

code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


def turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; once before the clock counts."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def stage(part: str, folder: Path, width: float, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """`steps` batches a turn: with reading, and with one batch in memory or, for extraction, bare forward passes."""
    data = open_dataset(str(folder))
    wanted = Wanted("vgg16", width, 0, batch, "jigsawpp", "auto", CPU, len(data))
    work: Work = worker(part)(wanted)
    source = read_batches(ImageLoader(data, work.side, cache="off"), wanted, work.following)
    kept, _ = next(source)
    waits: list[float] = []

    def reading() -> None:
        for _ in range(steps):
            found, wait = next(source)
            waits.append(wait)
            work.whole(found)

    def alone() -> None:
        tensors = torch.randn(work.prepare(kept).shape) if part == "extract" else None
        for _ in range(steps):
            if tensors is None:
                work.whole(kept)
            else:
                work.network(tensors)

    seconds = turns({"reading": reading, "alone": alone}, rounds)
    medians = {name: statistics.median(found) / steps / batch for name, found in seconds.items()}
    wait = sum(waits[steps:]) / sum(seconds["reading"])
    ratio = medians["alone"] / medians["reading"]
    print(
        f"{part}: vgg16, width {width:g}, batch {batch}: {1 / medians['reading']:.2f} images/s, "
        f"{ratio:.1%} of {1 / medians['alone']:.2f} alone; waited for data {wait:.2%} of the time"
    )
    return {"seconds": seconds, "data_wait": wait, "ratio": ratio, "batch": batch, "width": width, "steps": steps}


def memory(folder: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Peak RSS in MB of `ktransfer extract`, by number of images."""
    teacher = work / "teacher.safetensors"
    network = Network("alexnet", 0.25, 2, 128, 0, "picture", "jigsawpp")
    networks.save(teacher, networks.build(network, 0, "bench").state_dict(), network)
    names = sorted(str(path) for path in folder.glob("*.jpg"))
    peaks: dict[int, list[float]] = {}
    for turn in range(rounds):
        for times in (1, 10):
            root = work / f"times{times}"
            if not root.exists():
                root.mkdir()
                for copy in range(times):
                    for name in names:
                        os.link(name, root / f"{copy}-{Path(name).name}")
            command = [
                "--run",
                str(work / f"run{times}-{turn}"),
                "extract",
                "--data",
                str(root),
                "--teacher",
                str(teacher),
            ]
            done = subprocess.run([sys.executable, "-c", AND_PEAK, *command], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            peaks.setdefault(times * len(names), []).append(int(done.stdout.split()[-1]) / 1e3)
    few, many = (statistics.median(found) for found in peaks.values())
    counts = ", ".join(f"{count:,}" for count in peaks)
    print(f"memory: extract of {counts} images: {few:.0f} and {many:.0f} MB, {many / few - 1:+.1%}")
    return {"peak_mb": {str(n): found for n, found in peaks.items()}, "ratio": many / few}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["step", "extract", "memory"], metavar="step|extract|memory")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="batches a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        folder = write_photographs(Path(name) / "images", options.images)
        for part in options.parts:
            if part == "memory":
                found[part] = memory(folder, Path(name), min(options.rounds, 3))
            else:
                found[part] = stage(part, folder, options.width, options.batch, options.steps, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
