"""Rotations against numpy, image by image."""

import math

import numpy as np
import pytest
import torch

from ktransfer import rng
from ktransfer.errors import UsageError
from ktransfer.networks import IMAGENET
from ktransfer.pretext.rotation import RotationConfig, make_rotations

MANY = 4000


def images(count, size, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def make(count=5, size=32, tile=0, seed=0, epoch=0, rows=None, pixels=None):
    rows = torch.arange(count) if rows is None else rows
    return make_rotations(images(count, size) if pixels is None else pixels, rows, RotationConfig(tile), seed, epoch)


@pytest.mark.parametrize(("size", "tile"), [(32, 0), (9, 1), (17, 17), (40, 31)])
def test_each_image_is_cut_mirrored_and_turned_in_all_four_ways(size, tile):
    pixels = images(6, size)
    found = make(6, size, tile, pixels=pixels)
    side = tile or 7 * size // 8
    assert found.tiles.shape == (24, 1, 3, side, side) and found.tiles.dtype == torch.float32
    assert found.label.tolist() == [0, 1, 2, 3] * 6
    mean, deviation = (255 * np.array(values) for values in IMAGENET)
    for image in range(6):
        y, x = found.corner[image].tolist()
        square = pixels[image, :, y : y + side, x : x + side].permute(1, 2, 0).numpy()
        if found.mirrored[image]:
            square = np.fliplr(square)
        for turns in range(4):
            # As released: one turn to the left is a transposed image upside down.
            expected = (square - mean) / deviation
            seen = found.tiles[4 * image + turns, 0].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(seen, expected, atol=1e-5)
            square = np.flipud(np.transpose(square, (1, 0, 2)))


def test_corners_and_mirroring_are_uniform_and_independent():
    found = make(MANY, 8, 5)
    for axis in (0, 1):
        share = torch.bincount(found.corner[:, axis], minlength=4) / MANY
        assert len(share) == 4 and (share - 1 / 4).abs().max() < 5 * math.sqrt(3 / 16 / MANY)
    drawn = torch.cat([found.corner, found.mirrored[:, None]], dim=1).double()
    assert abs(float(drawn[:, 2].mean()) - 0.5) < 2.5 / math.sqrt(MANY)
    assert (torch.corrcoef(drawn.T) - torch.eye(3)).abs().max() < 5 / math.sqrt(MANY)


def test_an_image_does_not_depend_on_its_batch():
    rows, pixels = torch.tensor([7, 2, 9, 4]), images(4, 24)
    whole = make(size=24, rows=rows, pixels=pixels)
    alone = make(size=24, rows=rows[2:3], pixels=pixels[2:3])
    assert torch.equal(whole.tiles[8:12], alone.tiles)
    assert torch.equal(whole.corner[2:3], alone.corner) and torch.equal(whole.mirrored[2:3], alone.mirrored)


def test_seed_epoch_and_row_decide(monkeypatch):
    base = make(64)
    assert all(torch.equal(one, two) for one, two in zip(base, make(64), strict=True))
    for other in (make(64, seed=1), make(64, epoch=1), make(64, rows=torch.arange(64) + 64)):
        assert not torch.equal(base.corner, other.corner) and not torch.equal(base.mirrored, other.mirrored)
    asked, words = [], rng.words
    monkeypatch.setattr(rng, "words", lambda *given: asked.append(given) or words(*given))
    make(3, seed=5, epoch=6)
    purposes = [purpose for _, purpose, *_ in asked]
    assert len(set(purposes)) == len(purposes) == 2 and all(p.startswith("pretext/rotation/") for p in purposes)
    assert all((seed, epoch) == (5, 6) for seed, _, epoch, *_ in asked)


def test_the_papers_geometry_and_what_cannot_be():
    assert RotationConfig().side(256) == 224
    assert RotationConfig(50).side(50) == 50
    with pytest.raises(UsageError, match="tile 51 is larger than the images of 50 pixels"):
        RotationConfig(51).side(50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_makes_the_same_rotations():
    pixels, rows = images(8, 64), torch.arange(8)
    here = make_rotations(pixels, rows, RotationConfig(), 0, 0)
    there = make_rotations(pixels.cuda(), rows.cuda(), RotationConfig(), 0, 0)
    assert all(torch.equal(one, two.cpu()) for one, two in zip(here[1:], there[1:], strict=True))
    torch.testing.assert_close(here.tiles, there.tiles.cpu())
