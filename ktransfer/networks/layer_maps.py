"""The layers of a network by the papers' names, and what they make of images.

Layers are named once for every family: `conv1`.. of an AlexNet, `conv1_1`.. of a VGG, `stem`, `layer1`..`layer4` of a
ResNet, `blocks.0`.. and `norm` of a vision transformer, `features.0`.. (or what stands in the module) of all others.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer.errors import UsageError
from ktransfer.networks import descriptors, own_modules
from ktransfer.networks.formats.hugging_face import HuggingFace
from ktransfer.networks.formats.timm_filters import is_timm
from ktransfer.networks.functions import Function
from ktransfer.networks.network import AlexNet, Network, VGGTrunk

OURS = (AlexNet, VGGTrunk, descriptors.Hog, descriptors.Pixels)
_PROBE = 224  # side in pixels of images in which every layer has more than one position


_ONE = torch.empty(1)  # stands for one image


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
    found = _seen(network, model, _parts(model))
    if isinstance(model, zoo.ResNet):
        return {
            name.replace("maxpool", "stem"): path
            for name, path in found.items()
            if name not in ("conv1", "bn1", "relu")
        }
    return found


def _seen(network: Network, model: nn.Module, parts: list[str]) -> dict[str, str]:
    """Those of the parts whose output can be read as maps, in the order in which they are computed; of a module of
    one's own, whose parts may be wrapped, those inside them where none can."""
    found: dict[str, str] = {}
    own, tokened = own_modules.is_own(network.arch), tokens_before(model) is not None
    side = network.size if own else max(network.size, _PROBE)

    def note(path: str, out: Any) -> None:
        read, module = _tensor(out, _ONE), model.get_submodule(path)
        if (
            read is None
            or len(read) != 1
            or (read.ndim == 3 and not tokened and (_is_plural(path, module) or _is_empty(module)))
        ):
            return  # what only moves or drops tokens; and all blocks together, of which the last is there
        maps = _as_maps(model, read, path=path)
        if maps is None or maps.ndim != 4 or maps.shape[-1] != maps.shape[-2]:
            return
        # What pools the whole image to one position is no layer. In small images the last layers have but one position
        # too: so larger ones are looked at. A network that takes none has its blocks, and its norm, by other signs.
        single = side == network.size and not own and ("." in path or (read.ndim == 4 and maps.shape != read.shape))
        if maps.shape[-1] > 1 or (single and not path.startswith("head")):
            found[path] = path

    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, path=path: note(path, out))
        for path in parts
    ]
    try:
        try:
            _run(model, side)
        except (RuntimeError, ValueError, AssertionError):
            if side == network.size:
                raise
            found.clear()
            side = network.size
            _run(model, side)
    finally:
        for hook in hooks:
            hook.remove()
    inside = [f"{path}.{name}" for path in parts for name, _ in model.get_submodule(path).named_children()]
    return _seen(network, model, inside) if own and inside and not found else found


def _parts(model: nn.Module) -> list[str]:
    """Module paths that may be layers: children of the network, of its lists, and of what timm calls `stages`."""
    inner = getattr(model, "features", None)
    top, parent = ("features.", inner) if isinstance(inner, nn.Sequential) else ("", model)
    children = [(f"{top}{name}", module) for name, module in parent.named_children()]
    if is_timm(model) or tokens_before(model) is not None:
        plural = [place for place, (name, module) in enumerate(children) if _is_plural(name, module)]
        if tokens_before(model) is not None and plural:  # before its first block tokens have not seen each other
            children = children[plural[0] :]
    found: list[str] = []
    while children:
        path, module = children.pop(0)
        plural_here = (is_timm(model) or tokens_before(model) is not None) and _is_plural(path, module)
        if module is getattr(model, "reroll", None):
            continue  # of Hiera, below
        if plural_here or isinstance(module, nn.ModuleList):
            children = [(f"{path}.{name}", part) for name, part in module.named_children()] + children
        if not isinstance(module, nn.ModuleList) and not (plural_here and tokens_before(model) is not None):
            found.append(path)
    return found


def _is_empty(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None


def _is_plural(path: str, module: nn.Module) -> bool:
    """Whether it holds stages or blocks: `stages`, `blocks`, `levels`, not `layer1` or `stem`."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and path.endswith("s")


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


def holds_class_token(network: Network, model: nn.Module, path: str) -> bool:
    """Whether a class token stands in what a module makes of images; some networks add it after the first blocks."""
    if not has_class_token(model) or not is_timm(model):
        return has_class_token(model)
    counts: list[int | None] = []

    def note(_module: nn.Module, _given: Any, out: Any) -> None:
        read = _tensor(out, _ONE)
        counts.append(prefix_tokens(model, read) if read is not None and read.ndim == 3 else 0)

    hook = model.get_submodule(path).register_forward_hook(note)
    try:
        _run(model, network.size)
    finally:
        hook.remove()
    return bool(counts and counts[0])


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

    def note(name: str, out: Any) -> None:
        read = _tensor(out, x)
        maps = None if read is None else _as_maps(model, read, token, paths[name])
        if maps is None:
            raise UsageError(f"--layer {name}: has no tokens for --token {token}; give another of them")
        found[name] = maps
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


def _tensor(out: Any, x: Tensor) -> Tensor | None:
    """The output of a module for a batch, of several tensors the first that has a row an image."""
    if isinstance(out, Tensor):  # whose length is not looked at: an export leaves it open
        return out
    several = out if isinstance(out, tuple | list) else ()
    return next((one for one in several if isinstance(one, Tensor) and one.ndim and len(one) == len(x)), None)


def _as_maps(model: nn.Module, out: Tensor, token: str = "patch", path: str = "") -> Tensor | None:
    """(batch, channels, h, w), also of networks that hand over (batch, h, w, channels), or tokens.

    None: what is asked for is not in it.
    """
    if isinstance(model, OURS):
        return out
    if out.ndim == 3:
        before = prefix_tokens(model, out)
        if before is None or (token == "cls" and not before):
            return None
        if token == "cls":
            return out[:, 0, :, None, None]
        reroll: Any = getattr(model, "reroll", None)
        patches: Tensor
        if reroll and path.startswith("blocks."):  # Hiera's tokens lie in the order of its windows
            patches = reroll(out, int(path.rpartition(".")[2])).flatten(1, 2).transpose(1, 2)
        else:
            patches = out[:, before:].transpose(1, 2)
        if token == "mean":
            return patches.mean(dim=2)[:, :, None, None]
        side = math.isqrt(patches.shape[2])
        return patches.reshape(*patches.shape[:2], side, side)
    if out.ndim == 4 and _channels_last(model, out):
        return out.permute(0, 3, 1, 2)
    return out


def prefix_tokens(model: nn.Module, out: Tensor) -> int | None:
    """How many of the tokens (batch, n, channels) stand before those of the patches, which fill a square.

    None: they fill none. Some networks add their class token after the first blocks, or say nothing of it.
    """
    before = tokens_before(model)
    if isinstance(model, HuggingFace):
        return before or 0  # of a Swin all rows are patches
    for count in (0, 1, 2) if before is None else (before, 0):
        patches = out.shape[1] - count
        if patches > (0 if count or not before else 1) and math.isqrt(patches) ** 2 == patches:
            return count
    return None


def _channels_last(model: nn.Module, out: Tensor) -> bool:
    """Whether the maps are (batch, h, w, channels); images are square, so that the shape says it for most."""
    from torchvision import models as zoo

    if not is_timm(model):
        return isinstance(model, zoo.SwinTransformer) or getattr(model, "output_fmt", None) == "NHWC"
    _, first, second, third = out.shape
    return first == second and (second != third or getattr(model, "output_fmt", None) == "NHWC")


def _run(model: nn.Module, side: int) -> None:
    """One image, black, on the device of the network."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=device))
    finally:
        model.train(training)
