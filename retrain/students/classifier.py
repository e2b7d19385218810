"""A target network to be used: normalisation inside, classes by name, one image or many."""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.config import nearest
from ktransfer.errors import Reply, UsageError
from ktransfer.images import decoding
from ktransfer.networks import Network, teachers

LIST = "list"


class Prediction(NamedTuple):
    """What a network says of one image, the most probable class first.

    Attributes:
        labels: names of the classes, or numbers of the clusters.
        probabilities: (top,) float32, by the softmax over all classes.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.float32]


class Tap(NamedTuple):
    """Where embeddings are read: a layer, the module whose output it is, and the token of a transformer."""

    layer: str
    path: str
    token: str


class Classifier(nn.Module):
    """A network with its normalisation inside: (batch, 3, size, size) uint8 RGB -> (batch, classes) float32 logits.

    `names` are those of the classes, or the numbers of the clusters.
    """

    def __init__(self, network: Network, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.model = model
        self.names = names
        self.taps: dict[str | None, Tap] = {}
        self.eval()

    def refuse_without_classes(self) -> None:
        """UsageError where the network tells its teacher's features, which are no classes."""
        if self.network.task == "features":
            raise UsageError(
                f"{self.network.arch}: learned its teacher's features (--objective features or relations), not "
                "classes; take its embeddings: embed, or predict --out FILE.npy"
            )

    def forward(self, image: Tensor) -> Tensor:
        """Logits of uint8 images."""
        logits: Tensor = self.model(networks.normalise(image, self.network.normalise))
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """(batch, 3, size, size) uint8 -> (batch, classes) float32, on the device of the images."""
        with torch.inference_mode():
            shares: Tensor = self(images).softmax(1)
        return shares

    def tap(self, layer: str | None = None) -> Tap:
        """Where the embeddings of a layer are read, of the last one where none is named.

        Raises:
            UsageError: there is no such layer.
            Reply: the layer is "list"; it says which there are.
        """
        if layer == LIST:
            raise Reply(teachers.listing(self.network, self.model))
        if layer not in self.taps:
            self.taps[layer] = self._found_tap(layer)
        return self.taps[layer]

    def _found_tap(self, layer: str | None) -> Tap:
        paths = networks.layers(self.network, copy.deepcopy(self.model).cpu())  # which looks for them on the CPU
        if not paths:
            raise UsageError(
                f"{self.network.arch}: none of its modules makes maps, (batch, channels, height, width), so it has "
                "no embeddings, and cannot be exported; predict --out FILE.csv takes it"
            )
        if layer is not None and layer not in paths:
            raise UsageError(f"--layer {layer}: {self.network.arch} has no such layer; {nearest(layer, paths)}")
        layer = layer or list(paths)[-1]
        token = teachers.choose_token(self.model, self.network, None, layer) or "patch"
        return Tap(layer, paths[layer], token)

    def outputs(self, image: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """Logits (batch, classes) and embeddings (batch, d) of uint8 images, in one pass."""
        # An AlexNet is left as soon as all is found, by an exception, through which torch.export cannot trace: so it is
        # hidden in another module.
        hidden = isinstance(self.model, networks.AlexNet)
        whole, below = (nn.Sequential(self.model), "0.") if hidden else (self.model, "")
        wanted = {"embedding": below + tap.path, "logits": below.removesuffix(".")}
        found = networks.feature_maps(whole, wanted, networks.normalise(image, self.network.normalise), tap.token)
        return found["logits"], found["embedding"].mean(dim=(2, 3))

    def embeddings(self, images: Tensor, tap: Tap | None = None) -> Tensor:
        """(batch, 3, size, size) uint8 -> (batch, d) float32: the mean of a layer's maps over their positions, or its
        class token."""
        where = tap or self.tap()
        x = networks.normalise(images, self.network.normalise)
        with torch.inference_mode():
            maps = networks.feature_maps(self.model, {where.layer: where.path}, x, where.token)[where.layer]
            return maps.float().mean(dim=(2, 3))

    def predict(self, image: "str | Path | Image.Image | NDArray[np.uint8]", top: int = 1) -> Prediction:
        """The `top` most probable classes of one image, of its centre square at the network's size.

        Args:
            image: a file, an image of Pillow, or (height, width, 3) uint8 RGB.
            top: how many, at least 1; all where the network has fewer.

        Raises:
            BrokenImage: it cannot be read.
            UsageError: it is an array of another shape or type, `top` is below 1, or the network tells no classes.
        """
        self.refuse_without_classes()
        if top < 1:
            raise UsageError(f"top {top}: must be at least 1")
        found = self.probabilities(self._square(image))[0]
        best, places = found.topk(min(top, len(found)))
        return Prediction(tuple(self.names[place] for place in places.tolist()), best.cpu().numpy())

    def embed(
        self, image: "str | Path | Image.Image | NDArray[np.uint8]", layer: str | None = None
    ) -> NDArray[np.float32]:
        """(d,) float32: what a layer, the last one if none is named, says of the centre square of one image.

        Args:
            image: as for `predict`.
            layer: its name, as `ktransfer predict --layer list` shows it.

        Raises:
            BrokenImage, UsageError: as `predict`; or there is no such layer.
        """
        vector: NDArray[np.float32] = self.embeddings(self._square(image), self.tap(layer))[0].cpu().numpy()
        return vector

    def _square(self, image: "str | Path | Image.Image | NDArray[np.uint8]") -> Tensor:
        """(1, 3, size, size) uint8 on the device of the network."""
        size = self.network.size
        device = next((value.device for value in self.model.parameters()), torch.device("cpu"))
        square = decoding.square(pixels_of(image, size), size).transpose(2, 0, 1)
        return torch.tensor(square, device=device)[None]


class Both(nn.Module):
    """A classifier that gives its logits and its embeddings."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.tap: Tap = model.tap()
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 3, size, size) uint8 -> (batch, classes), (batch, d) float32."""
        return self.model.outputs(image, self.tap)


def pixels_of(
    image: "str | Path | Image.Image | NDArray[np.uint8]", size: int | None, turned: bool = True
) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 of an image of any kind; a large JPEG is decoded smaller where `size` allows that.

    It is upright, or, where not `turned`, as it is stored.

    Raises:
        BrokenImage, UsageError: as `Classifier.predict`.
    """
    if isinstance(image, str | Path):
        return decoding.decode(Path(image), size, turned)
    if isinstance(image, Image.Image):
        return decoding.upright(image, turned)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UsageError(
            f"predict: an array of shape {tuple(image.shape)} and type {image.dtype}; give (height, width, 3) uint8 RGB"
        )
    return image
