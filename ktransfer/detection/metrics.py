"""Average precision by the rules of COCO and of VOC 2007, with intervals by resampling images.

COCO's numbers are those of faster-coco-eval. The matching below gives the same AP, AP50 and AP75 (a test says so), and
what an evaluation server does not: how much they would vary with other images of the same kind.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.detection.data import Detection, Objects, Outline
from ktransfer.detection.masks import encoded, filled
from ktransfer.detection.predictions import Prediction
from ktransfer.errors import StageError, UsageError

COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0, 1, 101)
VOC_RECALLS = np.linspace(0, 1, 11)
SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESAMPLES = 200
_Bits = NDArray[np.bool_]
Outlines = Mapping[int, Sequence[Outline]] | None
"""Row -> an outline of each prediction: then masks are evaluated, else boxes."""


class Matched(NamedTuple):
    """The predictions of one class, best first, and what they hit.

    Attributes:
        image: (d,) int64, which of the evaluated images.
        hit: (t, d) bool, whether a true object was found, for each IoU.
        ignored: (t, d) bool, neither right nor wrong: a crowd or a difficult object was found.
        objects: (images,) int64, how many were to be found in each.
    """

    image: NDArray[np.int64]
    hit: _Bits
    ignored: _Bits
    objects: NDArray[np.int64]


def need_extra() -> None:
    """Raise UsageError with the install line where faster-coco-eval is missing."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise UsageError("faster-coco-eval is not installed; pip install 'ktransfer[detection]'")


def scores(data: Detection, predictions: Mapping[int, Prediction], seed: int) -> dict[str, Any]:
    """All measures of some predictions.

    Args:
        predictions: row -> prediction; the rows that are evaluated.
        seed: of the resampling.

    Returns:
        AP, AP50, AP75, APs, APm, APl (COCO; NaN-free: a range of sizes without objects is left out), VOC07, each in
        0..1, `classes` (class -> VOC07 AP), and for AP, AP50, AP75 and VOC07 NAME_interval: 1.96 deviations over 200
        resamplings of the images to either side.

    Raises:
        StageError: there is nothing to be found in these rows.
    """
    weights = resamplings(len(predictions), seed)
    found = _coco(data, predictions, weights)
    voc = {
        name: precision(one, weights, VOC_RECALLS)[0]
        for name, one in match_all(data, predictions, [0.5], voc=True).items()
    }
    means = _mean(np.stack(list(voc.values())))
    found["VOC07"], found["VOC07_interval"] = float(means[0]), interval(means)
    found["classes"] = {name: float(values[0]) for name, values in voc.items() if not np.isnan(values[0])}
    return found


def mask_scores(
    data: Detection, predictions: Mapping[int, Prediction], outlines: Outlines, seed: int
) -> dict[str, Any]:
    """COCO's measures of masks: mask_AP, mask_AP50 and so on, with intervals, as `scores` has those of boxes.

    Args:
        outlines: of the predictions; the data has them of all objects.

    Raises:
        StageError: there is nothing to be found in these rows.
    """
    found = _coco(data, predictions, resamplings(len(predictions), seed), outlines)
    return {f"mask_{name}": value for name, value in found.items()}


def _coco(
    data: Detection, predictions: Mapping[int, Prediction], weights: NDArray[np.float64], outlines: Outlines = None
) -> dict[str, Any]:
    """COCO's measures, and the intervals of AP, AP50 and AP75."""
    if all(_ignored(data.objects[row]).all() for row in predictions):
        raise StageError(f"{data.spec}: no object in the {len(predictions)} test images that can be read; add some")
    found: dict[str, Any] = coco_scores(data, predictions, outlines)
    matched = match_all(data, predictions, COCO_IOUS, voc=False, outlines=outlines)
    # (classes, t, 1 + resamplings)
    table = np.stack([precision(one, weights, COCO_RECALLS) for one in matched.values()])
    for name, chosen in (("AP", slice(None)), ("AP50", slice(0, 1)), ("AP75", slice(5, 6))):
        found[f"{name}_interval"] = interval(_mean(table[:, chosen].reshape(-1, weights.shape[0])))
    return found


def coco_scores(data: Detection, predictions: Mapping[int, Prediction], outlines: Outlines = None) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl in 0..1 by faster-coco-eval; none for sizes that no object has."""
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(coco_truth(data, sorted(predictions), outlines is not None))
    given, kind = coco_predictions(data, predictions, outlines), "bbox" if outlines is None else "segm"
    evaluated = COCOeval_faster(truth, truth.loadRes(given), kind, print_function=_quiet)
    evaluated.evaluate()
    evaluated.accumulate()
    evaluated.summarize()
    values = [float(value) for value in evaluated.stats[:6]]
    return {name: value for name, value in zip(SIZES, values, strict=True) if value >= 0}


def coco_truth(data: Detection, rows: list[int], masks: bool = False) -> dict[str, Any]:
    """The objects of some rows as COCO's format has them; difficult as crowd.

    Images are numbered by row and classes by their place: ids of the file may be texts, or too large for the judge.
    """
    notes: list[dict[str, Any]] = [
        {
            "id": 0,
            "image_id": row,
            "category_id": label,
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for row in rows
        for (x0, y0, x1, y1), label, area, crowd in zip(
            data.objects[row].boxes.astype(np.float64).tolist(),
            data.objects[row].labels.tolist(),
            data.objects[row].areas.tolist(),
            _ignored(data.objects[row]).tolist(),
            strict=True,
        )
    ]
    for number, note in enumerate(notes, start=1):
        note["id"] = number
    outlines = [outline for row in rows for outline in _outlines(data.objects[row])] if masks else []
    for note, outline in zip(notes, outlines, strict=False):
        note["segmentation"] = outline
    return {
        "info": {},
        "images": [
            {
                "id": row,
                "file_name": data.keys[row],
                "width": int(data.sizes[row, 0]),
                "height": int(data.sizes[row, 1]),
            }
            for row in rows
        ],
        "annotations": notes,
        "categories": [{"id": label, "name": name} for label, name in enumerate(data.classes)],
    }


def coco_predictions(
    data: Detection, predictions: Mapping[int, Prediction], outlines: Outlines = None
) -> list[dict[str, Any]]:
    """Predictions as COCO's list of results, numbered as `coco_truth` is."""
    found = [
        {
            "image_id": row,
            "category_id": label,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for row in sorted(predictions)
        for (x0, y0, x1, y1), score, label in zip(
            predictions[row].boxes.double().tolist(),
            predictions[row].scores.tolist(),
            predictions[row].labels.tolist(),
            strict=True,
        )
    ]
    masks = [one for row in sorted(outlines) for one in outlines[row]] if outlines is not None else []
    for result, outline in zip(found, masks, strict=False):
        result["segmentation"] = outline
    return found


def match_all(
    data: Detection, predictions: Mapping[int, Prediction], ious: Any, voc: bool, outlines: Outlines = None
) -> dict[str, Matched]:
    """For each class that has an object or a prediction in the evaluated rows, what its predictions hit.

    Args:
        ious: (t,) the least IoU of a hit.
        voc: a prediction belongs to the object that it overlaps most, and is wrong where that is taken; else, as COCO
            has it, to the best of those that are left.
    """
    rows = sorted(predictions)
    found: dict[str, Matched] = {}
    for number, name in enumerate(data.classes):
        images, values, hits, passed = [], [], [], []
        objects = np.zeros(len(rows), np.int64)
        for place, row in enumerate(rows):
            true, prediction = data.objects[row], predictions[row]
            mine, own = true.labels == number, (prediction.labels == number).numpy()
            ignore = _ignored(true)[mine]
            objects[place] = (~ignore).sum()
            order = np.argsort(-prediction.scores.numpy()[own], kind="stable")
            crowd = ignore & (not voc)
            if outlines is None:
                overlaps = _overlaps(prediction.boxes.numpy()[own][order], true.boxes[mine], crowd)
            else:
                size = int(data.sizes[row, 0]), int(data.sizes[row, 1])
                given = [outlines[row][number] for number in np.flatnonzero(own)[order].tolist()]
                wanted = [one for one, own_label in zip(_outlines(true), mine.tolist(), strict=True) if own_label]
                overlaps = _mask_overlaps(given, wanted, size, crowd)
            hit, skip = _match(overlaps, ignore, np.asarray(ious, np.float64), voc)
            images.append(np.full(len(overlaps), place))
            values.append(prediction.scores.numpy()[own][order])
            hits.append(hit)
            passed.append(skip)
        order = np.argsort(-np.concatenate(values), kind="stable")
        found[name] = Matched(
            np.concatenate(images)[order].astype(np.int64),
            np.concatenate(hits, axis=1)[:, order],
            np.concatenate(passed, axis=1)[:, order],
            objects,
        )
    return found


def precision(matched: Matched, weights: NDArray[np.float64], recalls: NDArray[np.float64]) -> NDArray[np.float64]:
    """(t, r) mean over `recalls` of the best precision at that recall or a higher one; NaN without objects.

    Args:
        weights: (r, images), how often each image counts.
    """
    total = weights @ matched.objects
    result = np.full((len(matched.hit), len(weights)), np.nan)
    for place, (hit, ignored) in enumerate(zip(matched.hit, matched.ignored, strict=True)):
        counted = weights[:, matched.image[~ignored]]
        right = np.cumsum(counted * hit[~ignored], axis=1)
        ranked = np.cumsum(counted, axis=1)
        share = right / np.maximum(ranked, np.finfo(float).eps)
        best = np.maximum.accumulate(share[:, ::-1], axis=1)[:, ::-1]
        for number in np.flatnonzero(total > 0):
            first = np.searchsorted(right[number] / total[number], recalls, side="left")
            reached = first[first < best.shape[1]]
            result[place, number] = best[number, reached].sum() / len(recalls)
    return result


def _match(overlaps: NDArray[np.float64], ignore: _Bits, ious: NDArray[np.float64], voc: bool) -> tuple[_Bits, _Bits]:
    """(t, d) hits and ignored of d predictions, best first, by their (d, g) IoU with objects of their class."""
    hit = np.zeros((len(ious), len(overlaps)), np.bool_)
    skip = np.zeros_like(hit)
    if not overlaps.size:
        return hit, skip
    taken = np.zeros((len(ious), overlaps.shape[1]), np.bool_)
    lines = np.arange(len(ious))
    for place, overlap in enumerate(overlaps):
        allowed = np.broadcast_to(overlap, taken.shape) >= np.minimum(ious, 1 - 1e-10)[:, None]
        if voc:
            best = np.full(len(ious), overlap.argmax())
            near = allowed[lines, best]
            skip[:, place] = near & ignore[best]
            hit[:, place] = near & ~ignore[best] & ~taken[lines, best]
        else:
            # A true object goes before a crowd; of equals the last one, as in COCO's own loop.
            rank = np.where(allowed & ~taken, overlap + 2.0 * ~ignore, -1.0)
            best = overlaps.shape[1] - 1 - rank[:, ::-1].argmax(1)
            near = rank[lines, best] >= 0
            skip[:, place] = near & ignore[best]
            hit[:, place] = near & ~ignore[best]
        taken[lines, best] |= hit[:, place]
    return hit, skip


def _mask_overlaps(
    given: Sequence[Outline], wanted: Sequence[Outline], size: tuple[int, int], crowd: _Bits
) -> NDArray[np.float64]:
    """(d, g) IoU of masks of an image of `size` (width, height); of a crowd the share of the prediction in it."""
    from faster_coco_eval.core import mask

    if not given or not wanted:
        return np.zeros((len(given), len(wanted)))
    own, theirs = ([_runs(one, size) for one in some] for some in (given, wanted))
    return np.asarray(mask.iou(own, theirs, crowd.astype(int).tolist()), np.float64)


def _runs(outline: Outline, size: tuple[int, int]) -> dict[str, Any]:
    """Packed run lengths of an outline: the masks of all objects of a photo together would be gigabytes."""
    whole = isinstance(outline, dict) and outline["size"] == [size[1], size[0]] and isinstance(outline["counts"], str)
    return outline if whole else encoded(filled(outline, size))  # type: ignore[return-value]


def _overlaps(boxes: NDArray[np.float32], true: NDArray[np.float32], crowd: _Bits) -> NDArray[np.float64]:
    """(d, g) IoU; of a crowd the share of the prediction that lies in it."""
    boxes, true = boxes.astype(np.float64), true.astype(np.float64)
    low = np.maximum(boxes[:, None, :2], true[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true[None, :, 2:])
    common = (high - low).clip(min=0).prod(axis=2)
    own, theirs = ((one[:, 2:] - one[:, :2]).prod(axis=1) for one in (boxes, true))
    return _shares(common, own, theirs, crowd)


def _shares(common: Any, own: Any, theirs: Any, crowd: _Bits) -> NDArray[np.float64]:
    union = own[:, None] + np.where(crowd, 0.0, theirs[None, :] - common)
    return np.asarray(common / np.maximum(union, np.finfo(float).tiny))


def _outlines(objects: Objects) -> list[Outline]:
    """The outlines of all objects; of one without, which may be a crowd, its box."""
    corners = objects.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].astype(np.float64).tolist()
    return [outline or [box] for outline, box in zip(objects.outlines, corners, strict=True)]


def _ignored(objects: Objects) -> _Bits:
    return np.asarray(objects.crowd | objects.difficult)


def resamplings(count: int, seed: int) -> NDArray[np.float64]:
    """(1 + RESAMPLES, count): the images as they are, then how often each is drawn."""
    drawn = rng.integers(seed, "detection/bootstrap", 0, torch.arange(RESAMPLES), count, count).numpy()
    times = [np.bincount(one, minlength=count) for one in drawn]
    return np.stack([np.ones(count), *times]).astype(np.float64)


def _mean(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(classes, r) -> (r,), classes without objects left out; 0 where no class has one."""
    known = ~np.isnan(table)
    return np.asarray(np.where(known, table, 0).sum(0) / np.maximum(known.sum(0), 1))


def interval(values: NDArray[np.float64]) -> list[float]:
    """The 95 % interval of a share: the value of the images as they are and 1.96 deviations over the resamplings.

    Args:
        values: (1 + RESAMPLES,), the value itself first.
    """
    error = 1.959964 * float(np.std(values[1:], ddof=1))
    return [max(0.0, float(values[0]) - error), min(1.0, float(values[0]) + error)]


def _quiet(*_: Any) -> None:
    """Takes what faster-coco-eval prints."""
