"""What `ktransfer retrain` can be told."""

from dataclasses import dataclass

from ktransfer.config import option
from ktransfer.training.options import TrainOptions


@dataclass(frozen=True)
class RetrainConfig(TrainOptions):
    """Train a target network from scratch to tell the pseudo-labels.

    The paper's is a standard AlexNet, its settings are not known.
    """

    data: str | None = option(None, "pictures; those that were labelled when not given", execution=True)
    labels: str | None = option(
        None,
        "a label file (.csv, .h5, .bin), or classes: the folder's own classes; the run's pseudo-labels if not given",
    )
    arch: str = option("alexnet", "alexnet, alexnet_bn, or any classifier of torchvision by name; list shows them")
    width: float = option(1.0, "scales all channels (alexnet, alexnet_bn)", low=0.05, high=4)
    stride: int = option(4, "stride of AlexNet's first convolution; 2 suits pictures under 128 pixels", low=1, high=8)
    size: int = option(
        0, "side of the network's input in pixels; 0: 224, or what the pictures have if less", low=0, high=2048
    )
    crop: float = option(0.08, "smallest share of a picture's area that a random crop shows", low=0.01, high=1)
    uniform: bool = option(False, "draw clusters, not pictures, equally often")
    overwrite: bool = option(False, "make the stage again", execution=True)
