"""A detector or segmenter that was exported as ONNX, to be used as the network itself is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer.data.loader import ImageLoader
from ktransfer.detection import canvas, saved
from ktransfer.detection.data import Detection, Outline
from ktransfer.detection.predictions import Prediction
from ktransfer.detection.saved import Described
from ktransfer.errors import StageError, UsageError
from ktransfer.progress import bar

from .detector import Detector
from .onnx_student import DETECTOR, INPUT, OUTPUT, one_line, opened

EXTENT, THRESHOLD = "extent", "threshold"
FOUND = ("boxes", "scores", "labels")
ALL = ("all_boxes", "all_logits")


class OnnxDetector(Detector):
    """A `Detector` whose numbers onnxruntime computes, on the CPU with as many threads as torch takes."""

    def __init__(self, session: Any, described: Described, path: Path) -> None:
        super().__init__(nn.Identity(), described, torch.device("cpu"))
        self.session = session
        self.path = path

    def see(
        self, source: ImageLoader, data: Detection, batch: int
    ) -> tuple[dict[int, Prediction], dict[int, Sequence[Outline]] | None]:
        """As any detector; one image at once, as the file takes them."""
        if self.segments:
            return super().see(source, data, batch)
        edges, scaled = (part(data, self.described.size) for part in (canvas.extents, canvas.factors))
        found, least = dict[int, Prediction](), {THRESHOLD: np.array(self.described.settings.threshold, np.float32)}
        with bar(len(data), "predict") as shown:
            for chosen, pixels, valid, _ in source.batches(iter(torch.arange(len(data)).split(batch))):
                shown.update(len(chosen))
                kept = chosen[valid]
                for row, image in zip(kept.tolist(), pixels[valid].split(1), strict=True):
                    boxes, scores, labels = self._run(FOUND, image, edges[row][None], least)
                    found[row] = Prediction(boxes / scaled[row], scores, labels)
        return found, None

    def logits(self, pixels: Tensor, sides: Tensor) -> Tensor:
        """Those of a segmenter."""
        return self._run((OUTPUT,), pixels, sides)[0]

    def _run(
        self, names: Sequence[str], pixels: Tensor, sides: Tensor, more: Mapping[str, Any] | None = None
    ) -> list[Tensor]:
        inputs = {INPUT: pixels.numpy(), EXTENT: sides.long().numpy(), **(more or {})}
        try:
            found = self.session.run(list(names), inputs)
        except Exception as error:  # it has a class of errors for each of its return codes
            raise StageError(f"{self.path}: onnxruntime cannot compute it ({one_line(error)})") from error
        return [torch.from_numpy(np.asarray(one)) for one in found]


def load_onnx_detector(path: Path) -> OnnxDetector:
    """That of a file that `export` wrote.

    Raises:
        UsageError: onnxruntime is missing or does not take it, or it was not made by ktransfer.
    """
    session = opened(path)
    try:
        described = saved.described(json.loads(session.get_modelmeta().custom_metadata_map[DETECTOR]))
        wanted = {INPUT, EXTENT}
        if not wanted <= {one.name for one in session.get_inputs()}:
            raise ValueError("other names")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: its metadata describe no detector of ktransfer; export it again") from error
    return OnnxDetector(session, described, path)
