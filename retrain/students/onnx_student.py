"""A student that was exported as ONNX, to be used as the network itself is."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.networks.network import stated

from .classifier import LIST, Classifier, Tap

ENDING = ".onnx"
INPUT = "image"
OUTPUT = "logits"
EMBEDDING = "embedding"
DETECTOR = "detector"
"""Of the metadata, as of a weight file: what a detector or segmenter is."""


class OnnxStudent(Classifier):
    """A `Classifier` whose numbers onnxruntime computes, on the CPU with as many threads as torch takes."""

    def __init__(self, network: Network, session: Any, names: tuple[str, ...], path: Path) -> None:
        super().__init__(network, nn.Identity(), names)
        self.session = session
        self.path = path

    @property
    def facts(self) -> dict[str, str]:
        """What the file says of itself."""
        found: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        return found

    def forward(self, image: Tensor) -> Tensor:
        """Logits of uint8 images."""
        return self._run(OUTPUT, image)

    def tap(self, layer: str | None = None) -> Tap:
        """The one that the file has.

        Raises:
            UsageError: another one is asked for, or the file has none.
        """
        if EMBEDDING not in {one.name for one in self.session.get_outputs()}:
            raise UsageError(f"{self.path}: has no output `{EMBEDDING}`; export it again, or give the run")
        held = self.facts.get(EMBEDDING, "")
        if layer not in (None, LIST, held):
            raise UsageError(f"--layer {layer}: {self.path} gives {held} alone; give the run or its model.safetensors")
        return Tap(held, EMBEDDING, "")

    def embeddings(self, images: Tensor, tap: Tap | None = None) -> Tensor:
        """(batch, 3, size, size) uint8 -> (batch, d) float32."""
        return self._run((tap or self.tap()).path, images)

    def _run(self, output: str, images: Tensor) -> Tensor:
        try:
            (found,) = self.session.run([output], {INPUT: images.cpu().numpy()})
        except Exception as error:  # it has a class of errors for each of its return codes
            raise StageError(f"{self.path}: onnxruntime cannot compute it ({one_line(error)})") from error
        return torch.from_numpy(np.asarray(found))


def load_onnx(path: Path) -> OnnxStudent:
    """The student of a file that `export` wrote.

    Raises:
        UsageError: onnxruntime is missing or does not take the file, or it was not made by ktransfer.
    """
    found = opened(path)
    facts = found.get_modelmeta().custom_metadata_map
    if DETECTOR in facts:
        raise UsageError(f"{path}: finds objects and tells no classes of images; give a student.onnx, or a run")
    try:
        network = stated(json.loads(facts["network"]))
        names = json.loads(facts["classes"]) if "classes" in facts else range(network.classes)
        if found.get_inputs()[0].name != INPUT or found.get_outputs()[0].name != OUTPUT:
            raise ValueError("other names")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: was not exported by ktransfer, so that its input and classes are not known; give one that "
            "`ktransfer export` wrote"
        ) from error
    return OnnxStudent(network, found, tuple(map(str, names)), path)


def finds_objects(path: Path) -> bool:
    """Whether an .onnx says that it holds a detector or segmenter.

    Raises:
        UsageError: onnxruntime is missing or does not take it.
    """
    return DETECTOR in opened(path).get_modelmeta().custom_metadata_map


def opened(path: Path) -> Any:
    """An inference session of a file.

    Raises:
        UsageError: onnxruntime is missing or does not take the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(f"{path}: onnxruntime is not installed; pip install 'ktransfer[export]'")
    try:
        return session(path.read_bytes())
    except Exception as error:
        raise UsageError(f"{path}: onnxruntime does not take it ({one_line(error)}); export it again") from error


def session(content: bytes) -> Any:
    """An inference session of onnxruntime on the CPU."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: they are raised, too
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def one_line(error: BaseException) -> str:
    """What an error says, short."""
    return " ".join(str(error).split())[:200]
