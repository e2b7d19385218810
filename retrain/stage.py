"""The retrain stage: pseudo-labels in, a target network that learned them from scratch out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import distributed, networks, rng
from ktransfer.artifacts.labels import read_labels
from ktransfer.config import build
from ktransfer.data.augment import MARGIN, random_resized_crop, stored_side
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader, cache_place, typical_short_side
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.networks.zoos import torchvision_names
from ktransfer.plan import Plan, PlannedStep, latest
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash, read_record
from ktransfer.training import checkpoint, loop
from ktransfer.training.batch import Batch
from ktransfer.training.batch_divider import seen_by_batch_norm
from ktransfer.training.device import choose_device
from ktransfer.training.memory import tell_plan
from ktransfer.training.reading import data_facts, kept_images, readable_by_all

from .config import RetrainConfig

CLASSES = "classes"
LIST = "list"


@dataclass(frozen=True, kw_only=True)
class RetrainPlan(Plan):
    """What the stage will do: `config` with data and size resolved; `network` is what it will make, whose number of
    classes is 2 where the labels are still to be made.
    """

    config: RetrainConfig
    images: Dataset
    network: Network
    device: torch.device


def retrain(run: str | Path, **options: Any) -> Path:
    """Train a target network from scratch to predict pseudo-labels (paper §3.4; docs/papers.md).

    Args:
        run: the run folder; the stage writes below `run/retrain`.
        options: the fields of `RetrainConfig`.

    Returns:
        The path of `model.safetensors`, which loads into torchvision where the architecture is torchvision's.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: RetrainPlan) -> Path:
    """Read the labels, learn them, and write the weights."""
    config, data, device = plan.config, plan.images, plan.device
    labels, labels_hash = _labels(plan.run, config, data)
    classes = int(labels.max()) + 1
    network = replace(plan.network, classes=classes)
    rows = torch.nonzero(labels >= 0)[:, 0]
    outputs = ("model.safetensors", "metrics.jsonl", "checkpoint", "events")
    inputs = {"data": data.fingerprint, "labels": labels_hash}
    inputs |= seen_by_batch_norm(config, lambda: networks.build(network, config.seed, "retrain"))
    with begin(plan.run, "retrain", "retrain", config, inputs, outputs, plan.overwrite, str(device)) as step:
        weights = step.folder / "model.safetensors"
        if step.done:
            return weights
        model = networks.build(network, config.seed, "retrain")
        images = ImageLoader(data, stored_side(config.size), config.workers, cache=config.cache_images, device=device)
        rows = readable_by_all(images, rows, config.max_broken)
        loss = partial(_loss, labels=labels.to(device), network=network, config=config)
        tell_plan(model, loss, images, rows, config, device, "retrain")
        if distributed.world_size() > 1:
            order = {"do": "retrain", "config": asdict(config), "network": asdict(network)} | data_facts(data)
            distributed.send_order(order, labels.numpy(), rows.numpy())
            distributed.agree(None)
        _train(config, network, model, images, labels, rows, device, step.folder)
        networks.save(weights, model.state_dict(), network)
        broken = [f"{data.keys[row]}: {reason}" for row, reason in images.broken.items()]
        names = {"classes": list(data.classes)[:classes]} if config.labels == CLASSES else {}
        step.finish([weights], broken=broken, result={"classes": classes, "images": len(rows)}, **names)
        checkpoint.remove(step.folder)
        say(f"retrain: done; {config.arch} learned {classes} {network.task} of {len(rows)} images; {weights}")
        return weights


def train_along(order: dict[str, Any]) -> None:
    """What the other processes do for the leader's training (ktransfer/distributed.py)."""
    with distributed.opening():
        config, network = RetrainConfig(**order["config"]), Network(**order["network"])
        device = choose_device(config)
        images = kept_images(order)
        model = networks.build(network, config.seed, "retrain")
    labels, rows = (torch.from_numpy(array) for array in order["arrays"])
    _train(config, network, model, images, labels, rows, device, Path())


def _train(
    config: RetrainConfig,
    network: Network,
    model: nn.Module,
    images: ImageLoader,
    labels: Tensor,
    rows: Tensor,
    device: torch.device,
    folder: Path,
) -> None:
    loop.fit(
        model,
        partial(_loss, labels=labels.to(device), network=network, config=config),
        images,
        partial(_batches, rows, labels, config),
        config,
        folder,
        device,
        "retrain",
        shared=True,
    )


def first(
    run: Path, options: dict[str, Any], before: Sequence[Plan], tables: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """The assignment that comes before, where the run's pseudo-labels are missing or of other centroids than its
    own."""
    if options.get("labels") or options.get("arch") == LIST or latest(before, "assign"):
        return []
    clusters, there = latest(before, "cluster"), _assigned(run)
    if there and "assign" not in tables and clusters is None:
        return []
    again = clusters is not None and (clusters.overwrite or not there)
    return [("assign", dict(tables.get("assign", {})) | {"overwrite": again})]


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> RetrainPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(RetrainConfig, options, "retrain")
    if config.arch == LIST:
        raise UsageError(f"--arch: valid: {', '.join((*networks.TRUNKS, *torchvision_names()))}")
    networks.check_arch(config.arch, config.width)
    data = open_dataset(_data_spec(run, config))
    device = choose_device(config)
    size = config.size or min(224, int(typical_short_side(data) / MARGIN) // 8 * 8)
    cached = cache_place(config.cache_images, len(data), stored_side(size), device)
    config = replace(config, size=size, data=data.spec)
    if config.labels == CLASSES and not data.classes:
        raise UsageError(f"--labels classes: {data.spec} has no class folders; give a label file")
    classes, inputs = 2, {"data": data.fingerprint}
    if config.labels or not latest(before, "cluster", "assign"):
        labels, inputs["labels"] = _labels(run, config, data)
        classes = int(labels.max()) + 1
    task = CLASSES if config.labels == CLASSES else "pseudo-labels"
    network = Network(config.arch, config.width, config.stride, config.size, classes, "imagenet", task)
    with networks.fitting(network), torch.no_grad():  # batch norm learns from two images at least
        networks.build(replace(network, classes=2), 0, "check")(torch.zeros(2, 3, config.size, config.size))
    memory = 3 * stored_side(size) ** 2 * len(data) if cached is not None and cached.type == "cpu" else 0
    return RetrainPlan(
        stage="retrain",
        run=run,
        steps=[PlannedStep("retrain", config, inputs, () if config.labels else ("assign",), memory=memory)],
        overwrite=config.overwrite,
        images=data,
        network=network,
        weights=run / "retrain" / "model.safetensors",
        config=config,
        device=device,
    )


def _assigned(run: Path) -> bool:
    """Whether the run's pseudo-labels, of whatever images, belong to its centroids."""
    made, centroids = read_record(run, "clusters", "assign"), run / "clusters" / "clusters.h5"
    if not made or made["state"] != "done" or not centroids.is_file():
        return False
    return bool(made["inputs"]["centroids"] == input_hash(centroids))


def _data_spec(run: Path, config: RetrainConfig) -> str:
    if config.data:
        return config.data
    for stage, name in (("clusters", "assign"), ("clusters", "cluster"), ("pretext", "pretext")):
        record = read_record(run, stage, name)
        if record and record["config"].get("data"):
            return str(record["config"]["data"])
    raise UsageError("retrain: no images were given, and the run has none; name them with --data")


def _labels(run: Path, config: RetrainConfig, data: Dataset) -> tuple[Tensor, str]:
    """(n,) int64 label of each row of the data, -1 where it has none; and what they are, as a hash."""
    if config.labels == CLASSES:
        return torch.from_numpy(data.targets.astype(np.int64)), data.fingerprint
    path = Path(config.labels) if config.labels else run / "clusters" / "labels.csv"
    if not config.labels:
        made = done_record(run, "clusters", "assign", "assign")
        centroids = run / "clusters" / "clusters.h5"
        if centroids.is_file() and made["inputs"]["centroids"] != input_hash(centroids):
            raise UsageError(
                f"{path}: belongs to older clusters; make it again: ktransfer --run {run} assign --overwrite"
            )
    found = read_labels(path)
    digest = input_hash(path)
    if found.keys is None:
        if len(found.labels) != len(data):
            raise UsageError(f"{path}: {len(found.labels)} labels for {len(data)} images of {data.spec}")
        labels = torch.from_numpy(found.labels.astype(np.int64))
    else:
        place = {key: row for row, key in enumerate(data.keys)}
        missing = [key for key in found.keys if key not in place]
        if missing:
            raise UsageError(
                f"{path}: {len(missing)} of {len(found.keys)} keys are not images of {data.spec}, such as "
                f"{missing[0]}; give the --data that was labelled"
            )
        labels = torch.full((len(data),), -1)
        labels[torch.tensor([place[key] for key in found.keys])] = torch.from_numpy(found.labels.astype(np.int64))
    if len(labels.unique()[labels.unique() >= 0]) < 2:
        raise UsageError(f"{path}: fewer than two different labels; give at least two")
    return labels, digest


def _batches(rows: Tensor, labels: Tensor, config: RetrainConfig, epoch: int) -> Tensor:
    """The batches of an epoch; with `uniform`, each drawn by cluster first, then by image within it."""
    if config.uniform:
        by_label = rows[labels[rows].argsort(stable=True)]
        _, sizes = labels[by_label].unique_consecutive(return_counts=True)
        starts = sizes.cumsum(0) - sizes
        draws = rng.uniform(config.seed, "retrain/uniform", epoch, torch.arange(len(rows)), 2).double()
        cluster = (draws[:, 0] * len(sizes)).long()
        rows = by_label[starts[cluster] + (draws[:, 1] * sizes[cluster]).long()]
    return loop.epoch_batches(rows, config.batch, config.seed, epoch)


def _loss(
    model: nn.Module, batch: Batch, labels: Tensor, network: Network, config: RetrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = labels[batch.rows[batch.kept]]
    logits = model(augmented(batch, network, config))
    correct = (logits.argmax(1) == wanted).sum()
    return F.cross_entropy(logits, wanted), {"accuracy": correct, "count": batch.valid.sum()}


def augmented(batch: Batch, network: Network, config: RetrainConfig) -> Tensor:
    """What the network sees of a batch: a random crop of each valid image, (n, 3, size, size) float32, normalised."""
    rows, pixels = batch.rows[batch.kept], batch.pixels[batch.kept]
    finish = partial(networks.normalise, how=network.normalise)
    return random_resized_crop(pixels, rows, config.size, config.seed, batch.epoch, "retrain", config.crop, finish)
