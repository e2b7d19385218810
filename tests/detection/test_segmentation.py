from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from ktransfer.detection import canvas, masks, saved, segmentation, trunks
from ktransfer.detection.data import subset
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_file
from ktransfer.networks import Network
from ktransfer.training import loop
from ktransfer.training.batch import Batch
from ktransfer.training.options import TrainOptions

CPU = torch.device("cpu")


def made(norm="bn", head="fcn"):
    trunk = trunks.build(Network("alexnet_bn", 0.25), None, segmentation.HEADS[head], norm, 0, 32)
    return segmentation.build(trunk, 12, norm, 0, head)


def test_confusion_is_scikit_learns_without_ignored_pixels():
    generator = torch.Generator().manual_seed(0)
    true, predicted = (torch.randint(0, 4, (9, 11), generator=generator) for _ in range(2))
    true[0] = masks.IGNORE
    wanted = confusion_matrix(true[1:].flatten(), predicted[1:].flatten(), labels=range(5))
    np.testing.assert_array_equal(segmentation.confusion_matrix(true, predicted, 5), wanted)


def test_iou_by_hand():
    counts = np.array([[[3, 1, 0], [2, 4, 0], [0, 0, 0]]], float)
    found = segmentation.intersection_over_union(counts)
    np.testing.assert_allclose(found[0, :2], [3 / 6, 4 / 7])
    assert np.isnan(found[0, 2])


@pytest.mark.parametrize("head", list(segmentation.HEADS))
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_every_parameter_learns(norm, head):
    data, rows = open_file("scenes:images=12,size=64"), torch.arange(4)
    pixels, valid = canvas.canvases(data, 64).batch(rows)
    model = made(norm, head)
    loss = segmentation.segmentation_loss(masks.map_canvases(data, 64)[0], canvas.extents(data, 64), "imagenet", 0)
    value, sums = loss(model.train(), Batch(rows, pixels, valid, 0))
    value.backward()
    still = [name for name, part in model.named_parameters() if part.grad is None or not part.grad.any()]
    assert not still and 0 <= float(sums["pixels_right"]) <= 4
    # Background and twelve classes, nearly equal at first.
    assert abs(value.item() - np.log(13)) < 0.7


def test_ignored_pixels_teach_nothing():
    data, rows = open_file("scenes:images=12,size=64"), torch.arange(2)
    pixels, valid = canvas.canvases(data, 64).batch(rows)
    maps = torch.full((12, 64, 64), masks.IGNORE, dtype=torch.uint8)
    value, _ = segmentation.segmentation_loss(maps, canvas.extents(data, 64), "imagenet", 0)(
        made(), Batch(rows, pixels, valid, 0)
    )
    assert value.item() == 0


@pytest.mark.parametrize(("head", "least"), [("fcn", 0.4), ("fpn", 0.6)])
def test_a_few_images_are_learned_by_heart(tmp_path, head, least):
    data, rows = subset(open_file("scenes:images=12,size=64,seed=3"), np.arange(3)), torch.arange(3)
    model, source = made(head=head), canvas.canvases(data, 64)
    loss = segmentation.segmentation_loss(masks.map_canvases(data, 64)[0], canvas.extents(data, 64), "imagenet", 0)
    options = TrainOptions(epochs=120, batch=3, lr=0.05, weight_decay=0.0, precision="float32")
    loop.fit(model, loss, source, lambda epoch: loop.epoch_batches(rows, 3, 0, epoch), options, tmp_path, CPU, "t")
    found = segmentation.confusion(model, data, source, 64, CPU)
    assert found.rows == [0, 1, 2] and found.counts.sum() == 3 * 64 * 64
    true = [np.bincount(masks.classes_of_pixels(data, row).ravel(), minlength=13) for row in range(3)]
    np.testing.assert_array_equal(found.counts.sum(2), true)
    # Of thin shapes a map of stride 16 cannot say more; background alone has 0.22.
    assert np.nanmean(segmentation.intersection_over_union(found.counts.sum(0))) > least


def test_broken_images_and_broken_maps_are_left_out():
    data = open_file("scenes:images=12,size=64")
    broken = data.objects[1]._replace(outlines=({"size": [64, 64], "counts": [3]},) * len(data.objects[1].boxes))
    data = subset(data, np.arange(12))
    object.__setattr__(data, "objects", (data.objects[0], broken, *data.objects[2:]))
    source = canvas.canvases(data, 64)
    source._state[:1] = 2  # found broken when it was read
    found = segmentation.confusion(made(), data, source, 64, CPU, batch=1)
    assert found.rows == list(range(2, 12)) and list(found.broken) == [1] and len(found.counts) == 10


def test_the_head_on_a_pyramid_sums_its_maps_at_the_finest():
    model = made("gn", "fpn").eval()
    image = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.backbone(image)
        assert list(maps)[-1] == "pool"  # what the neck adds for detectors
        total = 0
        for name in ("p2", "p3", "p4"):
            total = total + torch.nn.Upsample(maps["p2"].shape[-2:], mode="bilinear")(maps[name])
        wanted = torch.nn.Upsample((96, 64), mode="bilinear")(torch.nn.Sequential(*model.classifier)(total))
        torch.testing.assert_close(model(image), wanted)


def test_deeplab_looks_as_far_in_pixels_on_every_trunk():
    rates = [layer.dilation[0] for layer in made("gn", "deeplab").modules() if getattr(layer, "dilation", 1) != 1]
    assert [rate for rate in rates if rate != (1, 1) and rate != 1] == [6, 12, 18]  # AlexNet's last map has stride 16


def test_segmenters_are_files(tmp_path):
    settings = Settings("fpn", "gn")
    described = saved.Described(Network("alexnet_bn", 0.25), "p2-p6", settings, ("a", "b"), 64, 16)
    model = saved.make(described, 3).eval()
    saved.save(tmp_path / "m.safetensors", model, described)
    again, read = saved.load(tmp_path / "m.safetensors")
    assert read == described
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixels), again.eval()(pixels))


class Columns(torch.nn.Module):
    """In place of a segmenter: class 1 where the image is bright, without any neighbourhood."""

    def __init__(self):
        super().__init__()
        self.backbone = SimpleNamespace(how="imagenet")
        self.sides = []

    def forward(self, pixels):
        self.sides.append(tuple(pixels.shape[-2:]))
        bright = pixels.mean(1, keepdim=True)
        return torch.cat([-4 * bright, 4 * bright], dim=1)


def test_predictions_of_scales_and_mirror_images_lie_where_the_image_is():
    pixels, extents = torch.zeros(2, 3, 64, 64).byte(), torch.tensor([[64.0, 64], [40, 64]])
    pixels[0, :, :, 40:], pixels[1, :, 20:50, :20] = 255, 255
    wanted = torch.zeros(2, 64, 64).bool()
    wanted[0, :, 40:], wanted[1, 20:50, :20] = True, True
    model = Columns()
    found = segmentation.probabilities(model, pixels, extents, (0.5, 0.75, 1, 1.25, 1.5, 1.75))
    assert found.shape == (2, 2, 64, 64)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 64, 64))
    predicted = found[:, 1] > 0.5
    assert torch.equal(predicted[0], wanted[0])
    assert (predicted[1] != wanted[1])[:, :40].sum() <= 4  # corners
    # Padded to sides that are whole strides of 32 from the canvas's.
    assert model.sides == [(32, 32), (64, 64), (64, 64), (96, 96), (96, 96), (128, 128)] * 2
    once = segmentation.probabilities(model, pixels, extents, (1,))
    torch.testing.assert_close(once, Columns()(canvas.normalise(pixels, extents, "imagenet")).softmax(1))


def test_images_are_mirrored_in_their_places():
    canvases = torch.arange(2 * 4 * 4).view(2, 1, 4, 4)
    found = canvas.mirror(canvases, torch.tensor([[4.0, 4], [3, 4]]))
    assert torch.equal(found[0], canvases[0].flip(2))
    assert found[1, 0, 0].tolist() == [18, 17, 16, 19]


def test_unlikely_pixels_are_ignored():
    probability = torch.tensor([0.5, 0.3, 0.2])[:, None, None].repeat(1, 4, 4)
    probability[:, :, 1] = torch.tensor([0.1, 0.2, 0.7])[:, None]
    probability[:, :, 2] = torch.tensor([0.3, 0.36, 0.34])[:, None]
    found = segmentation.hard_map(probability, (3, 2), (3, 2), 0.5)
    assert found.dtype == torch.uint8 and found.tolist() == [[0, 2, 255]] * 2
    assert segmentation.hard_map(probability, (3, 2), (6, 8), 0.9).tolist() == [[255] * 6] * 8
