"""Folders of Hugging Face as teachers: `config.json` and `model.safetensors`, or shards of it with their index.

`transformers` builds the network and knows under which names its weights were ever published; files are read here. So
nothing of a folder is run, no pickle is opened, and nothing is looked for elsewhere.
"""

import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ktransfer import files
from ktransfer.errors import UsageError, refuse_machine
from ktransfer.networks.formats.files import refuse_others
from ktransfer.run import input_hash

PREFIX = "transformers:"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_POOLER = "pooler."
# What a configuration may ask for beside the network itself: code of others, kernels, quantised arithmetic.
_LEFT_OUT = ("auto_map", "attn_implementation", "quantization_config", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class _Family:
    """A kind of network.

    Attributes:
        model: its class in transformers.
        tokens: whether it has one vector a patch throughout, a transformer, or maps in stages.
        classed: whether the first token is that of the class.
        normed: whether its last norm sees the whole image, not the vector alone that it hands over.
        resized: whether it must be told that images have another side than those it was trained on.
        pooled: whether the vector that it hands over is what its authors compare.
    """

    model: str
    tokens: bool = True
    classed: bool = True
    normed: bool = True
    resized: bool = False
    pooled: bool = False


_CLIP = _Family("CLIPVisionModel", normed=False, resized=True, pooled=True)
_SIGLIP = _Family("SiglipVisionModel", classed=False, resized=True, pooled=True)
_FAMILIES = {
    "vit": _Family("ViTModel", resized=True),
    "dinov2": _Family("Dinov2Model"),
    "dinov2_with_registers": _Family("Dinov2WithRegistersModel"),
    "dinov3_vit": _Family("DINOv3ViTModel"),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "resnet": _Family("ResNetModel", tokens=False, normed=False),
    "convnext": _Family("ConvNextModel", tokens=False, normed=False),
    "convnextv2": _Family("ConvNextV2Model", tokens=False, normed=False),
    "swin": _Family("SwinModel", tokens=False, resized=True),
}


class HuggingFace(nn.Module):
    """A network of transformers: (batch, 3, h, w) float32 -> (batch, d), the vector that it hands over.

    Attributes:
        layers: layer -> module whose output it is: `blocks.0`.. of transformers, `stem`, `layer1`.. of others, `norm`.
        pools: whether there is such a vector; otherwise the call returns what the last layer does.
        num_prefix_tokens: tokens before those of the patches; None where it has no tokens.
        has_class_token: whether the first of them is that of the class.
    """

    def __init__(self, inner: nn.Module, family: _Family) -> None:
        super().__init__()
        self.inner = inner
        settings: Any = inner.config
        stages = next(name for name, module in inner.named_modules() if isinstance(module, nn.ModuleList))
        names = [f"inner.{stages}.{name}" for name, _ in inner.get_submodule(stages).named_children()]
        first = 0 if family.tokens else 1
        found = {f"{'blocks.' if family.tokens else 'layer'}{n}": path for n, path in enumerate(names, start=first)}
        if not family.tokens:
            found = {"stem": f"inner.{next(name for name, _ in inner.named_children())}"} | found
        if family.normed:
            norms = [name for name, module in inner.named_children() if isinstance(module, nn.LayerNorm)]
            found["norm"] = f"inner.{norms[-1]}"
        self.layers = found
        before = int(family.classed) + getattr(settings, "num_register_tokens", 0)
        self.num_prefix_tokens = before if family.tokens else None
        self.has_class_token = family.tokens and family.classed
        self.pools = _pools(family, settings.to_dict()) and getattr(inner, "pooler", True) is not None
        self._side = settings.image_size if family.resized else None

    def forward(self, x: Tensor) -> Tensor:
        """The vector, or the output of the last layer."""
        told = {"interpolate_pos_encoding": True} if self._side not in (None, x.shape[-1]) else {}
        out = self.inner(x, **told)
        vectors: Tensor = out.pooler_output if self.pools else out.last_hidden_state
        return vectors


@dataclass(frozen=True)
class Folder:
    """What a folder holds, its weights not yet read.

    Attributes:
        path: the folder.
        files: its weights.
        kind: `model_type`.
        settings: the configuration of the network.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    settings: Mapping[str, Any]

    @property
    def side(self) -> int | None:
        """Side in pixels of the images that it was trained on, where its configuration says so."""
        stated = self.settings.get("image_size")
        return stated if isinstance(stated, int) else None

    @property
    def pools(self) -> bool:
        """Whether the vector that it hands over is what its authors compare."""
        return _FAMILIES[self.kind].pooled and _pools(_FAMILIES[self.kind], self.settings)


def open_folder(path: Path) -> Folder:
    """A folder with all its files.

    Raises:
        UsageError: a file is missing or something else than its name says, an unknown network, no transformers.
    """
    if not (path / CONFIG).is_file():
        raise UsageError(
            f"--teacher {path}: a folder without {CONFIG}, which folders of Hugging Face have; give one that has it "
            f"and {WEIGHTS} (of a cache that is snapshots/REVISION), or a file of weights"
        )
    settings = read_json(path / CONFIG)
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UsageError(
            f"--teacher {path}: {CONFIG} names the network {kind!r}, of which no layers are known; valid: "
            f"{', '.join(_FAMILIES)}; of others give {WEIGHTS} with --arch timm:NAME"
        )
    found = _weights(path)
    for file in found:
        refuse_others(file)
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(f"--teacher {path}: transformers is not installed; pip install 'ktransfer[transformers]'")
    inner = settings.get("vision_config") if kind in ("clip", "siglip") else settings
    if not isinstance(inner, dict):
        raise UsageError(f"--teacher {path}: {CONFIG} of {kind} has no vision_config; download it again")
    kept = {name: value for name, value in inner.items() if not name.startswith("_") and name not in _LEFT_OUT}
    return Folder(path, found, kind, kept)


def identity(path: Path) -> str:
    """Hex SHA-256 of all files of a folder that count.

    Raises:
        UsageError: as `open_folder`.
    """
    counted = [path / CONFIG, *_weights(path)]
    counted += [file for name in PROCESSORS if (file := path / name).is_file()]
    return sha256("\n".join(f"{file.name} {input_hash(file)}" for file in counted).encode()).hexdigest()


def build(path: Path) -> HuggingFace:
    """The network of a folder with fresh weights.

    Raises:
        UsageError: as `open_folder`; its configuration is not valid.
    """
    folder = open_folder(path)
    return _built(folder, _names(folder), None)[0]


def load(path: Path) -> tuple[HuggingFace, str]:
    """The network of a folder with its weights, and a line on what matched, for people.

    Raises:
        UsageError: as `build`; a file of weights is damaged, a tensor is missing or has another shape.
    """
    folder = open_folder(path)
    tensors: dict[str, Tensor] = {}
    for file in folder.files:
        try:
            with files.in_unicode(file) as place:
                tensors |= load_file(place)
        except (OSError, SafetensorError) as error:
            refuse_machine(file, error)
            raise UsageError(f"{file}: cannot be read ({_one_line(error)}); download it again") from error
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    model, info = _built(folder, list(tensors), tensors)
    name = type(model.inner).__name__
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"{path}: its weights lack {len(missing)} tensors of {name}, such as {missing[0]}; download them again, "
            f"with the {CONFIG} that belongs to them"
        )
    left = sorted(info["unexpected_keys"])
    said = f"{len(left)} others left out ({left[0]}, ...)" if left else "none left out"
    return model, f"{path}: {len(tensors) - len(left)} tensors of {name} of transformers matched, {said}"


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        UsageError: it holds anything else.
    """
    try:
        found = json.loads(files.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        refuse_machine(path, error)
        raise UsageError(f"{path}: not JSON ({_one_line(error)}); download it again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: not a JSON object; download it again")
    return found


PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def _weights(path: Path) -> tuple[Path, ...]:
    if (path / WEIGHTS).is_file():
        return (path / WEIGHTS,)
    if not (path / INDEX).is_file():
        pickles = sorted(file.name for file in path.glob("*.bin"))
        if pickles:
            raise UsageError(
                f"--teacher {path}: only {pickles[0]}, a pickle, and no {WEIGHTS}; download that instead, or give the "
                "pickle itself with --arch timm:NAME, of which only tensors are read"
            )
        raise UsageError(f"--teacher {path}: {CONFIG} without weights; download {WEIGHTS} into the folder too")
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or any(Path(str(it)).name != it for it in index.values()):
        raise UsageError(f"{path / INDEX}: does not say which file of the folder has which tensor; download it again")
    names = sorted(set(index.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise UsageError(
            f"--teacher {path}: {len(missing)} of {len(names)} shards are missing ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); download them into the folder too"
        )
    return tuple(path / name for name in names)


def _pools(family: _Family, settings: Mapping[str, Any]) -> bool:
    return family.model != _SIGLIP.model or bool(settings.get("vision_use_head", True))


def _names(folder: Folder) -> list[str]:
    found: list[str] = []
    for file in folder.files:
        try:
            with files.in_unicode(file) as place, safe_open(place, framework="pt") as handle:
                found += handle.keys()
        except (OSError, SafetensorError) as error:
            refuse_machine(file, error)
            raise UsageError(f"{file}: cannot be read ({_one_line(error)}); download it again") from error
    return found


def _built(folder: Folder, names: list[str], tensors: dict[str, Tensor] | None) -> tuple[HuggingFace, dict[str, Any]]:
    """The network, and what transformers says of the tensors; fresh where there are none."""
    family = _FAMILIES[folder.kind]
    transformers: Any = importlib.import_module("transformers")
    kind: Any = getattr(transformers, family.model)
    # Checkpoints of classifiers come without the layer behind the class token.
    headless = family.model == "ViTModel" and not any(name.startswith((_POOLER, f"vit.{_POOLER}")) for name in names)
    extra = {"add_pooling_layer": False} if headless else {}
    try:
        settings = kind.config_class.from_dict(dict(folder.settings))
        if tensors is None:
            return HuggingFace(kind(settings, **extra), family), {}
        with _quiet(transformers):
            made, info = kind.from_pretrained(
                None, config=settings, state_dict=tensors, dtype=torch.float32, output_loading_info=True, **extra
            )
        return HuggingFace(made, family), info
    except Exception as error:  # transformers and its checks of configurations raise many kinds
        raise UsageError(
            f"{folder.path}: transformers cannot build {family.model} from it ({_one_line(error)[:200]}); download "
            f"{CONFIG} and the weights that belong to it again"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bars and reports."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
