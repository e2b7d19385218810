"""A target network to be used: normalisation inside, classes by name, one image or many."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.data import decoding
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.run import done_record, input_hash, read_record

STAGE = "retrain"
MODEL = "model.safetensors"


class Prediction(NamedTuple):
    """What a network says of one image, the most probable class first.

    Attributes:
        labels: names of the classes, or numbers of the clusters.
        probabilities: (top,) float32, by the softmax over all classes.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.float32]


class Classifier(nn.Module):
    """A network with its normalisation inside: (batch, 3, size, size) uint8 RGB -> (batch, classes) float32 logits.

    `names` are those of the classes, or the numbers of the clusters.
    """

    def __init__(self, network: Network, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.model = model
        self.names = names
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Logits of uint8 images."""
        logits: Tensor = self.model(networks.normalise(image, self.network.normalise))
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """(batch, 3, size, size) uint8 -> (batch, classes) float32, on the device of the images."""
        with torch.inference_mode():
            shares: Tensor = self(images).softmax(1)
        return shares

    def predict(self, image: "str | Path | Image.Image | NDArray[np.uint8]", top: int = 1) -> Prediction:
        """The `top` most probable classes of one image, of its centre square at the network's size.

        Args:
            image: a file, an image of Pillow, or (height, width, 3) uint8 RGB.
            top: how many, at least 1; all where the network has fewer.

        Raises:
            BrokenImage: it cannot be read.
            UsageError: it is an array of another shape or type, or `top` is below 1.
        """
        if top < 1:
            raise UsageError(f"top {top}: must be at least 1")
        size = self.network.size
        device = next(self.model.parameters()).device
        square = decoding.square(_pixels(image, size), size).transpose(2, 0, 1)
        found = self.probabilities(torch.tensor(square, device=device)[None])[0]
        best, places = found.topk(min(top, len(found)))
        return Prediction(tuple(self.names[place] for place in places.tolist()), best.cpu().numpy())


def load_model(path: str | Path) -> Classifier:
    """The classifier of a weight file of ours, or of a run's `retrain/`, on the CPU.

    Raises:
        UsageError: missing, not of ktransfer, or a network without classes.
    """
    weights = weights_at(path)
    network = described(weights)
    return Classifier(network, networks.load(weights, network), class_names(weights, network))


def weights_at(path: str | Path) -> Path:
    """The weight file that is meant: itself, or that of the retrain stage of a run.

    Raises:
        UsageError: the run has none, or there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        done_record(path, STAGE, STAGE, STAGE)
        path = path / STAGE / MODEL
    if not path.is_file():
        raise UsageError(f"--model {path}: no such file; give a {MODEL} or a run folder")
    return path


def described(weights: Path) -> Network:
    """What a weight file of ours holds, which tells classes.

    Raises:
        UsageError: not of ktransfer, or a network without classes.
    """
    network = networks.describe(weights)
    if not network.classes:
        raise UsageError(f"{weights}: a {network.arch} ({network.task}) without classes; give one that retrain made")
    return network


def class_names(weights: Path, network: Network) -> tuple[str, ...]:
    """The names that the record beside the weights has for them, else numbers from 0."""
    names = (record_of(weights) or {}).get("classes")
    return tuple(names) if names else tuple(str(number) for number in range(network.classes))


def record_of(weights: Path) -> dict[str, Any] | None:
    """The record of the retrain stage that made a weight file, where it lies beside it; None where none is of it."""
    folder = weights.resolve().parent
    record = read_record(folder.parent, folder.name, STAGE)
    made = (record or {"outputs": {}})["outputs"].get(weights.name)
    return record if made and made["sha256"] == input_hash(weights) else None


def _pixels(image: "str | Path | Image.Image | NDArray[np.uint8]", size: int) -> NDArray[np.uint8]:
    if isinstance(image, str | Path):
        return decoding.decode(Path(image), size)
    if isinstance(image, Image.Image):
        return decoding.upright(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UsageError(
            f"predict: an array of shape {tuple(image.shape)} and type {image.dtype}; give (height, width, 3) uint8 RGB"
        )
    return image
