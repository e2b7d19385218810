"""Folders of Hugging Face: the vectors are those of transformers itself, on tiny networks that it saved."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from ktransfer.artifacts.features import open_features
from ktransfer.cluster import extract
from ktransfer.errors import UsageError
from ktransfer.networks import checkpoints, teachers
from ktransfer.networks.formats import hugging_face

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY |= {"image_size": 32, "patch_size": 8}
STAGED = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
PARTS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
BOTH = {"vision_config": TINY, "text_config": TEXT}
BLOCKS = ["blocks.0", "blocks.1"]
STAGES = ["stem", "layer1", "layer2", "layer3", "layer4"]
# name of the model -> that of its configuration, settings, tokens before the patches, layers
MODELS = {
    "ViTModel": ("ViTConfig", TINY, 1, [*BLOCKS, "norm", "pooled"]),
    "Dinov2Model": ("Dinov2Config", TINY, 1, [*BLOCKS, "norm", "pooled"]),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", TINY, 5, [*BLOCKS, "norm", "pooled"]),
    "DINOv3ViTModel": ("DINOv3ViTConfig", TINY | {"num_register_tokens": 3}, 4, [*BLOCKS, "norm", "pooled"]),
    "CLIPVisionModel": ("CLIPVisionConfig", TINY, 1, [*BLOCKS, "pooled"]),
    "SiglipVisionModel": ("SiglipVisionConfig", TINY, 0, [*BLOCKS, "norm", "pooled"]),
    "ResNetModel": ("ResNetConfig", STAGED | {"embedding_size": 8, "layer_type": "basic"}, None, [*STAGES, "pooled"]),
    "ConvNextModel": ("ConvNextConfig", STAGED, None, [*STAGES, "pooled"]),
    "ConvNextV2Model": ("ConvNextV2Config", STAGED, None, [*STAGES, "pooled"]),
    "SwinModel": ("SwinConfig", PARTS, None, ["stem", "layer1", "layer2", "norm", "pooled"]),
}
MEAN, DEVIATION = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PROCESSOR = {"image_mean": MEAN, "image_std": DEVIATION, "size": {"shortest_edge": 32}, "resample": 2}
PROCESSOR |= {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True}


def made(name, config=None, settings=None):
    """A network of transformers that is not the same everywhere, and does not end in zeros."""
    torch.manual_seed(0)
    config = config or MODELS[name][0]
    model = getattr(transformers, name)(getattr(transformers, config)(**(settings or MODELS[name][1])))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim == 4 else 0.1))
    return model.eval()


def saved(folder, model, processor=PROCESSOR, **how):
    model.save_pretrained(folder, **how)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def pixels(size):
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(given):
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (given / 255 - mean) / deviation


def close(found, wanted):
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vit"), made("ViTModel"))


def refused(given, *more):
    with pytest.raises(UsageError) as caught:
        teachers.load(teachers.find(str(given), *(more or (None, None, 0))))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_layer_is_what_transformers_computes(tmp_path, name):
    theirs = made(name)
    _, _, before, layers = MODELS[name]
    teacher = teachers.find(str(saved(tmp_path, theirs)), None, None, 0)
    model = teachers.load(teacher)
    shapes = teachers.shapes(teacher.network, model)
    assert list(shapes) == layers and teacher.network.size == 32
    x = pixels(32)
    wanted = theirs(normalised(x), output_hidden_states=True)
    for place, layer in enumerate(layers[: -1 if "norm" not in layers else -2]):
        states = wanted.hidden_states[place + (before is not None)]
        if before is None:
            maps = states if states.ndim == 4 else states.transpose(1, 2).unflatten(2, shapes[layer][1:])
            close(teachers.reader(model, teacher.network, layer, None)(x), maps)
            continue
        patches = states[:, before:].transpose(1, 2)
        close(teachers.reader(model, teacher.network, layer, "patch")(x), patches.unflatten(2, (4, 4)))
        close(teachers.reader(model, teacher.network, layer, "mean")(x)[..., 0, 0], patches.mean(2))
        if before:
            close(teachers.reader(model, teacher.network, layer, "cls")(x)[..., 0, 0], states[:, 0])
    if "norm" in layers:
        last = wanted.last_hidden_state[:, before or 0 :].transpose(1, 2).unflatten(2, shapes["norm"][1:])
        close(teachers.reader(model, teacher.network, "norm", "patch" if before is not None else None)(x), last)
    close(teachers.reader(model, teacher.network, "pooled", None)(x).flatten(1), wanted.pooler_output.flatten(1))
    assert teacher.layer == ("pooled" if name in ("CLIPVisionModel", "SiglipVisionModel") else None)
    fallback = {None: None, 0: "mean"}.get(before, "cls")
    assert teachers.choose_token(model, teacher.network, None, layer) == fallback


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel", "SiglipVisionModel", "SwinModel"])
@torch.no_grad()
def test_images_of_another_size(tmp_path, name):
    theirs = made(name)
    teacher = teachers.find(str(saved(tmp_path, theirs)), None, None, 64)
    told = {} if name == "Dinov2Model" else {"interpolate_pos_encoding": True}
    wanted = theirs(normalised(pixels(64)), **told).pooler_output
    close(teachers.reader(teachers.load(teacher), teacher.network, "pooled", None)(pixels(64)).flatten(1), wanted)


@pytest.mark.parametrize(("kind", "tower"), [("CLIP", "CLIPVisionModel"), ("Siglip", "SiglipVisionModel")])
@torch.no_grad()
def test_the_image_half_of_a_pair_is_read(tmp_path, capsys, kind, tower):
    both = made(f"{kind}Model", f"{kind}Config", BOTH)
    teacher = teachers.find(str(saved(tmp_path, both)), None, None, 0)
    found = teachers.reader(teachers.load(teacher), teacher.network, "pooled", None)(pixels(32))
    close(found.flatten(1), both.vision_model(normalised(pixels(32))).pooler_output)
    assert "tensors of " + tower + " of transformers matched" in capsys.readouterr().err


@torch.no_grad()
def test_a_classifier_of_half_precision_in_shards(tmp_path, capsys):
    settings = {"num_labels": 3}
    theirs = made("ViTForImageClassification", "ViTConfig", TINY | settings).half()
    folder = saved(tmp_path, theirs, max_shard_size="20kB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    teacher = teachers.find(str(folder), None, None, 0)
    model = teachers.load(teacher)
    wanted = theirs.float().vit(normalised(pixels(32))).last_hidden_state
    close(teachers.reader(model, teacher.network, "norm", "cls")(pixels(32))[..., 0, 0], wanted[:, 0])
    # It has no layer behind the class token: none with random weights is put there.
    assert list(teachers.shapes(teacher.network, model)) == [*BLOCKS, "norm"]
    assert "2 others left out (classifier.bias, ...)" in capsys.readouterr().err
    before = teachers.identity(teacher)
    shards[1].rename(tmp_path / "elsewhere")
    assert f"1 of {len(shards)} shards are missing ({shards[1].name}); download them" in refused(folder)
    (tmp_path / "elsewhere").rename(shards[1])
    assert teachers.identity(teacher) == before
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert teachers.identity(teacher) != before


def test_extract_takes_the_folder(tmp_path, vit, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for place, image in enumerate(pixels(32)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{place}.png")
    path = extract(
        tmp_path / "run", data=str(images), teacher=str(vit), dtype="float32", precision="float32", workers=0
    )
    features = open_features(path)
    with torch.no_grad():
        wanted = made("ViTModel")(normalised(pixels(32))).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(features.rows, wanted, rtol=1e-4, atol=1e-4)
    assert features.attributes["layer"] == "norm" and "0.4,0.5,0.6" in str(features.attributes["transform"])
    assert "its authors' images" not in capsys.readouterr().err  # nothing differs from ours


def test_nothing_of_a_folder_is_run(tmp_path, vit, monkeypatch):
    folder = tmp_path / "vit"
    shutil.copytree(vit, folder)
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}, "_attn_implementation": "a/kernel"}
    settings |= {"attn_implementation": "a/kernel", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b", "peft_type": "LORA"}')
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a connection"))
    mine, plain = (teachers.load(teachers.find(str(path), None, None, 0)) for path in (folder, vit))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in mine.state_dict().items())
    assert not mark.exists()


def test_what_is_not_whole_is_refused_in_one_line(tmp_path, vit):
    def copy(name):
        shutil.copytree(vit, tmp_path / name)
        return tmp_path / name

    assert "a folder without config.json" in refused(tmp_path)
    folder = copy("weightless")
    (folder / "model.safetensors").unlink()
    assert refused(folder).endswith("config.json without weights; download model.safetensors into the folder too")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "only pytorch_model.bin, a pickle" in refused(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    assert "does not say which file of the folder" in refused(folder)
    folder = copy("pointer")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(folder)
    (folder / "model.safetensors").write_bytes((vit / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors: cannot be read (" in refused(folder)
    tensors = load_file(vit / "model.safetensors")
    lost = next(name for name in tensors if "norm" in name)
    save_file({name: it for name, it in tensors.items() if name != lost}, folder / "model.safetensors")
    assert "its weights lack 1 tensors of ViTModel, such as " in refused(folder)
    save_file(tensors | {lost: torch.ones(7)}, folder / "model.safetensors")
    assert "transformers cannot build ViTModel from it (" in refused(folder)
    folder = copy("unknown")
    for kind in ("bert", None, ["vit"]):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        line = refused(folder)
        assert f"names the network {kind!r}" in line and "dinov3_vit" in line and "--arch timm:NAME" in line
    (folder / "config.json").write_text("<html>")
    assert "not JSON" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    assert "has no vision_config" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "vit", "hidden_size": "many"}')
    assert "transformers cannot build ViTModel" in refused(folder)
    assert "leave --arch out" in refused(vit, "vit_b_16", None, 0)
    assert "only for --teacher torchvision:NAME" in refused(vit, None, "w.pth", 0)


def test_without_transformers(vit, monkeypatch):
    monkeypatch.setattr(hugging_face.importlib.util, "find_spec", lambda name: None)
    assert refused(vit).endswith("transformers is not installed; pip install 'ktransfer[transformers]'")


def test_a_single_file_of_a_folder_still_wants_its_arch(vit):
    assert "--arch" in refused(vit / "model.safetensors")
    assert len(checkpoints.read_tensors(vit / "model.safetensors")) > 10
