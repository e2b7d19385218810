"""The export of detectors and segmenters: an ONNX file that finds what the network does, or none at all."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from ktransfer import cli
from ktransfer.detection import canvas, detectors, saved, segmentation
from ktransfer.detection.detectors import Settings
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.retrain import export, load_model
from ktransfer.retrain.students import detector_file
from ktransfer.retrain.students.loading import classifier_of
from ktransfer.retrain.students.predicting import predict
from tests.support.tiny import SELFTRAIN

CLASSES = ("cat", "dog", "owl")
SIZE = 64
NECKS = {"retinanet": "p3-p7", "fasterrcnn": "p2-p6", "maskrcnn": "p2-p6", **segmentation.HEADS}
WIDE, HIGH = 64, 40


def weights(folder, kind, seed=3, normalise="imagenet"):
    """The weight file of a run whose selftrain made a detector of random numbers."""
    settings = Settings(kind=kind, norm="bn", anchor=2.0, width=64, proposals=50, threshold=0.0101, most=30)
    network = Network("alexnet_bn", 0.1, normalise=normalise)
    described = saved.Described(network, NECKS[kind], settings, CLASSES, SIZE, 16)
    model = saved.make(described, seed)
    with torch.no_grad():  # numbers that differ from pixel to pixel and from box to box
        for name, value in model.named_parameters():
            if name.endswith("weight") and value.ndim == 4 and "backbone.body" not in name:
                value.mul_(3)
    path = folder / "selftrain" / "student" / "model.safetensors"
    path.parent.mkdir(parents=True)
    saved.save(path, model, described)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One with a RetinaNet and its export."""
    folder = tmp_path_factory.mktemp("found") / "run"
    weights(folder, "retinanet")
    assert cli.main(["--run", str(folder), "export", "--licence", "CC0-1.0"]) == 0
    return folder


def pixels(count=1):
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def opened(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def by_torchvision(path, image, extent, threshold):
    """What torchvision's own RetinaNet finds, within the image."""
    model, made = saved.load(path)
    detectors.predicting(model.eval(), threshold, made.settings.overlap, made.settings.most)
    with torch.no_grad():
        found = model(canvas.normalise(image, extent.float(), model.backbone.how))[0]
    boxes = torch.minimum(found["boxes"], extent.float().repeat(1, 2))
    wide = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[wide], found["scores"][wide], found["labels"][wide]


def test_onnxruntime_finds_what_torchvision_does(run):
    student = opened(run / "export" / "detector" / "detector.onnx")
    image, extent = pixels(), torch.tensor([[WIDE, HIGH]])
    feed = {"image": image.numpy(), "extent": extent.numpy()}
    counts, path = [], run / "selftrain/student/model.safetensors"
    middle = float(by_torchvision(path, image, extent, 0.0)[1].median())
    for threshold in (0.0101, 0.0, 1.0, middle):
        found = student.run(["boxes", "scores", "labels"], feed | {"threshold": np.array(threshold, np.float32)})
        wanted = by_torchvision(path, image, extent, threshold)
        for own, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(own, other.numpy(), atol=1e-3, rtol=1e-4)
        counts.append(len(found[1]))
    assert 0 < counts[0] <= counts[1] <= 30 and 0 < counts[3] < counts[1] and counts[2] == 0


def test_the_file_says_what_it_is(run):
    content = onnx.load(run / "export" / "detector" / "detector.onnx")
    onnx.checker.check_model(content, full_check=True)
    facts = {entry.key: entry.value for entry in content.metadata_props}
    made = saved.describe(run / "selftrain/student/model.safetensors")
    assert saved.described(json.loads(facts["detector"])) == made and json.loads(facts["classes"]) == list(CLASSES)
    assert b".py" not in (run / "export" / "detector" / "detector.onnx").read_bytes()
    record = json.loads((run / "export" / "stage.json").read_text())["export-detector"]
    assert record["state"] == "done" and record["inputs"]["weights"] == facts["weights"]


def test_the_card_and_its_code(run, monkeypatch):
    card = (run / "export" / "detector" / "README.md").read_text()
    for words in (
        "0.0101 is the detector's own",
        "IoU 0.5",
        "30 at most",
        "| licence | CC0-1.0 |",
        "`cat`, `dog`, `owl`",
    ):
        assert words in card, words
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(run / "export" / "detector")
    Image.fromarray(pixels()[0, :, :HIGH].permute(1, 2, 0).numpy()).save("image.png")
    found: dict = {}
    exec(code.replace("image.jpg", "image.png"), found)
    seen = load_model(run).predict("image.png")
    np.testing.assert_allclose(found["boxes"], seen.boxes, atol=0.01)
    assert [CLASSES[label] for label in found["labels"]] == list(seen.labels) and len(seen.labels) > 3


def test_predict_takes_the_file(run, folder, tmp_path):
    student = run / "export" / "detector" / "detector.onnx"
    image = str(folder / "b" / "20.jpg")
    ours, theirs = (
        json.loads(predict(model, image, tmp_path / f"{name}.json").read_text())["annotations"]
        for name, model in (("torch", run), ("onnx", student))
    )
    assert len(ours) == len(theirs) > 3
    for own, other in zip(ours, theirs, strict=True):
        assert own["category_id"] == other["category_id"]
        np.testing.assert_allclose([*own["bbox"], own["score"]], [*other["bbox"], other["score"]], atol=0.02)
    assert load_model(student).predict(image).masks is None
    with pytest.raises(UsageError, match=r"--device cuda: detector\.onnx runs on the CPU"):
        predict(student, image, tmp_path / "found.json", device="cuda")
    with pytest.raises(UsageError, match="finds objects and tells no classes of images"):
        classifier_of(student)


@pytest.mark.parametrize("kind", segmentation.HEADS)
def test_segmenters(kind, folder, tmp_path):
    path = weights(tmp_path / "run", kind, normalise="picture")
    student = export(tmp_path / "run")
    assert student.name == "segmenter.onnx"
    model, _ = saved.load(path)
    extents = torch.tensor([[WIDE, HIGH], [30, 64], [64, 64]])
    with torch.no_grad():
        wanted = model.eval()(canvas.normalise(pixels(3), extents.float(), "picture")).numpy()
    found = opened(student).run(["logits"], {"image": pixels(3).numpy(), "extent": extents.numpy()})[0]
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
    own, other = (load_model(one).predict(folder / "b" / "20.jpg") for one in (tmp_path / "run", student))
    assert own.labels == other.labels
    assert (own.masks != other.masks).mean() < 0.001  # pixels at which two classes are level
    code = re.search(r"```python\n(.*?)```", (student.parent / "README.md").read_text(), re.DOTALL)[1]
    assert "argmax" in code and len(code.splitlines()) == 3


def test_what_is_not_reproduced_is_not_written(run, tmp_path, monkeypatch):
    other = weights(tmp_path / "other", "retinanet", seed=4)
    as_it_is = detector_file.to_onnx

    def another(graph, described, opset, digest):
        return as_it_is(detector_file.graph_of(saved.load(other)[0], described), described, opset, digest)

    monkeypatch.setattr(detector_file, "to_onnx", another)
    with pytest.raises(StageError, match=r"detector\.onnx does not compute .* nothing was written"):
        export(tmp_path / "new", model=str(run))
    assert [path.name for path in (tmp_path / "new" / "export").rglob("*") if path.is_file()] == ["stage.json"]


def test_other_objects_of_the_same_boxes_are_a_difference(run):
    path = run / "selftrain/student/model.safetensors"
    content = (run / "export" / "detector" / "detector.onnx").read_bytes()
    model, made = saved.load(path)
    assert detector_file.difference(content, detector_file.graph_of(model, made), made) < 1e-5
    for change in ({"overlap": 0.3}, {"most": 20}):
        changed = replace(made, settings=replace(made.settings, **change))
        graph = detector_file.graph_of(model, changed)
        assert detector_file.difference(content, graph, changed) == float("inf"), change


def test_done_is_skipped_and_misuse_is_one_line(run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (run / "export").rglob("*") if path.is_file()}
    export(run, licence="CC0-1.0")
    assert "export-detector: done before, skipped" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (run / "export").rglob("*") if path.is_file()} == before
    for kind in ("fasterrcnn", "maskrcnn"):
        path = weights(tmp_path / kind, kind)
        with pytest.raises(UsageError, match=f"a {kind} cannot be exported; RetinaNet .* and segmenters .* can"):
            export(tmp_path / "new", model=str(path))
    for given in ({"format": "torch"}, {"int8": True}):
        with pytest.raises(UsageError, match=r"is for networks that tell classes, .* finds objects; leave it out"):
            export(run, **given)
    other = tmp_path / "mine"
    shutil.copytree(run / "selftrain", other / "selftrain")
    (other / "export" / "detector").mkdir(parents=True)
    (other / "export" / "detector" / "README.md").write_text("my own")
    with pytest.raises(UsageError, match="was not made by ktransfer"):
        export(other)


def test_in_a_line_it_exports_what_selftrain_will_make(tmp_path, capsys):
    options = [word for name, value in SELFTRAIN.items() for word in (f"--{name}", str(value))]
    line = ["--run", str(tmp_path / "run"), "--dry-run", "selftrain", *options, "--device", "cpu", "export"]
    assert cli.main(line) == 0
    assert "export-detector" in "".join(capsys.readouterr())
