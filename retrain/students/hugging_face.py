"""A ResNet as a folder that Hugging Face's `transformers` loads."""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.networks.zoos import TORCHVISION

from ..config import ExportConfig
from .classifier import Classifier
from .format import Format, Outputs, logits_of, normalised, normalising_code, outside_rows, square_code

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CONFIG, WEIGHTS, IMAGES = "config.json", "model.safetensors", "preprocessor_config.json"
STAGES = tuple(f"layer{number}" for number in range(1, 5))


def _check(network: Network) -> None:
    if network.arch.removeprefix(TORCHVISION) not in ARCHS:
        raise UsageError(
            f"export: --format hf takes {', '.join(ARCHS)}, not {network.arch}; onnx and torch take every network"
        )


def _write(model: Classifier, folder: Path, config: ExportConfig, facts: dict[str, str]) -> None:
    transformers: Any = importlib.import_module("transformers")
    own = model.model
    blocks: list[nn.Module] = [list(own.get_submodule(name).children())[-1] for name in STAGES]
    bottleneck = hasattr(blocks[0], "bn3")
    settings = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[block.get_submodule("bn3" if bottleneck else "bn2").num_features for block in blocks],
        depths=[len(list(own.get_submodule(name).children())) for name in STAGES],
        layer_type="bottleneck" if bottleneck else "basic",
        id2label=dict(enumerate(model.names)),
        label2id={name: number for number, name in enumerate(model.names)},
    )
    made = transformers.ResNetForImageClassification(settings)
    made.load_state_dict({_their_name(name): value for name, value in own.state_dict().items()})
    with _quiet(transformers):
        made.save_pretrained(folder)
    if model.network.normalise != "picture":
        (folder / IMAGES).write_text(json.dumps(_processor(model.network), indent=2) + "\n")


def _their_name(name: str) -> str:
    """torchvision's name of a ResNet's weight -> that of transformers."""
    name = re.sub(r"^fc\.", "classifier.1.", name)
    name = re.sub(r"^(conv|bn)1\.", lambda found: f"resnet.embedder.embedder.{_KINDS[found[1]]}.", name)
    return re.sub(r"^layer(\d)\.(\d+)\.(.*)$", _in_stage, name)


_KINDS = {"conv": "convolution", "bn": "normalization"}


def _in_stage(found: re.Match[str]) -> str:
    stage, block, rest = found.groups()
    rest = rest.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
    rest = re.sub(r"^(conv|bn)(\d)", lambda part: f"layer.{int(part[2]) - 1}.{_KINDS[part[1]]}", rest)
    return f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}.{rest}"


def _processor(network: Network) -> dict[str, Any]:
    """How images become input, for `AutoImageProcessor`."""
    mean, deviation = networks.statistics(network.normalise)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": network.size},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": network.size, "width": network.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(deviation),
    }


def _read(folder: Path, network: Network) -> Callable[[Tensor], Outputs]:
    transformers: Any = importlib.import_module("transformers")
    with _quiet(transformers):
        model = transformers.AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    return normalised(network, lambda x: torch.as_tensor(model(x).logits))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bars."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _code(network: Network) -> tuple[str, str]:
    return "transformers torch numpy pillow", (
        "import numpy, torch; from PIL import Image, ImageOps; from transformers import "
        "AutoModelForImageClassification\n"
        'model = AutoModelForImageClassification.from_pretrained(".")\n'
        f"{square_code(network.size)}\n{normalising_code(network)}\nlogits = model(x).logits"
    )


FORMAT = Format(
    folder="hf",
    files=(WEIGHTS, CONFIG, IMAGES),
    packages={"transformers": "export"},
    check=_check,
    write=_write,
    read=_read,
    wanted=logits_of,
    rows=lambda model, config: outside_rows(model.network),
    code=_code,
    names_in="`config.json`",
)
