"""The formats beside ONNX: each library loads what was written for it, and computes what the network does."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ktransfer import networks
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.retrain import export, load_model
from ktransfer.retrain.students import exporting, state_dicts
from ktransfer.retrain.students.predicting import predict

RESNET = Network("resnet18", size=40, classes=3, task="classes")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weight files of a ResNet whose running means are not those that it began with, by normalisation."""
    folder = tmp_path_factory.mktemp("weights")
    model = networks.build(RESNET, 1, "test")
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).abs())
    for name in ("imagenet", "picture"):
        networks.save(folder / f"{name}.safetensors", model.state_dict(), replace(RESNET, normalise=name))
    return folder


def by_hand(path, images):
    network = networks.describe(path)
    model = networks.build(network, 0, "test").eval()
    model.load_state_dict(load_file(path))
    with torch.no_grad():
        return model(networks.normalise(images, network.normalise)).numpy()


def images(count, size=40):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def test_a_program_of_torch_export_runs_without_us(weights, tmp_path):
    path = export(tmp_path / "run", model=str(weights / "picture.safetensors"), format="torch")
    assert path == tmp_path / "run" / "export" / "torch" / "student.pt2"
    facts = {"network": "", "embedding": ""}
    program = torch.export.load(path, extra_files=facts).module()
    for count in (1, 4):
        logits, embedding = program(images(count))
        wanted = by_hand(weights / "picture.safetensors", images(count))
        assert np.ptp(wanted) > 1e-2 and embedding.shape == (count, 512)
        np.testing.assert_allclose(logits.detach().numpy(), wanted, rtol=0, atol=1e-4)
    assert Network(**json.loads(facts["network"])).arch == "resnet18" and facts["embedding"] == "layer4"
    assert b"site-packages" not in path.read_bytes()


def test_torchvision_loads_the_state_dict_strictly(weights, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    path = export(tmp_path / "run", model=str(weights / "imagenet.safetensors"), format="torchvision")
    model = torchvision.models.get_model("resnet18", weights=None, num_classes=3).eval()
    model.load_state_dict(load_file(path), strict=True)
    x = networks.normalise(images(2), "imagenet")
    with torch.no_grad():
        np.testing.assert_allclose(model(x), by_hand(weights / "imagenet.safetensors", images(2)), atol=1e-5)
    assert load_model(path).predict(np.zeros((40, 40, 3), np.uint8)).labels  # it says what it is to us, too


def test_timm_loads_the_state_dict(weights, tmp_path):
    timm = pytest.importorskip("timm")
    path = export(tmp_path / "run", model=str(weights / "imagenet.safetensors"), format="timm")
    model = timm.create_model("resnet18", num_classes=3, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        found = model(networks.normalise(images(2), "imagenet"))
    np.testing.assert_allclose(found, by_hand(weights / "imagenet.safetensors", images(2)), atol=1e-5)


@pytest.mark.parametrize("how", ["imagenet", "picture"])
def test_transformers_loads_the_folder(weights, tmp_path, how):
    transformers = pytest.importorskip("transformers")
    path = export(tmp_path / "run", model=str(weights / f"{how}.safetensors"), format="hf")
    model = transformers.AutoModelForImageClassification.from_pretrained(path.parent).eval()
    with torch.no_grad():
        found = model(networks.normalise(images(2), how)).logits
    np.testing.assert_allclose(found, by_hand(weights / f"{how}.safetensors", images(2)), atol=1e-5)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert (path.parent / "preprocessor_config.json").exists() is (how == "imagenet")
    if how == "imagenet":
        processor = transformers.AutoImageProcessor.from_pretrained(path.parent)
        pixels = images(1)[0].permute(1, 2, 0).numpy()
        wanted = networks.normalise(images(1), how)
        np.testing.assert_allclose(processor(pixels, return_tensors="np")["pixel_values"], wanted, atol=1e-4)


def test_the_names_of_bottlenecks_are_mapped(tmp_path):
    transformers = pytest.importorskip("transformers")
    network = replace(RESNET, arch="resnet50")
    networks.save(tmp_path / "mine.safetensors", networks.build(network, 0, "test").state_dict(), network)
    path = export(tmp_path / "run", model=str(tmp_path / "mine.safetensors"), format="hf")
    assert transformers.AutoConfig.from_pretrained(path.parent).layer_type == "bottleneck"


@pytest.mark.parametrize(
    ("name", "library", "how"),
    [
        ("torch", "torch", "picture"),
        ("torchvision", "torchvision", "imagenet"),
        ("torchvision", "torchvision", "picture"),
        ("timm", "timm", "imagenet"),
        ("hf", "transformers", "picture"),
    ],
)
def test_the_code_of_each_card_classifies_an_image(weights, tmp_path, monkeypatch, name, library, how):
    pytest.importorskip(library)
    path = export(tmp_path / "run", model=str(weights / f"{how}.safetensors"), format=name)
    text = (path.parent / "README.md").read_text()
    monkeypatch.chdir(path.parent)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("image.png")
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("image.jpg", "image.png"), found)
    wanted = by_hand(weights / f"{how}.safetensors", torch.tensor(pixels.transpose(2, 0, 1))[None])
    np.testing.assert_allclose(found["logits"].detach().numpy(), wanted, atol=1e-4)
    assert f"# {path.name}: resnet18, 3 classes" in text and str(tmp_path) not in text


def test_formats_stand_side_by_side_and_each_is_skipped_when_done(weights, tmp_path, capsys):
    run, given = tmp_path / "run", {"model": str(weights / "imagenet.safetensors")}
    for name in ("torch", "torchvision", "onnx"):
        export(run, format=name, **given)
    cards = {path.parent.name for path in (run / "export").rglob("README.md")}
    assert cards == {"torch", "torchvision", "export"}
    capsys.readouterr()
    export(run, format="torchvision", **given)
    assert "export-torchvision: done before, skipped" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Give export --overwrite"):
        export(run, format="torchvision", tolerance=0.5, **given)
    steps = json.loads((run / "export" / "stage.json").read_text())
    assert set(steps) == {"export", "export-torch", "export-torchvision"}
    assert "opset" not in steps["export-torch"]["config"]
    predict(run / "export" / "torchvision" / "student.safetensors", "scenes:images=12,size=40", tmp_path / "found.csv")
    assert len(list(csv.DictReader((tmp_path / "found.csv").open()))) == 12


def test_what_is_not_reproduced_is_not_written(weights, tmp_path, monkeypatch):
    def another(model, folder, config, facts):
        networks.save(folder / state_dicts.FILE, networks.build(model.network, 7, "other").state_dict(), model.network)

    spoiled = state_dicts.TORCHVISION_FORMAT._replace(write=another)
    monkeypatch.setitem(exporting.FORMATS, "torchvision", spoiled)
    with pytest.raises(StageError, match=r"student\.safetensors does not compute what torch does.*nothing was written"):
        export(tmp_path / "run", model=str(weights / "imagenet.safetensors"), format="torchvision")
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["stage.json"]


def test_a_network_that_a_library_lacks_is_one_line(of_classes, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    given = {"model": str(of_classes)}
    with pytest.raises(UsageError, match="alexnet_bn is no network of torchvision; give another --format: onnx"):
        export(tmp_path / "run", format="torchvision", **given)
    with pytest.raises(UsageError, match=r"alexnet_bn is not as timm has it \(ResNets"):
        export(tmp_path / "run", format="timm", **given)
    with pytest.raises(UsageError, match=r"hf takes resnet18, .*not alexnet_bn; onnx and torch take every network"):
        export(tmp_path / "run", format="hf", **given)
    assert not (tmp_path / "run").exists()
    vgg = Network("vgg16", size=32, classes=3)
    with pytest.raises(UsageError, match="vgg16 is not as timm has it"):
        state_dicts.TIMM_FORMAT.check(vgg)


def test_a_file_of_others_is_kept_unless_told(weights, tmp_path):
    folder = tmp_path / "run" / "export" / "torchvision"
    folder.mkdir(parents=True)
    given = {"model": str(weights / "imagenet.safetensors"), "format": "torchvision"}
    for name in ("README.md", "student.safetensors"):
        (folder / name).write_text("my own")
        with pytest.raises(UsageError, match=rf"{name} was not made by ktransfer; move it away, give --overwrite"):
            export(tmp_path / "run", **given)
        assert (folder / name).read_text() == "my own"
        (folder / name).unlink()
    (folder / "README.md").write_text("my own")
    export(tmp_path / "run", overwrite=True, **given)
    assert "resnet18" in (folder / "README.md").read_text()
