"""Early stopping: a training that a judgement no longer finds better ends, with the weights that were found best."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Stopping:
    """In the place of `loop.fit`'s `evaluate`: what its judgements, one after each epoch, have said so far.

    All of it is in the checkpoint, so that an interrupted training stops where an undisturbed one does. Before the
    first judgement above 0 nobody is impatient: a detector that finds nothing yet is not one that has learned all.

    Args:
        network: the part of the model that is judged, and whose weights are kept.
        judge: the network, in evaluation mode, -> values by name.
        measure: which of them is to grow; >= 0.
        patience: so many judgements without growth end the training.
    """

    def __init__(
        self, network: nn.Module, judge: Callable[[nn.Module], dict[str, float]], measure: str, patience: int
    ) -> None:
        self.network, self.judge, self.measure, self.patience = network, judge, measure, patience
        self.judged, self.best_epoch, self.best = 0, 0, -math.inf
        self.weights: dict[str, Tensor] = {}

    @property
    def over(self) -> bool:
        """Whether the patience is at its end."""
        return self.judged - self.best_epoch >= self.patience

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Judge the epoch that has ended; its values, and the best epoch so far, counted from 1."""
        found = self.judge(self.network)
        self.judged += 1
        if found[self.measure] > self.best or not self.best > 0:
            self.best, self.best_epoch = found[self.measure], self.judged
            self.weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        return found | {"best_epoch": self.best_epoch}

    def restore(self) -> None:
        """Give the network its best weights."""
        self.network.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {name: getattr(self, name) for name in ("judged", "best_epoch", "best", "weights")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.judged, self.best_epoch = int(state["judged"]), int(state["best_epoch"])
        self.best, self.weights = float(state["best"]), dict(state["weights"])
