"""Which images a network finds similar: the nearest neighbours of test images among those of the training split.

Protocol `retrieve/1`. Features: maps averaged to `--grid` x `--grid`, layer by layer; exact cosine similarity, of equal
ones the first. Every test image is a query for the scores: the mean share of its 1, 5 and 10 nearest with its class.
`--queries` are drawn with their ten nearest, a sheet for each network and layer; a green frame marks the query's class.

Nothing is learned or chosen. Intervals: Wilson's at 1, normal over the queries at 5 and 10.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.config import nearest
from ktransfer.data.dataset import Dataset
from ktransfer.data.enough import TRAIN, need
from ktransfer.data.loader import ImageLoader
from ktransfer.data.sheets import SIDE, Strip, draw_sheet, save_sheet
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.progress import bar

from ..arms import Arm
from ..config import EvalConfig
from ..enough import labelled
from ..intervals import mean_of, share_of
from ..learners.frozen import check_frozen, evaluate_layers, labels_of
from ..learners.maps import Frozen, Layer
from ..learners.neighbours import Neighbours, search
from ..result import Result

PROTOCOL = "retrieve/1"
TITLE = "retrieval"
MEASURES = {"at1": "precision at 1 %", "at5": "precision at 5 %", "at10": "precision at 10 %"}
SHOWN = 10


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong layers and queries, too few images, and how much disk the features need.

    Raises:
        UsageError: one line.
    """
    check_frozen(evaluated, splits, config, run)
    wanted_rows(config, splits[1])
    if len(splits[0]) < SHOWN:
        raise UsageError(
            f"--protocol retrieve: {len(splits[0])} training images, but {SHOWN} are needed; give more images"
        )


def enough(splits: tuple[Dataset, Dataset], config: EvalConfig) -> None:
    """Find images that cannot be read, where too few are left.

    Raises:
        UsageError: one line.
    """
    labelled(splits, config)
    need(splits[0], range(len(splits[0])), SHOWN, TRAIN)


def wanted_rows(config: EvalConfig, test: Dataset) -> list[int]:
    """The rows of the images that `--queries` names, or all of them in a seeded order where it is a number.

    Raises:
        UsageError: a key is not there, or the number is not above 0.
    """
    if config.queries.strip().isdecimal() and int(config.queries) > 0:
        words = rng.words(config.seed, "eval/queries", 0, torch.arange(len(test)), 1)[:, 0]
        return [int(row) for row in words.argsort(stable=True)]
    place = {key: row for row, key in enumerate(test.keys)}
    wanted = [key.strip() for key in config.queries.split(",")]
    for key in wanted:
        if key not in place:
            raise UsageError(
                f"--queries {key or config.queries!r}: neither a number above 0 nor a test image; "
                f"{nearest(key, list(test.keys)[:10_000]) if len(test) < 20 else f'such as {test.keys[0]}'}"
            )
    return [place[key] for key in wanted]


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Evaluate one network, layer by layer, and draw its sheets into the protocol's folder."""
    drawn: list[str] = []
    home = folder.parent.with_name("retrieve")
    found = evaluate_layers(arm, splits, config, folder, device, partial(_of_layer, arm.name, splits, config, home))
    drawn = [f"{arm.name}-{layer}.png" for layer in found["scores"]]
    return {**found, "files": drawn}


def _of_layer(
    arm: str,
    splits: tuple[Dataset, Dataset],
    config: EvalConfig,
    home: Path,
    train: Frozen,
    test: Frozen,
    layer: Layer,
) -> dict[str, Any]:
    """One cell of the table; its sheet is drawn."""
    references, classes = train.layer(layer), labels_of(train)
    with bar(len(references), f"neighbours of {arm}, {layer.name}") as shown:
        found = search(
            test.layer(layer), lambda start, stop: references[start:stop], len(references), SHOWN, shown.update
        )
    alike = classes[found.places] == labels_of(test)[:, None]
    _draw(home / f"{arm}-{layer.name}.png", splits, config, train, test, found, alike)
    return precisions(alike)


def precisions(alike: NDArray[np.bool_]) -> dict[str, Any]:
    """Mean precision at 1, 5 and 10 of (q, 10) neighbours, nearest first, whether they have the query's class."""
    cell = share_of("at1", alike[:, 0])
    for count in (5, SHOWN):
        cell |= mean_of(f"at{count}", alike[:, :count].mean(axis=1))
    return cell


def _draw(
    path: Path,
    splits: tuple[Dataset, Dataset],
    config: EvalConfig,
    train: Frozen,
    test: Frozen,
    found: Neighbours,
    alike: NDArray[np.bool_],
) -> None:
    """A row for each query: itself, then its nearest."""
    gallery, tested = splits
    wanted = wanted_rows(config, tested)
    if config.queries.strip().isdecimal():
        wanted = [row for row in wanted if test.features.valid[row]][: int(config.queries)]
    of_gallery = np.flatnonzero(train.features.valid)
    place = {int(row): at for at, row in enumerate(np.flatnonzero(test.features.valid))}
    asked, predictions = (ImageLoader(split, SIDE, config.workers, cache="off") for split in (tested, gallery))
    strips = []
    for row in wanted:
        if row not in place:
            raise StageError(f"--queries {tested.keys[row]}: this image cannot be read; name others")
        at = place[row]
        mine, mine_valid = asked.batch(torch.tensor([row]))
        theirs, theirs_valid = predictions.batch(torch.from_numpy(of_gallery[found.places[at]]))
        strips.append(
            Strip(
                f"{tested.keys[row]}: {int(alike[at].sum())} of {SHOWN} of class {tested.classes[tested.targets[row]]}",
                torch.cat([mine, theirs]).numpy(),
                torch.cat([mine_valid, theirs_valid]).numpy(),
                np.concatenate([[False], alike[at]]),
            )
        )
    save_sheet(path, draw_sheet(strips, SHOWN + 1))
