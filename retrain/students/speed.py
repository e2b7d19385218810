"""What `ktransfer bench predict` measures: the student itself, and its exports."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ktransfer import networks
from ktransfer.bench.measure import Wanted
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.run import input_hash

from ..config import ExportConfig, RetrainConfig
from . import onnx_file, quantising
from .classifier import Classifier
from .exporting import EXPORT
from .format import need_packages
from .loading import classifier_of, weights_at
from .onnx_student import OnnxStudent, load_onnx

CLASSES = 1000
SIZE = 224


class Ways(NamedTuple):
    """Of computing the same network: `ways` are name -> what is done with (batch, 3, size, size) uint8 on the CPU."""

    network: Network
    ways: dict[str, Callable[[Tensor], Tensor]]


def work(model: str | None, wanted: Wanted) -> Ways:
    """The network of a run or file, or one with fresh weights: by torch, by onnxruntime, and in whole numbers where the
    run's export has these. Exports of other weights are left out; a run without one is exported in memory.

    Raises:
        UsageError: there is no such student, or onnxruntime is missing.
    """
    need_packages(onnx_file.FORMAT.packages)
    if model is None:
        networks.check_arch(wanted.arch or RetrainConfig.arch, wanted.width, own=True)
        network = Network(
            wanted.arch or RetrainConfig.arch, wanted.width, RetrainConfig.stride, wanted.size or SIZE, CLASSES
        )
        student = Classifier(network, networks.build(network, 0, "bench"), tuple(map(str, range(CLASSES))))
    elif wanted.arch or wanted.size:
        raise UsageError("bench predict: --model says what the network is; leave --arch and --size out")
    else:
        student = classifier_of(weights_at(model))
    if isinstance(student, OnnxStudent):
        return Ways(student.network, {"onnx": student})
    ways = {"torch": _on(student.to(wanted.device), wanted.device), **_exported(model)}
    if "onnx" not in ways:
        compute = onnx_file.computing(onnx_file.to_onnx(student.to("cpu"), ExportConfig.opset, {}))
        student.to(wanted.device)
        ways["onnx"] = lambda images: compute(images)[0]
    order = ("torch", "onnx", "int8")
    return Ways(student.network, {name: ways[name] for name in order if name in ways})


def _on(student: Classifier, device: torch.device) -> Callable[[Tensor], Tensor]:
    def compute(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = student(images.to(device))
            return logits.cpu()

    return compute


def _exported(model: str | None) -> dict[str, Callable[[Tensor], Tensor]]:
    if model is None:
        return {}
    weights = weights_at(model)
    folder, digest = weights.resolve().parent.parent / EXPORT, input_hash(weights)
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, file in (("onnx", onnx_file.FILE), ("int8", quantising.FILE)):
        if (folder / file).is_file():
            other = load_onnx(folder / file)
            if other.facts.get("weights") == digest:
                found[name] = other
    return found
