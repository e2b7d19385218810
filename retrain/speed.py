"""What `ktransfer bench` measures of this room: a step of the target network's training."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransfer import networks
from ktransfer.bench.measure import Wanted, Work, training
from ktransfer.config import build
from ktransfer.data.augment import stored_side
from ktransfer.networks import Network
from ktransfer.training.batch import Batch
from ktransfer.training.device import autocast

from .config import RetrainConfig
from .objectives.objective import Known
from .objectives.table import open_objective
from .stage import _loss, augmented

CLASSES = 2000  # the paper's clusters
SIZE = 224


def work(wanted: Wanted) -> Work:
    """The step on pseudo-labels, all of them 0.

    Raises:
        UsageError: the settings do not go together.
    """
    given = {
        "arch": wanted.arch or RetrainConfig.arch,
        "width": wanted.width,
        "size": wanted.size or SIZE,
        "batch": wanted.batch,
        "precision": wanted.precision,
    }
    config, device = build(RetrainConfig, given, "bench"), wanted.device
    networks.check_arch(config.arch, config.width, own=True)
    network = Network(config.arch, config.width, config.stride, config.size, CLASSES)
    model = networks.build(network, config.seed, "bench")
    labels = torch.zeros(wanted.images, dtype=torch.int64, device=device)
    objective = open_objective(config, Known(labels[:, None]), device)
    step = training(model, partial(_loss, objective=objective, network=network, config=config), config, device)

    def alone(crops: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with autocast(config, device):
            value = F.cross_entropy(model(crops), labels[: len(crops)])
        value.backward()

    def prepare(batch: Batch) -> Tensor:
        return augmented(batch, network, config)

    return Work("retrain step", stored_side(config.size), 0, prepare, alone, step)
