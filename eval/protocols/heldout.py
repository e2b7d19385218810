"""What a network that learned pseudo-labels reaches on images that neither it nor the clusters have seen.

Those images get pseudo-labels as `assign` gives them, by the files of the run: the features that its teacher has of
them, read as those that were clustered, and the nearest of its centroids (also where `--balanced` labelled the
training images). Beside the network stand the share of the most frequent of these labels, which is the most that one
and the same prediction reaches, and chance.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer import networks
from ktransfer.artifacts.centroids import Centroids, nearest, read_centroids
from ktransfer.data.augment import centre_crop, stored_side
from ktransfer.data.dataset import Dataset, same_images
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.networks import teachers
from ktransfer.networks.teachers import Teacher
from ktransfer.progress import bar
from ktransfer.run import input_hash, read_record
from ktransfer.training.device import autocast
from ktransfer.training.options import MachineOptions

from ..arms import Arm
from ..config import EvalConfig
from ..learners.maps import FORWARD_BATCH
from ..learners.probe import scores

Numbers = NDArray[np.int64]


class Source(NamedTuple):
    """Where pseudo-labels of new images come from; `extracted` are the settings of the features."""

    centroids: Centroids
    teacher: Teacher
    extracted: dict[str, Any]


def clusters_path(arm: Arm, name: str) -> Path | None:
    """A file of the clusters of an arm's run, None where there is none."""
    path = arm.weights.parent.parent / "clusters" / name if arm.weights else None
    return path if path and path.is_file() else None


def find_source(arm: Arm, test: Dataset) -> Source:
    """How the pseudo-labels that the network of a run learned were made.

    Raises:
        UsageError: it is not there any more, not known, or images of `test` were learned from or clustered.
    """
    assert arm.weights is not None
    run = arm.weights.parent.parent
    records = [read_record(run, *step) for step in (("retrain",) * 2, ("clusters", "assign"), ("clusters", "cluster"))]
    labels, centroids_path = (clusters_path(arm, name) for name in ("labels.csv", "clusters.h5"))
    learned, assigned, clustered = records
    if not (learned and assigned and clustered and labels and centroids_path):
        raise UsageError("the run no longer has the clusters that they come from")
    if learned["inputs"].get("labels") != input_hash(labels):
        raise UsageError("the network did not learn the labels in clusters/labels.csv")
    if assigned["inputs"].get("centroids") != input_hash(centroids_path):
        raise UsageError("the clusters were made again after the labels")
    made = read_record(run, "features", (stem := Path(clustered["config"]["features"]).stem))
    hashes = made["outputs"].get(f"{stem}.h5", {}) if made else {}
    if not made or made["config"].get("elsewhere") or hashes.get("sha256") != clustered["inputs"]["features"]:
        raise UsageError("the features that were clustered were not made in the run, or were made again since")
    for what, step in (("network learned from", learned), ("clusters hold", made)):
        if step["inputs"].get("data") == test.fingerprint:
            raise UsageError(f"the {what} these same images")
        if shared := _shared(open_dataset(step["config"]["data"]), test):
            raise UsageError(f"the {what} {shared} of the {len(test)} test images")
    extracted, centroids = made["config"], read_centroids(centroids_path)
    if extracted["teacher"]:
        teacher = teachers.find(*(extracted[name] for name in ("teacher", "arch", "weights", "size")))
    else:
        path = run / "pretext" / "model.safetensors"
        teacher = teachers.find(str(path), None, None, extracted["size"])
    if teachers.identity(teacher) != centroids.source["teacher"]:
        raise UsageError("the run has another teacher now")
    return Source(centroids, teacher, extracted)


def _shared(data: Dataset, test: Dataset) -> int:
    """How many images of `test` are in `data`: one path ends with the other, and the pixels are equal."""
    mine, theirs = ({key: row for row, key in enumerate(split.keys)} for split in (data, test))
    pairs = {(row, theirs[end]) for key, row in mine.items() for end in _ends(key) if end in theirs}
    pairs |= {(mine[end], row) for key, row in theirs.items() for end in _ends(key) if end in mine}
    chosen = sorted(pairs)
    return len({row for (_, row), same in zip(chosen, same_images(data, test, chosen), strict=True) if same})


def _ends(key: str) -> list[str]:
    """a/b/c.png, b/c.png, c.png."""
    parts = key.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def heldout_labels(source: Source, test: Dataset, config: EvalConfig, device: torch.device) -> Numbers:
    """(n,) the nearest centroid of each image, -1 of a broken one."""
    how = source.extracted
    options = MachineOptions(precision=how["precision"])
    read = teachers.rows_reader(source.teacher, how["layer"], how.get("token"), how["pool"], how["l2"], options, device)

    def label(pixels: Tensor) -> Tensor:
        stored = read(pixels).cpu().numpy().astype(how["dtype"]).astype(np.float32)  # as the feature file rounds
        return torch.from_numpy(nearest(source.centroids, stored))

    images = ImageLoader(test, source.teacher.network.size, config.workers, cache="off", device=device)
    return _of_each(images, label, "pseudo-labels of the test set")


def predictions(arm: Arm, test: Dataset, config: EvalConfig, device: torch.device) -> Numbers:
    """(n,) the pseudo-label that the run's network predicts for the centre square of each image, -1 of a broken one."""
    assert arm.weights is not None
    network = networks.describe(arm.weights)
    model = networks.load(arm.weights, network).to(device).eval()

    def predicted(pixels: Tensor) -> Tensor:
        squares = networks.normalise(centre_crop(pixels, network.size), network.normalise)
        with autocast(config, device):
            return model(squares).argmax(1).cpu()  # type: ignore[no-any-return]

    images = ImageLoader(test, stored_side(network.size), config.workers, cache="off", device=device)
    return _of_each(images, predicted, f"predictions of {arm.name}")


def compared(labels: Numbers, predicted: Numbers, k: int) -> dict[str, dict[str, Any]]:
    """The columns of the table: of the network, of the most frequent label alone, and of chance.

    Args:
        labels, predicted: (n,) of the same images; those below 0 do not count.
        k: number of clusters.
    """
    known = (labels >= 0) & (predicted >= 0)
    wanted = torch.from_numpy(labels[known])
    constant = torch.full_like(wanted, int(torch.bincount(wanted).argmax()))
    chance = {"heldout": 1 / k, "heldout_interval": [1 / k, 1 / k]}
    columns = {"network": torch.from_numpy(predicted[known]), "most frequent label": constant}
    found = {column: scores(guesses, wanted) for column, guesses in columns.items()}
    cells = {
        column: {"k": k, "heldout": one["top1"], "heldout_interval": one["top1_interval"]}
        for column, one in found.items()
    }
    return cells | {"chance": chance}


@torch.no_grad()
def _of_each(images: ImageLoader, tell: Callable[[Tensor], Tensor], label: str) -> Numbers:
    count = len(images.dataset)
    found = np.full(count, -1, np.int64)
    with bar(count, label) as shown:
        for rows, pixels, valid, _ in images.batches(iter(torch.arange(count).split(FORWARD_BATCH))):
            if valid.any():
                found[rows[valid].numpy()] = tell(pixels[valid.to(pixels.device)]).numpy()
            shown.update(len(rows))
    return found
