"""Networks: sizes of the papers, names and numbers of torchvision, weights that say what they are."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision import models as zoo
from torchvision.models import vision_transformer
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.v2 import functional as v2

from ktransfer import networks, rng
from ktransfer.errors import UsageError
from ktransfer.networks import Network

TINY = Network("alexnet", 0.1, 2, 64, 5)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_alexnet_has_the_sizes_of_the_published_puzzle_network():
    model = networks.build(Network("alexnet", 1.0, 2, 64), 0, "t").eval()
    order = [f"{kind}{n}" for n in (1, 2) for kind in ("conv", "relu", "pool", "norm")]
    order += [f"{kind}{n}" for n in (3, 4, 5) for kind in ("conv", "relu")] + ["pool5"]
    assert [name for name, _ in model.named_children()] == order
    found = networks.feature_maps(model, {name: name for name in order}, noise(1, 3, 64, 64))
    shapes = [tuple(found[name].shape[1:3]) for name in ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5")]
    assert shapes == [(96, 27), (96, 13), (256, 13), (256, 6), (384, 6), (384, 6), (256, 6)]
    assert found["norm1"].shape[-1] == 13 and found["norm2"].shape[-1] == 6
    assert found["pool5"].shape == (1, 256, 3, 3)


def test_full_alexnet_has_the_known_number_of_parameters():
    # Caffe's reference AlexNet: fewer channels meet in the grouped convolutions than in torchvision's.
    with torch.device("meta"):
        model = networks.AlexNet(Network("alexnet", 1.0, 4, 227, 1000))
    assert sum(p.numel() for p in model.parameters()) == 60_965_224
    assert model.fc6.in_features == 256 * 6 * 6
    groups = [model.get_submodule(f"conv{number}").groups for number in range(1, 6)]
    assert groups == [1, 2, 1, 2, 2]


@pytest.mark.parametrize("arch", ["alexnet", "alexnet_bn"])
def test_response_or_batch_normalisation_but_not_both(arch):
    kinds = [type(module) for module in networks.build(replace(TINY, arch=arch), 0, "t").modules()]
    count = [kinds.count(kind) for kind in (nn.LocalResponseNorm, nn.BatchNorm2d, nn.BatchNorm1d)]
    assert count == ([2, 0, 0] if arch == "alexnet" else [0, 5, 2])


def test_alexnet_computes_what_its_layers_say():
    model = networks.build(TINY, 0, "t").eval()
    x = noise(2, 3, 64, 64)
    get = model.get_submodule

    def lrn(maps: torch.Tensor) -> torch.Tensor:  # Caffe's: alpha is divided by the window
        padded = F.pad(maps.square(), (0, 0, 0, 0, 2, 2))
        total = sum(padded[:, shift : shift + maps.shape[1]] for shift in range(5))
        return maps / (1 + 1e-4 / 5 * total) ** 0.75

    maps = {}
    y = x
    for number, stride, padding, groups in ((1, 2, 0, 1), (2, 1, 2, 2), (3, 1, 1, 1), (4, 1, 1, 2), (5, 1, 1, 2)):
        conv = get(f"conv{number}")
        y = maps[f"conv{number}"] = F.conv2d(y, conv.weight, conv.bias, stride, padding, 1, groups).clamp(min=0)
        if number in (1, 2):
            y = lrn(F.max_pool2d(y, 3, 2, ceil_mode=True))
    y = F.max_pool2d(y, 3, 2, ceil_mode=True).flatten(1)
    for name in ("fc6", "fc7"):
        y = F.linear(y, get(name).weight, get(name).bias).clamp(min=0)
    y = F.linear(y, get("fc8").weight, get("fc8").bias)
    torch.testing.assert_close(model(x), y)

    layers = networks.layers(TINY, model)
    found = networks.feature_maps(model, layers, x)
    assert list(found) == list(maps) == [f"conv{number}" for number in range(1, 6)]
    for name, value in found.items():
        torch.testing.assert_close(value, maps[name])
        assert value.min() == 0 and value.max() > 0
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_only_while_training():
    model = networks.build(replace(TINY, arch="alexnet_bn"), 0, "t")
    x = noise(4, 3, 64, 64)
    assert model.training and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_the_smallest_tiles_and_larger_images_pass():
    for size in (12, 20, 96):
        network = Network("alexnet", 0.1, 2, size, 3)
        assert networks.build(network, 0, "t")(noise(2, 3, size, size)).shape == (2, 3)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_fresh_weights_of_a_vgg_are_those_that_torchvisions_layers_would_get(batch_norm):
    network = Network("vgg16_bn" if batch_norm else "vgg16", 0.125)
    plan = [networks.scaled(c, network.width) if isinstance(c, int) else c for c in cfgs["D"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.torch_seed(7, "t", 0))
        theirs = networks.he_init(make_layers(plan[:13], batch_norm=batch_norm))
    ours = networks.build(network, 7, "t").features
    assert str(ours) == str(theirs) and plan[13] == "M"
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("arch", ["vgg16", "vgg16_bn"])
def test_vgg_is_torchvisions_up_to_conv4_3(arch):
    trunk = networks.build(Network(arch), 0, "t")
    theirs = getattr(zoo, arch)().features
    upto = len(trunk.features)
    assert arch != "vgg16" or upto == 23
    assert isinstance(theirs[upto], nn.MaxPool2d) and isinstance(theirs[upto - 1], nn.ReLU)
    prefix = theirs[:upto]
    assert {k: v.shape for k, v in trunk.features.state_dict().items()} == {
        k: v.shape for k, v in prefix.state_dict().items()
    }
    prefix.load_state_dict(trunk.features.state_dict())
    x = noise(1, 3, 40, 40)
    with torch.no_grad():
        expected = prefix.eval()(x)
        layers = networks.layers(Network(arch), trunk.eval())
        found = networks.feature_maps(trunk, layers, x)
    places = ((1, 2), (2, 2), (3, 3), (4, 3))
    assert list(found) == [f"conv{block}_{place}" for block, count in places for place in range(1, count + 1)]
    assert expected.shape == (1, 512, 5, 5)
    torch.testing.assert_close(found["conv4_3"], expected)
    assert [v.shape[1] for v in found.values()] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 3
    assert all(value.min() >= 0 for value in found.values())


def test_a_whole_vgg_names_its_thirteen_layers():
    with torch.device("meta"):
        model = zoo.vgg16_bn()
    layers = networks.layers(Network("vgg16_bn", classes=1000), model)
    assert len(layers) == 13 and list(layers)[-1] == "conv5_3"
    assert all(isinstance(model.get_submodule(path), nn.ReLU) for path in layers.values())


def test_width_scales_all_channels_in_steps_of_eight():
    assert [networks.scaled(96, width) for width in (1, 0.5, 0.25, 0.01, 1.5)] == [96, 48, 24, 8, 144]
    half = networks.build(Network("alexnet_bn", 0.5, 2, 64, 7), 0, "t")
    channels = [half.get_submodule(f"conv{n}").out_channels for n in range(1, 6)]
    assert channels == [48, 128, 192, 192, 128]
    assert (half.fc6.out_features, half.fc7.out_features, half.fc8.out_features) == (2048, 2048, 7)
    thin = networks.build(Network("vgg16", 0.125), 0, "t")
    widths = [module.out_channels for module in thin.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [8, 8, 16, 16, 32, 32, 32, 64, 64, 64]


def test_layers_of_torchvisions_networks_are_maps():
    network = Network("resnet18", size=64, classes=4)
    model = networks.build(network, 0, "t")
    found = networks.layers(network, model)
    assert list(found) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert model.training
    model.eval()
    x = noise(2, 3, 64, 64)
    maps = networks.feature_maps(model, found, x)
    with torch.no_grad():
        stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        expected = model.layer1(stem)
    torch.testing.assert_close(maps["stem"].detach(), stem)
    torch.testing.assert_close(maps["layer1"].detach(), expected)

    network = Network("torchvision:alexnet", size=96)
    model = networks.build(network, 0, "t")
    found = networks.layers(network, model)
    assert found == {f"conv{n}": f"features.{place}" for n, place in enumerate((1, 4, 7, 9, 11), start=1)}
    assert all(isinstance(model.get_submodule(path), nn.ReLU) for path in found.values())

    network = Network("mobilenet_v3_small", size=96, classes=4)
    model = networks.build(network, 0, "t")
    found = networks.layers(network, model)
    assert list(found) == [f"features.{number}" for number in range(13)] and list(found) == list(found.values())
    maps = networks.feature_maps(model.eval(), found, noise(1, 3, 96, 96))
    assert all(value.ndim == 4 and value.shape[-1] > 1 for value in maps.values())


def test_maps_of_a_swin_transformer_have_their_channels_first():
    network = Network("swin_t", size=64, classes=4)
    model = networks.build(network, 0, "t").eval()
    found = networks.layers(network, model)
    assert list(found) == [f"features.{number}" for number in range(8)]
    x = noise(2, 3, 64, 64)
    maps = networks.feature_maps(model, found, x)
    assert [value.shape[1] for value in maps.values()] == [96, 96, 192, 192, 384, 384, 768, 768]
    assert [value.shape[-1] for value in maps.values()] == [16, 16, 8, 8, 4, 4, 2, 2]
    with torch.no_grad():
        convolution = model.features[0][0](x)
    plain = F.layer_norm(convolution.permute(0, 2, 3, 1), (96,), eps=1e-5).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps["features.0"].detach(), plain, rtol=1e-4, atol=1e-4)


def test_tokens_of_a_vision_transformer(monkeypatch):
    made = vision_transformer._vision_transformer
    small = {"num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
    monkeypatch.setattr(vision_transformer, "_vision_transformer", lambda **given: made(**given | small))
    network = Network("vit_b_16", size=48, classes=3)
    model = networks.build(network, 0, "t").eval()
    found = networks.layers(network, model)
    assert list(found) == ["blocks.0", "blocks.1", "norm"]
    x = noise(2, 3, 48, 48)
    with torch.no_grad():
        tokens = torch.cat([model.class_token.expand(2, -1, -1), model.conv_proj(x).flatten(2).transpose(1, 2)], 1)
        tokens = tokens + model.encoder.pos_embedding
        for name, block in zip(found, model.encoder.layers, strict=False):
            tokens = block(tokens)
            cls, mean, patch = (
                networks.feature_maps(model, found, x, token)[name] for token in ("cls", "mean", "patch")
            )
            torch.testing.assert_close(cls, tokens[:, 0, :, None, None])
            torch.testing.assert_close(mean[:, :, 0, 0], tokens[:, 1:].mean(1))
            assert patch.shape == (2, 24, 3, 3)
            torch.testing.assert_close(patch[:, :, 1, 2], tokens[:, 1 + 3 * 1 + 2])
        last = networks.feature_maps(model, found, x, "cls")["norm"][:, :, 0, 0]
        torch.testing.assert_close(model.heads(last), model(x))
    with pytest.raises(UsageError, match=r"--size 40: vit_b_16 has patches of 16 pixels; give a multiple of 16"):
        networks.build(replace(network, size=40), 0, "t")


def test_statistics_have_names():
    mean, deviation = (0.5, 0.25, 0.125), (0.1, 0.2, 0.3)
    name = networks.statistics_name(mean, deviation)
    assert networks.statistics(name) == (mean, deviation)
    assert networks.statistics_name(*networks.IMAGENET) == "imagenet"
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = v2.normalize(pixels.float() / 255, mean, deviation)
    torch.testing.assert_close(networks.normalise(pixels, name), expected)


def test_an_unknown_layer_leaves_no_hooks():
    model = networks.build(TINY, 0, "t").eval()
    with pytest.raises(RuntimeError):
        networks.feature_maps(model, {"conv1": "relu1"}, noise(1, 5, 64, 64))
    assert not model.relu1._forward_hooks


def test_build_is_a_function_of_seed_and_purpose():
    for network in (TINY, Network("vgg16_bn", 0.1), Network("resnet18", classes=3)):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = networks.build(network, 3, "a")
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert same(first, networks.build(network, 3, "a"))
        for seed, purpose in ((4, "a"), (3, "b")):
            other = networks.build(network, seed, purpose)
            first_weight, other_weight = next(iter(first.parameters())), next(iter(other.parameters()))
            assert not torch.equal(first_weight, other_weight)


def test_our_networks_start_with_fan_in_weights_and_an_undecided_head():
    model = networks.build(Network("alexnet", 0.5, 2, 64, 100), 0, "t")
    for name in ("conv2", "conv5", "fc6"):
        weight = model.get_submodule(name).weight
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.02)
    assert model.fc8.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("arch", ["alexnet_bn", "vgg16", "resnet18"])
def test_saved_and_loaded_is_the_same_network(tmp_path, arch):
    classes = 5 if arch == "resnet18" else 0
    network = Network(arch, 1.0 if arch == "resnet18" else 0.1, 2, 64, classes, "picture", "jigsawpp")
    model = networks.build(network, 7, "t")
    path = tmp_path / "new" / "model.safetensors"
    networks.save(path, model.state_dict(), network)
    assert networks.describe(path) == network
    assert same(networks.load(path, network), model)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as handle:
        assert set(handle.keys()) == set(model.state_dict())


def test_load_leaves_a_puzzles_head_out_and_takes_another_stride(tmp_path):
    network = Network("alexnet", 0.1, 2, 64)
    model = networks.build(network, 7, "t")
    path = tmp_path / "model.safetensors"
    networks.save(path, model.state_dict() | {"head.fc8.weight": torch.ones(2, 2)}, network)
    loaded = networks.load(path, replace(network, stride=4))
    assert same(loaded, model) and loaded.conv1.stride == (4, 4)


@pytest.mark.parametrize("arch", ["alexnet", "alexnet_bn"])
def test_the_trunk_of_a_classifier_loads_without_its_layers(tmp_path, arch):
    network = Network(arch, 0.1, 2, 64, 5)
    model = networks.build(network, 7, "t").eval()
    path = tmp_path / "model.safetensors"
    networks.save(path, model.state_dict(), network)
    trunk = networks.load(path, replace(network, classes=0)).eval()
    x = noise(1, 3, 64, 64)
    assert torch.equal(trunk(x), model.maps(x))


def bad_files(folder: Path) -> dict[str, Path]:
    good = folder / "good.safetensors"
    networks.save(good, networks.build(TINY, 0, "t").state_dict(), TINY)
    content = good.read_bytes()
    weights = {"a": torch.ones(2)}
    files = {name: folder / f"{name}.safetensors" for name in ("text", "empty", "cut", "head", "plain", "odd", "list")}
    files["text"].write_text("not\na weight file\n" * 10)
    files["empty"].write_bytes(b"")
    files["cut"].write_bytes(content[: len(content) // 2])
    files["head"].write_bytes(content[:20])
    save_file(weights, files["plain"])
    save_file(weights, files["odd"], metadata={"network": json.dumps({"architecture": "alexnet"})})
    save_file(weights, files["list"], metadata={"network": "[1"})
    return files | {"missing": folder / "missing.safetensors", "folder": folder}


def test_what_is_not_a_weight_file_of_ours_is_one_line(tmp_path):
    for name, path in bad_files(tmp_path).items():
        with pytest.raises(UsageError) as caught:
            networks.describe(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), name


def test_weights_of_another_network_are_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    networks.save(path, networks.build(TINY, 0, "t").state_dict(), TINY)
    for other in (replace(TINY, width=0.2), replace(TINY, arch="alexnet_bn"), replace(TINY, classes=6)):
        with pytest.raises(UsageError, match=rf"do not fit {other.arch}") as caught:
            networks.load(path, other)
        assert "\n" not in str(caught.value)


def test_same_weights_same_bytes_in_any_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ktransfer import networks; from ktransfer.networks import Network\n"
        "n = Network('alexnet_bn', 0.1, 2, 32, 3)\n"
        "networks.save(Path(sys.argv[1]), networks.build(n, 1, 'x').state_dict(), n)"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    subprocess.run([sys.executable, "-c", code, str(there)], env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)
    network = Network("alexnet_bn", 0.1, 2, 32, 3)
    for _ in range(3):
        networks.save(here, networks.build(network, 1, "x").state_dict(), network)
        assert here.read_bytes() == there.read_bytes()


def test_every_classifier_of_torchvision_is_known_and_others_are_not():
    theirs = zoo.list_models(module=zoo)
    assert len(theirs) > 70 and "resnet18" in theirs
    for name in (*networks.TRUNKS, *theirs, *(f"torchvision:{name}" for name in theirs)):
        networks.check_arch(name)
    for name in ("resnet81", "torchvision:resnet81", "torchvision:alexnet_bn", "fcn_resnet50", "", "torchvision:"):
        with pytest.raises(UsageError, match=r"^--arch [^\n]+$"):
            networks.check_arch(name)
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        networks.check_arch("resnet1")
    for name in networks.TRUNKS:
        networks.check_arch(name, 0.25, trunk=True)
    for name in ("resnet18", "torchvision:alexnet"):
        with pytest.raises(UsageError, match="no such network"):
            networks.check_arch(name, trunk=True)
    networks.check_arch("alexnet_bn", 0.25)
    for name in ("vgg16", "resnet18"):
        with pytest.raises(UsageError, match="only alexnet and alexnet_bn can be scaled"):
            networks.check_arch(name, 0.25)


def test_torchvisions_alexnet_goes_by_its_prefix():
    model = networks.build(Network("torchvision:alexnet", classes=3), 0, "t")
    assert isinstance(model, zoo.AlexNet) and model.classifier[6].out_features == 3
    assert isinstance(networks.build(Network("vgg16", classes=3), 0, "t"), zoo.VGG)


def test_googlenet_has_no_second_output():
    model = networks.build(Network("googlenet", classes=3), 0, "t")
    assert model(noise(2, 3, 64, 64)).shape == (2, 3)


def test_normalise_by_imagenet_or_by_the_image():
    pixels = torch.randint(0, 256, (3, 3, 9, 9), generator=torch.Generator().manual_seed(0)).byte()
    expected = v2.normalize(v2.to_dtype(pixels, torch.float32, scale=True), *networks.IMAGENET)
    torch.testing.assert_close(networks.normalise(pixels, "imagenet"), expected, atol=1e-5, rtol=1e-5)
    own = networks.normalise(pixels, "picture")
    torch.testing.assert_close(own, F.layer_norm(pixels.float(), (3, 9, 9)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(networks.normalise(pixels.float(), "picture"), own)
    flat = networks.normalise(torch.full((1, 3, 4, 4), 7).byte(), "picture")
    assert torch.equal(flat, torch.zeros_like(flat))
