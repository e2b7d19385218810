"""`ktransfer bench predict`: one network computed in several ways, in turn."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ktransfer import files
from ktransfer.bench.measure import CPU_BATCH, SCHEMA, Wanted, machine
from ktransfer.errors import UsageError
from ktransfer.progress import bar
from ktransfer.stages import worker
from ktransfer.training.device import choose_device
from ktransfer.training.options import MachineOptions, TrainOptions

LEAST = 5  # rounds


def command(
    model: str | None,
    arch: str | None,
    width: float,
    size: int,
    batch: int,
    device: str,
    seconds: float,
    out: Path | None,
) -> str:
    """Images a second in batches, and milliseconds of a single image: the medians of rounds, in each of which every way
    has its turn, so that what else the machine does meets all of them.

    Args:
        model: a run or a file of it; a network of `arch`, `width` and `size` with fresh weights where not given.
        batch: images; 0: 256, or 16 without a GPU.
        seconds: of the rounds of each of both measurements; at least five are made.
        out: write everything as JSON here.

    Returns:
        A table for people.

    Raises:
        UsageError: it cannot be done.
    """
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--json {out}: the folder {out.parent} does not exist; make it first")
    chosen = choose_device(MachineOptions(device=device))
    batch = batch or (CPU_BATCH if chosen.type == "cpu" else TrainOptions.batch)
    network, ways = worker("predict")(model, Wanted(arch, width, size, batch, "", "float32", chosen))
    dice = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, network.size, network.size), generator=dice, dtype=torch.uint8)
    many, single = in_turn("batches", ways, images, seconds), in_turn("single images", ways, images[:1], seconds)
    rows = {
        name: {
            "images_per_second": batch / median(many[name]),
            "milliseconds": 1000 * median(single[name]),
            "rounds": len(many[name]),
            "single_rounds": len(single[name]),
        }
        for name in ways
    }
    facts = {
        "machine": machine(chosen),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "arch": network.arch,
        "width": network.width,
        "size": network.size,
        "batch": batch,
        "device": str(chosen),
    }
    result = {"schema": SCHEMA, "part": "predict", "facts": facts, "rows": rows}
    if out is not None:
        files.write_json(out, result)
    return _table(result)


def in_turn(
    label: str, ways: dict[str, Callable[[Tensor], Tensor]], images: Tensor, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each way in each round; once before the clock starts.

    Args:
        ways: name -> what is done with the images.
        seconds: make rounds for so long, and at least five.
    """
    for do in ways.values():
        do(images)
    found: dict[str, list[float]] = {name: [] for name in ways}
    began, rounds = time.perf_counter(), 0
    with bar(round(seconds), label, "s") as shown:
        while rounds < LEAST or time.perf_counter() - began < seconds:
            for name, do in ways.items():
                started = time.perf_counter()
                do(images)
                found[name].append(time.perf_counter() - started)
            rounds += 1
            shown.update(min(round(time.perf_counter() - began), round(seconds)) - shown.n)
    return found


def _table(result: dict[str, Any]) -> str:
    facts, rows = result["facts"], result["rows"]
    first = next(iter(rows.values()))
    elsewhere = "" if facts["device"] == "cpu" else "; onnx and int8 on the CPU"
    lines = [
        f"predict: {facts['machine']}, {facts['threads']} threads in each{elsewhere}; {facts['arch']}, width "
        f"{facts['width']:g}, squares of {facts['size']}, batch {facts['batch']}; medians of {first['rounds']} "
        f"rounds, of {first['single_rounds']} with a single image",
        f"{'':8} {'images/s':>10} {'ms an image':>12}",
    ]
    lines += [f"{name:8} {row['images_per_second']:10,.1f} {row['milliseconds']:12.2f}" for name, row in rows.items()]
    return "\n".join(lines)
