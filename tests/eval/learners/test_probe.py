"""The probes against scikit-learn and hand computation; that nothing of the held-out rows leaks into them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ktransfer import rng as draws
from ktransfer.artifacts.features import Features
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.learners.maps import Layer, Views
from ktransfer.eval.learners.probe import Probes, hold_out, optimiser, predict, probe_loss, scores, standardisation
from ktransfer.training import loop
from ktransfer.training.batch import Batch

CPU = torch.device("cpu")
RATES = [0.003, 0.03]


def features(rows, valid=None):
    count = len(rows)
    valid = np.ones(count, bool) if valid is None else valid
    return Features(Path("none.h5"), rows, valid, np.full(count, -1, np.int32), {})


def planted(count, classes=5, channels=12, grid=2, noise=2.0, seed=0):
    """Gaussian classes on `channels` maps, of unlike scales and offsets: (count, channels * grid ** 2) and targets."""
    means = np.random.default_rng(99).normal(size=(classes, channels, grid**2))
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, count)
    rows = means[targets] + noise * rng.normal(size=(count, channels, grid**2))
    rows = rows * np.geomspace(0.01, 30, channels)[:, None] + np.linspace(-5, 40, channels)[:, None]
    return rows.reshape(count, -1).astype(np.float32), targets


def trained(tmp_path, rows, targets, layers, classes=5, epochs=40):
    """Probes that went through the training loop, on rows 0..n-1 of a single view."""
    torch.manual_seed(0)
    probes = Probes(layers, RATES, classes, torch.from_numpy(rows))
    config = EvalConfig(epochs=epochs, batch=32, weight_decay=1e-4, precision="float32")
    everything = torch.arange(len(rows))
    loop.fit(
        probes,
        probe_loss(torch.from_numpy(targets).long(), 1),
        Views([features(rows)]),
        lambda epoch: loop.epoch_batches(everything, config.batch, config.seed, epoch),
        config,
        tmp_path,
        CPU,
        "probe",
        None,
        optimiser(probes, config.momentum, config.weight_decay),
    )
    return probes


def accuracies(probes, rows, targets):
    predictions, kept = predict(probes, Views([features(rows)]), torch.arange(len(rows)), 50, CPU)
    return (predictions == torch.from_numpy(targets)[kept]).double().mean(dim=1).numpy()


def test_as_good_as_logistic_regression(tmp_path):
    rows, targets = planted(1000)
    held, wanted = planted(2000, seed=1)
    # Two layers in one row: all maps, and the last four alone.
    layers = [Layer("all", 12, 2, 0, 48), Layer("part", 4, 2, 48, 64)]
    wide, wide_held = (np.concatenate([part, part[:, 32:]], axis=1) for part in (rows, held))
    found = accuracies(trained(tmp_path, wide, targets, layers), wide_held, wanted).reshape(2, 2)
    for place, columns in enumerate((slice(0, 48), slice(32, 48))):
        layer = layers[place]
        shift, scale = standardisation(torch.from_numpy(rows[:, columns]), Layer("x", layer.channels, 2, 0, 0))
        seen, unseen = ((part[:, columns] - shift.numpy()) * scale.numpy() for part in (rows, held))
        peer = LogisticRegression(C=1.0, max_iter=2000).fit(seen, targets).score(unseen, wanted)
        assert peer > 0.4
        assert found[place].max() > peer - 0.02
    assert found[0].min() > found[1].max()


def test_labels_without_a_meaning_stay_at_chance(tmp_path):
    rng = np.random.default_rng(3)
    rows, held = rng.normal(size=(300, 48)).astype(np.float32), rng.normal(size=(3000, 48)).astype(np.float32)
    targets, wanted = rng.integers(0, 5, 300), rng.integers(0, 5, 3000)
    probes = trained(tmp_path, rows, targets, [Layer("all", 12, 2, 0, 48)])
    assert accuracies(probes, rows, targets).max() > 0.4  # learned by heart, in part
    assert abs(accuracies(probes, held, wanted) - 0.2).max() < 4 * math.sqrt(0.2 * 0.8 / 3000)


def test_each_rate_is_trained_as_if_alone(tmp_path):
    rows, targets = planted(200)
    layer = Layer("all", 12, 2, 0, 48)
    both = trained(tmp_path / "both", rows, targets, [layer], epochs=3)
    for place, rate in enumerate(RATES):
        torch.manual_seed(0)
        shift, scale = standardisation(torch.from_numpy(rows), layer)
        x = (torch.from_numpy(rows) - shift) * scale
        head = torch.nn.Linear(48, 5)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        config = EvalConfig(epochs=3, batch=32, weight_decay=1e-4)
        adjust = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4)
        steps = [batch for epoch in range(3) for batch in loop.epoch_batches(torch.arange(200), 32, 0, epoch)]
        for step, batch in enumerate(steps):
            adjust.param_groups[0]["lr"] = rate * loop.rate(step, len(steps), config)
            value = torch.nn.functional.cross_entropy(head(x[batch]), torch.from_numpy(targets)[batch])
            adjust.zero_grad()
            value.backward()
            adjust.step()
        torch.testing.assert_close(both.heads[place].weight, head.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.heads[place].bias, head.bias, rtol=1e-4, atol=1e-5)


def test_standardised_channels_have_mean_0_and_deviation_1():
    rows = torch.from_numpy(planted(300)[0])
    layer = Layer("all", 12, 2, 0, 48)
    shift, scale = standardisation(rows, layer)
    by_channel = ((rows - shift) * scale).view(300, 12, 4)
    torch.testing.assert_close(by_channel.mean(dim=(0, 2)), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(by_channel.std(dim=(0, 2), correction=0), torch.ones(12), atol=1e-4, rtol=0)
    # By channel, not by number: the cells of a map keep their differences.
    assert by_channel.mean(dim=0).abs().max() > 0.02
    # As batch norm without scale does in training mode.
    norm = torch.nn.BatchNorm2d(12, affine=False, eps=1e-12)
    torch.testing.assert_close(norm(rows.view(300, 12, 2, 2)).flatten(1), (rows - shift) * scale, atol=1e-3, rtol=1e-3)
    dead = rows.clone()
    dead[:, 4:8] = 3
    shift, scale = standardisation(dead, layer)
    assert ((dead - shift) * scale).isfinite().all()


def wilson(hits, total):
    """Both roots p of |hits / total - p| = z sqrt(p (1 - p) / total), by bisection."""
    z, share = 1.959963984540054, hits / total

    def root(low, high):
        def outside(p):
            return abs(share - p) > z * math.sqrt(p * (1 - p) / total)

        for _ in range(100):
            middle = (low + high) / 2
            if outside(middle) == outside(low):
                low = middle
            else:
                high = middle
        return low

    return [0.0 if hits == 0 else root(0.0, share), 1.0 if hits == total else root(1.0, share)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.data())
def test_wilson_interval(total, data):
    hits = data.draw(st.integers(0, total))
    wanted = torch.zeros(total, dtype=torch.int64)
    predicted = (torch.arange(total) >= hits).long()
    found = scores(predicted, wanted)
    assert found["top1"] == pytest.approx(hits / total)
    assert found["top1_interval"] == pytest.approx(wilson(hits, total), abs=1e-5)
    assert found["mean_class"] == pytest.approx(hits / total)


def test_published_wilson_intervals():
    # Newcombe (Statistics in Medicine 1998, table I): 81/263, 15/148, 0/20, 1/29.
    for hits, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        predicted = (torch.arange(total) >= hits).long()
        assert scores(predicted, torch.zeros(total, dtype=torch.int64))["top1_interval"] == pytest.approx(
            [low, high], abs=6e-5
        )


def test_mean_per_class_of_unlike_classes_by_hand():
    # Class 0: 6 of 8, class 1: none in the test, class 2: 1 of 2, class 3: 0 of 1, class 4: 3 of 3.
    wanted = torch.tensor([0] * 8 + [2] * 2 + [3] + [4] * 3)
    predicted = torch.tensor([0, 0, 0, 0, 0, 0, 1, 4, 2, 0, 4, 4, 4, 4])
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    found = scores(predicted[order], wanted[order])
    assert found["top1"] == pytest.approx(10 / 14)
    mean = (6 / 8 + 1 / 2 + 0 + 1) / 4
    assert found["mean_class"] == pytest.approx(mean)
    variance = sum((h + 1) / (n + 2) * (n - h + 1) / (n + 2) / n for h, n in ((6, 8), (1, 2), (0, 1), (3, 3)))
    half = 1.959964 * math.sqrt(variance) / 4
    assert found["mean_class_interval"] == pytest.approx([max(0, mean - half), min(1, mean + half)])


def test_interval_of_the_mean_per_class_covers_the_truth():
    """Of 300 draws from known accuracies the 95 % interval holds the true mean in 90 to 100 %."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.9, 0.2, 0.5, 0.7])
    wanted = torch.arange(4).repeat_interleave(torch.tensor([60, 10, 25, 15]))
    inside = 0
    for _ in range(300):
        right = torch.rand(len(wanted), generator=generator) < truth[wanted]
        low, high = scores(torch.where(right, wanted, (wanted + 1) % 4), wanted)["mean_class_interval"]
        inside += low <= truth.mean() <= high
    assert 270 <= inside <= 299


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_wrong_and_all_right(share):
    wanted = torch.arange(5).repeat(20)
    found = scores(wanted if share else (wanted + 1) % 5, wanted)
    assert found["top1"] == found["mean_class"] == share
    for measure in ("top1", "mean_class"):
        low, high = found[f"{measure}_interval"]
        assert -1e-12 <= low <= share <= high + 1e-12 <= 1 + 2e-12
        assert high - low > 0.01  # never certain
    one = scores(torch.tensor([3]), torch.tensor([3]))
    assert one["top1"] == 1
    assert one["top1_interval"][0] == pytest.approx(1 / (1 + 1.959964**2))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 500), st.integers(0, 2**32 - 1))
def test_hold_out_is_a_partition_and_pure(count, seed):
    learning, held = hold_out(count, 0.1, seed)
    assert sorted(torch.cat([learning, held]).tolist()) == list(range(count))
    assert len(held) == max(1, round(count / 10))
    again = hold_out(count, 0.1, seed)
    assert learning.equal(again[0])
    assert held.equal(again[1])


@pytest.mark.parametrize(("share", "held"), [(0.1, 2), (0.13, 3), (0.01, 1)])
def test_hold_out_takes_the_least_words_of_the_seed(share, held):
    words = draws.words(6, "eval/hold-out", 0, torch.arange(20), 1)[:, 0].tolist()
    ranked = sorted(range(20), key=words.__getitem__)
    learning, chosen = hold_out(20, share, 6)
    assert chosen.tolist() == ranked[:held] and learning.tolist() == ranked[held:]


def test_hold_out_depends_on_the_seed_and_mixes():
    parts = [set(hold_out(1000, 0.1, seed)[1].tolist()) for seed in (0, 1)]
    assert len(parts[0] & parts[1]) < 30
    halves = np.array(sorted(parts[0]))
    assert 25 < (halves < 500).sum() < 75


def test_views_return_the_mirrored_view_for_odd_codes():
    rng = np.random.default_rng(0)
    plain, mirrored = rng.normal(size=(2, 9, 4)).astype(np.float32)
    valid = np.arange(9) != 4
    both = Views([features(plain, valid), features(mirrored, valid)])
    codes = torch.tensor([0, 1, 17, 8, 9, 6, 6])
    [(rows, maps, found, _)] = both.batches([codes])
    assert rows.equal(codes)
    wanted = [plain[0], mirrored[0], mirrored[8], plain[4], mirrored[4], plain[3], plain[3]]
    np.testing.assert_array_equal(maps.numpy(), np.stack(wanted))
    assert found.tolist() == [True, True, True, False, False, True, True]
    single = Views([features(mirrored.astype(np.float16), valid)])
    [(_, maps, _, _)] = single.batches([torch.tensor([8, 1])])
    assert maps.dtype == torch.float32
    np.testing.assert_array_equal(maps.numpy(), mirrored[[8, 1]].astype(np.float16).astype(np.float32))


def test_loss_takes_the_image_of_either_view_and_leaves_broken_ones_out():
    rows, targets = planted(6)
    layers = [Layer("first", 8, 2, 0, 32), Layer("second", 4, 2, 32, 48)]
    torch.manual_seed(0)
    probes = Probes(layers, RATES, 5, torch.from_numpy(rows))
    for head in probes.heads:
        torch.nn.init.normal_(head.weight)
    codes, valid = torch.tensor([7, 4, 11]), torch.tensor([True, False, True])
    batch = Batch(codes, torch.from_numpy(rows[[3, 2, 5]]), valid, 0)
    value, sums = probe_loss(torch.from_numpy(targets).long(), 2)(probes, batch)
    logits = probes(torch.from_numpy(rows[[3, 5]]))
    assert len(logits) == 4
    wanted = torch.from_numpy(targets[[3, 5]])
    torch.testing.assert_close(value, sum(torch.nn.functional.cross_entropy(part, wanted) for part in logits))
    assert int(sums["count"]) == 2


def test_predictions_leave_broken_images_out():
    rows, _ = planted(10)
    valid = np.arange(10) % 3 != 0
    probes = Probes([Layer("all", 12, 2, 0, 48)], RATES, 5, torch.from_numpy(rows))
    torch.nn.init.normal_(probes.heads[1].weight)
    predictions, kept = predict(probes, Views([features(rows, valid)]), torch.tensor([9, 8, 2, 3, 4]), 2, CPU)
    assert kept.tolist() == [8, 2, 4]
    assert predictions.shape == (2, 3)
    for place, row in enumerate((8, 2, 4)):
        assert predictions[1, place] == probes(torch.from_numpy(rows[row : row + 1]))[1].argmax()
