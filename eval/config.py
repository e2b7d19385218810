"""What `ktransfer eval` can be told."""

from dataclasses import dataclass
from typing import Any

from ktransfer.config import option
from ktransfer.training.options import LoopOptions

PROTOCOLS = ("linear",)
"""Each is a module of this room (see protocols.py)."""
DEFAULTS: dict[str, dict[str, Any]] = {"linear": {"epochs": 30, "batch": 128, "weight_decay": 1e-4}}
"""What a protocol takes for a setting that was left at 0."""


@dataclass(frozen=True)
class EvalConfig(LoopOptions):
    """Judge the run's network by named protocols, beside the same with random weights.

    Several protocols at once are separated by commas. docs/protocols.md says what each does.
    """

    labelled: str | None = option(
        None, "a root with train/ and val/ class folders or packs, or scenes:; the run's if not given", execution=True
    )
    protocol: str = option("linear", f"how it is judged, separated by commas: {', '.join(PROTOCOLS)}", execution=True)
    layers: str | None = option(None, "layers, separated by commas; conv1..conv5 of an AlexNet when not given")
    beside: str | None = option(
        None, "other runs, separated by commas, whose networks are judged in the same table", execution=True
    )
    random: bool = option(True, "judge the same network with random weights beside it")
    size: int = option(0, "side of the pictures in pixels; 0: as in the network's training", low=0, high=2048)
    stride: int = option(
        0, "stride of AlexNet's first convolution; 0: as in retraining, 4 after a puzzle", low=0, high=8
    )
    seeds: int = option(1, "judge so many times, from so many seeds, and show means and deviations", low=1, high=100)
    lrs: str = option("0.0003,0.001,0.003,0.01", "learning rates to choose from, separated by commas", of=("linear",))
    dtype: str = option(
        "float16", "how the maps of the layers are kept", choices=("float16", "float32"), of=("linear",)
    )
    cache: float = option(
        20.0,
        "GB of disk that the maps may take while it runs; where they need more, each epoch computes them anew",
        low=0,
        execution=True,
        of=("linear",),
    )
    epochs: int = option(0, "passes over the training part; 0: the protocol's own", low=0)
    batch: int = option(0, "pictures a step; 0: the protocol's own", low=0)
    weight_decay: float = option(-1.0, "weight decay; -1: the protocol's own", low=-1)
    overwrite: bool = option(False, "make the stage again", execution=True)
