"""Early stopping: a training that an evaluation no longer finds better ends, with the weights that were found best."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Stopping:
    """In the place of `loop.fit`'s `evaluate`: what its evaluations, one after each epoch, have said so far.

    All of it is in the checkpoint, so that an interrupted training stops where an undisturbed one does. Before the
    first evaluation above 0 the patience does not run: a detector that finds nothing yet has not learned all it can.

    Args:
        network: the part of the model that is evaluated, and whose weights are kept.
        evaluate: the network, in evaluation mode, -> values by name.
        measure: which of them is to grow; >= 0.
        patience: so many evaluations without growth end the training.
        enough: a value of the measure that ends it at once.
    """

    def __init__(
        self,
        network: nn.Module,
        evaluate: Callable[[nn.Module], dict[str, float]],
        measure: str,
        patience: int,
        enough: float = math.inf,
    ) -> None:
        self.network, self.evaluate, self.measure = network, evaluate, measure
        self.patience, self.enough = patience, enough
        self.evaluated, self.best_epoch, self.best = 0, 0, -math.inf
        self.weights: dict[str, Tensor] = {}

    @property
    def over(self) -> bool:
        """Whether the best value is enough, or the patience is at its end."""
        return self.best >= self.enough or self.evaluated - self.best_epoch >= self.patience

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Evaluate the epoch that has ended; its values, and the best epoch so far, counted from 1."""
        found = self.evaluate(self.network)
        self.evaluated += 1
        if found[self.measure] > self.best or not self.best > 0:
            self.best, self.best_epoch = found[self.measure], self.evaluated
            self.weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        return found | {"best_epoch": self.best_epoch}

    def restore(self) -> None:
        """Give the network its best weights."""
        self.network.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {name: getattr(self, name) for name in ("evaluated", "best_epoch", "best", "weights")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.evaluated, self.best_epoch = int(state["evaluated"]), int(state["best_epoch"])
        self.best, self.weights = float(state["best"]), dict(state["weights"])
