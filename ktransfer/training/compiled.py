"""The model as a training step calls it: compiled where that pays and works, else as it is."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ktransfer.errors import KTransferError, StageError
from ktransfer.progress import say
from ktransfer.training.norms import has_batch_norm
from ktransfer.training.options import LoopOptions

BACKEND = "inductor"
_SHOWN = 150  # characters of a reason

Sums = dict[str, Tensor]


class Compiled:
    """A model beside its compiled form, which shares its weights, and with them the names in its state.

    `--compile auto` compiles on CUDA, and goes on without where that fails, with a line that says why.

    Args:
        shared: whether several processes train it: their batch norms wait for each other, which is not compiled.
    """

    def __init__(self, model: nn.Module, options: LoopOptions, device: torch.device, label: str, shared: bool) -> None:
        self.model, self._label, self._forced = model, label, options.compile == "on"
        self._proven = False
        self._fast: Callable[..., object] | None = None
        if options.compile == "off" or (device.type != "cuda" and not self._forced):
            return
        if shared and has_batch_norm(model):
            say(f"{label}: not compiled, as several processes share the statistics of batch norm")
            return
        say(f"{label}: compiling the step; the first one takes a minute")
        self._fast = torch.compile(model, backend=BACKEND)

    @property
    def used(self) -> nn.Module:
        """What the step calls."""
        return self.model if self._fast is None else self._fast  # type: ignore[return-value]

    def run(self, gradients: Callable[[nn.Module], Sums]) -> Sums:
        """The sums of `gradients` of the model; where compiling fails at the first step, of the plain one.

        Raises:
            StageError: it fails with `--compile on`.
        """
        if self._fast is None or self._proven:
            return gradients(self.used)
        before = [value.clone() for value in self.model.buffers()]
        try:
            found = gradients(self.used)
        except (KTransferError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:_SHOWN]
            if self._forced:
                raise StageError(
                    f"--compile on: {type(error).__name__}: {said}; give --compile off (or auto) to go on without"
                ) from error
            say(f"{self._label}: goes on without compiling ({type(error).__name__}: {said})")
            self._fast = None
            with torch.no_grad():
                for value, old in zip(self.model.buffers(), before, strict=True):
                    value.copy_(old)
            self.model.zero_grad(set_to_none=True)
            return gradients(self.model)
        self._proven = True
        return found
