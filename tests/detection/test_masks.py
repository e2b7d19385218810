import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer.data import scenes
from ktransfer.detection import canvas, geometry, masks
from ktransfer.detection.coco import read
from ktransfer.detection.opening import open_file
from ktransfer.detection.strengths import Boxed, augment
from ktransfer.errors import BrokenImage, UsageError


def test_polygons_are_filled_as_the_renderer_covers_them():
    for row in range(24):
        for one in scenes.objects(0, "train", row, 96):
            covered = scenes.coverage(one.polygons, 96)
            found = masks.filled(one.polygons, (96, 96))
            wanted = covered >= 0.5
            assert (found & wanted).sum() / (found | wanted).sum() > 0.9, one.name
            assert abs(found.sum() - covered.sum()) / covered.sum() < 0.1


def test_polygons_are_filled_as_by_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    for row in range(12):
        polygons = scenes.objects(0, "train", row, 96)[0].polygons
        wanted = tools.decode(tools.merge(tools.frPyObjects(polygons, 96, 96))).astype(bool)
        found = masks.filled(polygons, (96, 96))
        assert (found & wanted).sum() / (found | wanted).sum() > 0.85


def test_large_polygons_are_filled_in_bands_as_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    outlines = [[(generator.random(2 * corners) * 120 - 10).tolist() for corners in (3, 4, 9)] for _ in range(40)]
    outlines += [[[1.5, 2, 90.25, 2, 90.25, 77.5, 1.5, 77.5]], [[0, 0, 100, 0, 100, 80, 0, 80]]]
    wanted, drawn, new = [masks.filled(one, (100, 80)) for one in outlines], [], Image.new
    monkeypatch.setattr(masks.Image, "new", lambda mode, size: drawn.append(size[0] * size[1]) or new(mode, size))
    for least in (1, 20_000, 70_000):
        monkeypatch.setattr(masks, "_BAND", least)
        assert all((masks.filled(one, (100, 80)) == known).all() for one, known in zip(outlines, wanted, strict=True))
        assert max(drawn) <= max(least, 64 * 100)  # one row at least
    assert len(drawn) > 42 * (80 // 2)
    assert 0.2 < np.mean([known.mean() for known in wanted]) < 0.8


def test_run_lengths_are_those_of_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for shape in ((7, 5), (60, 41), (200, 300)):
        coarse = generator.random(shape) < 0.5
        for mask in (coarse, np.zeros(shape, bool), np.ones(shape, bool), np.indices(shape)[0] > 3):
            packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
            own = masks.encoded(mask)
            assert own == {"size": list(mask.shape), "counts": packed["counts"].decode()}
            assert (masks.decoded(own) == mask).all()
            assert (masks.decoded(packed) == mask).all()
            text = {"size": packed["size"], "counts": packed["counts"].decode()}
            assert (masks.filled(text, (shape[1], shape[0])) == mask).all()
    plain = {"size": [2, 3], "counts": [1, 2, 3]}
    assert masks.decoded(plain).tolist() == [[False, True, False], [True, False, False]]
    for counts in ([1, 2], "P"):
        with pytest.raises(ValueError, match="run lengths"):
            masks.decoded({"size": [2, 3], "counts": counts})


@pytest.fixture
def drawn(tmp_path):
    """40 x 20: a large square of class 0, a small one of class 1 on it, a crowd, and an object with a box alone."""
    Image.new("RGB", (40, 20)).save(tmp_path / "1.png")

    def note(number, category, box, **more):
        x, y, w, h = box
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        base = {"id": number, "image_id": 1, "category_id": category, "bbox": box, "area": w * h}
        return base | {"segmentation": outline} | more

    held = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 20}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            note(1, 2, [4, 4, 4, 4]),
            note(2, 1, [2, 2, 10, 10]),
            note(3, 1, [20, 0, 10, 20], iscrowd=1),
            note(4, 2, [32, 2, 4, 4], segmentation=[]),
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(held))
    return read(tmp_path / "a.json", "x")


def test_small_objects_lie_on_top_and_crowds_are_ignored(drawn):
    wanted = np.zeros((20, 40), np.uint8)
    wanted[2:12, 2:12] = 1
    wanted[4:8, 4:8] = 2
    wanted[:, 20:30] = masks.IGNORE
    wanted[2:6, 32:36] = masks.IGNORE
    np.testing.assert_array_equal(masks.classes_of_pixels(drawn, 0), wanted)
    maps, broken = masks.map_canvases(drawn, 20)
    assert not broken
    assert maps.shape == (1, 20, 20) and maps.dtype == torch.uint8
    assert (maps[0, 10:] == masks.IGNORE).all() and (maps[0, 1:6, 1:6] > 0).all() and (maps[0, 2:4, 2:4] == 2).all()


def test_maps_move_with_their_images():
    data = open_file("scenes:images=12,size=64")
    maps, rows = masks.map_canvases(data, 64)[0], torch.arange(12)
    jitter = canvas.draw_jitter(rows, canvas.extents(data, 64), 64, 0, 0, (0.7, 1.5))
    moved = canvas.move_pixels(maps[:, None], jitter, "nearest")
    assert set(moved.unique().tolist()) <= set(maps.unique().tolist())
    for row in range(12):
        one = data.objects[row]
        box, left = canvas.move_boxes(torch.from_numpy(one.boxes[:1]), jitter, row)
        if left.all() and len(one.boxes) == 1:
            found = (moved[row, 0] == one.labels[0] + 1).nonzero()
            span = torch.cat([found.amin(0).flip(0), found.amax(0).flip(0) + 1])
            assert (span - box[0]).abs().max() < 3


def test_data_without_masks_is_one_line(drawn):
    masks.need_masks(drawn)
    boxes = drawn.objects[0]._replace(outlines=(None,) * 4)
    object.__setattr__(drawn, "objects", (boxes,))
    with pytest.raises(UsageError, match="only boxes"):
        masks.need_masks(drawn)
    object.__setattr__(drawn, "classes", tuple(map(str, range(255))))
    with pytest.raises(UsageError, match="at most 254"):
        masks.need_masks(drawn)


def test_broken_maps_are_broken_images(drawn):
    for counts in (None, [7]):
        outlines = ({"size": [20, 40], "counts": counts}, *drawn.objects[0].outlines[1:])
        object.__setattr__(drawn, "objects", (drawn.objects[0]._replace(outlines=outlines),))
        with pytest.raises(BrokenImage, match="an outline of it is broken"):
            masks.classes_of_pixels(drawn, 0)
    maps, broken = masks.map_canvases(drawn, 20)
    assert (maps == masks.IGNORE).all() and "an outline of it is broken" in broken[0]
    object.__setattr__(drawn, "label_map", lambda row: np.zeros((5, 5), np.uint8))
    with pytest.raises(BrokenImage, match="map of classes is 5 x 5"):
        masks.classes_of_pixels(drawn, 0)


@pytest.mark.parametrize("strength", ["none", "S1", "S2", "S3", "S4"])
def test_maps_follow_what_strengths_do_to_images(strength):
    """Against the outlines, moved point by point and drawn where they come to lie."""
    data, rows = open_file("scenes:images=24,size=96"), torch.arange(24)
    maps, before = masks.map_canvases(data, 96)[0], canvas.extents(data, 96)
    given = Boxed(torch.zeros(24, 3, 96, 96).byte(), before, torch.zeros(24, 1, 4), torch.zeros(24, 1).bool())
    batch, moves = augment(given, strength, rows, 0, 0)
    found = masks.moved(maps, moves, before, batch.extents)
    corner = torch.tensor([[0.0, 0, 96, 0, 96, 96, 0, 96]])
    checked = 0
    for row in range(24):
        one = data.objects[row]

        def at(polygon, row=row):
            points = torch.as_tensor(polygon, dtype=torch.float32).view(1, -1, 2)
            return geometry.move_points(points, moves[row : row + 1]).flatten().tolist()

        inside = canvas.inside(batch.extents[row : row + 1], 96)[0, 0].numpy()
        there = masks.filled([at(corner)], (96, 96)) & inside
        known = found[row].numpy() != masks.IGNORE
        assert (known != there).mean() < 0.03  # but for edges
        if len(one.boxes) != 1:
            continue
        drawn = masks.filled([at(polygon) for polygon in one.outlines[0]], (96, 96)) & there
        if drawn.sum() > 300:
            own = found[row].numpy() == one.labels[0] + 1
            assert (own & drawn).sum() / (own | drawn).sum() > 0.75
            checked += 1
    assert checked >= 4


def test_maps_are_palette_images_with_the_colours_of_voc(tmp_path):
    found = np.random.default_rng(0).integers(0, 256, (7, 5)).astype(np.uint8)
    masks.save_map(tmp_path / "m.png", found)
    np.testing.assert_array_equal(masks.read_map(tmp_path / "m.png"), found)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image.convert("RGB")), masks.colours()[found])
    # aeroplane, bicycle, bird, dog, tv monitor, void of VOC 2012
    known = {1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 12: (64, 0, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert all(tuple(masks.colours()[number]) == colour for number, colour in known.items())
    (tmp_path / "m.png").write_bytes((tmp_path / "m.png").read_bytes()[:40])
    with pytest.raises(BrokenImage, match=r"m\.png"):
        masks.read_map(tmp_path / "m.png")


def test_a_damaged_map_is_a_broken_image(tmp_path):
    """Pillow raises SyntaxError for a chunk whose name is none, and DecompressionBombError for a huge one."""
    path = tmp_path / "a.png"
    masks.save_map(path, np.random.default_rng(0).integers(0, 20, (64, 64), np.uint8))
    whole = path.read_bytes()
    header = whole.index(b"IHDR")
    huge = struct.pack(">II", 60_000, 60_000) + whole[header + 12 : header + 17]
    for broken in (
        whole.replace(b"IDAT", b"\x01\x02\x03\x04"),
        whole[: len(whole) // 2],
        whole[: header + 4] + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge)) + whole[header + 21 :],
    ):
        path.write_bytes(broken)
        with pytest.raises(BrokenImage, match=r"a\.png"):
            masks.read_map(path)
