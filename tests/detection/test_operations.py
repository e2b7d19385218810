"""Colour operations against Pillow and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as v2

from ktransfer.detection import operations


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(5, 3, 6, 6, generator=generator) * torch.tensor([255.0, 80, 255, 30, 0]).view(5, 1, 1, 1) + 20
    return torch.nn.functional.interpolate(smooth, (40, 40), mode="bicubic").clamp(0, 255).to(torch.uint8)


def pillow(image, function):
    return torch.from_numpy(np.array(function(Image.fromarray(image.permute(1, 2, 0).numpy())))).permute(2, 0, 1)


def test_equalise_is_pillows(pixels):
    found = operations.equalise(pixels, torch.full((len(pixels), 2), 40.0))
    for before, after in zip(pixels, found, strict=True):
        assert torch.equal(after, pillow(before, ImageOps.equalize))
        assert torch.equal(after, v2.equalize(before))


def test_equalise_counts_the_image_alone(pixels):
    found = operations.equalise(pixels, torch.tensor([[20.0, 30.0]] * len(pixels)))
    for before, after in zip(pixels, found, strict=True):
        assert torch.equal(after[:, :30, :20], pillow(before[:, :30, :20], ImageOps.equalize))


def test_solarise(pixels):
    assert torch.equal(operations.solarise(pixels, 5), torch.stack([v2.solarize(one, 128) for one in pixels]))
    assert torch.equal(operations.solarise(pixels, 10), pixels)
    assert torch.equal(operations.solarise(pixels, 0), 255 - pixels)


def test_solarise_add(pixels):
    wide = pixels.numpy().astype(int)
    for level, added in ((5, 55), (10, 110)):
        expected = np.where(wide < 128, np.minimum(wide + added, 255), wide)
        assert np.array_equal(operations.solarise_add(pixels, level).numpy(), expected)


def test_what_is_not_kept_is_filled(pixels):
    which = torch.rand(5, 1, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = np.where(which.numpy(), pixels.numpy(), 128)
    assert np.array_equal(operations.kept(pixels, which.to(torch.uint8)).numpy(), expected)
    assert np.array_equal(operations.kept(pixels.float(), which.float()).numpy(), expected)


@pytest.mark.parametrize("level", [0, 5, 6, 10])
@pytest.mark.parametrize(("ours", "theirs"), [("colour", ImageEnhance.Color), ("sharpness", ImageEnhance.Sharpness)])
def test_blends_are_pillows_but_for_rounding(pixels, level, ours, theirs):
    found = getattr(operations, ours)(pixels, level)
    for before, after in zip(pixels, found, strict=True):
        expected = pillow(before, lambda image: theirs(image).enhance(1.8 * level / 10 + 0.1))
        assert int((after.int() - expected.int()).abs().max()) <= 2


def test_cutout_greys_a_square_within_the_canvas(pixels):
    extent = torch.tensor([[40.0, 40.0]] * 5)
    draws = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.99, 0.99], [0.75, 0.25], [0.0, 0.5]])
    found = operations.cutout(pixels, extent, 8, draws)  # half: 80 of 640 pixels are 5 of 40
    y, x = (found[0] != pixels[0]).any(0).nonzero().unbind(1)
    assert (int(y.min()), int(y.max()), int(x.min()), int(x.max())) == (15, 24, 15, 24)
    for number in range(5):
        changed = (found[number] != pixels[number]).any(0)
        assert (found[number][:, changed] == operations.FILL).all()
        assert int(changed.sum()) <= 100
    assert torch.equal(found[1][:, 5:], pixels[1][:, 5:])


def test_only_the_content_of_chosen_boxes_moves(pixels):
    boxes = torch.tensor([[[4.0, 6.0, 14.0, 26.0], [20.0, 0.0, 40.0, 40.0]]] * 5)
    chosen = torch.tensor([[True, False]] * 5)
    signs = torch.tensor([[1, 1]] * 4 + [[-1, 1]])
    found = operations.translate_only_boxes(pixels, boxes, chosen, 10, signs)  # 120 of 640 pixels are 8 of 40
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[6:26, 4:14] = False
    assert torch.equal(found[:, :, outside], pixels[:, :, outside])
    assert torch.equal(found[:4, :, 14:26, 4:14], pixels[:4, :, 6:18, 4:14])
    assert (found[:4, :, 6:14, 4:14] == operations.FILL).all()
    assert torch.equal(found[4, :, 6:18, 4:14], pixels[4, :, 14:26, 4:14])
