"""A network's weights under the names of torchvision's class, or of timm's."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ktransfer import files, networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.networks.zoos import TIMM, TORCHVISION, of_torchvision, torchvision_names

from ..config import ExportConfig
from .classifier import Classifier
from .format import Format, Outputs, logits_of, normalised, normalising_code, outside_rows, square_code

FILE = "student.safetensors"
OTHERS = "onnx and torch take every network"


def _write(model: Classifier, folder: Path, config: ExportConfig, facts: dict[str, str]) -> None:
    names = model.names if model.network.task == "classes" else ()
    networks.save(folder / FILE, model.model.state_dict(), model.network, names)


def _check_torchvision(network: Network) -> None:
    """Our AlexNet is another one than torchvision's of that name."""
    name = network.arch.removeprefix(TORCHVISION)
    if network.arch in networks.TRUNKS[:2] or name not in torchvision_names():
        raise UsageError(f"export: {network.arch} is no network of torchvision; give another --format: {OTHERS}")


def _read_torchvision(folder: Path, network: Network) -> Callable[[Tensor], Outputs]:
    model = of_torchvision(network.arch, network.classes, network.size)
    with files.in_unicode(folder / FILE) as place:
        model.load_state_dict(load_file(place))
    return normalised(network, model.eval())


def _code_torchvision(network: Network) -> tuple[str, str]:
    name = network.arch.removeprefix(TORCHVISION)
    more = f", image_size={network.size}" if name.startswith("vit_") else ""
    more += ", aux_logits=False, init_weights=True" if name in ("googlenet", "inception_v3") else ""
    return "torchvision safetensors numpy pillow", (
        "import numpy, torch, torchvision; from PIL import Image, ImageOps; from safetensors.torch import load_file\n"
        f'model = torchvision.models.get_model("{name}", weights=None, num_classes={network.classes}{more}).eval()\n'
        f'model.load_state_dict(load_file("{FILE}"))\n'
        f"{square_code(network.size)}\n{normalising_code(network)}\nlogits = model(x)"
    )


def _of_timm(network: Network, file: Path | None = None) -> nn.Module:
    """timm's network of that name, with the weights of a file.

    Raises:
        RuntimeError, ValueError: it has none of that name, or another one.
    """
    timm: Any = importlib.import_module("timm")
    name = _timm_name(network)
    if not timm.is_model(name):
        raise ValueError(f"timm has no {name}")
    more = {"img_size": network.size} if name.startswith("vit_") else {}
    made = timm.create_model(name, pretrained=False, num_classes=network.classes, **more)
    assert isinstance(made, nn.Module)
    if file is not None:
        with files.in_unicode(file) as place:
            made.load_state_dict(load_file(place))
    return made.eval()


def _timm_name(network: Network) -> str:
    return network.arch.removeprefix(TIMM).removeprefix(TORCHVISION)


def _check_timm(network: Network) -> None:
    """torchvision's networks pass where timm has the same: the same names of weights, the same numbers from them."""
    own = networks.build(network, 0, "check").eval()
    images = torch.randn(1, 3, network.size, network.size, generator=torch.Generator().manual_seed(0))
    try:
        if network.arch in networks.TRUNKS[:2]:
            raise ValueError("it is the paper's")
        other = _of_timm(network)
        other.load_state_dict(own.state_dict())
        with torch.inference_mode():
            same = torch.allclose(other(images), own(images), atol=1e-4)
    except (RuntimeError, ValueError):
        same = False
    if not same:
        raise UsageError(
            f"export: {network.arch} is not as timm has it (ResNets, ResNeXts and DenseNets are); give another "
            f"--format: {OTHERS}"
        )


def _read_timm(folder: Path, network: Network) -> Callable[[Tensor], Outputs]:
    return normalised(network, _of_timm(network, folder / FILE))


def _code_timm(network: Network) -> tuple[str, str]:
    name, classes = _timm_name(network), network.classes
    more = f", img_size={network.size}" if name.startswith("vit_") else ""
    return "timm numpy pillow", (
        "import numpy, timm, torch; from PIL import Image, ImageOps\n"
        f'model = timm.create_model("{name}", num_classes={classes}{more}, checkpoint_path="{FILE}").eval()\n'
        f"{square_code(network.size)}\n{normalising_code(network)}\nlogits = model(x)"
    )


_STATE_DICT = partial(
    Format,
    files=(FILE,),
    write=_write,
    wanted=logits_of,
    rows=lambda model, config: outside_rows(model.network),
    names_in="the file's metadata, under `network`",
)
TORCHVISION_FORMAT = _STATE_DICT(
    folder="torchvision",
    packages={"torchvision": ""},
    check=_check_torchvision,
    read=_read_torchvision,
    code=_code_torchvision,
)
TIMM_FORMAT = _STATE_DICT(
    folder="timm", packages={"timm": "teachers"}, check=_check_timm, read=_read_timm, code=_code_timm
)
