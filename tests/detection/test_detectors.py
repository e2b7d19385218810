import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.retinanet import RetinaNetClassificationHead

from ktransfer.detection import canvas, detectors, losses, trunks
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_file
from ktransfer.networks import Network
from ktransfer.training.batch import Batch

CPU = torch.device("cpu")
SMALL = {"width": 64, "proposals": 50, "sampled": 32}


def made(kind="retinanet", norm="gn", neck="p3-p7", arch="resnet18", size=64, seed=0, classes=12, **more):
    trunk = trunks.build(Network(arch, 0.25 if arch.startswith("alexnet") else 1.0), None, neck, norm, seed, 32)
    settings = Settings(kind=kind, norm=norm, **(SMALL | {"anchor": 2.0} | more))
    return detectors.build(trunk, classes, size, settings, seed), settings


def batch_of(data, size, rows):
    pixels, valid = canvas.canvases(data, size).batch(rows)
    return Batch(rows, pixels, valid, 0)


@pytest.mark.parametrize(
    ("kind", "norm", "neck", "arch"),
    [
        ("retinanet", "gn", "p3-p7", "resnet18"),
        ("retinanet", "bn", "p3-p7", "alexnet_bn"),
        ("fasterrcnn", "bn", "single", "alexnet"),
        ("fasterrcnn", "gn", "p2-p6", "resnet18"),
    ],
)
def test_every_parameter_learns_from_random_weights(kind, norm, neck, arch):
    """The trap of docs/papers.md: layers that stay at random weights because somebody froze them."""
    data = open_file("scenes:images=24,size=64")
    model, _ = made(kind, norm, neck, arch)
    loss = losses.detection_loss(losses.truth(data, 64, CPU), "imagenet", 0)
    torch.manual_seed(0)
    value, sums = loss(model.train(), batch_of(data, 64, torch.arange(8)))
    value.backward()
    still = [name for name, part in model.named_parameters() if part.grad is None or not part.grad.abs().sum() > 0]
    assert not still
    assert all(part.requires_grad for part in model.parameters()) and int(sums["count"]) == 8
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    torch.optim.SGD(model.parameters(), 0.5).step()
    assert not [name for name, part in model.named_parameters() if torch.equal(part, before[name])]


@pytest.mark.parametrize(("kind", "neck", "shift"), [("retinanet", "p3-p7", 0), ("fasterrcnn", "p2-p6", 1)])
def test_labels_count_alike_when_it_is_compiled(kind, neck, shift):
    model, _ = made(kind, neck=neck)
    assert detectors.shift(model) == detectors.shift(torch.compile(model, backend="eager")) == shift


def test_focal_and_huber_losses_are_those_of_the_reference():
    """Against loops in plain numbers."""
    model, settings = made(classes=3, norm="gn")
    head = model.head
    torch.manual_seed(0)
    anchors = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30], [30, 30, 40, 40]])] * 2
    logits, offsets = torch.randn(2, 3, 3), torch.randn(2, 3, 4) * 0.2
    targets = [
        {"boxes": torch.tensor([[1.0, 1, 11, 9]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    matched = [torch.tensor([0, -1, -2]), torch.full((3,), -1)]
    found = head.compute_loss(targets, {"cls_logits": logits, "bbox_regression": offsets}, anchors, matched)
    focal = 0.0
    for image in range(2):
        for anchor in range(3):
            if matched[image][anchor] == -2:  # between the thresholds
                continue
            for label in range(3):
                p = float(torch.sigmoid(logits[image, anchor, label]))
                true = image == 0 and anchor == 0 and label == 2
                focal -= (
                    0.25 * (1 - p) ** 1.5 * torch.log(torch.tensor(p))
                    if true
                    else 0.75 * p**1.5 * torch.log(torch.tensor(1 - p))
                )
    torch.testing.assert_close(found["classification"], torch.as_tensor(focal) / 2, atol=1e-5, rtol=1e-4)
    # centre (6, 5) of 10 x 8 seen from an anchor at (5, 5) of 10 x 10
    aim = torch.tensor([0.1, 0.0, 0.0, torch.log(torch.tensor(0.8))])
    huber = sum(0.5 * d * d if d < 0.1 else 0.1 * (d - 0.05) for d in (offsets[0, 0] - aim).abs().tolist())
    torch.testing.assert_close(found["boxes"], torch.tensor(50 * huber / (4 * 2)), atol=1e-5, rtol=1e-4)
    assert int(found["positives"]) == 1 and settings.focal_gamma == 1.5


def test_anchors_are_nine_a_place_and_match_at_one_half():
    model, _ = made(size=64)
    generator = model.anchor_generator
    assert generator.num_anchors_per_location() == [9] * 5
    assert generator.sizes[0] == (16.0, 16 * 2 ** (1 / 3), 16 * 2 ** (2 / 3))
    matcher = model.proposal_matcher
    assert matcher.high_threshold == matcher.low_threshold == 0.5


@pytest.mark.parametrize(
    ("kind", "neck", "first"),
    [
        ("retinanet", "p3-p7", [16 * 2 ** (place / 3) for place in range(3)]),  # twice the stride of 8, by thirds
        ("fasterrcnn", "p2-p6", [8]),
        ("fasterrcnn", "single", [8, 16, 32, 64]),  # an eighth of the canvas to the whole of it
    ],
)
def test_anchors_are_upright_lying_and_square_and_of_one_area(kind, neck, first):
    model, _ = made(kind, "bn" if neck == "single" else "gn", neck, "alexnet_bn" if neck == "single" else "resnet18")
    generator = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    sides = [tuple(sides) for sides in generator.sizes]
    assert sides[0] == pytest.approx(first)
    assert all(later == pytest.approx([2 * side for side in one]) for one, later in itertools.pairwise(sides))
    assert set(generator.aspect_ratios) == {(0.5, 1.0, 2.0)}


def overlaps(boxes, anchors):
    """(m, a) IoU, pair by pair in float64."""
    found = np.zeros((len(boxes), len(anchors)))
    for row, box in enumerate(boxes):
        low, high = np.maximum(anchors[:, :2], box[:2]), np.minimum(anchors[:, 2:], box[2:])
        both = (high - low).clip(0).prod(axis=1)
        found[row] = both / ((box[2:] - box[:2]).prod() + (anchors[:, 2:] - anchors[:, :2]).prod(axis=1) - both)
    return found


def test_every_box_has_a_positive_anchor_however_small_it_is():
    """Those that overlap it by one half, or else the best that there is."""
    model, _ = made(size=64)
    boxes = torch.tensor([[3.0, 5, 5, 8], [30, 10, 32.5, 50], [10, 20, 42, 52], [50, 40, 60, 51]])
    heads, anchors = {}, []
    model.head.compute_loss = lambda targets, outputs, found, matched: heads.update(matched=matched[0]) or {}
    model.anchor_generator.register_forward_hook(lambda module, given, found: anchors.append(found[0]))
    model.train()(torch.zeros(1, 3, 64, 64), [{"boxes": boxes, "labels": torch.zeros(4, dtype=torch.int64)}])
    found = overlaps(boxes.numpy().astype(np.float64), anchors[0].numpy().astype(np.float64))
    best = found >= found.max(axis=1, keepdims=True) - 1e-6
    assert found.max(axis=1).min() < 0.4 and found.max() > 0.6  # of both kinds
    positive = (found.max(axis=0) >= 0.5) | best.any(axis=0)
    assert np.array_equal(heads["matched"].numpy() >= 0, positive)
    assert set(heads["matched"][positive].tolist()) == {0, 1, 2, 3}


def test_heads_are_a_function_of_the_seed():
    first, again, other = (made(seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["head.classification_head.conv.0.0.weight"], other["head.classification_head.conv.0.0.weight"]
    )
    assert not torch.equal(first["backbone.body.conv1.weight"], other["backbone.body.conv1.weight"])


def test_settings_reach_the_parts_that_they_are_for():
    named = {"threshold": 0.11, "overlap": 0.44, "most": 17}
    retina, _ = made(**named, candidates=77, matched=0.6)
    assert (retina.score_thresh, retina.nms_thresh, retina.detections_per_img) == (0.11, 0.44, 17)
    assert retina.topk_candidates == 77 and retina.proposal_matcher.high_threshold == 0.6
    faster, _ = made("fasterrcnn", neck="p2-p6", **named)
    heads, proposing = faster.roi_heads, faster.rpn
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.11, 0.44, 17)
    assert heads.fg_bg_sampler.batch_size_per_image == 32
    assert proposing._pre_nms_top_n == {"training": 100, "testing": 50}  # in training of twice as many
    assert proposing._post_nms_top_n == {"training": 50, "testing": 50}
    for model in (retina, faster):
        detectors.predicting(model, 0.0, 1.0, 9)
        place = model if model is retina else model.roi_heads
        assert (place.score_thresh, place.nms_thresh, place.detections_per_img) == (0.0, 1.0, 9)


def test_heads_have_the_shapes_of_torchvisions_own():
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).roi_heads
    trunk = trunks.build(Network("resnet18"), None, "p2-p6", "bn", 0, 256)
    mine = detectors.build(trunk, 90, 64, Settings(kind="maskrcnn", norm="bn"), 0).roi_heads
    shapes = [{name: part.shape for name, part in heads.state_dict().items()} for heads in (mine, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("kind", "neck"), [("retinanet", "p3-p7"), ("fasterrcnn", "p2-p6")])
def test_predictions_lie_all_over_the_canvas_and_not_beyond(kind, neck):
    model, _ = made(kind, neck=neck, threshold=0.0, overlap=1.0)
    boxes = model.eval()(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[0]["boxes"]
    assert boxes.min() >= 0 and boxes.max() <= 64
    assert (boxes.amax(0)[2:] > 40).all() and (boxes.amin(0)[:2] < 24).all()


def test_mask_rcnn_is_built_and_predictions_with_masks():
    model, _ = made("maskrcnn", "gn", "p2-p6")
    target = {
        "boxes": torch.tensor([[4.0, 4, 40, 40]]),
        "labels": torch.tensor([3]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    torch.manual_seed(0)
    found = model.train()(torch.randn(1, 3, 64, 64), [target])
    assert {"loss_mask", "loss_classifier", "loss_objectness"} <= set(found)
    detectors.predicting(model, 0.0, 0.5, 5)
    prediction = model.eval()(torch.randn(1, 3, 64, 64))[0]
    assert prediction["masks"].shape == (len(prediction["boxes"]), 1, 28, 28)


def test_the_background_is_class_zero_of_faster_rcnn_alone():
    assert detectors.shift(made()[0]) == 0 and detectors.shift(made("fasterrcnn", neck="p2-p6")[0]) == 1
    head = made(classes=12)[0].head.classification_head
    assert isinstance(head, RetinaNetClassificationHead) and head.cls_logits.out_channels == 9 * 12
    assert isinstance(made("fasterrcnn", neck="p2-p6")[0].roi_heads.box_predictor.cls_score, nn.Linear)
