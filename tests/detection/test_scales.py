"""Detectors at several scales and mirrored: views against images by hand, merging against a plain loop."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from ktransfer.detection import canvas, detectors, predictions, scales, trunks
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_file
from ktransfer.errors import BrokenImage
from ktransfer.networks import Network

CPU = torch.device("cpu")
ROWS = torch.tensor([3, 5])


@pytest.fixture(scope="module")
def data():
    return open_file("scenes:images=24,size=48")


def made(size=96, **more):
    trunk = trunks.build(Network("alexnet_bn", 0.25), None, "single", "bn", 0, 32)
    settings = Settings(kind="fasterrcnn", norm="bn", width=64, proposals=50, **more)
    return detectors.build(trunk, 12, size, settings, 0), settings


def test_one_scale_is_the_detector_itself(data):
    source, (model, settings) = canvas.canvases(data, 96), made(threshold=0.05)
    plain = predictions.detect(model, data, source, ROWS, 96, settings, CPU)
    found, _ = scales.detect_at(model, data, source, ROWS, 96, settings, CPU, [1.0])
    for row, prediction in plain.items():
        for one, other in zip(prediction, found[row], strict=True):
            assert torch.equal(one, other)


def test_a_mirrored_canvas_is_the_canvas_of_the_mirrored_image(data):
    narrow = canvas.extents(data, 64)
    narrow[:, 0] -= 10  # as if each had a margin at the right
    source = canvas.canvases(data, 64)
    for (_, plain, _, _), (_, turned, _, _) in zip(
        source.batches([ROWS]), scales.Mirrored(source, narrow).batches([ROWS]), strict=True
    ):
        assert np.array_equal(turned[..., :54].numpy(), plain[..., :54].numpy()[..., ::-1])
        assert torch.equal(turned[..., 54:], plain[..., 54:])


class Bright(nn.Module):
    """Predicts the box around what is brighter than 128; its score is 0.9, less 0.1 for each hundred pixels of
    side."""

    def __init__(self):
        super().__init__()
        self.backbone, self.roi_heads = nn.Module(), nn.Module()
        self.backbone.how = "unit"

    def forward(self, pixels):
        found = []
        for image in pixels:
            down, across = (image.mean(0) > 0.5).nonzero().unbind(1)
            box = torch.tensor([[across.min(), down.min(), across.max() + 1, down.max() + 1]]).float()
            score = torch.tensor([0.9 - len(image[0]) / 1000])
            found.append({"boxes": box, "scores": score, "labels": torch.tensor([4])})
        return found


def test_every_view_finds_the_same_place(data, monkeypatch):
    def lit(row, side):
        image = np.zeros((48, 48, 3), np.uint8)
        image[10:30, 4:20] = 255
        return image

    monkeypatch.setattr(canvas.networks, "normalise", lambda pixels, how: pixels.float() / 255)
    lit_data = data.__class__(**{**vars(data), "read": lit})
    settings, source = Settings(kind="fasterrcnn", overlap=1.0), canvas.canvases(lit_data, 96)
    found, _ = scales.detect_at(Bright(), lit_data, source, ROWS, 96, settings, CPU, [0.66, 1.0, 1.34])
    assert list(found) == [3, 5]
    assert len(found[3].boxes) == 6
    assert found[3].scores.tolist() == pytest.approx([0.836, 0.836, 0.804, 0.804, 0.772, 0.772])
    for box in found[3].boxes:
        torch.testing.assert_close(box, torch.tensor([4.0, 10.0, 20.0, 30.0]), atol=1.0, rtol=0)
    plain = Settings(kind="fasterrcnn")
    one, _ = scales.detect_at(Bright(), lit_data, source, ROWS, 96, plain, CPU, [0.66, 1.0, 1.34])
    assert len(one[5].boxes) == 1 and one[5].labels.tolist() == [3]


def test_merging_is_that_of_a_plain_loop(data):
    source, (model, settings) = canvas.canvases(data, 96), made(threshold=0.06, most=30)
    found = scales.detect_at(model, data, source, ROWS, 96, settings, CPU, [1.0, 1.34])[0][3]
    views = []
    for side in (96, 128):
        own = canvas.canvases(data, side)
        for view in (own, scales.Mirrored(own, canvas.extents(data, side))):
            boxes, values, labels = predictions.detect(model, data, view, ROWS, side, settings, CPU)[3]
            if view is not own:
                boxes = torch.stack([48 - boxes[:, 2], boxes[:, 1], 48 - boxes[:, 0], boxes[:, 3]], 1)
            views += zip(values.tolist(), labels.tolist(), boxes, strict=True)
    kept = []
    for score, label, box in sorted(views, key=lambda one: -one[0]):
        if all(label != other or float(box_iou(box[None], place[None])) <= 0.5 for _, other, place in kept):
            kept.append((score, label, box))
    assert found.scores.tolist() == [score for score, _, _ in kept][:30]
    assert found.labels.tolist() == [label for _, label, _ in kept][:30]


def test_sides_are_whole_strides():
    assert scales.sides(320, [0.75, 1.0, 1.25]) == [256, 320, 384]
    assert scales.sides(100, [0.2, 0.25, 1.0]) == [32, 100]


@pytest.mark.parametrize("at", [[1.0], [0.66, 1.34]])
def test_broken_images_are_told_whatever_the_scales(data, at):
    def read(row, side):
        if row == 5:
            raise BrokenImage("is empty")
        return data.read(row, side)

    torn = data.__class__(**{**vars(data), "read": read})
    model, settings = made(threshold=0.05)
    source = canvas.canvases(torn, 96)
    found, broken = scales.detect_at(model, torn, source, ROWS, 96, settings, CPU, at)
    assert broken == {5: "is empty"}
    assert list(found) == [3]
