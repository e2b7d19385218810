"""k-means in two levels, for a k of 100,000 and more: coarse groups first, then clusters within each.

An iteration of flat k-means costs 2 n d k operations. About sqrt(k) groups of all rows, and then about sqrt(k) clusters
in each, cost 2 n d sqrt(k) an iteration on either level: 316 times less at k = 100,000. What is given up: a centroid
sees only the rows of its group until the last pass, which gives every row the nearest of all k centroids, exactly, and
costs the 2 n d k of one flat iteration (less by the bounds of the exact engine).
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktransfer.errors import UsageError
from ktransfer.progress import bar, say

from ..engines.engine import Engine, Rows, blocks, described, faiss_engine
from ..feature_check import row_digests
from .lloyd import Clustering, State, kmeans, load_state, save_state

CURVES = ("objective", "empties", "splits", "moved", "seconds")
GATHERED = 2**26  # numbers of the groups that are in memory at a time: 256 MiB of float32


def two_level(
    rows: Rows,
    k: int,
    iterations: int = 20,
    seed: int = 0,
    work: Path | None = None,
    name: str = "kmeans",
    engine: Engine | None = None,
    points_total: int | None = None,
    refine: int = 0,
    parts: Engine | None = None,
) -> Clustering:
    """k-means into round(sqrt(k)) groups, then k-means in each; the same arguments give the same bytes.

    A group's share of k follows its size (Webster's method); it is at least 1 and at most the number of its distinct
    rows. The curves of the result are those of the coarse k-means, then the sums over all groups (one that stopped
    early counts with its last value), then those of `refine`.

    Args:
        rows: n rows.
        k: 1 <= k <= number of distinct rows.
        iterations: at most so many on either level.
        seed: 0 <= seed < 2**32.
        work: a folder for NAME-coarse.npz, NAME-group-G.npz and NAME-refine.npz, the states of each k-means; what is
            found there is not computed again. They must belong to the same rows and settings.
        engine: for passes over all rows; `faiss_engine()` when not given.
        points_total: rows that there are, when `rows` is a choice of them.
        refine: iterations of flat k-means at the end, 2 n d k operations each.
        parts: the engine of the groups; `faiss_engine()` when not given.

    Raises:
        UsageError: too few distinct rows, or states of other rows or another k.
        StageError: a damaged state.
    """
    if k < 1 or iterations < 1:
        raise UsageError(f"k = {k} and iterations = {iterations} must be at least 1")
    engine, parts = engine or faiss_engine(), parts or faiss_engine()
    groups = round(math.sqrt(k))
    coarse = _lloyd(rows, groups, iterations, seed, work and work / f"{name}-coarse.npz", engine)
    shares = share_out(k, coarse.counts.tolist(), distinct_rows(rows, coarse.labels, groups).tolist())
    say(f"k-means: {groups} groups of {min(coarse.counts)} to {max(coarse.counts)} rows; now {k} clusters in them")
    fine = _clusters_in_groups(rows, coarse.labels, shares, iterations, seed, work and work / f"{name}-group", parts)
    start = np.concatenate([state.centroids for state in fine])
    curves: dict[str, Any] = {
        name: getattr(coarse, name) + _summed([getattr(state, name) for state in fine]) for name in CURVES
    }
    if refine:
        found = _lloyd(rows, k, refine, seed, work and work / f"{name}-refine.npz", engine, start)
        found = replace(found, **{name: curves[name] + getattr(found, name) for name in CURVES})
    else:
        state = State(start, np.full(rows.count, -1, np.int32), **curves)
        found = kmeans(rows, k, len(curves["objective"]), seed, state=state, engine=engine)  # its last pass alone
    return replace(
        found,
        points_total=rows.count if points_total is None else points_total,
        passes=len(found.objective) + 3,  # the ends of the coarse and of the last k-means, and the distinct rows
        engine=f"{engine.name}; in {groups} groups by {described(parts)}",
    )


def share_out(k: int, sizes: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Shares of k in proportion to `sizes` (Webster's method), each at least 1 and at most its limit (0 where that is).

    Args:
        k: at least the number of limits above 0, at most their sum.
        sizes: (g,) >= 0.
        limits: (g,) >= 0.

    Raises:
        UsageError: k is more than the sum of the limits.
    """
    if k > sum(limits):
        raise UsageError(f"k = {k}, but only {sum(limits)} distinct rows: take a smaller --k")
    shares = [min(1, limit) for limit in limits]
    queue = [(-sizes[place] / 1.5, place) for place, limit in enumerate(limits) if limit > 1]
    heapq.heapify(queue)
    for _ in range(k - sum(shares)):
        place = queue[0][1]
        shares[place] += 1
        if shares[place] < limits[place]:
            heapq.heapreplace(queue, (-sizes[place] / (shares[place] + 0.5), place))
        else:
            heapq.heappop(queue)
    return shares


def distinct_rows(rows: Rows, labels: NDArray[np.int32], groups: int) -> NDArray[np.int64]:
    """(groups,) how many different rows each group holds; one look at all rows, 16 bytes a row."""
    found = np.empty(rows.count, [("group", np.int32), ("digest", np.uint64)])
    found["group"] = labels
    with bar(rows.count, "distinct rows", "rows") as shown:
        for start, stop in blocks(rows.count, rows.dim):
            found["digest"][start:stop] = row_digests(rows.read(start, stop))
            shown.update(stop - start)
    return np.bincount(np.unique(found)["group"], minlength=groups)


def _lloyd(
    rows: Rows,
    k: int,
    iterations: int,
    seed: int,
    path: Path | None,
    engine: Engine,
    start: NDArray[np.float32] | None = None,
) -> Clustering:
    """`kmeans` that goes on where the state at `path` says."""
    state = load_state(path) if path and path.is_file() else None
    keep = partial(save_state, path) if path else None
    return kmeans(rows, k, iterations, seed, keep, state, engine, start=start)


def _clusters_in_groups(
    rows: Rows,
    labels: NDArray[np.int32],
    shares: list[int],
    iterations: int,
    seed: int,
    stem: Path | None,
    engine: Engine,
) -> list[State]:
    """The last state of k-means in each group that has a share; groups are read by the dozen, in order of the rows."""
    found: dict[int, State] = {}
    paths = {group: stem.with_name(f"{stem.name}-{group}.npz") for group in range(len(shares))} if stem else {}
    for group, path in paths.items():
        if path.is_file():
            found[group] = load_state(path)
    open_groups = [group for group, share in enumerate(shares) if share and group not in found]
    sizes = np.bincount(labels, minlength=len(shares))
    with bar(int(sizes.sum()), "k-means in groups", "rows", int(sizes[list(found)].sum())) as shown:
        for batch in _batches(open_groups, (sizes * rows.dim).tolist()):
            for group, some in zip(batch, _gather(rows, labels, batch), strict=True):
                states: list[State] = []
                kmeans(some, shares[group], iterations, seed, states.append, engine=engine)
                found[group] = replace(states[-1], labels=np.empty(0, np.int32))
                if paths:
                    save_state(paths[group], found[group])
                shown.update(some.count)
    return [found[group] for group in sorted(found)]


def _batches(groups: Iterable[int], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive groups that hold at most `GATHERED` numbers together, or one that alone holds more."""
    batch: list[int] = []
    for group in groups:
        if batch and sum(numbers[one] for one in [*batch, group]) > GATHERED:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _gather(rows: Rows, labels: NDArray[np.int32], batch: list[int]) -> Iterator[Rows]:
    """The rows of each group: in memory, by one look at all rows, or streamed when one group alone is too large."""
    places = np.flatnonzero(np.isin(labels, batch))
    if len(places) * rows.dim > GATHERED:
        yield _subset(rows, places)
        return
    order = np.argsort(labels[places], kind="stable")
    seat = np.empty(len(places), np.int64)
    seat[order] = np.arange(len(places))
    held = np.empty((len(places), rows.dim), np.float32)
    for start, stop in blocks(rows.count, rows.dim):
        first, last = np.searchsorted(places, (start, stop)).tolist()
        if first < last:
            held[seat[first:last]] = rows.read(start, stop)[places[first:last] - start]
    ends = np.searchsorted(labels[places[order]], batch, side="right").tolist()
    for begin, end in pairwise([0, *ends]):
        weights = None if rows.weights is None else rows.weights[places[order[begin:end]]]
        part = held[begin:end]
        yield Rows(end - begin, rows.dim, partial(_cut, part), weights)


def _cut(held: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
    return held[start:stop]


def _subset(rows: Rows, places: NDArray[np.int64]) -> Rows:
    """Some of the rows, in ascending order, read with what lies between them, a block at a time."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        chosen = places[start:stop]
        held = np.empty((len(chosen), rows.dim), np.float32)
        low, high = (int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else (0, 0)
        for begin, end in blocks(high - low, rows.dim):
            first, last = np.searchsorted(chosen, (low + begin, low + end)).tolist()
            if first < last:
                held[first:last] = rows.read(low + begin, low + end)[chosen[first:last] - low - begin]
        return held

    return Rows(len(places), rows.dim, read, None if rows.weights is None else rows.weights[places])


def _summed(curves: list[list[Any]]) -> list[Any]:
    """The sum of curves that go on with their last values."""
    longest = max(len(curve) for curve in curves)
    return [sum(curve[min(step, len(curve) - 1)] for curve in curves) for step in range(longest)]
