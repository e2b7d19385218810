"""EfficientNets as `efficientnet_pytorch` and the packages made from it name them: `_conv_stem`, `_blocks.7._bn2`.

Their blocks are numbered throughout; those of timm and torchvision within each stage. They pad as TensorFlow does, and
their batch norms have its epsilon. timm's `tf_efficientnet_*` do so too; a network of torchvision is changed.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer.networks.formats.naming import Naming

EPSILON = 1e-3  # of the batch norms of TensorFlow's EfficientNets
_TIMM_TOP = {
    "conv_stem": "_conv_stem",
    "bn1": "_bn0",
    "conv_head": "_conv_head",
    "bn2": "_bn1",
    "classifier": "_fc",
}
_SQUEEZE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
_TIMM_SEPARABLE = {
    "conv_dw": "_depthwise_conv",
    "bn1": "_bn1",
    "conv_pw": "_project_conv",
    "bn2": "_bn2",
} | _SQUEEZE
_TIMM_INVERTED = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
} | _SQUEEZE
# The steps of a block of torchvision, from the last one backwards complete: what does not widen lacks the first.
_TORCHVISION = (
    {"0": "_expand_conv", "1": "_bn0"},
    {"0": "_depthwise_conv", "1": "_bn1"},
    {"fc1": "_se_reduce", "fc2": "_se_expand"},
    {"0": "_project_conv", "1": "_bn2"},
)


def naming(model: nn.Module) -> Naming | None:
    """The names of `efficientnet_pytorch` for an EfficientNet of timm or torchvision; None for another network."""
    if type(model).__name__ != "EfficientNet":
        return None
    ours = isinstance(getattr(model, "features", None), nn.Sequential)
    prefixes = _of_torchvision(model) if ours else _of_timm(model)

    def rename(name: str) -> str:
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            theirs = prefixes.get(".".join(parts[:cut]))
            if theirs:
                return ".".join([theirs, *parts[cut:]])
        return name

    return Naming(rename, _as_tensorflow if ours else None)


def _of_timm(model: nn.Module) -> dict[str, str]:
    """Module of the network -> their module."""
    found, number = dict(_TIMM_TOP), 0
    for stage, blocks in model.get_submodule("blocks").named_children():
        for place, block in blocks.named_children():
            table = _TIMM_INVERTED if hasattr(block, "conv_pwl") else _TIMM_SEPARABLE
            found |= {f"blocks.{stage}.{place}.{ours}": f"_blocks.{number}.{theirs}" for ours, theirs in table.items()}
            number += 1
    return found


def _of_torchvision(model: nn.Module) -> dict[str, str]:
    stages = list(model.get_submodule("features").named_children())
    found = {"features.0.0": "_conv_stem", "features.0.1": "_bn0", "classifier.1": "_fc"}
    found |= {f"features.{stages[-1][0]}.0": "_conv_head", f"features.{stages[-1][0]}.1": "_bn1"}
    number = 0
    for stage, blocks in stages[1:-1]:
        for place, block in blocks.named_children():
            steps = list(block.get_submodule("block").named_children())
            for (step, _), table in zip(steps, _TORCHVISION[-len(steps) :], strict=True):
                below = f"features.{stage}.{place}.block.{step}"
                found |= {f"{below}.{ours}": f"_blocks.{number}.{theirs}" for ours, theirs in table.items()}
            number += 1
    return found


def _as_tensorflow(model: nn.Module) -> None:
    """TensorFlow's padding, which for a stride of 2 is one-sided on even sides, and its epsilon."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPSILON
        elif isinstance(module, nn.Conv2d) and module.stride[0] > 1:
            module.padding = (0, 0)
            module.register_forward_pre_hook(_pad)


def _pad(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    assert isinstance(module, nn.Conv2d)
    (x,) = given
    around: list[int] = []
    for side, kernel, stride in zip(x.shape[:1:-1], module.kernel_size[::-1], module.stride[::-1], strict=True):
        missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        around += [missing // 2, missing - missing // 2]
    return (F.pad(x, around),)
