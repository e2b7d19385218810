"""A network as a program of `torch.export` (.pt2): it needs torch and no code of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ktransfer.errors import StageError
from ktransfer.networks import Network

from ..config import ExportConfig
from .classifier import Both, Classifier
from .format import Format, Outputs, inside_rows, square_code
from .onnx_student import INPUT, one_line

FILE = "student.pt2"
SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")
"""Where an operation comes from: folders of this machine."""


def _write(model: Classifier, folder: Path, config: ExportConfig, facts: dict[str, str]) -> None:
    images = torch.zeros(2, 3, *[model.network.size] * 2, dtype=torch.uint8)  # one would be taken for a constant
    both = Both(model)
    try:
        program = torch.export.export(both, (images,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}})
    except Exception as error:  # whatever an operation that it lacks ends in
        raise StageError(
            f"export: {model.network.arch} cannot be written by torch.export ({one_line(error)}); try --format onnx"
        ) from error
    for node in program.graph.nodes:
        for name in SOURCES:
            node.meta.pop(name, None)
    torch.export.save(program, folder / FILE, extra_files={**facts, "embedding": both.tap.layer})


def _read(folder: Path, network: Network) -> Callable[[Tensor], Outputs]:
    found: Any = torch.export.load(folder / FILE).module()
    return lambda images: tuple(found(images))


def _code(network: Network) -> tuple[str, str]:
    return "torch numpy pillow", (
        "import numpy, torch; from PIL import Image, ImageOps\n"
        f"{square_code(network.size)}\n"
        f'logits, embedding = torch.export.load("{FILE}").module()('
        "torch.tensor(numpy.asarray(image)).permute(2, 0, 1)[None])"
    )


FORMAT = Format(
    folder="torch",
    files=(FILE,),
    packages={},
    check=lambda network: None,
    write=_write,
    read=_read,
    wanted=Both,
    rows=lambda model, config: inside_rows(model),
    code=_code,
    names_in="the file, under `classes`",
)
