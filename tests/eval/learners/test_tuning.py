"""Networks that learn the labels: what each strategy moves, what chooses the rate, and what nobody may look at."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ktransfer import networks
from ktransfer.errors import StageError, UsageError
from ktransfer.eval.arms import Arm, model_of
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.learners import tuning
from ktransfer.eval.learners.probe import hold_out
from ktransfer.eval.protocols import finetune, nonlinear
from ktransfer.networks import Network

CPU = torch.device("cpu")
CONFIG = EvalConfig(
    protocol="finetune",
    epochs=2,
    batch=8,
    weight_decay=5e-4,
    precision="float32",
    lrs="0.01",
    test_crops=2,
    strategy="joint",
)
NETWORK = Network("alexnet_bn", 0.05, 2, 35)
ARM = Arm("random", NETWORK, None)


def learned(start, phases, painted, tmp_path, config=CONFIG, network=NETWORK):
    """Weights before and after a training, and what it is that lies before."""
    data = painted(24, 0)
    model, before = start()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    train = tuning.Labelled(data, network, config, CPU)
    tuning.tune(model, before, phases, 0.01, train, torch.arange(24), network, config, tmp_path, CPU, "test")
    return first, model.state_dict(), before


def moved(first, last):
    return {name for name in first if not first[name].equal(last[name])}


def silent(names):
    """A bias before a batch norm has no say, and may move or not."""
    return {name for name in names if name.startswith("conv") and name.endswith("bias")}


@pytest.mark.parametrize("layer", ["conv1", "conv3", "conv5", "fc6", "fc7"])
def test_what_a_frozen_layer_leaves_to_learn(layer, painted, tmp_path):
    whole = replace(NETWORK, classes=9)
    arm = Arm("random", NETWORK, None, whole)
    first, last, before = learned(
        lambda: nonlinear._start(arm, layer, 3, 0), (tuning.Phase(1.0, 0.0),), painted, tmp_path
    )
    kinds = ["1", "2", "3", "4", "5", "6", "7", "8"]
    kept = set(kinds[: kinds.index(layer[-1]) + 1])
    assert {name.split(".")[0][-1] for name in before.names} == kept
    assert moved(first, last) | silent(first) == {name for name in first if name not in before.names} | silent(first)
    assert moved(first, last) & before.names == set()
    # The arm's own up to there, and nothing of it after.
    source = model_of(replace(arm, network=whole) if layer.startswith("fc") else arm, 0).state_dict()
    fresh = networks.build(replace(NETWORK, classes=3), 0, "eval/nonlinear").state_dict()
    for name, value in first.items():
        assert value.equal((source if name in before.names else fresh)[name]), name
        if name.endswith("weight") and value.ndim > 1 and name in source and name not in before.names:
            assert value.shape != source[name].shape or not value.equal(source[name])


@pytest.mark.parametrize("arch", ["alexnet", "alexnet_bn"])
@pytest.mark.parametrize("strategy", list(finetune.STRATEGIES))
def test_what_a_strategy_moves(strategy, arch, painted, tmp_path):
    arm = Arm("random", replace(NETWORK, arch=arch), None)
    first, last, before = learned(
        lambda: finetune._start(arm, 3, 0, None), finetune.STRATEGIES[strategy], painted, tmp_path, CONFIG, arm.network
    )
    assert {name.split(".")[0] for name in first if name not in before.names} <= {"fc6", "fc7", "fc8", "bn6", "bn7"}
    new = {name for name in first if name not in before.names}
    wanted = new if strategy == "frozen" else set(first)
    hidden = silent(first) if arch == "alexnet_bn" else set()
    if arch == "alexnet_bn":
        hidden |= {"fc6.bias", "fc7.bias"}
    assert moved(first, last) | hidden == wanted | hidden
    if strategy == "frozen":
        assert not moved(first, last) & before.names
    if strategy == "staged":
        half = load_file(tmp_path / "0" / "model.safetensors")
        assert moved(first, half) | hidden == new | hidden and not moved(first, half) & before.names
        assert moved(half, last) | hidden == set(first) | hidden
    source = model_of(arm, 0).state_dict()
    assert before.names == set(source)
    assert all(first[name].equal(source[name]) for name in source)


@pytest.mark.parametrize(
    ("network", "new"),
    [
        (Network("resnet18", size=32, classes=5), {"fc.weight", "fc.bias"}),
        (Network("mobilenet_v2", size=32, classes=5), {"classifier.1.weight", "classifier.1.bias"}),
        (Network("vgg16_bn", 0.05, size=32, classes=0), {"head.weight", "head.bias"}),
    ],
)
def test_the_trunks_of_others(network, new):
    arm = Arm("random", network, None)
    model, before = finetune._start(arm, 3, 0, None)
    state, source = model.state_dict(), model_of(arm, 0).state_dict()
    assert set(state) - before.names == new
    assert all(state[name].equal(source[name]) for name in before.names)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    if network.classes:
        model, before = nonlinear._start(arm, {"r": "layer2", "m": "features.3"}[network.arch[0]], 3, 0)
        assert before.names < set(source) and model.state_dict().keys() - before.names > new


def test_rates_and_decay_of_a_step():
    model, before = finetune._start(ARM, 3, 0, None)
    adjust = tuning.optimiser(model, before, tuning.Phase(1.0, 0.1), 0.02, CONFIG)
    names = {id(weight): name for name, weight in model.named_parameters()}
    seen = set()
    for group in adjust.param_groups:
        for weight in group["params"]:
            name = names[id(weight)]
            seen.add(name)
            assert group["lr"] == pytest.approx(0.002 if name in before.names else 0.02)
            assert group["weight_decay"] == (5e-4 if weight.ndim > 1 else 0)
            assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert seen == set(names.values())
    # Frozen and thawed again.
    tuning.optimiser(model, before, tuning.Phase(1.0, 0.0), 0.02, CONFIG)
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {
        name for name in names.values() if name in before.names
    }
    tuning.optimiser(model, before, tuning.Phase(1.0, 1.0), 0.02, CONFIG)
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_phases_share_all_epochs_and_no_more():
    staged, layerwise = finetune.STRATEGIES["staged"], finetune.STRATEGIES["layerwise"]
    for epochs, wanted in ((2, [1, 1]), (5, [2, 3]), (7, [4, 3]), (60, [30, 30]), (1, [1, 1])):
        assert tuning.epochs_of(staged, epochs) == wanted
        assert tuning.epochs_of(layerwise, epochs) == [epochs]


def test_a_staged_training_takes_as_many_steps_as_it_was_given_epochs(painted, tmp_path, monkeypatch):
    steps, loss = [], tuning.crop_loss
    monkeypatch.setattr(tuning, "crop_loss", lambda *given, **more: steps.append(0) or loss(*given, **more))
    start = partial(finetune._start, ARM, 3, 0, None)
    learned(start, finetune.STRATEGIES["staged"], painted, tmp_path, replace(CONFIG, epochs=5))
    assert len(steps) == 5 * 24 // CONFIG.batch


def test_frozen_batch_norms_and_dropouts_work_as_in_a_test():
    model, before = finetune._start(ARM, 3, 0, None)
    tuned = tuning.Tuned(model, before.modules).train()
    assert not any(model.get_submodule(name).training for name in before.modules)
    assert model.bn6.training and model.training
    assert not tuned.eval().model.bn6.training


def evaluated(
    painted, tmp_path, config=CONFIG, several=False, train=None, test=None, name="work", protocol=finetune, arm=ARM
):
    splits = train or painted(60, 0, several), test or painted(45, 1, several)
    return protocol.evaluate(arm, splits, config, tmp_path / name, CPU)


def shuffled(data, seed):
    order = np.random.default_rng(seed).permutation(len(data))
    return replace(data, targets=data.targets[order], tags=None if data.tags is None else data.tags[order])


@pytest.mark.parametrize("several", [False, True])
def test_colours_are_learned_and_shuffled_labels_are_not(several, painted, tmp_path):
    config = replace(CONFIG, epochs=8)
    measure = "map" if several else "top1"
    train = painted(90, 0, several)
    found = evaluated(painted, tmp_path, config, several, train)["scores"]["joint"]
    assert found[measure] > 0.9
    assert ("map" in found) == several
    found = evaluated(
        painted, tmp_path, config, several, shuffled(train, 5), shuffled(painted(150, 1, several), 6), name="shuffled"
    )
    # A third is right by chance, give or take 4 deviations; a mAP of guesses is about the share of images, a half.
    chance, room = (0.5, 0.15) if several else (1 / 3, 0.16)
    assert abs(found["scores"]["joint"][measure] - chance) < room


def test_images_that_are_not_counted_teach_nothing(painted, tmp_path):
    data = painted(30, 0, True)
    tags = data.tags.copy()
    tags[:, 1] = -1
    train = tuning.Labelled(replace(data, tags=tags), NETWORK, CONFIG, CPU)
    logits = torch.randn(30, 3, requires_grad=True)
    loss = train.loss(logits, torch.arange(30))
    loss.backward()
    assert not logits.grad[:, 1].any() and logits.grad[:, 0].all()
    chance = logits.detach().double().sigmoid()[:, [0, 2]].numpy()
    wanted = tags[:, [0, 2]]
    by_hand = -(wanted * np.log(chance) + (1 - wanted) * np.log(1 - chance)).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-5)


def counted(data):
    rows = []

    def read(row, side):
        rows.append(row)
        return data.read(row, side)

    return replace(data, read=read), rows


@pytest.mark.parametrize("protocol", [finetune, nonlinear])
def test_the_test_part_is_read_once_and_chooses_nothing(protocol, painted, tmp_path, monkeypatch):
    config = replace(CONFIG, epochs=1, lrs="0.01,0.02", strategy="frozen,joint", layers="conv2,conv5")
    config = replace(config, protocol=protocol.__name__.split(".")[-1])
    train, (test, rows) = painted(60, 0), counted(painted(24, 1))
    asked = []
    predictions = tuning.crop_predictions

    def watch(model, network, images, chosen, *rest):
        asked.append((images.dataset.name, chosen.tolist()))
        return predictions(model, network, images, chosen, *rest)

    monkeypatch.setattr(tuning, "crop_predictions", watch)
    first = evaluated(painted, tmp_path, config, train=train, test=test, protocol=protocol)
    assert sorted(rows) == list(range(24))
    held = sorted(hold_out(60, 0.1, config.seed)[1].tolist())
    assert [(name, sorted(part)) for name, part in asked] == 2 * [
        ("painted0", held),
        ("painted0", held),
        ("painted1", list(range(24))),
    ]
    wrong = replace(test, targets=(test.targets + 1) % 3)
    second = evaluated(painted, tmp_path, config, train=train, test=wrong, name="other", protocol=protocol)
    for name, cell in first["scores"].items():
        assert (cell["lr"], cell["held_out"]) == (second["scores"][name]["lr"], second["scores"][name]["held_out"])
        assert set(cell["held_out"]) == {"0.01", "0.02"}
        assert cell["held_out"][str(cell["lr"])] == max(cell["held_out"].values())
    assert json.loads(json.dumps(first)) == first


def test_pieces_that_batch_norm_sees_are_an_input(painted):
    splits = painted(6, 0), painted(6, 1)
    plain = Arm("plain", replace(ARM.network, arch="alexnet"), None)
    normed = Arm("normed", replace(ARM.network, arch="alexnet_bn"), None)

    def seen(*arms, **options):
        found = [
            protocol.inputs([*arms], splits, replace(CONFIG, batch=16, **options)) for protocol in (finetune, nonlinear)
        ]
        assert found[0] == found[1]
        return found[0]

    assert seen(plain, normed, micro_batch=4) == {"micro-batch": "4"}
    assert seen(plain, micro_batch=4) == seen(plain, normed) == seen(normed, micro_batch=16) == {}


def test_rows_held_out_are_not_learned_from(painted, tmp_path, monkeypatch):
    train = painted(60, 0)
    seen = []
    fit = tuning.loop.fit

    def watch(model, loss, images, batches, *rest):
        seen.append(torch.cat([batches(epoch).flatten() for epoch in range(4)]))
        fit(model, loss, images, batches, *rest)

    monkeypatch.setattr(tuning.loop, "fit", watch)
    evaluated(painted, tmp_path, train=train)
    learning, held = hold_out(60, 0.1, CONFIG.seed)
    assert set(seen[0].tolist()) == set(learning.tolist()) and not set(seen[0].tolist()) & set(held.tolist())


@pytest.mark.parametrize("stop", [2, 9, 17, 22])
def test_killed_and_given_again_it_ends_with_the_same_numbers(stop, painted, tmp_path, monkeypatch):
    config = replace(CONFIG, strategy="staged,layerwise", lrs="0.01,0.03", epochs=2)
    splits = painted(27, 0), painted(12, 1)
    expected = finetune.evaluate(ARM, splits, config, tmp_path / "whole", CPU)
    loss = tuning.crop_loss
    steps = []

    def killed(*given, **more):
        steps.append(0)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return loss(*given, **more)

    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuning, "crop_loss", killed)
        finetune.evaluate(ARM, splits, config, tmp_path / "work", CPU)
    again = []
    monkeypatch.setattr(tuning, "crop_loss", lambda *given, **more: again.append(0) or loss(*given, **more))
    assert finetune.evaluate(ARM, splits, config, tmp_path / "work", CPU) == expected
    assert len(again) == 3 * 2 * 2 * 2 - (stop - 1)  # batches, epochs, rates and strategies; none twice


def test_a_rate_that_diverges_is_left_out(painted, tmp_path, capsys):
    plain = Arm("random", replace(NETWORK, arch="alexnet"), None)
    found = evaluated(painted, tmp_path, replace(CONFIG, lrs="999,0.01"), arm=plain)["scores"]["joint"]
    assert found["lr"] == 0.01 and found["held_out"]["999.0"] is None
    assert "the loss is not finite; this rate is left out" in capsys.readouterr().err
    with pytest.raises(StageError, match=r"joint: the loss is not finite at any of --lrs 999"):
        evaluated(painted, tmp_path, replace(CONFIG, lrs="999"), name="b", arm=plain)


def test_predictions_are_the_mean_over_crops_and_turns_do_not_depend_on_the_batch(painted):
    data = painted(10, 0)
    model = networks.build(replace(NETWORK, classes=3), 0, "test").eval()
    with torch.no_grad():
        model.fc8.weight.mul_(300)
    images = tuning.Labelled(data, NETWORK, CONFIG, CPU).images
    found = [
        tuning.crop_predictions(
            model, NETWORK, images, torch.arange(10), replace(CONFIG, test_crops=crops, batch=batch), CPU
        )
        for crops, batch in ((0, 8), (1, 8), (10, 8), (10, 3))
    ]
    for predictions in found:
        torch.testing.assert_close(predictions.sum(1), torch.ones(10))
    torch.testing.assert_close(found[2], found[3])
    assert not found[0].equal(found[1]) and not found[1].equal(found[2])
    centre = images.batch(torch.arange(10))[0][:, :, 2:37, 2:37]
    with torch.no_grad():
        wanted = model(networks.normalise(centre, "imagenet")).softmax(1)
    torch.testing.assert_close(found[0], wanted)


def test_rescaled_from_images_that_are_learned_from(painted, tmp_path):
    arm = Arm("random", replace(NETWORK, arch="alexnet"), None)
    splits = counted(painted(60, 0))[0], painted(12, 1)
    plain, scaled = (
        finetune.evaluate(arm, splits, replace(CONFIG, rescale=rescale, epochs=1), tmp_path / str(rescale), CPU)[
            "scores"
        ]
        for rescale in (False, True)
    )
    assert plain != scaled
    sample = finetune._sample(splits[0], arm.network, CONFIG)
    held = hold_out(60, 0.1, CONFIG.seed)[1]
    assert sample.shape == (54, 3, 35, 35)
    data = tuning.Labelled(splits[0], arm.network, CONFIG, CPU).images.batch(held)[0][:, :, 2:37, 2:37]
    for image in networks.normalise(data, "imagenet"):
        assert not any(image.equal(other) for other in sample)
    model, _ = finetune._start(arm, 3, 0, sample)
    with torch.no_grad():
        assert float(model.eval()(sample).var(correction=0)) == pytest.approx(1, rel=1e-3)


def check(module, painted, network=NETWORK, **options):
    config = replace(CONFIG, **options)
    module.check([network], (painted(9, 0), painted(9, 1)), config, Path("nowhere"))


def test_misuse(painted, monkeypatch):
    check(finetune, painted)
    check(nonlinear, painted, layers="fc6,conv2")
    for module, options, words in (
        (finetune, {"strategy": "frozn"}, "--strategy frozn: no such strategy; did you mean 'frozen'"),
        (finetune, {"strategy": "joint,"}, "--strategy joint,: no such strategy"),
        (finetune, {"lrs": "fast"}, "--lrs fast"),
        (finetune, {"rescale": True}, "--rescale: alexnet_bn has normalisation layers"),
        (nonlinear, {"layers": "conv9"}, "--layers conv9: alexnet_bn has no such layer"),
        (nonlinear, {"layers": "fc6,fc8"}, "--layers fc8: alexnet_bn has no such layer"),
        (nonlinear, {"lrs": ""}, "--lrs"),
    ):
        with pytest.raises(UsageError, match=words):
            check(module, painted, **options)
    for module in (finetune, nonlinear):
        with pytest.raises(UsageError, match="--size 8: alexnet_bn does not take images so small"):
            check(module, painted, replace(NETWORK, size=8))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(UsageError, match=r"eval needs 0\.\d+ GB, but .* free; make room"):
        check(finetune, painted)


def test_too_few_images_to_choose_a_rate(painted, tmp_path):
    data = painted(30, 0, True)
    tags = data.tags.copy()
    tags[hold_out(30, 0.1, 0)[1].numpy()] = 0
    with pytest.raises(StageError, match="a tenth of it is too small to choose a learning rate by"):
        evaluated(painted, tmp_path, several=True, train=replace(data, tags=tags))
