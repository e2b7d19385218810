"""A detector or segmenter as ONNX bytes, how far what onnxruntime makes of them is from torch, and their card."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer.detection import segmentation
from ktransfer.detection.saved import Described
from ktransfer.errors import StageError, UsageError

from .card import Exported, class_list, page
from .detector_graph import RetinaGraph, SegmenterGraph, first_of_equals
from .format import apart, normalisation
from .onnx_detector import ALL, EXTENT, FOUND, THRESHOLD
from .onnx_file import stripped, traced
from .onnx_student import DETECTOR, INPUT, OUTPUT, one_line, session

OTHERS = 0.01
"""Share of the objects that may be others than torch's: two boxes whose overlap is the limit to the last digit may be
taken for one or for two."""
NEAR = 1e-4
"""Of boxes (as a share of the canvas) and scores that are taken for the same."""
SHARES = ((1.0, 1.0), (1.0, 0.7), (0.6, 1.0))
"""Of the canvas that the images of the comparison fill: width and height."""

Graph = RetinaGraph | SegmenterGraph


def kind_of(described: Described) -> str:
    """What is exported: "detector" or "segmenter".

    Raises:
        UsageError: one that cannot be.
    """
    settings = described.settings
    if settings.kind in segmentation.HEADS:
        return "segmenter"
    if settings.kind != "retinanet":
        raise UsageError(
            f"export: a {settings.kind} cannot be exported; RetinaNet (selftrain --detector retinanet) and segmenters "
            "(--task segment) can, and `predict` uses all of them"
        )
    return "detector"


def graph_of(model: nn.Module, described: Described) -> Graph:
    """The module that is traced, in evaluation mode."""
    model.eval()  # before any pixel passes: a batch norm would learn from it
    if kind_of(described) == "segmenter":
        return SegmenterGraph(model)
    return RetinaGraph(model, described.size, described.settings)


def to_onnx(graph: Graph, described: Described, opset: int, weights_hash: str) -> bytes:
    """The file: a segmenter takes any batch, a detector one image, and the lowest score.

    Raises:
        StageError: torch cannot write it.
    """
    size, kind = described.size, described.settings.kind
    facts = {
        DETECTOR: json.dumps(described.as_dict()),
        "weights": weights_hash,
        "classes": json.dumps(described.classes),
    }
    segments = isinstance(graph, SegmenterGraph)
    batch = 2 if segments else 1  # one would be taken for a constant
    inputs = {
        INPUT: torch.zeros(batch, 3, size, size, dtype=torch.uint8),
        EXTENT: torch.full((batch, 2), size, dtype=torch.int64),
    }
    if segments:
        dim = torch.export.Dim("batch")
        return stripped(traced(graph, inputs, {INPUT: {0: dim}, EXTENT: {0: dim}}, (OUTPUT,), opset, kind), facts)
    inputs[THRESHOLD] = torch.tensor(described.settings.threshold)
    return stripped(traced(graph, inputs, None, (*FOUND, *ALL), opset, kind), facts)


def difference(content: bytes, graph: Graph, described: Described) -> float:
    """How far the file's numbers are from torch's on random images, as `format.difference` says it.

    Of a detector these are the boxes and logits of all anchors, of which torch and the file then have to choose the
    same objects: infinite where they do not.

    Raises:
        StageError: onnxruntime does not take or compute it.
    """
    try:
        opened = session(content)
    except Exception as error:  # it has a class of errors for each of its return codes
        raise StageError(f"export: onnxruntime does not take the file ({one_line(error)})") from error

    def run(*inputs: Tensor) -> list[Tensor]:
        names = (INPUT, EXTENT, THRESHOLD)
        try:
            found = opened.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=False)})
        except Exception as error:
            raise StageError(f"export: onnxruntime cannot compute the file ({one_line(error)})") from error
        return [torch.from_numpy(np.asarray(one)) for one in found]

    size, dice = described.size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(SHARES), 3, size, size), generator=dice, dtype=torch.uint8)
    extents = torch.tensor([[max(1, round(size * share)) for share in shares] for shares in SHARES])
    with torch.inference_mode():
        if isinstance(graph, SegmenterGraph):
            batches = zip(images.split((1, len(SHARES) - 1)), extents.split((1, len(SHARES) - 1)), strict=True)
            return max(apart(run(*both)[0], graph(*both)) for both in batches)
        return _of_detector(run, graph, images, extents)


def _of_detector(run: Callable[..., list[Tensor]], graph: RetinaGraph, images: Tensor, extents: Tensor) -> float:
    worst, others, count = 0.0, 0, 0
    for image, extent in zip(images.split(1), extents.split(1), strict=True):
        own = graph.candidates(image, extent)
        # The detector's own threshold, which may leave nothing of random images, and none.
        for threshold in (torch.tensor(graph.settings.threshold), torch.tensor(0.0)):
            *found, boxes, logits = run(image, extent, threshold)
            worst = max(worst, apart(boxes, own[0]), apart(logits, own[1]))
            wanted = graph.chosen(boxes, logits, extent, threshold, first_of_equals)
            others += _without_partner(found, wanted, graph.size) + _without_partner(wanted, found, graph.size)
            count += len(found[1]) + len(wanted[1])
    return worst if others <= OTHERS * count else float("inf")


def _without_partner(some: "list[Tensor] | tuple[Tensor, ...]", others: Any, size: int) -> int:
    """How many of the objects (boxes, scores, labels) are not among others."""
    same = (some[2][:, None] == others[2]) & ((some[1][:, None] - others[1]).abs() <= NEAR)
    same &= ((some[0][:, None] - others[0]).abs() <= NEAR * size).all(2)
    return int((~same.any(1)).sum())


def card(exported: Exported, model: nn.Module, described: Described, opset: int, licence: str | None) -> str:
    """The text of README.md."""
    network, settings, side = described.network, described.settings, described.size
    count = sum(value.numel() for value in model.parameters())
    segments = kind_of(described) == "segmenter"
    batch, whose = ("batch", "from 1, as 0 is the background") if segments else ("1", "from 0")
    resized = f"the long side of the image resized to {side} pixels; what is left over, right or at the bottom, is 0"
    rows = [
        ("network", f"{settings.kind} on {network.arch}, {described.neck}, {count:,} weights"),
        ("input", f"`{INPUT}`: ({batch}, 3, {side}, {side}) uint8, RGB, 0 to 255: {resized}"),
        ("", f"`{EXTENT}`: ({batch}, 2) int64, width and height of what is image there"),
        *([] if segments else [_threshold_row(settings.threshold)]),
        ("normalisation", f"inside the file: {normalisation(network)}"),
        *([_segmenter_row(described)] if segments else _detector_rows(described)),
        ("ONNX", f"opset {opset}"),
        *exported.last_rows(licence),
    ]
    title = f"{exported.name}: {settings.kind} on {network.arch}, {len(described.classes)} classes"
    classes = class_list(described.classes, exported.names_in, f"by their labels {whose}")
    return page(title, rows, classes, exported.code)


def _threshold_row(least: float) -> tuple[str, str]:
    return "", f"`{THRESHOLD}`: () float32, scores above it count; {least:g} is the detector's own"


def _detector_rows(described: Described) -> list[tuple[str, str]]:
    settings, side = described.settings, described.size
    chosen = f"non-maximum suppression at IoU {settings.overlap:g} inside, class by class"
    scale = f"times long side / {side} in those of the image"
    shapes = f"(a, 4) and (a, {len(described.classes)}) float32"
    return [
        ("output", f"`{FOUND[0]}`: (m, 4) float32, x0 y0 x1 y1 in pixels of the canvas; {scale}"),
        ("", f"`{FOUND[1]}`: (m,) float32, the highest first, {settings.most} at most; {chosen}"),
        ("", f"`{FOUND[2]}`: (m,) int64"),
        ("", f"`{ALL[0]}`, `{ALL[1]}`: {shapes}, of all anchors, before any is chosen"),
    ]


def _segmenter_row(described: Described) -> tuple[str, str]:
    side, count = described.size, len(described.classes) + 1
    return "output", f"`{OUTPUT}`: (batch, {count}, {side}, {side}) float32; the class of a pixel is the largest"


def code_of(name: str, described: Described) -> tuple[str, str]:
    """Packages, and the lines of Python that use the file on `image.jpg`."""
    side, segments = described.size, kind_of(described) == "segmenter"
    square = f'ImageOps.contain(Image.open("image.jpg").convert("RGB"), ({side}, {side}), Image.Resampling.BILINEAR)'
    canvas = f"numpy.pad(image, ((0, {side} - image.height), (0, {side} - image.width), (0, 0)))"
    found = f'onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])'
    inputs = '{"image": canvas.transpose(2, 0, 1)[None], "extent": numpy.array([image.size])}'
    if segments:
        last = f"classes = {found}.run(None, {inputs})[0][0].argmax(0)[: image.height, : image.width]"
    else:
        least = f'"{THRESHOLD}": numpy.array({described.settings.threshold:g}, numpy.float32)'
        last = f"boxes, scores, labels, *_ = {found}.run(None, {inputs[:-1]}, {least}}})"
    return "onnxruntime pillow", (
        f"import numpy, onnxruntime; from PIL import Image, ImageOps\nimage = {square}; canvas = {canvas}\n{last}"
    )
