"""Checkpoints made elsewhere: the tensors of a network found in whatever they are wrapped in.

VISSL, MoCo, SimCLR, SwAV, DeepCluster-v2, DINO, solo-learn, lightly and MMSelfSup all nest the same ResNet under names
of their own (`classy_state_dict.base_model.model.trunk._feature_blocks.`, `state_dict.module.encoder_q.`,
`teacher.backbone.`). The names of the network itself say where it is: the prefix below which most of them stand, with
their shapes. So no list of prefixes is needed.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ktransfer.errors import UsageError
from ktransfer.networks.formats import efficientnet
from ktransfer.networks.formats.naming import Naming

CLASSIFIERS = ("fc.", "classifier.", "heads.", "head.")
_SHOWN = 3
# A running copy beside the network that was trained; DINO's teacher is the one that its authors evaluate.
_COPY = re.compile(r"(^|[._])(momentum|encoder_k|target|ema|student)([._]|$)")
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
        path: .safetensors, or whatever `torch.save` wrote; nothing but tensors and plain containers is unpickled.

    Raises:
        UsageError: missing, damaged, holding other objects, or no tensors at all.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint; check the path")
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be read ({_one_line(error)}); download it again") from error
    except Exception as error:  # unpickling a damaged file may raise anything
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise UsageError(
                f"{path}: has more than tensors ({foreign[1]}), and nothing else is unpickled; where it was made, "
                "save its tensors alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise UsageError(f"{path}: not a complete checkpoint ({_one_line(error)[:100]}); download it again") from error
    found = dict(_flat(held))
    if not found:
        raise UsageError(f"{path}: holds no tensors by name; give a checkpoint with a state_dict")
    return found


def fit(path: Path, model: nn.Module, arch: str) -> Fit:
    """The tensors of a checkpoint that belong to `model`, below the prefix where most of them stand.

    Raises:
        UsageError: as `read_tensors`; or the trunk, which is everything below the classifier, is not complete, or a
            shape differs.
    """
    tensors = read_tensors(path)
    own = model.state_dict()
    best: tuple[tuple[int, int, bool, int], str, dict[str, str], Naming] | None = None
    for naming in _namings(model):
        theirs = {naming.rename(name): name for name in own}
        for prefix, (names, shapes) in _prefixes(tensors, theirs, own).items():
            score = (shapes, names, _COPY.search(prefix) is None, -len(prefix))
            if best is None or score > best[0]:
                best = score, prefix, theirs, naming
    if best is None:
        raise UsageError(f"{path}: its names, such as {next(iter(tensors))}, are not those of {arch}; give its --arch")
    _, prefix, theirs, naming = best
    found = {theirs[key.removeprefix(prefix)]: key for key in tensors if _below(key, prefix) in theirs}
    needed = [name for name in own if not name.startswith(CLASSIFIERS) and not name.endswith(_COUNTER)]
    lost = [name for name in needed if name not in found]
    missing = [name for name in own if name not in found and not name.endswith(_COUNTER)]
    unexpected = [
        key.removeprefix(prefix) for key in tensors if key.startswith(prefix) and _below(key, prefix) not in theirs
    ]
    line = (
        f"{path}: {len(found)} tensors of {arch} matched{f' below {prefix[:-1]}' if prefix else ''}, "
        f"{_some(missing, 'missing')}, {_some(unexpected, 'unexpected')}"
    )
    if lost:
        raise UsageError(
            f"{line}; its trunk is not complete without {lost[0]}: give the --arch that the checkpoint was trained as"
        )
    state = {name: tensors[key] for name, key in found.items() if not name.startswith(CLASSIFIERS)}
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{line}; {name} is {tuple(tensor.shape)} in it and {tuple(own[name].shape)} in {arch}: give the "
                "--arch (and --size) that the checkpoint was trained with"
            )
    return Fit(state, line, naming.adapt)


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


def _flat(held: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(held, Tensor):
        return [(prefix, held)] if prefix else []
    if not isinstance(held, Mapping):
        return []
    # Optimisers number their parameters: no names, no weights.
    inner = ((f"{prefix}.{name}" if prefix else name, value) for name, value in held.items() if isinstance(name, str))
    return [pair for name, value in inner for pair in _flat(value, name)]


def _below(key: str, prefix: str) -> str | None:
    return key.removeprefix(prefix) if key.startswith(prefix) else None


def _some(names: list[str], what: str) -> str:
    if not names:
        return f"none {what}"
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
