"""Augment-S1 .. S4: boxes follow their images, draws depend on nothing but (seed, epoch, row)."""

from functools import partial

import numpy as np
import pytest
import torch

from ktransfer.detection import canvas, geometry
from ktransfer.detection.strengths import POLICY, RANDOM, STRENGTHS, Boxed, augment

SIDE, HEIGHT, WIDTH = 96, 72, 96


def batch(count=24):
    """White rectangles on black images, one box each, a second place for a box empty."""
    pixels = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8)
    boxes = torch.zeros(count, 2, 4)
    for number in range(count):
        x, y = 10 + number % 30, 12 + number % 20
        pixels[number, :, y : y + 24, x : x + 40] = 255
        boxes[number, 0] = torch.tensor([x, y, x + 40, y + 24])
    kept = torch.tensor([[True, False]] * count)
    return Boxed(pixels, torch.tensor([[WIDTH, HEIGHT]] * count, dtype=torch.float32), boxes, kept)


def test_none_leaves_all_as_it_is():
    given = batch()
    found, maps = augment(given, "none", torch.arange(24), 0, 0)
    assert all(torch.equal(now, before) for now, before in zip(found, given, strict=True))
    assert torch.equal(maps, geometry.identity(24))


def test_boxes_of_s1_lie_where_the_rectangles_do():
    found, _ = augment(batch(200), "S1", torch.arange(200), 1, 0)
    for number in range(200):
        white = found.pixels[number, 0] > 200
        if not found.kept[number, 0]:
            continue
        y, x = white.nonzero().unbind(1)
        seen = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert (seen - found.boxes[number, 0]).abs().max() <= 1.5, number
    assert not found.kept[:, 1].any()
    assert (found.boxes[:, 1] == 0).all()
    assert found.kept[:, 0].float().mean() > 0.95


@pytest.mark.parametrize("strength", ["S2", "S3", "S4"])
def test_moved_corners_lie_in_their_boxes(strength):
    given = batch(300)
    found, maps = augment(given, strength, torch.arange(300), 2, 5)
    x1, y1, x2, y2 = given.boxes[:, 0].unbind(1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1).view(-1, 4, 2)
    moved = geometry.move_points(corners, maps)
    inside = (moved >= 0).all(2) & (moved <= SIDE).all(2)
    low, high = found.boxes[:, :1, :2] - 1e-3, found.boxes[:, :1, 2:] + 1e-3
    held = ((moved >= low) & (moved <= high)).all(2)
    # What lies on the canvas and on the image is in the box; mirrored and scaled, the image's own border may cut.
    whole = inside.all(1) & found.kept[:, 0]
    assert whole.sum() > 60
    assert held[whole].float().mean() > 0.95
    assert (found.boxes >= 0).all()
    assert (found.boxes <= SIDE).all()
    sides = found.boxes[found.kept][:, 2:] - found.boxes[found.kept][:, :2]
    assert (sides >= 1).all()


@pytest.mark.parametrize("strength", ["S2", "S4"])
def test_within_autocast_nothing_is_computed_in_bfloat16(strength):
    given, rows = batch(60), torch.arange(60)
    plain, maps = augment(given, strength, rows, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, moves = augment(given, strength, rows, 2, 5)
        twice = (
            geometry.then(maps, maps),
            geometry.inverse(maps),
            geometry.move_boxes(given.boxes, maps, given.boxes[:, 0]),
        )
    assert torch.equal(moves, maps)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))
    alone = geometry.then(maps, maps), geometry.inverse(maps), geometry.move_boxes(given.boxes, maps, given.boxes[:, 0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(twice, alone, strict=True))


@pytest.mark.parametrize(("width", "height"), [(96.0, 61.0), (61.0, 96.0)])
def test_padding_does_not_bleed_into_the_image(width, height):
    pixels = torch.zeros(40, 3, SIDE, SIDE, dtype=torch.uint8)
    pixels[:, :, : int(height), : int(width)] = 200
    extents = torch.tensor([[width, height]] * 40)
    maps = geometry.identity(40)
    maps[:, 0, 0] = maps[:, 1, 1] = torch.linspace(0.5, 2, 40)
    maps[:, :, 2] = -torch.linspace(0, 30, 40)[:, None]
    found = geometry.move_pixels(pixels, maps, extents)
    assert found.unique().tolist() == [128, 200]


@pytest.mark.parametrize("strength", list(STRENGTHS))
def test_an_image_is_augmented_alike_in_any_batch(strength):
    given, rows = batch(), torch.arange(100, 124)
    whole, maps = augment(given, strength, rows, 3, 7)
    order = torch.tensor([20, 3, 11])
    part, some = augment(Boxed(*(field[order] for field in given)), strength, rows[order], 3, 7)
    assert torch.equal(part.pixels, whole.pixels[order])
    assert torch.equal(part.boxes, whole.boxes[order])
    assert torch.allclose(some, maps[order])
    if strength != "none":
        assert not torch.equal(augment(given, strength, rows, 3, 8)[0].pixels, whole.pixels)
        assert not torch.equal(augment(given, strength, rows, 4, 7)[0].pixels, whole.pixels)


@pytest.mark.parametrize("strength", ["S2", "S3"])
def test_an_image_is_augmented_alike_beside_images_of_many_boxes(strength):
    """The places for boxes are as many as the fullest image of a set has."""
    given, rows = batch(200), torch.arange(200)
    given = given._replace(pixels=torch.randint(0, 256, given.pixels.shape, generator=torch.manual_seed(0)).byte())
    whole, maps = augment(given, strength, rows, 3, 7)
    boxes, kept = torch.zeros(200, 7, 4), torch.zeros(200, 7, dtype=torch.bool)
    boxes[:, :2], kept[:, :2] = given.boxes, given.kept
    found, moves = augment(given._replace(boxes=boxes, kept=kept), strength, rows, 3, 7)
    assert torch.equal(found.pixels, whole.pixels)
    assert torch.equal(found.boxes[:, :2], whole.boxes)
    assert torch.equal(moves, maps)
    none = augment(given._replace(kept=torch.zeros_like(given.kept)), strength, rows, 3, 7)[0]
    assert 10 < (none.pixels != whole.pixels).flatten(1).any(1).sum() < 100  # single boxes were changed


def test_a_box_is_changed_by_itself_a_third_as_often_as_its_operation_is_drawn():
    """AutoAugment's rule for operations on boxes; of five policies two have one, with probabilities 0.2 and 0.6."""
    count = 4000
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator).byte()
    kept = torch.ones(count, 1, dtype=torch.bool)
    given = Boxed(pixels, torch.full((count, 2), 32.0), torch.tensor([[[4.0, 4, 28, 28]]]).repeat(count, 1, 1), kept)
    rows = torch.arange(count)
    with_boxes = augment(given, "S2", rows, 1, 0)[0].pixels
    without = augment(given._replace(kept=~kept), "S2", rows, 1, 0)[0].pixels
    changed = float((with_boxes != without).flatten(1).any(1).float().mean())
    expected = (0.2 + 0.6) / 5 / 3
    assert abs(changed - expected) < 4 * (expected / count) ** 0.5


@pytest.mark.parametrize("strength", list(STRENGTHS))
def test_pixels_are_finished_as_they_would_be_later(strength):
    given, rows = batch(), torch.arange(24)
    plain, _ = augment(given, strength, rows, 0, 1)
    found, _ = augment(given, strength, rows, 0, 1, partial(canvas.normalise, how="imagenet"))
    assert torch.equal(found.pixels, canvas.normalise(plain.pixels, plain.extents, "imagenet"))
    assert plain.pixels.dtype == torch.uint8
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1:], plain[1:], strict=True))


def by_hand(pixels, matrix, extent):
    """One canvas (c, s, s) moved by a (2, 3) matrix, in float64, pixel by pixel."""
    side = pixels.shape[-1]
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    y, x = np.mgrid[:side, :side] + 0.5
    u, v, _ = np.tensordot(back, np.stack([x, y, np.ones_like(x)]), 1)
    inside = (u > 0) & (u < extent[0]) & (v > 0) & (v < extent[1])
    u, v = u.clip(0.5, extent[0] - 0.5) - 0.5, v.clip(0.5, extent[1] - 0.5) - 0.5
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    right, below = np.minimum(left + 1, side - 1), np.minimum(top + 1, side - 1)
    a, b = u - left, v - top
    above = pixels[:, top, left] * (1 - a) + pixels[:, top, right] * a
    under = pixels[:, below, left] * (1 - a) + pixels[:, below, right] * a
    return np.where(inside, above * (1 - b) + under * b, 128)


def test_pixels_move_as_by_hand():
    """Turned, sheared, mirrored, scaled, shifted, together and one by one; some leave the canvas."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (30, 3, 48, 48)).astype(np.uint8)
    extents = np.array([[48, 31], [29, 48]] * 15)
    matrices = generator.normal(0, 1, (30, 2, 3)) * [0.6, 0.6, 20]
    matrices[10:20, [0, 1], [1, 0]] = 0
    matrices[-1] = [[1, 0, 60], [0, 1, 0]]
    given = torch.from_numpy(pixels), torch.tensor(matrices, dtype=torch.float32), torch.tensor(extents).float()
    found = geometry.move_pixels(*given).numpy()
    expected = np.stack([by_hand(*one) for one in zip(pixels.astype(float), matrices, extents, strict=True)])
    assert (np.abs(found - expected) > 0.51).mean() < 1e-3  # where a pixel's centre lies on an edge
    assert (found[-1] == 128).all()
    assert len(geometry.move_pixels(*(part[:0] for part in given))) == 0
    alone = torch.cat([geometry.move_pixels(*(part[at : at + 1] for part in given)) for at in range(30)])
    assert np.array_equal(alone.numpy(), found)


def test_scales_span_their_range():
    for strength, low, high in (("S1", 0.8, 1.2), ("S3", 0.5, 2.0)):
        scale = STRENGTHS[strength].scales
        assert scale == (low, high)
    _, maps = augment(batch(400), "S1", torch.arange(400), 0, 0)
    found = maps[:, 1, 1]
    assert 0.8 <= float(found.min()) < 0.82
    assert 1.18 < float(found.max()) <= 1.2
    mirrored = (maps[:, 0, 0] < 0).float().mean()
    assert 0.4 < float(mirrored) < 0.6


def test_masks_follow_by_the_same_maps():
    given = batch(100)
    found, maps = augment(given, "S1", torch.arange(100), 9, 0)
    masks = (given.pixels[:, :1] > 0).to(torch.uint8)
    moved = geometry.move_pixels(masks, maps, given.extents, "nearest", 0)
    white = (found.pixels[:, :1] > 127) & (found.pixels[:, :1] != 128)  # 128 is where there is no image
    agree = (moved.bool() == white).float().mean()
    assert float(agree) > 0.995


def test_the_maps_take_pixels_where_they_take_points():
    """A turn by 90 degrees, whose result numpy knows."""
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(1, 3, 8, 8)
    turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    maps = geometry.around(torch.tensor([[4.0, 4.0]]), turn)
    moved = geometry.move_pixels(pixels, maps, torch.tensor([[8.0, 8.0]]))
    assert torch.equal(moved, pixels.rot90(-1, (2, 3)))
    assert torch.allclose(geometry.then(maps, geometry.inverse(maps)), geometry.identity(1), atol=1e-6)


def test_the_policies_are_those_of_the_reference():
    assert len(POLICY) == 5
    assert len(RANDOM) == 10
    assert POLICY[4] == (("rotate", 0.6, 10), ("colour", 1.0, 6))
