"""An ONNX file with whole numbers of 8 bits: onnxruntime's static quantisation, and what it costs."""

import importlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer import rng
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader
from ktransfer.errors import StageError
from ktransfer.progress import bar

from .onnx_file import computing, stripped
from .onnx_student import INPUT, one_line

FILE = "student.int8.onnx"
OPERATORS = ("Conv", "Gemm", "MatMul", "Add", "MaxPool", "Concat")
"""Whose numbers are whole; others, such as those of a normalisation, stay as they are."""
BATCH = 32


class Compared(NamedTuple):
    """Two files on as many `images`.

    Attributes:
        agreement: share of the images to which both give the same class.
        cosine: mean cosine of the angle between their embeddings.
        accuracy: share of right classes, of the whole numbers and of the file that they were made of; None where the
            classes of the images are not those that the network learned.
    """

    images: int
    agreement: float
    cosine: float
    accuracy: tuple[float, float] | None

    def words(self) -> str:
        """For the card and the log."""
        right = "" if self.accuracy is None else f", {self.accuracy[0]:.1%} right (float: {self.accuracy[1]:.1%})"
        return (
            f"same class as float on {self.agreement:.1%} of {self.images:,} images without part in the calibration"
            f"{right}; cosine of the embeddings {self.cosine:.3f}"
        )


def split(data: Dataset, calibration: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Rows that calibrate, and others that are compared, at most so many of each, drawn from all; half of them each
    where there are too few.

    Args:
        data: at least two images.
    """
    order = rng.words(0, "export/int8", 0, torch.arange(len(data)), 1)[:, 0].argsort(stable=True)
    first = min(calibration, len(data) // 2)
    return order[:first], order[first : first + held_out]


def quantise(content: bytes, images: ImageLoader, rows: Tensor, facts: Mapping[str, str]) -> bytes:
    """The same network with weights (by channel) and activations of 8 bits, between QDQ pairs; input and outputs as
    before.

    Weights take 7 of the 8 bits: on processors without VNNI, sums of products of 8 bits would overflow.

    Args:
        content: an ONNX file of ours.
        rows: images that show how large activations become.
        facts: what the file says of itself.

    Raises:
        StageError: onnxruntime cannot do it.
    """
    tool: Any = importlib.import_module("onnxruntime.quantization")
    onnx: Any = importlib.import_module("onnx")
    batches = _batches(images, rows, "calibrate")

    class Images(tool.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            found = next(batches, None)
            return None if found is None else {INPUT: found[1].numpy()}

    with tempfile.TemporaryDirectory() as work, _quiet():
        before, after = Path(work) / "float.onnx", Path(work) / FILE
        before.write_bytes(content)
        try:
            tool.quantize_static(
                before,
                after,
                Images(),
                quant_format=tool.QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                reduce_range=True,
                activation_type=tool.QuantType.QUInt8,
                weight_type=tool.QuantType.QInt8,
            )
        except Exception as error:
            raise StageError(f"export --int8: onnxruntime cannot quantise it ({one_line(error)})") from error
        return stripped(onnx.load(after), facts)


def compare(content: bytes, original: bytes, images: ImageLoader, rows: Tensor, names: tuple[str, ...]) -> Compared:
    """What whole numbers cost on images of `rows`; `names` are those of the classes."""
    data = images.dataset
    wanted = torch.from_numpy(data.targets)
    known = data.classes == names and bool((wanted[rows] >= 0).all())
    run, before = computing(content), computing(original)
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for chosen, pixels in _batches(images, rows, "compare"):
        (logits, vectors), (own, own_vectors) = run(pixels), before(pixels)
        found, old, true = logits.argmax(1), own.argmax(1), wanted[chosen]
        cosine = F.cosine_similarity(vectors, own_vectors)
        sums += torch.stack([(found == old).sum(), cosine.sum(), (found == true).sum(), (old == true).sum()])
        count += len(chosen)
    same, cosine_mean, right, right_before = (sums / max(count, 1)).tolist()
    return Compared(count, same, cosine_mean, (right, right_before) if known else None)


def _batches(images: ImageLoader, rows: Tensor, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and pixels of those that can be read."""
    with bar(len(rows), label) as shown:
        for chosen, pixels, valid, _ in images.batches(iter(rows.split(BATCH))):
            shown.update(len(chosen))
            if bool(valid.any()):
                yield chosen[valid], pixels[valid]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its advice, which the root logger would print, and without the handler that it makes for that."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
