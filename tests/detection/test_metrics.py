import contextlib
import io
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from ktransfer.detection import masks, metrics
from ktransfer.detection.data import subset
from ktransfer.detection.opening import open_file
from ktransfer.detection.predictions import Prediction
from ktransfer.errors import StageError, UsageError


def noisy(data, seed=0, crowds=False):
    """Predictions around the true boxes, some doubled, some wrong, some missing; now and then a crowd or difficult
    box."""
    generator = np.random.default_rng(seed)
    found, objects = {}, []
    for row, one in enumerate(data.objects):
        flags = generator.random((2, len(one.boxes))) < 0.2
        objects.append(one._replace(crowd=flags[0], difficult=flags[1] & ~flags[0]) if crowds else one)
        boxes, scores, labels = [np.zeros((0, 4))], [np.zeros(0)], [np.zeros(0, np.int64)]
        for box, label in zip(one.boxes, one.labels, strict=True):
            count = generator.integers(0, 4)
            boxes.append(box + generator.normal(0, 4, (count, 4)))
            scores.append(generator.random(count))
            labels.append(np.where(generator.random(count) < 0.8, label, generator.integers(0, 12, count)))
        whole = np.concatenate(boxes).astype(np.float32)
        whole[:, 2:] = np.maximum(whole[:, 2:], whole[:, :2] + 1)
        order = np.argsort(-np.concatenate(scores), kind="stable")
        found[row] = Prediction(
            torch.from_numpy(whole[order]),
            torch.from_numpy(np.concatenate(scores)[order].astype(np.float32)),
            torch.from_numpy(np.concatenate(labels)[order].astype(np.int64)),
        )
    made = subset(data, np.arange(len(data)))
    object.__setattr__(made, "objects", tuple(objects))
    return made, found


def by_pycocotools(data, found, outlines=None):
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = metrics.coco_truth(data, sorted(found), outlines is not None)
        truth.createIndex()
        results = truth.loadRes(metrics.coco_predictions(data, found, outlines))
        evaluated = evaluation.COCOeval(truth, results, "segm" if outlines else "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return evaluated.stats[:6]


@pytest.mark.parametrize("crowds", [False, True])
def test_coco_numbers_are_those_of_pycocotools(crowds):
    data, found = noisy(open_file("scenes:images=120,size=96"), crowds=crowds)
    wanted = by_pycocotools(data, found)
    scores = metrics.scores(data, found, 0)
    for name, value in zip(metrics.SIZES, wanted, strict=True):
        assert scores.get(name, -1) == pytest.approx(value, abs=1e-6), name
    assert 0.02 < scores["AP"] < scores["AP50"] < 0.9
    # Our own matching, which the intervals rest on, gives the same.
    matched = metrics.match_all(data, found, metrics.COCO_IOUS, voc=False)
    once = np.ones((1, len(found)))
    table = np.stack([metrics.precision(one, once, metrics.COCO_RECALLS)[:, 0] for one in matched.values()])
    for chosen, value in ((slice(None), wanted[0]), (0, wanted[1]), (5, wanted[2])):
        assert np.nanmean(table[:, chosen]) == pytest.approx(value, abs=1e-6)
    for name in ("AP", "AP50", "AP75", "VOC07"):
        low, high = scores[f"{name}_interval"]
        assert low <= scores[name] <= high and 0.01 < high - low < 0.4
        assert (low + high) / 2 == pytest.approx(scores[name], abs=1e-6)  # of this measure, and not of its neighbour


@pytest.mark.parametrize("packed", [False, True])
def test_numbers_of_masks_are_those_of_pycocotools(packed):
    """Predictions are true masks moved by the noise of their boxes; the truth as polygons, and as run lengths."""
    data, found = noisy(open_file("scenes:images=60,size=96"), crowds=True)
    objects, outlines = list(data.objects), {}
    for row, prediction in found.items():
        one = objects[row]
        whole = tuple(masks.encoded(masks.filled(outline, (96, 96))) for outline in one.outlines)
        objects[row] = one._replace(outlines=whole) if packed else one
        outlines[row] = []
        for box in prediction.boxes.numpy():
            near = int(np.abs(one.boxes - box).sum(1).argmin())
            by = np.round(box - one.boxes[near])[:2].astype(int)
            outlines[row].append(masks.encoded(np.roll(masks.decoded(whole[near]), by[::-1], (0, 1))))
    object.__setattr__(data, "objects", tuple(objects))
    wanted = by_pycocotools(data, found, outlines)
    scores = metrics.mask_scores(data, found, outlines, 0)
    for name, value in zip(metrics.SIZES, wanted, strict=True):
        assert scores.get(f"mask_{name}", -1) == pytest.approx(value, abs=1e-6), name
    assert 0.02 < scores["mask_AP"] < scores["mask_AP50"] < 0.9
    assert scores["mask_AP"] != pytest.approx(metrics.coco_scores(data, found)["AP"], abs=1e-3)
    matched = metrics.match_all(data, found, metrics.COCO_IOUS, voc=False, outlines=outlines)
    once = np.ones((1, len(found)))
    table = np.stack([metrics.precision(one, once, metrics.COCO_RECALLS)[:, 0] for one in matched.values()])
    # Of polygons pycocotools covers a little more than half of each pixel.
    assert np.nanmean(table) == pytest.approx(wanted[0], abs=1e-6 if packed else 0.05)
    low, high = scores["mask_AP_interval"]
    assert low <= scores["mask_AP"] <= high and 0.01 < high - low < 0.4


def test_overlaps_of_masks_by_hand_and_in_little_memory():
    """Run lengths packed and plain, polygons, masks of another size, one that is empty; two crowds."""
    generator = np.random.default_rng(0)
    blobs = [np.kron(generator.random((8, 10)) < 0.4, np.ones((50, 50), bool)) for _ in range(40)]
    blobs[3] = np.zeros((400, 500), bool)
    own = [masks.encoded(one) for one in blobs]
    plain = {"size": [400, 500], "counts": masks._unpacked(own[30]["counts"])}
    small = masks.encoded(blobs[31][::50, ::50])
    square = [[100, 100, 300, 100, 300, 200, 100, 200]]
    theirs, crowd = [own[5], plain, small, square, own[32], own[3]], np.array([False, False, False, True, True, False])
    true = [blobs[5], blobs[30], blobs[31], np.zeros((400, 500), bool), blobs[32], blobs[3]]
    true[3][100:200, 100:300] = True
    tracemalloc.start()
    found = metrics._mask_overlaps(own, theirs, (500, 400), crowd)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 400 * 500 < len(own) * 400 * 500  # bytes: of a few masks, not of all
    for line, mask in zip(found, blobs, strict=True):
        for value, other, many in zip(line, true, crowd, strict=True):
            whole = mask.sum() if many else (mask | other).sum()
            assert value == (mask & other).sum() / max(whole, 1)
    assert metrics._mask_overlaps([], theirs, (500, 400), crowd).shape == (0, 6)
    assert metrics._mask_overlaps(own, [], (500, 400), crowd[:0]).shape == (40, 0)


def test_an_image_that_counts_twice_is_an_image_twice():
    data, found = noisy(open_file("scenes:images=30,size=96"), crowds=True)
    rows = np.r_[np.arange(30), 4, 4, 9]
    twice = subset(data, rows)
    wanted = by_pycocotools(twice, {place: found[row] for place, row in enumerate(rows.tolist())})
    weights = np.bincount(rows, minlength=30)[None].astype(float)
    matched = metrics.match_all(data, found, metrics.COCO_IOUS, voc=False)
    table = [metrics.precision(one, weights, metrics.COCO_RECALLS) for one in matched.values()]
    assert np.nanmean(table) == pytest.approx(wanted[0], abs=2e-3)


def scene(boxes, difficult=()):
    """One image with boxes of class 0."""
    data = subset(open_file("scenes:images=12,size=96"), np.arange(1))
    objects = data.objects[0]._replace(
        boxes=np.array(boxes, np.float32),
        labels=np.zeros(len(boxes), np.int64),
        crowd=np.zeros(len(boxes), bool),
        difficult=np.array([place in difficult for place in range(len(boxes))]),
        areas=np.ones(len(boxes), np.float32),
        outlines=(None,) * len(boxes),
    )
    object.__setattr__(data, "objects", (objects,))
    return data


def prediction(rows):
    table = torch.tensor(rows).view(-1, 5)
    return {0: Prediction(table[:, :4], table[:, 4], torch.zeros(len(table), dtype=torch.int64))}


def test_voc_by_hand():
    """Two objects; a hit, a second hit of the same one (wrong), a hit of the other: precisions 1, 1/2, 2/3."""
    data = scene([[0, 0, 10, 10], [20, 20, 30, 30]])
    found = prediction([[0.0, 0, 10, 10, 0.9], [0.0, 0, 10, 9, 0.8], [20.0, 20, 30, 30, 0.7]])
    # Recalls 0 to 0.5 (six points) at precision 1, 0.6 to 1 (five) at 2/3.
    wanted = (6 + 5 * 2 / 3) / 11
    assert metrics.scores(data, found, 0)["VOC07"] == pytest.approx(wanted)
    assert metrics.scores(data, found, 0)["classes"] == {data.classes[0]: pytest.approx(wanted)}


def test_difficult_objects_are_neither_right_nor_wrong():
    data = scene([[0, 0, 10, 10], [20, 20, 30, 30]], difficult=(0,))
    found = prediction([[0.0, 0, 10, 10, 0.9], [0.0, 0, 10, 9, 0.8], [20.0, 20, 30, 30, 0.7]])
    scores = metrics.scores(data, found, 0)
    assert scores["VOC07"] == 1.0 and scores["AP50"] == pytest.approx(1.0)


def test_voc_of_a_class_is_that_of_all_images():
    data, found = noisy(open_file("scenes:images=60,size=96"))
    scores = metrics.scores(data, found, 0)
    matched = metrics.match_all(data, found, [0.5], voc=True)
    alone = {name: metrics.precision(one, np.ones((1, 60)), metrics.VOC_RECALLS) for name, one in matched.items()}
    assert scores["classes"] == {name: pytest.approx(float(one[0, 0])) for name, one in alone.items()}
    assert scores["VOC07"] == pytest.approx(np.mean(list(scores["classes"].values())))


def test_the_outline_of_an_object_without_one_is_its_box():
    data = scene([[2, 3, 12, 9], [20, 30, 40, 33]])
    for note, (x0, y0, x1, y1) in zip(
        metrics.coco_truth(data, [0], masks=True)["annotations"], data.objects[0].boxes.astype(int), strict=True
    ):
        whole = np.zeros((96, 96), bool)
        whole[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(masks.filled(note["segmentation"], (96, 96)), whole)


@pytest.mark.parametrize("voc", [True, False])
def test_overlaps_know_no_unit(voc):
    """Whole images as small as a pixel give the same hits."""
    data, found = noisy(open_file("scenes:images=40,size=96"), crowds=True)
    small = [one._replace(boxes=one.boxes / 128) for one in data.objects]
    shrunk = {row: one._replace(boxes=one.boxes / 128) for row, one in found.items()}
    wanted = metrics.match_all(data, found, metrics.COCO_IOUS, voc)
    for name, one in metrics.match_all(replace(data, objects=tuple(small)), shrunk, metrics.COCO_IOUS, voc).items():
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(one, wanted[name], strict=True))


def test_voc_takes_the_largest_overlap_and_coco_what_is_left():
    data = scene([[0, 0, 10, 10], [0, 4, 10, 14]])
    found = prediction([[0.0, 0, 10, 10, 0.9], [0.0, 1, 10, 11, 0.8]])
    voc = metrics.match_all(data, found, [0.5], voc=True)[data.classes[0]]
    coco = metrics.match_all(data, found, [0.5], voc=False)[data.classes[0]]
    assert voc.hit.tolist() == [[True, False]] and coco.hit.tolist() == [[True, True]]


def test_nothing_found_is_zero():
    data = scene([[0, 0, 10, 10]])
    scores = metrics.scores(data, prediction([]), 0)
    assert scores["AP"] == scores["VOC07"] == 0 and scores["AP_interval"] == [0, 0]


def test_the_missing_extra_is_one_line(monkeypatch):
    metrics.need_extra()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ktransfer\[detection\]'"):
        metrics.need_extra()


def test_nothing_to_be_found_is_said_in_a_line():
    data, found = noisy(open_file("scenes:images=12,size=64"))
    with pytest.raises(StageError, match="no object in the 0 test images"):
        metrics.scores(data, {}, 0)
    crowds = tuple(one._replace(crowd=np.ones_like(one.crowd)) for one in data.objects)
    object.__setattr__(data, "objects", crowds)
    with pytest.raises(StageError, match="no object in the 12 test images"):
        metrics.scores(data, found, 0)


def test_a_crowd_without_outline_is_its_box():
    data, found = noisy(open_file("scenes:images=20,size=96"), crowds=True)
    outlines = {
        row: [masks.encoded(masks.filled([[x, y, u, y, u, v, x, v]], (96, 96))) for x, y, u, v in one.boxes.tolist()]
        for row, one in found.items()
    }
    scores = []
    for box in (False, True):
        objects = []
        for one in data.objects:
            corners = one.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].tolist()
            drawn = [[own] if box else None for own in corners]
            chosen = [own if crowd else o for own, o, crowd in zip(drawn, one.outlines, one.crowd, strict=True)]
            objects.append(one._replace(outlines=tuple(chosen)))
        scores.append(metrics.mask_scores(replace(data, objects=tuple(objects)), found, outlines, 0))
    assert any(one.crowd.any() for one in data.objects)
    assert scores[0] == scores[1]
