"""Nothing in a step asks the device for a value: on a GPU, the host would wait for it."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ktransfer import networks
from ktransfer.eval.learners.probe import probe_loss
from ktransfer.networks import Network
from ktransfer.pretext import solving, tasks
from ktransfer.pretext.config import PretextConfig
from ktransfer.retrain import stage
from ktransfer.retrain.config import RetrainConfig
from ktransfer.retrain.objectives import clusters
from ktransfer.retrain.objectives.objective import Known
from ktransfer.training.batch import Batch

aten = torch.ops.aten
ASKING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)


class NoWaiting(TorchDispatchMode):
    """Whatever needs a value, or a shape that depends on one, is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [index for index in args[1] if index is not None] if func is aten.index.Tensor else []
        assert func not in ASKING and all(mask.dtype is not torch.bool for mask in masks), func
        return func(*args, **(kwargs or {}))


def batch(size, whole, following=0):
    count = 6 + following
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return Batch(torch.arange(count), pixels, torch.ones(count, dtype=torch.bool), 0, whole)


def pretext(task, whole):
    config = PretextConfig(task=task, arch="alexnet_bn", width=0.05, size=96, permutations=10, colour="paper")
    if task == "context":  # on a CPU alone, torch looks at the labels of one_hot
        config = PretextConfig(task=task, arch="alexnet_bn", width=0.05, size=96, colour="projected")
    opened = tasks.open_task(config)
    model = solving.new_network(config, solving.network_of(config, opened), opened)
    given = batch(96, whole, opened.following)
    return partial(solving.loss, model, given, opened)


def retrain(whole):
    network = Network("alexnet", 0.05, 2, 64, 3)
    model = networks.build(network, 0, "t")
    config = RetrainConfig(size=64)
    objective = clusters.objective(Known(torch.arange(6)[:, None] % 3), 0, torch.device("cpu"))
    return partial(stage._loss, model, batch(72, whole), objective=objective, network=network, config=config)


def probes(whole):
    rows = batch(1, whole)
    given = Batch(rows.rows, torch.rand(6, 4), rows.valid, 0, whole)
    heads = torch.nn.Linear(4, 3)
    return partial(probe_loss(torch.arange(6) % 3, 1), lambda x: [heads(x)], given)


MADE = {
    "jigsawpp": partial(pretext, "jigsawpp"),
    "rotation": partial(pretext, "rotation"),
    "context": partial(pretext, "context"),
    "retrain": retrain,
    "probes": probes,
}


@pytest.mark.parametrize("name", MADE)
def test_a_step_waits_for_no_value(name):
    torch.manual_seed(0)
    step = MADE[name](True)
    torch.manual_seed(1)
    with NoWaiting():
        value, sums = step()
        value.backward()
    assert value.isfinite() and int(sums["count"]) == 6


@pytest.mark.parametrize("name", MADE)
def test_what_is_known_to_be_whole_gives_the_same_bytes(name):
    values = []
    for whole in (True, False):
        torch.manual_seed(0)
        step = MADE[name](whole)
        torch.manual_seed(1)
        values.append(step()[0])
    assert torch.equal(*values)
    with pytest.raises(AssertionError), NoWaiting():  # picking by a mask is noticed
        MADE[name](False)()
