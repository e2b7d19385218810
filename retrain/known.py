"""What the stage learns of each image: labels of a file or of the run, and the teacher's features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer.artifacts.centroids import read_centroids, refuse_mismatch
from ktransfer.artifacts.choosing import features_in
from ktransfer.artifacts.features import open_features
from ktransfer.artifacts.labels import read_labels
from ktransfer.data.dataset import Dataset, rows_of
from ktransfer.errors import StageError, UsageError
from ktransfer.run import done_record, input_hash, read_record

from .config import RetrainConfig
from .objectives.objective import Known

CLASSES = "classes"
LABELLED = ("clusters", "multi", "soft")
"""The objectives that need pseudo-labels."""
OF_FEATURES = ("soft", "features", "relations")
"""Those that need the teacher's features."""
HEATED = ("soft", "features", "relations")
"""Those that have a temperature."""


def find_known(run: Path, config: RetrainConfig, data: Dataset) -> tuple[Known, dict[str, str]]:
    """What the objective needs of each image of the data; and what it was read from, name -> SHA-256.

    Raises:
        UsageError: something is missing, or does not belong to these images.
    """
    labels, inputs = torch.full((len(data), 1), -1), {"data": data.fingerprint}
    names: tuple[str, ...] = ()
    if config.objective in LABELLED:
        labels, inputs["labels"], names = _labels(run, config, data)
    if config.objective == "soft" and names:
        raise UsageError("--objective soft: learns clusters, not what they were called; give --objective clusters")
    if config.objective == "multi" and labels.shape[1] == 1:
        raise UsageError(
            "--objective multi: the labels are of one clustering; make several: ktransfer --run "
            f"{run} cluster --views 8 --overwrite assign --overwrite"
        )
    if config.objective not in OF_FEATURES:
        return Known(labels, names=names), inputs
    needed = f"--objective {config.objective}"
    found = Path(config.features) if config.features else features_in(run, data.fingerprint, needed)
    if found is None:
        raise UsageError(
            f"{needed}: needs the teacher's features of {data.spec}, and the run has none; make them first: ktransfer "
            f"--run {run} extract, or give a file with --features"
        )
    features = open_features(found)
    valid = torch.from_numpy(np.flatnonzero(features.valid))
    places = torch.full((len(data),), -1)
    places[torch.from_numpy(rows_of(data, features.keys, found))[valid]] = valid
    if len(valid) < 2:
        raise UsageError(f"{found}: features of fewer than two images; give at least two")
    centroids = None
    if config.objective == "soft":
        path = run / "clusters" / "clusters.h5"
        centroids = read_centroids(path)
        refuse_mismatch(features, centroids)
        inputs["centroids"] = input_hash(path)
    inputs["features"] = input_hash(features.path)
    return Known(labels, features, places, centroids, config.seed), inputs


def refuse_together(config: RetrainConfig) -> None:
    """UsageError where settings do not go together."""
    if config.labels and config.objective in OF_FEATURES:
        raise UsageError(
            f"--objective {config.objective}: learns the teacher's features, not labels; leave --labels out"
        )
    if config.labels == CLASSES and config.objective == "multi":
        raise UsageError("--objective multi: an image has one class; leave --objective out, or --labels classes")
    if config.features and config.objective not in OF_FEATURES:
        raise UsageError(f"--features: --objective {config.objective} learns labels; leave one of them out")
    if config.temperature and config.objective not in HEATED:
        raise UsageError(f"--temperature: --objective {config.objective} has none; leave it out")
    if config.uniform and config.objective not in LABELLED:
        raise UsageError(f"--uniform: --objective {config.objective} has no clusters to draw from; leave it out")


def refuse_one_label(config: RetrainConfig, data: Dataset, known: Known, rows: Tensor) -> None:
    """StageError where the images that can be read, (n,) `rows`, all have one label, and labels are what is learned."""
    if config.objective in LABELLED and len(known.labels[rows, 0].unique()) < 2:
        raise StageError(
            f"retrain: the {len(rows)} images of {data.spec} that can be read all have one label; repair the others, "
            "or label them anew"
        )


def sent(known: Known) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """What an order says of it, for `received`."""
    if known.features is None or known.places is None:
        return {"features": None}, [known.labels.numpy()]
    facts: dict[str, Any] = {"features": str(known.features.path.resolve()), "of": known.features.attributes}
    facts["centroids"] = str(known.centroids.path.resolve()) if known.centroids else None
    return facts, [known.labels.numpy(), known.places.numpy()]


def received(order: dict[str, Any], arrays: Sequence[NDArray[Any]]) -> Known:
    """The same in another process, which opens the same files.

    Raises:
        UsageError, StageError: they are not here, or others.
    """
    labels, *places = (torch.from_numpy(array) for array in arrays)
    if not order["features"]:
        return Known(labels)
    features = open_features(Path(order["features"]))
    if features.attributes != order["of"]:
        raise StageError(f"{features.path}: differs from the file that the first process reads; copy that one here")
    centroids = read_centroids(Path(order["centroids"])) if order["centroids"] else None
    return Known(labels, features, places[0], centroids, order["config"]["seed"])


def assigned(run: Path) -> bool:
    """Whether the run's pseudo-labels, of whatever images, belong to its centroids."""
    made, centroids = read_record(run, "clusters", "assign"), run / "clusters" / "clusters.h5"
    if not made or made["state"] != "done" or not centroids.is_file():
        return False
    return bool(made["inputs"]["centroids"] == input_hash(centroids))


def _labels(run: Path, config: RetrainConfig, data: Dataset) -> tuple[Tensor, str, tuple[str, ...]]:
    """(n, views) int64 labels of each row of the data, -1 where it has none; what they are, as a hash; their names."""
    if config.labels == CLASSES:
        return torch.from_numpy(data.targets.astype(np.int64))[:, None], data.fingerprint, data.classes
    path = Path(config.labels) if config.labels else run / "clusters" / "labels.csv"
    if not config.labels:
        made = done_record(run, "clusters", "assign", "assign")
        centroids = run / "clusters" / "clusters.h5"
        if centroids.is_file() and made["inputs"]["centroids"] != input_hash(centroids):
            raise UsageError(
                f"{path}: belongs to older clusters; make it again: ktransfer --run {run} assign --overwrite"
            )
    found = read_labels(path)
    read = torch.from_numpy(np.column_stack([found.labels, found.more]).astype(np.int64))
    if found.keys is None:
        if len(found.labels) != len(data):
            raise UsageError(f"{path}: {len(found.labels)} labels for {len(data)} images of {data.spec}")
        labels = read
    else:
        labels = torch.full((len(data), read.shape[1]), -1)
        labels[torch.from_numpy(rows_of(data, found.keys, path))] = read
    if len(labels[:, 0].unique()[labels[:, 0].unique() >= 0]) < 2:
        raise UsageError(f"{path}: fewer than two different labels; give at least two")
    labels[labels.min(1).values < 0] = -1
    return labels, input_hash(path), found.names
