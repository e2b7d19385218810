"""The layers of a network by the papers' names, and what they make of images.

Layers are named once for every family: `conv1`.. of an AlexNet, `conv1_1`.. of a VGG, `stem`, `layer1`..`layer4` of a
ResNet, `blocks.0`.. and `norm` of a vision transformer, `features.0`.. (or what stands in the module) of all others.
"""

import math
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from ktransfer.networks import descriptors, own_modules
from ktransfer.networks.formats.hugging_face import HuggingFace
from ktransfer.networks.functions import Function
from ktransfer.networks.network import AlexNet, Network, VGGTrunk

OURS = (AlexNet, VGGTrunk, descriptors.Hog, descriptors.Pixels)


def layers(network: Network, model: nn.Module) -> dict[str, str]:
    """The layers that can be read, by the papers' names, with the module whose output they are (after the ReLU)."""
    if isinstance(model, descriptors.Hog | descriptors.Pixels | HuggingFace | Function):
        return dict(model.layers)
    if isinstance(model, AlexNet):
        return {f"conv{number}": f"relu{number}" for number in range(1, 6)}
    if isinstance(model, VGGTrunk):
        return _of_vgg(model.features)

    from torchvision import models as zoo

    if isinstance(model, zoo.AlexNet):
        relus = [number for number, module in model.features.named_children() if isinstance(module, nn.ReLU)]
        return {f"conv{place}": f"features.{number}" for place, number in enumerate(relus, start=1)}
    if isinstance(model, zoo.VGG):
        return _of_vgg(model.features)
    if isinstance(model, zoo.VisionTransformer):
        blocks = [name for name, _ in model.encoder.layers.named_children()]
        found = {f"blocks.{place}": f"encoder.layers.{name}" for place, name in enumerate(blocks)}
        return found | {"norm": "encoder.ln"}
    if tokens_before(model) is not None:  # of timm
        names = [f"blocks.{name}" for name, _ in model.get_submodule("blocks").named_children()]
        return {name: name for name in (*names, "norm")}
    inner = getattr(model, "features", None)
    prefix, parent = ("features.", inner) if isinstance(inner, nn.Sequential) else ("", model)
    maps = _with_maps(network, model, {f"{prefix}{name}": module for name, module in parent.named_children()})
    if isinstance(model, zoo.ResNet):
        return {
            name.replace("maxpool", "stem"): path for name, path in maps.items() if name not in ("conv1", "bn1", "relu")
        }
    return maps


def _with_maps(network: Network, model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Those of the modules that make maps of more than one place, in the order in which they work; of a module of one's
    own, whose parts may be wrapped, those inside them where none does."""
    maps: dict[str, str] = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, out, path=path: (
                maps.update({path: path})
                if isinstance(out, Tensor) and out.ndim == 4 and _as_maps(model, out).shape[-1] > 1
                else None
            )
        )
        for path, module in modules.items()
    ]
    _run(model, torch.zeros(1, 3, network.size, network.size))
    for hook in hooks:
        hook.remove()
    inside = {f"{path}.{name}": child for path, module in modules.items() for name, child in module.named_children()}
    wrapped = not maps and inside and own_modules.is_own(network.arch)
    return _with_maps(network, model, inside) if wrapped else maps


def _of_vgg(features: nn.Module) -> dict[str, str]:
    found, block, place = {}, 1, 1
    for number, module in features.named_children():
        if isinstance(module, nn.ReLU):
            found[f"conv{block}_{place}"] = f"features.{number}"
            place += 1
        elif isinstance(module, nn.MaxPool2d):
            block, place = block + 1, 1
    return found


def tokens_before(model: nn.Module) -> int | None:
    """How many tokens of a vision transformer stand before those of its patches; None for what has no tokens."""
    if isinstance(model, OURS):
        return None

    from torchvision import models as zoo

    if isinstance(model, zoo.VisionTransformer):
        return 1
    before = getattr(model, "num_prefix_tokens", None)  # of timm
    return before if isinstance(before, int) else None


def has_class_token(model: nn.Module) -> bool:
    """Whether the first token of a vision transformer is that of the class (timm knows others, registers)."""
    return bool(tokens_before(model)) and bool(getattr(model, "has_class_token", True))


class _AllThere(Exception):
    """The layers that are wanted have been computed."""


def feature_maps(model: nn.Module, paths: Mapping[str, str], x: Tensor, token: str = "patch") -> dict[str, Tensor]:
    """One forward pass, the outputs of several layers.

    Args:
        paths: layer name -> module path, as `layers` gives them.
        x: (batch, 3, h, w), normalised.
        token: what is read of a transformer: "patch", its patches where they lie in the image; "mean" of these; or
            "cls", its class token.

    Returns:
        layer name -> (batch, channels, h', w'), with h' = w' = 1 for "mean" and "cls".
    """
    found: dict[str, Tensor] = {}
    # In ours every module is called once, so that nothing behind the last layer of interest has to be computed.
    ours = isinstance(model, AlexNet | VGGTrunk)

    def note(name: str, out: Tensor | tuple[Tensor, ...]) -> None:
        found[name] = _as_maps(model, out[0] if isinstance(out, tuple) else out, token)
        if ours and len(found) == len(paths):
            raise _AllThere

    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, name=name: note(name, out))
        for name, path in paths.items()
    ]
    try:
        with suppress(_AllThere):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _as_maps(model: nn.Module, out: Tensor, token: str = "patch") -> Tensor:
    """(batch, channels, h, w), also of transformers: those that hand over (batch, h, w, channels), or tokens."""
    if isinstance(model, OURS):
        return out

    from torchvision import models as zoo

    before = tokens_before(model)
    if isinstance(model, HuggingFace) and before is None:
        before = 0  # of a Swin all rows are patches
    if before is not None and out.ndim == 3:
        if token == "cls":
            return out[:, 0, :, None, None]
        patches = out[:, before:].transpose(1, 2)
        if token == "mean":
            return patches.mean(dim=2)[:, :, None, None]
        side = math.isqrt(patches.shape[2])
        return patches.reshape(*patches.shape[:2], side, side)
    last = isinstance(model, zoo.SwinTransformer) or getattr(model, "output_fmt", None) == "NHWC"  # the latter of timm
    return out.permute(0, 3, 1, 2) if last and out.ndim == 4 else out


def _run(model: nn.Module, x: Tensor) -> None:
    training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(training)
