"""The sheet of augmented images: plain ones above, boxes drawn."""

import numpy as np
import torch
from PIL import Image

from ktransfer.detection import canvas, masks
from ktransfer.detection.opening import open_detection
from ktransfer.detection.sheet import draw_augmented


def test_the_sheet_holds_plain_and_augmented_images_with_boxes(tmp_path):
    data, _ = open_detection("scenes:images=12,size=64")
    source = canvas.canvases(data, 64)
    for strength in ("none", "S4"):
        draw_augmented(tmp_path / f"{strength}.png", data, source, strength, 0, torch.arange(6))
    plain, strong = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("none", "S4"))
    assert plain.shape == strong.shape == (6 * 68 + 4, 4 * 68 + 4, 3)
    assert np.array_equal(plain[:72], strong[:72])
    assert not np.array_equal(plain[72:], strong[72:])
    yellow = (strong == [255, 255, 0]).all(2)
    assert yellow[:72].sum() > 50
    pixels, _ = source.batch(torch.arange(1))
    x0, y0, x1, y1 = (round(float(value)) for value in data.objects[0].boxes[0])
    inside = pixels[0].permute(1, 2, 0).numpy()[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
    found = strong[4 + y0 + 2 : 4 + y1 - 2, 4 + x0 + 2 : 4 + x1 - 2]
    other = ~yellow[4 + y0 + 2 : 4 + y1 - 2, 4 + x0 + 2 : 4 + x1 - 2]
    assert np.array_equal(found[other], inside[other])


def test_masks_lie_on_the_images_in_their_colours(tmp_path):
    data, _ = open_detection("scenes:images=12,size=64")
    source, maps = canvas.canvases(data, 64), masks.map_canvases(data, 64)[0]
    draw_augmented(tmp_path / "s.png", data, source, "S1", 0, torch.arange(4), maps[:4])
    found = np.array(Image.open(tmp_path / "s.png"))
    assert found.shape == (3 * 68 + 4, 4 * 68 + 4, 3)
    assert not (found == [255, 255, 0]).all(2).any()
    pixels = source.batch(torch.arange(1))[0][0].permute(1, 2, 0).numpy()
    own, shown = maps[0].numpy(), found[4:68, 4:68]
    np.testing.assert_array_equal(shown[own == 0], pixels[own == 0])
    covered = shown[own > 0].astype(int) - pixels[own > 0] // 2
    np.testing.assert_array_equal(covered, masks.colours()[own[own > 0]] // 2)
