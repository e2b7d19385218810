"""The student's loss against the formula by hand, its batches, and its average."""

import numpy as np
import pytest
import torch
from torch import nn

from ktransfer.detection.data import open_detection
from ktransfer.retrain import student
from ktransfer.training import loop


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
    model = student.Student(made, average).train()
    assert not average[1].training
    model.follow(0.75)
    assert torch.allclose(average[0].weight, 0.75 * before + 0.25 * made[0].weight)
    assert torch.equal(average[1].running_mean, torch.full((2,), 3.0))
    assert model.result() is average
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert student.Student(made).result() is made


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


def test_joined_pictures_are_those_of_both():
    train, test = open_detection("scenes:images=12,size=64")
    both = student.joined(train, test)
    assert len(both) == len(train) + len(test)
    assert np.array_equal(both.read(3, None), train.read(3, None))
    assert np.array_equal(both.read(len(train) + 2, None), test.read(2, None))
    assert both.objects[len(train) + 2] is test.objects[2]
