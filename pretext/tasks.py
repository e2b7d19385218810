"""The tasks by name: what each makes of a batch of images, and what the stage has to know about it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ktransfer.errors import UsageError
from ktransfer.training.batch import Batch

from . import permutations as perms
from .config import PretextConfig
from .context import PLACES, ContextConfig, Pairs, make_pairs
from .preview import pair_sheet, puzzle_sheet, rotation_sheet
from .puzzles import PUZZLES, SLOTS, PuzzleConfig, Puzzles, make_puzzles
from .rotation import TURNS, RotationConfig, Rotations, make_rotations

CPU = torch.device("cpu")

_OF_PUZZLES = ("tile", "colour", "permutations", "min_distance", "permutation_file")
SETTINGS = {"jigsawpp": _OF_PUZZLES, "jigsaw": _OF_PUZZLES, "rotation": ("tile",), "context": ("tile", "colour")}
"""Task -> those of its settings that not every task has."""

SHEETS = {"jigsawpp": "puzzles.png", "jigsaw": "puzzles.png", "rotation": "rotation.png", "context": "context.png"}
"""Task -> the file that shows what the network sees."""

_CONTEXT_COLOURS = {"paper": "dropped", "projected": "projected"}


class Examples(Protocol):
    """What a task makes of a batch: n examples."""

    @property
    def tiles(self) -> Tensor:
        """(n, tiles, 3, side, side) float32, as the network sees them."""

    @property
    def label(self) -> Tensor:
        """(n,) int64."""


@dataclass(frozen=True)
class Task:
    """What the stage has to know about a task.

    Attributes:
        noun: what it makes of images, in the plural.
        make: a batch -> examples, on its device; a broken image makes none.
        sheet: examples -> an image of them with their solutions.
        group: examples -> (n,) int64, by which held-out accuracy is listed, and `groups` how such a number is written.
        classes: number of labels.
        tiles: tiles of an example, which the head sees together.
        side: of a tile, in pixels.
        stride: that of an AlexNet's conv1.
        normalise: how pixels are normalised (`networks.normalise`).
        following: images that a batch has beyond its own, in the order of the epoch.
        inputs: name -> SHA-256 of what it reads besides the images.
    """

    noun: str
    make: Callable[[Batch], Examples]
    sheet: Callable[[Any], Image.Image]
    group: Callable[[Any], Tensor]
    groups: str
    classes: int
    tiles: int
    side: int
    stride: int = 2
    normalise: str = "picture"
    following: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)


def open_task(config: PretextConfig, device: torch.device = CPU) -> Task:
    """The task that the settings, with `size` resolved, name; its batches will be on `device`.

    Raises:
        UsageError: the settings do not go together, or the permutations cannot be made or read.
    """
    return {"rotation": _open_rotation, "context": _open_context}.get(config.task, _open_puzzles)(config, device)


def refuse_foreign(task: str, given: Mapping[str, Any]) -> None:
    """Refuse options that the task does not have.

    Raises:
        UsageError: names the setting and the tasks that have it.
    """
    for key, value in given.items():
        name = key.replace("-", "_")
        having = [other for other, names in SETTINGS.items() if name in names]
        if value is not None and having and task not in having:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: --task {task} has no such option (only {', '.join(having)}); "
                "leave it out"
            )


def usual_size(task: str, short_side: int) -> int:
    """The side of the images where none is given: the papers', or what they have if less, for puzzles in cells."""
    return min(255, short_side // 3 * 3) if task in ("jigsawpp", "jigsaw") else min(256, short_side)


def _open_puzzles(config: PretextConfig, device: torch.device) -> Task:
    if (config.task, config.colour) not in PUZZLES:
        raise UsageError(f"--colour {config.colour}: --task {config.task} takes paper or released")
    puzzle = replace(PUZZLES[config.task, config.colour], tile=config.tile)
    _, side, _ = puzzle.geometry(config.size)

    @cache
    def permutations() -> Tensor:
        return _permutations(config).to(device)

    count, digest = config.permutations, perms.DEFAULT_SHA256
    if config.permutation_file or (count, config.min_distance) != perms.DEFAULT:
        count = len(permutations())
        digest = hashlib.sha256(perms.to_bytes(permutations().cpu().numpy())).hexdigest()
    return Task(
        noun="puzzles",
        make=partial(_puzzles, permutations=permutations, puzzle=puzzle, seed=config.seed),
        sheet=puzzle_sheet,
        group=lambda puzzles: puzzles.occluded.sum(1),
        groups="{}_occluded",
        classes=count,
        tiles=SLOTS,
        side=side,
        following=1,
        inputs={"permutations": digest},
    )


def _open_rotation(config: PretextConfig, device: torch.device) -> Task:
    rotation = RotationConfig(config.tile)
    return Task(
        noun="rotations",
        make=partial(_rotations, rotation=rotation, seed=config.seed),
        sheet=rotation_sheet,
        group=lambda rotations: 90 * rotations.label,
        groups="{}_degrees",
        classes=TURNS,
        tiles=1,
        side=rotation.side(config.size),
        stride=4,
        normalise="imagenet",
    )


def _open_context(config: PretextConfig, device: torch.device) -> Task:
    if config.colour not in _CONTEXT_COLOURS:
        raise UsageError(f"--colour {config.colour}: --task context takes {' or '.join(_CONTEXT_COLOURS)}")
    context = ContextConfig(config.tile, _CONTEXT_COLOURS[config.colour])
    return Task(
        noun="pairs",
        make=partial(_pairs, context=context, seed=config.seed),
        sheet=pair_sheet,
        group=lambda pairs: pairs.label,
        groups="place_{}",
        classes=len(PLACES),
        tiles=2,
        side=context.geometry(config.size)[0],
    )


def _puzzles(batch: Batch, permutations: Callable[[], Tensor], puzzle: PuzzleConfig, seed: int) -> Puzzles:
    """Puzzles of all but the last image; each takes its foreign tiles from the one that follows it.

    A broken image makes no puzzle, and lends no tiles. The usual permutations are chosen at the first batch, as that
    takes most of a second, and a plan needs none.
    """
    kept = slice(None) if batch.whole else batch.valid[:-1]
    return make_puzzles(
        batch.pixels[:-1][kept],
        batch.pixels[1:][kept],
        batch.rows[:-1][kept],
        batch.valid[1:][kept],
        permutations(),
        puzzle,
        seed,
        batch.epoch,
    )


def _rotations(batch: Batch, rotation: RotationConfig, seed: int) -> Rotations:
    return make_rotations(batch.pixels[batch.kept], batch.rows[batch.kept], rotation, seed, batch.epoch)


def _pairs(batch: Batch, context: ContextConfig, seed: int) -> Pairs:
    return make_pairs(batch.pixels[batch.kept], batch.rows[batch.kept], context, seed, batch.epoch)


def _permutations(config: PretextConfig) -> Tensor:
    """(n, 9) int64, those of the file or generated."""
    if not config.permutation_file:
        return torch.from_numpy(_generated(config.permutations, config.min_distance)).to(torch.int64)
    found = torch.from_numpy(perms.from_file(Path(config.permutation_file))).to(torch.int64)
    if found.shape[1] != SLOTS or len(found) < 2:
        raise UsageError(
            f"--permutation-file {config.permutation_file}: holds {len(found)} permutations of {found.shape[1]} tiles; "
            f"a puzzle needs at least 2 of {SLOTS}"
        )
    return found


_generated = lru_cache(perms.generate)  # a second each time, and the checks ask for it too
