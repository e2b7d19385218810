"""`ktransfer predict` of detectors and segmenters: COCO's json of boxes and masks, and drawings."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ktransfer import cli
from ktransfer.detection import canvas, masks, predictions, saved
from ktransfer.detection.coco import read
from ktransfer.detection.detectors import Settings
from ktransfer.errors import UsageError
from ktransfer.images import decoding
from ktransfer.networks import Network
from ktransfer.retrain import load_model
from ktransfer.retrain.students import detector
from ktransfer.retrain.students.predicting import predict

CLASSES = ("cat", "dog", "owl")
NECKS = {"retinanet": "p3-p7", "maskrcnn": "p2-p6", "fcn": "single"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Kind -> a weight file of random numbers, whose boxes all count."""
    folder, found = tmp_path_factory.mktemp("detectors"), {}
    for kind, neck in NECKS.items():
        settings = Settings(kind=kind, norm="bn", anchor=2.0, width=64, proposals=50, threshold=0.0, most=7)
        described = saved.Described(Network("alexnet_bn", 0.1), neck, settings, CLASSES, 64, 16)
        model = saved.make(described, 3)
        if kind == "fcn":
            with torch.no_grad():
                model.classifier[4].weight.mul_(20)
        found[kind] = folder / f"{kind}.safetensors"
        saved.save(found[kind], model, described)
    return found


def by_hand(path, folder, names):
    """What the detector finds in images of a folder, with nothing of what is tested but the network."""
    model, described = saved.load(path)
    pixels = [decoding.decode(folder / name) for name in names]
    return model.eval(), described, pixels


def on_canvas(pixels, size, how):
    height, width = pixels.shape[:2]
    wide, high = (int(side) for side in canvas.extent((width, height), size))
    square = canvas.laid(lambda *_: pixels, 0, (width, height), size).transpose(2, 0, 1)
    return canvas.normalise(torch.tensor(square)[None], torch.tensor([[wide, high]]).float(), how), (wide, high)


def test_boxes_are_those_of_the_network_in_pixels_of_the_image(files, folder, tmp_path, capsys):
    out = predict(files["retinanet"], str(folder), tmp_path / "found.json", batch=5)
    held = json.loads(out.read_text())
    assert len(held["images"]) == 23 and "a/05.jpg: " in capsys.readouterr().err
    assert [one["name"] for one in held["categories"]] == list(CLASSES)
    model, _, (pixels,) = by_hand(files["retinanet"], folder, ["b/20.jpg"])
    x, edges = on_canvas(pixels, 64, model.backbone.how)
    with torch.no_grad():
        (wanted,) = model(x)
    number = next(one["id"] for one in held["images"] if one["file_name"] == "b/20.jpg")
    own = [note for note in held["annotations"] if note["image_id"] == number]
    assert len(own) == 7 == len(wanted["scores"])
    np.testing.assert_allclose([note["score"] for note in own], wanted["scores"], atol=1e-4)
    corner = wanted["boxes"][:, :2].clamp(min=0).numpy() * np.array(pixels.shape[1::-1]) / edges
    np.testing.assert_allclose([note["bbox"][:2] for note in own], corner, atol=0.02)
    shutil.copy(out, folder / "found.json")
    again = read(folder / "found.json", "again")  # it is a COCO file
    assert again.classes == CLASSES and len(again) == 23


def test_one_image_in_python_is_as_in_the_json(files, folder, tmp_path):
    for kind in NECKS:
        model = load_model(files[kind])
        image = folder / "b" / "20.jpg"
        seen = model.predict(image)
        held = json.loads(predict(files[kind], str(image), tmp_path / f"{kind}.json").read_text())
        np.testing.assert_allclose([note["score"] for note in held["annotations"]], seen.scores, atol=1e-5)
        assert [CLASSES[note["category_id"] - 1] for note in held["annotations"]] == list(seen.labels)
        assert len(seen.labels) > 0 and (seen.masks is None) is (kind == "retinanet")
        if seen.masks is not None:
            assert seen.masks.shape == (len(seen.labels), 50, 60) and seen.masks.dtype == bool
            first = masks.decoded(held["annotations"][0]["segmentation"])
            np.testing.assert_array_equal(first, seen.masks[0])
        np.testing.assert_array_equal(model.predict(Image.open(image)).boxes, seen.boxes)


def test_a_segmenter_gives_each_class_as_one_object(files, folder):
    seen = load_model(files["fcn"]).predict(folder / "b" / "20.jpg")
    model, _, (pixels,) = by_hand(files["fcn"], folder, ["b/20.jpg"])
    x, (wide, high) = on_canvas(pixels, 64, model.backbone.how)
    with torch.no_grad():
        whole = F.interpolate(model(x)[:, :, :high, :wide], size=pixels.shape[:2], mode="bilinear")[0].softmax(0)
    likely, label = whole.max(0)
    assert {CLASSES[number - 1] for number in label.unique().tolist() if number} == set(seen.labels) and len(
        seen.labels
    )
    for name, mask, score, box in zip(seen.labels, seen.masks, seen.scores, seen.boxes, strict=True):
        wanted = (label == CLASSES.index(name) + 1).numpy()
        np.testing.assert_array_equal(mask, wanted)
        assert score == pytest.approx(float(likely[torch.from_numpy(wanted)].mean()), rel=1e-4)
        down, across = np.nonzero(wanted)
        assert box.tolist() == [across.min(), down.min(), across.max() + 1, down.max() + 1]


def test_a_threshold_and_drawings(files, folder, tmp_path):
    whole = json.loads(predict(files["retinanet"], str(folder), tmp_path / "all.json").read_text())
    scores = sorted(note["score"] for note in whole["annotations"])
    least = scores[len(scores) // 2]
    draw = tmp_path / "drawn"
    some = predict(files["retinanet"], str(folder), tmp_path / "some.json", draw=draw, threshold=least)
    kept = json.loads(some.read_text())["annotations"]
    assert 0 < len(kept) < len(scores) and min(note["score"] for note in kept) >= least - 1e-6
    names = sorted(path.name for path in draw.iterdir())
    assert len(names) == 23 and names[0] == "000000-00.png" and "000005-05.png" not in names
    before = decoding.decode(folder / "a" / "00.jpg")
    after = np.asarray(Image.open(draw / "000000-00.png"))
    assert after.shape == before.shape
    changed = (before != after).any(axis=2)
    listed = {one["id"] for one in json.loads(some.read_text())["images"] if one["file_name"] == "a/00.jpg"}
    assert changed.any() == any(note["image_id"] in listed for note in kept)


def test_a_drawing_has_the_box_the_mask_and_nothing_elsewhere():
    pixels = torch.full((3, 60, 80), 100, dtype=torch.uint8)
    mask = np.zeros((60, 80), bool)
    mask[30:40, 40:60] = True
    one = predictions.Prediction(torch.tensor([[40.0, 30, 60, 40]]), torch.tensor([0.9]), torch.tensor([1]))
    drawn = detector.drawing(pixels, one, CLASSES, [masks.encoded(mask)])
    assert (drawn[:, 35, 50] != 100).any() and (drawn[:, 30, 45] != 100).any()
    assert (drawn[:, 50:] == 100).all()
    nothing = predictions.Prediction(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(detector.drawing(pixels, nothing, CLASSES, None), pixels)


def test_the_student_of_a_run_and_misuse(files, of_classes, folder, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "selftrain" / "student").mkdir(parents=True)
    shutil.copy(files["retinanet"], run / "selftrain" / "student" / "model.safetensors")
    out = tmp_path / "found.json"
    image = str(folder / "b" / "20.jpg")
    words = ["predict", "--model", run, "--data", image, "--out", out, "--device", "cpu", "--draw", tmp_path / "drawn"]
    assert cli.main([str(word) for word in words]) == 0
    assert len(json.loads(out.read_text())["annotations"]) == 7 and len(list((tmp_path / "drawn").iterdir())) == 1
    capsys.readouterr()
    with pytest.raises(UsageError, match=r"finds objects; name a \.json"):
        predict(run, image, tmp_path / "found.csv")
    with pytest.raises(UsageError, match=r"--layer conv1: .* tells no classes of images; leave it out"):
        predict(run, image, out, layer="conv1")
    with pytest.raises(UsageError, match=r"\.json is for detectors and segmenters"):
        predict(of_classes, image, out)
    with pytest.raises(UsageError, match=r"--threshold 0\.5: .* finds no objects; leave it out"):
        predict(of_classes, image, tmp_path / "found.csv", threshold=0.5)
    with pytest.raises(UsageError, match=r"--draw .*: is a file"):
        predict(run, image, out, draw=out)
