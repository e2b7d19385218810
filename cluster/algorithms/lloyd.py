"""Lloyd's k-means on all rows, streamed from the feature file (docs/papers.md)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktransfer.errors import StageError, UsageError
from ktransfer.files import write_whole
from ktransfer.progress import bar, say

from ..engines.engine import Engine, Pass, Rows, faiss_engine
from .initialisation import random_rows, take

SPLIT_STEP = 1 / 16


@dataclass(frozen=True)
class State:
    """All that is needed to go on after an iteration; the lists have one entry per iteration.

    Attributes:
        centroids: (k, d) float32, after the iteration.
        labels: (n,) int32, before it.
        objective, empties, splits, moved, seconds: as in `Clustering`.
        attempts: as in `Clustering`, of the attempts before this one (restarts.py).
        passes: over all rows, in those attempts.
    """

    centroids: NDArray[np.float32]
    labels: NDArray[np.int32]
    objective: list[float]
    empties: list[int]
    splits: list[int]
    moved: list[int]
    seconds: list[float]
    attempts: list[float] = field(default_factory=list)
    passes: int = 0

    @property
    def converged(self) -> bool:
        """Whether another iteration would change nothing."""
        return bool(self.moved) and self.moved[-1] == 0 and self.splits[-1] == 0


@dataclass(frozen=True)
class Clustering:
    """A finished k-means.

    Attributes:
        centroids: (k, d) float32; fewer than k where `dissolved`.
        counts: (k,) int64, rows whose nearest centroid it is.
        labels: (n,) int32, that centroid.
        objective: per iteration, the (weighted) sum of squared distances to the centroids that it *started* with.
        final_objective: the same for `centroids`; it belongs to `counts` and `labels`.
        empties: clusters without a row, per iteration.
        splits: clusters split to fill them, or those below the least size, per iteration.
        moved: rows whose label changed, per iteration (all rows in the first).
        points_used, points_total: rows trained on, of how many.
        seconds: wall-clock per iteration.
        seed, engine, version: what made it.
        dissolved: clusters below the least size that were given up at the end.
        spherical: whether centroids have length 1.
        passes: over all rows, in all attempts together, their starts aside.
        start: what it started from, in the words of whoever chose it.
        attempts: the final objective of each start that was tried; this clustering's is the least.
        attempt: which of them this clustering is.
    """

    centroids: NDArray[np.float32]
    counts: NDArray[np.int64]
    labels: NDArray[np.int32]
    objective: list[float]
    final_objective: float
    empties: list[int]
    splits: list[int]
    moved: list[int]
    points_used: int
    points_total: int
    seconds: list[float]
    seed: int
    engine: str
    version: str
    dissolved: int = 0
    spherical: bool = False
    passes: int = 0
    start: str = "random"
    attempts: list[float] = field(default_factory=list)
    attempt: int = 0

    @property
    def bytes_read(self) -> int:
        """4 n d, the rows as float32, for each pass."""
        return int(4 * self.passes * self.points_used * self.centroids.shape[1])


def kmeans(
    rows: Rows,
    k: int,
    iterations: int = 20,
    seed: int = 0,
    on_iteration: Callable[[State], object] | None = None,
    state: State | None = None,
    engine: Engine | None = None,
    points_total: int | None = None,
    start: NDArray[np.float32] | None = None,
    min_size: int = 0,
    spherical: bool = False,
) -> Clustering:
    """Lloyd's algorithm on all rows; the same arguments give the same bytes.

    It stops early when no label moved. One more pass at the end measures sizes and objective of the final centroids.

    With `min_size`, each iteration treats smaller clusters as if they were empty, as long as others can be split into
    parts of that size. What is still too small at the end is dissolved, the smallest first: its centroid is dropped and
    its rows go to the next nearest. So fewer than k clusters may remain, none of them too small.

    Args:
        rows: n rows.
        k: 1 <= k <= number of distinct rows.
        iterations: at least 1.
        seed: 0 <= seed < 2**32.
        on_iteration: is given the state after each iteration, to save it.
        state: where to go on; the result is the same as without the interruption, times aside.
        engine: `faiss_engine()` when not given.
        points_total: rows that there are, when `rows` is a choice of them.
        start: (k, d) centroids to begin with; k distinct random rows when not given.
        min_size: rows that each cluster holds at least; k * min_size <= n.
        spherical: centroids are scaled to length 1 after each iteration (Dhillon and Modha, "Concept decompositions for
            large sparse text data using clustering", 2001). For rows of length 1 the nearest is then the one of the
            largest cosine, and the objective twice the sum of 1 - cosine. A mean of zero has no direction: the centroid
            stays what it was.

    Raises:
        UsageError: too few distinct rows, too many clusters for `min_size`, or a state of other rows or another k.
    """
    if k < 1 or iterations < 1:
        raise UsageError(f"k = {k} and iterations = {iterations} must be at least 1")
    refuse_sizes(k, min_size, rows.count)
    engine = engine or faiss_engine()
    if state is None:
        state = first_state(rows, random_rows(rows, k, seed) if start is None else start, spherical)
    elif state.centroids.shape != (k, rows.dim) or state.labels.shape != (rows.count,):
        raise UsageError(
            f"the saved k-means has {state.centroids.shape} centroids of {len(state.labels)} rows, "
            f"not ({k}, {rows.dim}) of {rows.count}: start again with --overwrite"
        )
    done = len(state.objective)
    with bar((iterations + 1) * rows.count, "k-means", "rows", done * rows.count) as shown:
        while len(state.objective) < iterations and not state.converged:
            state = _iterate(rows, state, engine, shown.update, min_size, spherical)
            shown.set_postfix(iteration=len(state.objective), objective=f"{state.objective[-1]:.6g}", refresh=False)
            if on_iteration:
                on_iteration(state)
        centroids, last, passes = _dissolve(rows, state.centroids, engine, shown.update, min_size)
    final = _objective(rows, last)
    return Clustering(
        centroids=centroids,
        counts=last.counts,
        labels=last.labels,
        objective=state.objective,
        final_objective=final,
        empties=state.empties,
        splits=state.splits,
        moved=state.moved,
        points_used=rows.count,
        points_total=rows.count if points_total is None else points_total,
        seconds=state.seconds,
        seed=seed,
        engine=engine.name,
        version=engine.version,
        dissolved=k - len(centroids),
        spherical=spherical,
        passes=state.passes + len(state.objective) + passes,
        attempts=[*state.attempts, final],
        attempt=len(state.attempts),
    )


def first_state(rows: Rows, start: NDArray[np.float32], spherical: bool = False) -> State:
    """The state before the first iteration."""
    centroids = _unit(start.astype(np.float64), start) if spherical else start
    return State(centroids, np.full(rows.count, -1, np.int32), [], [], [], [], [])


def refuse_sizes(k: int, min_size: int, rows: int) -> None:
    """UsageError where k clusters of `min_size` rows need more rows than there are."""
    if k * min_size > rows:
        raise UsageError(
            f"--min-size {min_size}: {k} clusters of that size need {k * min_size} rows, there are {rows}; "
            "give a smaller --k or --min-size"
        )


def assign_rows(
    rows: Rows, centroids: NDArray[np.float32], engine: Engine | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The nearest centroid of each row, the lowest index where several are equally near (to 1 part in 10^12).

    Returns:
        labels (n,) int32 and squared Euclidean distances (n,) float32.

    Raises:
        UsageError: rows and centroids differ in length.
    """
    if rows.dim != centroids.shape[1]:
        raise UsageError(f"rows of {rows.dim} numbers cannot be assigned to centroids of {centroids.shape[1]}")
    with bar(rows.count, "assign", "rows") as shown:
        found = (engine or faiss_engine()).scan(rows, centroids, shown.update)
    return found.labels, found.distances


def save_state(path: Path, state: State) -> None:
    """Write a state as .npz without pickle, whole or not at all."""

    def write(part: Path) -> None:
        with part.open("wb") as handle:
            arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(state).items()}
            np.savez(handle, **arrays)

    write_whole(path, write)


def load_state(path: Path) -> State:
    """Read what `save_state` wrote.

    Raises:
        StageError: the file is not such a state.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            curves: dict[str, Any] = {name: saved[name].tolist() for name in ("objective", "seconds", "attempts")}
            curves |= {name: [int(value) for value in saved[name]] for name in ("empties", "splits", "moved")}
            return State(saved["centroids"], saved["labels"], **curves, passes=int(saved["passes"]))
    except Exception as error:
        # numpy and zipfile raise a dozen kinds for a damaged file.
        raise StageError(f"{path}: not a saved k-means: start again with --overwrite") from error


def _iterate(
    rows: Rows,
    state: State,
    engine: Engine,
    tick: Callable[[int], object],
    min_size: int = 0,
    spherical: bool = False,
) -> State:
    began = time.perf_counter()
    found = engine.scan(rows, state.centroids, tick)
    empty = found.counts == 0
    weights = found.counts if rows.weights is None else np.bincount(found.labels, rows.weights, len(empty))
    means = found.sums  # in place: it is as large as two sets of centroids
    means /= np.where(empty, 1, weights)[:, None]
    centroids = _unit(means, state.centroids) if spherical else means.astype(np.float32)
    centroids[empty] = state.centroids[empty]
    splits = split_clusters(rows, centroids, found, np.flatnonzero(found.counts < max(min_size, 1)), min_size)
    if spherical and splits:
        centroids = _unit(centroids.astype(np.float64), centroids)
    return replace(
        state,
        centroids=centroids,
        labels=found.labels,
        objective=[*state.objective, _objective(rows, found)],
        empties=[*state.empties, int(empty.sum())],
        splits=[*state.splits, splits],
        moved=[*state.moved, int((found.labels != state.labels).sum())],
        seconds=[*state.seconds, time.perf_counter() - began],
    )


def _objective(rows: Rows, found: Pass) -> float:
    if rows.weights is None:
        return float(found.distances.sum(dtype=np.float64))
    return float(found.distances @ rows.weights)


def _unit(means: NDArray[np.float64], previous: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k, d) float32: the means scaled to length 1, the previous centroid where a mean is zero."""
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = np.where(lengths > 0, means / np.where(lengths > 0, lengths, 1), previous).astype(
        np.float32
    )
    return scaled


def _dissolve(
    rows: Rows, centroids: NDArray[np.float32], engine: Engine, tick: Callable[[int], object], min_size: int
) -> tuple[NDArray[np.float32], Pass, int]:
    """The centroids without those whose clusters stay below `min_size`, the pass that shows it, and passes made."""
    passes = 1
    found = engine.scan(rows, centroids, tick)
    # At least one goes each time, and the last one holds all rows.
    while found.counts.min() < min_size:
        kept = _large_enough(rows, centroids, found, min_size)
        say(f"k-means: {int((~kept).sum())} clusters below {min_size} rows dissolved, {int(kept.sum())} remain")
        centroids = centroids[kept]
        found = engine.scan(rows, centroids, tick)
        passes += 1
    return centroids, found, passes


def _large_enough(rows: Rows, centroids: NDArray[np.float32], found: Pass, min_size: int) -> NDArray[np.bool_]:
    """(k,) bool: which clusters remain, after the smallest (the first of them) was dissolved again and again.

    Only the rows of dissolved clusters change, so only they are read.
    """
    labels, counts = found.labels.copy(), found.counts.copy()
    wide = centroids.astype(np.float64)
    origin = wide.mean(axis=0)
    wide -= origin
    lengths = np.einsum("ij,ij->i", wide, wide)
    kept = np.ones(len(counts), bool)
    while counts[kept].min() < min_size:
        smallest = int(np.where(kept, counts, rows.count + 1).argmin())
        kept[smallest] = False
        counts[smallest] = 0
        members = np.flatnonzero(labels == smallest)
        if len(members):
            scores = lengths - 2 * (take(rows, members) - origin) @ wide.T
            labels[members] = np.where(kept, scores, np.inf).argmin(axis=1)
            counts += np.bincount(labels[members], minlength=len(counts))
    return kept


def split_clusters(
    rows: Rows, centroids: NDArray[np.float32], found: Pass, empty: NDArray[np.int64], min_size: int = 0
) -> int:
    """Give each empty (or too small) cluster half of the heaviest one, in place; how many were filled.

    As in faiss, the two halves start a small step to either side of the old centroid. The step points to the cluster's
    farthest row that was not used so far, so that both sides hold rows whatever the scale, offset or shape of the data;
    with `min_size` to the row of that rank, as a few that lie far out must not make a cluster.
    A cluster split j times weighs count / (j + 1); ties go to the lowest index. A cluster whose rows are all alike, or
    whose parts would be below `min_size`, cannot be split; when no other is left, the empty centroid stays as it was.
    """
    left = found.distances.copy()
    weights = found.counts.astype(np.float64)
    pieces = np.ones(len(weights))
    filled = 0
    for target in empty.tolist():
        while weights.max() > 0:
            heaviest = int(weights.argmax())
            if found.counts[heaviest] < min_size * (pieces[heaviest] + 1):
                weights[heaviest] = 0
                continue
            members = np.flatnonzero(found.labels == heaviest)
            far = int(members[(-left[members]).argsort(kind="stable")[max(min_size, 1) - 1]])
            step = np.float32(SPLIT_STEP) * (rows.read(far, far + 1)[0] - centroids[heaviest])
            if left[far] == 0 or not step.any():
                weights[heaviest] = 0
                continue
            left[far] = 0
            centroids[target] = centroids[heaviest] + step
            centroids[heaviest] -= step
            pieces[heaviest] += 1
            weights[heaviest] = found.counts[heaviest] / pieces[heaviest]
            filled += 1
            break
    return filled
