"""Lloyd's k-means on all rows, streamed from the feature file (reference/kmeans.md, reference/jigsawpp.md §3)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.errors import StageError, UsageError
from ktransfer.features import Features
from ktransfer.files import write_whole
from ktransfer.progress import bar

from .engine import Engine, Pass, Rows, blocks, faiss_engine

SPLIT_STEP = 1 / 16


@dataclass(frozen=True)
class State:
    """All that is needed to go on after an iteration; the lists have one entry per iteration.

    Attributes:
        centroids: (k, d) float32, after the iteration.
        labels: (n,) int32, before it.
        objective, empties, splits, moved, seconds: as in `Clustering`.
    """

    centroids: NDArray[np.float32]
    labels: NDArray[np.int32]
    objective: list[float]
    empties: list[int]
    splits: list[int]
    moved: list[int]
    seconds: list[float]

    @property
    def converged(self) -> bool:
        """Whether another iteration would change nothing."""
        return bool(self.moved) and self.moved[-1] == 0 and self.splits[-1] == 0


@dataclass(frozen=True)
class Clustering:
    """A finished k-means.

    Attributes:
        centroids: (k, d) float32.
        counts: (k,) int64, rows whose nearest centroid it is.
        labels: (n,) int32, that centroid.
        objective: per iteration, the sum of squared distances to the centroids that the iteration *started* with.
        final_objective: the same for `centroids`; it belongs to `counts` and `labels`.
        empties: clusters without a row, per iteration.
        splits: clusters split to fill them, per iteration.
        moved: rows whose label changed, per iteration (all rows in the first).
        points_used, points_total: rows trained on, of how many.
        seconds: wall-clock per iteration.
        seed, engine, version: what made it.
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


class Findings(NamedTuple):
    """What `check_features` saw: valid rows, distinct ones among them, columns, and columns that never change."""

    rows: int
    distinct: int
    columns: int
    constant: int


def kmeans(
    rows: Rows,
    k: int,
    iterations: int = 20,
    seed: int = 0,
    on_iteration: Callable[[State], object] | None = None,
    state: State | None = None,
    engine: Engine | None = None,
    points_total: int | None = None,
) -> Clustering:
    """Lloyd's algorithm on all rows from k distinct random rows; the same arguments give the same bytes.

    It stops early when no label moved. One more pass at the end measures sizes and objective of the final centroids.

    Args:
        rows: n rows.
        k: 1 <= k <= number of distinct rows.
        iterations: at least 1.
        seed: 0 <= seed < 2**32.
        on_iteration: is given the state after each iteration, to save it.
        state: where to go on; the result is the same as without the interruption, times aside.
        engine: `faiss_engine()` when not given.
        points_total: rows that there are, when `rows` is a choice of them.

    Raises:
        UsageError: too few distinct rows, or a state of other rows or another k.
    """
    if k < 1 or iterations < 1:
        raise UsageError(f"k = {k} and iterations = {iterations} must be at least 1")
    engine = engine or faiss_engine()
    if state is None:
        state = State(start_rows(rows, k, seed), np.full(rows.count, -1, np.int32), [], [], [], [], [])
    elif state.centroids.shape != (k, rows.dim) or state.labels.shape != (rows.count,):
        raise UsageError(
            f"the saved k-means has {state.centroids.shape} centroids of {len(state.labels)} rows, "
            f"not ({k}, {rows.dim}) of {rows.count}: start again with --overwrite"
        )
    done = len(state.objective)
    with bar((iterations + 1) * rows.count, "k-means", "rows", done * rows.count) as shown:
        while len(state.objective) < iterations and not state.converged:
            state = _iterate(rows, state, engine, shown.update)
            shown.set_postfix(iteration=len(state.objective), objective=f"{state.objective[-1]:.6g}", refresh=False)
            if on_iteration:
                on_iteration(state)
        last = engine.scan(rows, state.centroids, shown.update)
    return Clustering(
        centroids=state.centroids,
        counts=last.counts,
        labels=last.labels,
        objective=state.objective,
        final_objective=float(last.distances.sum(dtype=np.float64)),
        empties=state.empties,
        splits=state.splits,
        moved=state.moved,
        points_used=rows.count,
        points_total=rows.count if points_total is None else points_total,
        seconds=state.seconds,
        seed=seed,
        engine=engine.name,
        version=engine.version,
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


def start_rows(rows: Rows, k: int, seed: int) -> NDArray[np.float32]:
    """(k, d) float32: the first k rows of different content in a random order of all rows.

    Raises:
        UsageError: there are not so many.
    """
    high, low = rng.words(seed, "cluster/start", 0, torch.arange(rows.count), 2).unbind(1)
    chosen: dict[bytes, NDArray[np.float32]] = {}
    for row in ((high << 31) ^ low).argsort(stable=True).tolist():
        # + 0.0 turns -0.0 into 0.0, the same point with other bytes.
        content = rows.read(row, row + 1)[0] + np.float32(0)
        chosen.setdefault(blake2b(content.tobytes(), digest_size=16).digest(), content)
        if len(chosen) == k:
            return np.stack(list(chosen.values()))
    raise UsageError(f"k = {k}, but only {len(chosen)} distinct rows: take a smaller --k")


def check_features(features: Features, k: int) -> Findings:
    """Find what would spoil a clustering, in one pass over the valid rows.

    Raises:
        UsageError: no valid row, NaN or infinity in one, or fewer than k distinct rows.
    """
    places = np.flatnonzero(features.valid)
    if not len(places):
        raise UsageError(f"{features.path}: not one picture is valid; see the broken pictures that extract listed")
    columns = features.rows.shape[1]
    first = np.asarray(features.rows[places[0]])
    constant = np.ones(columns, bool)
    digests: list[bytes] = []
    broken: list[int] = []
    with bar(len(places), "check features", "rows") as shown:
        for start, stop in blocks(len(places), columns):
            block = features.rows[places[start:stop]]
            broken.extend(places[start:stop][~np.isfinite(block).all(axis=1)].tolist())
            constant &= (block == first).all(axis=0)
            digests.extend(blake2b(row.tobytes(), digest_size=8).digest() for row in block + block.dtype.type(0))
            shown.update(stop - start)
    if broken:
        names = ", ".join(repr(features.keys[row]) for row in broken[:3])
        raise UsageError(
            f"{features.path}: {len(broken)} rows hold NaN or infinity, first {names}: "
            "extract the features again, with --dtype float32 if that does not help"
        )
    distinct = len(np.unique(np.frombuffer(b"".join(digests), np.uint64)))
    if distinct < k:
        raise UsageError(f"k = {k}, but only {distinct} of the {len(places)} rows are distinct: take a smaller --k")
    return Findings(len(places), distinct, columns, int(constant.sum()))


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
            curves: dict[str, Any] = {name: saved[name].tolist() for name in ("objective", "seconds")}
            curves |= {name: [int(value) for value in saved[name]] for name in ("empties", "splits", "moved")}
            return State(saved["centroids"], saved["labels"], **curves)
    except Exception as error:
        # numpy and zipfile raise a dozen kinds for a damaged file.
        raise StageError(f"{path}: not a saved k-means: start again with --overwrite") from error


def _iterate(rows: Rows, state: State, engine: Engine, tick: Callable[[int], object]) -> State:
    began = time.perf_counter()
    found = engine.scan(rows, state.centroids, tick)
    empty = found.counts == 0
    means = found.sums / np.maximum(found.counts, 1)[:, None]
    centroids = np.where(empty[:, None], state.centroids, means).astype(np.float32)
    splits = _split(rows, centroids, found, np.flatnonzero(empty))
    return replace(
        state,
        centroids=centroids,
        labels=found.labels,
        objective=[*state.objective, float(found.distances.sum(dtype=np.float64))],
        empties=[*state.empties, int(empty.sum())],
        splits=[*state.splits, splits],
        moved=[*state.moved, int((found.labels != state.labels).sum())],
        seconds=[*state.seconds, time.perf_counter() - began],
    )


def _split(rows: Rows, centroids: NDArray[np.float32], found: Pass, empty: NDArray[np.int64]) -> int:
    """Give each empty cluster half of the heaviest one, in place; how many were filled.

    As in faiss, the two halves start a small step to either side of the old centroid. The step points to the cluster's
    farthest row that was not used so far, so that both sides hold rows whatever the scale, offset or shape of the data.
    A cluster split j times weighs count / (j + 1); ties go to the lowest index. A cluster whose rows are all alike
    cannot be split; when no other is left, the empty centroid stays where it was.
    """
    left = found.distances.copy()
    weights = found.counts.astype(np.float64)
    pieces = np.ones(len(weights))
    filled = 0
    for target in empty.tolist():
        while weights.max() > 0:
            heaviest = int(weights.argmax())
            members = np.flatnonzero(found.labels == heaviest)
            far = int(members[left[members].argmax()])
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
