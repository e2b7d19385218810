"""Corruptions: stronger with each severity, functions of (seed, image) alone, and each what it says it is."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch

from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_splits
from ktransfer.eval.corruptions import KINDS, SEVERITIES, Draws, severities, shot_noise


@pytest.fixture(scope="module")
def pixels():
    return ImageLoader(open_splits("scenes:images=48,size=64")[1], 64).batch(torch.arange(12))[0]


ROWS = torch.arange(100, 112)


def far(found, pixels):
    return float((found.float() - pixels.float()).square().mean().sqrt())


def grow(kind, distances):
    """Whether each severity is farther; the published strengths of frost and fog step back a little from 3 to 4."""
    slack = 0.94 if kind in ("frost", "fog") else 1.0
    return all(later >= slack * one for one, later in pairwise(distances)) and distances[4] > distances[0]


def test_there_are_fifteen():
    assert len(KINDS) == 15
    assert SEVERITIES == 5


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_is_farther_from_the_image(pixels, kind):
    found = list(severities(kind, pixels, ROWS, 0))
    assert len(found) == 5
    assert all(one.dtype == torch.uint8 and one.shape == pixels.shape for one in found)
    distances = [far(one, pixels) for one in found]
    assert grow(kind, distances)
    assert distances[0] > 3
    assert distances[4] < 100


@pytest.mark.parametrize("side", [32, 96])
def test_severities_grow_at_other_sizes(side):
    pixels = ImageLoader(open_splits(f"scenes:images=48,size={side}")[1], side).batch(torch.arange(6))[0]
    for kind in KINDS:
        distances = [far(one, pixels) for one in severities(kind, pixels, ROWS[:6], 1)]
        assert grow(kind, distances), kind


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_batch(pixels, kind):
    together = torch.stack(list(severities(kind, pixels, ROWS, 3)))
    for part in (slice(0, 1), slice(4, 9)):
        alone = torch.stack(list(severities(kind, pixels[part], ROWS[part], 3)))
        assert (alone.int() - together[:, part].int()).abs().max() <= 1  # the rounding of sums
        assert (alone != together[:, part]).float().mean() < 1e-3
    assert torch.stack(list(severities(kind, pixels, ROWS, 3))).equal(together)


@pytest.mark.parametrize(
    "kind", ["gaussian_noise", "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform"]
)
def test_images_and_seeds_have_noise_of_their_own(pixels, kind):
    twice = pixels[:1].expand(2, -1, -1, -1)
    first = list(severities(kind, twice, ROWS[:2], 0))[4]
    assert not first[0].equal(first[1])
    assert not first.equal(list(severities(kind, twice, ROWS[:2], 1))[4])


def test_shot_noise_is_poissons():
    """Against scipy's inverse of the distribution, at the numbers that were drawn."""
    levels = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16).expand(1, 3, -1, -1) / 255
    for level, photons in enumerate((60, 25, 12, 5, 3)):
        draws = Draws(0, "shot_noise", torch.tensor([5]), 16)
        u = draws.uniform("noise", 3, 16, 16)[0].double().numpy()
        scaled = photons * 224 / 16
        wanted = scipy.stats.poisson.ppf(u, levels[0].double().numpy() * scaled)
        found = (shot_noise(levels, draws, level)[0].double() * scaled).round().numpy()
        assert (found == wanted).mean() > 0.999
        assert found[:, 0, 0].tolist() == [0, 0, 0]


def test_noise_has_the_deviation_it_should():
    grey = torch.full((4, 3, 224, 224), 128, dtype=torch.uint8)
    for found, wanted in zip(severities("gaussian_noise", grey, ROWS[:4], 0), (0.08, 0.12, 0.18), strict=False):
        assert found.float().std() / 255 == pytest.approx(wanted, rel=0.02)
    for found, wanted in zip(
        severities("impulse_noise", grey, ROWS[:4], 0), (0.03, 0.06, 0.09, 0.17, 0.27), strict=True
    ):
        assert float((found != 128).float().mean()) == pytest.approx(wanted, rel=0.05)
        assert set(found.unique().tolist()) == {0, 128, 255}


@pytest.mark.parametrize(
    "kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"]
)
def test_what_moves_pixels_leaves_a_plain_image(kind):
    plain = torch.tensor([10, 100, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, -1, 32, 32)
    for found in severities(kind, plain, ROWS[:2], 0):
        assert found.equal(plain)


def test_contrast_and_brightness_by_hand():
    image = torch.tensor([[[0, 250]], [[0, 50]], [[0, 0]]], dtype=torch.uint8)[None].expand(1, 3, 2, 2)
    assert next(severities("contrast", image, ROWS[:1], 0))[0, 0, 0].tolist() == [75, 175]  # 125 -+ 0.4 * 125
    brighter = list(severities("brightness", image, ROWS[:1], 0))[1][0]
    assert brighter[:, 0, 0].tolist() == [51, 51, 51]
    assert brighter[:, 0, 1].tolist() == [255, 51, 0]  # the brightest, in proportion
    assert np.ptp(list(severities("contrast", image, ROWS[:1], 0))[4][0, 0].numpy()) == 12
