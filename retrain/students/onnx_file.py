"""A network as ONNX bytes, and what onnxruntime makes of them."""

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer.errors import StageError, UsageError

from .classifier import Classifier, Tap
from .onnx_student import EMBEDDING, INPUT, OUTPUT, one_line, session

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LIMIT = 2**31 - 2**20
"""Bytes of weights: protobuf ends at 2 GiB."""
BATCHES = (1, 5)
"""Of random images on which both are compared; other sizes than the one with which the network was traced."""


def need_packages() -> None:
    """Look for the packages without importing them.

    Raises:
        UsageError: one is missing.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"export: {name} is not installed; pip install 'ktransfer[export]'")


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


def to_onnx(model: Classifier, opset: int, facts: Mapping[str, str]) -> bytes:
    """The network as an ONNX file: `image` (batch, 3, size, size) uint8 -> `logits` (batch, classes) float32 and
    `embedding` (batch, d) float32, that of the last layer.

    The same network gives the same bytes.

    Args:
        model: on the CPU.
        opset: version of ONNX's operators.
        facts: what the file says of itself (metadata_props).

    Raises:
        StageError: torch cannot write it.
    """
    size, both = model.network.size, Both(model)
    options: dict[str, Any] = {
        "dynamo": True,
        "dynamic_shapes": {INPUT: {0: torch.export.Dim("batch")}},
        "input_names": [INPUT],
        "output_names": [OUTPUT, EMBEDDING],
        "opset_version": opset,
        "external_data": False,
        "verbose": False,
    }
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # two: a batch of one would be taken for a constant
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # torch 2.11, of its own exporter
            program = torch.onnx.export(both, (images,), **options)
    except Exception as error:  # whatever an operator that ONNX lacks ends in
        raise StageError(
            f"export: {model.network.arch} cannot be written as ONNX ({one_line(error)}); try another --opset"
        ) from error
    assert program is not None
    proto: Any = program.model_proto
    for part in (proto.graph, *proto.functions):
        _strip(part)
    del proto.metadata_props[:]
    onnx: Any = importlib.import_module("onnx")
    onnx.helper.set_model_props(proto, {**facts, EMBEDDING: both.tap.layer})
    written = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if written != opset:
        raise StageError(f"export: torch wrote opset {written}, not {opset}; give --opset {written}")
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def difference(content: bytes, model: Classifier) -> float:
    """How far logits and embeddings of onnxruntime are from torch's on random images: the largest difference, as a
    share of the largest number where that is above 1; infinite where shapes differ or a number is not finite.

    Raises:
        StageError: onnxruntime does not take the file.
    """
    dice = torch.Generator().manual_seed(0)
    both, worst = Both(model), 0.0
    for batch in BATCHES:
        images = torch.randint(0, 256, (batch, 3, *[model.network.size] * 2), generator=dice, dtype=torch.uint8)
        with torch.inference_mode():
            wanted = both(images)
        try:
            found = session(content).run([OUTPUT, EMBEDDING], {INPUT: images.numpy()})
        except Exception as error:  # it has a class of errors for each of its return codes
            raise StageError(f"export: onnxruntime does not take the file ({one_line(error)})") from error
        for own, other in zip(wanted, found, strict=True):
            worst = max(worst, apart(torch.from_numpy(np.asarray(other)), own))
    return worst


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, see `difference`."""
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def _strip(part: Any) -> None:
    """Take out where in the exporter's sources each operator comes from: folders of this machine."""
    del part.metadata_props[:]
    part.ClearField("doc_string")
    for held in (*part.node, *part.value_info):
        del held.metadata_props[:]
        held.ClearField("doc_string")
    for held in (*part.input, *part.output):
        if not isinstance(held, str):  # those of a function are names alone
            del held.metadata_props[:]
    for node in part.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)
