"""One-vs-all linear SVMs on frozen vectors: the VOC07 classification test, and its like for single labels.

Protocol `svm/2`, after Goyal et al. 2019 ("Scaling and Benchmarking Self-Supervised Visual Representation Learning";
their released scripts). Centre square; maps of each layer averaged to one vector (`--grid`; theirs: about 9000 numbers)
and scaled to length 1; what LinearSVC minimises, squared hinge and a bias that is decayed too, all classes at once
(hinge.py); cost by 3-fold cross-validation on the training split (the smallest of equals); the test split is used once.

Several labels an image (`Dataset.tags`): an SVM a class, a "yes" weighing twice, its cost by average precision;
images that are not counted for a class neither teach nor test it; 11-point mAP of VOC07.
One label an image: one cost for all classes, by accuracy; the class of the highest score.
Few images: 4 and 16 of each class (what there is, if less), five seeded draws, cost by cross-validation within each
(theirs: the best on the test split); mean, and Student's 95 % interval of the five.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer.data.dataset import Dataset
from ktransfer.networks import Network
from ktransfer.progress import bar

from ..arms import Arm
from ..config import EvalConfig
from ..learners.frozen import check_frozen, evaluate_layers, labels_of
from ..learners.hinge import Matrix, Rows, minimise, prepared
from ..learners.logistic import place_in_class, stratified_folds
from ..learners.maps import Frozen, Layer
from ..learners.neighbours import unit
from ..learners.probe import scores
from ..metrics import mean_ap, voc_ap, voc_map
from ..result import Result

PROTOCOL = "svm/2"
TITLE = "linear SVMs"
MULTI_LABEL = True
SHOTS, DRAWS = (4, 16), 5
STUDENT = 2.776445  # 97.5 % quantile of Student's t with DRAWS - 1 degrees of freedom
COSTS = (0.01, 0.1, 1.0, 10.0)
FOLDS = 3
MEASURES = {
    "top1": "top-1 %",
    "mean_class": "mean per class %",
    "map": "11-point mAP %",
    **{f"shot{shots}": f"{shots} images of each class, %" for shots in SHOTS},
}
Tick = Callable[[], object]


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong layers, and how much disk the vectors need.

    Raises:
        UsageError: one line.
    """
    check_frozen(evaluated, splits, config, run)


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Accuracy or mAP of linear SVMs, and the costs that were chosen, layer by layer."""
    one_layer = partial(_one_layer, tags=tuple(split.tags for split in splits), config=config, label=arm.name)
    return evaluate_layers(arm, splits, config, folder, device, one_layer)


def _one_layer(
    train: Frozen,
    test: Frozen,
    layer: Layer,
    tags: tuple[NDArray[np.int8] | None, ...],
    config: EvalConfig,
    label: str,
) -> dict[str, Any]:
    vectors, asked = unit(train.layer(layer)), unit(test.layer(layer))
    labels: list[Any] = [
        labels_of(split) if tag is None else tag[split.features.valid]
        for split, tag in zip((train, test), tags, strict=True)
    ]
    of_train, of_test = labels
    several = of_train.ndim == 2
    learn: Any = _several if several else _single
    with bar(1 + len(SHOTS) * DRAWS, f"svm of {label}, {layer.name}", "fits") as shown:
        predictions, cost = learn(vectors, of_train, asked, config.seed, shown.update)
        cell: dict[str, Any] = {"cost": cost}
        if several:
            cell |= voc_map(predictions, of_test, config.seed)
        else:
            cell |= scores(torch.from_numpy(predictions), torch.from_numpy(of_test))
        for shots in SHOTS:
            reached: list[float] = []
            for draw in range(DRAWS):
                rows = _drawn(of_train, shots, config.seed, draw)
                predictions, _ = learn(vectors[rows], of_train[rows], asked, config.seed, shown.update)
                reached.append(mean_ap(predictions, of_test) if several else float((predictions == of_test).mean()))
            half = STUDENT * statistics.stdev(reached) / math.sqrt(DRAWS)
            cell[f"shot{shots}"] = mean = statistics.fmean(reached)
            cell[f"shot{shots}_interval"] = [max(0.0, mean - half), min(1.0, mean + half)]
    return cell


def _single(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], asked: NDArray[np.float32], seed: int, tick: Tick
) -> tuple[NDArray[np.int64], float]:
    """(m,) classes of (m, d) `asked`, and the cost."""
    names, wanted = np.unique(labels, return_inverse=True)
    rows, signs = prepared(vectors), np.where(wanted[:, None] == np.arange(len(names)), 1.0, -1.0)
    folds = stratified_folds(labels, FOLDS, seed, "eval/svm")
    right = np.zeros(len(COSTS), np.int64)
    for fold in range(FOLDS):
        held = folds == fold
        known = np.unique(wanted[~held])
        if len(known) < 2 or not held.any():
            continue  # of a handful of images: nothing to tell apart
        weights = None
        for place, cost in enumerate(COSTS):
            weights = minimise(rows, signs[:, known], cost * np.repeat(~held[:, None], len(known), axis=1), weights)
            right[place] += (known[(rows.numbers[held] @ weights).argmax(axis=1)] == wanted[held]).sum()
    best = COSTS[int(right.argmax())]
    predictions = names[(rows.of(asked) @ minimise(rows, signs, np.full(signs.shape, best))).argmax(axis=1)]
    tick()
    return predictions, best


def _several(
    vectors: NDArray[np.float32], tags: NDArray[np.int8], asked: NDArray[np.float32], seed: int, tick: Tick
) -> tuple[NDArray[np.float64], list[float | None]]:
    """(m, classes) scores of (m, d) `asked`, and each class's cost: None, and scores of 0, without a "yes" or "no"."""
    rows, signs, counts = prepared(vectors), np.where(tags == 1, 1.0, -1.0), np.choose(tags + 1, (0.0, 1.0, 2.0))
    taught = np.flatnonzero((tags == 1).any(axis=0) & (tags == 0).any(axis=0))
    costs = _costs_by_precision(rows, tags, signs, counts, taught, seed)
    found = np.zeros((len(asked), tags.shape[1]))
    found[:, taught] = rows.of(asked) @ minimise(rows, signs[:, taught], counts[:, taught] * costs[taught])
    tick()
    return found, [float(cost) if column in taught else None for column, cost in enumerate(costs)]


def _costs_by_precision(
    rows: Rows, tags: NDArray[np.int8], signs: Matrix, counts: Matrix, taught: NDArray[np.int64], seed: int
) -> Matrix:
    """(classes,) costs of the highest average precision over the folds that have a "yes" and a "no" on either side."""
    folds = np.full(tags.shape, -1)
    for column in taught:
        counted = tags[:, column] >= 0
        folds[counted, column] = stratified_folds(tags[counted, column].astype(np.int64), FOLDS, seed, "eval/svm")
    reached = np.zeros((len(COSTS), tags.shape[1]))
    for fold in range(FOLDS):
        held = folds == fold
        sides = [((tags == prediction) & part).any(axis=0) for prediction in (0, 1) for part in (held, ~held)]
        able = np.intersect1d(taught, np.flatnonzero(np.all(sides, axis=0)))
        weights = None
        for place, cost in enumerate(COSTS):
            weights = minimise(rows, signs[:, able], cost * np.where(held, 0, counts)[:, able], weights)
            scored = rows.numbers @ weights
            for column, values in zip(able, scored.T, strict=True):
                asked = held[:, column]
                reached[place, column] += voc_ap(values[asked], tags[asked, column])
    best: Matrix = np.array(COSTS)[reached.argmax(axis=0)]
    return best


def _drawn(labels: NDArray[Any], shots: int, seed: int, draw: int) -> NDArray[np.int64]:
    """Rows of at most `shots` random images of each class, rising; of several labels, `shots` that have each."""
    purpose = f"eval/svm shots {draw}"
    if labels.ndim == 1:
        return np.flatnonzero(place_in_class(labels, seed, purpose) < shots)
    kept = np.zeros(len(labels), np.bool_)
    for column in range(labels.shape[1]):
        has = np.flatnonzero(labels[:, column] == 1)
        place = place_in_class(labels[:, column].astype(np.int64), seed, f"{purpose} {column}")
        kept[has[place[has] < shots]] = True
    return np.flatnonzero(kept)
