"""The pretext stage: images in, a teacher that solves a task out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer import distributed, networks, rng
from ktransfer.config import build
from ktransfer.data.dataset import Dataset
from ktransfer.data.enough import need
from ktransfer.data.loader import ImageLoader, cache_place, typical_short_side
from ktransfer.data.opening import open_dataset
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.plan import Plan, PlannedStep
from ktransfer.progress import say
from ktransfer.run import begin
from ktransfer.training import checkpoint, loop
from ktransfer.training.batch import Batch
from ktransfer.training.batch_divider import seen_by_batch_norm
from ktransfer.training.device import choose_device
from ktransfer.training.memory import tell_plan
from ktransfer.training.reading import data_facts, kept_images, readable_by_all

from . import solving
from .config import PretextConfig
from .preview import save_sheet
from .tasks import SHEETS, Task, open_task, refuse_foreign, usual_size

LEAST_TILE = 8
LEAST_LEARNED = 2  # images that batch norm needs
LEAST_SIZE = {"jigsawpp": 30, "jigsaw": 30, "rotation": 10, "context": 36}  # of images whose tiles are that large


@dataclass(frozen=True, kw_only=True)
class PretextPlan(Plan):
    """What the stage will do: `config` with size and tile resolved, `rows` to learn from, and held out for measuring;
    `network` is what it will make.
    """

    config: PretextConfig
    images: Dataset
    network: Network
    task: Task
    device: torch.device
    rows: tuple[Tensor, Tensor]


def pretext(run: str | Path, **options: Any) -> Path:
    """Train a teacher on a pretext task (paper §3; docs/papers.md).

    Args:
        run: the run folder; the stage writes below `run/pretext`.
        options: the fields of `PretextConfig`.

    Returns:
        The path of `model.safetensors`.

    Raises:
        UsageError: what was asked for cannot be done.
        StageError: it failed while it ran.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: PretextPlan) -> Path:
    """Learn, measure on held-out images, and write the weights."""
    run, config, data, task, device = plan.run, plan.config, plan.images, plan.task, plan.device
    network, (rows, held_out) = plan.network, plan.rows
    if plan.alone:
        solving.learn_by_heart(config, task, data, torch.cat([rows, held_out])[: config.overfit], device)
        return run / "pretext" / "model.safetensors"

    (planned,) = plan.steps
    outputs = ("model.safetensors", *sorted(set(SHEETS.values())), "metrics.jsonl", "checkpoint", "events")
    with begin(run, "pretext", "pretext", config, planned.inputs, outputs, plan.overwrite, str(device)) as step:
        weights, sheet = step.folder / "model.safetensors", step.folder / SHEETS[config.task]
        if step.done:
            return weights
        images = ImageLoader(data, config.size, config.workers, cache=config.cache_images, device=device)
        used = readable_by_all(images, torch.cat([rows, held_out]), config.max_broken)
        rows, held_out = (part[torch.isin(part, used)] for part in (rows, held_out))
        model = solving.new_network(config, network, task)
        _preview(sheet, images, rows, task, device)
        evaluate = partial(solving.accuracy, task=task, images=images, rows=held_out, config=config, device=device)
        tell_plan(model, partial(solving.loss, task=task), images, rows, config, device, "pretext", task.following)
        if distributed.world_size() > 1:
            order = {"do": "pretext", "config": asdict(config), "inputs": dict(task.inputs)} | data_facts(data)
            distributed.send_order(order, rows.numpy())
            distributed.agree(None)
        _train(config, task, model, images, rows, device, step.folder, evaluate)
        networks.save(weights, model.weights(), network)
        result = loop.evaluated(model, evaluate)
        broken = [f"{data.keys[row]}: {reason}" for row, reason in images.broken.items()]
        step.finish([weights, sheet], result=result, broken=broken)
        checkpoint.remove(step.folder)
        say(f"pretext: done; {solving.summary(result, task)}; {len(broken)} broken images; {weights}")
        return weights


def train_along(order: dict[str, Any]) -> None:
    """What the other processes do for the leader's training (ktransfer/distributed.py)."""
    with distributed.opening():
        config = PretextConfig(**order["config"])
        device = choose_device(config)
        task = open_task(config, device)
        if task.inputs != order["inputs"]:
            raise StageError(
                f"{config.permutation_file}: differs from the file that the first process reads; copy that one here"
            )
        images = kept_images(order)
        model = solving.new_network(config, solving.network_of(config, task), task)
    rows = torch.from_numpy(order["arrays"][0])
    _train(config, task, model, images, rows, device, Path(), None)


def _train(
    config: PretextConfig,
    task: Task,
    model: nn.Module,
    images: ImageLoader,
    rows: Tensor,
    device: torch.device,
    folder: Path,
    evaluate: loop.Evaluate | None,
) -> None:
    loop.fit(
        model,
        partial(solving.loss, task=task),
        images,
        lambda epoch: loop.epoch_batches(rows, config.batch, config.seed, epoch, task.following),
        config,
        folder,
        device,
        "pretext",
        evaluate,
        following=task.following,
        shared=True,
    )


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> PretextPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(PretextConfig, options, "pretext")
    refuse_foreign(config.task, options)
    networks.check_arch(config.arch, trunk=True)
    if config.data is None:
        raise UsageError("pretext: no images were given; name them with --data")
    data = open_dataset(config.data)
    if len(data) < 4 or (config.overfit and len(data) < config.overfit):
        raise UsageError(
            f"--data {config.data}: {len(data)} images are too few; give at least {max(4, config.overfit)}"
        )
    if 0 < config.limit < 4:
        raise UsageError(f"--limit {config.limit}: too few images to learn from; give 0 (all) or at least 4")
    rows = _split(data, config)
    need(data, rows[0].numpy(), LEAST_LEARNED, "training images")
    device = choose_device(config)
    size = config.size or usual_size(config.task, typical_short_side(data))
    cached = cache_place(config.cache_images, len(data), size, device)
    task = open_task(replace(config, size=size))
    if task.side < LEAST_TILE and config.tile:
        raise UsageError(f"--tile {config.tile}: too small for any network; give at least {LEAST_TILE}")
    if task.side < LEAST_TILE:
        raise UsageError(
            f"--size {size}: tiles of {task.side} pixels are too small for any network; "
            f"give at least --size {LEAST_SIZE[config.task]}"
        )
    trunk = Network(config.arch, config.width, task.stride, task.side)
    with networks.fitting(replace(trunk, size=size)), torch.no_grad():
        networks.build(trunk, 0, "check").eval()(torch.zeros(1, 3, task.side, task.side))
    config = replace(config, size=size, tile=task.side)
    task = open_task(config, device)
    network = solving.network_of(config, task)
    inputs = {"data": data.fingerprint, **task.inputs}
    inputs |= seen_by_batch_norm(config, lambda: solving.new_network(config, network, task))
    memory = 3 * size * size * len(data) if cached is not None and cached.type == "cpu" else 0
    return PretextPlan(
        stage="pretext",
        run=run,
        steps=[] if config.overfit else [PlannedStep("pretext", config, inputs, memory=memory)],
        overwrite=config.overwrite,
        images=data,
        network=network,
        weights=run / "pretext" / "model.safetensors",
        alone="--overfit" if config.overfit else "",
        config=config,
        task=task,
        device=device,
        rows=rows,
    )


def _split(data: Dataset, config: PretextConfig) -> tuple[Tensor, Tensor]:
    """Rows for training, and rows held out for measuring accuracy."""
    order = torch.argsort(rng.words(config.seed, "pretext/split", 0, torch.arange(len(data)), 1)[:, 0], stable=True)
    if config.limit:
        order = order[: config.limit]
    held_out = min(len(order) - 2, max(2, round(config.held_out * len(order)))) if config.held_out else 0
    return order[held_out:], order[:held_out]


def _preview(path: Path, images: ImageLoader, rows: Tensor, task: Task, device: torch.device) -> None:
    """What becomes of the first eight images in the first epoch."""
    chosen = torch.cat([rows[:8], (rows[8:9] if len(rows) > 8 else rows[:1])[: task.following]])
    pixels, valid = images.batch(chosen)
    save_sheet(path, task.sheet(task.make(Batch(chosen.to(device), pixels.to(device), valid.to(device), 0))))
