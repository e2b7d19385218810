"""Where a student lies, and what it is: the weight file of a run, one that was copied, or an exported one."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ktransfer import files, networks
from ktransfer.detection import saved
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.run import done_record, input_hash, read_record

from .classifier import Classifier
from .onnx_student import ENDING, finds_objects, load_onnx

if TYPE_CHECKING:
    from .detector import Detector

STAGE = "retrain"
SELFTRAIN = "selftrain"
MODEL = "model.safetensors"


def load_model(path: str | Path) -> "Classifier | Detector":
    """The student of a weight file of ours, of an exported .onnx, or of a run (`retrain/`, else `selftrain/`), on the
    CPU: one that tells classes, or one that finds objects.

    Raises:
        UsageError: missing, not of ktransfer, or a network without classes.
    """
    weights = weights_at(path)
    return load_detector(weights, torch.device("cpu")) if is_detector(weights) else classifier_of(weights)


def is_detector(weights: Path) -> bool:
    """Whether a file says that it holds a detector or segmenter; a weight file that cannot be read does not.

    Raises:
        UsageError: an .onnx that onnxruntime does not take.
    """
    if weights.suffix == ENDING:
        return finds_objects(weights)
    try:
        with files.in_unicode(weights) as place, safe_open(place, framework="pt") as handle:
            return "detector" in (handle.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_detector(weights: Path, device: torch.device) -> "Detector":
    """The detector or segmenter of a weight file of `selftrain`, or of an exported .onnx, which is on the CPU.

    Raises:
        UsageError: its weights do not fit; an .onnx that ktransfer did not write.
    """
    from .detector import Detector
    from .onnx_detector import load_onnx_detector

    if weights.suffix == ENDING:
        return load_onnx_detector(weights)
    model, made = saved.load(weights)
    return Detector(model, made, device)


def classifier_of(weights: Path) -> Classifier:
    """The classifier of a weight file of ours, or of an exported .onnx, on the CPU.

    Raises:
        UsageError: not of ktransfer, or a network without classes.
    """
    if weights.suffix == ENDING:
        return load_onnx(weights)
    network = described(weights)
    return Classifier(network, networks.load(weights, network), class_names(weights, network))


def weights_at(path: str | Path) -> Path:
    """The file that is meant: itself, or that of the retrain stage of a run, of selftrain where it has no other.

    Raises:
        UsageError: the run has none, or there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        detector = student_detector(path)
        if read_record(path, STAGE, STAGE) is None and detector.is_file():
            return detector
        done_record(path, STAGE, STAGE, STAGE)
        path = path / STAGE / MODEL
    if not path.is_file():
        raise UsageError(f"--model {path}: no such file; give a {MODEL} or a run folder")
    return path


def student_detector(run: Path) -> Path:
    """Where `selftrain` writes the student's weights."""
    return run / SELFTRAIN / "student" / MODEL


def described(weights: Path) -> Network:
    """What a weight file of ours holds, which tells classes.

    Raises:
        UsageError: not of ktransfer, or a network without classes.
    """
    network = networks.describe(weights)
    if not network.classes:
        raise UsageError(f"{weights}: a {network.arch} ({network.task}) without classes; give one that retrain made")
    return network


def class_names(weights: Path, network: Network) -> tuple[str, ...]:
    """The names that the file has for them, or, of an older one, the record beside it; else numbers from 0."""
    names = networks.class_names(weights) or (record_of(weights) or {}).get("classes")
    return tuple(names) if names else tuple(str(number) for number in range(network.classes))


def are_names(classes: Sequence[str]) -> bool:
    """Whether someone gave them: they are not the numbers from 0."""
    return list(classes) != [str(number) for number in range(len(classes))]


def record_of(weights: Path) -> dict[str, Any] | None:
    """The record of the retrain stage that made a weight file, where it lies beside it; None where none is of it."""
    folder = weights.resolve().parent
    record = read_record(folder.parent, folder.name, STAGE)
    made = (record or {"outputs": {}})["outputs"].get(weights.name)
    return record if made and made["sha256"] == input_hash(weights) else None
