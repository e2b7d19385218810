"""The jitter filter: planted boxes that stay, move, and vanish, against numbers by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import SELFTRAIN
from torch import nn

from ktransfer.detection import canvas, saved
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_detection
from ktransfer.detection.predictions import Prediction, detect
from ktransfer.detection.saved import Described
from ktransfer.networks import Network
from ktransfer.retrain import selftrain
from ktransfer.retrain.selftraining import box_jitter, detecting, stage

SIZE = 64
PLACES = np.array([[6, 8, 26, 32], [36, 10, 60, 26], [20, 40, 44, 58]], np.float32)  # red, green, blue
CPU = torch.device("cpu")


class Seer(nn.Module):
    """In place of a detector: finds a red, a green and a blue square by their pixels; some otherwise than they are.

    The green one's sides are told wrong by a share of its size that differs from call to call, the blue one is not
    seen where it is not as large as in the image itself.
    """

    def __init__(self, wrong):
        super().__init__()
        self.roi_heads = SimpleNamespace()
        self.backbone = SimpleNamespace(how="imagenet")
        self.wrong, self.seen = wrong, []

    def forward(self, pixels):
        found = []
        for number, own in enumerate(pixels):
            sharp = own.argmax(0) + 1
            boxes, labels = [], []
            for label in (1, 2, 3):
                mask = (sharp == label) & (own.amax(0) > own.median(0).values + 1)
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
                if label == 2:
                    box = box + self.wrong[len(self.seen)][number] * (box[2:] - box[:2]).repeat(2)
                if label == 3 and box[2] - box[0] < 23:
                    continue
                boxes.append(box)
                labels.append(label)
            found.append(
                {"boxes": torch.stack(boxes), "labels": torch.tensor(labels), "scores": torch.ones(len(boxes))}
            )
        self.seen.append(self.roi_heads.score_thresh)
        return found


@pytest.fixture
def data(monkeypatch):
    """Two images with the three squares on black."""
    whole = open_detection(f"scenes:images=12,size={SIZE}")[0]
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for channel, (x1, y1, x2, y2) in enumerate(PLACES.astype(int)):
        image[y1:y2, x1:x2, channel] = 255
    return replace(whole, read=lambda row, short_side: image)


def test_boxes_that_stay_that_move_and_that_vanish(data):
    rows = torch.tensor([3, 8])
    wrong = np.random.default_rng(0).uniform(-0.1, 0.1, (1 + box_jitter.VIEWS, 2, 4)).astype(np.float32)
    wrong[0] = 0
    model, settings = Seer(torch.from_numpy(wrong)), Settings(threshold=0.5)
    source = canvas.canvases(data, SIZE, 1, cache="off")
    predictions = detect(model, data, source, rows, SIZE, settings, CPU)
    assert np.allclose(predictions[3].boxes, PLACES)
    nothing = Prediction(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    predictions[5] = nothing
    found = box_jitter.spreads(model, data, source, predictions, SIZE, settings, CPU, seed=7)
    assert model.seen == [0.5] + [0.25] * box_jitter.VIEWS
    assert sorted(found) == [3, 8]
    flips, scales = [], []
    for view in range(box_jitter.VIEWS):
        jitter = canvas.draw_jitter(rows, torch.full((2, 2), float(SIZE)), SIZE, 7, view, box_jitter.SCALES)
        flips.append(jitter.flip)
        scales.append(jitter.scale)
    assert 0 < torch.stack(flips).sum() < 2 * box_jitter.VIEWS
    width, height = PLACES[1, 2:] - PLACES[1, :2]
    for number, row in enumerate(rows.tolist()):
        sides = []
        for view in range(box_jitter.VIEWS):
            left, top, right, bottom = wrong[1 + view, number] * [width, height, width, height]
            sides.append([-right, top, -left, bottom] if flips[view][number] else [left, top, right, bottom])
        by_hand = np.std([[0, 0, 0, 0], *sides], axis=0).mean() / ((width + height) / 2)
        spread = found[row].numpy()
        assert spread[0] < 0.03  # whole pixels of a smaller image
        assert spread[1] == pytest.approx(by_hand, abs=0.03)
        assert spread[1] > 0.04
        assert np.isinf(spread[2])
    kept, dropped = box_jitter.without_moving(predictions, found, 0.03)
    assert dropped == 4
    assert [kept[row].labels.tolist() for row in (3, 8, 5)] == [[0], [0], []]
    assert torch.equal(kept[3].boxes, predictions[3].boxes[:1])
    assert box_jitter.without_moving(predictions, found, 1.0)[1] == 2


def test_a_box_that_ends_at_the_edge_of_its_image_does_not_move(data):
    """The green square stands on the lower edge of an image that is lower than the canvas, and is told higher.

    What reaches over the edge is cut in the prediction; so it is in the views, where the canvas goes on beyond it.
    """
    low = np.zeros((40, SIZE, 3), np.uint8)
    for channel, (x1, y1, x2, y2) in enumerate([(4, 8, 20, 24), (40, 16, 64, 40), (20, 2, 44, 26)]):
        low[y1:y2, x1:x2, channel] = 255
    data = replace(data, read=lambda row, short_side: low, sizes=np.array([[SIZE, 40]] * len(data), np.int32))
    wrong = torch.zeros(1 + box_jitter.VIEWS, 2, 4)
    wrong[:, :, 3] = 0.6
    rows, settings, source = torch.tensor([3, 8]), Settings(threshold=0.5), canvas.canvases(data, SIZE, 1, cache="off")
    model = Seer(wrong)
    predictions = detect(model, data, source, rows, SIZE, settings, CPU)
    assert np.allclose(predictions[3].boxes[1], [40, 16, 64, 40])
    found = box_jitter.spreads(model, data, source, predictions, SIZE, settings, CPU, seed=7)
    assert max(float(found[row][1]) for row in (3, 8)) < 0.03  # whole pixels of a smaller image


def test_only_the_same_class_stands_for_a_box():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    near = torch.tensor([[1.0, 0.0, 11.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 4.0]])
    found = box_jitter._found(box, torch.tensor([2]), near, torch.tensor([1, 2, 2]))
    assert torch.equal(found, near[1:2])
    for others, labels in ((near[:1], [1]), (near[2:], [2]), (near[:0], [])):
        assert box_jitter._found(box, torch.tensor([2]), others, torch.tensor(labels)).isinf().all()


@pytest.mark.parametrize("kind", ["retinanet", "fasterrcnn"])
def test_a_detector_that_is_shown_the_same_again_says_the_same(kind, monkeypatch):
    data = open_detection(f"scenes:images=12,size={SIZE}")[0]
    network = Network("alexnet_bn", 0.05, 4, SIZE, 0, "imagenet", "random")
    settings = Settings(kind, threshold=0.0, most=20, proposals=50)
    described = Described(network, detecting.NECKS[kind], settings, data.classes, SIZE, 16)
    model, source = saved.make(described, 0), canvas.canvases(data, SIZE, 1, cache="off")
    predictions = detect(model, data, source, torch.tensor([3, 8]), SIZE, settings, CPU)
    assert [len(prediction.scores) for prediction in predictions.values()] == [20, 20]

    def still(rows, extents, size, *_):
        return canvas.Jitter(torch.ones(2), torch.zeros(2, 2), torch.tensor([False, False]), extents, size)

    monkeypatch.setattr(box_jitter.canvas, "draw_jitter", still)
    found = box_jitter.spreads(model, data, source, predictions, SIZE, settings, CPU, seed=0)
    assert all((spread < 1e-4).all() for spread in found.values())


def test_in_the_pseudo_step_it_leaves_out_boxes(tmp_path):
    options = SELFTRAIN | {"labelled": "scenes:images=8,size=64"}
    folder = selftrain(tmp_path / "all", **options).parent
    teacher, held = folder / "teacher" / "model.safetensors", []
    for run in ("some", "again"):
        work = stage.check(tmp_path / run, options | {"jitter_filter": 0.1}).work
        path = stage._label(tmp_path / run, work, teacher, "")
        held.append(path.read_bytes())
        record = json.loads(path.with_name("stage.json").read_text())["pseudo"]["result"]
    assert held[0] == held[1]
    whole, some = json.loads((folder / "pseudo.json").read_text()), json.loads(held[0])
    assert "jitter_filter" not in whole["info"]
    assert some["info"]["jitter_filter"] == 0.1
    assert some["images"] == whole["images"]
    notes = [[(one["image_id"], *one["bbox"], one["score"]) for one in made["annotations"]] for made in (whole, some)]
    assert set(notes[1]) < set(notes[0])
    assert record["boxes"] == len(notes[1]) > 0
    assert record["boxes that move, left out"] == len(notes[0]) - len(notes[1])
