"""Rows for k-means out of a feature file: read ahead by blocks, as many kept in memory as the budget allows."""

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import distributed
from ktransfer.artifacts.centroids import Projection, project
from ktransfer.artifacts.features import Features, valid_rows
from ktransfer.data.loader import available_bytes
from ktransfer.errors import UsageError

from .engines.engine import Rows

Read = Callable[[int, int], NDArray[np.float32]]

PIECE = 2**20  # numbers made ready at a time: they stay in the cache
TOGETHER = 64  # rows projected by one product, at fixed places: so their digits do not depend on who asks for how many
WORTH = 2**16  # numbers of a block from which reading ahead costs less than it saves
PROCESS_BYTES = 9 * 2**27  # libraries (0.9 GB with a torch that knows CUDA) and blocks in work
ENGINE_BYTES = 2**30  # the most that an engine keeps from one pass for the next, which saves more than kept rows do
PROJECTED_BYTES = 400  # of a row projected on most of what the engine tries: to make it again takes longer than reading
CENTROID_BYTES = 40  # of a number in a centroid: copies in float32 and float64, sums, means
ROW_BYTES = 32  # of a row: labels twice, distances twice, orders


class Plan(NamedTuple):
    """What a clustering will hold in memory.

    Attributes:
        budget: bytes.
        fixed: bytes that are needed whatever is kept: the process, its blocks, centroids, and some for each row.
        engine: bytes that the engine may keep between passes.
        kept: rows held in memory, of the `rows` that this process looks at.
        rows: of them all.
        width: bytes of a row as it is kept, float32.
        stored: bytes of a row in the file.
    """

    budget: int
    fixed: int
    engine: int
    kept: int
    rows: int
    width: int
    stored: int


def plan_memory(features: Features, k: int, dim: int, memory: float, extra: int = 0, before: int = 0) -> Plan:
    """Divide the memory, before the start.

    Args:
        features: the file.
        k: number of centroids.
        dim: numbers of a row after the PCA.
        memory: budget of a process in GB (10^9); 0: three quarters of what is free, for all processes here.
        extra: bytes that the start, the algorithm or the assignment needs besides.
        before: bytes that are needed before a row is kept, and free again then.

    Raises:
        UsageError: the budget is too small even with nothing kept.
    """
    count = int(features.valid.sum())
    first, last = distributed.share(count)
    fixed = PROCESS_BYTES + CENTROID_BYTES * k * dim + (ROW_BYTES + 8 * (count < len(features.valid))) * count + extra
    fixed = max(fixed, PROCESS_BYTES + before)
    free = available_bytes() // distributed.local_world_size()
    budget = int(memory * 1e9) if memory else max(free * 3 // 4, min(free, fixed))
    if fixed > budget:
        given = f"--memory {memory:g}" if memory else f"{free / 1e9:.2f} GB of memory are free"
        raise UsageError(
            f"{given}: {k} centroids of {dim} numbers and {count} rows need {fixed / 1e9:.2f} GB even if all rows are "
            "read from the file in each pass; give more by --memory GB, or a smaller --k or --pca"
        )
    engine = min(ENGINE_BYTES, budget - fixed, max((budget - fixed) // 2, PROJECTED_BYTES * (last - first)))
    kept = min(last - first, (budget - fixed - engine) // (4 * dim))
    stored = features.rows.shape[1] * features.rows.dtype.itemsize
    return Plan(budget, fixed, engine, kept, last - first, 4 * dim, stored)


def plan_line(plan: Plan) -> str:
    """The plan for people."""
    line = (
        f"memory: {plan.rows} rows, {plan.rows * plan.stored / 1e9:.2f} GB in the file; budget {plan.budget / 1e9:.2f} "
        f"GB: {plan.fixed / 1e9:.2f} GB for the process, centroids and labels, {plan.engine / 1e9:.2f} GB for bounds; "
    )
    rest = plan.rows - plan.kept
    if not rest:
        return f"{line}all rows are kept, {plan.rows * plan.width / 1e9:.2f} GB"
    return (
        f"{line}{plan.kept} rows are kept, {plan.kept * plan.width / 1e9:.2f} GB, and {rest} are streamed, "
        f"{rest * plan.stored / 1e9:.2f} GB a pass"
    )


def rows_of(features: Features, projection: Projection | None, normalise: bool, kept: int = 0) -> Rows:
    """The valid rows as k-means sees them: float32, after the PCA, of length 1; the same numbers however they are read.

    Blocks read one after the other are read ahead by a thread that lives as long as the reading of one block; its
    errors come up where the block is asked for.

    Args:
        kept: so many rows, the first of this process's `distributed.share`, stay in memory once they were read.
    """
    count = int(features.valid.sum())
    dim = features.rows.shape[1] if projection is None else projection.components.shape[1]
    first, last = distributed.share(count)
    read = read_ahead(_prepared(features, projection, normalise, count, dim), dim, last)
    return Rows(count, dim, keep(read, dim, first, kept) if kept else read)


def _prepared(features: Features, projection: Projection | None, normalise: bool, count: int, dim: int) -> Read:
    stored = valid_rows(features)
    columns = features.rows.shape[1]
    step = max(1, PIECE // columns // TOGETHER) * TOGETHER
    room_for = _rooms(dim)

    def read(start: int, stop: int) -> NDArray[np.float32]:
        first, last = start, stop
        if projection is not None:  # whole groups
            first, last = start // TOGETHER * TOGETHER, min(-(-stop // TOGETHER) * TOGETHER, count)
        rows = room_for(last - first)
        for place in range(first, last, step):
            piece = stored(place, min(place + step, last))
            room = rows[place - first : place - first + len(piece)]
            if projection is None:
                _widen(piece, room)
            else:
                _project(projection, piece, room)
            if normalise:
                room /= np.maximum(np.linalg.norm(room, axis=1, keepdims=True), 1e-12)
        return rows[start - first : stop - first]

    return read


def _rooms(dim: int) -> Callable[[int], NDArray[np.float32]]:
    """(count) -> (count, dim) to write to: the memory of a block that is no longer in use.

    The pages of fresh memory take longer than reading and widening what fills them.
    """
    rooms: list[NDArray[np.float32]] = []
    idle = 0

    def room_for(count: int) -> NDArray[np.float32]:
        nonlocal idle
        if count * dim < WORTH:
            return np.empty((count, dim), np.float32)
        for place in range(len(rooms)):
            # Parts of an array, and parts of those, all hold the array that owns the memory.
            if len(rooms[place]) >= count and sys.getrefcount(rooms[place]) == idle:
                return rooms[place][:count]
        del rooms[: len(rooms) - 2]  # who holds them may go on; with the new one, there are three
        rooms.append(np.empty((count, dim), np.float32))
        idle = sys.getrefcount(rooms[-1])
        return rooms[-1][:count]

    return room_for


def _widen(piece: NDArray[Any], room: NDArray[np.float32]) -> None:
    # torch widens float16 by vector instructions; numpy needs four times as long.
    if piece.flags.writeable:  # torch warns of others
        torch.from_numpy(room).copy_(torch.from_numpy(piece))
    else:
        room[:] = piece


def _project(projection: Projection, piece: NDArray[Any], room: NDArray[np.float32]) -> None:
    wide = np.empty(piece.shape, np.float32)
    _widen(piece, wide)
    for place in range(0, len(wide), TOGETHER):
        room[place : place + TOGETHER] = project(projection, wide[place : place + TOGETHER])


def read_ahead(read: Read, dim: int, last: int) -> Read:
    """Read the block that follows, up to row `last`, while the caller works on the one that it has.

    For one caller at a time.
    """
    ahead: _Reading | None = None

    def next_block(start: int, stop: int) -> NDArray[np.float32]:
        nonlocal ahead
        waiting, ahead = ahead, None
        block = waiting.take(start, stop) if waiting else None
        if block is None:
            block = read(start, stop)
        if stop < last and (stop - start) * dim >= WORTH:
            ahead = _Reading(read, stop, min(2 * stop - start, last))
        return block

    return next_block


class _Reading:
    """One block on its way."""

    def __init__(self, read: Read, start: int, stop: int) -> None:
        self._read, self._bounds = read, (start, stop)
        self._block: NDArray[np.float32] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="read ahead")
        self._thread.start()

    def _work(self) -> None:
        try:
            self._block = self._read(*self._bounds)
        except BaseException as error:
            self._error = error

    def take(self, start: int, stop: int) -> NDArray[np.float32] | None:
        """The block, None where it is another one."""
        self._thread.join()
        if self._bounds != (start, stop):
            return None
        if self._error is not None:
            raise self._error
        return self._block


def keep(read: Read, dim: int, first: int, count: int) -> Read:
    """Hold rows first .. first + count - 1 from when they were read, one block after the other."""
    held = np.empty((count, dim), np.float32)  # takes memory as it is filled
    filled = first

    def kept(start: int, stop: int) -> NDArray[np.float32]:
        nonlocal filled
        if first <= start and stop <= filled:
            return held[start - first : stop - first]
        block = read(start, stop)
        end = min(stop, first + count)
        if start <= filled < end:
            held[filled - first : end - first] = block[filled - start : end - start]
            filled = end
        return block

    return kept
