"""The sheets show the tiles as the network sees them, and where they belong."""

import numpy as np
import torch
from PIL import Image

from ktransfer.pretext import preview
from ktransfer.pretext.context import PLACES, ContextConfig, make_pairs
from ktransfer.pretext.puzzles import PuzzleConfig, make_puzzles
from ktransfer.pretext.rotation import RotationConfig, make_rotations

FRAME = np.array(preview._FRAME)


def some(count, size=192, occlusions=2):
    """Puzzles of a brightness ramp, with noise as the other image."""
    ramp = torch.linspace(0, 255, size)[None, None, None, :].expand(count, 3, size, size).byte()
    noise = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).byte()
    order = torch.stack([torch.arange(9).roll(turn) for turn in range(1, 9)])
    config = PuzzleConfig(tile=size // 3, occlusions=occlusions)
    return make_puzzles(ramp, noise, torch.arange(count), torch.ones(count).bool(), order, config, 0, 0)


def stretched(tile):
    return ((tile - tile.min()) / (tile.max() - tile.min()) * 255).round().byte().permute(1, 2, 0).numpy()


def at(sheet, corner, side):
    y, x = corner
    return np.asarray(sheet)[y : y + side, x : x + side]


def framed(sheet):
    """Pixels in the colour of the frame."""
    return int((np.asarray(sheet) == FRAME).all(axis=2).sum())


def test_the_size_grows_with_the_number_of_puzzles():
    one, two, three = (preview.puzzle_sheet(some(count)).size for count in (1, 2, 3))
    assert two == (2 * one[0], one[1])
    assert three == (two[0], 2 * one[1])


def test_occluded_slots_are_framed_and_no_others():
    many = some(40)
    rows = {int(number): row for row, number in enumerate(many.occluded.sum(dim=1))}
    area = [
        framed(preview.puzzle_sheet(type(many)(*(field[rows[number]][None] for field in many)))) for number in range(3)
    ]
    assert area[0] == 0 and area[1] > 0
    assert area[1] < area[2] <= 2 * area[1]
    assert framed(preview.puzzle_sheet(some(8, occlusions=0))) == 0


def test_seen_and_solved_grids_hold_the_tiles_at_their_places():
    puzzles = some(1, occlusions=0)
    sheet = np.asarray(preview.puzzle_sheet(puzzles))
    side, gap = 64, 3
    step = side + gap
    top = preview._MARGIN + preview._TEXT
    solution = preview._MARGIN + 3 * step - gap + 6 * gap
    for slot in range(9):
        expected = stretched(puzzles.tiles[0, slot])
        for left, cell in ((preview._MARGIN, slot), (solution, int(puzzles.source[0, slot]))):
            y, x = top + cell // 3 * step, left + cell % 3 * step
            assert np.array_equal(sheet[y : y + side, x : x + side], expected)


def test_small_and_constant_tiles_can_be_drawn():
    flat = torch.full((3, 3, 9, 9), 7, dtype=torch.uint8)
    order = torch.arange(9).flip(0)[None]
    puzzles = make_puzzles(flat, flat, torch.arange(3), torch.ones(3).bool(), order, PuzzleConfig(), 0, 0)
    assert preview.puzzle_sheet(puzzles).size[0] > 2 * 3 * 48


def test_the_file_is_a_png_and_whole(tmp_path):
    puzzles = some(2)
    preview.save_sheet(tmp_path / "new" / "puzzles.png", preview.puzzle_sheet(puzzles))
    with Image.open(tmp_path / "new" / "puzzles.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(preview.puzzle_sheet(puzzles)))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["puzzles.png"]


def test_the_rotations_of_an_image_stand_in_a_row():
    pixels = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    found = make_rotations(pixels, torch.arange(3), RotationConfig(64), 0, 0)
    sheet = preview.rotation_sheet(found)
    step = 64 + preview._MARGIN
    for image, turns in np.ndindex(3, 4):
        y = preview._MARGIN + image * (step + preview._TEXT) + preview._TEXT
        corner = (y, preview._MARGIN + turns * step)
        assert np.array_equal(at(sheet, corner, 64), stretched(found.tiles[4 * image + turns, 0]))


def test_a_pair_is_shown_side_by_side_and_in_its_places():
    pixels = torch.randint(0, 256, (9, 3, 288, 288), generator=torch.Generator().manual_seed(0)).byte()
    found = make_pairs(pixels, torch.arange(9), ContextConfig(64), 0, 0)
    sheet = preview.pair_sheet(found)
    step = 64 + 32
    width, height = 2 * step + 3 * 64 + 2 * 32 + 2 * preview._MARGIN, 3 * 64 + 2 * 32 + preview._TEXT + 28
    assert sheet.size == (2 * width, 5 * height)
    for pair in range(9):
        top, left = pair // 2 * height + preview._MARGIN + preview._TEXT, pair % 2 * width + preview._MARGIN
        first, second = (stretched(tile) for tile in found.tiles[pair])
        row, column = PLACES[int(found.label[pair])]
        solution = left + 2 * step
        assert np.array_equal(at(sheet, (top + step, left), 64), first)
        assert np.array_equal(at(sheet, (top + step, left + step), 64), second)
        assert np.array_equal(at(sheet, (top + step, solution + step), 64), first)
        assert np.array_equal(at(sheet, (top + row * step, solution + column * step), 64), second)


def test_one_small_pair_can_be_drawn():
    pixels = torch.full((1, 3, 48, 48), 9, dtype=torch.uint8)
    assert preview.pair_sheet(make_pairs(pixels, torch.arange(1), ContextConfig(), 0, 0)).size[0] > 5 * 56
