"""evaluate() on small scenes: the maps it caches, what the probes see of them, and what they must never see."""

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from ktransfer import networks
from ktransfer.artifacts.features import Features, create_or_resume, open_features
from ktransfer.data.augment import centre_crop
from ktransfer.data.opening import open_splits
from ktransfer.errors import StageError, UsageError
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.learners import maps
from ktransfer.eval.learners.maps import choose_layers
from ktransfer.eval.learners.probe import hold_out
from ktransfer.eval.protocols import linear
from ktransfer.eval.protocols.linear import evaluate, rates
from ktransfer.images.decoding import square
from ktransfer.networks import Network

CPU = torch.device("cpu")
CONFIG = EvalConfig(epochs=2, batch=8, weight_decay=1e-4, precision="float32", lrs="0.001,0.003")
NETWORK = Network("alexnet_bn", 0.05, 2, 56)
NAMES = ["conv1", "conv2", "conv3", "conv4", "conv5"]


@pytest.fixture(scope="module")
def splits():
    return open_splits("scenes:images=48,size=64")


@pytest.fixture
def caught(monkeypatch):
    """What evaluate() hands to the loop and to the final predictions."""
    seen = {"predictions": []}
    fit, predict = linear.loop.fit, linear.predict

    def watch_fit(probes, loss, source, batches, config, folder, device, *rest):
        seen.update(probes=probes, epochs=[batches(epoch) for epoch in range(3)])
        seen["views"] = [np.array(view.rows) for view in getattr(source, "views", [])]
        fit(probes, loss, source, batches, config, folder, device, *rest)

    def watch_predictions(probes, source, rows, *rest):
        found = predict(probes, source, rows, *rest)
        seen["predictions"].append((source, rows, found))
        return found

    monkeypatch.setattr(linear.loop, "fit", watch_fit)
    monkeypatch.setattr(linear, "predict", watch_predictions)
    return seen


def arm(weights=None, network=NETWORK):
    return Arm("random", network, weights)


def counted(data):
    """The dataset, with a list of the rows that are read."""
    rows = []

    def read(row, side):
        rows.append(row)
        return data.read(row, side)

    return replace(data, read=read), rows


def test_layers_numbers_and_the_test_part_read_once(splits, tmp_path, caught):
    train, trained = counted(splits[0])
    test, tested = counted(splits[1])
    found = evaluate(arm(), (train, test), CONFIG, tmp_path / "work", CPU)
    assert found["arch"] == "alexnet_bn"
    assert list(found["scores"]) == NAMES
    for name in NAMES:
        layer = found["scores"][name]
        assert set(layer["held_out"]) == {"0.001", "0.003"}
        assert layer["held_out"][str(layer["lr"])] == max(layer["held_out"].values())
        assert 0 <= layer["top1_interval"][0] <= layer["top1"] <= layer["top1_interval"][1] <= 1
        assert layer["numbers"] == layer["grid"] ** 2 * (layer["numbers"] // layer["grid"] ** 2)
    assert json.loads(json.dumps(found)) == found
    # Two views of the training images, and a second network, take what was decoded once.
    assert evaluate(arm(), (train, test), CONFIG, tmp_path / "other", CPU) == found
    assert sorted(tested) == list(range(len(test)))
    assert sorted(trained) == list(range(len(train)))
    again, kept = replace(CONFIG, cache_images="off"), len(trained)
    assert evaluate(arm(), (train, test), again, tmp_path / "off", CPU) == found
    assert len(trained) == kept + 2 * len(train)
    (_, held_rows, _), (source, test_rows, _) = caught["predictions"][:2]
    assert test_rows.tolist() == list(range(len(test)))
    assert len(source.views) == 1
    assert len(held_rows) == 5


def test_nothing_held_out_is_trained_on(splits, tmp_path, caught):
    evaluate(arm(), splits, CONFIG, tmp_path / "work", CPU)
    learning, held = hold_out(48, 0.1, CONFIG.seed)
    seen = torch.cat(caught["epochs"]).flatten() // 2
    assert not set(seen.tolist()) & set(held.tolist())
    assert set(seen.tolist()) <= set(learning.tolist())
    assert caught["predictions"][0][1].equal(held)
    # Both views, and not the same for an image in every epoch.
    mirrored = torch.cat(caught["epochs"]).flatten() % 2
    assert 0.3 < mirrored.float().mean() < 0.7
    chosen = [dict(zip((e // 2).flatten().tolist(), (e % 2).flatten().tolist(), strict=True)) for e in caught["epochs"]]
    assert any(chosen[0][row] != chosen[1][row] for row in set(chosen[0]) & set(chosen[1]))
    # Standardised by the rows that are trained on, and by no other.
    probes = caught["probes"]
    maps = torch.from_numpy(caught["views"][0]).float()
    for part in probes.layers:
        by_channel = maps[learning][:, part.start : part.stop].double().view(len(learning), part.channels, -1)
        wanted = by_channel.mean(dim=(0, 2)).float().repeat_interleave(part.grid**2)
        torch.testing.assert_close(probes.shift[part.start : part.stop], wanted)


def test_labels_of_test_and_held_out_rows_change_nothing_that_is_trained(splits, tmp_path, caught):
    def trained(name, train, test):
        found = evaluate(arm(), (train, test), CONFIG, tmp_path / name, CPU)
        return {key: value.clone() for key, value in caught["probes"].state_dict().items()}, found

    weights, first = trained("a", *splits)
    held = hold_out(48, 0.1, CONFIG.seed)[1].numpy()
    targets = splits[0].targets.copy()
    # The predictions of conv1's second probe: it shall be the one that is chosen.
    targets[held] = caught["predictions"][0][2][0][1].numpy()
    other, second = trained("b", replace(splits[0], targets=targets), splits[1])
    assert all(weights[key].equal(other[key]) for key in weights)
    wrong = replace(splits[1], targets=(splits[1].targets + 1) % 12)
    other, third = trained("c", splits[0], wrong)
    assert all(weights[key].equal(other[key]) for key in weights)
    for name in NAMES:
        # The rate is chosen without a look at the test split.
        assert third["scores"][name]["lr"] == first["scores"][name]["lr"]
        assert third["scores"][name]["held_out"] == first["scores"][name]["held_out"]
    assert second["scores"]["conv1"]["held_out"]["0.003"] == 1 != first["scores"]["conv1"]["held_out"]["0.003"]
    assert any(third["scores"][n]["top1"] != first["scores"][n]["top1"] for n in NAMES)


def test_the_rate_is_the_best_on_the_held_out_rows_and_its_predictions_are_scored(splits, tmp_path, monkeypatch):
    """With predictions planted per probe: the best on held-out rows is chosen, also where another is best on the
    test."""
    config = replace(CONFIG, lrs="0.001,0.002,0.004")
    held = hold_out(48, 0.1, config.seed)[1]
    goods = {"conv1": (0, 5, 1), "conv2": (2, 1, 0), "conv3": (1, 1, 3), "conv4": (0, 4, 4), "conv5": (5, 5, 5)}
    calls = []

    def predictions(probes, source, rows, batch, device):
        data = splits[len(calls)]
        calls.append(rows)
        wanted = torch.from_numpy(data.targets)[rows].long()
        if len(calls) == 1:
            hits = [hit for counts in goods.values() for hit in counts]
        else:
            hits = list(range(15))[::-1]
            hits = [min(hit, len(rows)) for hit in hits]
        return torch.stack(
            [torch.where(torch.arange(len(rows)) < hit, wanted, (wanted + 1) % 12) for hit in hits]
        ), rows

    monkeypatch.setattr(linear, "predict", predictions)
    found = evaluate(arm(), splits, config, tmp_path / "work", CPU)["scores"]
    best = {"conv1": 1, "conv2": 0, "conv3": 2, "conv4": 1, "conv5": 0}
    for place, name in enumerate(NAMES):
        assert found[name]["lr"] == (0.001, 0.002, 0.004)[best[name]]
        right = min(14 - (3 * place + best[name]), len(splits[1]))
        assert found[name]["top1"] == pytest.approx(right / len(splits[1]))
    assert calls[0].equal(held)


def test_cached_maps_are_those_of_the_network(splits, tmp_path, caught):
    network = replace(NETWORK, normalise="picture")
    model = networks.build(network, CONFIG.seed, "eval/random").eval()
    evaluate(arm(network=network), splits, CONFIG, tmp_path / "work", CPU)
    pixels = np.stack([square(splits[0].read(row, 64), 64) for row in range(48)])
    pixels = centre_crop(torch.from_numpy(pixels).permute(0, 3, 1, 2), 56)
    keep = {}
    for name in NAMES:
        model.get_submodule(f"relu{name[-1]}").register_forward_hook(
            lambda _m, _i, out, name=name: keep.update({name: out.clone()})
        )
    for number, squares in enumerate((pixels, pixels.flip(-1))):
        with torch.no_grad():
            model(networks.normalise(squares, "picture"))
        for part in caught["probes"].layers:
            wanted = torch.nn.functional.adaptive_avg_pool2d(keep[part.name], part.grid).flatten(1).numpy()
            cached = caught["views"][number][:, part.start : part.stop].astype(np.float32)
            np.testing.assert_allclose(cached, wanted, rtol=4e-3, atol=2e-3 * np.abs(wanted).max())
    assert np.abs(caught["views"][0].astype(np.float32) - caught["views"][1]).max() > 0.01


def test_grids_of_full_size_are_those_of_zhang():
    network = Network("alexnet", 0.05, 4, 227)
    layers = choose_layers(networks.build(network, 0, "test"), network, None)
    assert [(part.name, part.grid) for part in layers] == list(zip(NAMES, (10, 6, 5, 5, 6), strict=True))
    assert layers[0].start == 0
    for part, after in pairwise(layers):
        assert part.stop == after.start
    for part in layers:
        assert part.stop - part.start == part.channels * part.grid**2
    # At full width that is about 9,000 numbers each (docs/papers.md): 96, 256, 384, 384, 256 channels.
    assert [c * part.grid**2 for c, part in zip((96, 256, 384, 384, 256), layers, strict=True)] == [
        9600,
        9216,
        9600,
        9600,
        9216,
    ]


def test_grids_shrink_with_the_maps_and_other_networks_get_about_as_many_numbers():
    layers = choose_layers(networks.build(NETWORK, 0, "test"), NETWORK, "conv5, conv1")
    assert [part.name for part in layers] == ["conv5", "conv1"]
    assert layers[0].grid == 5  # of 56 pixels, conv5 has 5 x 5 maps
    assert layers[1].grid == 10
    network = Network("resnet18", size=224, classes=5)
    model = networks.build(network, 0, "test")
    layers = choose_layers(model, network, "layer1,layer4")
    assert [part.grid for part in layers] == [12, 4]
    assert len(choose_layers(model, network, None)) == 5
    with pytest.raises(UsageError, match=r"--layers layer9: resnet18 has no such layer; did you mean"):
        choose_layers(model, network, "layer1,layer9")
    with pytest.raises(UsageError, match=r"--size 8: alexnet_bn does not take images so small"):
        choose_layers(networks.build(NETWORK, 0, "test"), replace(NETWORK, size=8), None)


@pytest.mark.parametrize("arch", ["swin_t", "resnet18", "mnasnet0_5"])
def test_a_small_image_leaves_the_last_layer_one_position(arch):
    network = Network(arch, size=16, classes=2)
    model = networks.build(network, 0, "test")
    small, large = (list(networks.layers(replace(network, size=side), model)) for side in (16, 128))
    assert small == large
    assert choose_layers(model, network, small[-1])[0].grid == 1


@pytest.mark.parametrize("lrs", ["", "a", "0.1,,0.2", "0.1,-1", "0", "nan", "inf"])
def test_wrong_rates(lrs):
    with pytest.raises(UsageError, match="--lrs"):
        rates(replace(CONFIG, lrs=lrs))


def test_right_rates():
    assert rates(replace(CONFIG, lrs="0.1, 1e-3")) == [0.1, 0.001]


@pytest.mark.parametrize("name", ["train-False", "train-True", "test"])
def test_half_written_cache_goes_on(splits, tmp_path, monkeypatch, name):
    expected = evaluate(arm(), splits, CONFIG, tmp_path / "whole", CPU)
    work = tmp_path / "work"
    write = Killer(name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(maps, "FORWARD_BATCH", 7)
        patch.setattr(maps, "create_or_resume", write)
        evaluate(arm(), splits, CONFIG, work, CPU)
    assert (work / f"{name}.h5.part").is_file()
    resumed = []

    def watch(path, *rest, **more):
        writer = create_or_resume(path, *rest, **more)
        resumed.append((path.stem, writer.rows_done))
        return writer

    monkeypatch.setattr(maps, "create_or_resume", watch)
    assert evaluate(arm(), splits, CONFIG, work, CPU) == expected
    assert resumed[0] == (name, 7)


class Killer:
    """Interrupts the writing of one cache after its first batch."""

    def __init__(self, name):
        self.name = name

    def __call__(self, path, *rest, **more):
        writer = create_or_resume(path, *rest, save_seconds=0.0, **more)
        if path.stem == self.name:
            write = writer.write

            def once(start, rows, valid):
                if start:
                    raise KeyboardInterrupt
                write(start, rows, valid)

            writer.write = once
        return writer


def test_interrupted_probes_end_with_the_same_numbers(splits, tmp_path, monkeypatch):
    expected = evaluate(arm(), splits, CONFIG, tmp_path / "whole", CPU)
    loss = linear.probe_loss
    steps = []

    def killed(targets, views):
        inner = loss(targets, views)

        def stop(model, batch):
            steps.append(0)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return inner(model, batch)

        return stop

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(linear, "probe_loss", killed)
        evaluate(arm(), splits, CONFIG, tmp_path / "work", CPU)
    assert evaluate(arm(), splits, CONFIG, tmp_path / "work", CPU) == expected


def test_maps_that_shall_not_be_kept_are_computed_to_the_same_numbers(folder, tmp_path, caught, capsys):
    splits = labelled(folder, tmp_path)
    network = replace(NETWORK, size=40)
    config = replace(CONFIG, max_broken=0.05, epochs=3)
    kept = evaluate(arm(network=network), splits, config, tmp_path / "kept", CPU)
    weights = {key: value.clone() for key, value in caught["probes"].state_dict().items()}
    capsys.readouterr()
    computed = evaluate(arm(network=network), splits, replace(config, cache=0.0), tmp_path / "computed", CPU)
    assert "more than --cache: each epoch computes them again" in capsys.readouterr().err
    assert kept == computed and len(kept["broken"]) == 1
    for key, value in caught["probes"].state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-4)


def test_maps_too_large_for_float16_say_what_to_do(splits, tmp_path):
    def loud(arm, seed):
        model = networks.build(arm.network, seed, "eval/random")
        model.conv1.bias.data.fill_(1e5)
        model.bn1 = torch.nn.Identity()
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "model_of", loud)
        for cache in (20.0, 0.0):
            with pytest.raises(StageError, match=r"65504, the largest float16: give .*--dtype float32 --overwrite"):
                evaluate(arm(), splits, replace(CONFIG, cache=cache), tmp_path / "work", CPU)
        for cache in (20.0, 0.0):
            wide = replace(CONFIG, cache=cache, dtype="float32", epochs=1, layers="conv1")
            assert evaluate(arm(), splits, wide, tmp_path / f"wide{cache}", CPU)["scores"]["conv1"]["top1"] <= 1


def labelled(folder, tmp_path):
    """The folder's images as a training split, its sound ones as a test split."""
    root = tmp_path / "labelled"
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "val")
    (root / "train" / "README.txt").unlink()
    (root / "val" / "README.txt").unlink()
    (root / "val" / "a" / "05.jpg").unlink()
    return open_splits(str(root))


def test_broken_images_are_neither_trained_on_nor_counted(folder, tmp_path, caught):
    splits = labelled(folder, tmp_path)
    with pytest.raises(StageError, match=r"1 of 24.*a/05\.jpg"):
        evaluate(arm(network=replace(NETWORK, size=40)), splits, CONFIG, tmp_path / "work", CPU)
    # Once more: the broken image is not met again, and counts all the same.
    with pytest.raises(StageError, match="1 of 24"):
        evaluate(arm(network=replace(NETWORK, size=40)), splits, CONFIG, tmp_path / "work", CPU)
    config = replace(CONFIG, max_broken=0.05)
    evaluate(arm(network=replace(NETWORK, size=40)), splits, config, tmp_path / "work", CPU)
    assert not caught["views"][0][5].any()
    # Zeros of the broken image would pull the mean.
    learning = [row for row in hold_out(24, 0.1, config.seed)[0].tolist() if row != 5]
    part = caught["probes"].layers[0]
    maps = caught["views"][0][learning, : part.stop].astype(np.float64).reshape(len(learning), part.channels, -1)
    wanted = torch.from_numpy(maps.mean(axis=(0, 2))).float().repeat_interleave(part.grid**2)
    torch.testing.assert_close(caught["probes"].shift[: part.stop], wanted, rtol=1e-4, atol=1e-5)


def test_a_finished_cache_is_used_as_it_is(splits, tmp_path):
    data, rows = counted(splits[0])
    model = networks.build(NETWORK, 0, "eval/random").eval()
    layers = choose_layers(model, NETWORK, "conv1")
    pooled = partial(maps.pooled_maps, model, NETWORK, layers, {"conv1": "relu1"}, CONFIG, CPU)
    for _ in range(2):
        found = maps.cached_maps(tmp_path / "x.h5", Arm("x", NETWORK, None), layers, pooled, (data,), 0, CONFIG, False)
        assert isinstance(found, Features)
        assert len(rows) == 48
    assert open_features(tmp_path / "x.h5").attributes["fingerprint"] == data.fingerprint
