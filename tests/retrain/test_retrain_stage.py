"""The retrain stage: labels in, a network that learned them out, whichever file they come from."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import models as zoo

from ktransfer import networks
from ktransfer.artifacts.labels import write_labels
from ktransfer.data.opening import open_dataset
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.retrain import retrain, stage
from ktransfer.retrain.config import RetrainConfig
from ktransfer.retrain.known import find_known
from ktransfer.retrain.objectives import clusters
from ktransfer.retrain.objectives.objective import Known
from ktransfer.training import loop
from ktransfer.training.batch import Batch

SCENES = "scenes:images=40,size=48"
SMALL = {
    "data": SCENES,
    "labels": "classes",
    "arch": "alexnet_bn",
    "width": 0.05,
    "stride": 2,
    "epochs": 2,
    "batch": 16,
    "precision": "float32",
    "device": "cpu",
}


def record(run):
    return json.loads((run / "retrain" / "stage.json").read_text())["retrain"]


def metrics(run):
    return [json.loads(line) for line in (run / "retrain" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """40 noisy images, red or blue, in class folders."""
    root = tmp_path_factory.mktemp("data") / "coloured"
    random = np.random.default_rng(0)
    for row in range(40):
        name = ("red", "blue")[row % 2]
        pixels = random.integers(0, 120, (40, 44, 3), np.uint8)
        pixels[..., 0 if name == "red" else 2] += 100
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{row:02}.png")
    return str(root)


def label_files(folder, data, labels):
    keys = list(open_dataset(data).keys)
    labels = np.asarray(labels, np.int32)
    return write_labels(folder, keys, labels, np.zeros(len(labels), np.float32), int(labels.max()) + 1, "c", "f")


def test_it_learns_red_from_blue_and_the_files_say_so(tmp_path, coloured):
    options = {"data": coloured, "width": 0.1, "epochs": 12, "batch": 10, "lr": 0.02, "crop": 0.3}
    weights = retrain(tmp_path, **SMALL | options)
    last = metrics(tmp_path)[-1]
    assert last["step"] == 48 and record(tmp_path)["state"] == "done"
    network = networks.describe(weights)
    size = int(40 / (8 / 7)) // 8 * 8
    assert network == Network("alexnet_bn", 0.1, 2, size, 2, "imagenet", "classes")
    model = networks.load(weights, network).eval()
    data = open_dataset(coloured)
    pixels = torch.stack([torch.tensor(data.read(row, None)).permute(2, 0, 1)[:, :size, :size] for row in range(40)])
    found = model(networks.normalise(pixels, "imagenet")).argmax(1)
    assert (found.numpy() == data.targets).mean() > 0.95
    files = {path.name for path in weights.parent.iterdir()}
    assert files == {"stage.json", "metrics.jsonl", "model.safetensors"}
    assert record(tmp_path)["result"] == {"classes": 2, "images": 40}


def test_training_accuracy_is_logged_and_rises(tmp_path, coloured, monkeypatch):
    monkeypatch.setattr(loop, "LOG_SECONDS", 0)
    retrain(tmp_path, **SMALL | {"data": coloured, "width": 0.1, "epochs": 15, "batch": 10, "lr": 0.02, "crop": 0.3})
    accuracy = [line["accuracy"] for line in metrics(tmp_path)]
    assert len(accuracy) == 60 and np.mean(accuracy[-12:]) > 0.95
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[0] == pytest.approx(math.log(2), rel=0.05) and np.mean(losses[-12:]) < 0.3


def test_a_resnet_loads_strictly_into_torchvision(tmp_path):
    options = {"arch": "resnet18", "width": 1.0, "epochs": 1, "size": 32, "batch": 8}
    weights = retrain(tmp_path, **SMALL | options)
    classes = networks.describe(weights).classes
    assert classes == len(open_dataset(SCENES).classes)
    model = zoo.resnet18(num_classes=classes)
    model.load_state_dict(load_file(weights), strict=True)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, classes)


def test_the_papers_alexnet_keeps_its_names(tmp_path):
    weights = retrain(tmp_path, **SMALL | {"arch": "alexnet", "epochs": 1})
    state = load_file(weights)
    layers = [*(f"conv{number}" for number in range(1, 6)), "fc6", "fc7", "fc8"]
    expected = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    assert set(state) == expected
    assert state["fc8.weight"].shape[0] == len(open_dataset(SCENES).classes)


def test_every_label_format_trains_the_same_network(tmp_path):
    labels = np.arange(40) * 7 % 5
    labels[[3, 9]] = -1
    paths = label_files(tmp_path / "labels", SCENES, labels)
    assert [path.suffix for path in paths] == [".csv", ".h5", ".bin"]
    made = [retrain(tmp_path / path.suffix, **SMALL | {"labels": str(path), "epochs": 1}) for path in paths]
    assert len({path.read_bytes() for path in made}) == 1
    assert networks.describe(made[0]).task == "pseudo-labels" and networks.describe(made[0]).classes == 5
    assert record(tmp_path / ".csv")["result"] == {"classes": 5, "images": 38}


def test_keys_may_come_in_any_order_and_need_not_be_all(tmp_path):
    data = open_dataset(SCENES)
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(("label", "key"))
        rows.writerows((row % 3, data.keys[row]) for row in reversed(range(0, 40, 2)))
    config = replace(RetrainConfig(), labels=str(path))
    known, inputs = find_known(tmp_path, config, data)
    assert known.labels[:, 0].tolist() == [row % 3 if row % 2 == 0 else -1 for row in range(40)]
    assert known.rows().tolist() == list(range(0, 40, 2)) and len(inputs["labels"]) == 64


def test_rows_without_a_label_are_not_trained_on(tmp_path, monkeypatch):
    labels = np.arange(40) % 4
    labels[10:30] = -1
    path = label_files(tmp_path / "labels", SCENES, labels)[0]
    seen = []
    real = stage._loss

    def watched(model, batch, **more):
        seen.extend(batch.rows.tolist())
        return real(model, batch, **more)

    monkeypatch.setattr(stage, "_loss", watched)
    monkeypatch.setattr(stage, "tell_plan", lambda *_: None)
    retrain(tmp_path / "run", **SMALL | {"labels": str(path), "batch": 5, "epochs": 3})
    assert len(seen) == 60 and set(seen) == {*range(10), *range(30, 40)}


def test_uniform_draws_clusters_equally_often():
    labels = torch.tensor([-1] * 5 + [0] * 400 + [1] * 40 + [3] * 4)  # cluster 2 is empty
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    rows = torch.nonzero(labels >= 0)[:, 0]
    config = replace(RetrainConfig(), uniform=True, batch=37)
    epochs = [stage._batches(rows, labels, config, epoch) for epoch in range(20)]
    assert all(batches.shape == (12, 37) for batches in epochs)
    drawn = torch.stack(epochs).flatten()
    counts = torch.bincount(labels[drawn], minlength=4)
    assert counts[2] == 0 and (labels[drawn] >= 0).all()
    expected = len(drawn) / 3
    assert all(abs(counts[label] - expected) < 5 * math.sqrt(expected) for label in (0, 1, 3))
    within = torch.bincount(drawn, minlength=len(labels))
    assert (within[labels == 1] > 0).all()  # within a cluster, all of its images, equally often
    for label in (1, 3):
        share = within[labels == label] / counts[label] * (labels == label).sum()
        assert (share - 1).abs().max() < 0.6
    first = torch.bincount(labels[epochs[0][0]], minlength=4)
    assert (first[[0, 1, 3]] > 3).all()  # and in each batch
    assert torch.equal(stage._batches(rows, labels, config, 3), epochs[3]) and not torch.equal(epochs[2], epochs[3])


def test_without_uniform_every_labelled_image_comes_once():
    labels = torch.tensor([0, 1, -1, 0, 1, 1, -1, 0])
    rows = torch.nonzero(labels >= 0)[:, 0]
    batches = stage._batches(rows, labels, replace(RetrainConfig(), batch=3), 0)
    assert batches.shape == (2, 3) and sorted(batches.flatten().tolist()) == rows.tolist()


def test_the_loss_is_cross_entropy_of_the_valid_crops():
    config = replace(RetrainConfig(), size=32, arch="alexnet", width=0.05, stride=2, crop=1.0)
    network = Network("alexnet", 0.05, 2, 32, 4)
    model = networks.build(network, 0, "t").eval()
    pixels = torch.randint(0, 256, (3, 3, 36, 36), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.tensor([9, 9, 3, 1, 2])
    objective = clusters.objective(Known(labels[:, None]), 0, torch.device("cpu"))
    rows = torch.tensor([2, 4, 3])
    both = torch.ones(3).bool()
    value, sums = stage._loss(model, Batch(rows, pixels, both, 0), objective, network, config)
    losses = [
        stage._loss(model, Batch(rows[i : i + 1], pixels[i : i + 1], both[:1], 0), objective, network, config)[0]
        for i in range(3)
    ]
    assert value.item() == pytest.approx(sum(losses).item() / 3, rel=1e-5) and sums["count"] == 3
    valid = torch.tensor([True, False, True])
    value, sums = stage._loss(model, Batch(rows, pixels, valid, 0), objective, network, config)
    assert value.item() == pytest.approx((losses[0] + losses[2]).item() / 2, rel=1e-5) and sums["count"] == 2


def test_broken_images_are_counted_and_borne_up_to_a_share(tmp_path, coloured):
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    for row in range(20):
        Image.new("RGB", (40, 40), (row * 10, 0, 0)).save(root / "ab"[row % 2] / f"{row:02}.png")
    (root / "a" / "04.png").write_bytes(b"")
    options = SMALL | {"data": str(root), "epochs": 1, "batch": 10}
    weights = retrain(tmp_path / "run", **options, max_broken=0.05)
    assert len(record(tmp_path / "run")["broken"]) == 1
    assert all(value.isfinite().all() for value in load_file(weights).values())
    with pytest.raises(StageError, match=r"1 of 20 images[^\n]*a/04\.png"):
        retrain(tmp_path / "strict", **options, max_broken=0.01)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", math.inf)
    whole = retrain(tmp_path / "whole", **SMALL).read_bytes()
    real, calls = stage._loss, []

    def stopping(*given, **named):
        calls.append(1)
        found = real(*given, **named)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(stage, "_loss", stopping)
    monkeypatch.setattr(stage, "tell_plan", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        retrain(tmp_path / "stopped", **SMALL)
    assert retrain(tmp_path / "stopped", **SMALL | {"workers": 3}).read_bytes() == whole
    assert len(calls) == 5
    assert retrain(tmp_path / "stopped", **SMALL) == tmp_path / "stopped" / "retrain" / "model.safetensors"
    assert len(calls) == 5
    with pytest.raises(UsageError, match=r"lr was 0.01, is 0.5[^\n]*--overwrite"):
        retrain(tmp_path / "stopped", **SMALL | {"lr": 0.5})


def test_labels_that_do_not_fit_are_one_line_and_write_nothing(tmp_path):
    run = tmp_path / "run"
    foreign = label_files(tmp_path / "foreign", "scenes:images=50,size=48", np.arange(50) % 3)
    table = tmp_path / "one.csv"
    table.write_text("key,label\n" + "".join(f"{key},1\n" for key in open_dataset(SCENES).keys))
    nothing = tmp_path / "nothing.csv"
    nothing.write_text("key,label\n" + "".join(f"{key},-1\n" for key in open_dataset(SCENES).keys))
    flat = tmp_path / "flat"
    flat.mkdir()
    for row in range(4):
        Image.new("RGB", (40, 40)).save(flat / f"{row}.png")
    cases = [
        ({"labels": str(foreign[0])}, "10 of 50 keys are not images of scenes:images=40,size=48"),
        ({"labels": str(foreign[1])}, "10 of 50 keys are not images"),
        ({"labels": str(foreign[2])}, "50 labels for 40 images"),
        ({"labels": str(table)}, "fewer than two different labels"),
        ({"labels": str(nothing)}, "every label is -1"),
        ({"labels": str(tmp_path / "absent.csv")}, "no such label file"),
        ({"labels": str(tmp_path / "labels.npy")}, "labels are read from .csv, .h5, .bin"),
        ({"labels": None}, "assign is missing; make it first"),
        ({"data": str(flat)}, "has no class folders"),
        ({"data": None}, "no images were given, and the run has none"),
        ({"arch": "resnet81"}, "--arch resnet81: no such network"),
        ({"arch": "resnet18", "width": 0.5}, "only alexnet and alexnet_bn can be scaled"),
        ({"arch": "alexnet", "size": 8}, "--size 8: alexnet does not take images so small"),
        ({"device": "abacus"}, "--device abacus"),
        ({"crop": 0.0}, "must be at least"),
        ({"archh": "alexnet"}, "did you mean 'arch'"),
    ]
    for given, message in cases:
        with pytest.raises(UsageError) as caught:
            retrain(run, **SMALL | given)
        assert message in str(caught.value) and "\n" not in str(caught.value), given
        assert not run.exists()


def test_arch_list_shows_every_network(tmp_path):
    with pytest.raises(UsageError) as caught:
        retrain(tmp_path / "run", **SMALL | {"arch": "list"})
    shown = set(str(caught.value).removeprefix("--arch: valid: ").split(", "))
    assert shown == {*networks.TRUNKS, *zoo.list_models(module=zoo)}


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "torchvision:alexnet"])
def test_other_networks_of_torchvision_pass_the_check(tmp_path, arch):
    config = stage.check(tmp_path, SMALL | {"arch": arch, "width": 1.0, "size": 64}).config
    assert config.arch == arch and config.size == 64


def test_normalised_by_its_own_statistics_and_the_weights_say_so(tmp_path):
    weights = retrain(tmp_path, **SMALL | {"normalise": "picture", "epochs": 1})
    assert networks.describe(weights).normalise == "picture"
    with pytest.raises(UsageError, match="normalise was 'picture', is 'imagenet'"):
        retrain(tmp_path, **SMALL | {"normalise": "imagenet", "epochs": 1})


def test_a_record_from_before_a_setting_means_what_was_done_then(tmp_path):
    weights = retrain(tmp_path, **SMALL | {"normalise": "imagenet", "epochs": 1})
    path = tmp_path / "retrain" / "stage.json"
    steps = json.loads(path.read_text())
    for name in ("normalise", "objective", "temperature", "grey", "jitter", "randaugment"):
        del steps["retrain"]["config"][name]
    path.write_text(json.dumps(steps))
    assert retrain(tmp_path, **SMALL | {"normalise": "imagenet", "epochs": 1}) == weights
    with pytest.raises(UsageError, match=r"grey was 0\.0, is 0\.5"):
        retrain(tmp_path, **SMALL | {"normalise": "imagenet", "epochs": 1, "grey": 0.5})


def test_colours_change_what_is_seen_and_nothing_else():
    config = replace(RetrainConfig(), size=32, grey=1.0)
    network = Network("alexnet", 0.05, 2, 32, 4, "picture")
    pixels = torch.randint(0, 256, (3, 3, 36, 36), generator=torch.Generator().manual_seed(0)).byte()
    batch = Batch(torch.arange(3), pixels, torch.ones(3).bool(), 1)
    grey = stage.augmented(batch, network, config)
    torch.testing.assert_close(grey[:, 0], grey[:, 1])
    plain = stage.augmented(batch, network, replace(config, grey=0.0))
    assert plain.shape == grey.shape and not torch.allclose(plain, grey)


def test_randaugment_changes_each_image_as_it_does_alone(tmp_path):
    config = replace(RetrainConfig(), size=32, randaugment="3,20", normalise="picture")
    network = Network("alexnet", 0.05, 2, 32, 4, "picture")
    pixels = torch.randint(0, 256, (5, 3, 36, 36), generator=torch.Generator().manual_seed(0)).byte()
    batch = Batch(torch.arange(5), pixels, torch.ones(5).bool(), 1)
    whole = stage.augmented(batch, network, config)
    assert not torch.allclose(whole, stage.augmented(batch, network, replace(config, randaugment=None)))
    part = Batch(batch.rows[3:], pixels[3:], batch.valid[3:], 1)
    torch.testing.assert_close(stage.augmented(part, network, config), whole[3:])
    later = Batch(batch.rows, pixels, batch.valid, 2)
    assert not torch.allclose(stage.augmented(later, network, config), whole)
    both = stage.augmented(batch, network, replace(config, grey=1.0))
    torch.testing.assert_close(both[:, 0], both[:, 1])
    with pytest.raises(UsageError, match=r"--randaugment 2,40: must be N,M"):
        retrain(tmp_path, **SMALL | {"randaugment": "2,40"})


def test_randaugment_ends_with_other_weights_and_is_in_the_record(tmp_path):
    plain = retrain(tmp_path / "plain", **SMALL | {"epochs": 1})
    changed = retrain(tmp_path / "changed", **SMALL | {"epochs": 1, "randaugment": "2,9"})
    assert plain.read_bytes() != changed.read_bytes()
    assert record(tmp_path / "changed")["config"]["randaugment"] == "2,9"


def test_init_starts_from_other_weights(tmp_path):
    first = retrain(tmp_path / "first", **SMALL | {"epochs": 1})
    start = load_file(first)
    frozen = SMALL | {"epochs": 1, "lr": 0.0, "labels": "classes"}
    for given in (str(tmp_path / "first"), str(first)):
        weights = retrain(tmp_path / given.replace("/", "_"), **frozen, init=given)
        found = load_file(weights)
        parameters = [name for name in found if "running" not in name and "tracked" not in name]
        assert all(torch.equal(found[name], start[name]) for name in parameters)
    labels = label_files(tmp_path / "labels", SCENES, np.arange(40) % 3)[0]
    found = load_file(retrain(tmp_path / "other", **frozen | {"labels": str(labels)}, init=str(first)))
    assert found["fc8.weight"].shape[0] == 3 and torch.equal(found["conv1.weight"], start["conv1.weight"])
    retrain(tmp_path / "first", **SMALL | {"epochs": 1, "seed": 1, "overwrite": True})
    with pytest.raises(UsageError, match="init changed"):
        retrain(tmp_path / "other", **frozen | {"labels": str(labels)}, init=str(first))


def test_init_of_a_checkpoint_that_torchvision_made(tmp_path):
    model = zoo.resnet18(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    options = SMALL | {"arch": "resnet18", "width": 1.0, "size": 32, "epochs": 1, "lr": 0.0, "batch": 8}
    found = load_file(retrain(tmp_path / "run", **options, init=str(tmp_path / "theirs.pth")))
    assert torch.equal(found["layer4.1.conv2.weight"], model.state_dict()["layer4.1.conv2.weight"])
    assert found["fc.weight"].shape[0] == len(open_dataset(SCENES).classes)


def test_init_that_does_not_fit_is_one_line(tmp_path):
    first = retrain(tmp_path / "first", **SMALL | {"epochs": 1})
    for options, said in (
        ({"init": str(tmp_path / "none.pth")}, r"--init \S+none\.pth: no such file"),
        (
            {"init": str(first), "width": 0.1},
            r"weights of alexnet_bn of width 0\.05, and --arch is alexnet_bn of width 0\.1",
        ),
        ({"init": "hog"}, "weights of hog"),
    ):
        with pytest.raises(UsageError, match=said) as found:
            retrain(tmp_path / "run", **SMALL | options)
        assert "\n" not in str(found.value)
    assert not (tmp_path / "run" / "retrain").exists()
