"""A network as ONNX bytes, and what onnxruntime makes of them."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network

from ..config import ExportConfig
from .classifier import Both, Classifier
from .format import Format, Outputs, inside_rows, square_code
from .onnx_student import EMBEDDING, INPUT, OUTPUT, one_line, session

FILE = "student.onnx"
LIMIT = 2**31 - 2**20
"""Bytes of weights: protobuf ends at 2 GiB."""


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
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # two: a batch of one would be taken for a constant
    dynamic = {INPUT: {0: torch.export.Dim("batch")}}
    proto = traced(both, {INPUT: images}, dynamic, (OUTPUT, EMBEDDING), opset, model.network.arch)
    return stripped(proto, {**facts, EMBEDDING: both.tap.layer})


def traced(
    module: nn.Module,
    inputs: dict[str, Tensor],
    dynamic: dict[str, Any] | None,
    outputs: Sequence[str],
    opset: int,
    words: str,
) -> Any:
    """A module as ONNX's ModelProto.

    Args:
        inputs: name -> an example; `dynamic` its sides that may differ.
        outputs: their names.
        words: what it is, for errors.

    Raises:
        StageError: torch cannot write it.
    """
    options: dict[str, Any] = {
        "dynamo": True,
        "dynamic_shapes": dynamic,
        "input_names": list(inputs),
        "output_names": list(outputs),
        "opset_version": opset,
        "external_data": False,
        "verbose": False,
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # torch 2.11, of its own exporter
            # torchvision, in what it says of the shape of its nms.
            warnings.filterwarnings("ignore", "`create_unbacked_symint`", FutureWarning)
            # Of two inputs with the same batch.
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            program = torch.onnx.export(module, tuple(inputs.values()), **options)
    except Exception as error:  # whatever an operator that ONNX lacks ends in
        raise StageError(
            f"export: {words} cannot be written as ONNX ({one_line(error)}); try another --opset"
        ) from error
    assert program is not None
    proto: Any = program.model_proto
    written = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if written != opset:
        raise StageError(f"export: torch wrote opset {written}, not {opset}; give --opset {written}")
    return proto


def stripped(proto: Any, facts: Mapping[str, str]) -> bytes:
    """The bytes of a model that says `facts` of itself, and not in which folders it was made."""
    onnx: Any = importlib.import_module("onnx")
    for part in (proto.graph, *proto.functions):
        _strip(part)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(facts))
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def computing(content: bytes) -> Callable[[Tensor], Outputs]:
    """(batch, 3, size, size) uint8 -> logits and embeddings of onnxruntime.

    Raises:
        StageError: onnxruntime does not take the file; when called, it cannot compute it.
    """
    try:
        opened = session(content)
    except Exception as error:  # it has a class of errors for each of its return codes
        raise StageError(f"export: onnxruntime does not take the file ({one_line(error)})") from error

    def compute(images: Tensor) -> Outputs:
        try:
            found = opened.run([OUTPUT, EMBEDDING], {INPUT: images.numpy()})
        except Exception as error:
            raise StageError(f"export: onnxruntime cannot compute the file ({one_line(error)})") from error
        return tuple(torch.from_numpy(np.asarray(one)) for one in found)

    return compute


def _check(network: Network) -> None:
    state = networks.build(network, 0, "check").state_dict()
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > LIMIT:
        raise UsageError(
            f"export: {network.arch} has {size / 1e9:.1f} GB of weights, and an ONNX file holds {LIMIT / 1e9:.1f} GB; "
            "give --format torch"
        )


def _write(model: Classifier, folder: Path, config: ExportConfig, facts: dict[str, str]) -> None:
    (folder / FILE).write_bytes(to_onnx(model, config.opset, facts))


def _rows(model: Classifier, config: ExportConfig) -> list[tuple[str, str]]:
    return [*inside_rows(model), ("ONNX", f"opset {config.opset}")]


def _code(network: Network) -> tuple[str, str]:
    return "onnxruntime pillow", (
        "import numpy, onnxruntime; from PIL import Image, ImageOps\n"
        f"{square_code(network.size)}\n"
        f'logits = onnxruntime.InferenceSession("{FILE}", providers=["CPUExecutionProvider"])'
        '.run(None, {"image": numpy.asarray(image).transpose(2, 0, 1)[None]})[0]'
    )


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


FORMAT = Format(
    folder="",
    files=(FILE,),
    packages=dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    check=_check,
    write=_write,
    read=lambda folder, network: computing((folder / FILE).read_bytes()),
    wanted=Both,
    rows=_rows,
    code=_code,
    names_in="the file's metadata, under `classes`",
)
