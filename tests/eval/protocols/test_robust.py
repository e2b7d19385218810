"""The robust protocol on images whose labels can be seen: what must fall falls, and nothing leaks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ktransfer.errors import BrokenImage, UsageError
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.corruptions import KINDS
from ktransfer.eval.learners.classifier import choose, noisy_labels, prepare
from ktransfer.eval.protocols import robust
from ktransfer.networks import Network

CPU = torch.device("cpu")
CONFIG = EvalConfig(
    epochs=6,
    batch=16,
    weight_decay=1e-4,
    lrs="0.001,0.01",
    precision="float32",
    layers="conv1,conv3",
    robust_images=24,
    robust_eps="2,40",
    robust_noise="0.3,1",
    robust_steps=5,
)
ARM = Arm("random", Network("alexnet_bn", 0.05, 2, 35), None)


@pytest.fixture(scope="module")
def splits(painted):
    return painted(90, 1), painted(45, 2)


@pytest.fixture(scope="module")
def found(splits, tmp_path_factory):
    return robust.evaluate(ARM, splits, CONFIG, tmp_path_factory.mktemp("robust") / "work", CPU)


def counted(data):
    rows = []

    def read(row, side):
        rows.append(row)
        return data.read(row, side)

    return replace(data, read=read), rows


def test_what_must_fall_falls(found):
    cells = found["scores"]
    assert cells["clean"]["top1"] > 0.9
    assert cells["clean"]["images"] == 24
    assert cells["clean"]["held_out"] > 0.8
    assert cells["clean"]["layer"] in ("conv1", "conv3")
    assert cells["corrupted"]["top1"] < cells["clean"]["top1"]
    levels = [cells[f"severity {level}"]["by_severity"] for level in range(1, 6)]
    assert levels == sorted(levels, reverse=True)
    assert levels[4] < levels[0]
    attacked = [cells[f"eps {eps}"]["by_eps"] for eps in (2, 40)]
    assert cells["clean"]["top1"] >= attacked[0] >= attacked[1]
    assert attacked[1] < 0.2
    kinds = [cells[kind.replace("_", " ")]["by_kind"] for kind in KINDS]
    assert cells["corrupted"]["top1"] == pytest.approx(np.mean(kinds))
    assert cells["corrupted"]["top1"] == pytest.approx(np.mean(levels))
    # At a share of 1 `pair` teaches the next class, `uniform` nothing.
    assert cells["pair 1"]["by_noise"] < 0.1
    assert cells["uniform 1"]["by_noise"] < 0.9
    assert cells["uniform 0.3"]["by_noise"] > 0.75


def test_every_measure_lies_in_its_interval(found):
    for cell in found["scores"].values():
        for name in [name for name in cell if name.endswith("_interval")]:
            low, high = cell[name]
            assert 0 <= low <= cell[name.removesuffix("_interval")] <= high + 1e-12 <= 1 + 1e-9


def test_mce_by_hand(found):
    other = {**found, "scores": {"corrupted": {}}, "hits": {kind: [5, 3] * 12 for kind in KINDS}}
    first = {**found, "scores": {"corrupted": {}}, "hits": {kind: [1, 1] * 12 for kind in KINDS}}
    first["hits"]["fog"] = [5] * 24  # no errors: counted as one
    evaluated = {"random": first, "mine": other}
    robust.relate(evaluated, CONFIG)
    assert "hits" not in first
    assert first["scores"]["corrupted"]["mce"] == pytest.approx(14 / 15)
    mine = evaluated["mine"]["scores"]["corrupted"]
    assert mine["mce"] == pytest.approx((14 * 0.25 + 24) / 15)  # 24 errors of 120 against 96 of 120
    assert mine["mce_reference"] == "random"
    assert mine["mce_interval"][0] < mine["mce"] < mine["mce_interval"][1]


def test_calibration_by_hand():
    confidence = np.array([0.95, 0.97, 0.5, 0.52, 1.0, 1 / 15])
    hit = np.array([True, False, False, True, True, False])
    # Bins of a fifteenth: 14 holds 0.95, 0.97, 1.0; 7 holds 0.5, 0.52; 0 holds 1/15, its upper end.
    wanted = (abs(2.92 - 2) + abs(1.02 - 1) + 1 / 15) / 6
    assert robust.expected_calibration_error(confidence, hit) == pytest.approx(wanted)
    draws = np.random.default_rng(0)
    certain = draws.random(200_000)
    assert robust.expected_calibration_error(certain, draws.random(200_000) < certain) < 0.01
    assert robust.expected_calibration_error(certain, draws.random(200_000) < certain**2) > 0.1


def test_wrong_labels():
    targets = torch.arange(20_000) % 4
    for share in (0.25, 0.5):
        pair = noisy_labels(targets, share, "pair", 4, 0)
        assert float((pair != targets).float().mean()) == pytest.approx(share, abs=0.02)
        assert ((pair == targets) | (pair == (targets + 1) % 4)).all()
        uniform = noisy_labels(targets, share, "uniform", 4, 0)
        assert float((uniform != targets).float().mean()) == pytest.approx(share * 0.75, abs=0.02)
        assert set(((uniform - targets) % 4).unique().tolist()) == {0, 1, 2, 3}
    less, more = (noisy_labels(targets, share, "uniform", 4, 0) for share in (0.25, 0.5))
    wrong = less != targets
    assert less[wrong].equal(more[wrong])


def test_the_test_part_is_read_once_and_only_what_was_drawn(splits, tmp_path):
    test, rows = counted(splits[1])
    config = replace(CONFIG, epochs=1, robust_images=10, layers="conv1", lrs="0.01", robust_eps="1", robust_noise="0.5")
    robust.evaluate(ARM, (splits[0], test), config, tmp_path / "a", CPU)
    assert len(rows) == len(set(rows)) == 10
    again, others = counted(splits[1])
    robust.evaluate(ARM, (splits[0], again), replace(config, seed=1), tmp_path / "b", CPU)
    assert set(others) != set(rows)


def test_the_margin_of_an_image_is_not_looked_at(splits, found, tmp_path):
    """Of squares of 40 pixels a network of 35 sees the centre; what stands in the 2 pixels around it is nothing."""

    def framed(part):
        def read(row, side):
            pixels = np.full((40, 40, 3), 255 * (row % 2), np.uint8)
            pixels[2:-2, 2:-2] = part.read(row, side)[2:-2, 2:-2]
            return pixels

        return replace(part, read=read)

    again = robust.evaluate(ARM, tuple(framed(part) for part in splits), CONFIG, tmp_path / "work", CPU)
    assert again == found


def test_labels_of_the_test_part_choose_nothing(splits, found, tmp_path):
    """With the test labels moved by one, every right prediction becomes wrong, and what was chosen stays."""
    moved = replace(splits[1], targets=((splits[1].targets + 1) % 3).astype(np.int32))
    other = robust.evaluate(ARM, (splits[0], moved), CONFIG, tmp_path / "work", CPU)["scores"]
    for name in ("layer", "lr", "held_out"):
        assert other["clean"][name] == found["scores"]["clean"][name]
    assert other["clean"]["top1"] <= 1 - found["scores"]["clean"]["top1"]


def test_shuffled_labels_stay_at_chance(splits, tmp_path):
    draws = np.random.default_rng(0)
    shuffled = [replace(part, targets=draws.permutation(part.targets)) for part in splits]
    config = replace(CONFIG, robust_images=0, robust_eps="1", robust_noise="0.5")
    cells = robust.evaluate(ARM, tuple(shuffled), config, tmp_path / "work", CPU)["scores"]
    assert 1 / 3 - 0.25 < cells["clean"]["top1"] < 1 / 3 + 0.25


def test_killed_it_goes_on_to_the_same(splits, found, tmp_path, monkeypatch):
    whole = robust._outcomes
    calls = []

    def once(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(robust, "FORWARD_BATCH", 10)
        patch.setattr(robust, "_outcomes", once)
        robust.evaluate(ARM, splits, CONFIG, tmp_path / "work", CPU)
    monkeypatch.setattr(robust, "FORWARD_BATCH", 10)
    again = robust.evaluate(ARM, splits, CONFIG, tmp_path / "work", CPU)
    # Batches of another size than in `found`: the same predictions.
    assert again["hits"] == found["hits"]
    for column, cell in found["scores"].items():
        for name, value in cell.items():
            assert again["scores"][column][name] == pytest.approx(value, abs=1e-4), (column, name)


def test_broken_images_are_left_out(splits, tmp_path):
    def read(row, side):
        if row % 15 == 2:
            raise BrokenImage("torn")
        return splits[1].read(row, side)

    config = replace(CONFIG, epochs=1, layers="conv1", lrs="0.01", robust_images=0, max_broken=0.2, robust_eps="1")
    found = robust.evaluate(ARM, (splits[0], replace(splits[1], read=read)), config, tmp_path / "work", CPU)
    assert found["scores"]["clean"]["images"] == 42
    assert found["broken"] == [f"painted2/{row}: torn" for row in (2, 17, 32)]


def test_a_batch_without_a_readable_image(splits, tmp_path, monkeypatch):
    """45 images in batches of 11: the third batch and the last, of one image, are broken altogether."""
    torn = {*range(22, 33), 44}

    def read(row, side):
        if row in torn:
            raise BrokenImage("torn")
        return splits[1].read(row, side)

    told, calls = robust._outcomes, []

    def killed(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args[3].tolist())
        return told(*args)

    broken = replace(splits[1], read=read)
    config = replace(CONFIG, epochs=1, layers="conv1", lrs="0.01", robust_images=0, max_broken=0.3, robust_eps="1")
    monkeypatch.setattr(robust, "FORWARD_BATCH", 11)
    whole = robust.evaluate(ARM, (splits[0], broken), config, tmp_path / "whole", CPU)
    assert whole["scores"]["clean"]["images"] == 33
    assert [line.split(":")[0] for line in whole["broken"]] == [f"painted2/{row}" for row in sorted(torn)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(robust, "_outcomes", killed)
        robust.evaluate(ARM, (splits[0], broken), config, tmp_path / "work", CPU)
    assert robust.evaluate(ARM, (splits[0], broken), config, tmp_path / "work", CPU) == whole
    assert calls == [list(range(11)), list(range(11, 22))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"robust_eps": "0"}, "--robust-eps 0: must be numbers above 0 and up to 255"),
        ({"robust_eps": "a,1"}, "--robust-eps a,1"),
        ({"robust_noise": "0.5,1.5"}, "--robust-noise 0.5,1.5: must be numbers above 0 and up to 1"),
        ({"cache": 1e-6}, "--cache 1e-06: robust keeps the feature maps of 2 layers"),
        ({"lrs": "x"}, "--lrs x"),
        ({"layers": "conv9"}, "--layers conv9"),
    ],
)
def test_misuse_is_one_line(splits, tmp_path, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        robust.check([ARM.network], splits, replace(CONFIG, **options), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_best_layer_and_rate_are_chosen_on_held_out_images(splits, tmp_path):
    """Shuffled labels, so that luck decides: one by one, the same heads tell as many, and the luckiest was taken."""
    train = replace(splits[0], targets=np.random.default_rng(3).permutation(splits[0].targets))
    config = replace(CONFIG, epochs=2)

    def chosen(name, **options):
        return choose(prepare(ARM, train, replace(config, **options), tmp_path / name, CPU))

    pairs = [(layer, rate) for layer in ("conv1", "conv3") for rate in ("0.001", "0.01")]
    alone = {pair: chosen("-".join(pair), layers=pair[0], lrs=pair[1]).held_out for pair in pairs}
    assert min(alone.values()) < max(alone.values())
    best = chosen("all")
    assert best.held_out == max(alone.values())
    assert alone[best.layer.name, str(best.rate)] == best.held_out
