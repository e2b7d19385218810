"""Checkpoints as other projects save them: what is in them is found, what is not theirs is refused in one line."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models as zoo

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import checkpoints, teachers


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return zoo.resnet18(num_classes=4)


def states(model, seed=1, drop=("fc.",)):
    """Other weights of the same shapes, without the classifier; and one for each copy that wrappers keep."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith(drop)
    }


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


HEAD = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
NUMBERS = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]


def numbered(state):
    """As nn.Sequential(*list(resnet.children())[:-1]) names it."""
    return {f"{NUMBERS.index(name.split('.')[0])}.{name.split('.', 1)[1]}": value for name, value in state.items()}


def vissl(mine, other):
    trunk = under("_feature_blocks.", mine)
    inner = {"trunk": trunk, "heads": {"0.clf.0.weight": HEAD["weight"]}}
    return {"phase_idx": 9, "classy_state_dict": {"base_model": {"model": inner}, "loss": {}}}


WRAPPED = {
    "plain": lambda mine, other: mine,
    "vissl": vissl,
    "moco": lambda mine, other: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": under("module.encoder_k.", other)
        | under("module.encoder_q.", mine)
        | under("module.encoder_q.fc.0.", HEAD)
        | {"module.queue": torch.ones(3, 5)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(64, 3, 7, 7)}}, "param_groups": [{"lr": 0.1}]},
    },
    "simclr": lambda mine, other: {"state_dict": under("backbone.", mine) | under("backbone.fc.0.", HEAD)},
    "swav": lambda mine, other: under("module.", mine) | under("module.prototypes.", HEAD),
    "deepcluster-v2": lambda mine, other: {"state_dict": under("module.", mine) | under("module.prototypes0.", HEAD)},
    "dino": lambda mine, other: {
        "student": under("module.backbone.", other) | under("module.head.mlp.0.", HEAD),
        "teacher": under("backbone.", mine) | under("head.mlp.0.", HEAD),
    },
    "solo-learn": lambda mine, other: {
        "state_dict": under("momentum_backbone.", other) | under("backbone.", mine) | under("classifier.", HEAD)
    },
    "lightly": lambda mine, other: {
        "state_dict": under("backbone.", numbered(mine))
        | under("backbone_momentum.", numbered(other))
        | under("projection_head.layers.0.", HEAD)
    },
    "mmselfsup": lambda mine, other: {"meta": {"epoch": 1}, "state_dict": under("backbone.", mine)},
    "compiled": lambda mine, other: {"model": under("_orig_mod.encoder.", mine)},
    "lit": lambda mine, other: {"state_dict": under("model.target_encoder.", other) | under("model.online.net.", mine)},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_the_network_is_found_in_its_wrapper(tmp_path, resnet, how):
    mine, other = states(resnet, 1), states(resnet, 2)
    path = tmp_path / "weights.pth.tar"
    torch.save(WRAPPED[how](mine, other), path)
    found = checkpoints.fit(path, resnet, "resnet18")
    assert set(found.state) == set(mine)
    assert all(torch.equal(found.state[name], value) for name, value in mine.items())
    assert f"{len(mine)} tensors of resnet18 matched" in found.line
    assert "2 missing (fc.weight, fc.bias)" in found.line
    assert "\n" not in found.line
    assert ("none unexpected" in found.line) != (how in ("moco", "simclr", "swav", "deepcluster-v2"))


def test_safetensors_and_a_classifier_of_another_size(tmp_path, resnet):
    mine = states(resnet, drop=()) | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    save_file(mine, tmp_path / "weights.safetensors")
    found = checkpoints.fit(tmp_path / "weights.safetensors", resnet, "resnet18")
    assert set(found.state) == {name for name in mine if not name.startswith("fc.")}
    assert "none missing, none unexpected" in found.line


def test_a_batch_norm_without_its_counter_is_whole(tmp_path, resnet):
    mine = {name: value for name, value in states(resnet).items() if "num_batches" not in name}
    torch.save(mine, tmp_path / "old.pth")
    assert set(checkpoints.fit(tmp_path / "old.pth", resnet, "resnet18").state) == set(mine)


def test_a_transformer_under_the_names_of_timm(tmp_path):
    model = zoo.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=3).eval()
    mine = {}
    for name, value in states(model, drop=("heads.",)).items():
        for ours, theirs in (
            ("encoder.layers.encoder_layer_", "blocks."),
            ("encoder.pos_embedding", "pos_embed"),
            ("encoder.ln.", "norm."),
            ("class_token", "cls_token"),
            ("conv_proj", "patch_embed.proj"),
            ("self_attention.in_proj_", "attn.qkv."),
            ("self_attention.out_proj", "attn.proj"),
            ("ln_1", "norm1"),
            ("ln_2", "norm2"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.3", "mlp.fc2"),
        ):
            name = name.replace(ours, theirs)
        mine[name] = value
    torch.save({"state_dict": under("module.base_encoder.", mine)}, tmp_path / "moco.pth")
    found = checkpoints.fit(tmp_path / "moco.pth", model, "vit")
    wanted = states(model, drop=("heads.",))
    assert set(found.state) == set(wanted)
    assert all(torch.equal(found.state[name], value) for name, value in wanted.items())
    old = {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for name, v in wanted.items()}
    torch.save(old, tmp_path / "old.pth")
    assert set(checkpoints.fit(tmp_path / "old.pth", model, "vit").state) == set(wanted)


def refused(path, model, arch="resnet18"):
    with pytest.raises(UsageError) as caught:
        checkpoints.fit(path, model, arch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_incomplete_trunk_is_refused(tmp_path, resnet):
    mine = states(resnet)
    del mine["layer3.1.bn2.running_var"]
    torch.save(under("backbone.", mine), tmp_path / "part.pth")
    line = refused(tmp_path / "part.pth", resnet)
    assert "not complete without layer3.1.bn2.running_var" in line and "--arch" in line


def test_another_arch_is_refused_by_its_first_differing_tensor(tmp_path, resnet):
    torch.save(zoo.resnet50().state_dict(), tmp_path / "deep.pth")
    line = refused(tmp_path / "deep.pth", resnet)
    assert "layer1.0.conv1.weight is (64, 64, 1, 1) in it and (64, 64, 3, 3) in resnet18" in line


def test_nothing_of_the_kind_is_refused(tmp_path, resnet):
    torch.save({"net": {"w": torch.ones(2)}}, tmp_path / "other.pth")
    assert "its names, such as net.w, are not those of resnet18" in refused(tmp_path / "other.pth", resnet)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    assert "holds no tensors" in refused(tmp_path / "none.pth", resnet)
    assert "no such checkpoint" in refused(tmp_path / "nowhere.pth", resnet)


def test_nothing_but_tensors_is_unpickled(tmp_path, resnet, capsys):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return ran.touch, ()

    mine = states(resnet)
    torch.save({"state_dict": mine, "args": Bomb()}, tmp_path / "bomb.pth")
    found = checkpoints.fit(tmp_path / "bomb.pth", resnet, "resnet18")
    assert not ran.exists()
    assert all(torch.equal(found.state[name], value) for name, value in mine.items())
    assert "only its tensors are read; 2 left out, and not run (__builtin__.getattr" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_are_taken_and_named(tmp_path, resnet, name):
    mine, other = states(resnet, 1), states(resnet, 2)
    torch.save({"model": other, "state_dict": other, name: under("module.", mine)}, tmp_path / "both.pth")
    found = checkpoints.fit(tmp_path / "both.pth", resnet, "resnet18")
    assert all(torch.equal(found.state[name], value) for name, value in mine.items())
    assert f"matched below {name}.module, its averaged weights, 2 missing" in found.line


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "text.pth", "empty.pth"])
def test_damaged_files_are_one_line(tmp_path, resnet, name):
    path = tmp_path / name
    if name == "cut.pth":
        torch.save(states(resnet), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif name == "cut.safetensors":
        save_file(states(resnet), path)
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        path.write_bytes(np.random.default_rng(0).bytes(300) if name == "text.pth" else b"")
    assert str(path) in refused(path, resnet)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_resnet_for_small_images_is_known_by_its_first_kernels(tmp_path, arch):
    torch.manual_seed(1)
    theirs = zoo.get_model(arch).eval()
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    torch.save({"state_dict": under("backbone.", theirs.state_dict())}, tmp_path / "cifar.pth")
    teacher = teachers.find(str(tmp_path / "cifar.pth"), arch, None, 32)
    model = teachers.load(teacher)
    shapes = teachers.shapes(teacher.network, model)
    assert shapes["stem"] == (64, 32, 32) and shapes["layer4"][1:] == (4, 4)
    theirs.avgpool, theirs.fc = torch.nn.Identity(), torch.nn.Identity()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        wanted = theirs(networks.normalise(pixels, "imagenet"))
        found = teachers.reader(model, teacher.network, "layer4", None)(pixels)
    torch.testing.assert_close(found.flatten(1), wanted)
    line = checkpoints.fit(tmp_path / "cifar.pth", zoo.get_model(arch), arch).line
    assert "its first layer is that for small images: 3 x 3, no stride, no pooling" in line


@pytest.mark.parametrize("size", [32, 96])
def test_a_transformer_of_torchvision_takes_other_sizes(tmp_path, size):
    torch.manual_seed(1)
    theirs = zoo.vit_b_32(num_classes=3)
    torch.nn.init.normal_(theirs.encoder.pos_embedding)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    resized = zoo.vision_transformer.interpolate_embeddings(size, 32, theirs.state_dict())
    wanted = zoo.vit_b_32(num_classes=3, image_size=size).eval()
    wanted.load_state_dict(resized)
    wanted.heads = torch.nn.Identity()
    teacher = teachers.find("torchvision:vit_b_32", None, str(tmp_path / "vit.pth"), size)
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        found = teachers.reader(teachers.load(teacher), teacher.network, "norm", "cls")(pixels)
        torch.testing.assert_close(found.flatten(1), wanted(networks.normalise(pixels, teacher.network.normalise)))
    assert (
        f"position embeddings resampled to {size} pixels" in checkpoints.fit(tmp_path / "vit.pth", wanted, "vit").line
    )


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path):
    save_file({"w": torch.ones(300)}, tmp_path / "a.pth")
    torch.save({"w": torch.ones(300)}, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        assert torch.equal(checkpoints.read_tensors(tmp_path / name)["w"], torch.ones(300))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "b.safetensors").read_bytes()[:900])
    (tmp_path / "none.safetensors").write_bytes(b"")
    for name, said in (("cut.pth", "cut off, its end is missing"), ("none.safetensors", "an empty file")):
        with pytest.raises(UsageError, match=f"{said}.*; download it again"):
            checkpoints.read_tensors(tmp_path / name)
