"""Shares of energy of filters that are known, and the image of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.protocols import filters
from ktransfer.networks import Network

NETWORK = Network("alexnet_bn", 0.05, 2, 35)


def test_shares_of_known_filters():
    grey = torch.ones(1, 3, 8, 8)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    opponent = torch.stack([torch.ones(8, 8), -torch.ones(8, 8), torch.zeros(8, 8)])[None]
    board = torch.ones(8, 8)
    board[::2, 1::2] = board[1::2, ::2] = -1
    assert filters.shares(grey.repeat(2, 1, 1, 1))["colour"] == pytest.approx(0, abs=1e-9)
    assert filters.shares(opponent.repeat(2, 1, 1, 1))["colour"] == pytest.approx(1)
    assert filters.shares(red.repeat(2, 1, 1, 1))["colour"] == pytest.approx(2 / 3)
    assert filters.shares(grey.repeat(2, 1, 1, 1))["smooth"] == pytest.approx(1)
    assert filters.shares((grey * board).repeat(2, 1, 1, 1))["smooth"] == pytest.approx(0, abs=1e-9)
    mixed = filters.shares(torch.cat([grey, opponent, torch.zeros(1, 3, 8, 8)]))  # one filter is dead
    assert mixed["colour"] == pytest.approx(0.5)
    assert mixed["colour_interval"] == [0.0, 1.0]


def test_random_filters_are_as_the_docstring_says():
    found = filters.shares(torch.randn(4000, 3, 11, 11, generator=torch.Generator().manual_seed(0)))
    assert found["colour"] == pytest.approx(2 / 3, abs=0.01)
    assert found["smooth"] == pytest.approx((5 / 11) ** 2, abs=0.01)


def test_the_image(tmp_path):
    home = tmp_path / "eval" / "work-filters"
    found = filters.evaluate(Arm("random", NETWORK, None), None, EvalConfig(), home / "random", torch.device("cpu"))
    assert found["files"] == ["random.png"]
    image = np.asarray(Image.open(tmp_path / "eval" / "filters" / "random.png"))
    weights = networks.build(NETWORK, 0, "eval/random").conv1.weight.detach()
    assert found["scores"]["conv1"]["filters"] == len(weights) == 8
    first = weights[0] / weights[0].abs().max()
    shown = image[3 : 3 + 44 : 4, 3 : 3 + 44 : 4].astype(float)
    assert np.abs(shown / 127.5 - 1 - first.permute(1, 2, 0).numpy()).max() < 0.01


def test_the_layer_is_called_as_elsewhere():
    for network, name in (
        (NETWORK, "conv1"),
        (Network("alexnet", size=64, classes=5), "conv1"),
        (Network("vgg16_bn", 0.05, 4, 32), "conv1_1"),
        (Network("vgg11", size=32, classes=5), "conv1_1"),
        (Network("resnet18", size=32, classes=5), "conv1"),
        (Network("mobilenet_v2", size=32, classes=5), "features.0.0"),
    ):
        assert filters.first_filters(networks.build(network, 0, "test"), network)[0] == name


def test_a_network_without_such_filters():
    with pytest.raises(UsageError, match="--protocol filters: net has no convolution of colour images"):
        filters.first_filters(torch.nn.Linear(2, 2), Network("net"))
