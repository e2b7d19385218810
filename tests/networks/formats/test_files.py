"""Files that only look like checkpoints: one line that says what they are and what to do, before anything is read."""

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models as zoo

from ktransfer.cluster import extract
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import checkpoints
from ktransfer.networks.formats import unpickling

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4096\n"


def text(words):
    return lambda path: path.write_text(words, "utf-8")


def exported(path):
    with path.open("wb") as file:  # torch asks for its own suffix where it is given a name
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)


def keras(path):
    with h5py.File(path, "w") as file:
        file["model_weights/conv1/kernel"] = np.ones((3, 3))


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, features=np.ones((2, 3)))


FOREIGN = {
    "pointer.pth": (text(POINTER), "a pointer of Git LFS, not the weights; fetch them with git lfs pull"),
    "pointer.safetensors": (text(POINTER), "fetch them with git lfs pull"),
    "page.pth": (text("\n<!DOCTYPE html><html><body>Sign in</body></html>"), "download the file itself again"),
    "denied.pth": (text('\ufeff<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'), "a web page"),
    "page.safetensors": (text("<html>"), "a web page, not weights"),
    "program.pt2": (
        exported,
        "a program of torch.export, whose layers have no names any more; where it was made, save",
    ),
    "program.pth": (exported, "torch.save(model.state_dict(), FILE)"),
    "keras.h5": (keras, "an HDF5 file, as Keras saves; give the weights as a file of torch or safetensors"),
    "keras.pth": (keras, "an HDF5 file"),
    "model.gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(64)), "give the weights as safetensors"),
    "config.json": (text('{"model_type": "vit"}'), "a JSON text, not weights; give the file of the weights itself"),
    "index.safetensors": (text(' {"weight_map": {}}'), "a JSON text, not weights"),
    "features.pth": (arrays, "arrays of numpy; features made elsewhere are for cluster --features FILE --keys"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_checkpoint_is_named_and_never_unpickled(tmp_path, monkeypatch, name):
    write, said = FOREIGN[name]
    path = tmp_path / name
    write(path)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    monkeypatch.setattr(unpickling, "read", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(UsageError) as caught:
        checkpoints.read_tensors(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_teacher_whose_vectors_are_nan_is_refused(tmp_path):
    torch.manual_seed(0)
    state = zoo.resnet18().state_dict()
    state["layer4.1.conv2.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), (200, 30, 90)).save(tmp_path / "images" / "red.png")
    with pytest.raises(StageError) as caught:
        extract(
            tmp_path / "run",
            data=str(tmp_path / "images"),
            teacher=str(tmp_path / "nan.pth"),
            arch="resnet18",
            size=64,
            workers=0,
        )
    assert str(caught.value) == (
        "the features of 'red.png' are not finite (NaN or infinity): check the weights of the network"
    )
    assert not list((tmp_path / "run" / "features").glob("*.h5"))
