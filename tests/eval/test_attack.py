"""The attack: it stays where it may go, finds what can be found, and depends on the image alone."""

import pytest
import torch
from torch import nn

from ktransfer.eval.attack import pgd


class Line(nn.Module):
    """Two classes on either side of a hyperplane, whose distance in L-infinity is known."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, pixels):
        score = ((pixels / 255 - 0.5).flatten(1) * self.weights).sum(1)
        return torch.stack([-score, score], 1)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3 * 8 * 8, generator=generator)
    pixels = torch.randint(60, 196, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    model = Line(weights)
    return model, weights, pixels, model(pixels.float()).argmax(1)


def test_it_stays_in_its_ball_and_in_the_range(case):
    model, _, pixels, targets = case
    pixels = pixels.clone()
    pixels[0], pixels[1] = 0, 255
    for eps in (0.5, 3.0, 80.0):
        found = pgd(model, pixels, targets, torch.arange(40), eps, 5, 0)
        assert not found.requires_grad
        assert (found - pixels).abs().max() <= eps * (1 + 1e-5)
        assert found.min() >= 0
        assert found.max() <= 255
        assert (found - pixels).abs().max() > 0.9 * eps


def test_it_finds_all_that_can_be_fooled_and_no_other(case):
    """An image falls where eps times the sum of |weights| exceeds its margin."""
    model, weights, pixels, targets = case
    margin = ((pixels.float() / 255 - 0.5).flatten(1) * weights).sum(1).abs()
    reach = margin / weights.abs().sum() * 255  # of each image, in 0..255
    before = 1.0
    for eps in (0.5, 2.0, 6.0, 20.0):
        predictions = model(pgd(model, pixels, targets, torch.arange(40), eps, 20, 0)).argmax(1)
        clear = (reach - eps).abs() > 1e-3
        assert ((predictions == targets) == (reach > eps))[clear].all()
        kept = float((predictions == targets).float().mean())
        assert kept <= before
        before = kept
    assert before < 0.2


def test_it_depends_on_the_image_the_seed_and_nothing_else(case):
    model, _, pixels, targets = case
    rows = torch.arange(500, 540)
    together = pgd(model, pixels, targets, rows, 2.0, 3, 1)
    parts = [slice(0, 1), slice(1, 17), slice(17, 40)]
    apart = torch.cat([pgd(model, pixels[part], targets[part], rows[part], 2.0, 3, 1) for part in parts])
    assert together.equal(apart)
    first, other = (pgd(model, pixels, targets, rows, 2.0, 1, seed) for seed in (1, 2))
    assert (first - pixels).abs().max() <= 2
    assert first.equal(other)  # on a line, 2.5 eps from anywhere end in the same corner
