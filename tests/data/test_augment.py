"""Random crops are torchvision's crop and resize at the same places, image by image."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from ktransfer import rng
from ktransfer.data import augment
from ktransfer.data.augment import centre_crop, in_parts, random_resized_crop, random_square, stored_side

SIZE, OUT = 64, 24


def noise(batch: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


def smooth(batch: int) -> torch.Tensor:
    coarse = torch.rand((batch, 3, 4, 4), generator=torch.Generator().manual_seed(1)) * 255
    return v2.resize(coarse, [SIZE, SIZE], antialias=True).round().byte()


def boxes(rows: torch.Tensor, smallest: float, epoch: int = 2) -> list[tuple[float, float, float, float, bool]]:
    """Left, top, width, height in pixels and whether it is mirrored, of the draws that the function makes."""
    found = []
    for area, aspect, x, y, mirror in rng.uniform(5, "t/crop", epoch, rows, 5).double().tolist():
        area = smallest + (1 - smallest) * area
        aspect = (3 / 4) ** (1 - 2 * aspect)
        width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
        found.append((x * (1 - width) * SIZE, y * (1 - height) * SIZE, width * SIZE, height * SIZE, mirror < 0.5))
    return found


def test_it_is_torchvisions_crop_and_resize_of_each_image():
    rows = torch.arange(100, 116)
    pixels = smooth(16)
    crops = random_resized_crop(pixels, rows, OUT, 5, 2, "t", 0.3)
    assert crops.shape == (16, 3, OUT, OUT) and crops.dtype == torch.float32
    for image, crop, (left, top, width, height, mirrored) in zip(pixels, crops, boxes(rows, 0.3), strict=True):
        box = [round(value * 16) for value in (top, left, height, width)]  # torchvision's boxes are whole pixels
        large = v2.resize(image.float(), [SIZE * 16, SIZE * 16], antialias=False)
        expected = v2.resized_crop(large, *box, [OUT, OUT], antialias=False)
        expected = v2.horizontal_flip(expected) if mirrored else expected
        torch.testing.assert_close(crop, expected, atol=1.0, rtol=0)


def test_enlarging_is_exactly_pillows():
    rows = torch.arange(12)
    pixels = noise(12)
    crops = random_resized_crop(pixels, rows, 2 * SIZE, 5, 2, "t", 0.2)
    for image, crop, (left, top, width, height, mirrored) in zip(pixels, crops, boxes(rows, 0.2), strict=True):
        for plane, result in zip(image.numpy(), crop, strict=True):
            image = Image.fromarray(plane.astype(np.float32))
            box = (left, top, min(left + width, SIZE), min(top + height, SIZE))
            resized = image.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BILINEAR, box=box)
            expected = torch.from_numpy(np.array(resized))
            torch.testing.assert_close(result, expected.flip(1) if mirrored else expected, atol=0.05, rtol=0)


def test_half_are_mirrored_and_crops_are_spread():
    rows = torch.arange(2000)
    ramp = torch.arange(SIZE).expand(3, SIZE, SIZE).byte()
    crops = random_resized_crop(ramp.expand(2000, 3, SIZE, SIZE), rows, 4, 0, 0, "t", 0.25)
    rising = crops[:, 0, 0, 3] - crops[:, 0, 0, 0]
    assert 0.46 < (rising < 0).float().mean() < 0.54
    width = rising.abs() / (SIZE * 3 / 4)  # of four samples, the outer ones are 3/4 of the crop apart
    assert width.max() <= 1.001 and width.min() >= math.sqrt(0.25 * 3 / 4) - 0.01
    centre = crops.mean(dim=(1, 2, 3)) / SIZE
    assert centre.mean().item() == pytest.approx(0.5, abs=0.02)
    assert centre.min() < 0.3 and centre.max() > 0.7


def test_a_crop_depends_on_its_image_alone():
    pixels, rows = noise(6), torch.tensor([4, 9, 2, 7, 7, 0])
    whole = random_resized_crop(pixels, rows, OUT, 5, 2, "t")
    again = random_resized_crop(pixels, rows, OUT, 5, 2, "t")
    assert torch.equal(whole, again)
    for place in range(6):
        alone = random_resized_crop(pixels[place : place + 1], rows[place : place + 1], OUT, 5, 2, "t")
        torch.testing.assert_close(alone[0], whole[place], atol=1e-3, rtol=0)
    for other in ((6, 2, "t"), (5, 3, "t"), (5, 2, "u")):
        changed = random_resized_crop(pixels, rows, OUT, *other)
        assert all(not torch.equal(one, two) for one, two in zip(changed, whole, strict=True))


def test_torchs_own_generator_is_not_touched():
    state = torch.get_rng_state()
    random_resized_crop(noise(2), torch.arange(2), OUT, 0, 0, "t")
    assert torch.equal(state, torch.get_rng_state())


def test_the_whole_image_comes_back(monkeypatch):
    pixels = noise(2)
    draws = torch.tensor([[1.0, 0.5, 0.3, 0.8, 0.9], [1.0, 0.5, 0.3, 0.8, 0.1]])
    monkeypatch.setattr(rng, "uniform", lambda *_: draws)
    crops = random_resized_crop(pixels, torch.arange(2), SIZE, 0, 0, "t")
    torch.testing.assert_close(crops[0], pixels[0].float(), atol=0.02, rtol=0)
    torch.testing.assert_close(crops[1], pixels[1].flip(-1).float(), atol=0.02, rtol=0)


def test_crops_do_not_depend_on_the_precision_around_them():
    pixels, rows = smooth(4), torch.arange(4)
    plain = random_resized_crop(pixels, rows, 16, 0, 0, "t")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_resized_crop(pixels, rows, 16, 0, 0, "t"), plain)


def test_images_are_kept_at_256_pixels_for_224():
    assert [stored_side(size) for size in (224, 56, 64, 7)] == [256, 64, 73, 8]


@pytest.mark.parametrize(("side", "size"), [(8, 8), (9, 4), (8, 4), (7, 1)])
def test_centre_crop_is_torchvisions(side, size):
    pixels = noise(2, side)
    found = centre_crop(pixels, size)
    assert found.shape == (2, 3, size, size)
    if (side - size) % 2 == 0:  # torchvision rounds an odd rest the other way
        assert torch.equal(found, v2.center_crop(pixels, [size, size]))
    rest = (side - size) // 2
    assert torch.equal(found, pixels[..., rest : rest + size, rest : rest + size])


def test_random_squares_are_parts_of_the_images_mirrored_half_the_time() -> None:
    pixels, rows = noise(200), torch.arange(200) + 7
    found = random_square(pixels, rows, OUT, 0, 3, "test")
    assert found.shape == (200, 3, OUT, OUT) and found.dtype == torch.uint8
    corner = rng.integers(0, "test/place", 3, rows, 2, SIZE - OUT + 1)
    mirrored = rng.integers(0, "test/mirror", 3, rows, 1, 2)[:, 0]
    for row in range(200):
        top, left = corner[row].tolist()
        square = pixels[row, :, top : top + OUT, left : left + OUT]
        assert found[row].equal(square.flip(-1) if mirrored[row] else square)
    assert 70 < int(mirrored.sum()) < 130
    assert corner.min() == 0 and corner.max() == SIZE - OUT
    assert random_square(pixels[50:60], rows[50:60], OUT, 0, 3, "test").equal(found[50:60])
    assert not random_square(pixels, rows, OUT, 0, 4, "test").equal(found)
    whole = random_square(pixels, rows, SIZE, 0, 3, "test")
    assert all(a.equal(b) or a.equal(b.flip(-1)) for a, b in zip(whole, pixels, strict=True))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_parts_are_those_of_the_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(count * 6.0).view(count, 2, 3)
    seen: list[int] = []

    def make(part: slice) -> torch.Tensor:
        seen.append(len(values[part]))
        return values[part] * 2

    monkeypatch.setattr(augment, "_PART_BYTES", 3 * 4 * 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(in_parts(make, count, 6, torch.device("cpu")), values * 2)
    assert sum(seen) == count and max(seen) <= 3
    seen.clear()
    in_parts(make, count, 6, torch.device("cuda"))
    assert seen == [count]


def test_crops_do_not_depend_on_how_they_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pixels = torch.arange(50, 61), noise(11)
    crops = random_resized_crop(pixels, rows, OUT, 5, 2, "t", finish=lambda x: x / 2)
    monkeypatch.setattr(augment, "_PART_BYTES", 1)
    assert torch.equal(random_resized_crop(pixels, rows, OUT, 5, 2, "t", finish=lambda x: x / 2), crops)
    assert torch.equal(random_resized_crop(pixels, rows, OUT, 5, 2, "t") / 2, crops)


@pytest.mark.parametrize("size", [8, 96, 224])
def test_the_grid_is_that_of_affine_grid(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(16)
    grids: list[torch.Tensor] = []
    monkeypatch.setattr(augment.F, "grid_sample", lambda source, grid, **_: grids.append(grid) or source)
    random_resized_crop(noise(16), rows, size, 5, 2, "t")
    whole = augment._transforms(rows, 5, 2, "t", 0.08)
    expected = augment.F.affine_grid(whole, [16, 3, size, size], align_corners=False)
    torch.testing.assert_close(torch.cat(grids), expected, atol=1e-6, rtol=0)
