"""Puzzles against a slow implementation written image by image, and the properties that make them puzzles."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer import rng
from ktransfer.errors import UsageError
from ktransfer.pretext import puzzles
from ktransfer.pretext.puzzles import JIGSAW, JIGSAWPP, PuzzleConfig, make_puzzles
from ktransfer.pretext.tiles import GREY, PLAIN, PROJECTED

MANY = 6000


def images(count, size, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def permutations(count=50):
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(9), (count, 1)), axis=1)
    return torch.from_numpy(shuffled)


def make(config, batch=6, size=48, seed=0, epoch=0, rows=None, pixels=None, others=None, other_ok=None):
    return make_puzzles(
        images(batch, size, 1) if pixels is None else pixels,
        images(batch, size, 2) if others is None else others,
        torch.arange(batch) if rows is None else rows,
        torch.ones(batch, dtype=torch.bool) if other_ok is None else other_ok,
        permutations(),
        config,
        seed,
        epoch,
    )


def drawn(config, count=MANY, size=255, **changes):
    """Only the draws, for many images."""
    arguments = {"rows": torch.arange(count), "other_ok": torch.ones(count, dtype=torch.bool), "seed": 0, "epoch": 0}
    return puzzles.draw(permutations=permutations(), config=config, size=size, **(arguments | changes))


def slow_tiles(pixels, others, result, tile):
    """Every tile cut, coloured and normalised on its own with numpy in float64."""
    raw = np.zeros((*result.tiles.shape[:2], 3, tile, tile), dtype=np.uint8)
    done = np.zeros(raw.shape)
    for image in range(raw.shape[0]):
        for slot in range(9):
            shown = (others if result.occluded[image, slot] else pixels)[image].numpy()
            for channel in range(3):
                y, x = result.corner[image, slot, channel].tolist()
                raw[image, slot, channel] = shown[channel, y : y + tile, x : x + tile]
            r, g, b = raw[image, slot].astype(float)
            kind = int(result.colour[image, slot])
            if kind == GREY:
                r = g = b = (r + g + b) / 3
            elif kind == PROJECTED:
                a = np.array([-1.0, 2.0, -1.0])
                along = (a[0] * r + a[1] * g + a[2] * b) / (a @ a)
                r, g, b = r - along * a[0], g - along * a[1], b - along * a[2]
            values = np.stack([r, g, b])
            done[image, slot] = (values - values.mean()) / math.sqrt(values.var() + 0.01)
    return raw, done


def within(share, expected, count):
    """Five standard deviations of a share."""
    return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(3, 70), st.integers(0, 4), st.integers(0, 8), st.sampled_from(list(puzzles.COLOURS)), st.integers(0, 99)
)
def test_tiles_agree_with_a_slow_implementation(size, shift, occlusions, colour, seed):
    config = PuzzleConfig(shift=shift, occlusions=occlusions, colour=colour)
    pixels, others = images(4, size, seed), images(4, size, seed + 100)
    result = make(config, 4, size, seed, pixels=pixels, others=others)
    tile = config.geometry(size)[1]
    raw, done = slow_tiles(pixels, others, result, tile)
    assert result.tiles.dtype == torch.float32
    assert torch.equal(puzzles.cut(pixels, others, puzzles.Draws(*result[1:]), tile), torch.from_numpy(raw))
    np.testing.assert_allclose(result.tiles.numpy(), done, atol=2e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2), st.integers(0, 8))
def test_a_puzzle_without_jitter_is_put_together_again_by_its_label(cell, rest, occlusions):
    size = 3 * cell + rest
    config = PuzzleConfig(tile=cell, occlusions=occlusions)
    pixels, others = images(5, size, 3), images(5, size, 4)
    result = make(config, 5, size, pixels=pixels, others=others)
    tiles = puzzles.cut(pixels, others, puzzles.Draws(*result[1:]), cell)
    for image in range(5):
        for slot, target in enumerate(permutations()[result.label[image]].tolist()):
            cells = others if result.occluded[image, slot] else pixels
            if result.occluded[image, slot]:
                target = int(result.source[image, slot])
            y, x = target // 3 * cell, target % 3 * cell
            assert torch.equal(tiles[image, slot], cells[image, :, y : y + cell, x : x + cell])


def test_occluding_tiles_come_from_the_other_image_alone():
    pixels, others = (
        torch.zeros(200, 3, 48, 48, dtype=torch.uint8),
        torch.full((200, 3, 48, 48), 255, dtype=torch.uint8),
    )
    result = make(JIGSAWPP, 200, pixels=pixels, others=others)
    tiles = puzzles.cut(pixels, others, puzzles.Draws(*result[1:]), result.tiles.shape[-1])
    assert torch.equal((tiles == 255).all(dim=(2, 3, 4)), result.occluded)
    assert torch.equal((tiles == 0).all(dim=(2, 3, 4)), ~result.occluded)


def test_own_tiles_follow_the_label_and_foreign_cells_are_distinct():
    draws = drawn(dataclasses.replace(JIGSAWPP, occlusions=8))
    order = permutations()[draws.label]
    assert torch.equal(draws.source[~draws.occluded], order[~draws.occluded])
    foreign = torch.where(draws.occluded, draws.source, -1 - torch.arange(9)).sort(dim=1).values
    assert (foreign.diff(dim=1) > 0).all()
    agree = (draws.source == order)[draws.occluded].double().mean()
    assert within(float(agree), 1 / 9, int(draws.occluded.sum()))


def test_the_number_of_occlusions_and_their_slots_are_uniform():
    draws = drawn(JIGSAWPP)
    numbers = torch.bincount(draws.occluded.sum(dim=1))
    assert len(numbers) == 3
    assert all(within(float(number) / MANY, 1 / 3, MANY) for number in numbers)
    assert all(within(float(share), 1 / 9, MANY) for share in draws.occluded.double().mean(dim=0))
    cells = torch.bincount(draws.source[draws.occluded], minlength=9)
    assert all(within(float(cell) / float(cells.sum()), 1 / 9, int(cells.sum())) for cell in cells)


def test_labels_are_uniform_and_do_not_depend_on_occlusion():
    draws = drawn(JIGSAWPP)
    share = torch.bincount(draws.label, minlength=50) / MANY
    assert all(within(float(one), 1 / 50, MANY) for one in share)
    assert torch.equal(draws.label, drawn(JIGSAW).label)


def test_without_another_image_nothing_is_occluded():
    other_ok = torch.arange(MANY) % 2 == 0
    draws = drawn(JIGSAWPP, other_ok=other_ok)
    assert not draws.occluded[~other_ok].any()
    assert torch.equal(draws.occluded[other_ok], drawn(JIGSAWPP).occluded[other_ok])


@pytest.mark.parametrize(
    ("colour", "grey", "projected"),
    [("paper", 0.7, 0), ("released", 0.5, 0.25), ("jigsaw", 0.3, 0), ("plain", 0, 0)],
)
def test_colours_have_their_shares_and_are_one_for_each_image(colour, grey, projected):
    draws = drawn(PuzzleConfig(colour=colour))
    shares = {}
    for own in (True, False):
        kinds = torch.where(draws.occluded != own, draws.colour, -1)
        first = kinds.max(dim=1).values
        seen = first >= 0
        assert torch.equal(kinds[seen].where(kinds[seen] >= 0, first[seen, None]), first[seen, None].expand(-1, 9))
        shares[own] = first[seen]
        for kind, share in ((GREY, grey), (PROJECTED, projected), (PLAIN, 1 - grey - projected)):
            assert within(float((shares[own] == kind).double().mean()), share, int(seen.sum()))
    both = draws.occluded.any(dim=1)
    same = (draws.colour.max(dim=1).values == draws.colour.min(dim=1).values)[both].double().mean()
    expected = grey**2 + projected**2 + (1 - grey - projected) ** 2
    assert within(float(same), expected, int(both.sum()))


@pytest.mark.parametrize("size", [255, 111, 100, 48, 31])
@pytest.mark.parametrize("config", [JIGSAWPP, PuzzleConfig(shift=0), PuzzleConfig(shift=9), PuzzleConfig(tile=10)])
def test_tiles_stay_in_their_cells_and_channels_within_the_shift(size, config):
    cell, tile, shift = config.geometry(size)
    draws = drawn(config, size=size, count=2000)
    place = torch.stack([draws.source // 3, draws.source % 3], dim=-1)[:, :, None]
    offset = draws.corner - place * cell
    assert offset.min() == 0 and offset.max() == cell - tile
    spread = offset.amax(dim=2) - offset.amin(dim=2)
    assert spread.max() == shift <= config.shift


def test_jitter_reaches_all_offsets_equally_often():
    draws = drawn(PuzzleConfig(shift=0))
    place = torch.stack([draws.source // 3, draws.source % 3], dim=-1)
    offset = draws.corner[:, :, 0] - place * 85
    counts = torch.bincount(offset.flatten(), minlength=22).double()
    assert len(counts) == 22 and all(within(float(c) / (18 * MANY), 1 / 22, 18 * MANY) for c in counts)
    flat = torch.corrcoef(offset.flatten(1).T.double()) - torch.eye(18)
    assert flat.abs().max() < 5 / math.sqrt(MANY)


@pytest.mark.parametrize("config", [JIGSAWPP, JIGSAW, PuzzleConfig(colour="released")])
def test_a_puzzle_does_not_depend_on_its_batch(config):
    rows, pixels, others = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5]), images(8, 61, 1), images(8, 61, 2)
    whole = make(config, 8, 61, rows=rows, pixels=pixels, others=others)
    parts = [
        make(config, 4, 61, rows=rows[half], pixels=pixels[half], others=others[half])
        for half in (slice(0, 4), slice(4, 8))
    ]
    alone = make(config, 1, 61, rows=rows[5:6], pixels=pixels[5:6], others=others[5:6])
    for field in whole._fields:
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
        assert torch.equal(getattr(whole, field)[5:6], getattr(alone, field)), field


def test_seed_epoch_and_row_decide():
    base = make(JIGSAWPP)
    assert all(torch.equal(a, b) for a, b in zip(base, make(JIGSAWPP), strict=True))
    for other in (make(JIGSAWPP, seed=1), make(JIGSAWPP, epoch=1), make(JIGSAWPP, rows=torch.arange(6) + 6)):
        assert not torch.equal(base.label, other.label) and not torch.equal(base.corner, other.corner)


def test_each_choice_has_a_purpose_of_its_own_and_depends_on_seed_epoch_and_row(monkeypatch):
    asked, words = [], rng.words

    def listen(*arguments):
        asked.append(arguments)
        return words(*arguments)

    monkeypatch.setattr(rng, "words", listen)
    rows = torch.tensor([8, 3])
    drawn(JIGSAWPP, 2, rows=rows, seed=5, epoch=6)
    purposes = [purpose for _, purpose, *_ in asked]
    assert len(purposes) == len(set(purposes)) == 7
    assert all(purpose.startswith("pretext/") for purpose in purposes)
    assert all((seed, epoch) == (5, 6) and torch.equal(index, rows) for seed, _, epoch, index, _ in asked)


def test_each_tile_has_mean_0_and_standard_deviation_1():
    tiles = make(PuzzleConfig(colour="released"), 8, 90).tiles.double().flatten(2)
    torch.testing.assert_close(tiles.mean(dim=2), torch.zeros(8, 9).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(tiles.std(dim=2, correction=0), torch.ones(8, 9).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_constant_tiles_become_zeros(level):
    flat = torch.full((2, 3, 255, 255), level, dtype=torch.uint8)
    tiles = make(PuzzleConfig(colour="released"), 2, 255, pixels=flat, others=flat).tiles
    assert tiles.abs().max() < 1e-2


@pytest.mark.parametrize(
    ("size", "expected"),
    [(255, (85, 64, 2)), (225, (75, 56, 2)), (111, (37, 28, 2)), (48, (16, 12, 1)), (3, (1, 1, 0))],
)
def test_the_default_geometry(size, expected):
    assert JIGSAWPP.geometry(size) == expected


@pytest.mark.parametrize(
    ("settings_", "size", "says"),
    [
        ({"tile": 86}, 255, "larger than a cell"),
        ({}, 2, "cannot be cut"),
        ({"tile": -1}, 255, "tile -1"),
        ({"shift": -1}, 255, "shift -1"),
        ({"occlusions": 9}, 255, "0 to 8"),
        ({"occlusions": -1}, 255, "0 to 8"),
        ({"colour": "sepia"}, 255, "paper, released, jigsaw, plain"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings_, size, says):
    with pytest.raises(UsageError, match=says) as error:
        PuzzleConfig(**settings_).geometry(size)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_the_same_puzzles():
    pixels, others, rows, ok = images(16, 111, 1), images(16, 111, 2), torch.arange(16), torch.ones(16).bool()
    here = make_puzzles(pixels, others, rows, ok, permutations(), JIGSAWPP, 0, 0)
    there = make_puzzles(*(x.cuda() for x in (pixels, others, rows, ok, permutations())), JIGSAWPP, 0, 0)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here[1:], there[1:], strict=True))
    torch.testing.assert_close(here.tiles, there.tiles.cpu(), atol=1e-4, rtol=0)
