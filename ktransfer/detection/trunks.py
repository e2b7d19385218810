"""Trunks of detectors: the convolutions of a network, its maps by stride, and a pyramid on top.

Level l is a map of stride 2^l, as in the papers: C2..C5 come from the network, P3..P7 from the pyramid.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from ktransfer import networks, rng
from ktransfer.errors import UsageError
from ktransfer.networks import Network, teachers
from ktransfer.networks.teachers import Teacher
from ktransfer.networks.zoos import TIMM

NORMS = ("bn", "gn", "frozen")
NECKS = ("p3-p7", "p2-p6", "single")
GROUPS = 32
NORM_LAYERS = (nn.BatchNorm2d, nn.GroupNorm, FrozenBatchNorm2d, nn.LocalResponseNorm)
_PROBE = 256  # pixels of the image by which strides are measured
_DEEPEST = 5


class Trunk(nn.Module):
    """Maps of a network, with a pyramid or alone: (b, 3, h, w) -> {"p3": (b, out_channels, h / 8, w / 8), ...}.

    `body` keeps the names of the network's own modules. `how` is how images are normalised. The modules of the body
    that `still` names get no gradient, and their batch norms keep their statistics also in training.
    """

    def __init__(
        self, body: nn.Sequential, taps: dict[str, str], neck: nn.Module | None, channels: int, how: str
    ) -> None:
        super().__init__()
        self.body = body
        self.taps = taps
        self.neck = neck
        self.out_channels = channels
        self.how = how
        self.still: list[str] = []

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """See the class."""
        found: OrderedDict[str, Tensor] = OrderedDict()
        for name, module in self.body.named_children():
            x = module(x)
            if name in self.taps:
                found[self.taps[name]] = x
        return found if self.neck is None else self.neck(found)

    def freeze(self, layers: Sequence[str] | None = None) -> "Trunk":
        """Keep these layers of the body as they are, and the norms that follow each of them; all where not given.

        Raises:
            UsageError: the body has no such layer.
        """
        modules = dict(self.body.named_children())
        learning = [name for name, module in modules.items() if any(True for _ in module.parameters())]
        for name in layers or ():
            if name not in learning:
                raise UsageError(f"--freeze {name}: no layer of the trunk; it has {', '.join(learning)}")
        kept = True
        for name, module in modules.items():
            if not isinstance(module, NORM_LAYERS):
                kept = layers is None or name in layers
            if kept:
                self.still.append(name)
                module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Trunk":
        """As of any module, but for a body that is kept as it is."""
        super().train(mode)
        for name in self.still:
            self.body.get_submodule(name).eval()
        return self


def build(
    network: Network,
    weights: Path | None,
    neck: str,
    norm: str,
    seed: int,
    channels: int = 256,
    foreign: bool = False,
    filled_later: bool = False,
) -> Trunk:
    """The trunk of a network.

    Args:
        network: of ours (alexnet, alexnet_bn, vgg16, vgg16_bn), a ResNet, EfficientNet or VGG of torchvision, or an
            EfficientNet of timm.
        weights: a file of ours, or, `foreign`, a checkpoint made elsewhere; None: fresh ones, a function of the seed.
        neck: "p3-p7" (a pyramid over C3..C5, or as far as the network goes, and two coarser maps), "p2-p6" (over
            C2..C5, and one coarser map), "single" (the deepest map up to C5 alone).
        norm: "bn" learns, "gn" puts group norm of 32 groups (or as many as divide the channels) in place of
            every batch norm, "frozen" keeps statistics and scales of the weights that were loaded.
        filled_later: weights come from a detector's own file, so that fresh ones may be frozen.

    Raises:
        UsageError: a network that is none of these, or that has no such levels; a norm that is none of
            these, or "frozen" with fresh weights.
    """
    if norm not in NORMS:
        raise UsageError(f"norm {norm}: no such normalisation; valid: {', '.join(NORMS)}")
    if norm == "frozen" and weights is None and not filled_later:
        raise UsageError("norm frozen: random weights have no statistics to keep; give bn or gn")
    if weights is None:
        model = networks.build(network, seed, "detection/trunk")
    else:
        model = teachers.load(Teacher(network, weights, foreign))
    body, levels = split(network, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.torch_seed(seed, "detection/neck", 0))
        body = renormed(body, norm)  # type: ignore[assignment]
        made, taps, width = _neck(neck, norm, levels, channels, network.arch)
    names = [name for name, _ in body.named_children()]
    last = names.index(levels[max(taps)][0])
    kept = nn.Sequential(OrderedDict(list(body.named_children())[: last + 1]))
    prefix = "p" if made is not None else "c"
    return Trunk(kept, {levels[level][0]: f"{prefix}{level}" for level in taps}, made, width, network.normalise)


def split(network: Network, model: nn.Module) -> tuple[nn.Sequential, dict[int, tuple[str, int]]]:
    """The convolutions of a network one after the other, and level -> the last module of that stride and its channels.

    The paddings of our AlexNet become those of Fast R-CNN's (5 at conv1, 1 at the pools): cell i of a map of stride s
    then looks at pixel s * i, where heads expect it.

    Raises:
        UsageError: neither ours nor a ResNet, EfficientNet or VGG.
    """
    if isinstance(model, networks.AlexNet):
        body = nn.Sequential(OrderedDict((name, model.get_submodule(name)) for name in model.trunk))
        for name, module in body.named_children():
            if name == "conv1":
                module.padding = (5, 5)  # type: ignore[assignment]
            elif isinstance(module, nn.MaxPool2d):
                module.padding, module.ceil_mode = 1, False
        candidates = [name for name in model.trunk if name.startswith("relu")]
    elif isinstance(model, zoo.ResNet):
        kept = [(name, module) for name, module in model.named_children() if name not in ("avgpool", "fc")]
        body = nn.Sequential(OrderedDict(kept))
        candidates = [name for name, _ in kept if name.startswith("layer")]
    elif isinstance(model, zoo.EfficientNet):
        body = model.features
        candidates = [name for name, _ in body.named_children()][1:-1]  # neither the stem nor the classifier's 1x1
    elif network.arch.startswith(TIMM) and hasattr(model, "conv_stem"):  # an EfficientNet of timm
        stages = [(f"blocks_{name}", stage) for name, stage in model.get_submodule("blocks").named_children()]
        stem = [(name, model.get_submodule(name)) for name in ("conv_stem", "bn1")]
        body = nn.Sequential(OrderedDict([*stem, *stages]))
        candidates = [name for name, _ in stages]
    elif isinstance(model, zoo.VGG | networks.VGGTrunk):
        body = model.features
        candidates = [name for name, module in body.named_children() if isinstance(module, nn.ReLU)]
    else:
        raise UsageError(
            f"{network.arch}: not a backbone of detectors; give alexnet, alexnet_bn, vgg16, vgg16_bn, or one of "
            "torchvision's ResNets, EfficientNets or VGGs, or --init efficientnet-lite0"
        )
    return body, _levels(body, candidates)


def renormed(module: nn.Module, norm: str) -> nn.Module:
    """The module with `norm` in place of each batch norm; scales and shifts stay, and the activations inside timm's."""
    if norm == "bn":
        return module
    if isinstance(module, nn.BatchNorm2d):
        count = module.num_features
        if norm == "gn":
            other: nn.Module = group_norm(count)
            other.load_state_dict({"weight": module.weight.detach(), "bias": module.bias.detach()})
        else:
            other = FrozenBatchNorm2d(count, module.eps)
            state = module.state_dict()
            other.load_state_dict({name: state[name] for name in ("weight", "bias", "running_mean", "running_var")})
        act = getattr(module, "act", None)
        return other if act is None else nn.Sequential(other, act)
    for name, child in module.named_children():
        setattr(module, name, renormed(child, norm))
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or the largest number that divides both 32 and the channels."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def wide_groups(channels: int) -> nn.GroupNorm:
    """As `group_norm`, but of at least 8 channels a group, as 256 in 32 have.

    The coarsest maps have one cell: a group of one number there would be normalised to 0, and learn nothing.
    """
    return nn.GroupNorm(math.gcd(GROUPS, max(1, channels // 8), channels), channels)


def norm_layer(norm: str) -> Callable[[int], nn.Module] | None:
    """What stands behind the convolutions of the pyramid: none where the norms of the trunk are frozen."""
    layers: dict[str, Callable[[int], nn.Module] | None] = {
        "bn": nn.BatchNorm2d,
        "gn": wide_groups,
        "frozen": None,
    }
    return layers[norm]


def head_norm(norm: str) -> Callable[[int], nn.Module] | None:
    """What stands behind the convolutions of heads: group norm, as one batch norm has no statistics for five levels."""
    return None if norm == "frozen" else wide_groups


def _levels(body: nn.Sequential, candidates: list[str]) -> dict[int, tuple[str, int]]:
    """Level from 2 on -> the last of these modules whose output has that stride, and its channels."""
    found: dict[int, tuple[str, int]] = {}
    x = torch.zeros(1, 3, _PROBE, _PROBE)
    with _evaluating(body):
        for name, module in body.named_children():
            x = module(x)
            if name in candidates:
                found[round(math.log2(_PROBE / x.shape[-1]))] = name, x.shape[1]
    return {level: place for level, place in found.items() if level >= 2}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients, and as it was after that."""
    training = module.training
    module.eval()
    with torch.no_grad():
        yield
    module.train(training)


def _neck(
    neck: str, norm: str, levels: dict[int, tuple[str, int]], channels: int, arch: str
) -> tuple[nn.Module | None, list[int], int]:
    """The pyramid (None without one), the levels that it stands on, and the channels of what comes out."""
    if neck == "single":
        deepest = max(level for level in levels if level <= _DEEPEST)
        return None, [deepest], levels[deepest][1]
    lowest = 3 if neck == "p3-p7" else 2
    taps = [level for level in sorted(levels) if lowest <= level <= _DEEPEST]
    if not taps:
        raise UsageError(f"{arch}: has no feature map of stride {2**lowest} or more for {neck}; give --neck single")
    coarser: Any = LastLevelP6P7(channels, channels) if neck == "p3-p7" else LastLevelMaxPool()
    layer = norm_layer(norm)
    return FeaturePyramidNetwork([levels[level][1] for level in taps], channels, coarser, layer), taps, channels


def strides(trunk: Trunk) -> dict[str, int]:
    """The maps that come out and their strides, the finest first."""
    with _evaluating(trunk):
        maps = trunk(torch.zeros(1, 3, _PROBE, _PROBE, device=next(trunk.parameters()).device))
    return {name: 2 ** round(math.log2(_PROBE / found.shape[-1])) for name, found in maps.items()}
