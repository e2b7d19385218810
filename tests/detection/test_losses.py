import json
from pathlib import Path

import pytest
import torch

from ktransfer.detection import canvas, detectors, losses, metrics, predictions, trunks
from ktransfer.detection.data import subset
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_file
from ktransfer.errors import UsageError
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.protocols import detect, segment
from ktransfer.networks import Network
from ktransfer.training import loop
from ktransfer.training.batch import Batch
from ktransfer.training.options import TrainOptions

CPU = torch.device("cpu")
SMALL = {"width": 64, "proposals": 50, "sampled": 32}


def made(kind="retinanet", norm="gn", neck="p3-p7", arch="resnet18", size=64, seed=0, classes=12, **more):
    trunk = trunks.build(Network(arch, 0.25 if arch.startswith("alexnet") else 1.0), None, neck, norm, seed, 32)
    settings = Settings(kind=kind, norm=norm, **(SMALL | {"anchor": 2.0} | more))
    return detectors.build(trunk, classes, size, settings, seed), settings


def batch_of(data, size, rows):
    pixels, valid = canvas.canvases(data, size).batch(rows)
    return Batch(rows, pixels, valid, 0)


def test_targets_follow_the_jitter_and_leave_crowds_out():
    data = open_file("scenes:images=24,size=48")
    crowd = data.objects[3]._replace(crowd=~data.objects[3].crowd)
    data = subset(data, torch.arange(24).numpy())
    object.__setattr__(data, "objects", (*data.objects[:3], crowd, *data.objects[4:]))
    truth = losses.truth(data, 96, CPU)
    assert truth.outlines is None
    assert len(truth.boxes[3]) == 0 and torch.equal(truth.boxes[0], torch.from_numpy(data.objects[0].boxes) * 2)
    rows = torch.arange(6)
    jitter = canvas.draw_jitter(rows, truth.extents[rows], 96, 0, 0)
    for place, target in enumerate(losses.targets(truth, rows, jitter, 1)):
        boxes = truth.boxes[place].clone()
        if jitter.flip[place]:
            boxes[:, [0, 2]] = 96 - boxes[:, [2, 0]]
        torch.testing.assert_close(target["boxes"], boxes)
        assert torch.equal(target["labels"], truth.labels[place] + 1)


def test_masks_follow_the_boxes():
    data, rows = open_file("scenes:images=24,size=64"), torch.arange(12)
    truth = losses.truth(data, 96, CPU, masks=True)
    jitter = canvas.draw_jitter(rows, truth.extents[rows], 96, 0, 0, (0.6, 1.6))
    for target in losses.targets(truth, rows, jitter, 1):
        assert len(target["masks"]) == len(target["boxes"]) and target["masks"].dtype == torch.uint8
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            down, across = mask.nonzero().unbind(1)
            span = torch.stack([across.min(), down.min(), across.max() + 1, down.max() + 1])
            assert (span - box).abs().max() < 3  # thin ends cover no half of a pixel
    model, _ = made("maskrcnn", "gn", "p2-p6", size=96)
    value, sums = losses.detection_loss(truth, "imagenet", 0)(model.train(), batch_of(data, 96, torch.arange(2)))
    value.backward()
    assert sums["loss_mask"] > 0 and model.roi_heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum() > 0
    boxes = data.objects[2]._replace(outlines=(None,) * len(data.objects[2].boxes))
    object.__setattr__(data, "objects", (*data.objects[:2], boxes, *data.objects[3:]))
    with pytest.raises(UsageError, match="an object without polygons"):
        losses.truth(data, 96, CPU, masks=True)


def test_images_keep_their_scale_unless_another_is_named():
    data = open_file("scenes:images=24,size=64")
    model, truth = made()[0].eval(), losses.truth(data, 64, CPU)
    seen = []
    model.forward = lambda pixels, targets: seen.append(pixels) or {"loss": pixels.mean()}
    for scales in ((), ((1.0, 1.0),), ((0.5, 2.0),)):
        losses.detection_loss(truth, "imagenet", 0, *scales)(model, batch_of(data, 64, torch.arange(4)))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("kind", ["retinanet", "fasterrcnn"])
def test_images_without_objects_train_too(kind):
    data = open_file("scenes:images=24,size=64")
    empty = [one._replace(**{name: getattr(one, name)[:0] for name in one._fields}) for one in data.objects]
    data = subset(data, torch.arange(24).numpy())
    object.__setattr__(data, "objects", tuple(empty))
    model, _ = made(kind, neck="p3-p7" if kind == "retinanet" else "p2-p6")
    value, _ = losses.detection_loss(losses.truth(data, 64, CPU), "imagenet", 0)(
        model.train(), batch_of(data, 64, torch.arange(4))
    )
    value.backward()
    assert torch.isfinite(value)


@pytest.mark.parametrize(
    ("kind", "neck", "norm", "lr"),
    [("retinanet", "p3-p7", "bn", 0.03), ("fasterrcnn", "single", "bn", 0.02)],
)
def test_a_detector_learns_a_few_images_by_heart(tmp_path, kind, neck, norm, lr):
    data, rows = subset(open_file("scenes:images=12,size=64,seed=3"), torch.arange(3).numpy()), torch.arange(3)
    model, settings = made(kind, norm, neck, "alexnet_bn")
    options = TrainOptions(epochs=150, batch=3, lr=lr, weight_decay=0.0, precision="float32")
    source, loss = canvas.canvases(data, 64), losses.detection_loss(losses.truth(data, 64, CPU), "imagenet", 0)
    loop.fit(model, loss, source, lambda epoch: loop.epoch_batches(rows, 3, 0, epoch), options, tmp_path, CPU, "t")
    found = predictions.detect(model, data, source, rows, 64, settings, CPU)
    assert metrics.coco_scores(data, found)["AP50"] > 0.8
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] > 0 and set(lines[-1]) & {"classification", "loss_classifier"}


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    """Faster R-CNN samples boxes by torch's generator: that too must not depend on where the training was stopped."""
    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
    data, rows = open_file("scenes:images=12,size=64"), torch.arange(12)
    options = TrainOptions(epochs=2, batch=4, lr=0.01, precision="float32")
    source, truth = canvas.canvases(data, 64), losses.truth(data, 64, CPU)

    def trained(folder, stop):
        model, _ = made("fasterrcnn", "bn", "single", "alexnet_bn", sampled=8)
        loss, calls = losses.detection_loss(truth, "imagenet", 0, (0.8, 1.2)), []

        def stopping(model, batch):
            calls.append(0)
            if len(calls) == stop:
                raise RuntimeError("killed")
            return loss(model, batch)

        loop.fit(model, stopping, source, lambda e: loop.epoch_batches(rows, 4, 0, e), options, folder, CPU, "t")
        return model.state_dict()

    whole = trained(tmp_path / "whole", 0)
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path / "cut", 5)
    again = trained(tmp_path / "cut", 0)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_would_divide_a_batch_is_refused():
    options = TrainOptions(batch=8, micro_batch=4)
    losses.check_batches(options, 4)
    with pytest.raises(UsageError, match=r"--micro-batch 4: .* all 8 images"):
        losses.check_batches(options, 8)
    config = EvalConfig(batch=8, micro_batch=4)
    for protocol in (detect, segment):
        with pytest.raises(UsageError, match="--micro-batch 4"):
            protocol.check([], (), config, Path())
    losses.check_batches(TrainOptions(), 8)
