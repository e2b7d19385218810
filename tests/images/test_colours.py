"""Colour changes against torchvision's, on colours that neither of them clips."""

import pytest
import torch
from torchvision.transforms.v2 import functional as theirs

from ktransfer import rng
from ktransfer.images import colours
from ktransfer.images.colours import Recolouring

ROWS = torch.arange(64)


def pixels(low=110, high=145):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (64, 3, 9, 7), generator=generator).float()


def made(**given):
    return Recolouring(ROWS, **({"grey": 0.0, "jitter": 0.0, "seed": 3, "epoch": 2, "purpose": "t"} | given))


def test_nothing_asked_for_nothing_done():
    torch.testing.assert_close(made()(pixels()), pixels(), atol=1e-3, rtol=0)


def test_grey_is_torchvisions_and_of_its_share():
    found = made(grey=0.3)(pixels())
    grey = (found[:, 0] - found[:, 1]).abs().amax((1, 2)) < 1e-3
    assert 10 < grey.sum() < 30
    wanted = theirs.rgb_to_grayscale(pixels()[grey], 3)
    torch.testing.assert_close(found[grey], wanted, atol=0.2, rtol=0)
    torch.testing.assert_close(found[~grey], pixels()[~grey], atol=1e-3, rtol=0)


def test_jitter_is_torchvisions_brightness_saturation_and_contrast(monkeypatch):
    monkeypatch.setattr(colours, "TURN", 0)
    found = made(jitter=0.1)(pixels())
    draws = rng.uniform(3, "t/colour", 2, ROWS, 6)
    jittered = draws[:, 0] < 0.8
    torch.testing.assert_close(found[~jittered], pixels()[~jittered], atol=1e-3, rtol=0)
    assert 40 < jittered.sum() < 60
    for place in torch.nonzero(jittered)[:, 0].tolist():
        brightness, contrast, saturation = (1 + (2 * draws[place, 1:4] - 1) * 0.08).tolist()
        image = theirs.adjust_brightness(theirs.adjust_saturation(pixels()[place] / 255, saturation), brightness)
        wanted = 255 * theirs.adjust_contrast(image, contrast)
        torch.testing.assert_close(found[place], wanted, atol=0.1, rtol=0)


def test_hues_turn_as_in_torchvision_and_keep_their_brightness(monkeypatch):
    monkeypatch.setattr(colours, "REACH", 0)
    found = made(jitter=0.3)(pixels())
    draws = rng.uniform(3, "t/colour", 2, ROWS, 6)
    luma = torch.tensor(colours.LUMA)[:, None, None]
    torch.testing.assert_close((found * luma).sum(1), (pixels() * luma).sum(1), atol=0.05, rtol=0)
    for place in torch.nonzero(draws[:, 0] < 0.8)[:, 0].tolist():
        turn = (2 * draws[place, 4] - 1).item() * 0.06
        wanted = 255 * theirs.adjust_hue(pixels()[place] / 255, turn)
        # They turn on a hexagon, and keep the largest of the three colours: so compare what is no grey.
        ours, other = ((image - image.mean(0)).flatten() for image in (found[place], wanted))
        assert torch.cosine_similarity(ours, other, dim=0) > 0.97


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_draws_belong_to_the_image_and_the_end_is_clipped(strength):
    whole = made(jitter=strength, grey=0.2)(pixels(0, 256))
    assert whole.min() >= 0 and whole.max() <= 255
    parts = made(jitter=strength, grey=0.2)
    torch.testing.assert_close(parts(pixels(0, 256)[10:20], slice(10, 20)), whole[10:20])
    turned = Recolouring(ROWS.flip(0), grey=0.2, jitter=strength, seed=3, epoch=2, purpose="t")
    torch.testing.assert_close(turned(pixels(0, 256).flip(0)).flip(0), whole)
    later = Recolouring(ROWS, grey=0.2, jitter=strength, seed=3, epoch=3, purpose="t")
    assert not torch.equal(later(pixels(0, 256)), whole)
