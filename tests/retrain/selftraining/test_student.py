"""The student's loss against the formula by hand, its batches, and its average."""

import numpy as np
import pytest
import torch
from torch import nn

from ktransfer.detection import canvas, detectors, trunks
from ktransfer.detection.losses import Truth
from ktransfer.detection.opening import open_detection
from ktransfer.networks import Network
from ktransfer.retrain import SelftrainConfig
from ktransfer.retrain.selftraining import detecting, student
from ktransfer.training import loop
from ktransfer.training.batch import Batch


def test_the_moving_averages_are_those_of_numpy():
    model = student.Student(nn.Linear(1, 1))
    generator = np.random.default_rng(0)
    pairs = generator.uniform(0.1, 3, (20, 2))
    decay = 0.9
    for step, (human, pseudo) in enumerate(pairs):
        ratio = model.remember(torch.tensor(human), torch.tensor(pseudo), decay)
        weights = decay ** np.arange(step, -1, -1)
        means = (weights[:, None] * pairs[: step + 1]).sum(0) / weights.sum()
        assert float(ratio) == pytest.approx(means[0] / means[1], rel=1e-5)
    assert {"human", "pseudo", "weight"} <= set(model.state_dict())


def test_a_pseudo_loss_of_zero_gives_no_infinity():
    model = student.Student(nn.Linear(1, 1))
    assert torch.isfinite(model.remember(torch.tensor(1.0), torch.tensor(0.0), 0.9))


def test_the_average_follows_and_is_the_result():
    made, average = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = average[0].weight.detach().clone()
    made[1].running_mean.fill_(3.0)
    model = student.Student(made, average, 0.15).train()
    assert not average[1].training
    model.follow()
    once = 0.1 * before + 0.9 * made[0].weight
    assert torch.allclose(average[0].weight, once)
    assert torch.equal(average[1].running_mean, torch.full((2,), 3.0))
    with torch.no_grad():
        made[0].weight.fill_(5.0)
    assert model.result() is average
    assert torch.allclose(average[0].weight, 0.15 * once + 0.85 * 5.0)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert student.Student(made).result() is made


class Counting(nn.Module):
    """In place of a detector: losses that can be told by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels, targets):
        labels = torch.cat([target["labels"] for target in targets]).float()
        return {"a": self.weight * labels.mean(), "b": self.weight**2 * pixels.mean().abs()}

    def by_hand(self, pixels, labels):
        weight = self.weight.item()
        return weight * float(np.mean(labels)) + weight**2 * float(pixels.mean().abs())


@pytest.mark.parametrize("balance", ["normalised", "plain"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_is_the_formula(balance, compiled):
    """L = (L_h + a * mean(L_h) / mean(L_p) * L_p) / (1 + a), and L_h + a * L_p, over two steps."""
    box = torch.tensor([[1.0, 1.0, 20.0, 20.0]])
    boxes = [box, box.repeat(2, 1), box, box]
    labels = [torch.tensor(own) for own in ([3], [5, 7], [11], [13])]
    truth = Truth(boxes, labels, torch.full((4, 2), 32.0), 32)
    alpha, decay = 0.3, 0.8
    loss = student.losses(truth, "imagenet", "none", 0, student.Weighing(balance, alpha, decay), split=2)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    seen = canvas.normalise(pixels, truth.extents, "imagenet")
    model = student.Student(Counting())
    called = torch.compile(model, backend="eager") if compiled else model
    shift = 1  # it is no RetinaNet
    means = np.zeros(2)
    with torch.compiler.set_stance("force_eager"):
        for weight in (2.0, 0.5):
            with torch.no_grad():
                model.detector.weight.fill_(weight)
            order = torch.tensor([2, 0, 3, 1])
            value, sums = loss(called, Batch(order, pixels[order], torch.ones(4).bool(), 0))
            human = model.detector.by_hand(seen[:2], np.array([3, 5, 7]) + shift)
            pseudo = model.detector.by_hand(seen[2:], np.array([11, 13]) + shift)
            means = decay * means + (1 - decay) * np.array([human, pseudo])
            weighed = human + alpha * pseudo
            if balance == "normalised":
                weighed = (human + alpha * means[0] / means[1] * pseudo) / (1 + alpha)
            assert value.item() == pytest.approx(weighed, rel=1e-5)
            assert float(sums["human_loss"]) == pytest.approx(4 * human, rel=1e-5)
            assert float(sums["pseudo_loss"]) == pytest.approx(4 * pseudo, rel=1e-5)
            assert (int(sums["human_boxes"]), int(sums["pseudo_boxes"]), int(sums["count"])) == (6, 4, 4)


def test_a_half_without_boxes_weighs_no_more_than_others():
    """A RetinaNet's halves add up to its loss on the whole batch, also where one of them has no positive anchor."""
    trunk = trunks.build(Network("alexnet", 0.05, 2, 64, 0, "imagenet", "random"), None, "p3-p7", "gn", 0, 16)
    model = detectors.build(trunk, 2, 64, detectors.Settings(), 0).train()
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    mine = torch.tensor([True, False, True, False])
    for targets in ([box, box, box, none], [box, none, none, none], [none, none, none, box], [none] * 4):
        whole = student.total(model, pixels, targets)
        assert sum(student.halves(model, pixels, targets, mine)).item() == pytest.approx(whole.item(), rel=1e-5)
    alone = student.halves(model, pixels, [box] * 4, torch.ones(4).bool())
    assert [part.item() for part in alone] == [pytest.approx(student.total(model, pixels, [box] * 4).item()), 0.0]


def test_each_step_has_both_halves_and_each_pass_all_of_them():
    human, pseudo = torch.arange(10), torch.arange(10, 37)
    epochs = [student.batches(human, pseudo, 4, 5, epoch) for epoch in range(20)]
    assert all(torch.equal(rows, student.batches(human, pseudo, 4, 5, epoch)) for epoch, rows in enumerate(epochs))
    for epoch, rows in enumerate(epochs):
        assert rows.shape == (2, 8)
        assert torch.equal(rows[:, ::2], loop.epoch_batches(human, 4, 5, epoch))
    drawn = torch.cat([rows[:, 1::2].flatten() for rows in epochs])
    for start in range(0, len(drawn) - 27, 27):
        assert sorted(drawn[start : start + 27].tolist()) == pseudo.tolist()
    assert not torch.equal(drawn[:27], drawn[27:54])


def test_joined_images_are_those_of_both():
    train, test = open_detection("scenes:images=12,size=64")
    both = student.joined(train, test)
    assert len(both) == len(train) + len(test)
    assert np.array_equal(both.read(3, None), train.read(3, None))
    assert np.array_equal(both.read(len(train) + 2, None), test.read(2, None))
    assert both.objects[len(train) + 2] is test.objects[2]


def test_settings_of_the_paper_are_the_defaults():
    config = SelftrainConfig()
    assert (config.size, config.threshold, config.detector, config.rounds) == (640, 0.5, "retinanet", 1)
    assert (config.batch, config.weight_decay) == (256, 1e-4)
    assert detecting.NECKS["retinanet"] == "p3-p7"
