import json

import numpy as np
import pytest
import torch

from ktransfer.data.loader import ImageLoader
from ktransfer.detection import masks, segmentation
from ktransfer.errors import UsageError
from ktransfer.eval import evaluate
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.protocols import segment
from ktransfer.networks import Network

SMALL = {
    "labelled": "scenes:images=24,size=64",
    "canvas": 64,
    "epochs": 1,
    "batch": 8,
    "protocol": "segment",
    "precision": "float32",
}


def test_a_table_of_segmenters(small_student):
    report = json.loads(evaluate(small_student, **SMALL)["segment"].read_text())
    assert report["protocol"] == "segment/2" and list(report["arms"]) == ["random", "run"]
    for arm in report["arms"].values():
        for column in ("frozen", "full"):
            cell = arm["scores"][column]
            for measure in segment.MEASURES:
                low, high = cell[f"{measure}_interval"]
                assert 0 <= low <= cell[measure] <= high <= 1
            assert "background" in cell["classes"]
    assert not list((small_student / "eval").glob("work-*"))


@pytest.mark.parametrize("head", ["deeplab", "fpn"])
def test_other_heads(small_student, head):
    report = json.loads(
        evaluate(small_student, **SMALL, head=head, trunk="frozen", random=False)["segment"].read_text()
    )
    assert 0 < report["arms"]["run"]["scores"]["frozen"]["mIoU"] < 1


def test_wrong_data_is_found_before_the_work(small_student, tmp_path, monkeypatch):
    from ktransfer.data import scenes

    scenes.write_scenes(tmp_path / "s", 12, 48)
    for name in ("train", "val"):
        path = tmp_path / "s" / f"{name}.json"
        held = json.loads(path.read_text())
        for note in held["annotations"]:
            note["segmentation"] = []
        path.write_text(json.dumps(held))
    with pytest.raises(UsageError, match="only boxes"):
        evaluate(small_student, **(SMALL | {"labelled": str(tmp_path / "s")}))
    monkeypatch.setattr(masks, "available_bytes", lambda: 1000)
    with pytest.raises(UsageError, match="--canvas 64: the masks of 24 images"):
        evaluate(small_student, **SMALL)


def test_summary_is_that_of_one_confusion_matrix():
    counts = np.array([[[5, 1], [0, 2]], [[4, 0], [3, 1]]], np.int64)
    found = segmentation.summary(counts, ("background", "a"), 0)
    assert found["mIoU"] == pytest.approx((9 / 13 + 3 / 7) / 2) and found["pixels"] == pytest.approx(12 / 16)
    assert found["classes"] == {"background": pytest.approx(9 / 13), "a": pytest.approx(3 / 7)}
    assert found["mIoU_interval"][0] < found["mIoU"] < found["mIoU_interval"][1]


def test_masks_of_other_images_teach_nothing_and_the_test_part_is_read_once(tmp_path, monkeypatch):
    train, test = segment.open_data("scenes:images=24,size=64")
    labels = np.random.default_rng(0).integers(0, 12, 24)
    shuffled = tuple(
        one._replace(labels=np.full_like(one.labels, label)) for one, label in zip(train.objects, labels, strict=True)
    )
    object.__setattr__(train, "objects", shuffled)
    asked = []
    real = ImageLoader.batches
    monkeypatch.setattr(
        ImageLoader,
        "batches",
        lambda self, rows: real(self, (asked.append((self.dataset.name, one.tolist())) or one for one in rows)),
    )
    config = EvalConfig(**(SMALL | {"weight_decay": 1e-4, "trunk": "full", "epochs": 10, "lr": 0.05}))
    arm = Arm("run", Network("alexnet_bn", 0.25, size=64), None)
    found = segment.evaluate(arm, (train, test), config, tmp_path / "work", torch.device("cpu"))
    cell = found["scores"]["full"]
    # Objects cover a fifth of an image: background everywhere has 1/13 at best, and nothing to tell classes by.
    assert (
        cell["mIoU"] < 0.2
        and np.mean([value for name, value in cell["classes"].items() if name != "background"]) < 0.12
    )
    assert sorted(row for name, rows in asked for row in rows if name == test.name) == list(range(len(test)))
