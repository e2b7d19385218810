"""HOG against one written out pixel by pixel in numpy, and thumbnails against plain arithmetic."""

import math

import numpy as np
import pytest
import torch

from ktransfer import networks
from ktransfer.networks import Network
from ktransfer.networks.descriptors import Hog


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float64)


def hog_by_hand(image):
    """(h, w, 3) float64 -> (h / 8 - 1, w / 8 - 1, 2, 2, 9): Dalal and Triggs, one pixel after the other."""
    high, wide, _ = image.shape
    cells = np.zeros((high // 8, wide // 8, 9))
    for y in range(high):
        for x in range(wide):
            best = (-1.0, 0.0, 0.0)
            for colour in range(3):
                plane = image[..., colour]
                dy = (plane[min(y + 1, high - 1), x] - plane[max(y - 1, 0), x]) / 2
                dx = (plane[y, min(x + 1, wide - 1)] - plane[y, max(x - 1, 0)]) / 2
                if dy * dy + dx * dx > best[0]:
                    best = (dy * dy + dx * dx, dy, dx)
            strength = math.sqrt(best[0])
            degrees = math.degrees(math.atan2(best[1], best[2])) % 180
            for bin_ in range(9):  # a triangle of half-width 20 degrees around the middle of each bin, on the circle
                away = abs(degrees - (bin_ * 20 + 10))
                away = min(away, 180 - away)
                cells[y // 8, x // 8, bin_] += strength * max(0.0, 1 - away / 20)
    blocks = np.zeros((high // 8 - 1, wide // 8 - 1, 2, 2, 9))
    for row in range(high // 8 - 1):
        for column in range(wide // 8 - 1):
            block = cells[row : row + 2, column : column + 2]
            block = np.minimum(block / np.sqrt((block**2).sum() + 1e-12), 0.2)
            blocks[row, column] = block / np.sqrt((block**2).sum() + 1e-12)
    return blocks


def test_hog_as_by_hand():
    images = noise(2, 24, 40, 3)
    found = Hog()(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    assert found.shape == (2, 36, 2, 4) and found.dtype == torch.float32
    for image, ours in zip(images, found.permute(0, 2, 3, 1).numpy(), strict=True):
        theirs = hog_by_hand(image)
        assert theirs.std() > 0.02
        np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=2e-5)


def test_stripes_vote_for_their_own_orientation():
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    upright = Hog()(ramp)[0, :, 0, 0].view(4, 9)  # brighter to the right: 0 degrees, between the first bin and the last
    assert (upright[:, [0, 8]] > 0.3).all() and upright[:, 1:8].abs().max() < 1e-6
    lying = Hog()(ramp.transpose(2, 3))[0, :, 0, 0].view(4, 9)  # 90 degrees, the middle bin
    assert lying[:, 4].min() > 0.4 and lying[:, [0, 1, 2, 6, 7, 8]].abs().max() < 1e-6


def test_a_constant_image_has_no_gradient_and_contrast_does_not_count():
    assert not Hog()(torch.full((1, 3, 16, 16), 0.3)).any()
    image = torch.from_numpy(noise(1, 3, 16, 16)).float()
    torch.testing.assert_close(Hog()(image), Hog()(1 - image / 2), atol=1e-5, rtol=0)


def test_a_batch_changes_nothing_and_autocast_neither():
    images = torch.from_numpy(noise(3, 3, 32, 32)).float()
    alone = torch.cat([Hog()(image[None]) for image in images])
    assert torch.equal(alone, Hog()(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alone, Hog()(images))


@pytest.mark.parametrize(("layer", "channels"), [("rgb", 3), ("grey", 1)])
def test_thumbnails(layer, channels):
    network = Network("pixels", size=16, normalise="0,0,0/1,1,1")
    model = networks.build(network, 0, "t")
    pixels = torch.from_numpy((noise(2, 3, 16, 16) * 255).astype(np.uint8))
    paths = networks.layers(network, model)
    found = networks.feature_maps(model, {layer: paths[layer]}, networks.normalise(pixels, network.normalise))[layer]
    wanted = pixels.numpy() / 255
    if channels == 1:
        wanted = (wanted * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
