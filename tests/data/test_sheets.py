"""A sheet holds its images where they belong: whole, blank where they could not be read, framed as they should be."""

import numpy as np
from PIL import Image

from ktransfer.data.sheets import BLANK, FRAME, GAP, MARGIN, PAPER, TEXT, Strip, draw_sheet, save_sheet


def test_images_blanks_and_frames(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 20, 20)).astype(np.uint8)
    valid = np.array([True, False, True])
    strips = [Strip("plain", pixels, valid), Strip("framed", pixels[:1], valid[:1], np.array([True]))]
    save_sheet(tmp_path / "sheet.png", draw_sheet(strips, 4))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (TEXT + 20 + MARGIN) + MARGIN, 4 * (20 + GAP) - GAP + 2 * MARGIN, 3)

    def cell(row, column):
        top, left = MARGIN + TEXT + row * (TEXT + 20 + MARGIN), MARGIN + column * (20 + GAP)
        return sheet[top : top + 20, left : left + 20]

    for column in (0, 2):
        assert (cell(0, column) == pixels[column].transpose(1, 2, 0)).all()
    assert (cell(0, 1) == BLANK).all()
    assert (cell(0, 3) == PAPER).all()
    assert (cell(1, 0)[3:-3, 3:-3] == pixels[0].transpose(1, 2, 0)[3:-3, 3:-3]).all()
    for edge in (cell(1, 0)[0], cell(1, 0)[-1], cell(1, 0)[:, 0], cell(1, 0)[:, -1]):
        assert (edge == FRAME).all()
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
