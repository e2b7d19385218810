"""Weights found in the caches of torch and Hugging Face by name, laid out as their own libraries do it."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ktransfer.errors import UsageError
from ktransfer.networks import caches, teachers


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def fetched(cache, name, revision, state, main=True):
    """A repository in the cache, its file a link to a blob."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    for made in (folder / "blobs", folder / "refs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "blobs" / revision)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{revision}")
    if main:
        (folder / "refs" / "main").write_text(revision)
    return snapshot


def state():
    return {"w": torch.ones(2)}


def test_a_repository_is_that_of_main(home, monkeypatch):
    cache = home / "hf" / "hub"
    assert caches.repository("org/net") is None
    main = fetched(cache, "org/net", "aaa", state())
    fetched(cache, "org/net", "bbb", state(), main=False)
    assert caches.repository("org/net") == main
    assert caches.file("org/net") == main / "model.safetensors"
    (cache / "models--org--net" / "refs" / "main").unlink()
    os.utime(main, (1, 1))
    assert caches.repository("org/net") == main.parent / "bbb"
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "other"))
    assert caches.repository("org/net") is None
    assert all(caches.repository(name) is None for name in ("../net", "org/net/x", "net", "a b/c"))


def test_the_layout_is_that_of_the_library(home, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    fetched(home / "hf" / "hub", "org/net", "a" * 40, state())
    found = hub.try_to_load_from_cache("org/net", "model.safetensors", cache_dir=str(home / "hf" / "hub"))
    assert str(caches.file("org/net")) == found


def test_a_file_of_torch_by_its_name(home):
    folder = caches.torch_folder()
    folder.mkdir(parents=True)
    torch.save(state(), folder / "vit.pth")
    assert caches.file("vit.pth") == folder / "vit.pth"
    assert caches.file("other.pth") is None and caches.file("../checkpoints/vit.pth") is None


def test_a_network_of_timm_takes_what_timm_would_load(home, capsys):
    timm = pytest.importorskip("timm")
    with pytest.raises(UsageError, match="its weights are in no cache, and nothing is downloaded"):
        teachers.find("timm:resnet10t", None, None, 64)
    stated = timm.get_pretrained_cfg("resnet10t").to_dict()
    model: nn.Module = timm.create_model("resnet10t", num_classes=1000)
    snapshot = fetched(home / "hf" / "hub", stated["hf_hub_id"], "ccc", dict(model.state_dict()))
    for weights in (None, stated["hf_hub_id"]):
        teacher = teachers.find("timm:resnet10t", None, weights, 64)
        assert teacher.weights == snapshot / "model.safetensors"
        assert "its weights are" in capsys.readouterr().err or weights
    assert torch.equal(teachers.load(teacher).state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])


def test_a_folder_by_its_name_and_a_path_that_beats_it(home, monkeypatch):
    snapshot = fetched(home / "hf" / "hub", "org/net", "ddd", state())
    with pytest.raises(UsageError, match=rf"--teacher {snapshot}: a folder without config\.json"):
        teachers.find("org/net", None, None, 0)
    (home / "org" / "net").mkdir(parents=True)
    monkeypatch.chdir(home)
    with pytest.raises(UsageError, match=r"--teacher org/net: a folder without config\.json"):
        teachers.find("org/net", None, None, 0)
    with pytest.raises(UsageError, match="no such file"):
        teachers.find("org/none", None, None, 0)
