"""The extract stage: features of every image, one pass, constant memory, resumable by rows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktransfer import distributed, networks
from ktransfer.artifacts.features import create_or_resume
from ktransfer.config import build
from ktransfer.data.dataset import Dataset, check_broken
from ktransfer.data.enough import need
from ktransfer.data.loader import ImageLoader, reasons
from ktransfer.data.opening import open_dataset
from ktransfer.data.ordered import ordered_map
from ktransfer.errors import Reply, StageError, UsageError
from ktransfer.networks import teachers
from ktransfer.networks.made import network_of
from ktransfer.networks.published import POOLED
from ktransfer.networks.teachers import Teacher
from ktransfer.plan import Plan, PlannedStep
from ktransfer.progress import bar, say
from ktransfer.run import begin, need_disk, read_record
from ktransfer.training.device import choose_device
from ktransfer.training.reading import data_facts, same_data

from .config import ExtractConfig

DEFAULT_LAYERS = {"alexnet": "conv4", "alexnet_bn": "conv4", "vgg16": "conv4_1", "vgg16_bn": "conv4_1"}
LIST = "list"


@dataclass(frozen=True, kw_only=True)
class ExtractPlan(Plan):
    """What the stage will do: `config` with data, layer, token and size resolved; `file` is what it will write."""

    config: ExtractConfig
    images: Dataset
    teacher: Teacher
    dim: int
    file: Path
    device: torch.device


def extract(run: str | Path, **options: Any) -> Path:
    """Write the features of every image of a data set to `run/features/NAME.h5` (docs/architecture.md).

    Args:
        run: the run folder.
        options: the fields of `ExtractConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: ExtractPlan) -> Path:
    """Read the images in batches, and write the teacher's features row by row."""
    run, config, data, teacher, device = plan.run, plan.config, plan.images, plan.teacher, plan.device
    network, dim, file, name = teacher.network, plan.dim, plan.file, plan.file.stem
    inputs = {"data": data.fingerprint, "teacher": teachers.identity(teacher)}
    outputs = [f"{name}.h5", f"{name}.h5.part", f"{name}.h5.progress"]
    with begin(run, "features", name, config, inputs, outputs, plan.overwrite, str(device)) as step:
        if step.done:
            return file
        compute = _reader(teacher, config, device)
        attributes = {
            "teacher": inputs["teacher"],
            "layer": str(config.layer),
            "pooling": _pooling(teacher, config),
            "transform": f"short side {config.size}, centre square, normalised by {network.normalise}",
            "fingerprint": data.fingerprint,
        }
        images = ImageLoader(data, config.size, config.workers, cache="off", device=device)
        writer = create_or_resume(file, data.keys, data.targets, dim, config.dtype, attributes)
        first = writer.rows_done
        if distributed.world_size() > 1:
            order = {"do": "extract", "run": str(run.resolve()), "teacher": inputs["teacher"], "first": first}
            distributed.send_order(order | {"config": asdict(config), "dim": dim} | data_facts(data))
            distributed.agree(None)
        with bar(len(data), f"extract {config.layer}", done=first) as shown:

            def take(start: int, features: np.ndarray, valid: np.ndarray) -> None:
                writer.write(start, features, valid)
                shown.update(len(valid))

            ordered_map(images, first, config.batch, compute, dim, take)
        found = reasons(data, writer.valid(), config.size)
        check_broken(found, len(data), config.max_broken, data)
        writer.finish()
        broken = [f"{data.keys[row]}: {reason}" for row, reason in found.items()]
        step.finish([file], broken=broken, result={"rows": len(data), "dim": dim})
        source = f"{config.layer} of {network.arch}"
        say(f"extract: done; {len(data)} x {dim} from {source}; {len(broken)} broken images; {file}")
        return file


def extract_share(order: dict[str, Any]) -> None:
    """What the other processes do for the leader's extraction (ktransfer/distributed.py)."""
    with distributed.opening():
        config = ExtractConfig(**order["config"])
        data = same_data(order)
        teacher = _teacher(Path(order["run"]), config)
        if teachers.identity(teacher) != order["teacher"]:
            raise StageError(
                f"{teacher.weights}: differs from the file that the first process reads; copy that one here"
            )
        device = choose_device(config)
        compute = _reader(teacher, config, device)
        images = ImageLoader(data, config.size, config.workers, cache="off", device=device)
    ordered_map(images, order["first"], config.batch, compute, order["dim"], None)


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = (), data: Dataset | None = None) -> ExtractPlan:
    """Everything that can be found wrong before the work.

    Args:
        data: the images, where they are open already.

    Raises:
        UsageError: one line for what is wrong.
        Reply: `--layer list` was given; it says which layers there are.
    """
    config = build(ExtractConfig, options, "extract")
    if config.layer == LIST:
        network = _teacher(run, config, before).network
        with networks.fitting(network):
            model = networks.build(network, 0, "layers").eval()
        raise Reply(teachers.listing(network, model))
    made = read_record(run, "pretext", "pretext")
    spec = config.data or (made and made["config"]["data"])
    if not spec:
        raise UsageError("extract: no images were given, and the run has none; name them with --data")
    data = data or open_dataset(spec)
    if config.name is not None and (Path(config.name).name != config.name or config.name.startswith(".")):
        raise UsageError(f"--name {config.name}: must be a plain file name, without folders")
    need(data, range(len(data)), 1, "images")
    device = choose_device(config)
    teacher = _teacher(run, config, before)
    network = teacher.network
    if not teacher.pooled and config.pool != ExtractConfig.pool:
        raise UsageError(
            f"--pool {config.pool}: the features of {network.arch} are not pooled; leave --pool out, --size sets "
            "their grid"
        )
    with networks.fitting(network):  # of a checkpoint made elsewhere nothing is known before it is read
        model = teachers.load(teacher) if teacher.foreign else networks.build(network, 0, "layers").eval()
    shapes = teachers.shapes(network, model)
    layer = config.layer or DEFAULT_LAYERS.get(network.arch) or teacher.layer or teachers.last_layer(shapes)
    if layer not in shapes:
        raise UsageError(f"--layer {layer}: {network.arch} has no such layer; valid: {', '.join(shapes)}")
    token = teachers.choose_token(model, network, config.token, layer)
    config = replace(config, data=spec, layer=layer, token=token, size=network.size)
    file = run / "features" / f"{config.name or data.name}.h5"
    dim = _numbers(teacher, shapes[layer], config)
    reads = () if config.teacher else ("pretext",)
    disk = len(data) * dim * (2 if config.dtype == "float16" else 4)
    if not file.is_file():
        need_disk(file.parent, disk, f"extract ({dim} numbers each)")
    return ExtractPlan(
        stage="extract",
        run=run,
        steps=[PlannedStep(file.stem, config, {"data": data.fingerprint}, reads, disk=disk)],
        overwrite=config.overwrite,
        images=data,
        config=config,
        teacher=teacher,
        dim=dim,
        file=file,
        device=device,
    )


def _teacher(run: Path, config: ExtractConfig, before: Sequence[Plan] = ()) -> Teacher:
    """The teacher that is named, else the one that the line will make, else the run's own."""
    if config.teacher:
        return teachers.find(config.teacher, config.arch, config.weights, config.size)
    for flag, value in (("arch", config.arch), ("weights", config.weights)):
        if value:
            raise UsageError(f"--{flag} {value}: belongs to --teacher, which was not given; give --teacher too")
    network, path = network_of(run, "pretext", before)
    return Teacher(networks.trunk(replace(network, size=config.size or network.size)), path)


def _numbers(teacher: Teacher, shape: tuple[int, int, int], config: ExtractConfig) -> int:
    """Numbers of a row, for a layer of this shape (channels, height, width)."""
    channels, height, width = shape
    if config.token in ("cls", "mean"):
        return channels
    if not teacher.pooled:
        return channels * height * width
    return channels * min(config.pool, width) ** 2


def _reader(teacher: Teacher, config: ExtractConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """(batch, 3, s, s) uint8 images -> (batch, d) features on the device."""
    return teachers.rows_reader(teacher, str(config.layer), config.token, config.pool, config.l2, config, device)


def _pooling(teacher: Teacher, config: ExtractConfig) -> str:
    """How the maps become a row, as the feature file says it."""
    if not teacher.pooled:
        how = "none"
    elif config.layer == POOLED:
        how = "the network's own"
    elif config.token in ("cls", "mean"):
        how = f"token {config.token}"
    else:
        how = f"max {config.pool}x{config.pool}"
    return how + (", l2" if config.l2 else "")
