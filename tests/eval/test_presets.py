"""The presets of the linear probe: grids, squares, schedules, and the whole protocol on small images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ktransfer import networks
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_splits
from ktransfer.errors import UsageError
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import PRESETS, EvalConfig, own_settings
from ktransfer.eval.learners.maps import Layer
from ktransfer.eval.learners.probe import Probes
from ktransfer.eval.presets import Crops, preset_layers, ten_crop_predictions, with_schedule
from ktransfer.eval.protocols import linear
from ktransfer.networks import Network
from ktransfer.training import loop

CPU = torch.device("cpu")
NETWORK = Network("alexnet_bn", 0.05, 2, 56)
NAMES = ["conv1", "conv2", "conv3", "conv4", "conv5"]


def config(preset, **options):
    given = EvalConfig(preset=preset, precision="float32", **options)
    return replace(given, **own_settings(given, "linear"))


def layers_of(network, preset, names=None):
    return preset_layers(networks.build(network, 0, "test"), network, config(preset, layers=names))


@pytest.mark.parametrize(
    ("preset", "network"),
    [
        ("deepcluster", Network("alexnet", 0.05, 4, 224)),
        ("fair", Network("alexnet", 0.05, 2, 227)),
        ("zhang", Network("alexnet", 0.05, 4, 227)),
    ],
)
def test_grids_of_full_size_are_the_published_ones(preset, network):
    """docs/papers.md: 9600/9216/9600/9600/9216 numbers of 96, 256, 384, 384 and 256 channels."""
    layers = layers_of(network, preset)
    assert [(part.name, part.grid) for part in layers] == list(zip(NAMES, (10, 6, 5, 5, 6), strict=True))
    assert layers[0].start == 0 and all(part.stop - part.start == part.channels * part.grid**2 for part in layers)


def test_the_default_is_as_it_was():
    assert config("zhang").lrs == "0.0003,0.001,0.003,0.01" and config("zhang").epochs == 30
    assert all(part.pool is None for part in layers_of(NETWORK, "zhang"))
    assert with_schedule(config("zhang")) == config("zhang")


def test_what_a_preset_cannot_do_is_said():
    with pytest.raises(UsageError, match=r"--layers conv9: --preset fair has no pool for it; did you mean 'conv\d'"):
        layers_of(NETWORK, "fair", "conv9")
    with pytest.raises(UsageError, match=r"--preset fair: conv1 leaves maps of 23x23, less than its pool of 28x28"):
        layers_of(NETWORK, "fair")
    with pytest.raises(UsageError, match="resnet18 has no such layer"):
        layers_of(Network("resnet18", size=64, classes=3), "deepcluster")
    splits = open_splits("scenes:images=24,size=48")
    for wrong in ({"schedule": "step"}, {"warmup": 0.1}):
        with pytest.raises(UsageError, match="--preset deepcluster sets it"):
            linear.check([NETWORK], splits, config("deepcluster", **wrong), None)


def test_settings_of_a_preset_yield_to_those_given():
    assert own_settings(EvalConfig(preset="fair"), "linear") == PRESETS["fair"]
    given = EvalConfig(preset="fair", stride=4, epochs=3)
    assert own_settings(given, "linear") == {"batch": 256, "weight_decay": 5e-4, "lrs": "0.01"}
    assert "stride" not in own_settings(EvalConfig(preset="fair"), "robust")


def test_schedules():
    sqrt = with_schedule(config("deepcluster", weight_decay=1e-2))
    for step in (0, 10, 99):
        assert loop.rate(step, 100, sqrt, 0.5) == pytest.approx(1 / math.sqrt(1 + 0.5 * 1e-2 * step))
    fair = with_schedule(config("fair"))
    factors = [loop.rate(step, 140, fair, 0.01) for step in range(140)]
    assert factors == pytest.approx([1.0] * 40 + [0.1] * 40 + [0.01] * 40 + [0.001] * 20)


def corners(pixels, views):
    """Not maps, but the views themselves."""
    return views[:, None].float()


@pytest.fixture
def crops():
    return Crops(corners, ImageLoader(open_splits("scenes:images=12,size=48")[0], 48, 1), 44)


def test_ten_squares_and_random_ones(crops):
    assert crops.views == 2 * 5**2
    places = {(view // 2 // 5, view // 2 % 5, view % 2) for view in crops.ten().tolist()}
    assert places == {(y, x, m) for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)) for m in (0, 1)}
    order = torch.arange(4000).view(40, 100)
    drawn = crops.drawn(order, 0, 3)
    assert (drawn // crops.views).equal(order)
    counts = torch.bincount((drawn % crops.views).flatten(), minlength=50)
    assert counts.min() > 40 and counts.max() < 130  # 80 on average
    assert crops.drawn(order, 0, 3).equal(drawn)
    assert not crops.drawn(order, 0, 4).equal(drawn)
    # An image's view does not depend on its batch.
    assert crops.drawn(order[:, 7:8], 0, 3).equal(drawn[:, 7:8])


def test_squares_are_cut_where_their_view_says(monkeypatch):
    from ktransfer.eval import presets

    monkeypatch.setattr(
        presets, "averaged_maps", lambda model, network, layers, paths, config, device, squares: squares
    )
    model = networks.build(NETWORK, 0, "test")
    pooled = presets.cropped_maps(model, Arm("a", replace(NETWORK, size=5), None), [], config("zhang"), CPU)
    pixels = torch.arange(2 * 3 * 64).view(2, 3, 8, 8)
    found = pooled(pixels, torch.tensor([(1 * 4 + 3) * 2, (2 * 4 + 0) * 2 + 1]))
    assert found[0].equal(pixels[0, :, 1:6, 3:8])
    assert found[1].equal(pixels[1, :, 2:7, 0:5].flip(-1))


def test_images_are_read_once_a_batch(crops):
    rows = torch.tensor([3, 3, 1, 7]) * crops.views + torch.tensor([5, 9, 0, 49])
    ((coded, maps, valid, _),) = crops.batches([rows])
    assert coded.equal(rows) and maps[:, 0].tolist() == [5, 9, 0, 49] and valid.all()


def test_ten_crop_probabilities_are_averaged(crops):
    """By hand: class 1 wins in one square by far, class 0 in nine by little."""
    probes = Probes([Layer("x", 1, 1, 0, 1)], [0.1], 2, None)
    first = int(crops.ten()[0])
    crops.pooled = lambda pixels, views: torch.where(views == first, 8.0, -0.1)[:, None]
    probes.heads[0].weight.data = torch.tensor([[0.0], [1.0]])
    share = (torch.sigmoid(torch.tensor(8.0)) + 9 * torch.sigmoid(torch.tensor(-0.1))) / 10
    predictions, rows = ten_crop_predictions(probes, crops, torch.arange(12), 35, CPU)
    assert rows.tolist() == list(range(12))
    assert (predictions == int(share > 0.5)).all() and share > 0.5
    crops.pooled = lambda pixels, views: torch.where(views == first, 8.0, -0.5)[:, None]
    assert not ten_crop_predictions(probes, crops, torch.arange(12), 35, CPU)[0].any()


def test_maps_that_are_not_standardised():
    probes = Probes([Layer("x", 2, 1, 0, 2)], [0.1], 3, None)
    assert probes.shift.tolist() == [0, 0] and probes.scale.tolist() == [1, 1]


@pytest.mark.parametrize(("preset", "network"), [("deepcluster", NETWORK), ("fair", replace(NETWORK, size=72))])
def test_the_whole_protocol_and_after_an_interruption(preset, network, tmp_path, monkeypatch):
    splits = open_splits("scenes:images=48,size=64")
    small = config(preset, epochs=2, batch=8, layers="conv1" if preset == "fair" else "conv1,conv5")
    arm = Arm("random", network, None)
    linear.check([network], splits, small, tmp_path)
    expected = linear.evaluate(arm, splits, small, tmp_path / "whole", CPU)
    assert list(expected["scores"]) == small.layers.split(",")
    assert expected["scores"]["conv1"]["lr"] == 0.01
    inner, steps = linear.probe_loss, []

    def killed(targets, views):
        loss = inner(targets, views)

        def stop(model, batch):
            steps.append(0)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return loss(model, batch)

        return stop

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(linear, "probe_loss", killed)
        linear.evaluate(arm, splits, small, tmp_path / "work", CPU)
    assert linear.evaluate(arm, splits, small, tmp_path / "work", CPU) == expected


@pytest.mark.parametrize("preset", ["deepcluster", "fair"])
def test_a_signal_is_found_and_shuffled_labels_are_not(preset, tmp_path):
    """Images of plain colours, one a class; then the same with shuffled labels."""
    train, test = (
        replace(part, classes=part.classes[:4], targets=part.targets % 4)
        for part in open_splits("scenes:images=96,size=64")
    )

    def coloured(part, seed):
        def read(row, side):
            noise = np.random.default_rng([seed, row]).integers(0, 60, (64, 64, 3))
            return (noise + 120 * np.array([part.targets[row] & 1, part.targets[row] >> 1, 0])).astype(np.uint8)

        return replace(part, read=read)

    splits = coloured(train, 0), coloured(test, 1)
    network = replace(NETWORK, size=72) if preset == "fair" else NETWORK
    small = config(preset, epochs=12, batch=16, layers="conv1", lrs="0.003")
    found = linear.evaluate(Arm("random", network, None), splits, small, tmp_path / "a", CPU)["scores"]["conv1"]
    assert found["top1"] > 0.95
    rng = np.random.default_rng(0)
    shuffled = tuple(replace(part, targets=rng.permutation(part.targets)) for part in splits)
    found = linear.evaluate(Arm("random", network, None), shuffled, small, tmp_path / "b", CPU)["scores"]["conv1"]
    assert found["top1"] < 0.65  # of 24 images; chance is 0.25
