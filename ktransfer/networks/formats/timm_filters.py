"""Published checkpoints under their authors' own names, converted by timm's own functions for the network at hand.

DINOv2 with and without registers, DINOv3, MAE, CLIP of OpenAI and of open_clip, SigLIP, EVA, ConvNeXt, Swin and others:
timm knows how each was published, and resamples position embeddings to the network's own size.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

_FEWEST = 0.5  # of the network's tensors must stand below a prefix


def convert(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The tensors that timm makes of a checkpoint for its network, and the prefix below which it found them.

    Args:
        tensors: name in the checkpoint -> tensor.
        model: of timm; for any other network nothing is converted.

    Returns:
        name in the network -> tensor, only those with its shapes; empty where no function of timm knows the names.
    """
    own = model.state_dict()
    best: tuple[dict[str, Tensor], str] = {}, ""
    for prefix in _prefixes(tensors, len(own)):
        below = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for function in _functions(model):
            found = {
                name: value
                for name, value in _quiet(function, dict(below), model).items()
                if name in own and value.shape == own[name].shape
            }
            if len(found) > len(best[0]):
                best = found, prefix
    return best


def is_timm(model: nn.Module) -> bool:
    """Whether a network is of timm."""
    return type(model).__module__.startswith("timm.")


def _functions(model: nn.Module) -> list[Callable[..., Any]]:
    """What timm has for the family of a network, in the module where that is defined."""
    home = type(model).__module__
    if not is_timm(model):
        return []
    module = sys.modules[home]
    names = [name for name in vars(module) if "filter" in name and callable(vars(module)[name])]
    found = [vars(module)[name] for name in names if getattr(vars(module)[name], "__module__", "") == home]
    if home.endswith("vision_transformer"):  # of DeiT III, whose networks are plain transformers
        found += [partial(function, adapt_layer_scale=True) for function in found]
    return found


def _quiet(function: Callable[..., Any], tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """What the function makes of tensors that may not be of its kind at all, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            made = function(tensors, model)
        except TypeError:  # some do not take the network
            try:
                made = function(tensors)
            except Exception:
                return {}
        except Exception:  # whatever it is that names and shapes of another network do to it
            return {}
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _prefixes(tensors: Mapping[str, Tensor], whole: int) -> list[str]:
    """Prefixes with enough tensors below them, the shortest first."""
    count: dict[str, int] = {"": len(tensors)}
    for name in tensors:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join([*parts[:cut], ""])
            count[prefix] = count.get(prefix, 0) + 1
    return sorted((prefix for prefix, many in count.items() if many >= _FEWEST * whole), key=len)
