"""Few labels: linear classifiers that see 1 % and 10 % of them, and few-shot episodes.

Protocol `lowshot/1`. Centre square; maps of each layer averaged to one vector (`--grid`).

Shares of labels: of each class 1 % and 10 % of the training split, rounded, at least one image, seeded; or exactly the
images of `--subset` (one a line: the key, or the file's name alone, as in the published lists of SimCLR). The lists
lie beside the results and can be given back as `--subset`. Numbers are standardised by the training split, whose other
labels are not used; multinomial logistic regression by L-BFGS; the weight decay is chosen by 3-fold cross-
validation within the labelled images (the smallest of equals); the test split is used once.

Episodes (docs/papers.md): 5 classes; 5, 20 or 50 images of each, their mean is the prototype; 15
test images of each; squared Euclidean distance; 600 episodes; mean, and 1.96 deviations / sqrt(600) to either
side. A number of images that fewer than five classes have is left out.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.data.dataset import Dataset
from ktransfer.data.enough import need
from ktransfer.data.lists import spellings
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.progress import bar

from ..arms import Arm
from ..config import EvalConfig
from ..enough import labelled
from ..episodes import EPISODES, episodes
from ..intervals import Z95
from ..learners.frozen import check_frozen, evaluate_layers, labels_of
from ..learners.logistic import fitted, last_best, place_in_class, right_by_decay, stratified_folds
from ..learners.maps import Frozen, Layer
from ..learners.probe import scores
from ..result import Result

PROTOCOL = "lowshot/1"
TITLE = "few labels"
SHARES = {"one": 0.01, "ten": 0.1}
SHOTS = (5, 20, 50)
MEASURES = {
    "one": "1 % of the labels, top-1 %",
    "ten": "10 % of the labels, top-1 %",
    "subset": "labels of --subset, top-1 %",
    **{f"shot{shots}": f"5 classes, {shots} images each, %" for shots in SHOTS},
}
DECAYS = tuple(float(f"1e{power}") for power in range(5, -7, -1))
FOLDS = 3


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong layers and lists, and how much disk the vectors need.

    Raises:
        UsageError: one line.
    """
    check_frozen(evaluated, splits, config, run)
    subsets(splits[0], config)


def enough(splits: tuple[Dataset, Dataset], config: EvalConfig) -> None:
    """Find labels that only images have which cannot be read.

    Raises:
        UsageError: one line.
    """
    labelled(splits, config)
    for name, rows in subsets(splits[0], config).items():
        need(splits[0], rows, 1, f"training images whose labels are used ({MEASURES[name].partition(',')[0]})")


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Accuracies from few labels, layer by layer; the lists of labelled images are among `files`."""
    chosen = subsets(splits[0], config)
    beside = folder.parent.parent / "lowshot"
    lists = {f"labels-{name}-seed{config.seed}.txt": rows for name, rows in chosen.items()}
    for name, rows in lists.items():
        files.write_text(beside / name, "".join(f"{splits[0].keys[row]}\n" for row in rows))
    one_layer = partial(_one_layer, chosen=chosen, config=config, label=arm.name)
    evaluated = evaluate_layers(arm, splits, config, folder, device, one_layer)
    evaluated["files"] = list(lists)
    return evaluated


def subsets(train: Dataset, config: EvalConfig) -> dict[str, NDArray[np.int64]]:
    """Measure -> the rows of the training split whose labels are used, rising.

    Raises:
        UsageError: the list of `--subset` cannot be read, names what is no training image, or one class alone.
    """
    labels = train.targets.astype(np.int64)
    if config.subset is None:
        place, sizes = place_in_class(labels, config.seed, "eval/subset"), np.bincount(labels)
        quotas = {name: np.maximum(1, np.round(share * sizes)) for name, share in SHARES.items()}
        return {name: np.flatnonzero(place < quota[labels]) for name, quota in quotas.items()}
    rows = _listed(Path(config.subset), train)
    if len(np.unique(labels[rows])) < 2:
        raise UsageError(f"--subset {config.subset}: all its images are of one class; list images of at least two")
    return {"subset": rows}


def _listed(path: Path, train: Dataset) -> NDArray[np.int64]:
    try:
        lines = files.lines_of(files.read_text(path, "surrogateescape"))
    except OSError as error:
        raise UsageError(
            f"--subset {path}: cannot be read ({error}); give a text file with one image per line"
        ) from error
    places: dict[str, list[int]] = {}
    for row, key in enumerate(train.keys):
        for name in {key, key.rpartition("/")[2]}:
            places.setdefault(name, []).append(row)
    chosen: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = next((places[name] for name in spellings(line) if name in places), [])
        if len(found) != 1:
            why = (
                f"it is the name of {len(found)} training images" if found else "it is not an image of the training set"
            )
            raise UsageError(
                f"--subset {path}, line {number}: {line.strip()}: {why}; give keys such as {train.keys[0]}"
            )
        chosen += found
    if not chosen:
        raise UsageError(f"--subset {path}: is empty; write one image per line, such as {train.keys[0]}")
    return np.unique(np.array(chosen, np.int64))


def _one_layer(
    train: Frozen, test: Frozen, layer: Layer, chosen: dict[str, NDArray[np.int64]], config: EvalConfig, label: str
) -> dict[str, Any]:
    vectors, labels = train.layer(layer), labels_of(train)
    asked, wanted = test.layer(layer), labels_of(test)
    cell: dict[str, Any] = {}
    for shots in SHOTS:
        shares = episodes(vectors, labels, asked, wanted, shots, config.seed)
        if len(shares):
            mean, half = float(shares.mean()), Z95 * float(shares.std(ddof=1)) / math.sqrt(EPISODES)
            cell |= {f"shot{shots}": mean, f"shot{shots}_interval": [mean - half, mean + half]}

    shift, scale = vectors.mean(axis=0, dtype=np.float64), vectors.std(axis=0, dtype=np.float64)
    vectors, asked = (((rows - shift) / np.maximum(scale, 1e-6)).astype(np.float32) for rows in (vectors, asked))
    readable = train.features.valid.cumsum() - 1  # row of the split -> row of `vectors`
    with bar(len(chosen) * (FOLDS + 1) * len(DECAYS), f"lowshot of {label}, {layer.name}", "fits") as shown:
        for name, rows in chosen.items():
            own = readable[rows[train.features.valid[rows]]]
            cell |= _few(name, vectors[own], labels[own], asked, wanted, config.seed, shown.update)
    return cell


def _few(
    name: str,
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    asked: NDArray[np.float32],
    wanted: NDArray[np.int64],
    seed: int,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """What a classifier that learns from `vectors` alone reaches."""
    folds = stratified_folds(labels, FOLDS, seed, f"eval/lowshot {name}")
    by_fold = [right_by_decay(vectors, labels, folds == fold, DECAYS, tick) for fold in range(FOLDS)]
    best = last_best(np.sum(by_fold, axis=0))
    predictions = fitted(vectors, labels, DECAYS[: best + 1], tick).predict(asked)
    found = scores(torch.from_numpy(predictions), torch.from_numpy(wanted))
    return {
        name: found["top1"],
        f"{name}_interval": found["top1_interval"],
        f"{name}_labels": len(labels),
        f"{name}_decay": DECAYS[best],
        f"{name}_mean_class": found["mean_class"],
        f"{name}_mean_class_interval": found["mean_class_interval"],
    }
