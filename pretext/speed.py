"""What `ktransfer bench` measures of this room: a step of the pretext training."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer.bench.measure import Wanted, Work, training
from ktransfer.config import build
from ktransfer.training.batch import Batch
from ktransfer.training.device import autocast

from . import solving
from .config import PretextConfig
from .tasks import open_task, usual_size

SHORT_SIDE = 256


def work(wanted: Wanted) -> Work:
    """The step of a task.

    Raises:
        UsageError: the settings do not go together.
    """
    given = {
        "task": wanted.task,
        "arch": wanted.arch or PretextConfig.arch,
        "width": wanted.width,
        "size": wanted.size or usual_size(wanted.task, SHORT_SIDE),
        "batch": wanted.batch,
        "precision": wanted.precision,
    }
    config, device = build(PretextConfig, given, "bench"), wanted.device
    task = open_task(config, device)
    model = solving.new_network(config, solving.network_of(config, task), task)
    step = training(model, partial(solving.loss, task=task), config, device)

    def network(tiles: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with autocast(config, device):
            value = F.cross_entropy(model(tiles), torch.zeros(len(tiles), dtype=torch.int64, device=device))
        value.backward()

    def prepare(batch: Batch) -> Tensor:
        return task.make(batch).tiles

    return Work("pretext step", config.size, task.following, prepare, network, step)
