"""A module of one's own as the target network: trained, resumed, used, exported and evaluated as any other."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ktransfer import networks
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.eval import evaluate
from ktransfer.eval.learners import heads
from ktransfer.networks import Network, own_modules, teachers
from ktransfer.retrain import export, load_model, retrain
from ktransfer.retrain.own_network import check
from ktransfer.retrain.students.predicting import predict
from ktransfer.training import loop

SCENES = "scenes:images=40,size=48"
SMALL = {
    "data": SCENES,
    "labels": "classes",
    "arch": "my_nets:small",
    "size": 32,
    "epochs": 2,
    "batch": 16,
    "precision": "float32",
    "device": "cpu",
    "workers": 1,
}
CODE = """
import numpy, torch
from torch import nn

class Small(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.inner = nn.Sequential()
        self.inner.add_module("first", nn.Conv2d(3, 8, 3, 2, 1))
        self.inner.add_module("norm", nn.BatchNorm2d(8))
        self.inner.add_module("relu", nn.ReLU())
        self.inner.add_module("second", nn.Conv2d(8, 12, 3, 2, 1))
        self.inner.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.inner.add_module("flat", nn.Flatten())
        self.inner.add_module("drop", nn.Dropout(0.1))
        self.inner.add_module("tell", nn.Linear(12, outputs))

    def forward(self, x):
        return self.inner(x)

def small(outputs):
    return Small(outputs)

def nothing():
    return Small(3)

def raises(outputs):
    raise KeyError("no\\nsuch")

def text(outputs):
    return "net"

def fixed(outputs):
    return Small(5)

class Fails(Small):
    def forward(self, x):
        raise TypeError("four")

class Pair(Small):
    def forward(self, x):
        return self.inner(x), x

class Maps(Small):
    def forward(self, x):
        return self.inner.first(x)

class Unfit(Small):
    def __init__(self, outputs):
        super().__init__(outputs)
        self.requires_grad_(False)

class Tied(Small):
    def __init__(self, outputs):
        super().__init__(outputs)
        self.again = self.inner.first

    def state_dict(self, *given, **named):
        return super().state_dict(*given, **named)

class Wide(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.flat = nn.Flatten()
        self.hidden = nn.Linear(3 * 32 * 32, 4 * outputs)
        self.tell = nn.Linear(4 * outputs, outputs)

    def forward(self, x):
        return self.tell(self.hidden(self.flat(x)))

ONE = {2: Small(2), 3: Small(3)}

def same(outputs):
    return ONE[outputs]

def elsewhere(outputs):
    made = Small(outputs)
    made.inner.first.weight.data += torch.from_numpy(numpy.random.rand(8, 3, 3, 3)).float()
    return made

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    path = tmp_path / "code" / "my_nets.py"
    path.write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield path
    sys.modules.pop("my_nets", None)


def test_it_learns_and_its_files_name_it(tmp_path, mine):
    weights = retrain(tmp_path / "run", **SMALL)
    record = json.loads((tmp_path / "run" / "retrain" / "stage.json").read_text())["retrain"]
    assert record["config"]["arch"] == "my_nets:small" and len(record["inputs"]["arch"]) == 64
    network = networks.describe(weights)
    assert (network.arch, network.size, network.task) == ("my_nets:small", 32, "classes")
    found, fresh = load_file(weights), networks.build(network, 0, "retrain").state_dict()
    assert found.keys() == fresh.keys() and "inner.tell.weight" in found
    assert not torch.equal(found["inner.first.weight"], fresh["inner.first.weight"])
    assert networks.layers(network, networks.load(weights, network)) == {
        f"inner.{name}": f"inner.{name}" for name in ("first", "norm", "relu", "second")
    }


def test_interrupted_it_ends_with_the_same_bytes_and_a_changed_function_is_refused(tmp_path, mine, monkeypatch):
    whole = retrain(tmp_path / "whole", **SMALL).read_bytes()
    real, calls = loop.rate, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(loop, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        retrain(tmp_path / "parts", **SMALL)
    monkeypatch.setattr(loop, "rate", real)
    assert retrain(tmp_path / "parts", **SMALL).read_bytes() == whole
    mine.write_text(CODE + "# changed\n")
    with pytest.raises(UsageError, match="arch changed"):
        retrain(tmp_path / "parts", **SMALL)


def test_it_predicts_is_exported_and_computes_the_same_without_its_code(tmp_path, mine, monkeypatch):
    pytest.importorskip("onnxruntime")
    run = tmp_path / "run"
    retrain(run, **SMALL)
    student = export(run)
    tables = [predict(str(model), SCENES, tmp_path / f"{place}.csv") for place, model in enumerate((run, student))]
    own, other = (table.read_text().splitlines() for table in tables)
    assert [row.split(",")[:2] for row in own] == [row.split(",")[:2] for row in other] and len(own) == 41
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    vector = load_model(run).embed(pixels)
    assert vector.shape == (12,)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part != str(mine.parent)])
    sys.modules.pop("my_nets")
    np.testing.assert_allclose(load_model(student).embed(pixels), vector, atol=1e-4)
    with pytest.raises(UsageError, match=r"network my_nets:small: no such Python function: .*PYTHONPATH=\."):
        load_model(run)
    for given in ("torchvision", "timm", "hf"):
        with pytest.raises(UsageError, match=r"my_nets:small|No module|not installed"):
            export(run, format=given)


def test_it_is_evaluated_beside_random_weights_and_true_labels(tmp_path, mine):
    retrain(tmp_path / "run", **SMALL | {"epochs": 1})
    options = {"labelled": SCENES, "epochs": 1, "batch": 16, "device": "cpu", "workers": 1, "precision": "float32"}
    evaluate(
        tmp_path / "run", **options, protocol="linear", supervised=True, supervised_epochs=1, layers="inner.second"
    )
    found = json.loads((tmp_path / "run" / "eval" / "linear.json").read_text())
    assert set(found["arms"]) == {"random", "run", "supervised"}
    assert all(list(arm["scores"]) == ["inner.second"] for arm in found["arms"].values())
    learned = networks.class_names(tmp_path / "run" / "eval" / "supervised" / "model.safetensors")
    assert learned == open_dataset(SCENES).classes and len(learned) == 12
    evaluate(tmp_path / "run", **options, protocol="finetune", lrs="0.01")
    network = Network("my_nets:small", size=32, classes=12)
    trunk = heads.trunk(network, networks.build(network, 0, "test"))
    assert "inner.second.weight" in trunk.names and "inner.tell.weight" not in trunk.names
    assert "inner.norm" in trunk.modules and not {"", "inner", "inner.tell"} & set(trunk.modules)


def test_it_starts_from_another_run_with_a_fresh_classifier(tmp_path, mine, capfd):
    first = retrain(tmp_path / "first", **SMALL)
    start = load_file(first)
    labels = tmp_path / "labels.csv"
    keys = open_dataset(SCENES).keys
    labels.write_text("key,label\n" + "".join(f"{key},{row % 3}\n" for row, key in enumerate(keys)))
    weights = retrain(tmp_path / "other", **SMALL | {"labels": str(labels), "lr": 0.0}, init=str(tmp_path / "first"))
    found = load_file(weights)
    assert torch.equal(found["inner.second.weight"], start["inner.second.weight"])
    assert found["inner.tell.weight"].shape == (3, 12)
    assert "fresh: inner.tell.weight, inner.tell.bias" in capfd.readouterr().err
    torch.save(start, tmp_path / "theirs.pth")
    with pytest.raises(UsageError, match=r"--init .*theirs.pth: only a run or a model.safetensors"):
        retrain(tmp_path / "third", **SMALL, init=str(tmp_path / "theirs.pth"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "--arch my_nets:missing: no such Python function: AttributeError"),
        ("number", "--arch my_nets:number: not a function; it is called with the number of outputs"),
        ("nothing", "network my_nets:nothing: raised TypeError .*it is called with the number of outputs"),
        ("raises", r"network my_nets:raises: raised KeyError \('no.*such'\)"),
        ("text", "network my_nets:text: returned str; it is called"),
        ("fixed", r"made \(2, 5\) of 2 images for 2 outputs"),
        ("Fails", r"raised TypeError \(four\) of \(2, 3, 32, 32\) float32"),
        ("Pair", "made tuple; it is called"),
        ("Maps", r"made \(2, 8, 16, 16\) of 2 images"),
        ("Unfit", "has no weights that could learn"),
        ("Tied", "its weights cannot be written: RuntimeError .*give each its own tensor"),
        ("same", "returns the same weights each time"),
        ("elsewhere", "starts from other weights each time"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_the_work(tmp_path, mine, name, said):
    with pytest.raises(UsageError, match=said) as caught:
        retrain(tmp_path / "run", **SMALL | {"arch": f"my_nets:{name}"})
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "retrain").exists()


def test_other_places_that_take_a_name_refuse_it_in_one_line(tmp_path, mine):
    with pytest.raises(UsageError, match=r"--width 0\.5: only alexnet"):
        retrain(tmp_path / "run", **SMALL | {"width": 0.5})
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="--arch my_nets:small: a checkpoint is read into a network by name"):
        teachers.find(str(tmp_path / "a.pth"), "my_nets:small", None, 0)
    with pytest.raises(UsageError, match="--backbone my_nets:small: no such network"):
        networks.check_arch("my_nets:small", flag="--backbone")


def test_a_weight_file_cannot_call_what_belongs_to_python(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("time.sleep", called.append)
    weights = tmp_path / "model.safetensors"
    networks.save(weights, {"a": torch.ones(9)}, Network("time:sleep", size=32, classes=2))
    with pytest.raises(UsageError, match="network time:sleep: a function of Python itself, which is not called"):
        load_model(weights)
    assert called == []


def test_a_weight_file_alone_does_not_decide_what_runs(tmp_path, mine, monkeypatch):
    weights = retrain(tmp_path / "run", **SMALL | {"epochs": 1})
    monkeypatch.setattr(own_modules, "_trusted", set())
    with pytest.raises(UsageError, match=r"set KTRANSFER_MODULES=my_nets:\w+$"):
        load_model(weights)
    monkeypatch.setenv("KTRANSFER_MODULES", f"other:net, {SMALL['arch']}")
    assert load_model(weights).network.arch == SMALL["arch"]


def test_a_network_without_maps_tells_classes_and_is_not_exported(tmp_path, mine):
    run = tmp_path / "run"
    retrain(run, **SMALL | {"arch": "my_nets:Wide", "epochs": 1})
    assert len(predict(str(run), SCENES, tmp_path / "found.csv").read_text().splitlines()) == 41
    with pytest.raises(UsageError, match="my_nets:Wide: none of its modules makes maps"):
        export(run)
    assert not (run / "export").exists()


def test_several_clusterings_need_a_classifier_that_can_be_cut(mine):
    check(Network("my_nets:small", size=32, classes=2), several=True)
    check(Network("my_nets:Wide", size=32, classes=2), several=False)
    with pytest.raises(UsageError, match="--objective multi: keeps the first outputs of my_nets:Wide"):
        check(Network("my_nets:Wide", size=32, classes=2), several=True)
