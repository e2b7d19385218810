"""The export stage: the target network as one ONNX file that other programs run, and a card that says what it is."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ktransfer import files, networks
from ktransfer.config import build
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.plan import Plan, PlannedStep, latest
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash, read_record

from ..config import ExportConfig
from .card import Exported, card
from .classifier import Classifier
from .loading import MODEL, STAGE, class_names, described, weights_at
from .onnx_file import LIMIT, difference, need_packages, to_onnx

EXPORT = "export"
STUDENT = "student.onnx"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class ExportPlan(Plan):
    """What the stage will do; `source` is the file of the weights, which may be still to be made."""

    config: ExportConfig
    source: Path


def export(run: str | Path, **options: Any) -> Path:
    """Write the target network to `run/export`: `student.onnx`, its normalisation inside, and `README.md`, its card.

    Args:
        run: the run folder.
        options: the fields of `ExportConfig`.

    Returns:
        The path of `student.onnx`: `image` (batch, 3, size, size) uint8 RGB -> `logits` (batch, classes) float32.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: ExportPlan) -> Path:
    """Write the network where onnxruntime computes what torch does, and nothing where it does not."""
    config, weights = plan.config, plan.source
    digest = input_hash(weights)
    with begin(plan.run, EXPORT, EXPORT, config, {"weights": digest}, [STUDENT, CARD], plan.overwrite, "cpu") as step:
        student = step.folder / STUDENT
        if step.done:
            return student
        network = described(weights)
        model = Classifier(network, networks.load(weights, network), class_names(weights, network))
        content = to_onnx(model, config.opset, _facts(model, digest))
        off = difference(content, model)
        if off > config.tolerance:
            raise StageError(
                f"export: onnxruntime does not compute what torch does: logits differ by {off:.1e}, --tolerance is "
                f"{config.tolerance:g}; nothing was written; try another --opset"
            )
        files.write_bytes(student, content)
        exported = Exported(STUDENT, config.opset, off, digest, _versions())
        files.write_text(step.folder / CARD, card(exported, model, weights, config.licence))
        # Not the card, in which the licence is filled in.
        step.finish([student], result={"difference": off, "bytes": len(content)})
        say(f"export: done; {network.arch}, {len(content) / 1e6:.1f} MB, differs from torch by {off:.1e}; {student}")
        return student


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> ExportPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ExportConfig, options, EXPORT)
    need_packages()
    coming = None if config.model else latest(before, STAGE)
    inputs: dict[str, str] = {}
    size = 0
    if coming is not None:
        assert coming.network is not None
        source = run / STAGE / MODEL
        _check_size(coming.network, source)
    else:
        if config.model is None:
            done_record(run, STAGE, STAGE, STAGE)
        source = weights_at(config.model or run / STAGE / MODEL)
        _check_size(described(source), source)
        inputs, size = {"weights": input_hash(source)}, source.stat().st_size
    card_there = run / EXPORT / CARD
    if card_there.exists() and read_record(run, EXPORT, EXPORT) is None:
        raise UsageError(f"export: {card_there} was not made by ktransfer; move it away, or choose another --run")
    return ExportPlan(
        stage=EXPORT,
        run=run,
        steps=[PlannedStep(EXPORT, config, inputs, () if config.model else (STAGE,), disk=size)],
        overwrite=config.overwrite,
        config=config,
        source=source,
    )


def _check_size(network: Network, source: Path) -> None:
    state = networks.build(network, 0, "check").state_dict()
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > LIMIT:
        raise UsageError(
            f"export: {network.arch} has {size / 1e9:.1f} GB of weights, and an ONNX file holds {LIMIT / 1e9:.1f} GB; "
            f"use {source} with torchvision"
        )


def _facts(model: Classifier, digest: str) -> dict[str, str]:
    facts = {"network": json.dumps(asdict(model.network)), "weights": digest}
    return facts | ({"classes": json.dumps(model.names)} if model.network.task == "classes" else {})


def _versions() -> str:
    runtime = importlib.import_module("onnxruntime")
    return f"torch {torch.__version__}, onnxruntime {runtime.__version__}"
