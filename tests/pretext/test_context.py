"""Pairs of patches against numpy, and what keeps them from being solved by short cuts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer import rng
from ktransfer.errors import UsageError
from ktransfer.pretext import context
from ktransfer.pretext.context import ContextConfig, make_pairs

MANY = 4000


def images(count, size, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def make(count=6, size=64, config=None, seed=0, epoch=0, rows=None, pixels=None):
    return make_pairs(
        images(count, size) if pixels is None else pixels,
        torch.arange(count) if rows is None else rows,
        config or ContextConfig(),
        seed,
        epoch,
    )


def slow(pixels, found, config, size, noise):
    """Every patch cut, coloured and scaled on its own in float64; `noise` as it was drawn."""
    tile = config.geometry(size)[0]
    done = np.zeros(found.tiles.shape)
    for example, patch in np.ndindex(len(pixels), 2):
        y, x = found.corner[example, patch].tolist()
        cut = pixels[example, :, y : y + tile, x : x + tile].double().numpy()
        if config.colour == "dropped":
            values = noise[example, patch].copy()
            kept = int(found.kept[example, patch])
            values[kept] = cut[kept] - cut[kept].mean()
        else:
            axis = np.array([-1.0, 2.0, -1.0])
            values = np.einsum("ij,jyx->iyx", np.eye(3) - np.outer(axis, axis) / (axis @ axis), cut)
        done[example, patch] = (values - values.mean()) / math.sqrt(values.var() + 0.01)
    return done


@settings(max_examples=12, deadline=None)
@given(st.integers(36, 90), st.sampled_from(context.COLOURS), st.integers(0, 99))
def test_patches_agree_with_a_slow_implementation(size, colour, seed):
    config, pixels, rows = ContextConfig(colour=colour), images(4, size, seed), torch.tensor([5, 0, 8, 3])
    found = make(size=size, config=config, seed=seed, epoch=2, rows=rows, pixels=pixels)
    shape = found.tiles.shape
    words = rng.words(seed, "pretext/context/noise", 2, rows, math.prod(shape[1:])).double().numpy()
    noise = ((words // 256) / 2**24 - 0.5).reshape(shape)
    assert found.tiles.dtype == torch.float32
    np.testing.assert_allclose(found.tiles.numpy(), slow(pixels, found, config, size, noise), atol=2e-4)


@pytest.mark.parametrize(("size", "tile"), [(256, 0), (432, 96), (96, 0), (48, 0), (61, 12)])
def test_the_second_patch_lies_where_the_label_says_with_the_papers_gap_and_jitter(size, tile):
    config = ContextConfig(tile)
    side, gap, jitter = config.geometry(size)
    found = make_pairs(torch.zeros(64, 3, size, size, dtype=torch.uint8), torch.arange(64), config, 0, 0)
    assert found.tiles.shape == (64, 2, 3, side, side)
    assert found.corner.min() >= 0 and found.corner.max() <= size - side
    apart = found.corner[:, 1] - found.corner[:, 0]
    raster = [place for place in range(9) if place != 4]
    step = torch.tensor([[raster[label] // 3 - 1, raster[label] % 3 - 1] for label in found.label.tolist()])
    rest = apart - step * (side + gap)
    assert rest.abs().max() <= 2 * jitter
    assert rest.min() < 0 < rest.max()  # each patch has a jitter of its own
    # Never do the two touch: at least the gap less both jitters lies between them along one axis.
    assert (apart.abs().amax(dim=1) >= side + gap - 2 * jitter).all() and gap > 2 * jitter


def test_draws_are_uniform_and_the_first_patch_tells_nothing():
    found = make_pairs(torch.zeros(MANY, 3, 36, 36, dtype=torch.uint8), torch.arange(MANY), ContextConfig(), 0, 0)
    share = torch.bincount(found.label, minlength=8) / MANY
    assert (share - 1 / 8).abs().max() < 5 * math.sqrt(7 / 64 / MANY)
    for patch in (0, 1):
        share = torch.bincount(found.kept[:, patch], minlength=3) / MANY
        assert (share - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / MANY)
    same = (found.kept[:, 0] == found.kept[:, 1]).double().mean()
    assert abs(float(same) - 1 / 3) < 5 * math.sqrt(2 / 9 / MANY)
    # Wherever the second patch lies, the first is found at the same places.
    first = found.corner[:, 0].double()
    for label in range(8):
        mine = first[found.label == label]
        assert ((mine.mean(0) - first.mean(0)).abs() < 5 * first.std(0) / math.sqrt(len(mine))).all()
    # It gets to all places that there are: span 8 + 8 + 8 + 2 * 4 + 2 of 36 leaves 3 places, and jitter
    # adds 0 to 2.
    assert first.unique(dim=0).shape[0] == 25


def test_a_pair_does_not_depend_on_its_batch():
    rows, pixels = torch.tensor([7, 2, 9, 4]), images(4, 50)
    whole, alone = (make(size=50, rows=rows[part], pixels=pixels[part]) for part in (slice(4), slice(2, 3)))
    assert all(torch.equal(one[2:3], two) for one, two in zip(whole, alone, strict=True))


def test_seed_epoch_and_row_decide_each_choice_by_a_purpose_of_its_own(monkeypatch):
    base = make()
    assert all(torch.equal(one, two) for one, two in zip(base, make(), strict=True))
    for other in (make(seed=1), make(epoch=1), make(rows=torch.arange(6) + 6)):
        assert not any(torch.equal(one, two) for one, two in zip(base, other, strict=True))
    asked, words = [], rng.words
    monkeypatch.setattr(rng, "words", lambda *given: asked.append(given) or words(*given))
    make(seed=5, epoch=6)
    purposes = [purpose for _, purpose, *_ in asked]
    assert len(set(purposes)) == len(purposes) == 5 and all(p.startswith("pretext/context/") for p in purposes)
    assert all((seed, epoch) == (5, 6) for seed, _, epoch, *_ in asked)


@pytest.mark.parametrize("colour", context.COLOURS)
def test_a_lens_that_shifts_green_leaves_no_trace_that_is_common_to_both_patches(colour):
    """Green against magenta is gone: adding it to an image changes no patch."""
    size, config = 64, ContextConfig(colour=colour)
    pixels = images(6, size) // 2 + 60
    fringe = torch.randint(0, 20, (6, size, size), generator=torch.Generator().manual_seed(1)).byte()
    other = pixels.clone()
    other[:, 0] -= fringe
    other[:, 1] += 2 * fringe
    other[:, 2] -= fringe
    one, two = (make(config=config, pixels=part) for part in (pixels, other))
    if colour == "projected":
        torch.testing.assert_close(one.tiles, two.tiles, atol=1e-4, rtol=0)
    else:  # what is left is one channel and noise, so that no two channels can be compared
        strongest = one.tiles.abs().amax(dim=(3, 4)).sort(dim=2).values
        assert (strongest[..., 1] < 0.1).all() and (strongest[..., 2] > 1).all()


@pytest.mark.parametrize(("tile", "expected"), [(96, (96, 48, 7)), (0, (56, 28, 4)), (48, (48, 24, 4))])
def test_the_papers_geometry_in_proportion(tile, expected):
    assert ContextConfig(tile).geometry(432 if tile == 96 else 256) == expected


@pytest.mark.parametrize(
    ("options", "size", "says"),
    [
        ({"tile": 70}, 256, "three patches of 70 pixels with their gaps are wider than images of 256"),
        ({"tile": -1}, 256, "tile -1"),
        ({"colour": "sepia"}, 256, "dropped, projected"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, size, says):
    with pytest.raises(UsageError, match=says) as error:
        ContextConfig(**options).geometry(size)
    assert "\n" not in str(error.value)


def test_the_way_out_of_a_tile_that_is_too_large_is_one():
    with pytest.raises(UsageError) as error:
        ContextConfig(70).geometry(256)
    words = str(error.value).split()
    most, least = int(words[words.index("of", words.index("take")) + 3]), int(words[-1])
    assert ContextConfig(most).geometry(256)[0] == most and ContextConfig(70).geometry(least)[0] == 70
    for config, size in ((ContextConfig(most + 1), 256), (ContextConfig(70), least - 1)):
        with pytest.raises(UsageError):
            config.geometry(size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_makes_the_same_pairs():
    pixels, rows = images(8, 64), torch.arange(8)
    here = make_pairs(pixels, rows, ContextConfig(), 0, 0)
    there = make_pairs(pixels.cuda(), rows.cuda(), ContextConfig(), 0, 0)
    assert all(torch.equal(one, two.cpu()) for one, two in zip(here[1:], there[1:], strict=True))
    torch.testing.assert_close(here.tiles, there.tiles.cpu(), atol=1e-4, rtol=0)
