"""What --teacher may name: found where it should be, refused in one line where it is not, never fetched."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision import models as zoo

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network, teachers

FIRST, SECOND = "resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"  # IMAGENET1K_V1 and V2 of torchvision


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch's hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(zoo.resnet18().state_dict(), path)
    return path


def refused(*given):
    with pytest.raises(UsageError) as caught:
        teachers.find(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_are_not_here_are_named_not_fetched(cache, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("a download"))
    line = refused("torchvision:resnet50", None, None, 0)
    assert f"download {SECOND}" in line and "ResNet50_Weights.IMAGENET1K_V2" in line and str(cache) in line
    line = refused("torchvision:resnet50", None, "IMAGENET1K_V1", 0)
    assert f"download {FIRST}" in line and "ResNet50_Weights.IMAGENET1K_V1" in line
    assert str(cache / "other.pth") in refused("torchvision:resnet50", None, str(cache / "other.pth"), 0)
    assert "http" not in line


def test_what_is_in_the_cache_is_taken_the_newest_first(cache):
    (cache / FIRST).write_bytes(b"1")
    assert teachers.find("torchvision:resnet50", None, None, 0).weights == cache / FIRST
    (cache / SECOND).write_bytes(b"2")
    found = teachers.find("torchvision:resnet50", None, None, 0)
    assert found.weights == cache / SECOND and found.foreign
    assert found.network == Network("torchvision:resnet50", size=224, normalise="imagenet")
    assert teachers.find("torchvision:resnet50", None, "IMAGENET1K_V1", 0).weights == cache / FIRST


def test_size_and_statistics_are_those_of_the_weights(cache, weights):
    found = teachers.find("torchvision:efficientnet_v2_l", None, str(weights), 0)
    assert found.network.size == 480
    assert networks.statistics(found.network.normalise) == ((0.5,) * 3, (0.5,) * 3)
    assert teachers.find("torchvision:inception_v3", None, str(weights), 0).network.size == 299
    assert teachers.find("torchvision:resnet18", None, str(weights), 64).network.size == 64
    (cache / "vit_b_16_swag-9ac1b537.pth").write_bytes(b"")
    assert teachers.find("torchvision:vit_b_16", None, "IMAGENET1K_SWAG_E2E_V1", 0).network.size == 384


@pytest.mark.parametrize(
    "given", [("torchvision:resnet18", None), ("mine", "resnet18"), ("mine", "torchvision:resnet18")]
)
def test_the_weights_compute_what_torchvision_computes(weights, given):
    name, arch = given
    if name == "mine":
        teacher = teachers.find(str(weights), arch, None, 64)
    else:
        teacher = teachers.find(name, arch, str(weights), 64)
    model = teachers.load(teacher)
    theirs = zoo.resnet18()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    theirs.eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x = (pixels / 255 - mean) / deviation
    with torch.no_grad():
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        wanted = theirs.layer3(theirs.layer2(theirs.layer1(stem)))
        found = teachers.reader(model, teacher.network, "layer3", None)(pixels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert teachers.shapes(teacher.network, model)["layer3"] == (256, 4, 4)


def test_identity_is_the_file_or_the_name(weights, tmp_path):
    first = teachers.identity(teachers.find(str(weights), "resnet18", None, 0))
    (tmp_path / "copy.pth").write_bytes(weights.read_bytes())
    assert teachers.identity(teachers.find(str(tmp_path / "copy.pth"), "resnet18", None, 0)) == first
    hog, pixels = (teachers.identity(teachers.find(name, None, None, 0)) for name in ("hog", "pixels"))
    assert len({first, hog, pixels}) == 3 and all(len(hash_) == 64 for hash_ in (first, hog, pixels))


def test_options_that_do_not_belong_are_refused(weights, tmp_path):
    assert "--weights w.pth: only for --teacher torchvision:NAME" in refused(str(weights), "resnet18", "w.pth", 0)
    assert "--arch resnet18: --teacher torchvision:resnet18 already names" in refused(
        "torchvision:resnet18", "resnet18", None, 0
    )
    assert "say with --arch which network" in refused(str(weights), None, None, 0)
    assert "did you mean 'vit_b_16'?" in refused("torchvision:vit_b16", None, None, 0)
    assert "--arch resnet81: no such network" in refused(str(weights), "resnet81", None, 0)
    network = Network("alexnet", 0.05, 2, 48)
    networks.save(tmp_path / "ours.safetensors", networks.build(network, 0, "t").state_dict(), network)
    assert "leave --arch out" in refused(str(tmp_path / "ours.safetensors"), "alexnet", None, 0)
    assert teachers.find(str(tmp_path / "ours.safetensors"), None, None, 0).network == network


def test_timm_where_it_is_not_installed(weights, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused("timm:vit_small_patch14_dinov2", None, str(weights), 0)
    assert line == "timm:vit_small_patch14_dinov2: timm is not installed; pip install 'ktransfer[teachers]'"
    assert "not installed" in refused(str(weights), "timm:resnet50", None, 0)
    assert "not installed" in refused("timm:resnet50", None, None, 0)


class TimmViT(nn.Module):
    """A transformer with timm's attributes and names, with two tokens before those of the patches."""

    def __init__(self, img_size):
        super().__init__()
        self.num_prefix_tokens = 2
        self.patch_embed = nn.Conv2d(3, 6, 8, 8)
        self.blocks = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.norm = nn.LayerNorm(6)
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + (img_size // 8) ** 2, 6))

    def forward(self, x):
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.ones(len(x), 2, 6), patches], 1) + self.pos_embed
        return self.norm(self.blocks(tokens))[:, 0]


def test_timm_where_it_is_installed(tmp_path, monkeypatch):
    timm = ModuleType("timm")
    timm.is_model = lambda name: name == "tiny"
    timm.list_models = lambda: ["tiny"]
    config = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 32, 32)}
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(to_dict=lambda: config)
    asked = []

    def create_model(name, pretrained, num_classes, img_size):
        asked.append((name, pretrained, num_classes))
        return TimmViT(img_size)

    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    torch.save({"teacher": TimmViT(32).state_dict()}, tmp_path / "dino.pth")
    teacher = teachers.find("timm:tiny", None, str(tmp_path / "dino.pth"), 0)
    assert teacher.network == Network("timm:tiny", size=32, normalise="0.5,0.5,0.5/0.25,0.25,0.25")
    model = teachers.load(teacher)
    assert asked == [("tiny", False, 0)]
    shapes = teachers.shapes(teacher.network, model)
    assert shapes == dict.fromkeys(("blocks.0", "blocks.1", "norm"), (6, 4, 4)) | {"pooled": (6, 1, 1)}
    assert teachers.last_layer(shapes) == "norm"
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert teachers.choose_token(model, teacher.network, None, "norm") == "cls"
    with torch.no_grad():
        found = teachers.reader(model, teacher.network, "norm", "cls")(pixels)
        torch.testing.assert_close(found[:, :, 0, 0], model((pixels / 255 - 0.5) / 0.25))
    config["mean"] = None
    assert teachers.find("timm:tiny", None, str(tmp_path / "dino.pth"), 48).network == Network("timm:tiny", size=48)
    config["mean"] = (0.5, 0.5, 0.5)
    assert "there are such as tiny" in refused("timm:qqq", None, str(tmp_path / "dino.pth"), 0)
    assert "did you mean 'tiny'" in refused("timm:tinny", None, str(tmp_path / "dino.pth"), 0)
    assert teachers.find(str(tmp_path / "dino.pth"), "timm:tiny", None, 0).network == teacher.network


def test_the_listing_of_a_transformer_names_its_tokens():
    network = Network("timm:tiny", size=32)
    shown = teachers.listing(network, TimmViT(32)).splitlines()
    assert "--token patch (cls and mean: one number a channel)" in shown[0]
    assert [line.split()[0] for line in shown[1:]] == ["blocks.0", "blocks.1", "norm", "pooled"]
    registers = TimmViT(32)
    registers.has_class_token = False
    assert teachers.choose_token(registers, network, None, "pooled") == "mean"
    headless = TimmViT(32)
    headless.num_prefix_tokens = 0
    with pytest.raises(UsageError, match="has no class token; give mean or patch"):
        teachers.choose_token(headless, network, "cls", "pooled")
    assert teachers.choose_token(headless, network, None, "pooled") == "mean"
