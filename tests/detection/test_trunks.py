import pytest
import torch
from torch import nn
from torchvision import models as zoo
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops.misc import FrozenBatchNorm2d

from ktransfer import networks
from ktransfer.detection import trunks
from ktransfer.errors import UsageError
from ktransfer.networks import Network, teachers


@pytest.mark.parametrize(
    ("network", "neck", "wanted"),
    [
        (Network("alexnet", 0.25), "single", {"c4": 16}),
        (Network("alexnet_bn", 0.25), "p2-p6", {"p2": 4, "p3": 8, "p4": 16, "pool": 32}),
        (Network("vgg16_bn", 0.1), "single", {"c3": 8}),
        (Network("resnet18"), "p3-p7", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
        (Network("resnet18"), "p2-p6", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "pool": 64}),
        (Network("torchvision:efficientnet_b0"), "p3-p7", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
    ],
)
def test_levels_and_strides(network, neck, wanted):
    trunk = trunks.build(network, None, neck, "bn", 0, 32)
    assert trunks.strides(trunk) == wanted
    maps = trunk.eval()(torch.zeros(1, 3, 96, 96))
    assert {found.shape[1] for found in maps.values()} == {trunk.out_channels}
    assert neck == "single" or trunk.out_channels == 32


def test_maps_are_those_of_the_network():
    network = Network("resnet18")
    model = networks.build(network, 3, "detection/trunk").eval()
    trunk = trunks.build(network, None, "single", "bn", 3).eval()
    x = torch.randn(1, 3, 64, 64)
    wanted = networks.feature_maps(model, {"layer4": "layer4"}, x)["layer4"]
    torch.testing.assert_close(trunk(x)["c5"], wanted)
    body, levels = trunks.split(network, model)
    assert levels == {2: ("layer1", 64), 3: ("layer2", 128), 4: ("layer3", 256), 5: ("layer4", 512)}
    assert "fc" not in dict(body.named_children())


def test_alexnets_cells_look_where_heads_expect_them():
    """Cell i of a map of stride 16 sees a window around pixel 16 i."""
    network = Network("alexnet", 0.25)
    trunk = trunks.build(network, None, "single", "bn", 0).eval()
    for name, part in trunk.body.named_children():
        if isinstance(part, nn.Conv2d):
            nn.init.constant_(part.weight, 1.0 / part.weight[0].numel())
        if isinstance(part, nn.MaxPool2d):  # of equals it takes the first: no centre
            trunk.body.add_module(name, nn.AvgPool2d(part.kernel_size, part.stride, part.padding))
    x = torch.zeros(1, 3, 160, 160, requires_grad=True)
    maps = trunk(x + 1e-3)["c4"]
    assert maps.shape[-1] == 10
    maps[0, :, 5, 4].sum().backward()
    seen = x.grad.abs().sum((0, 1))
    line = torch.arange(160.0)
    row, column = (seen.sum(1) * line).sum() / seen.sum(), (seen.sum(0) * line).sum() / seen.sum()
    assert abs(float(row) - 80) < 2 and abs(float(column) - 64) < 2


def test_a_vgg_of_torchvision_has_five_levels():
    with torch.device("meta"):  # without the numbers of its classifier
        model = zoo.vgg16()
    model.features = make_layers(cfgs["D"])
    _, levels = trunks.split(Network("vgg16", classes=1000), model)
    assert levels == {2: ("15", 256), 3: ("22", 512), 4: ("29", 512)}


def test_weights_of_a_run_come_in(tmp_path):
    network = Network("alexnet_bn", 0.25, classes=5, size=96, task="pseudo-labels")
    model = networks.build(network, 9, "x")
    networks.save(tmp_path / "model.safetensors", model.state_dict(), network)
    found = networks.trunk(networks.describe(tmp_path / "model.safetensors"))
    trunk = trunks.build(found, tmp_path / "model.safetensors", "p3-p7", "gn", 0, 32)
    torch.testing.assert_close(trunk.body.conv3.weight, model.conv3.weight)
    assert trunk.how == "imagenet" and isinstance(trunk.body.bn3, nn.GroupNorm)


@pytest.mark.parametrize(("norm", "kind"), [("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm)])
def test_norms_stand_everywhere(norm, kind):
    trunk = trunks.build(Network("resnet18"), None, "p3-p7", norm, 0, 64)
    norms = [part for part in trunk.modules() if isinstance(part, nn.modules.batchnorm._NormBase | nn.GroupNorm)]
    assert len(norms) == 20 + 6 and all(type(part) is kind for part in norms)
    assert norm != "gn" or {part.num_groups for part in trunk.body.modules() if isinstance(part, kind)} == {32}


def test_groups_divide_the_channels():
    assert [trunks.group_norm(channels).num_groups for channels in (64, 24, 40, 112)] == [32, 8, 8, 16]
    assert [trunks.wide_groups(channels).num_groups for channels in (256, 64, 32, 8)] == [32, 8, 4, 1]
    assert [trunks.wide_groups(channels).num_groups for channels in (68, 132, 17, 1000)] == [4, 4, 1, 1]
    for channels in range(8, 1025):  # all that `--channels` allows
        found = trunks.wide_groups(channels).num_groups
        assert channels // found >= 8


def test_frozen_norms_keep_statistics_and_need_weights(tmp_path):
    with pytest.raises(UsageError, match="random weights have no statistics"):
        trunks.build(Network("resnet18"), None, "single", "frozen", 0)
    with pytest.raises(UsageError, match=r"^norm syncbn: [^\n]+ valid: bn, gn, frozen$"):
        trunks.build(Network("resnet18"), None, "single", "syncbn", 0)
    model = networks.build(Network("resnet18"), 0, "x")
    model.train()(torch.randn(8, 3, 64, 64))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    frozen = trunks.build(Network("resnet18"), tmp_path / "w.pth", "single", "frozen", 0, foreign=True)
    assert sum(isinstance(part, FrozenBatchNorm2d) for part in frozen.modules()) == 20
    x = torch.randn(1, 3, 64, 64)
    wanted = networks.feature_maps(model.eval(), {"layer4": "layer4"}, x)["layer4"]
    torch.testing.assert_close(frozen.train()(x)["c5"], wanted, atol=1e-4, rtol=1e-4)


def test_a_still_trunk_keeps_weights_and_statistics():
    trunk = trunks.build(Network("resnet18"), None, "p3-p7", "bn", 0, 32).freeze()
    before = {name: value.clone() for name, value in trunk.body.state_dict().items()}
    maps = trunk.train()(torch.randn(2, 3, 64, 64))
    maps["p3"].sum().backward()
    assert all(torch.equal(before[name], value) for name, value in trunk.body.state_dict().items())
    assert all(part.grad is None for part in trunk.body.parameters())
    assert all(part.grad is not None for part in trunk.neck.inner_blocks.parameters())


def test_a_part_of_a_trunk_stays():
    trunk = trunks.build(Network("resnet18"), None, "p3-p7", "bn", 0, 32).freeze(["conv1", "layer1"])
    before = {name: value.clone() for name, value in trunk.body.state_dict().items()}
    sum(part.sum() for part in trunk.train()(torch.randn(2, 3, 64, 64)).values()).backward()
    after = trunk.body.state_dict()
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {"layer2", "layer3", "layer4"}
    learning = {name.split(".")[0] for name, part in trunk.body.named_parameters() if part.grad is not None}
    assert learning == moved


def test_unknown_trunks_are_one_line():
    for arch in ("vit_b_32", "torchvision:alexnet", "densenet121"):
        with pytest.raises(UsageError, match="not a backbone of detectors"):
            trunks.build(Network(arch), None, "single", "bn", 0)
    with pytest.raises(UsageError, match="no feature map"):
        trunks.build(Network("alexnet", 0.1, 1), None, "p3-p7", "bn", 0)


def test_a_trunk_with_one_map_gets_its_pyramid_too():
    """AlexNet of stride 2, as targets for small images are: C3 alone, and two coarser maps made from it."""
    trunk = trunks.build(Network("alexnet_bn", 0.1, 2), None, "p3-p7", "gn", 0, 16)
    assert list(trunks.strides(trunk).values()) == [8, 16, 32]


@pytest.mark.parametrize("norm", ["bn", "frozen", "gn"])
def test_a_published_efficientnet_has_the_maps_of_timm(norm):
    timm = pytest.importorskip("timm")
    teacher = teachers.find("efficientnet-lite0", None, None, 64)
    trunk = trunks.build(teacher.network, teacher.weights, "single", norm, 0, foreign=True).eval()
    model = teachers.load(teacher)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    whole.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        ((name, found),) = trunk(x).items()
        wanted = whole(x)[-1]
    assert name == "c5" and found.shape == wanted.shape == (1, 320, 2, 2)
    assert torch.allclose(found, wanted, atol=1e-3) is (norm != "gn")
    activations = [module for module in trunk.modules() if isinstance(module, torch.nn.ReLU6)]
    assert len(activations) == len([module for module in model.modules() if isinstance(module, torch.nn.ReLU6)]) - 1
    assert trunks.strides(trunks.build(teacher.network, None, "p3-p7", "gn", 0)) == {
        f"p{level}": 2**level for level in range(3, 8)
    }
