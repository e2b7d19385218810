import numpy as np
import torch
from torchvision.ops import box_iou

from ktransfer import rng
from ktransfer.detection import canvas, detectors, masks, predictions, trunks
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_file
from ktransfer.networks import Network

CPU = torch.device("cpu")
SMALL = {"width": 64, "proposals": 50, "sampled": 32}


def made(kind="retinanet", norm="gn", neck="p3-p7", arch="resnet18", size=64, seed=0, classes=12, **more):
    trunk = trunks.build(Network(arch, 0.25 if arch.startswith("alexnet") else 1.0), None, neck, norm, seed, 32)
    settings = Settings(kind=kind, norm=norm, **(SMALL | {"anchor": 2.0} | more))
    return detectors.build(trunk, classes, size, settings, seed), settings


def soft_nms_by_loops(boxes, scores, sigma, threshold):
    boxes, left = boxes.tolist(), dict(enumerate(scores.double().tolist()))
    taken = []
    while left and max(left.values()) >= threshold:
        best = max(left, key=lambda place: left[place])
        taken.append((best, left.pop(best)))
        for other in left:
            overlap = float(box_iou(torch.tensor([boxes[best]]), torch.tensor([boxes[other]])))
            left[other] *= torch.exp(torch.tensor(-overlap * overlap / sigma)).item()
    return taken


def test_soft_nms_is_that_of_a_plain_loop():
    draws = rng.uniform(0, "test", 0, torch.arange(40), 5)
    corner, side = draws[:, :2] * 30, draws[:, 2:4] * 20 + 5
    boxes, scores = torch.cat([corner, corner + side], 1), draws[:, 4]
    order, values = predictions.soft_nms(boxes, scores, 0.3, 0.05)
    wanted = soft_nms_by_loops(boxes, scores, 0.3, 0.05)
    assert order.tolist() == [place for place, _ in wanted] and 5 < len(wanted) < 40
    torch.testing.assert_close(values, torch.tensor([value for _, value in wanted]), atol=1e-5, rtol=1e-4)
    order, values = predictions.soft_nms(boxes[:0], scores[:0], 0.3, 0.05)
    assert len(order) == len(values) == 0


def test_predictions_are_in_pixels_of_the_image_and_above_the_threshold():
    data = open_file("scenes:images=24,size=48")
    source = canvas.canvases(data, 96)
    for soft in (0.0, 0.3):
        model, settings = made(size=96, soft=soft, threshold=0.012, most=20)
        found = predictions.detect(model, data, source, torch.tensor([3, 5]), 96, settings, CPU)
        assert list(found) == [3, 5]
        for boxes, scores, labels in found.values():
            assert 0 < len(scores) <= 20 and (scores >= 0.012).all() and (scores.diff() <= 0).all()
            assert (boxes >= 0).all() and (boxes <= 48).all() and labels.min() >= 0 and labels.max() < 12
    detectors.predicting(model, 2.0, 0.5, 5)
    nothing = predictions.detect(model, data, source, torch.tensor([3]), 96, Settings(threshold=2.0), CPU)
    assert len(nothing[3].boxes) == 0


def test_broken_images_have_no_prediction():
    data = open_file("scenes:images=12,size=64")
    source, (model, settings) = canvas.canvases(data, 64), made(soft=0.3, threshold=0.9)
    source._state[3] = 2  # found broken when it was read
    found = predictions.detect(model, data, source, torch.tensor([3, 5]), 64, settings, CPU, batch=1)
    assert list(found) == [5] and len(found[5].scores) == 0


def test_masks_lie_in_their_boxes():
    """Of a 28 x 28 mask the left half, in a box of 20 x 10 pixels; and one that reaches over the edge."""
    half = torch.zeros(1, 28, 28)
    half[:, :, :14] = 1.0
    boxes = torch.tensor([[10.0, 5, 30, 15], [50, 30, 70, 44]])
    found = predictions._pasted(torch.stack([half, torch.ones(1, 28, 28)]), boxes, [60, 40])
    first, second = (masks.decoded(one) for one in found)
    wanted = np.zeros((40, 60), bool)
    wanted[5:15, 10:20] = True
    assert first.shape == (40, 60) and (first != wanted).sum() <= 2 * (10 + 10) + 4  # but for its edge
    wanted[:] = False
    wanted[30:, 50:] = True
    assert (second != wanted).sum() <= 2 * (10 + 10)
    assert predictions._pasted(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), [60, 40]) == []
