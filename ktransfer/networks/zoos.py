"""Networks of torchvision and of timm by name, with fresh weights."""

import importlib
from typing import Any

from torch import nn

from ktransfer.errors import UsageError

TORCHVISION, TIMM = "torchvision:", "timm:"


def torchvision_names() -> list[str]:
    """The classifiers of torchvision."""
    from torchvision import models as zoo

    names: list[str] = zoo.list_models(module=zoo)
    return names


def of_torchvision(arch: str, classes: int, size: int) -> nn.Module:
    """A classifier of torchvision, with or without the prefix, for images of `size` pixels.

    Raises:
        UsageError: a vision transformer whose patches do not divide the image.
    """
    from torchvision import models as zoo

    name = arch.removeprefix(TORCHVISION)
    special: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision means to change how they start, and warns where nothing is said.
        special = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        patch = int(name.rsplit("_", 1)[1])
        if size % patch:
            raise UsageError(f"--size {size}: {name} has patches of {patch} pixels; give a multiple of {patch}")
        special = {"image_size": size}
    made = zoo.get_model(name, weights=None, num_classes=classes, **special)
    assert isinstance(made, nn.Module)
    return made


def of_timm(arch: str, size: int) -> nn.Module:
    """A network of timm, with the prefix, without its classifier, for images of `size` pixels."""
    timm: Any = importlib.import_module("timm")
    name = arch.removeprefix(TIMM)
    try:  # transformers must know the side of the images, other networks do not take it
        made = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
    except TypeError:
        made = timm.create_model(name, pretrained=False, num_classes=0)
    assert isinstance(made, nn.Module)
    return made
