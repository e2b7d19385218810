"""k-means over several processes: each looks at a contiguous share of the rows, the first leads.

The leader's engine is wrapped: `scan` sends the centroids to all, adds up their sums in a fixed order and collects
labels and distances. All else, from the start to the files, is the leader's work as with one process.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktransfer import distributed
from ktransfer.artifacts.centroids import Projection
from ktransfer.artifacts.features import Features, open_features
from ktransfer.errors import StageError
from ktransfer.progress import say

from .engines.choose import choose_engine
from .engines.engine import Engine, Pass, Rows
from .rows import plan_line, plan_memory, rows_of

_opened: tuple[Rows, Engine] | None = None  # of a process that serves


def open_rows(
    features: Features,
    projection: Projection | None,
    normalise: bool,
    k: int,
    engine: str,
    memory: float,
    label: str | None = "cluster",
    extra: int = 0,
    before: int = 0,
) -> tuple[Rows, Engine]:
    """The rows of a feature file and the engine for them, over all processes of the command; says both.

    Args:
        engine: its name.
        memory, extra, before: as for `plan_memory`.
        label: of the line; None: say nothing, as of the further clusterings of the same rows.

    Raises:
        UsageError: the memory does not suffice.
        StageError: another process cannot open the same rows.
    """
    rows, room = planned_rows(features, projection, normalise, k, memory, label, extra, before)
    own = choose_engine(engine, room, _quiet if label is None else say)
    if distributed.world_size() == 1:
        return rows, own
    arrays: list[NDArray[Any]] = [] if projection is None else [*projection]
    distributed.send_order(
        {
            "do": "open",
            "features": str(features.path.resolve()),
            "facts": _facts(features),
            "normalise": normalise,
            "k": k,
            "engine": engine,
            "memory": memory,
        },
        *arrays,
    )
    distributed.agree(None)
    return rows, over_ranks(own, rows)


def planned_rows(
    features: Features,
    projection: Projection | None,
    normalise: bool,
    k: int,
    memory: float,
    label: str | None,
    extra: int = 0,
    before: int = 0,
) -> tuple[Rows, int]:
    """The same rows for this process alone, and bytes that an engine may keep; says the memory plan where
    the line has a label.

    Raises:
        UsageError: the memory does not suffice.
    """
    dim = features.rows.shape[1] if projection is None else projection.components.shape[1]
    plan = plan_memory(features, k, dim, memory, extra, before)
    tell = _quiet if label is None else say
    processes = f"; so each of {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    tell(f"{label}: {plan_line(plan)}{processes}")
    return rows_of(features, projection, normalise, plan.kept), plan.engine


def _quiet(line: str) -> None:
    """Say nothing."""


def over_ranks(engine: Engine, rows: Rows) -> Engine:
    """The leader's engine when the others have opened the same `rows`: each scans its share, in the same contract.

    The same centroids and number of processes give the same bytes. Other rows than these are the leader's own affair.
    """
    part = _part(rows)

    def scan(given: Rows, centroids: NDArray[np.float32], tick: Callable[[int], object]) -> Pass:
        if given is not rows:
            return engine.scan(given, centroids, tick)
        done = 0

        def scaled(count: int) -> None:  # the bar counts all rows, this process sees its own
            nonlocal done
            before, done = done, done + count
            tick(rows.count * done // part.count - rows.count * before // part.count)

        distributed.send_order({"do": "scan"}, np.ascontiguousarray(centroids, np.float32))
        found = _scan(engine, part, centroids, scaled)
        try:
            sums = distributed.sum_to_leader(np.column_stack([found.sums, found.counts]))
            labels, distances = np.empty(rows.count, np.int32), np.empty(rows.count, np.float32)
            labels[: part.count], distances[: part.count] = found.labels, found.distances
            distributed.gather_rows(labels, rows.count)
            distributed.gather_rows(distances, rows.count)
        except MemoryError as error:  # the others are waiting for numbers, not for the end
            raise distributed.PeerLost(
                "torchrun: the first process lacks memory for the sums of all processes; give it more"
            ) from error
        return Pass(labels, distances, np.ascontiguousarray(sums[:, :-1]), sums[:, -1].astype(np.int64))

    return Engine(f"{engine.name}, {distributed.world_size()} processes", engine.version, scan)


def open_share(order: dict[str, Any]) -> None:
    """Another process opens its share of the rows, for the scans to come."""
    global _opened
    with distributed.opening():
        features = open_features(Path(order["features"]))
        if _facts(features) != order["facts"]:
            raise StageError(f"{features.path}: differs from the file that the first process reads; copy that one here")
        projection = Projection(*order["arrays"]) if order["arrays"] else None
        dim = features.rows.shape[1] if projection is None else projection.components.shape[1]
        plan = plan_memory(features, order["k"], dim, order["memory"])
        rows = rows_of(features, projection, order["normalise"], plan.kept)
        _opened = _part(rows), choose_engine(order["engine"], plan.engine)


def scan_share(order: dict[str, Any]) -> None:
    """Another process scans the share that it opened."""
    assert _opened is not None
    part, engine = _opened
    found = _scan(engine, part, order["arrays"][0], lambda done: None)
    distributed.sum_to_leader(np.column_stack([found.sums, found.counts]))
    distributed.gather_rows(found.labels, part.count)
    distributed.gather_rows(found.distances, part.count)


def _scan(engine: Engine, part: Rows, centroids: NDArray[np.float32], tick: Callable[[int], object]) -> Pass:
    """The scan of this process's share, after which all know whether one of them failed."""
    error: Exception | None = None
    try:
        found = engine.scan(part, centroids, tick)
    except Exception as failure:
        error = failure
    distributed.agree(error)
    return found


def _part(rows: Rows) -> Rows:
    first, last = distributed.share(rows.count)
    weights = None if rows.weights is None else rows.weights[first:last]
    return Rows(last - first, rows.dim, lambda start, stop: rows.read(first + start, first + stop), weights)


def _facts(features: Features) -> dict[str, Any]:
    return {
        "rows": list(features.rows.shape),
        "dtype": features.rows.dtype.str,
        "valid": int(features.valid.sum()),
        "attributes": features.attributes,
    }
