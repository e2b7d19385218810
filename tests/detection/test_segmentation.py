import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from ktransfer.detection import canvas, masks, segmentation, trunks
from ktransfer.detection.data import open_file, subset
from ktransfer.networks import Network
from ktransfer.training import loop
from ktransfer.training.options import TrainOptions

CPU = torch.device("cpu")


def made(norm="bn"):
    trunk = trunks.build(Network("alexnet_bn", 0.25), None, "single", norm, 0)
    return segmentation.build(trunk, 12, norm, 0)


def test_confusion_is_scikit_learns_without_ignored_pixels():
    generator = torch.Generator().manual_seed(0)
    true, answered = (torch.randint(0, 4, (9, 11), generator=generator) for _ in range(2))
    true[0] = masks.IGNORE
    wanted = confusion_matrix(true[1:].flatten(), answered[1:].flatten(), labels=range(5))
    np.testing.assert_array_equal(segmentation.confusion_matrix(true, answered, 5), wanted)


def test_iou_by_hand():
    counts = np.array([[[3, 1, 0], [2, 4, 0], [0, 0, 0]]], float)
    found = segmentation.intersection_over_union(counts)
    np.testing.assert_allclose(found[0, :2], [3 / 6, 4 / 7])
    assert np.isnan(found[0, 2])


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_every_parameter_learns(norm):
    data, rows = open_file("scenes:images=12,size=64"), torch.arange(4)
    pixels, valid = canvas.canvases(data, 64).batch(rows)
    model = made(norm)
    loss = segmentation.segmentation_loss(masks.map_canvases(data, 64)[0], canvas.extents(data, 64), "imagenet", 0)
    value, sums = loss(model.train(), loop.Batch(rows, pixels, valid, 0))
    value.backward()
    still = [name for name, part in model.named_parameters() if part.grad is None]
    assert not still and 0 <= float(sums["pixels_right"]) <= 4
    # Background and twelve classes, nearly equal at first.
    assert abs(value.item() - np.log(13)) < 0.7


def test_ignored_pixels_teach_nothing():
    data, rows = open_file("scenes:images=12,size=64"), torch.arange(2)
    pixels, valid = canvas.canvases(data, 64).batch(rows)
    maps = torch.full((12, 64, 64), masks.IGNORE, dtype=torch.uint8)
    value, _ = segmentation.segmentation_loss(maps, canvas.extents(data, 64), "imagenet", 0)(
        made(), loop.Batch(rows, pixels, valid, 0)
    )
    assert value.item() == 0


def test_an_fcn_learns_a_few_pictures_by_heart(tmp_path):
    data, rows = subset(open_file("scenes:images=12,size=64,seed=3"), np.arange(3)), torch.arange(3)
    model, source = made(), canvas.canvases(data, 64)
    loss = segmentation.segmentation_loss(masks.map_canvases(data, 64)[0], canvas.extents(data, 64), "imagenet", 0)
    options = TrainOptions(epochs=120, batch=3, lr=0.05, weight_decay=0.0, precision="float32")
    loop.fit(model, loss, source, lambda epoch: loop.epoch_batches(rows, 3, 0, epoch), options, tmp_path, CPU, "t")
    found = segmentation.confusion(model, data, source, 64, CPU)
    assert found.rows == [0, 1, 2] and found.counts.sum() == 3 * 64 * 64
    true = [np.bincount(masks.classes_of_pixels(data, row).ravel(), minlength=13) for row in range(3)]
    np.testing.assert_array_equal(found.counts.sum(2), true)
    # Of thin shapes a map of stride 16 cannot say more; background alone has 0.22.
    assert np.nanmean(segmentation.intersection_over_union(found.counts.sum(0))) > 0.4


def test_broken_pictures_and_broken_maps_are_left_out():
    data = open_file("scenes:images=12,size=64")
    broken = data.objects[1]._replace(outlines=({"size": [64, 64], "counts": [3]},) * len(data.objects[1].boxes))
    data = subset(data, np.arange(12))
    object.__setattr__(data, "objects", (data.objects[0], broken, *data.objects[2:]))
    source = canvas.canvases(data, 64)
    source._state[:1] = 2  # found broken when it was read
    found = segmentation.confusion(made(), data, source, 64, CPU, batch=1)
    assert found.rows == list(range(2, 12)) and list(found.broken) == [1] and len(found.counts) == 10
