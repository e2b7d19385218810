"""The layers of timm's networks: all families, whatever the form of their tokens or maps."""

from dataclasses import replace

import pytest
import torch

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network, teachers

# Network -> side, its last layer, and how many of the maps that timm itself hands over are found among the layers.
FAMILIES = {
    "levit_128s": (224, "stages.2", 3),
    "pit_ti_distilled_224": (224, "transformers", 3),
    "hiera_tiny_224": (224, "blocks.11", 4),
    "mixer_s32_224": (64, "norm", 8),
    "resmlp_12_224": (64, "norm", 12),
    "cait_xxs24_224": (64, "norm", 24),
    "xcit_nano_12_p16_224": (64, "norm", 12),
    "swin_tiny_patch4_window7_224": (64, "norm", 4),
    "pvt_v2_b0": (64, "stages", 4),
    "crossvit_tiny_240": (240, "norm.1", 3),
    "vit_tiny_patch16_224": (64, "norm", 12),
    "deit_tiny_distilled_patch16_224": (64, "norm", 12),
    "convnext_atto": (64, "norm_pre", 4),
    "resnet18": (64, "layer4", 5),
}


def made(name, side):
    network = Network(f"timm:{name}", size=side)
    return network, networks.build(network, 0, "test").eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_what_timm_hands_over(name):
    pytest.importorskip("timm")
    side, last, matched = FAMILIES[name]
    network, model = made(name, side)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    paths = networks.layers(network, model)
    with torch.no_grad():
        ours = networks.feature_maps(model, paths, x)
        theirs = model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
    found = [any(a.shape == b.shape and torch.allclose(a, b, atol=1e-4) for a in ours.values()) for b in theirs]
    assert sum(found) == matched
    shapes = teachers.shapes(network, model)
    assert teachers.last_layer(shapes) == last and all(h == w for _, h, w in shapes.values())


def test_a_class_token_that_comes_late():
    pytest.importorskip("timm")
    network, model = made("cait_xxs24_224", 64)
    assert teachers.choose_token(model, network, None, "norm") == "cls"
    assert teachers.choose_token(model, network, None, "blocks.3") == "mean"
    with pytest.raises(UsageError, match=r"no class token yet in blocks\.3; give mean or patch, or a later --layer"):
        teachers.choose_token(model, network, "cls", "blocks.3")


@pytest.mark.parametrize(
    ("name", "side", "last"), [("levit_128s", 64, "stages.2"), ("swin_tiny_patch4_window7_224", 32, "norm")]
)
def test_the_last_layer_does_not_vanish_from_small_images(name, side, last):
    pytest.importorskip("timm")
    shapes = teachers.shapes(*made(name, side))
    assert shapes[last][1:] == (1, 1) and teachers.last_layer(shapes) == last


def test_only_what_helps_is_advised():
    network = Network("torchvision:maxvit_t", size=256)
    with pytest.raises(UsageError, match=r"does not take images of this size .*; give --size 224$"):
        teachers.shapes(network, networks.build(network, 0, "test").eval())
    network = replace(network, arch="torchvision:alexnet", size=32)
    with pytest.raises(UsageError, match=r"does not take images so small .*; give a larger --size, such as 64$"):
        teachers.shapes(network, networks.build(network, 0, "test").eval())
