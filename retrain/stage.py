"""The retrain stage: pseudo-labels in, a target network that learned them from scratch out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer import distributed, networks, rng
from ktransfer.config import build
from ktransfer.data.augment import MARGIN, in_parts, random_resized_crop, stored_side
from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader, cache_place, typical_short_side
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.images.colours import Recolouring
from ktransfer.images.randaugment import RandAugment, numbers
from ktransfer.networks import Network, own_modules, teachers
from ktransfer.networks.teachers import Teacher
from ktransfer.networks.zoos import torchvision_names
from ktransfer.plan import Plan, PlannedStep, latest
from ktransfer.progress import say
from ktransfer.run import begin, read_record
from ktransfer.training import checkpoint, loop
from ktransfer.training.batch import Batch
from ktransfer.training.batch_divider import seen_by_batch_norm
from ktransfer.training.device import choose_device
from ktransfer.training.memory import tell_plan
from ktransfer.training.reading import data_facts, kept_images, readable_by_all

from . import own_network
from .config import RetrainConfig
from .initial import find_initial, start_from
from .known import (
    CLASSES,
    LABELLED,
    OF_FEATURES,
    assigned,
    find_known,
    received,
    refuse_one_label,
    refuse_together,
    sent,
)
from .objectives.objective import Known, Objective
from .objectives.table import open_objective
from .own_network import narrowed

LIST = "list"
PSEUDO = "pseudo-labels"


@dataclass(frozen=True, kw_only=True)
class RetrainPlan(Plan):
    """What the stage will do: `config` with data and size resolved; `network` is what it will make, whose number of
    classes is 2 where the labels are still to be made; `known` what was read of the images, and from what, None where
    the line may still make it.
    """

    config: RetrainConfig
    images: Dataset
    network: Network
    device: torch.device
    initial: Teacher | None
    known: tuple[Known, dict[str, str]] | None


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
    """Read what is known of the images, learn it, and write the weights."""
    config, data, device = plan.config, plan.images, plan.device
    known, inputs = plan.known or find_known(plan.run, config, data)
    inputs = inputs | _hashes(config, plan.initial)
    inputs |= seen_by_batch_norm(config, lambda: networks.build(plan.network, config.seed, "retrain"))
    outputs = ("model.safetensors", "metrics.jsonl", "checkpoint", "events")
    with begin(plan.run, "retrain", "retrain", config, inputs, outputs, plan.overwrite, str(device)) as step:
        weights = step.folder / "model.safetensors"
        if step.done:
            return weights
        objective = open_objective(config, known, device)
        network = replace(plan.network, classes=objective.outputs, task=_task(config, objective))
        model = networks.build(network, config.seed, "retrain")
        if plan.initial:
            start_from(plan.initial, model)
        images = ImageLoader(data, stored_side(config.size), config.workers, cache=config.cache_images, device=device)
        rows = readable_by_all(images, known.rows(), config.max_broken)
        refuse_one_label(config, data, known, rows)
        loss = partial(_loss, objective=objective, network=network, config=config)
        tell_plan(model, loss, images, rows, config, device, "retrain")
        if distributed.world_size() > 1:
            facts, arrays = sent(known)
            order = {"do": "retrain", "config": asdict(config), "network": asdict(network)} | facts | data_facts(data)
            distributed.send_order(order, rows.numpy(), *arrays)
            distributed.agree(None)
        _train(config, network, model, images, known, objective, rows, device, step.folder)
        kept = replace(network, classes=objective.kept)
        names = known.names[: kept.classes]
        networks.save(weights, narrowed(model, kept), kept, names)
        broken = [f"{data.keys[row]}: {reason}" for row, reason in images.broken.items()]
        result = {"classes": kept.classes, "images": len(rows)}
        named = {"classes": list(names)} if names else {}
        step.finish([weights], broken=broken, result=result, **named)
        checkpoint.remove(step.folder)
        say(f"retrain: done; {config.arch} learned {kept.classes} {kept.task} of {len(rows)} images; {weights}")
        return weights


def train_along(order: dict[str, Any]) -> None:
    """What the other processes do for the leader's training (ktransfer/distributed.py)."""
    with distributed.opening():
        config, network = RetrainConfig(**order["config"]), Network(**order["network"])
        device = choose_device(config)
        images = kept_images(order)
        known = received(order, order["arrays"][1:])
        objective = open_objective(config, known, device)
        model = networks.build(network, config.seed, "retrain")
    _train(config, network, model, images, known, objective, torch.from_numpy(order["arrays"][0]), device, Path())


def _train(
    config: RetrainConfig,
    network: Network,
    model: nn.Module,
    images: ImageLoader,
    known: Known,
    objective: Objective,
    rows: Tensor,
    device: torch.device,
    folder: Path,
) -> None:
    loop.fit(
        model,
        partial(_loss, objective=objective, network=network, config=config),
        images,
        partial(_batches, rows, known.labels[:, 0], config),
        config,
        folder,
        device,
        "retrain",
        shared=True,
    )


def _task(config: RetrainConfig, objective: Objective) -> str:
    return CLASSES if config.labels == CLASSES else objective.task


def first(
    run: Path, options: dict[str, Any], before: Sequence[Plan], tables: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """The assignment that comes before, where the run's pseudo-labels are missing or of other centroids than its own;
    of an objective that learns the teacher's features alone, the extraction of these."""
    if options.get("labels") or options.get("arch") == LIST or latest(before, "assign"):
        return []
    if options.get("objective", RetrainConfig.objective) not in LABELLED:
        wanted = {"data": options["data"]} if options.get("data") else {}
        there = options.get("features") or latest(before, "extract") or any((run / "features").glob("*.h5"))
        return [] if there else [("extract", wanted | dict(tables.get("extract", {})))]
    clusters, there = latest(before, "cluster"), assigned(run)
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
    networks.check_arch(config.arch, config.width, own=True)
    spec = _data_spec(run, config)
    data = open_dataset(spec)
    device = choose_device(config)
    size = config.size or min(224, int(typical_short_side(data) / MARGIN) // 8 * 8)
    cached = cache_place(config.cache_images, len(data), stored_side(size), device)
    config = replace(config, size=size, data=data.spec)
    if config.labels == CLASSES and not data.classes:
        raise UsageError(f"--labels classes: {data.spec} has no class folders; give a label file")
    refuse_together(config)
    if config.randaugment:
        numbers(config.randaugment)
    classes, inputs, known = 2, {"data": data.fingerprint}, None
    coming = latest(before, "extract", "cluster", "assign")
    if config.labels or not coming:
        found = find_known(run, config, data)
        classes, inputs = int(found[0].labels[:, 0].max()) + 1 or 2, found[1]
        known = None if coming else found
    initial = find_initial(config)
    inputs = inputs | _hashes(config, initial)
    task = CLASSES if config.labels == CLASSES else PSEUDO
    network = Network(config.arch, config.width, config.stride, config.size, classes, config.normalise, task)
    if own_modules.is_own(config.arch):
        own_network.check(network, config.objective == "multi")
    else:
        with networks.fitting(network), torch.no_grad():  # batch norm learns from two images at least
            checked = networks.trunk(replace(network, classes=2))  # AlexNet's classifier takes what the trunk leaves
            networks.build(checked, 0, "check")(torch.zeros(2, 3, config.size, config.size))
    memory = 3 * stored_side(size) ** 2 * len(data) if cached is not None and cached.type == "cpu" else 0
    return RetrainPlan(
        stage="retrain",
        run=run,
        steps=[PlannedStep("retrain", config, inputs, _reads(config), memory=memory)],
        overwrite=config.overwrite,
        images=data,
        network=network,
        weights=run / "retrain" / "model.safetensors",
        config=config,
        device=device,
        initial=initial,
        known=known,
    )


def _hashes(config: RetrainConfig, initial: Teacher | None) -> dict[str, str]:
    """Those of the function that makes the network, and of the weights that it starts from."""
    own = {"arch": own_modules.identity(config.arch)} if own_modules.is_own(config.arch) else {}
    return own | ({"init": teachers.identity(initial)} if initial else {})


def _reads(config: RetrainConfig) -> tuple[str, ...]:
    """The stages of the run whose outcome it takes."""
    labels = ("assign",) if config.objective in LABELLED and not config.labels else ()
    return labels + (("extract",) if config.objective in OF_FEATURES and not config.features else ())


def _data_spec(run: Path, config: RetrainConfig) -> str:
    if config.data:
        return config.data
    for stage, name in (("clusters", "assign"), ("clusters", "cluster"), ("pretext", "pretext")):
        record = read_record(run, stage, name)
        if record and record["config"].get("data"):
            return str(record["config"]["data"])
    raise UsageError("retrain: no images were given, and the run has none; name them with --data")


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
    model: nn.Module, batch: Batch, objective: Objective, network: Network, config: RetrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    outputs = model(augmented(batch, network, config))
    value, sums = objective.loss(outputs, batch.rows[batch.kept])
    return value, sums | {"count": batch.valid.sum()}


def augmented(batch: Batch, network: Network, config: RetrainConfig) -> Tensor:
    """What the network sees of a batch, (n, 3, size, size) float32: a random crop of each valid image, normalised."""
    rows, pixels = batch.rows[batch.kept], batch.pixels[batch.kept]
    finish = partial(networks.normalise, how=network.normalise)
    crop = partial(random_resized_crop, pixels, rows, config.size, config.seed, batch.epoch, "retrain", config.crop)
    key = (config.seed, batch.epoch, "retrain")
    changes: list[Callable[[Tensor, slice], Tensor]] = []
    if config.randaugment:
        count, level = numbers(config.randaugment)
        changes.append(RandAugment(rows, count, level, *key))
    if config.grey or config.jitter:
        changes.append(Recolouring(rows, config.grey, config.jitter, *key))
    if not changes:
        return crop(finish)
    crops = crop()

    def changed(part: slice) -> Tensor:
        return finish(reduce(lambda pixels, change: change(pixels, part), changes, crops[part]))

    return in_parts(changed, len(crops), crops[0].numel(), crops.device)
