"""Teachers that are not of ktransfer, through extract, cluster, assign and retrain."""

import json

import numpy as np
import pytest
import torch
from torchvision import models as zoo
from torchvision.models import vision_transformer

from ktransfer.artifacts.features import open_features
from ktransfer.cli import main
from ktransfer.cluster import assign, cluster, extract
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.images.decoding import square
from ktransfer.networks.descriptors import Hog

SCENES = "scenes:images=24,size=48"
EXACT = {"precision": "float32", "dtype": "float32"}


def images(size):
    """(n, 3, size, size) float32 in 0..1."""
    data = open_dataset(SCENES)
    pixels = np.stack([square(data.read(row, size), size) for row in range(len(data))])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float() / 255


@pytest.mark.parametrize(("teacher", "rest"), [("hog", []), ("pixels", ["--layer", "grey", "--size", "8"])])
def test_without_pretext_down_to_a_network(tmp_path, teacher, rest):
    run = tmp_path / "run"
    line = ["--run", str(run), "extract", "--data", SCENES, "--teacher", teacher, *rest, "cluster", "--k", "4"]
    line += ["retrain", "--arch", "alexnet_bn", "--width", "0.05", "--epochs", "1", "--batch", "8", "--stride", "2"]
    assert main(line) == 0
    assert (run / "retrain" / "model.safetensors").is_file()
    found = open_features(run / "features" / "scenes.h5")
    if teacher == "hog":
        wanted = Hog()(images(64)).flatten(1).numpy()
        assert found.attributes["layer"] == "hog" and "64" in found.attributes["transform"]
    else:
        wanted = (images(8) * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1).flatten(1).numpy()
        assert found.attributes["layer"] == "grey"
    assert found.attributes["pooling"] == "none"
    np.testing.assert_allclose(found.rows, wanted, atol=1e-3)
    before = {path: path.read_bytes() for path in (run / "features").glob("*.h5")}
    assert main(line) == 0
    assert before == {path: path.read_bytes() for path in (run / "features").glob("*.h5")}


def test_a_resnet_from_elsewhere(tmp_path):
    torch.manual_seed(0)
    model = zoo.resnet18().eval()
    weights = tmp_path / "moco.pth.tar"
    torch.save(
        {"state_dict": {f"module.encoder_q.{name}": value for name, value in model.state_dict().items()}}, weights
    )
    run, given = tmp_path / "run", {"teacher": str(weights), "arch": "resnet18", "size": 48, **EXACT}
    found = open_features(extract(run, data=SCENES, layer="layer2", pool=2, **given))
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1((images(48) - mean) / deviation))))
        wanted = torch.nn.functional.adaptive_max_pool2d(model.layer2(model.layer1(x)), 2).flatten(1).numpy()
    np.testing.assert_allclose(found.rows, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    assert found.attributes["transform"].endswith("normalised by imagenet")
    # Other images are read by the same teacher, in the same way.
    cluster(run, k=4)
    other = "scenes:images=12,size=48,seed=5"
    assert assign(run, data=other).is_file()
    record = json.loads((run / "features" / "stage.json").read_text())
    assert len(record) == 2
    # Images fed in another way do not go with these centroids.
    odd = extract(run, data=other, name="odd", layer="layer2", pool=2, **(given | {"size": 64}))
    with pytest.raises(UsageError, match="transform is 'short side 64"):
        assign(run, features=str(odd), overwrite=True)


def test_a_checkpoint_that_does_not_fit_stops_the_line_before_it_starts(tmp_path, capsys):
    torch.save(
        {name: value for name, value in zoo.resnet18().state_dict().items() if "layer4" not in name}, tmp_path / "x.pth"
    )
    run = tmp_path / "run"
    line = ["--run", str(run), "extract", "--data", SCENES, "--teacher", str(tmp_path / "x.pth"), "--arch", "resnet18"]
    assert main([*line, "cluster", "--k", "4"]) == 2
    shown = capsys.readouterr().err.strip()
    assert "not complete without layer4.0.conv1.weight" in shown and "\n" not in shown
    assert not run.exists()


@pytest.mark.parametrize(("token", "dim"), [(None, 24), ("mean", 24), ("patch", 24 * 4)])
def test_a_vision_transformer(tmp_path, monkeypatch, token, dim):
    made = vision_transformer._vision_transformer
    small = {"num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
    monkeypatch.setattr(vision_transformer, "_vision_transformer", lambda **given: made(**given | small))
    torch.manual_seed(0)
    model = zoo.vit_b_16(image_size=48).eval()
    torch.nn.init.normal_(model.class_token)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    given = {"teacher": str(tmp_path / "vit.pth"), "arch": "vit_b_16", "size": 48, "pool": 2, **EXACT}
    found = open_features(extract(tmp_path / "run", data=SCENES, token=token, **given))
    assert found.rows.shape == (24, dim)
    assert found.attributes["layer"] == "norm"
    assert found.attributes["pooling"] == ("max 2x2" if token == "patch" else f"token {token or 'cls'}")
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        x = model._process_input((images(48) - mean) / deviation)
        tokens = model.encoder(torch.cat([model.class_token.expand(24, -1, -1), x], 1))
    if token == "patch":
        maps = tokens[:, 1:].transpose(1, 2).reshape(24, 24, 3, 3)
        wanted = torch.nn.functional.adaptive_max_pool2d(maps, 2).flatten(1)
    else:
        wanted = tokens[:, 0] if token is None else tokens[:, 1:].mean(1)
    np.testing.assert_allclose(found.rows, wanted.numpy(), rtol=1e-3, atol=1e-3)
    # At another size the position embeddings are those that torchvision interpolates.
    larger = zoo.vit_b_16(image_size=64).eval()
    larger.load_state_dict(vision_transformer.interpolate_embeddings(64, 16, model.state_dict()))
    found = open_features(extract(tmp_path / "other", data=SCENES, token=token, **(given | {"size": 64})))
    with torch.no_grad():
        x = larger._process_input((images(64) - mean) / deviation)
        tokens = larger.encoder(torch.cat([larger.class_token.expand(24, -1, -1), x], 1))
    if token is None:
        np.testing.assert_allclose(found.rows, tokens[:, 0].numpy(), rtol=1e-3, atol=1e-3)
    assert found.rows.shape == (24, dim)
