"""Networks of torchvision and of timm by name, with fresh weights."""

import difflib
import importlib
import importlib.util
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


def timm_of(arch: str) -> Any:
    """timm, which has a network of that name, with the prefix.

    Raises:
        UsageError: it is not installed, or has none.
    """
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"{arch}: timm is not installed; pip install 'ktransfer[teachers]'")
    timm: Any = importlib.import_module("timm")
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UsageError(f"{arch}: timm has no such network; {near(name, timm.list_models())}")
    return timm


def near(name: str, names: list[str]) -> str:
    """A hint at the name that was meant."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"there are such as {', '.join(names[:: len(names) // 3 + 1])}"


def of_timm(arch: str, size: int, classes: int = 0) -> nn.Module:
    """A network of timm, with the prefix, for images of `size` pixels; without its classifier if it has no classes."""
    timm: Any = importlib.import_module("timm")
    name = arch.removeprefix(TIMM)
    try:  # transformers must know the side of the images, other networks do not take it
        made = timm.create_model(name, pretrained=False, num_classes=classes, img_size=size)
    except TypeError:
        made = timm.create_model(name, pretrained=False, num_classes=classes)
    assert isinstance(made, nn.Module)
    return made
