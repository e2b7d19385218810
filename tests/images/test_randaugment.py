"""RandAugment against torchvision's operations, one by one."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as theirs

from ktransfer.errors import UsageError
from ktransfer.images import randaugment
from ktransfer.images.randaugment import BLENDS, GEOMETRY, LEVELS, OPERATIONS, TABLES, RandAugment, numbers

SIDE = 40
ROWS = torch.arange(6)
BILINEAR = InterpolationMode.BILINEAR
LEVELS_TRIED = (0, 3, 9, 22, 30)


def images(count=6):
    """uint8 images of broad waves, with ranges of their own; the last is of one colour."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(20, 230, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    found = theirs.resize(small, [SIDE, SIDE], BILINEAR)
    found[-1] = 77
    return found


def magnitude(name, level):
    """What torchvision's own table has for a level."""
    spaces, signed = v2.RandAugment._AUGMENTATION_SPACE[name]
    table = spaces(LEVELS, SIDE, SIDE)
    return (0.0 if table is None or table.ndim == 0 else float(table[level])), signed


def affine(image, angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
    return theirs.affine(image, angle, list(translate), 1.0, list(shear), BILINEAR, [128.0] * 3, center)


THEIRS = {
    "shear x": ("ShearX", lambda x, m: affine(x, shear=(math.degrees(math.atan(m)), 0.0), center=[0, 0])),
    "shear y": ("ShearY", lambda x, m: affine(x, shear=(0.0, math.degrees(math.atan(m))), center=[0, 0])),
    "translate x": ("TranslateX", lambda x, m: affine(x, translate=(int(m), 0))),
    "translate y": ("TranslateY", lambda x, m: affine(x, translate=(0, int(m)))),
    "rotate": ("Rotate", lambda x, m: theirs.rotate(x, m, BILINEAR, fill=[128.0] * 3)),
    "brightness": ("Brightness", lambda x, m: theirs.adjust_brightness(x, 1 + m)),
    "colour": ("Color", lambda x, m: theirs.adjust_saturation(x, 1 + m)),
    "contrast": ("Contrast", lambda x, m: theirs.adjust_contrast(x, 1 + m)),
    "sharpness": ("Sharpness", lambda x, m: theirs.adjust_sharpness(x, 1 + m)),
    "posterise": ("Posterize", lambda x, m: theirs.posterize(x, int(m))),
    "solarise": ("Solarize", lambda x, m: theirs.solarize(x, 255.0 * m)),
    "autocontrast": ("AutoContrast", lambda x, m: theirs.autocontrast(x)),
    "equalise": ("Equalize", lambda x, m: theirs.equalize(x)),
}


def done(name, level, sign, pixels):
    kind, change = next(
        (kind, change)
        for kind, change in (
            (GEOMETRY, randaugment.moved),
            (BLENDS, randaugment.blended),
            (TABLES, randaugment.mapped),
        )
        if name in kind
    )
    which = torch.full((len(pixels),), kind.index(name))
    return change(pixels.float(), which, torch.full((len(pixels),), float(sign)), level)


@pytest.mark.parametrize("level", LEVELS_TRIED)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS[1:])
def test_each_operation_is_torchvisions(name, sign, level):
    theirs_name, function = THEIRS[name]
    size, signed = magnitude(theirs_name, level)
    pixels = images()
    wanted = function(pixels, size * sign if signed else size).float()
    off = (done(name, level, sign, pixels) - wanted).abs()
    if name in GEOMETRY:
        assert (off < 1.1).float().mean() > 0.94  # they blend the outermost pixel with the fill twice
        assert off[:-1].median() < 0.6
    else:  # whose blends, smoothed images and shares of a range are cut off to whole numbers
        most = 1.5 if name in BLENDS else 1.0 if name == "autocontrast" else 0.0
        assert off.max() <= most


def test_the_table_of_operations_is_torchvisions():
    assert {name for name, _ in THEIRS.values()} | {"Identity"} == set(v2.RandAugment._AUGMENTATION_SPACE)
    assert set(THEIRS) | {"identity"} == set(OPERATIONS)


def test_a_shift_is_exact_and_what_comes_in_is_grey():
    pixels = images()
    shift = int(150 / 331 * SIDE * 9 / 30)
    found = done("translate x", 9, 1, pixels)
    torch.testing.assert_close(found[..., shift:], pixels[..., :-shift].float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[..., :shift], torch.full_like(found[..., :shift], 128), atol=1e-2, rtol=0)


def test_draws_are_of_the_image_the_epoch_and_the_seed_alone():
    rows = torch.arange(3000)
    first = RandAugment(rows, 2, 9, 3, 1, "t")
    part = RandAugment(rows[500:900].flip(0), 2, 9, 3, 1, "t")
    assert torch.equal(part.chosen.flip(0), first.chosen[500:900])
    assert torch.equal(part.signs.flip(0), first.signs[500:900])
    for other in (RandAugment(rows, 2, 9, 4, 1, "t"), RandAugment(rows, 2, 9, 3, 2, "t")):
        assert not torch.equal(other.chosen, first.chosen) and not torch.equal(other.signs, first.signs)
    counts = first.chosen.flatten().bincount(minlength=len(OPERATIONS))
    assert len(counts) == len(OPERATIONS) == 14 and counts.min() > 330 and counts.max() < 530
    assert first.signs.unique().tolist() == [-1.0, 1.0] and first.signs.mean().abs() < 0.05


def test_an_image_is_changed_by_its_own_operations_in_turn():
    pixels = images()
    change = RandAugment(ROWS, 3, 9, 5, 1, "t")
    found = change(pixels.float())
    for place in range(len(pixels)):
        wanted = pixels[place : place + 1].float()
        for operation, sign in zip(change.chosen[place].tolist(), change.signs[place].tolist(), strict=True):
            wanted = wanted if operation == 0 else done(OPERATIONS[operation], 9, sign, wanted)
        torch.testing.assert_close(found[place : place + 1], wanted)
    torch.testing.assert_close(change(pixels[2:4].float(), slice(2, 4)), found[2:4])
    assert found.min() >= 0 and found.max() <= 255


def test_all_at_once_is_the_same_as_those_that_are_meant(monkeypatch):
    """As it is done on a GPU."""
    pixels = images().float()
    which, signs = torch.tensor([0, 7, 2, -1, 4, 3]), torch.tensor([1.0, -1, 1, 1, -1, 1])
    for kinds, change in ((5, randaugment.moved), (4, randaugment.blended), (4, randaugment.mapped)):
        meant = (which >= 0) & (which < kinds)
        every = change(pixels, which.clamp(0, kinds - 1), signs, 9)
        wanted = torch.where(meant[:, None, None, None], every, pixels)
        torch.testing.assert_close(randaugment._changed(pixels, which, kinds, change, signs, 9), wanted)


@pytest.mark.parametrize("given", ["2", "2,", "a,b", "0,9", "11,9", "2,31", "2,-1", "2,9,1", "2;9", ""])
def test_what_is_no_pair_is_one_line(given):
    with pytest.raises(UsageError, match=r"--randaugment .*must be N,M"):
        numbers(given)
    assert numbers("2, 9") == (2, 9)
