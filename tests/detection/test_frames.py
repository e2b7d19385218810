"""Boxes of images that EXIF turns: what is read by either frame, and what is said at the start."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer.data.opening import open_dataset
from ktransfer.detection import canvas, frames
from ktransfer.detection.opening import open_detection, open_file
from ktransfer.errors import UsageError
from ktransfer.images import decoding


def exif(orientation):
    held = Image.Exif()
    held[0x0112] = orientation
    return held


def made(root, orientation, stated, side=(60, 40), count=3, ending="jpg"):
    """Images whose upper left quarter is red as they are stored, one that is not turned behind them."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((side[1], side[0], 3), np.uint8)
    pixels[: side[1] // 2, : side[0] // 2, 0] = 255
    for number in range(count):
        kind = exif(orientation) if number + 1 < count else exif(1)
        Image.fromarray(pixels).save(root / "images" / f"{number}.{ending}", quality=95, exif=kind)
    sizes = [stated] * (count - 1) + [side]
    held = {
        "images": [{"id": n, "file_name": f"{n}.{ending}", "width": w, "height": h} for n, (w, h) in enumerate(sizes)],
        "categories": [{"id": 1, "name": "red"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 20, 20]} for n in range(count)],
    }
    (root / "train.json").write_text(json.dumps(held))
    (root / "val.json").write_text(json.dumps(held))
    return str(root / "train.json")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_or_taken_as_they_are_stored(tmp_path, orientation, ending):
    spec = made(tmp_path, orientation, (60, 40), ending=ending)
    path = tmp_path / "images" / f"0.{ending}"
    with Image.open(path) as image:
        stored = np.asarray(image.convert("RGB"))
    assert decoding.header(path) == (60, 40, orientation)
    plain, obeyed = open_file(spec, "ignore"), open_file(spec)
    np.testing.assert_array_equal(plain.read(0, None), stored)
    np.testing.assert_array_equal(plain.reader(0)(None), stored)
    turned = obeyed.read(0, None)
    assert turned.shape[:2] == ((60, 40) if orientation >= 5 else (40, 60))
    assert (orientation == 1) == np.array_equal(turned, stored)
    assert plain.fingerprint != obeyed.fingerprint == open_file(spec, "obey").fingerprint
    np.testing.assert_array_equal(open_dataset(str(tmp_path / "images"), turned=False).read(0, None), stored)
    np.testing.assert_array_equal(open_dataset(str(tmp_path / "images")).read(0, None), turned)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_other_frame_are_counted_with_the_way_out(tmp_path, orientation, capsys):
    spec = made(tmp_path, orientation, (60, 40))
    data = open_file(spec)
    line = capsys.readouterr().err
    assert "2 of 3 images looked at, such as 0.jpg, have boxes for the image before EXIF turns it" in line
    assert "--exif ignore" in line and line.count("\n") == 2
    source = canvas.canvases(data, 64)
    assert source.batch(torch.arange(3))[1].tolist() == [False, False, True] and "EXIF" in source.broken[0]
    plain = open_file(spec, "ignore")
    assert "EXIF" not in capsys.readouterr().err
    assert canvas.canvases(plain, 64).batch(torch.arange(3))[1].all()
    # The other way round: the file is for upright images.
    made(tmp_path, orientation, (40, 60))
    open_file(spec, "ignore")
    assert "2 of 3 images looked at, such as 0.jpg, have boxes for the image as EXIF turns it" in (
        line := capsys.readouterr().err
    )
    assert "--exif obey" in line
    open_file(spec)
    assert "looked at" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("orientation", "side"), [(3, (60, 40)), (2, (60, 40)), (4, (60, 40)), (6, (48, 48)), (3, (48, 48))]
)
def test_what_sides_do_not_show_is_said(tmp_path, orientation, side, capsys):
    spec = made(tmp_path, orientation, side, side)
    open_file(spec)
    line = capsys.readouterr().err
    assert "2 of 3 images looked at, such as 0.jpg, are turned by EXIF so that their sides do not show it" in line
    assert "--exif ignore" in line
    open_file(spec, "ignore")
    assert "looked at" not in capsys.readouterr().err


def test_swapped_sides_are_said_and_reduced_images_are_not(tmp_path, capsys):
    spec = made(tmp_path, 1, (40, 60))
    open_file(spec)
    line = capsys.readouterr().err
    assert "2 of 3 images looked at, such as 0.jpg, have their width and height swapped in the file" in line
    assert "--exif" not in line
    spec = made(tmp_path, 1, (120, 80))
    open_file(spec)
    assert "looked at" not in capsys.readouterr().err


def test_many_images_are_looked_at_evenly(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frames, "LOOKED_AT", 4)
    open_file(made(tmp_path, 6, (60, 40), count=9))
    assert "3 of 4 images looked at" in capsys.readouterr().err


def test_both_splits_are_of_one_frame(tmp_path):
    made(tmp_path, 6, (60, 40))
    for part in open_detection(str(tmp_path), exif="ignore"):
        assert part.read(0, None).shape == (40, 60, 3)


def test_a_pack_is_upright_already(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(UsageError, match="--exif ignore: the images of a pack"):
        open_dataset(str(tmp_path / "x.h5"), turned=False)


def objects(root, bbox, outline=None):
    made(root, 1, (60, 40))
    for name in ("train", "val"):
        held = json.loads((root / f"{name}.json").read_text())
        for note, box in zip(held["annotations"], bbox, strict=True):
            note |= {"bbox": box, "segmentation": outline or []}
        (root / f"{name}.json").write_text(json.dumps(held))
    return open_detection(str(root))[0]


def test_small_objects_are_counted_and_refused_where_nothing_is_left(tmp_path, capsys):
    data = objects(tmp_path, [[0, 0, 30, 30], [0, 0, 0.9, 30], [5, 5, 30, 0.5]])
    capsys.readouterr()
    canvas.look("--size 60", data, 60, "training", 1.0)
    line = capsys.readouterr().err
    assert "2 of 3 boxes of the training split are narrower or lower than a pixel at --size 60" in line
    assert line.count("\n") == 1
    canvas.look("--size 180", data, 180, "training", 1.0)
    assert not capsys.readouterr().err
    data = objects(tmp_path, [[0, 0, 0.9, 30], [0, 0, 0.9, 9], [5, 5, 30, 0.5]])
    with pytest.raises(UsageError, match=r"all 3 boxes of the training split .* at --size 60; give a larger --size"):
        canvas.look("--size 60", data, 60, "training", 1.0)
    capsys.readouterr()
    canvas.look("--size 60", data, 60, "training", 1.2)  # some are learned when they are enlarged
    canvas.look("--size 60", data, 60, "test", None)
    assert capsys.readouterr().err.count("3 of 3 boxes") == 2


def test_small_outlines_count_where_these_are_learned(tmp_path):
    data = objects(tmp_path, [[0, 0, 30, 30]] * 3, [[0.1, 0.1, 0.9, 0.1, 0.9, 0.8]])
    canvas.look("--size 60", data, 60, "training", 1.0)
    with pytest.raises(UsageError, match=r"all 3 outlines of the training split .* shares of width and height"):
        canvas.look("--size 60", data, 60, "training", 1.0, outlines=True)
