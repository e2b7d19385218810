"""What a training says about itself: metrics.jsonl, TensorBoard, and the short form on the bar."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktransfer import files
from ktransfer.errors import StageError


class Diverged(StageError):
    """The loss of a training is not finite."""


class Log:
    """Running sums on the device, read only when a line is written; lines past `step` (of a killed run) are dropped."""

    def __init__(self, path: Path, step: int, tensorboard: bool) -> None:
        self.path = path
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(path.parent / "events", purge_step=step)
        self.sums: dict[str, Tensor] = {}
        self.wait, self.started = 0.0, time.monotonic()
        if path.is_file():
            kept = [line for line in path.read_text("utf-8", "replace").splitlines() if _step_of(line) <= step]
            files.write_text(path, "".join(line + "\n" for line in kept))

    def add(self, sums: dict[str, Tensor], wait: float) -> None:
        """Add one step's sums."""
        for name, value in sums.items():
            detached = value.detach().to(torch.float64) if value.device.type == "cpu" else value.detach().float()
            self.sums[name] = self.sums[name] + detached if name in self.sums else detached
        self.wait += wait

    def due(self, seconds: float) -> bool:
        """Whether the last line is so many seconds old."""
        return time.monotonic() - self.started > seconds

    def write(self, step: int, epoch: int, lr: float, device: torch.device) -> str:
        """Write a line to metrics.jsonl, start new sums, and return the line's short form for the bar."""
        seconds = time.monotonic() - self.started
        values = {name: float(value) for name, value in self.sums.items()}
        count = values.pop("count")
        means = {name: value / max(1.0, count) for name, value in values.items()}
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss is {means['loss']} at step {step}; give a lower --lr, with --overwrite")
        speed = {
            "lr": lr,
            "images_per_second": round(count / seconds, 1),
            # A wait that was going on at the start of the window counts whole.
            "data_wait": round(min(self.wait / seconds, 1.0), 4),
            "memory_gb": round(memory_gb(device), 2),
        }
        self.note(step, epoch, means | speed)
        self.sums, self.wait, self.started = {}, 0.0, time.monotonic()
        return ", ".join(f"{name} {value:.3f}" for name, value in means.items()) + f", wait {speed['data_wait']:.0%}"

    def note(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Append a line of any values, and show them to TensorBoard if it was asked for."""
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "epoch": epoch} | values) + "\n")


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the device where it is a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62
