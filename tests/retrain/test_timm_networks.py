"""A network of timm by name as the target network, from fresh or from published weights."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import checkpoints, published, teachers
from ktransfer.retrain import export, load_model, retrain

SMALL = {
    "data": "scenes:images=24,size=48",
    "labels": "classes",
    "size": 32,
    "epochs": 1,
    "batch": 12,
    "precision": "float32",
    "device": "cpu",
    "workers": 1,
}


def test_it_learns_and_goes_back_to_timm(tmp_path):
    weights = retrain(tmp_path, **SMALL | {"arch": "timm:mobilenetv3_small_050"})
    network = networks.describe(weights)
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=12).eval()
    theirs.load_state_dict(load_file(export(tmp_path, format="timm")))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        wanted = theirs(networks.normalise(images, "imagenet"))
        torch.testing.assert_close(load_model(tmp_path)(images), wanted, atol=1e-4, rtol=1e-4)
    assert (network.arch, network.classes) == ("timm:mobilenetv3_small_050", 12)
    read = teachers.find(str(weights), None, None, 0)
    assert "pooled" not in teachers.shapes(read.network, teachers.load(read))


def test_it_starts_from_a_published_network(tmp_path, capfd):
    name = "efficientnet-lite0"
    arch = published.network(name).arch
    found = load_file(retrain(tmp_path, **SMALL | {"arch": arch, "lr": 0.0, "init": name}))
    start = checkpoints.read_tensors(published.weights(name))["_conv_stem.weight"]
    assert torch.equal(found["conv_stem.weight"], start) and found["classifier.weight"].shape == (12, 1280)
    assert "fresh: classifier.weight, classifier.bias" in capfd.readouterr().err
    assert "init" in json.loads((tmp_path / "retrain" / "stage.json").read_text())["retrain"]["inputs"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"arch": "timm:resnet"}, "timm:resnet: timm has no such network; did you mean"),
        ({"arch": "timm:resnet18", "width": 0.5}, "--width 0.5: only alexnet"),
        (
            {"arch": "timm:resnet18", "init": "timm:resnet18"},
            "--init timm:resnet18: a name of timm comes without weights",
        ),
        ({"arch": "resnet18", "init": "efficientnet-lite0"}, "--arch is resnet18 of width 1; give the same"),
        ({"arch": "resnet18", "init": "hog"}, "--arch is resnet18 of width 1; give the same"),
    ],
)
def test_what_does_not_go_is_one_line(tmp_path, given, said):
    with pytest.raises(UsageError) as caught:
        retrain(tmp_path, **SMALL | given)
    assert said in str(caught.value) and "\n" not in str(caught.value)
