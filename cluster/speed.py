"""What `ktransfer bench` measures of this room: reading features."""

import torch
from torch import Tensor

from ktransfer import networks
from ktransfer.bench.measure import Wanted, Work
from ktransfer.config import build
from ktransfer.networks import Network
from ktransfer.networks.teachers import Teacher, load
from ktransfer.training.batch import Batch
from ktransfer.training.device import autocast

from .config import ExtractConfig
from .extraction import DEFAULT_LAYERS, _reader

SIZE = 255
ARCH = "vgg16"


def work(wanted: Wanted) -> Work:
    """The features of a teacher of ours with random weights, from the layer that is read when none is named.

    Raises:
        UsageError: the settings do not go together.
    """
    arch, device = wanted.arch or ARCH, wanted.device
    networks.check_arch(arch, wanted.width, trunk=True)
    given = {
        "layer": DEFAULT_LAYERS[arch],
        "size": wanted.size or SIZE,
        "batch": wanted.batch,
        "precision": wanted.precision,
    }
    config = build(ExtractConfig, given, "bench")
    teacher = Teacher(networks.trunk(Network(arch, wanted.width, 2, config.size, 0, "picture", wanted.task)), None)
    read = _reader(teacher, config, device)
    model = load(teacher).to(device)
    layer = {str(config.layer): networks.layers(teacher.network, model)[str(config.layer)]}

    @torch.no_grad()
    def network(x: Tensor) -> None:
        with autocast(config, device):
            networks.feature_maps(model, layer, x)

    def prepare(batch: Batch) -> Tensor:
        return networks.normalise(batch.pixels, teacher.network.normalise)

    def whole(batch: Batch) -> None:
        read(batch.pixels)

    return Work("extract", config.size, 0, prepare, network, whole)
