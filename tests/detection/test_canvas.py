import json

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer import networks
from ktransfer.detection import canvas
from ktransfer.detection.canvas import Jitter
from ktransfer.detection.coco import read
from ktransfer.detection.opening import open_file


def still(extents, size, scale=1.0, offset=(0.0, 0.0), flip=False):
    count = len(extents)
    return Jitter(
        torch.full((count,), scale), torch.tensor([offset] * count), torch.full((count,), flip), extents, size
    )


@pytest.fixture
def wide(tmp_path):
    """One image of 80 x 20 with one box."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 80, 3)).astype(np.uint8)).save(tmp_path / "1.png")
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "1.png", "width": 80, "height": 20}],
                "categories": [{"id": 1, "name": "a"}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 2, 40, 10]}],
            }
        )
    )
    return path


def test_a_wide_image_lies_at_the_top_of_its_canvas(wide):
    data = read(wide, "x")
    source = canvas.canvases(data, 40)
    pixels, valid = source.batch(torch.tensor([0]))
    assert pixels.shape == (1, 3, 40, 40) and valid.all()
    assert canvas.extents(data, 40).tolist() == [[40, 10]]
    wanted = Image.open(wide.parent / "1.png").resize((40, 10), Image.Resampling.BILINEAR)
    off = pixels[0, :, :10].permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted)
    assert abs(off).max() <= 1 and (off != 0).mean() < 0.02
    assert (pixels[0, :, 10:] == 0).all()
    boxes = torch.from_numpy(data.objects[0].boxes) * canvas.factors(data, 40)[0]
    assert boxes.tolist() == [[4, 1, 24, 6]]


def test_a_large_jpeg_is_read_at_reduced_scale_and_still_fits(tmp_path, wide):
    held = json.loads(wide.read_text())
    held["images"] = [{"id": 1, "file_name": "1.jpg", "width": 1003, "height": 655}]
    wide.write_text(json.dumps(held))
    y, x = np.mgrid[:655, :1003]
    Image.fromarray(np.stack([x % 256, y % 256, x // 4], 2).astype(np.uint8)).save(tmp_path / "1.jpg")
    source = canvas.canvases(read(wide, "x"), 64)
    pixels, valid = source.batch(torch.tensor([0]))
    assert valid.all() and not source.broken and (pixels[0, :, :42] > 0).any() and (pixels[0, :, 42:] == 0).all()


def test_an_image_of_other_sides_is_broken(tmp_path, wide):
    Image.new("RGB", (20, 80)).save(tmp_path / "1.png")
    source = canvas.canvases(read(wide, "x"), 40)
    assert not source.batch(torch.tensor([0]))[1].any()
    reason = "is 20 x 80 pixels, and its boxes are for 80 x 20; boxes of the other EXIF frame? (--exif)"
    assert source.broken == {0: reason}


def test_jitter_is_a_function_of_seed_epoch_and_row():
    rows, extents = torch.arange(400), torch.tensor([[64.0, 48.0]]).expand(400, 2)
    first = canvas.draw_jitter(rows, extents, 64, 3, 1, (0.5, 2.0))
    again = canvas.draw_jitter(rows[100:200], extents[100:200], 64, 3, 1, (0.5, 2.0))
    assert torch.equal(first.scale[100:200], again.scale) and torch.equal(first.offset[100:200], again.offset)
    assert not torch.equal(first.scale, canvas.draw_jitter(rows, extents, 64, 3, 2, (0.5, 2.0)).scale)
    assert first.scale.min() >= 0.5 and first.scale.max() < 2 and abs(float(first.scale.mean()) - 1.25) < 0.07
    assert 0.4 < float(first.flip.float().mean()) < 0.6
    over = (extents * first.scale[:, None] - 64).clamp(min=0)
    assert (first.offset <= over).all() and (first.offset[first.scale < 1] == 0).all()
    plain = canvas.draw_jitter(rows, extents, 64, 3, 1)
    assert (plain.scale == 1).all() and (plain.offset == 0).all()


def test_pixels_and_boxes_move_together():
    """A bright rectangle in the image is where its box says, after every jitter."""
    size, count = 64, 60
    boxes = torch.tensor([[10.0, 6.0, 34.0, 30.0]])
    extents = torch.tensor([[64.0, 44.0]]).expand(count, 2)
    pixels = torch.zeros(count, 3, size, size)
    pixels[:, :, 6:30, 10:34] = 200
    jitter = canvas.draw_jitter(torch.arange(count), extents, size, 0, 0, (0.5, 2.0))
    moved = canvas.move_pixels(pixels.to(torch.uint8), jitter)
    assert moved.dtype == torch.float32 and moved.shape == pixels.shape
    seen = 0
    for place in range(count):
        box, left = canvas.move_boxes(boxes, jitter, place)
        bright = (moved[place, 0] > 100) & canvas.inside(jitter.moved_extents()[place : place + 1], size)[0, 0]
        if not left.all():
            assert bright.sum() < 64
            continue
        seen += 1
        rows, columns = bright.nonzero().unbind(1)
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (found - box[0]).abs().max() <= 1.01, (jitter.scale[place], found, box)
    assert seen > 40


def test_a_still_jitter_changes_nothing_and_a_flip_mirrors():
    extents = torch.tensor([[32.0, 20.0], [16.0, 32.0]])
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same = canvas.move_pixels(pixels, still(extents, 32))
    mask = canvas.inside(extents, 32).expand(-1, 3, -1, -1)
    torch.testing.assert_close(same[mask], pixels.float()[mask], atol=1e-2, rtol=0)
    mirrored = canvas.move_pixels(pixels, still(extents, 32, flip=True))
    torch.testing.assert_close(mirrored[1, :, :, :16], pixels[1, :, :, :16].flip(-1).float(), atol=1e-2, rtol=0)
    box, left = canvas.move_boxes(torch.tensor([[1.0, 2.0, 5.0, 9.0]]), still(extents, 32, flip=True), 1)
    assert box.tolist() == [[11, 2, 15, 9]] and left.all()
    gone, left = canvas.move_boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), still(extents, 32, 2.0, (15.5, 0.0)), 0)
    assert gone.tolist() == [[0, 0, 0.5, 16]] and not left.any()


@pytest.mark.parametrize("sides", [(32.0, 20.0), (20.0, 32.0), (32.0, 32.0)])
def test_padding_does_not_bleed_into_the_image(sides):
    """An image of one colour keeps it up to its last pixel, however it is scaled, cropped and mirrored."""
    count = 200
    extents = torch.tensor([sides]).expand(count, 2)
    pixels = canvas.inside(extents, 32) * torch.tensor(200, dtype=torch.uint8).expand(count, 3, 32, 32)
    jitter = canvas.draw_jitter(torch.arange(count), extents, 32, 0, 0, (0.5, 2.0))
    moved = canvas.move_pixels(pixels, jitter)
    image = canvas.inside(jitter.moved_extents(), 32).expand(-1, 3, -1, -1)
    torch.testing.assert_close(moved[image], torch.full_like(moved[image], 200), atol=1e-2, rtol=0)


def test_padding_is_zero_and_does_not_shift_the_statistics():
    extents = torch.tensor([[32.0, 20.0]])
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone = networks.normalise(pixels[:, :, :20], "picture")
    for how in ("picture", "imagenet"):
        found = canvas.normalise(pixels, extents, how)
        assert (found[:, :, 20:] == 0).all()
        torch.testing.assert_close(found[:, :, :20], networks.normalise(pixels[:, :, :20], how), atol=1e-5, rtol=1e-5)
    assert abs(float(alone.mean())) < 1e-4


def test_scenes_keep_their_boxes():
    data = open_file("scenes:images=12,size=64")
    pixels, _ = canvas.canvases(data, 64).batch(torch.arange(12))
    assert (pixels[5].permute(1, 2, 0).numpy() == data.read(5, None)).all()
    assert (canvas.factors(data, 128) == 2).all()
