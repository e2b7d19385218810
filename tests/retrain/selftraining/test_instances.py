"""Self-training of Mask R-CNN: its files, what a training is shown, its loss by hand, and refusals."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from tiny import SELFTRAIN
from torch import nn

from ktransfer.data import scenes
from ktransfer.detection import canvas, geometry, masks
from ktransfer.detection.data import subset
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_detection
from ktransfer.detection.strengths import augment, boxless
from ktransfer.errors import UsageError
from ktransfer.retrain import SelftrainConfig, selftrain
from ktransfer.retrain.selftraining import boxes, instances, stage, student
from ktransfer.training.batch import Batch

SMALL = SELFTRAIN | {
    "task": "instance",
    "labelled": "scenes:images=12,size=64",
    "fraction": 0.34,
    "channels": 8,
    "batch": 2,
    "lr": 0.02,
    "norm": "bn",
    "test_threshold": 0.0,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        few = partial(Settings, sampled=4, proposals=8, width=16, most=2)
        patch.setattr(stage, "Settings", few)
        selftrain(run, **SMALL)
    return run


def test_files_and_scores(made, capsys):
    folder = made / "selftrain"
    steps = json.loads((folder / "stage.json").read_text())
    assert list(steps) == ["teacher", "pseudo", "student", "scores"]
    assert steps["student"]["result"]["pseudo-objects"] == steps["pseudo"]["result"]["objects"] > 0
    found = json.loads((folder / "scores.json").read_text())
    for scores in found["scores"].values():
        for name in ("mask_AP", "mask_AP50", "mask_AP75", "AP"):
            assert 0 <= scores[f"{name}_interval"][0] <= scores[name] <= scores[f"{name}_interval"][1] <= 1
    lines = [json.loads(line) for line in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
    assert {"human_loss", "pseudo_loss", "ratio", "human_objects", "pseudo_objects"} <= set(lines[-1])
    assert (folder / "student" / "augmented.png").is_file()
    capsys.readouterr()


def test_pseudo_masks_lie_in_their_boxes_and_others_read_them(made, capsys):
    path = made / "selftrain" / "pseudo.json"
    coco = pytest.importorskip("pycocotools.coco").COCO(str(path))
    inside = 0
    for note in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(note)
        np.testing.assert_array_equal(mask, masks.decoded(note["segmentation"]))
        x, y, width, height = note["bbox"]
        rows, columns = np.nonzero(mask)
        inside += len(rows)
        if len(rows):
            assert x - 3 <= columns.min() and columns.max() <= x + width + 3
            assert y - 3 <= rows.min() and rows.max() <= y + height + 3
    assert inside
    capsys.readouterr()


@pytest.mark.parametrize("strength", ["none", "S1", "S4"])
def test_targets_are_the_outlines_where_they_come_to_lie(strength):
    data, _ = instances.open_data("scenes:images=12,size=96")
    known, _ = instances.known(data, SelftrainConfig(size=96), torch.device("cpu"))
    rows = torch.arange(12)
    batch, moves = augment(boxless(torch.zeros(12, 3, 96, 96).byte(), known.extents), strength, rows, 0, 0)
    seen = 0
    for row in range(12):
        found = instances.target(known, row, moves[row : row + 1], batch.extents[row : row + 1])
        assert found["masks"].dtype == torch.uint8
        inside = canvas.inside(batch.extents[row : row + 1], 96)[0, 0].numpy()
        wanted = []
        for outline, label in zip(data.objects[row].outlines, data.objects[row].labels.tolist(), strict=True):
            moved = [
                geometry.move_points(torch.tensor(one).view(1, -1, 2), moves[row : row + 1]).flatten().tolist()
                for one in outline
            ]
            wanted.append((masks.filled(moved, (96, 96)) & inside, label + 1))
        for mask, box, label in zip(found["masks"].numpy(), found["boxes"], found["labels"].tolist(), strict=True):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            shares = [(mask & one).sum() / (mask | one).sum() for one, own in wanted if own == label]
            if len(x) > 100:
                assert max(shares) > 0.7
                seen += 1
    assert seen >= 6


class Counting(nn.Module):
    """In place of Mask R-CNN: a loss that can be told by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels, targets):
        covered = sum(float(target["masks"].sum()) for target in targets)
        return {"a": self.weight * covered / len(targets), "b": self.weight * pixels.mean().abs()}


def test_the_student_weighs_both_halves():
    data, _ = instances.open_data("scenes:images=12,size=64")
    data = subset(data, np.arange(4))
    known, broken = instances.known(data, SelftrainConfig(size=64), torch.device("cpu"))
    assert not broken
    pixels = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    seen = canvas.normalise(pixels, known.extents, "imagenet")
    covered = [sum(masks.filled(one, (64, 64)).sum() for one in objects.outlines) for objects in data.objects]
    model = student.Student(Counting())
    loss = instances.losses(known, "imagenet", "none", 0, student.Weighing("plain", 0.5, 0.9), split=2)
    batch = Batch(torch.arange(4), pixels, torch.ones(4).bool(), 0)
    value, sums = loss(model, batch)
    halves = [2 * (np.mean(covered[part]) + float(seen[part].mean().abs())) for part in (slice(0, 2), slice(2, 4))]
    assert value.item() == pytest.approx(halves[0] + 0.5 * halves[1], rel=1e-5)
    assert int(sums["human_objects"]) == 2 * sum(len(one.labels) for one in data.objects[:2])
    alone, sums = instances.losses(known, "imagenet", "none", 0)(model.detector, batch)
    assert alone.item() == pytest.approx(2 * (np.mean(covered) + float(seen.mean().abs())), rel=1e-5)
    assert int(sums["objects"]) == sum(len(one.labels) for one in data.objects)


def test_an_image_whose_objects_are_moved_out_has_none():
    data, _ = instances.open_data("scenes:images=12,size=64")
    known, _ = instances.known(data, SelftrainConfig(size=64), torch.device("cpu"))
    away = geometry.shift(torch.tensor([[100.0, 0.0]]))
    found = instances.target(known, 0, away, torch.tensor([[64.0, 64.0]]))
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 64, 64) and found["labels"].shape == (0,)
    crowded = data.objects[0]._replace(crowd=np.ones(len(data.objects[0].labels), bool))
    object.__setattr__(data, "objects", (crowded, *data.objects[1:]))
    assert not len(instances.target(known, 0, geometry.identity(1), torch.tensor([[64.0, 64.0]]))["labels"])


def test_objects_without_outline_are_refused(tmp_path):
    scenes.write_scenes(tmp_path / "s", 12, 48)
    path = tmp_path / "s" / "train.json"
    held = json.loads(path.read_text())
    outline = held["annotations"][0]["segmentation"]
    for wrong, words in (
        ([], "without outline"),
        ([[1, 1, 9, 9, 1, float("nan")]], "without outline"),
        ({"size": [48, 48], "counts": [7]}, "broken outline"),
        ({"size": [24, 96], "counts": [0, 24 * 96]}, r"broken outline \(of \[24, 96\] pixels"),
    ):
        held["annotations"][0]["segmentation"] = wrong
        path.write_text(json.dumps(held))
        with pytest.raises(UsageError, match=words):
            instances.open_data(str(tmp_path / "s"))
    held["annotations"][0] |= {"segmentation": outline}
    path.write_text(json.dumps(held))
    data = instances.open_data(str(tmp_path / "s"))[0]
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    pseudo = {
        "images": [{"id": 1, "file_name": data.keys[0]}],
        "categories": [{"id": 1, "name": data.classes[0]}],
        "annotations": [note | {"segmentation": masks.encoded(np.ones((48, 48), bool))}],
    }
    (tmp_path / "p.json").write_text(json.dumps(pseudo))
    plain = boxes.without_boxes(data, data)
    found, rows = instances.read(tmp_path / "p.json", plain, data, SelftrainConfig())
    assert rows.tolist() == [0] and masks.filled(found.objects[0].outlines[0], (48, 48)).all()
    pseudo["annotations"] = [note]
    (tmp_path / "p.json").write_text(json.dumps(pseudo))
    with pytest.raises(UsageError, match=r"p\.json: .* without outline"):
        instances.read(tmp_path / "p.json", plain, data, SelftrainConfig())
    options = SMALL | {"labelled": str(tmp_path / "s"), "pseudo": str(tmp_path / "p.json")}
    with pytest.raises(UsageError, match=r"p\.json: .* without outline"):  # before the teacher is trained
        stage.check(tmp_path / "run", options)
    assert open_detection(str(tmp_path / "s"))[0].classes == data.classes
