"""What each format of `ktransfer export` is, and how far what another library computes is from the network."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network

from ..config import ExportConfig
from .classifier import Classifier

Outputs = tuple[Tensor, ...]
BATCHES = (1, 5)
"""Of random images on which both are compared; other sizes than the one with which the network was traced."""


class Format(NamedTuple):
    """One of them.

    Attributes:
        folder: below `export/`, "" for itself.
        files: names of those that it writes, the one that is meant first.
        packages: what must be installed, with the extra that brings it.
        check: whether it takes a network; UsageError where not.
        write: the files of (classifier, folder, settings, facts).
        read: (folder, network) -> what the library that the format is for computes of (batch, 3, size, size) uint8.
        wanted: the same of the classifier itself.
        rows: lines of the card, (name, text) of (classifier, settings).
        code: (packages, lines of Python) that use the files on `image.jpg` and end with `logits`.
        names_in: where the names of the classes are, "" where they are not.
    """

    folder: str
    files: tuple[str, ...]
    packages: dict[str, str]
    check: Callable[[Network], None]
    write: Callable[[Classifier, Path, ExportConfig, dict[str, str]], None]
    read: Callable[[Path, Network], Callable[[Tensor], Outputs]]
    wanted: Callable[[Classifier], Callable[[Tensor], Outputs]]
    rows: Callable[[Classifier, ExportConfig], list[tuple[str, str]]]
    code: Callable[[Network], tuple[str, str]]
    names_in: str


def need_packages(packages: dict[str, str]) -> None:
    """Look for packages without importing them.

    Raises:
        UsageError: one is missing.
    """
    for name, extra in packages.items():
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"export: {name} is not installed; pip install 'ktransfer[{extra}]'")


def versions(packages: dict[str, str]) -> str:
    """Those of torch and of some packages."""
    named = [f"{name} {importlib.metadata.version(name)}" for name in packages if name not in ("onnx", "onnxscript")]
    return ", ".join([f"torch {torch.__version__}", *named])


def logits_of(model: Classifier) -> Callable[[Tensor], Outputs]:
    """What a format without embeddings is compared with."""
    return lambda images: (model(images),)


def normalised(network: Network, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Outputs]:
    """A network that takes normalised images, on uint8 ones."""
    return lambda images: (model(networks.normalise(images, network.normalise)),)


def difference(found: Callable[[Tensor], Outputs], wanted: Callable[[Tensor], Outputs], size: int) -> float:
    """How far the outputs of two are apart on random images of `size` pixels: the largest difference, as a share of the
    largest number where that is above 1; infinite where shapes differ or a number is not finite."""
    dice = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in BATCHES:
        images = torch.randint(0, 256, (batch, 3, size, size), generator=dice, dtype=torch.uint8)
        with torch.inference_mode():
            for other, own in zip(found(images), wanted(images), strict=True):
                worst = max(worst, apart(other, own))
    return worst


def apart(found: Tensor, wanted: Tensor) -> float:
    """The same of one output."""
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def inside_rows(model: Classifier) -> list[tuple[str, str]]:
    """Lines of the card where normalisation is inside, and embeddings come out too."""
    network, tap = model.network, model.tap()
    side = network.size
    numbers = model.embeddings(torch.zeros(1, 3, side, side, dtype=torch.uint8), tap).shape[1]
    of = {"cls": "its class token", "mean": "the mean of its patches"}.get(
        tap.token, "its maps averaged over positions"
    )
    return [
        ("input", f"`image`: (batch, 3, {side}, {side}) uint8, RGB, 0 to 255; batch of any size"),
        ("normalisation", f"inside the file: {normalisation(network)}"),
        ("output", f"`logits`: (batch, {network.classes}) float32; their softmax is the probability"),
        ("", f"`embedding`: (batch, {numbers}) float32, of layer {tap.layer}: {of}"),
    ]


def outside_rows(network: Network) -> list[tuple[str, str]]:
    """Lines of the card where images are to be normalised before."""
    side = network.size
    return [
        ("input", f"(batch, 3, {side}, {side}) float32, RGB, normalised; batch of any size"),
        ("normalisation", f"not inside: {normalisation(network)}"),
        ("output", f"logits, (batch, {network.classes}) float32; their softmax is the probability"),
    ]


def normalisation(network: Network) -> str:
    """In words."""
    if network.normalise == "picture":
        return "each image by its own mean and deviation"
    mean, deviation = networks.statistics(network.normalise)
    return f"mean {', '.join(map(str, mean))} and deviation {', '.join(map(str, deviation))} of values in 0 to 1"


def square_code(size: int) -> str:
    """A line of Python: `image`, the centre square of `image.jpg`."""
    return f'image = ImageOps.fit(Image.open("image.jpg").convert("RGB"), ({size}, {size}), Image.Resampling.BILINEAR)'


def normalising_code(network: Network) -> str:
    """A line of Python: `x`, (1, 3, size, size) float32 of `image`."""
    pixels = "torch.tensor(numpy.asarray(image)).permute(2, 0, 1)[None]"
    if network.normalise == "picture":
        return f"x = {pixels}.float(); x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()"
    mean, deviation = (
        f"torch.tensor({list(values)}).view(3, 1, 1)" for values in networks.statistics(network.normalise)
    )
    return f"x = ({pixels} / 255 - {mean}) / {deviation}"
