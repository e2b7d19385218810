"""The extract stage: features of every picture, one pass, constant memory, resumable by rows."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.config import build, nearest
from ktransfer.dataset import Dataset, open_dataset
from ktransfer.errors import UsageError
from ktransfer.features import create_or_resume
from ktransfer.networks import Network
from ktransfer.pictures import Pictures, check_broken, reasons
from ktransfer.progress import bar, say
from ktransfer.run import begin, done_record, input_hash, need_disk, read_record
from ktransfer.training import loop

from .config import ExtractConfig

DEFAULT_LAYERS = {"alexnet": "conv4", "alexnet_bn": "conv4", "vgg16": "conv4_1", "vgg16_bn": "conv4_1"}


def extract(run: str | Path, **options: Any) -> Path:
    """Write the features of every picture of a data set to `run/features/NAME.h5` (docs/architecture.md).

    Args:
        run: the run folder.
        options: the fields of `ExtractConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    run = Path(run)
    config, data = check(run, options)
    weights = teacher_path(run, config)
    teacher = input_hash(weights)
    network = networks.trunk(replace(networks.describe(weights), size=config.size))
    device = loop.choose_device(config)
    model = networks.load(weights, network).to(device).eval()
    path, read = _reader(model, network, config)
    dim = len(read(torch.zeros(1, 3, config.size, config.size, dtype=torch.uint8, device=device))[0])

    name = config.name or data.name
    inputs = {"data": data.fingerprint, "teacher": teacher}
    outputs = [f"{name}.h5", f"{name}.h5.part", f"{name}.h5.progress"]
    with begin(run, "features", name, config, inputs, outputs, config.overwrite, str(device)) as step:
        file = step.folder / f"{name}.h5"
        if step.done:
            return file
        need_disk(
            step.folder, len(data) * dim * (2 if config.dtype == "float16" else 4), f"extract ({dim} numbers each)"
        )
        attributes = {
            "teacher": teacher,
            "layer": str(config.layer),
            "pooling": f"max {config.pool}x{config.pool}" + (", l2" if config.l2 else ""),
            "transform": f"short side {config.size}, centre square, normalised by {network.normalise}",
            "fingerprint": data.fingerprint,
        }
        pictures = Pictures(data, config.size, config.workers, cache_bytes=0)
        writer = create_or_resume(file, data.keys, data.targets, dim, config.dtype, attributes)
        rows = torch.arange(writer.rows_done, len(data))
        with bar(len(data), f"extract {config.layer}", done=writer.rows_done) as shown:
            for chosen, pixels, valid, _ in pictures.batches(part for part in rows.split(config.batch) if len(part)):
                with loop.autocast(config, device):
                    features = read(pixels.to(device))
                features = torch.where(valid[:, None], features.float().cpu(), 0.0)
                writer.write(int(chosen[0]), features.numpy(), valid.numpy())
                shown.update(len(chosen))
        found = reasons(data, writer.valid(), config.size)
        check_broken(found, len(data), config.max_broken, data)
        writer.finish()
        broken = [f"{data.keys[row]}: {reason}" for row, reason in found.items()]
        step.finish([file], broken=broken, result={"rows": len(data), "dim": dim})
        say(f"extract: done; {len(data)} x {dim} from {config.layer} ({path}); {len(broken)} broken pictures; {file}")
        return file


def check(
    run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None
) -> tuple[ExtractConfig, Dataset]:
    """Everything that can be found wrong before the work; the settings with data, layer and size resolved.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ExtractConfig, options, "extract")
    made = read_record(run, "pretext", "pretext")
    spec = config.data or (made and made["config"]["data"])
    if not spec:
        raise UsageError("extract: no pictures given, and the run has none; name them with --data")
    data = open_dataset(spec)
    if config.name is not None and (Path(config.name).name != config.name or config.name.startswith(".")):
        raise UsageError(f"--name {config.name}: must be a plain file name, without folders")
    loop.choose_device(config)
    if pending and "pretext" in pending and not config.teacher:
        made_by = pending["pretext"]
        network = Network(made_by.arch, made_by.width, 2, made_by.size, 0, "picture", made_by.task)
    else:
        network = networks.describe(teacher_path(run, config))
    network = networks.trunk(replace(network, size=config.size or network.size))
    model = networks.build(network, 0, "layers").eval()
    with networks.fitting(network), torch.no_grad():
        names = networks.layers(network, model)
        model(torch.zeros(1, 3, network.size, network.size))
    layer = config.layer or DEFAULT_LAYERS.get(network.arch) or list(names)[-1]
    if layer not in names:
        raise UsageError(f"--layer {layer}: {network.arch} has no such layer; valid: {', '.join(names)}")
    return replace(config, data=spec, layer=layer, size=network.size), data


def teacher_path(run: Path, config: ExtractConfig) -> Path:
    """The weights that are read: those given, else the run's own."""
    if config.teacher:
        return Path(config.teacher)
    done_record(run, "pretext", "pretext", "pretext")
    return run / "pretext" / "model.safetensors"


def _reader(model: nn.Module, network: Network, config: ExtractConfig) -> tuple[str, Any]:
    names = networks.layers(network, model)
    if config.layer not in names:
        raise UsageError(
            f"--layer {config.layer}: {network.arch} has no such layer; {nearest(str(config.layer), names)}"
        )
    path = names[config.layer]
    return path, partial(_read, model, network, path, config)


@torch.no_grad()
def _read(model: nn.Module, network: Network, path: str, config: ExtractConfig, pixels: Tensor) -> Tensor:
    """(batch, 3, s, s) uint8 -> (batch, channels * pool * pool) float32."""
    maps = networks.feature_maps(model, {"read": path}, networks.normalise(pixels, network.normalise))["read"]
    rows = F.adaptive_max_pool2d(maps.float(), min(config.pool, maps.shape[-1])).flatten(1)
    return F.normalize(rows) if config.l2 else rows
