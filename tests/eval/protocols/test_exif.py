"""`--exif ignore` from the training of a detector to all that is done with it, on images that EXIF turns."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import SELFTRAIN

from ktransfer import cli
from ktransfer.detection import saved
from ktransfer.errors import KTransferError, UsageError
from ktransfer.images import decoding
from ktransfer.retrain import load_model, selftrain
from ktransfer.run import read_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A COCO folder whose boxes are for images as they are stored, 64 x 48, which EXIF turns by 90 degrees."""
    root, held = tmp_path_factory.mktemp("turned"), Image.Exif()
    held[0x0112] = 6
    (root / "images").mkdir()
    world = np.random.default_rng(0)
    for part, first in (("train", 0), ("val", 100)):
        rows = range(first, first + 8)
        for row in rows:
            pixels = world.integers(0, 255, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{row}.jpg", exif=held)
        content = {
            "images": [{"id": row, "file_name": f"{row}.jpg", "width": 64, "height": 48} for row in rows],
            "categories": [{"id": "a", "name": "cow"}],
            "annotations": [{"id": row, "image_id": row, "category_id": "a", "bbox": [4, 4, 50, 20]} for row in rows],
        }
        (root / f"{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "turned"
    words = SELFTRAIN | {"labelled": str(folder), "exif": "ignore", "test_threshold": 0.0}
    flags = [word for key, value in words.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main(["--run", str(run), "selftrain", *flags, "eval", "--protocol", "detect"]) == 0
    return run


def test_all_images_were_read_and_the_way_is_kept(made):
    for name in ("teacher", "pseudo", "student", "scores"):
        record = read_record(made, "selftrain", name)
        assert record["config"]["exif"] == "ignore" and not record.get("broken")
    assert saved.describe(made / "selftrain" / "student" / "model.safetensors").exif == "ignore"
    result = json.loads((made / "eval" / "detect.json").read_text())
    assert result["arms"]["student"]["scores"]["finished"]["AP"] >= 0
    assert "--exif ignore" in result["command"]


def test_later_stages_take_images_as_the_training_did(made, folder, tmp_path, capsys):
    assert cli.main(["--run", str(made), "eval", "--protocol", "detect"]) == 0
    assert "detect: done before" in capsys.readouterr().err
    for flags, sides in (([], (64, 48)), (["--exif", "obey"], (48, 64)), (["--exif", "ignore"], (64, 48))):
        out = tmp_path / "found.json"
        line = ["predict", "--model", str(made), "--data", str(folder / "images"), "--out", str(out), *flags]
        assert cli.main(line) == 0
        image = json.loads(out.read_text())["images"][0]
        assert (image["width"], image["height"]) == sides
    model, path = load_model(made), folder / "images" / "0.jpg"
    seen, stored = model.predict(path), model.predict(decoding.decode(path, turned=False))
    assert len(seen.scores) and np.array_equal(seen.boxes, stored.boxes)
    with Image.open(path) as image:
        assert np.array_equal(model.predict(image).boxes, stored.boxes)


def test_without_it_the_images_are_refused_with_the_way_out(folder, tmp_path, capsys):
    with pytest.raises(KTransferError, match="images"):
        selftrain(tmp_path / "run", **SELFTRAIN | {"labelled": str(folder)})
    assert "--exif ignore takes all images as they are stored" in capsys.readouterr().err


def test_another_way_is_another_training(made, folder, tmp_path):
    settings = SELFTRAIN | {"labelled": str(folder)}
    with pytest.raises(UsageError, match="training images with a box can be read"):
        selftrain(made, **settings)
    teacher = str(made / "selftrain" / "teacher" / "model.safetensors")
    with pytest.raises(UsageError, match="learned with --exif ignore; give the same"):
        selftrain(tmp_path / "run", **settings, teacher=teacher)


def test_what_is_usual_is_not_written(made, tmp_path):
    described = saved.describe(made / "selftrain" / "student" / "model.safetensors")
    assert "exif" in described.as_dict()
    usual = saved.described({name: value for name, value in described.as_dict().items() if name != "exif"})
    assert usual.exif == "obey" and "exif" not in usual.as_dict()
    with pytest.raises(ValueError, match="exif"):
        saved.described(described.as_dict() | {"exif": "perhaps"})
