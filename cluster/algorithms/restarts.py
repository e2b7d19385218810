"""Several starts, of which the best clustering is kept; killed anywhere and started again, the same bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.progress import say

from ..engines.engine import Rows
from .lloyd import Clustering, State, first_state, load_state, save_state

Start = Callable[[int], NDArray[np.float32]]


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of an attempt; that of the first is `seed` itself."""
    return seed if attempt == 0 else int(rng.words(seed, "cluster/redo", 0, torch.tensor([attempt]), 1).item())


def best_of(
    redo: int,
    rows: Rows,
    start: Start,
    lloyd: Callable[..., Clustering],
    seed: int,
    work: Path,
    name: str = "kmeans",
    spherical: bool = False,
) -> Clustering:
    """The clustering of least final objective among `redo` starts, the first of those equally good.

    Args:
        redo: at least 1.
        rows: n rows.
        start: seed -> (k, d) centroids to begin with.
        lloyd: `kmeans` with all settings but seed, state and on_iteration; it must be as `spherical` as this.
        seed: 0 <= seed < 2**32; the other attempts' seeds are derived from it.
        work: a folder for NAME.npz, the running attempt, its start included, and NAME-best.npz, the end of the best
            attempt so far. They must belong to the same rows and settings.

    Raises:
        UsageError: by `start` or `lloyd`.
        StageError: a damaged state.
    """
    running, ended = work / f"{name}.npz", work / f"{name}-best.npz"
    state = load_state(running) if running.is_file() else None
    attempts, passes = (state.attempts, state.passes) if state else ([], 0)
    best, won = None, 0
    if attempts:
        end = load_state(ended)
        won = len(end.attempts)
        # Killed between the two savings below, the best is the running attempt, whose end is found again.
        if won < len(attempts):
            best = lloyd(seed=attempt_seed(seed, won), state=end)
    for attempt in range(len(attempts), redo):
        derived = attempt_seed(seed, attempt)
        if state is None:
            state = replace(first_state(rows, start(derived), spherical), attempts=attempts, passes=passes)
            save_state(running, state)
        latest = state

        def keep(reached: State) -> None:
            nonlocal latest
            latest = reached
            save_state(running, reached)

        found = lloyd(seed=derived, state=state, on_iteration=keep)
        if redo > 1:
            say(f"k-means: start {attempt + 1} of {redo} reached the objective {found.final_objective:.8g}")
        if best is None or found.final_objective < best.final_objective:
            best, won = found, attempt
            if attempt + 1 < redo:
                save_state(ended, latest)
        attempts, passes, state = found.attempts, found.passes, None
    assert best is not None
    return replace(best, seed=seed, attempts=attempts, attempt=won, passes=passes)
