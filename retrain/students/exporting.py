"""The export stage: the target network in a format that other programs take, and a card that says what it is."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ktransfer import files, networks
from ktransfer.config import Settings, build, chosen_settings, read_by
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.detection import saved
from ktransfer.detection.saved import Described
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network, own_modules
from ktransfer.plan import Plan, PlannedStep, latest
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash, read_record

from ..config import ExportConfig
from . import hugging_face, onnx_file, quantising, state_dicts, torch_program
from .card import Exported, card
from .classifier import Classifier
from .format import Format, difference, need_packages, versions
from .loading import (
    MODEL,
    SELFTRAIN,
    STAGE,
    are_names,
    class_names,
    described,
    is_detector,
    record_of,
    student_detector,
    weights_at,
)
from .onnx_student import load_onnx
from .quantising import Compared

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
    objects: str = ""
    """What finds them, "detector" or "segmenter"; empty of a network that tells classes."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of what is written beside the card, in the folder of the format."""
        return (*FORMATS[self.config.format].files, *((quantising.FILE,) if self.config.int8 else ()))


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
    if plan.objects:
        return _carry_out_objects(plan)
    config, weights, made = plan.config, plan.source, FORMATS[plan.config.format]
    digest, (step_name, settings) = input_hash(weights), _step(config)
    outputs = [str(Path(made.folder) / name) for name in (*plan.files, CARD)]
    inputs = {"weights": digest} | ({"data": plan.images.fingerprint} if plan.images else {})
    with begin(plan.run, EXPORT, step_name, settings, inputs, outputs, plan.overwrite, "cpu") as step:
        folder = step.folder / made.folder
        student = folder / made.files[0]
        if step.done:
            return student
        network = described(weights)
        model = Classifier(network, networks.load(weights, network), class_names(weights, network))
        with tempfile.TemporaryDirectory(prefix=".", dir=step.folder) as work:
            off = _written(made, model, Path(work), config, digest)
            compared = _quantised(plan, model, Path(work)) if config.int8 else None
            names = [name for name in plan.files if (Path(work) / name).is_file()]
            for name in names:
                files.write_bytes(folder / name, (Path(work) / name).read_bytes())
        exported = Exported(
            name=student.name,
            rows=[*made.rows(model, config), *([(quantising.FILE, compared.words())] if compared else [])],
            difference=off,
            weights_hash=digest,
            versions=versions(made.packages),
            code=made.code(network),
            names_in=made.names_in,
        )
        files.write_text(folder / CARD, card(exported, model, weights, config.licence))
        size = student.stat().st_size
        # Not the card, in which the licence is filled in.
        result = {"difference": off, "bytes": size} | ({"int8": compared._asdict()} if compared else {})
        step.finish([folder / name for name in names], result=result)
        say(f"export: done; {network.arch}, {size / 1e6:.1f} MB, differs from torch by {off:.1e}; {student}")
        if compared:
            size = (folder / quantising.FILE).stat().st_size
            say(f"export: {quantising.FILE}, {size / 1e6:.1f} MB: {compared.words()}")
        return student


def _carry_out_objects(plan: ExportPlan) -> Path:
    """The same of a detector or segmenter."""
    from . import detector_file

    config, digest, (step_name, settings) = plan.config, input_hash(plan.source), _step(plan.config, plan.objects)
    name = f"{plan.objects}.onnx"
    outputs = [f"{plan.objects}/{file}" for file in (name, CARD)]
    with begin(plan.run, EXPORT, step_name, settings, {"weights": digest}, outputs, plan.overwrite, "cpu") as step:
        target = step.folder / plan.objects / name
        if step.done:
            return target
        model, made = saved.load(plan.source)
        graph = detector_file.graph_of(model, made)
        content = detector_file.to_onnx(graph, made, config.opset, digest)
        off = detector_file.difference(content, graph, made)
        _refuse_different(name, off, config)
        files.write_bytes(target, content)
        packages = onnx_file.FORMAT.packages
        exported = Exported(
            name=name,
            rows=[],
            difference=off,
            weights_hash=digest,
            versions=versions(packages),
            code=detector_file.code_of(name, made),
            names_in=onnx_file.FORMAT.names_in,
        )
        files.write_text(target.parent / CARD, detector_file.card(exported, model, made, config.opset, config.licence))
        step.finish([target], result={"difference": off, "bytes": len(content)})
        say(
            f"export: done; {made.settings.kind} on {made.network.arch}, {len(content) / 1e6:.1f} MB, differs from "
            f"torch by {off:.1e}; {target}"
        )
        return target


def _refuse_different(name: str, off: float, config: ExportConfig) -> None:
    """StageError where what was written is too far from torch."""
    if off > config.tolerance:
        way = "; try another --opset" if config.format == "onnx" else ""
        raise StageError(
            f"export: {name} does not compute what torch does: it differs by {off:.1e}, --tolerance is "
            f"{config.tolerance:g}; nothing was written{way}"
        )


def _written(made: Format, model: Classifier, work: Path, config: ExportConfig, digest: str) -> float:
    """Write all files, read them with the library that they are for, and compare; how far that is from torch.

    Raises:
        StageError: it is too far.
    """
    made.write(model, work, config, _facts(model, digest))
    network = model.network
    off = difference(made.read(work, network), made.wanted(model), network.size)
    _refuse_different(made.files[0], off, config)
    return off


def _quantised(plan: ExportPlan, model: Classifier, work: Path) -> Compared:
    """Write the whole numbers, and see what they cost."""
    assert plan.images is not None
    config, data = plan.config, plan.images
    images = ImageLoader(data, model.network.size, cache="off")
    calibrating, compared = quantising.split(data, config.calibration, config.held_out)
    original = (work / onnx_file.FILE).read_bytes()
    content = quantising.quantise(original, images, calibrating, load_onnx(work / onnx_file.FILE).facts)
    (work / quantising.FILE).write_bytes(content)
    return quantising.compare(content, original, images, compared, model.names)


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> ExportPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ExportConfig, options, EXPORT)
    made = FORMATS[config.format]
    _refuse_unread(config)
    need_packages(made.packages)
    coming = None if config.model else latest(before, STAGE) or latest(before, SELFTRAIN)
    inputs: dict[str, str] = {}
    size = 0
    if coming is not None and coming.detector is not None:
        return _check_objects(run, config, student_detector(run), coming.detector, inputs)
    if coming is not None:
        assert coming.network is not None
        source = run / STAGE / MODEL
        _check_network(made, coming.network)
    else:
        if config.model is None and not student_detector(run).is_file():
            done_record(run, STAGE, STAGE, STAGE)
        source = weights_at(config.model or run)
        if is_detector(source):
            return _check_objects(run, config, source, saved.describe(source), {"weights": input_hash(source)})
        _check_network(made, described(source))
        inputs, size = {"weights": input_hash(source)}, source.stat().st_size
    images = _images(config, source, coming) if config.int8 else None
    if images is not None:
        inputs["data"] = images.fingerprint
    name, settings = _step(config)
    if not config.overwrite and read_record(run, EXPORT, name) is None:
        _refuse_others(run / EXPORT / made.folder, (*made.files, *((quantising.FILE,) if config.int8 else ()), CARD))
    return ExportPlan(
        stage=EXPORT,
        run=run,
        steps=[PlannedStep(name, settings, inputs, () if config.model else (STAGE,), disk=size)],
        overwrite=config.overwrite,
        images=images,
        config=config,
        source=source,
    )


def _check_network(made: Format, network: Network) -> None:
    made.check(network)
    if own_modules.is_own(network.arch):
        Classifier(network, networks.build(network, 0, "check"), ()).tap()


def _check_objects(
    run: Path, config: ExportConfig, source: Path, made: Described, inputs: dict[str, str]
) -> ExportPlan:
    """The same of a detector or segmenter."""
    from . import detector_file

    objects = detector_file.kind_of(made)
    if config.format != "onnx" or config.int8:
        given = "--int8" if config.int8 else f"--format {config.format}"
        raise UsageError(f"export: {given} is for networks that tell classes, {source} finds objects; leave it out")
    name, settings = _step(config, objects)
    if not config.overwrite and read_record(run, EXPORT, name) is None:
        _refuse_others(run / EXPORT / objects, (f"{objects}.onnx", CARD))
    size = source.stat().st_size if inputs else 0
    reads = () if config.model else (SELFTRAIN,)
    return ExportPlan(
        stage=EXPORT,
        run=run,
        steps=[PlannedStep(name, settings, inputs, reads, disk=size)],
        overwrite=config.overwrite,
        config=config,
        source=source,
        objects=objects,
    )


def _step(config: ExportConfig, objects: str = "") -> tuple[str, Settings]:
    """Its name in stage.json, and the settings that it reads."""
    kind = objects or ("" if config.format == "onnx" else config.format)
    name = f"{EXPORT}-{kind}" if kind else EXPORT
    return name, chosen_settings(config, read_by(config, _parts(config)))


def _parts(config: ExportConfig) -> tuple[str, ...]:
    return (config.format, "int8") if config.int8 else (config.format,)


def _refuse_unread(config: ExportConfig) -> None:
    read = read_by(config, _parts(config))
    for one in fields(config):
        if one.name not in read and getattr(config, one.name) != one.default:
            whose = "--int8" if "int8" in one.metadata["of"] else "--format onnx"
            raise UsageError(f"export: --{one.name.replace('_', '-')} is read by {whose} alone; leave it out")


def _images(config: ExportConfig, source: Path, coming: Plan | None) -> Dataset:
    """Those that calibrate."""
    spec = config.data
    if spec is None:
        record = record_of(source) if coming is None else None
        spec = record["config"]["data"] if record else coming.images.spec if coming and coming.images else None
    if spec is None:
        raise UsageError(f"export --int8: {source} does not say what it was trained on; name images with --data")
    data = open_dataset(spec)
    if len(data) < 2:
        raise UsageError(f"export --int8: {spec} has {len(data)} image; at least 2 are needed")
    return data


def _refuse_others(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (folder / name).exists():
            raise UsageError(
                f"export: {folder / name} was not made by ktransfer; move it away, give --overwrite, or choose another "
                "--run"
            )


def _facts(model: Classifier, digest: str) -> dict[str, str]:
    facts = {"network": json.dumps(asdict(model.network)), "weights": digest}
    named = model.network.task == "classes" or are_names(model.names)
    return facts | ({"classes": json.dumps(model.names)} if named else {})
