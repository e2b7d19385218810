"""What lies before a layer, for every family of networks, and weights scaled to unit variance."""

import pytest
import torch
from torch import nn

from ktransfer import networks
from ktransfer.eval.learners.heads import before, copied, trunk, unit_variance, with_classes
from ktransfer.networks import Network

ALEXNET = Network("alexnet_bn", 0.05, 2, 56)


def test_before_a_layer_of_an_alexnet():
    model = with_classes(ALEXNET, 5, 0, "test")
    found = before(model, "relu3", 56)
    assert {name.split(".")[0] for name in found.names} == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
    assert {"bn1.running_mean", "bn1.num_batches_tracked", "conv3.bias"} <= found.names
    assert {"bn3", "relu3", "pool2"} <= set(found.modules) and "conv4" not in found.modules
    found = before(model, "bn6", 56)
    assert {name.split(".")[0] for name in found.names if name[0] == "f"} == {"fc6"}
    assert "fc7.weight" not in found.names and "bn6.running_var" in found.names


@pytest.mark.parametrize(
    ("arch", "size", "layer", "inside", "outside"),
    [
        ("vgg11", 32, "conv3_1", "features.6.weight", "features.8.weight"),
        ("resnet18", 32, "layer2", "layer2.1.bn2.running_var", "layer3.0.conv1.weight"),
        (
            "vit_b_32",
            32,
            "blocks.0",
            "encoder.layers.encoder_layer_0.self_attention.out_proj.weight",
            "heads.head.bias",
        ),
        ("swin_t", 32, "features.1", "features.1.1.attn.relative_position_bias_table", "features.3.0.norm1.weight"),
    ],
)
def test_before_a_layer_of_others(arch, size, layer, inside, outside):
    network = Network(arch, size=size, classes=7)
    model = with_classes(network, 4, 0, "test")
    found = before(model, networks.layers(network, model)[layer], size)
    assert inside in found.names and outside not in found.names
    if arch == "vit_b_32":
        assert {"class_token", "encoder.pos_embedding", "conv_proj.weight"} <= found.names
        assert "encoder.layers.encoder_layer_1.mlp.0.weight" not in found.names

    # What is not said to lie before has no part in the layer's output, and what is has one.
    image, path = torch.randn(2, 3, size, size), networks.layers(network, model)[layer]
    for weight in model.parameters():
        weight.requires_grad_(True)
    maps = networks.feature_maps(model.eval(), {layer: path}, image)[layer]
    maps.square().sum().backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert moved <= found.names
    assert {name for name in found.names if name in dict(model.named_parameters())} <= moved | {"class_token"}


def test_the_trunk_of_a_vgg_gets_a_linear_layer_and_can_be_loaded_without(tmp_path):
    network = Network("vgg16_bn", 0.05, 2, 32)
    model = with_classes(network, 5, 0, "test")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    networks.save(tmp_path / "model.safetensors", model.state_dict(), network)
    trunk = networks.load(tmp_path / "model.safetensors", network)
    state = model.state_dict()
    assert all(value.equal(state[name]) for name, value in trunk.state_dict().items())
    assert set(state) - set(trunk.state_dict()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("arch", "size", "last", "first"),
    [
        ("squeezenet1_1", 32, "features.12.expand3x3.bias", "classifier.1.weight"),
        ("shufflenet_v2_x0_5", 32, "conv5.1.num_batches_tracked", "fc.weight"),
        ("vit_b_32", 32, "encoder.ln.bias", "heads.head.weight"),
        ("swin_t", 32, "norm.weight", "head.bias"),
        ("torchvision:alexnet", 64, "features.10.bias", "classifier.1.weight"),
        ("alexnet", 32, "conv5.bias", "fc6.weight"),
    ],
)
def test_the_trunk_is_all_but_the_classifier(arch, size, last, first):
    width = 0.05 if arch == "alexnet" else 1.0
    network = Network(arch, width, size=size, classes=3)
    model = with_classes(network, 4, 0, "test")
    found = trunk(network, model)
    assert last in found.names and first not in found.names
    # The modules hold just that, but for the class token of a transformer.
    held = {f"{name}.{key}" for name in found.modules for key in model.get_submodule(name).state_dict()}
    assert held | {"class_token"} == found.names | {"class_token"}


def test_networks_of_the_same_seed_are_the_same_and_copies_take_what_is_named():
    first, second, other = (with_classes(ALEXNET, 5, seed, "test") for seed in (0, 0, 1))
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    names = before(other, "relu2", 56).names
    mixed = copied(first, other, names).state_dict()
    for name, value in mixed.items():
        assert value.equal((other if name in names else second).state_dict()[name])
    assert not mixed["conv1.weight"].equal(second.state_dict()["conv1.weight"])


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
def test_every_layer_has_unit_variance(arch):
    network = Network(arch, 0.05, 2, 64)
    model = with_classes(network, 5, 0, "test")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(3.7)
                module.bias.uniform_(-1, 1)
        if arch == "vgg16":
            model.head.weight.normal_()
    before_ = {name: value.clone() for name, value in model.state_dict().items()}
    x = networks.normalise(torch.randint(0, 256, (8, 3, 64, 64)), "imagenet")
    unit_variance(model, x)
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out.detach().clone()}))
    with torch.no_grad():
        model(x)
    assert len(outputs) == {"alexnet": 8, "vgg16": 11}[arch]
    for name, out in outputs.items():
        assert float(out.var(correction=0)) == pytest.approx(1, rel=1e-3), name
        scale = model.state_dict()[f"{name}.weight"] / before_[f"{name}.weight"]
        assert float(scale.std()) < 1e-5 * float(scale.mean())  # one number for a layer
        torch.testing.assert_close(
            model.state_dict()[f"{name}.bias"] / before_[f"{name}.bias"],
            scale.mean().expand(len(model.state_dict()[f"{name}.bias"])),
            rtol=1e-4,
            atol=0,
        )


def test_a_layer_without_variance_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.ones_(model[2].bias)
    unit_variance(model, torch.randn(4, 3, 8, 8))
    assert not model[2].weight.any() and model[2].bias.eq(1).all()
