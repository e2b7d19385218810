"""How a network learns a task and how well it solves it: loss, held-out accuracy, and the self-test."""

import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer.data.dataset import Dataset
from ktransfer.data.loader import ImageLoader
from ktransfer.errors import StageError
from ktransfer.networks import Network
from ktransfer.progress import say
from ktransfer.training import loop
from ktransfer.training.batch import Batch
from ktransfer.training.device import autocast
from ktransfer.training.stopping import Stopping

from .config import PretextConfig
from .network import TaskNet
from .tasks import Task

HELD_OUT_EPOCH = 2**32 - 1  # draws that no training epoch uses
OVERFIT_STEPS = 400
LOOK = 5  # steps from one look at what is solved to the next


def network_of(config: PretextConfig, task: Task) -> Network:
    """What is trained; `config.size` is resolved."""
    return Network(config.arch, config.width, task.stride, config.size, 0, task.normalise, config.task)


def new_network(config: PretextConfig, network: Network, task: Task) -> TaskNet:
    """A network that has not learned yet, with the task's head."""
    return TaskNet(network, task.tiles, task.side, task.classes, config.seed)


def loss(model: nn.Module, batch: Batch, task: Task) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy over the examples; `count` and what the log divides by it are of images, which rotation turns
    into four examples each.
    """
    made = task.make(batch)
    logits = model(made.tiles)
    correct = (logits.argmax(1) == made.label).sum()
    count = _own(batch.valid, task).sum()
    accuracy = correct * count / max(1, len(made.label))
    return F.cross_entropy(logits, made.label), {"accuracy": accuracy, "count": count}


def accuracy(
    model: nn.Module, task: Task, images: ImageLoader, rows: Tensor, config: PretextConfig, device: torch.device
) -> dict[str, float]:
    """Accuracy on the held-out images, overall and by `task.group`; nothing where none can be read."""
    following = rows.roll(-1)
    batches = [
        torch.cat([part, after[len(after) - task.following :]])
        for part, after in zip(rows.split(config.batch), following.split(config.batch), strict=True)
        if len(part)
    ]
    hits: list[Tensor] = []
    groups: list[Tensor] = []
    for chosen, pixels, valid, _ in images.batches(iter(batches)):
        if not _own(valid, task).any():
            continue
        made = task.make(Batch(chosen.to(device), pixels.to(device), valid.to(device), HELD_OUT_EPOCH))
        with autocast(config, device):
            logits = model(made.tiles)
        hits.append((logits.argmax(1) == made.label).cpu())
        groups.append(task.group(made).cpu())
    if not hits:
        return {}
    hit, group = torch.cat(hits).double(), torch.cat(groups)
    result = {"held_out_accuracy": float(hit.mean()), f"held_out_{task.noun}": float(len(hit))}
    for number in group.unique().tolist():
        result[f"held_out_accuracy_{task.groups.format(number)}"] = float(hit[group == number].mean())
    return result


def summary(result: dict[str, float], task: Task) -> str:
    """The outcome in words."""
    if not result:
        return "no images were held out"
    return f"{result['held_out_accuracy']:.1%} of held-out {task.noun} solved (chance {1 / task.classes:.1%})"


def learn_by_heart(config: PretextConfig, task: Task, data: Dataset, rows: Tensor, device: torch.device) -> None:
    """Whether the network can overfit what the task makes of the images in one epoch; nothing is written.

    Raises:
        StageError: it cannot.
    """
    config = replace(config, batch=len(rows), epochs=OVERFIT_STEPS // LOOK, compile="off")
    model = new_network(config, network_of(config, task), task)
    rows = torch.cat([rows, rows[: task.following]])
    images = ImageLoader(data, config.size, config.workers)
    pixels, valid = images.batch(rows)
    made = task.make(Batch(rows.to(device), pixels.to(device), valid.to(device), 0))

    def solved(net: nn.Module) -> dict[str, float]:
        logits = net(made.tiles)
        share = float((logits.argmax(1) == made.label).double().mean())
        value = float(F.cross_entropy(logits, made.label))
        say(f"overfit: step {LOOK * (looks.evaluated + 1)}, loss {value:.3f}, solved {share:.0%}")
        return {"share": share}

    def first_epochs(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(model, replace(batch, epoch=0), task)

    looks = Stopping(model, solved, "share", OVERFIT_STEPS, enough=1)
    started = time.monotonic()
    loop.fit(
        model,
        first_epochs,
        images,
        lambda epoch: rows.repeat(LOOK, 1),
        config,
        None,
        device,
        "overfit",
        looks,
        following=task.following,
    )
    if looks.best < 1:
        raise StageError(
            f"overfit: not all {task.noun} solved in {OVERFIT_STEPS} steps; try another --lr or --arch vgg16_bn"
        )
    seconds = time.monotonic() - started
    say(f"overfit: all {len(made.label)} {task.noun} solved after {seconds:.0f} s: the network can learn")


def _own(valid: Tensor, task: Task) -> Tensor:
    """Of a batch's (b + following,) flags those of the images that examples are made of."""
    return valid[: len(valid) - task.following]
