"""The checkpoint of a training, `checkpoint/last.pt` in its folder: how often it is written, read again, removed."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktransfer import files
from ktransfer.errors import UsageError, refuse_machine
from ktransfer.progress import say
from ktransfer.training.stopping import Stopping

SECONDS = 1.0  # from one checkpoint to the next, at least
SHARE = 0.02  # of the time, at most


class Checkpoint:
    """Weights, optimiser, steps done, and what early stopping has seen; the clock runs from here on.

    Args:
        folder: of the training; None keeps nothing.
    """

    def __init__(
        self, folder: Path | None, model: nn.Module, optimiser: torch.optim.Optimizer, stopping: Stopping | None
    ) -> None:
        self.path = folder / "checkpoint" / "last.pt" if folder else None
        self.model, self.optimiser, self.stopping = model, optimiser, stopping
        self._saved, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether the last one is so old that the next one takes a small share of the time."""
        return time.monotonic() - self._saved > max(SECONDS, self._cost / SHARE)

    def save(self, step: int) -> None:
        """Write it, whole or not at all, after `step` steps."""
        if self.path is None:
            return
        started = time.monotonic()
        _write(self.path, self.state(step))
        self._saved = time.monotonic()
        self._cost = self._saved - started

    def state(self, step: int) -> dict[str, Any]:
        """What it holds: tensors in plain containers."""
        found = {"step": step, "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        return found | ({"stopping": self.stopping.state()} if self.stopping else {})

    def restore(self, device: torch.device) -> int:
        """Go on from the file if there is one; the steps done.

        Raises:
            UsageError: the file is damaged or of another training.
        """
        if self.path is None or not self.path.is_file():
            return 0
        try:
            step = self.load(torch.load(self.path, map_location=device, weights_only=True))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # damaged bytes make the unpickler raise almost anything
            refuse_machine(self.path, error)
            raise UsageError(f"{self.path}: not a checkpoint of this training; start again with --overwrite") from error
        say(f"resumed at step {step}")
        return step

    def load(self, state: dict[str, Any]) -> int:
        """Go on from a `state`; its step."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.stopping:
            self.stopping.load(state["stopping"])
        return int(state["step"])


def remove(folder: Path) -> None:
    """Free the checkpoint of a training that is done."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _write(path: Path, state: dict[str, Any]) -> None:
    files.write_whole(path, lambda part: torch.save(state, part))
