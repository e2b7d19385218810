"""How well k-means on a network's features finds the classes, and how stable it is.

Protocol `clusters/1`. Features: maps averaged to `--grid` x `--grid`, scaled to length 1, layer by layer. k-means
(faiss, 20 iterations, all training images, from `--clusters-starts` seeds) with `--clusters-k` clusters, by default
as many as there are classes. Each image of the test split goes to its nearest centroid; these clusters, of the first
seed, are compared with the classes: NMI and AMI (arithmetic means), ARI, purity, and the accuracy after the best
one-to-one match with the classes. `seeds`: the mean ARI between two of the seeds. `twice`: the AMI with 2 k clusters.

A run that clustered these same images has its pseudo-labels (`clusters/labels.csv`) compared with their classes too,
column `pseudo-labels`; intervals: 95 % by the bootstrap over images. A network that learned them predicts those
of the test split (heldout.py): column `held-out pseudo-labels`, and the share that is right with Wilson's interval.
"""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import networks
from ktransfer.artifacts.labels import read_labels
from ktransfer.data.dataset import Dataset
from ktransfer.data.enough import TRAIN, need
from ktransfer.data.opening import open_dataset
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.images.decoding import square
from ktransfer.networks import Network
from ktransfer.progress import say
from ktransfer.run import input_hash, read_record

from ..arms import Arm
from ..bootstrap import Places, with_intervals
from ..config import EvalConfig
from ..enough import labelled
from ..learners.frozen import check_frozen, evaluate_layers, labels_of
from ..learners.maps import Frozen, Layer
from ..learners.neighbours import unit
from ..result import Result
from .heldout import clusters_path, compared, find_source, heldout_labels, predictions

PROTOCOL = "clusters/1"
TITLE = "clusters"
MEASURES = {
    "nmi": "NMI %",
    "ami": "AMI %",
    "ari": "ARI %",
    "purity": "purity %",
    "match": "accuracy % of the best one-to-one match",
    "seeds": "ARI % between seeds",
    "twice": "AMI % with twice as many clusters",
    "heldout": "% of the held-out pseudo-labels told right",
}
NEITHER_IS_BETTER = ("heldout",)
"""Between runs, as each has pseudo-labels of its own to predict."""
NOTE = (
    "{counts}k-means on the first, measured on the second; column pseudo-labels: on the images that the run labelled."
)
ITERATIONS = 20
PSEUDO = "pseudo-labels"
HELDOUT = f"held-out {PSEUDO}"
LEARNED = ("labels.csv", "clusters.h5")
COMPARED, SIDE, ALIKE = 64, 16, 6.0
"""Labelled images are known again by so many of them, at SIDE x SIDE pixels, where these differ by less than ALIKE of
255 in the mean: a pack's from its source by up to 3, any two of the same 364 slides of blood by 10 at least."""


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong layers and numbers of clusters, and how much disk the features need.

    Raises:
        UsageError: one line.
    """
    check_frozen(evaluated, splits, config, run)
    numbers_of_clusters(config, splits[0])


def enough(splits: tuple[Dataset, Dataset], config: EvalConfig) -> None:
    """Find images that cannot be read, where too few are left.

    Raises:
        UsageError: one line.
    """
    labelled(splits, config)
    train = splits[0]
    need(train, range(len(train)), 2 * max(numbers_of_clusters(config, train)), TRAIN)


def numbers_of_clusters(config: EvalConfig, train: Dataset) -> list[int]:
    """Those of `--clusters-k`.

    Raises:
        UsageError: they are not whole numbers of which twice as many are at most the training images, or the
            classes, which count where none are given, are not.
    """
    if config.clusters_k is None:
        if 2 * len(train.classes) > len(train):
            raise UsageError(
                f"--protocol clusters: {len(train)} training images are too few for twice as many clusters as "
                f"classes ({len(train.classes)}); give more images, or fewer clusters with --clusters-k"
            )
        return [len(train.classes)]
    words = [part.strip() for part in config.clusters_k.split(",")]
    if not all(word.isdecimal() and 2 <= int(word) <= len(train) // 2 for word in words):
        raise UsageError(
            f"--clusters-k {config.clusters_k}: must be whole numbers from 2 to half of the {len(train)} training "
            "images, separated by commas"
        )
    return [int(word) for word in words]


def inputs(arms: list[Arm], splits: tuple[Dataset, Dataset], config: EvalConfig) -> dict[str, str]:
    """The pseudo-labels and the centroids of the runs, with their hashes."""
    return {
        f"{name.partition('.')[0]} {arm.name}": input_hash(path)
        for arm in arms
        for name in LEARNED
        if (path := clusters_path(arm, name))
    }


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Evaluate the clusters of one network's features, layer by layer, and the pseudo-labels of its run."""
    wanted = numbers_of_clusters(config, splits[0])
    found = evaluate_layers(arm, splits, config, folder, device, partial(_of_layer, wanted, config))
    cells: dict[str, dict[str, Any]] = {}
    for layer, cell in found["scores"].items():
        for k in wanted:
            column = layer if len(wanted) == 1 else f"{layer}, k = {k}"
            cells[column] = {"numbers": cell["numbers"], "k": k, **cell["by_k"][str(k)]}
    path = clusters_path(arm, LEARNED[0])
    if path and (labels := pseudo_labels(path, splits, arm.name)):
        cells[PSEUDO] = _against_classes(*labels, config.seed)
    if arm.weights and networks.describe(arm.weights).task == PSEUDO:
        cells |= _heldout(arm, splits[1], config, device)
    found["scores"] = cells
    return found


def _heldout(arm: Arm, test: Dataset, config: EvalConfig, device: torch.device) -> dict[str, dict[str, Any]]:
    """What the run's network makes of the test split's pseudo-labels; nothing, and a line why, where there are none."""
    try:
        source = find_source(arm, test)
    except UsageError as why:
        say(f"eval clusters: {arm.name} is not evaluated on held-out pseudo-labels: {why}")
        return {}
    labels = heldout_labels(source, test, config, device)
    known = labels >= 0
    cells = {HELDOUT: _against_classes(labels[known], test.targets[known].astype(np.int64), config.seed)}
    return cells | compared(labels, predictions(arm, test, config, device), len(source.centroids.centroids))


def _against_classes(labels: Places, classes: Places, seed: int) -> dict[str, Any]:
    def measure(places: Places) -> dict[str, float]:
        return agreement(labels[places], classes[places])

    return {"sizes": sizes(labels), **with_intervals(measure, len(classes), seed)}


def _of_layer(wanted: list[int], config: EvalConfig, train: Frozen, test: Frozen, layer: Layer) -> dict[str, Any]:
    """The cells of one layer, by the number of clusters."""
    learn, tell = (unit(split.layer(layer)) for split in (train, test))
    classes = labels_of(test)
    by_k: dict[str, Any] = {}
    for k in wanted:
        found = [clustered(learn, tell, k, config.seed + start) for start in range(config.clusters_starts)]
        twice = clustered(learn, tell, 2 * k, config.seed)
        measure = partial(_measure, found, twice, classes)
        by_k[str(k)] = {"sizes": sizes(found[0]), **with_intervals(measure, len(tell), config.seed)}
    return {"by_k": by_k}


def _measure(found: list[Places], twice: Places, classes: Places, places: Places) -> dict[str, float]:
    first, *others = (one[places] for one in [*found, twice])
    between = [adjusted_rand(contingency(one, other)) for one, other in combinations([first, *others[:-1]], 2)]
    return agreement(first, classes[places]) | {
        "seeds": float(np.mean(between)),
        "twice": information(contingency(first, others[-1]))["ami"],
    }


def clustered(learn: NDArray[np.float32], tell: NDArray[np.float32], k: int, seed: int) -> Places:
    """k-means on (n, d) rows; the cluster of each of (m, d) others, (m,)."""
    import faiss

    # Its own default would take 256 rows a centroid, and warn below 39.
    options = {
        "niter": ITERATIONS,
        "seed": seed & 0x7FFFFFFF,  # faiss takes no larger ones
        "min_points_per_centroid": 1,
        "max_points_per_centroid": len(learn),
    }
    means = faiss.Kmeans(learn.shape[1], k, **options)
    means.train(np.ascontiguousarray(learn))
    _, nearest = means.index.search(np.ascontiguousarray(tell), 1)
    found: Places = nearest[:, 0].astype(np.int64)
    return found


def sizes(clusters: Places) -> dict[str, float]:
    """How many of the images fall into each cluster, of those into which any falls (`met`)."""
    met = np.unique(clusters, return_counts=True)[1]
    return {"met": len(met), "min": int(met.min()), "median": float(np.median(met)), "max": int(met.max())}


def agreement(clusters: Places, classes: Places) -> dict[str, float]:
    """How far (m,) clusters agree with (m,) classes: nmi and ami (of arithmetic means), ari, purity, match."""
    from scipy.optimize import linear_sum_assignment

    table = contingency(clusters, classes)
    return {
        **information(table),
        "ari": adjusted_rand(table),
        "purity": float(table.max(axis=1).sum() / table.sum()),
        "match": float(table[linear_sum_assignment(table, maximize=True)].sum() / table.sum()),
    }


# One table serves all measures of a resample: scikit-learn's functions would each make it anew, and check their inputs.


def contingency(first: Places, second: Places) -> Places:
    """(a, b) rows in each pair of a cluster of the first and one of the second, (m,) each; none is empty."""
    one, two = (np.unique(part, return_inverse=True)[1] for part in (first, second))
    columns = int(two.max()) + 1
    return np.bincount(one * columns + two, minlength=(int(one.max()) + 1) * columns).reshape(-1, columns)


def information(table: Places) -> dict[str, float]:
    """Mutual information of a contingency table over the mean entropy: nmi, and ami, less what chance would give."""
    from sklearn.metrics.cluster import expected_mutual_information

    count = table.sum()
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    mean_entropy = (_entropy(rows / count) + _entropy(columns / count)) / 2
    mutual = 2 * mean_entropy - _entropy(table.ravel() / count)
    if mean_entropy == 0:  # one cluster on both sides: the same partition
        return {"nmi": 1.0, "ami": 1.0}
    chance = float(expected_mutual_information(table, int(count)))
    return {"nmi": mutual / mean_entropy, "ami": (mutual - chance) / max(mean_entropy - chance, 1e-15)}


def adjusted_rand(table: Places) -> float:
    """Hubert and Arabie's ARI of a contingency table."""
    together = _pairs(table.ravel())
    rows, columns, every = _pairs(table.sum(axis=1)), _pairs(table.sum(axis=0)), _pairs(table.sum(keepdims=True))
    chance, most = rows * columns / max(every, 1.0), (rows + columns) / 2
    return 1.0 if most == chance else (together - chance) / (most - chance)


def _entropy(shares: NDArray[np.float64]) -> float:
    met = shares[shares > 0]
    return float(-(met * np.log(met)).sum())


def _pairs(counts: Places) -> float:
    wide = counts.astype(np.float64)
    return float((wide * (wide - 1) / 2).sum())


def pseudo_labels(path: Path, splits: tuple[Dataset, Dataset], name: str) -> tuple[Places, Places] | None:
    """Pseudo-labels and classes of the labelled images, where they are all from one of the splits; else None.

    Args:
        path: `clusters/labels.csv` of a run, whose record names the images: keys alone may be those of others.
        name: of the run, for the line that says why there is nothing.
    """
    found = read_labels(path)
    keys, known = found.keys or [], found.labels >= 0
    why = "" if known.any() else "no image has one"
    for split in splits:
        place = {key: row for row, key in enumerate(split.keys)}
        rows = np.array([place.get(key, -1) for key in keys], np.int64)
        if not known.any() or not len(rows) or (rows < 0).any():
            continue
        if not (why := _others(path, [key for key, one in zip(keys, known, strict=True) if one], split)):
            return found.labels[known].astype(np.int64), split.targets[rows[known]].astype(np.int64)
    if why:
        say(f"eval clusters: the pseudo-labels of {name} are left out: {why}")
    return None


def _others(path: Path, keys: list[str], split: Dataset) -> str:
    """Why the images that were labelled are not those of a split with the same keys, "" where they are: looked up in
    a sample, leniently, as one of the two may be a pack of the other."""
    record = read_record(path.parent.parent, "clusters", "assign")
    spec = record["config"].get("data") if record else None
    if not spec:
        return "it is not known which images they belong to"
    try:
        data = open_dataset(spec)
    except UsageError as error:
        return str(error)
    if data.fingerprint == split.fingerprint:
        return ""
    mine, theirs = ({key: row for row, key in enumerate(one.keys)} for one in (data, split))
    for key in keys[:: -(-len(keys) // COMPARED) or 1]:
        if key not in mine or not _alike(data, mine[key], split, theirs[key]):
            return f"{key} of {spec} and of {split.spec} are different images"
    return ""


def _alike(data: Dataset, row: int, other: Dataset, place: int) -> bool:
    try:
        pixels, others = (
            square(np.asarray(one.read(at, 4 * SIDE)), SIDE).astype(np.float32)
            for one, at in ((data, row), (other, place))
        )
    except BrokenImage:
        return False
    return bool(np.abs(pixels - others).mean() < ALIKE)
