"""Checkpoints made elsewhere: the tensors of a network found in whatever they are wrapped in.

VISSL, MoCo, SimCLR, SwAV, DeepCluster-v2, DINO, solo-learn, lightly and MMSelfSup all nest the same ResNet under names
of their own (`classy_state_dict.base_model.model.trunk._feature_blocks.`, `state_dict.module.encoder_q.`,
`teacher.backbone.`). The names of the network itself say where it is: the prefix below which most of them stand, with
their shapes. So no list of prefixes is needed.
"""

import math
import pickle  # for its error alone  # nosec B403
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ktransfer.errors import UsageError
from ktransfer.files import in_unicode
from ktransfer.networks.formats import efficientnet, files, timm_filters, unpickling
from ktransfer.networks.formats.naming import Naming
from ktransfer.progress import say_once

CLASSIFIERS = ("fc.", "classifier.", "heads.", "head.")
_SHOWN = 3
_POSITIONS = "encoder.pos_embedding"  # of a transformer of torchvision
_SMALL_STEM = (3, 3, 3)  # shape of the first kernels of a ResNet for images of 32 pixels; the others have 7 x 7
# A running copy beside the network that was trained; DINO's teacher is the one that its authors evaluate.
_COPY = re.compile(r"(^|[._])(momentum|encoder_k|target|ema|student)([._]|$)")
# Weights averaged over the training, which the authors evaluate: timm's, ConvNeXt's and EVA's, those of ultralytics.
_AVERAGED = re.compile(r"^(state_dict_ema|model_ema|ema)\.")
_COUNTER = "num_batches_tracked"  # of a batch norm; old checkpoints have none, and nothing is computed with it
_TIMM = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_OLD_VIT = ((r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2."))
_OLD_DENSENET = ((r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."),)


class Fit(NamedTuple):
    """The tensors of a network in a checkpoint.

    Attributes:
        state: name in the network -> tensor, the classifier left out.
        line: what matched, what is missing and what was not expected, for people.
        adapt: changes the network to compute what that of the checkpoint does, where their names are known to need it.
    """

    state: dict[str, Tensor]
    line: str
    adapt: Callable[[nn.Module], None] | None = None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the dotted path of names that leads to each.

    Args:
        path: .safetensors, or whatever `torch.save` or `torch.jit.save` wrote; nothing but tensors and plain
            containers is made of a pickle, whatever else it names is left out, and a line says so.

    Raises:
        UsageError: missing, damaged, something else than a checkpoint, or no tensors at all.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint; check the path")
    try:
        files.refuse_others(path)
        if files.is_safetensors(path):
            with in_unicode(path) as place:
                found = load_file(place)
        else:
            found = dict(unpickling.flat(_unpickled(path)))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be read ({_one_line(error)}); download it again") from error
    except UsageError:
        raise
    except Exception as error:  # unpickling a damaged file may raise anything
        raise UsageError(f"{path}: not a complete checkpoint ({_one_line(error)[:100]}); download it again") from error
    if not found:
        raise UsageError(f"{path}: holds no tensors by name; give a checkpoint with a state_dict")
    return found


def _unpickled(path: Path) -> Any:
    if not unpickling.is_torchscript(path):
        try:
            # Warnings are about a protocol that torch allows. Of a file's name it would believe the ending.
            with warnings.catch_warnings(action="ignore", category=UserWarning), path.open("rb") as file:
                return torch.load(file, "cpu", weights_only=True)
        except pickle.UnpicklingError:  # it names more than tensors, or is damaged, which the second reading finds too
            pass
    held, left = unpickling.read(path)
    if left:
        say_once(f"{path}: only its tensors are read; {_some(left, 'left out, and not run')}")
    return held


def fit(path: Path, model: nn.Module, arch: str) -> Fit:
    """The tensors of a checkpoint that belong to `model`, below the prefix where most of them stand.

    Raises:
        UsageError: as `read_tensors`; or the trunk, which is everything below the classifier, is not complete, or a
            shape differs.
    """
    tensors = read_tensors(path)
    try:
        return _fit(path, tensors, model, arch)
    except UsageError:
        converted, prefix = timm_filters.convert(tensors, model)
        if any(name not in converted for name in _needed(model.state_dict())):
            raise
        found = _fit(path, converted, model, arch)
        where = f" below {prefix[:-1]}" if prefix else ""
        return found._replace(line=f"{found.line}; its own names{where} converted by timm")


def _fit(path: Path, tensors: Mapping[str, Tensor], model: nn.Module, arch: str) -> Fit:
    from torchvision import models as zoo

    own = model.state_dict()
    best: tuple[tuple[int, int, int, int], str, dict[str, str], Naming] | None = None
    for naming in _namings(model):
        theirs = {naming.rename(name): name for name in own}
        for prefix, (names, shapes) in _prefixes(tensors, theirs, own).items():
            score = (shapes, names, _standing(prefix), -len(prefix))
            if best is None or score > best[0]:
                best = score, prefix, theirs, naming
    if best is None:
        raise UsageError(f"{path}: its names, such as {next(iter(tensors))}, are not those of {arch}; give its --arch")
    _, prefix, theirs, naming = best
    found = {theirs[key.removeprefix(prefix)]: key for key in tensors if _below(key, prefix) in theirs}
    lost = [name for name in _needed(own) if name not in found]
    missing = [name for name in own if name not in found and not name.endswith(_COUNTER)]
    unexpected = [
        key.removeprefix(prefix) for key in tensors if key.startswith(prefix) and _below(key, prefix) not in theirs
    ]
    line = (
        f"{path}: {len(found)} tensors of {arch} matched{_place(prefix)}, "
        f"{_some(missing, 'missing')}, {_some(unexpected, 'unexpected')}"
    )
    if lost:
        raise UsageError(
            f"{line}; its trunk is not complete without {lost[0]}: give the --arch that the checkpoint was trained as"
        )
    # A network of timm is made without its classifier: what stands below such a name is the norm of the pooled vector.
    headless = timm_filters.is_timm(model)
    state = {
        name: tensors[key]
        for name, key in found.items()
        if not name.startswith(CLASSIFIERS) or (headless and tensors[key].shape == own[name].shape)
    }
    adapt = naming.adapt
    if isinstance(model, zoo.ResNet) and state["conv1.weight"].shape[1:] == _SMALL_STEM:
        own, adapt = own | {"conv1.weight": state["conv1.weight"]}, _small_stem
        line += "; its first layer is that for small images: 3 x 3, no stride, no pooling"
    if isinstance(model, zoo.VisionTransformer) and state[_POSITIONS].shape != own[_POSITIONS].shape:
        state[_POSITIONS] = _resampled(state[_POSITIONS], own[_POSITIONS].shape)
        line += f"; its position embeddings resampled to {model.image_size} pixels"
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{line}; {name} is {tuple(tensor.shape)} in it and {tuple(own[name].shape)} in {arch}: give the "
                "--arch (and --size) that the checkpoint was trained with"
            )
    return Fit(state, line, adapt)


def _resampled(embeddings: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """(1, 1 + n, d) of a class token and a square of patches for another number of these, as torchvision does it."""
    before, after = math.isqrt(embeddings.shape[1] - 1), math.isqrt(wanted[1] - 1)
    if embeddings.ndim != 3 or before**2 + 1 != embeddings.shape[1] or embeddings.shape[2] != wanted[2]:
        return embeddings  # of another network
    square = embeddings[:, 1:].transpose(1, 2).unflatten(2, (before, before))
    square = nn.functional.interpolate(square.float(), (after, after), mode="bicubic", align_corners=True)
    return torch.cat([embeddings[:, :1], square.flatten(2).transpose(1, 2).to(embeddings.dtype)], 1)


def _small_stem(model: Any) -> None:
    """Give a ResNet the first layers that trainings on CIFAR use."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()


def _needed(own: Mapping[str, Tensor]) -> list[str]:
    """The trunk: everything below the classifier."""
    return [name for name in own if not name.startswith(CLASSIFIERS) and not name.endswith(_COUNTER)]


def _prefixes(
    tensors: Mapping[str, Tensor], theirs: Mapping[str, str], own: Mapping[str, Tensor]
) -> dict[str, tuple[int, int]]:
    """Prefix -> how many names of the network stand below it, and how many of them with its shapes."""
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for key, tensor in tensors.items():
        parts = key.split(".")
        for cut in range(len(parts)):
            name = theirs.get(".".join(parts[cut:]))
            if name is not None:
                prefix = ".".join([*parts[:cut], ""])
                names[prefix] += 1
                shapes[prefix] += tensor.shape == own[name].shape
    return {prefix: (count, shapes[prefix]) for prefix, count in names.items()}


def _namings(model: nn.Module) -> list[Naming]:
    """How others name the tensors of the network; first of all as it does itself."""
    from torchvision import models as zoo

    children = [name for name, _ in model.named_children()]

    def numbered(name: str) -> str:  # nn.Sequential(*list(model.children())[:-1]), as in lightly
        first, _, rest = name.partition(".")
        return f"{children.index(first)}.{rest}" if first in children else name

    namings = [Naming(str), Naming(numbered)]
    if isinstance(model, zoo.VisionTransformer):
        namings += [Naming(_renaming(_TIMM)), Naming(_renaming(_OLD_VIT))]
    if isinstance(model, zoo.DenseNet):
        namings.append(Naming(_renaming(_OLD_DENSENET)))
    theirs = efficientnet.naming(model)
    return [*namings, theirs] if theirs else namings


def _renaming(rules: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def _standing(prefix: str) -> int:
    """Of equal copies of a network, the one with the highest is taken."""
    if _AVERAGED.match(prefix):
        return 2
    return 0 if _COPY.search(prefix) else 1


def _place(prefix: str) -> str:
    if not prefix:
        return ""
    return f" below {prefix[:-1]}{', its averaged weights' if _AVERAGED.match(prefix) else ''}"


def _below(key: str, prefix: str) -> str | None:
    return key.removeprefix(prefix) if key.startswith(prefix) else None


def _some(names: list[str], what: str) -> str:
    if not names:
        return f"none {what}"
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
