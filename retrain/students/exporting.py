"""The export stage: the target network in a format that other programs take, and a card that says what it is."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ktransfer import files, networks
from ktransfer.config import Settings, build, settings_of
from ktransfer.errors import StageError, UsageError
from ktransfer.plan import Plan, PlannedStep, latest
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash, read_record

from ..config import ExportConfig
from . import hugging_face, onnx_file, state_dicts, torch_program
from .card import Exported, card
from .classifier import Classifier
from .format import Format, difference, need_packages, versions
from .loading import MODEL, STAGE, class_names, described, weights_at

EXPORT = "export"
CARD = "README.md"
FORMATS = {
    "onnx": onnx_file.FORMAT,
    "torch": torch_program.FORMAT,
    "torchvision": state_dicts.TORCHVISION_FORMAT,
    "timm": state_dicts.TIMM_FORMAT,
    "hf": hugging_face.FORMAT,
}


@dataclass(frozen=True, kw_only=True)
class ExportPlan(Plan):
    """What the stage will do; `source` is the file of the weights, which may be still to be made."""

    config: ExportConfig
    source: Path


def export(run: str | Path, **options: Any) -> Path:
    """Write the target network below `run/export`, in a format that another library takes, and its card, `README.md`.

    Args:
        run: the run folder.
        options: the fields of `ExportConfig`.

    Returns:
        The path of the file that is meant, such as `student.onnx`, in which normalisation is inside: `image` (batch, 3,
        size, size) uint8 RGB -> `logits` (batch, classes), `embedding` (batch, d) float32.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: ExportPlan) -> Path:
    """Write the network where the other library computes what torch does, and nothing where it does not."""
    config, weights, made = plan.config, plan.source, FORMATS[plan.config.format]
    digest, (step_name, settings) = input_hash(weights), _step(config)
    outputs = [str(Path(made.folder) / name) for name in (*made.files, CARD)]
    with begin(plan.run, EXPORT, step_name, settings, {"weights": digest}, outputs, plan.overwrite, "cpu") as step:
        folder = step.folder / made.folder
        student = folder / made.files[0]
        if step.done:
            return student
        network = described(weights)
        model = Classifier(network, networks.load(weights, network), class_names(weights, network))
        with tempfile.TemporaryDirectory(prefix=".", dir=step.folder) as work:
            off = _written(made, model, Path(work), config, digest)
            names = [name for name in made.files if (Path(work) / name).is_file()]
            for name in names:
                files.write_bytes(folder / name, (Path(work) / name).read_bytes())
        exported = Exported(
            name=student.name,
            rows=made.rows(network, config),
            difference=off,
            weights_hash=digest,
            versions=versions(made.packages),
            code=made.code(network),
            names_in=made.names_in,
        )
        files.write_text(folder / CARD, card(exported, model, weights, config.licence))
        size = student.stat().st_size
        # Not the card, in which the licence is filled in.
        step.finish([folder / name for name in names], result={"difference": off, "bytes": size})
        say(f"export: done; {network.arch}, {size / 1e6:.1f} MB, differs from torch by {off:.1e}; {student}")
        return student


def _written(made: Format, model: Classifier, work: Path, config: ExportConfig, digest: str) -> float:
    """Write all files, read them with the library that they are for, and compare; how far that is from torch.

    Raises:
        StageError: it is too far.
    """
    made.write(model, work, config, _facts(model, digest))
    network = model.network
    off = difference(made.read(work, network), made.wanted(model), network.size)
    if off > config.tolerance:
        way = "; try another --opset" if config.format == "onnx" else ""
        raise StageError(
            f"export: {made.files[0]} does not compute what torch does: it differs by {off:.1e}, --tolerance is "
            f"{config.tolerance:g}; nothing was written{way}"
        )
    return off


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> ExportPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ExportConfig, options, EXPORT)
    made = FORMATS[config.format]
    if config.format != "onnx" and config.opset != ExportConfig.opset:
        raise UsageError(f"export: --opset {config.opset}: --format {config.format} has none; leave it out")
    need_packages(made.packages)
    coming = None if config.model else latest(before, STAGE)
    inputs: dict[str, str] = {}
    size = 0
    if coming is not None:
        assert coming.network is not None
        source = run / STAGE / MODEL
        made.check(coming.network)
    else:
        if config.model is None:
            done_record(run, STAGE, STAGE, STAGE)
        source = weights_at(config.model or run / STAGE / MODEL)
        made.check(described(source))
        inputs, size = {"weights": input_hash(source)}, source.stat().st_size
    name, settings = _step(config)
    if not config.overwrite and read_record(run, EXPORT, name) is None:
        _refuse_others(run / EXPORT / made.folder, (*made.files, CARD))
    return ExportPlan(
        stage=EXPORT,
        run=run,
        steps=[PlannedStep(name, settings, inputs, () if config.model else (STAGE,), disk=size)],
        overwrite=config.overwrite,
        config=config,
        source=source,
    )


def _step(config: ExportConfig) -> tuple[str, Settings]:
    """Its name in stage.json, and the settings that it reads."""
    name = EXPORT if config.format == "onnx" else f"{EXPORT}-{config.format}"
    return name, settings_of(config, config.format)


def _refuse_others(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (folder / name).exists():
            raise UsageError(
                f"export: {folder / name} was not made by ktransfer; move it away, give --overwrite, or choose another "
                "--run"
            )


def _facts(model: Classifier, digest: str) -> dict[str, str]:
    facts = {"network": json.dumps(asdict(model.network)), "weights": digest}
    return facts | ({"classes": json.dumps(model.names)} if model.network.task == "classes" else {})
