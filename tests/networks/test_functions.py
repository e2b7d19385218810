"""A function of one's own as a teacher: it gets the very pixels, and whatever else it does is one line."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer.artifacts.features import open_features
from ktransfer.cluster import extract
from ktransfer.errors import UsageError
from ktransfer.networks import teachers

CODE = """
import torch

def corners(pixels):
    assert pixels.dtype == torch.uint8 and pixels.ndim == 4
    return pixels[:, :, 0, 0]

def means(pixels):
    return pixels.float().mean((2, 3)).cpu().numpy()

def lists(pixels):
    raise KeyError("no\\nsuch thing")

def maps(pixels):
    return pixels

def short(pixels):
    return torch.ones(len(pixels) + 1, 3)

class Counting:
    def __call__(self, pixels):
        return torch.ones(len(pixels), 2)

counting = Counting()
number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_teachers.py").write_text(CODE)
    (tmp_path / "code" / "broken_teachers.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield tmp_path / "code" / "my_teachers.py"
    sys.modules.pop("my_teachers", None)


@pytest.mark.parametrize("name", ["corners", "means"])
def test_features_are_what_it_returns(tmp_path, mine, name):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for place, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{place}.png")
    options = {"data": str(tmp_path / "images"), "teacher": f"my_teachers:{name}", "size": 32, "workers": 0, "batch": 2}
    features = open_features(extract(tmp_path / "run", dtype="float32", precision="float32", **options))
    wanted = images[:, 0, 0] if name == "corners" else images.mean((1, 2))
    np.testing.assert_allclose(features.rows, wanted, rtol=1e-6)
    assert (features.attributes["layer"], features.attributes["pooling"]) == ("pooled", "the network's own")


def test_identity_is_the_name_and_the_file(mine):
    def identity(name):
        return teachers.identity(teachers.find(f"my_teachers:{name}", None, None, 0))

    first = identity("corners")
    assert first == identity("corners") != identity("means")
    assert len({first, identity("means"), identity("counting")}) == 3
    mine.write_text(CODE + "# changed\n")
    assert identity("corners") != first
    assert teachers.find("my_teachers:corners", None, None, 0).network.size == 224


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_teachers:lists", r"raised KeyError \('no\\nsuch thing'\); it is called with \(batch, 3, size, size\)"),
        ("my_teachers:maps", r"made \(1, 3, 224, 224\) of 1 images; it is called with"),
        ("my_teachers:short", r"made \(2, 3\) of 1 images"),
        ("my_teachers:number", "not a function"),
        ("my_teachers:nothing", "no such Python function: AttributeError .*PYTHONPATH=. adds this folder"),
        ("no_such.teachers:corners", "no such Python function: ModuleNotFoundError"),
        ("broken_teachers:corners", "no such Python function: ZeroDivisionError"),
    ],
)
def test_what_is_no_teacher_is_one_line(mine, name, said):
    with pytest.raises(UsageError, match=said) as caught:
        teacher = teachers.find(name, None, None, 0)
        with torch.no_grad():
            teachers.shapes(teacher.network, teachers.load(teacher))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--teacher {name}: ")


def test_options_of_other_teachers_are_refused(mine):
    with pytest.raises(UsageError, match="--arch resnet18: --teacher my_teachers:means already names the network"):
        teachers.find("my_teachers:means", "resnet18", None, 0)
    with pytest.raises(UsageError, match="only for --teacher torchvision:NAME"):
        teachers.find("my_teachers:means", None, "w.pth", 0)
