"""Mini-batch k-means: centroids follow small batches of rows; for endless data, or for a quick first result.

Each centroid is the mean of the rows that voted for it (Sculley, WWW 2010), with sums in float64. Where rows come
again, a row's last vote is removed before it votes again (`mb-f` of Newling and Fleuret, "Nested Mini-Batch K-Means",
NIPS 2016), because votes for early, bad centroids would otherwise weigh for ever: so whole passes end where Lloyd's
algorithm does. Their nested batches are not used: these look at the first rows again and again, which a stream cannot.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import rng
from ktransfer.errors import UsageError
from ktransfer.progress import bar

from ..engines.engine import Engine, Pass, Rows, add_rows, described, faiss_engine
from .initialisation import random_rows
from .lloyd import Clustering, State, first_state, kmeans, split_clusters

RUN = 16  # rows that are read together: single rows are slow to read, and neighbours are often alike
GRACE = 10  # times k rows of a stream must have been seen before a centroid without votes is moved


class Stream(NamedTuple):
    """Where a clustering of a stream stands.

    Attributes:
        centroids: (k, d) float32.
        sums: (k, d) float64, of the rows that voted for each.
        counts: (k,) float64, how many; with `memory`, old votes count less.
        rows: rows seen.
        batches: blocks seen.
        objective: mean squared distance of the last block to the centroids before it.
    """

    centroids: NDArray[np.float32]
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    rows: int
    batches: int
    objective: float


def minibatch(
    blocks: Iterable[NDArray[np.float32]],
    k: int,
    seed: int = 0,
    engine: Engine | None = None,
    state: Stream | None = None,
    start: NDArray[np.float32] | None = None,
    memory: float | None = None,
) -> Iterator[Stream]:
    """k-means of a stream: yields where it stands after each block, for as long as blocks come.

    Nothing but the blocks at the start and (k, d) sums is held. The same blocks in the same order give the same bytes,
    also when the stream is cut anywhere and continued with `state`. A centroid that is left without votes is put on a
    row of the block, drawn with a chance in proportion to the squared distance to its nearest centroid.

    Args:
        blocks: (b, d) float32 rows each, finite; at least one row.
        k: at least 1; the first blocks must hold k distinct rows between them.
        seed: 0 <= seed < 2**32, for the start and for draws.
        engine: `faiss_engine()` when not given.
        state: where to go on.
        start: (k, d) centroids to begin with; k distinct random rows of the first blocks when not given.
        memory: rows after which an old vote counts 1/e; for data that drifts. None: all votes count alike.

    Raises:
        UsageError: k or memory out of range, rows of other lengths, or a stream that ends with fewer than k distinct
            rows.
    """
    if k < 1 or (memory is not None and not memory > 0):
        raise UsageError(f"k = {k} must be at least 1 and memory = {memory} above 0")
    engine = engine or faiss_engine()
    waiting = iter(blocks)
    if state is None:
        held: list[NDArray[np.float32]] = []
        start = _first_rows(waiting, held, k, seed) if start is None else start
        state = Stream(start, np.zeros(start.shape), np.zeros(k), 0, 0, np.nan)
        waiting = chain(held, waiting)
    if len(state.centroids) != k:
        raise UsageError(f"k = {k}, but there are {len(state.centroids)} centroids to go on from")
    for block in waiting:
        if block.ndim != 2 or block.shape[1] != state.centroids.shape[1]:
            raise UsageError(f"a block of shape {block.shape}, but centroids of {state.centroids.shape[1]} numbers")
        if len(block):
            state = _follow(np.ascontiguousarray(block, np.float32), state, seed, engine, memory)
            yield state


def minibatch_kmeans(
    rows: Rows,
    k: int,
    iterations: int = 20,
    seed: int = 0,
    on_iteration: Callable[[State], object] | None = None,
    state: State | None = None,
    engine: Engine | None = None,
    points_total: int | None = None,
    start: NDArray[np.float32] | None = None,
    batch_rows: int = 4096,
    parts: Engine | None = None,
) -> Clustering:
    """Mini-batch k-means on rows that can be read again; an iteration sees every row once, in a new random order.

    The same arguments give the same bytes. It stops early when a whole iteration moved no label. The curves of the
    result are sums over an iteration's batches, each against the centroids of its moment. After an iteration empty
    clusters get half of the heaviest, as in `kmeans`, whose last pass gives each row the nearest of the centroids.

    Args:
        rows: n rows, without weights.
        batch_rows: rows after which the centroids move; at least 1, rounded up to a multiple of `RUN`.
        parts: the engine of the batches; `faiss_engine()` when not given.
        k, iterations, seed, on_iteration, state, engine, points_total, start: as in `kmeans`; the state is given after
            each iteration, and the engine is for the last pass.

    Raises:
        UsageError: too few distinct rows, rows with weights, or a state of other rows or another k.
    """
    if k < 1 or iterations < 1 or batch_rows < 1:
        raise UsageError(f"k = {k}, iterations = {iterations} and batch_rows = {batch_rows} must be at least 1")
    if rows.weights is not None:
        raise UsageError("mini-batch k-means takes no weights: use lloyd")
    if state is None:
        state = first_state(rows, random_rows(rows, k, seed) if start is None else start)
    elif state.centroids.shape != (k, rows.dim) or state.labels.shape != (rows.count,):
        raise UsageError(
            f"the saved k-means has {state.centroids.shape} centroids of {len(state.labels)} rows, "
            f"not ({k}, {rows.dim}) of {rows.count}: start again with --overwrite"
        )
    parts = parts or faiss_engine()
    with bar(iterations * rows.count, "mini-batch k-means", "rows", len(state.objective) * rows.count) as shown:
        while len(state.objective) < iterations and not state.converged:
            state = _iterate(rows, state, seed, parts, batch_rows, shown.update)
            shown.set_postfix(iteration=len(state.objective), objective=f"{state.objective[-1]:.6g}", refresh=False)
            if on_iteration:
                on_iteration(state)
    found = kmeans(rows, k, len(state.objective), seed, state=state, engine=engine, points_total=points_total)
    return replace(found, engine=f"{found.engine}; mini-batches of {_runs(batch_rows) * RUN} by {described(parts)}")


def _runs(batch_rows: int) -> int:
    return -(-batch_rows // RUN)


def _iterate(
    rows: Rows, state: State, seed: int, engine: Engine, batch_rows: int, tick: Callable[[int], object]
) -> State:
    began = time.perf_counter()
    k = len(state.centroids)
    centroids = state.centroids
    labels = state.labels.copy()
    squares = np.empty(rows.count, np.float32)
    counts = np.bincount(labels[labels >= 0], minlength=k)
    # From the centroids and not carried along, so that an iteration is a function of the saved state.
    sums = centroids.astype(np.float64) * counts[:, None]
    order = rng.epoch_order(seed, len(state.objective), -(-rows.count // RUN))
    for some in order.split(_runs(batch_rows)):
        begins = (some.sort().values * RUN).tolist()
        block = np.concatenate([rows.read(begin, min(begin + RUN, rows.count)) for begin in begins])
        places = np.concatenate([np.arange(begin, min(begin + RUN, rows.count)) for begin in begins])
        found = _vote(block, centroids, engine)
        old = labels[places]
        again = np.flatnonzero(old >= 0)
        if len(again):
            add_rows(sums, block[again], old[again].astype(np.int64), np.full(len(again), -1.0))
        sums += found.sums
        counts += found.counts - np.bincount(old[again], minlength=k)
        centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids).astype(np.float32)
        labels[places], squares[places] = found.labels, found.distances
        tick(len(block))
    empty = np.flatnonzero(counts == 0)
    splits = split_clusters(rows, centroids, Pass(labels, squares, sums, counts), empty)
    return replace(
        state,
        centroids=centroids,
        labels=labels,
        objective=[*state.objective, float(squares.sum(dtype=np.float64))],
        empties=[*state.empties, len(empty)],
        splits=[*state.splits, splits],
        moved=[*state.moved, int((labels != state.labels).sum())],
        seconds=[*state.seconds, time.perf_counter() - began],
    )


def _vote(block: NDArray[np.float32], centroids: NDArray[np.float32], engine: Engine) -> Pass:
    return engine.scan(_rows(block), centroids, lambda _: None)


def _follow(block: NDArray[np.float32], state: Stream, seed: int, engine: Engine, memory: float | None) -> Stream:
    found = _vote(block, state.centroids, engine)
    kept = 1.0 if memory is None else float(np.exp(-len(block) / memory))
    sums, counts = state.sums * kept + found.sums, state.counts * kept + found.counts
    voted = counts >= 0.5  # less than half a row is left of what had one vote and was forgotten
    means = sums / np.where(voted, counts, 1)[:, None]
    centroids = np.where(voted[:, None], means, state.centroids).astype(np.float32)
    seen = state.rows + len(block)
    idle = np.flatnonzero(~voted) if seen >= GRACE * len(counts) else np.empty(0, np.int64)
    if len(idle):
        rows = _far_rows(found.distances, len(idle), seed, state.batches)
        idle = idle[: len(rows)]
        centroids[idle], sums[idle], counts[idle] = block[rows], 0, 0
    objective = float(found.distances.mean(dtype=np.float64))
    return Stream(centroids, sums, counts, seen, state.batches + 1, objective)


def _far_rows(squares: NDArray[np.float32], count: int, seed: int, step: int) -> NDArray[np.int64]:
    """At most `count` rows, drawn without replacement with chances in proportion to `squares`.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
    """
    far = np.flatnonzero(squares > 0)
    draws = rng.uniform(seed, "cluster/stream", step, torch.arange(len(squares)), 1)[:, 0].double().numpy()[far]
    keys = np.log(draws + 2.0**-25) / squares[far]
    return far[np.argsort(-keys, kind="stable")[:count]]


def _first_rows(
    blocks: Iterator[NDArray[np.float32]], held: list[NDArray[np.float32]], k: int, seed: int
) -> NDArray[np.float32]:
    """(k, d) distinct rows of the first blocks, which are kept in `held`."""
    for block in blocks:
        held.append(np.ascontiguousarray(block, np.float32))
        # -0.0 and 0.0 are the same point, for np.unique too.
        if sum(map(len, held)) >= k and len(np.unique(np.concatenate(held), axis=0)) >= k:
            break
    if not held:
        raise UsageError("the stream has no block")
    rows = np.concatenate(held)
    return random_rows(_rows(rows), k, seed)


def _rows(block: NDArray[np.float32]) -> Rows:
    return Rows(len(block), block.shape[1], lambda start, stop: block[start:stop])
