"""What `ktransfer eval` can be told."""

from dataclasses import dataclass

from ktransfer.config import option
from ktransfer.training.options import LoopOptions


@dataclass(frozen=True)
class EvalConfig(LoopOptions):
    """Judge the run's network by linear probes, beside the same with random weights.

    Protocol linear/1, after Zhang et al. (docs/choices.md).
    """

    labelled: str | None = option(
        None, "a root with train/ and val/ class folders or packs, or scenes:; the run's if not given", execution=True
    )
    protocol: str = option("linear", "how it is judged", choices=("linear",))
    layers: str | None = option(None, "layers, separated by commas; conv1..conv5 of an AlexNet when not given")
    beside: str | None = option(
        None, "other runs, separated by commas, whose networks are judged in the same table", execution=True
    )
    random: bool = option(True, "judge the same network with random weights beside it")
    size: int = option(0, "side of the pictures in pixels; 0: as in the network's training", low=0, high=2048)
    stride: int = option(
        0, "stride of AlexNet's first convolution; 0: as in retraining, 4 after a puzzle", low=0, high=8
    )
    lrs: str = option("0.0003,0.001,0.003,0.01", "learning rates to choose from, separated by commas")
    dtype: str = option("float16", "how the maps of the layers are kept", choices=("float16", "float32"))
    cache: float = option(
        20.0,
        "GB of disk that the maps may take while it runs; where they need more, each epoch computes them anew",
        low=0,
        execution=True,
    )
    epochs: int = option(30, "passes over the training part", low=1)
    batch: int = option(128, "pictures a step", low=2)
    weight_decay: float = option(1e-4, "weight decay of the probes", low=0)
    overwrite: bool = option(False, "make the stage again", execution=True)
