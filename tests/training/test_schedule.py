"""Schedules, batches and the optimiser's groups, each against its rule written out."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from ktransfer.training import loop
from ktransfer.training.options import TrainOptions

CPU = torch.device("cpu")


@settings(max_examples=30)
@given(st.integers(1, 400), st.sampled_from(["cosine", "step", "sevenths", "he", "constant"]), st.floats(0, 0.5))
def test_the_rate_stays_between_0_and_1_rises_then_falls(total, schedule, warmup):
    options = TrainOptions(schedule=schedule, warmup=warmup)
    rates = [loop.rate(step, total, options) for step in range(total)]
    warm = round(warmup * total)
    assert all(0 <= value <= 1 for value in rates)
    assert rates[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert all(a >= b for a, b in zip(rates[warm:], rates[warm + 1 :], strict=False))
    assert rates[warm] == 1 if warm < total else rates[-1] == 1


def test_the_schedules_ends_and_drops():
    cosine = TrainOptions(schedule="cosine", warmup=0.1)
    assert loop.rate(0, 1000, cosine) == 0.01
    assert loop.rate(99, 1000, cosine) == loop.rate(100, 1000, cosine) == 1
    assert loop.rate(550, 1000, cosine) == pytest.approx(0.5)
    assert 0 < loop.rate(999, 1000, cosine) < 1e-5
    step = TrainOptions(schedule="step", warmup=0)
    values = [loop.rate(number, 900, step) for number in (0, 299, 300, 599, 600, 799, 800, 899)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("cosine", lambda done, step: (1 + math.cos(math.pi * done)) / 2),
        ("constant", lambda done, step: 1.0),
        ("step", lambda done, step: 10.0 ** -((done >= 1 / 3) + (done >= 2 / 3) + (done >= 8 / 9))),
        ("sevenths", lambda done, step: 10.0 ** -math.floor(3.5 * done + 1e-9)),  # 2/7, 4/7, 6/7
        ("sqrt", lambda done, step: (1 + 0.5 * 0.04 * step) ** -0.5),  # Bottou's: base times weight decay
    ],
)
def test_every_step_of_a_schedule_has_the_factor_of_its_rule(schedule, factor, warmup):
    options = replace(TrainOptions(warmup=warmup, weight_decay=0.04), schedule=schedule)
    warm = round(warmup * 84)
    for step in range(84):
        expected = (step + 1) / warm if step < warm else factor((step - warm) / (84 - warm), step)
        assert loop.rate(step, 84, options, 0.5) == pytest.approx(expected, rel=1e-12)
    assert loop.rate(0, 1, options, 0.5) == 1


@pytest.mark.parametrize(
    ("batch", "total", "drops"),
    [
        (16, 180_000, (120_000, 160_000)),  # 2x to 9x: the table of docs/papers.md
        (16, 270_000, (210_000, 250_000)),
        (16, 540_000, (480_000, 520_000)),
        (16, 810_000, (750_000, 790_000)),
        (64, 202_500, (187_500, 197_500)),  # §2.6: 9x with four times the batch
        (16, 900, (600, 800)),  # shorter than 2x: its shares
        (64, 90, (60, 80)),
    ],
)
def test_hes_rule_counts_images_from_the_end(batch, total, drops):
    options = TrainOptions(schedule="he", warmup=0, batch=batch)
    for before, (first, value) in zip((1, 0.1), zip(drops, (0.1, 0.01), strict=True), strict=True):
        assert loop.rate(first - 1, total, options) == pytest.approx(before)
        assert loop.rate(first, total, options) == pytest.approx(value)
    assert loop.rate(total - 1, total, options) == pytest.approx(0.01)
    assert loop.rate(total - 1, total, replace(options, schedule="constant")) == 1


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(2, 20), st.integers(0, 3), st.integers(0, 2**32 - 1), st.integers(0, 50))
@example(1, 2, 3, 0, 0)  # the same row follows itself again and again
def test_an_epoch_takes_each_row_once(count, batch, extra, seed, epoch):
    rows = torch.arange(count) * 3 + 7
    whole = loop.epoch_batches(rows, count, seed, epoch)
    assert whole.shape == (1, count) and sorted(whole[0].tolist()) == rows.tolist()
    found = loop.epoch_batches(rows, batch, seed, epoch, extra)
    width = min(batch, count)
    expected = [
        [int(whole[0, (start + place) % count]) for place in range(width + extra)]
        for start in range(0, count - width + 1, width)
    ]
    assert found.tolist() == expected


def test_epochs_and_seeds_differ_and_the_last_extra_row_is_the_first():
    rows = torch.arange(12)
    found = loop.epoch_batches(rows, 4, 0, 0, 1)
    assert found[2, 4] == found[0, 0] and found[0, 4] == found[1, 0]
    assert sorted(found[:, :4].flatten().tolist()) == rows.tolist()
    for seed, epoch in ((0, 1), (1, 0)):
        assert not torch.equal(found, loop.epoch_batches(rows, 4, seed, epoch, 1))
    leftover = {row for epoch in range(40) for row in set(range(13)) - set(order_of(13, epoch))}
    assert len(leftover) > 8  # not always the same row is left out


def order_of(count, epoch):
    return loop.epoch_batches(torch.arange(count), 4, 0, epoch).flatten().tolist()


def test_no_weight_decay_on_biases_and_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    model[0].weight.requires_grad_(False)
    options = TrainOptions(weight_decay=0.01, lr=0.3, momentum=0.7)
    decayed, plain = loop.sgd(model, options, CPU).param_groups
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0
    assert all(group["lr"] == 0.3 and group["momentum"] == 0.7 and group["nesterov"] for group in (decayed, plain))
    assert not loop.sgd(model, replace(options, momentum=0.0), CPU).param_groups[0]["nesterov"]
    assert [p.shape for p in decayed["params"]] == [(2, 64)]
    assert {id(p) for p in plain["params"]} == {id(p) for p in model.parameters() if p.ndim == 1}
