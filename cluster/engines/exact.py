"""The engine of our own: the labels of a search in float64, for less than a dense product.

The kernels and the proof that they lose no label are in exact.cpp, the choice of bounds in bounds.py; here a pass is
made. Without the extension, dense.py stands in.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import __version__
from ktransfer.progress import say

from . import native
from .bounds import SAFETY, UNIT, Basis, Centred, Floats, Memory, centre, choose, jumped, keep_pairs, longest, moved
from .dense import dense_engine
from .engine import Engine, Pass, Rows, blocks, empty_pass

BLOCKS_AT_ONCE = 4  # of `BLOCK_NUMBERS`: rows sorted by label share more centroids in larger blocks
KEPT_BYTES = 2**30  # what a pass may keep for the next: projected rows, or bounds of pairs
_CHUNK = 256  # columns in a chain of additions, as in exact.cpp


def exact_engine(
    threads: int | None = None,
    level: int | None = None,
    compiled: bool = True,
    room: int | None = None,
    tell: Callable[[str], object] = say,
) -> Engine:
    """Lloyd's pass by certified bounds on the CPU.

    Args:
        threads: torch's number when not given (`OMP_NUM_THREADS` sets it).
        level: 2: AVX-512, 1: AVX2; the best of the machine when not given.
        compiled: False: dense products in numpy, although the extension is there.
        room: bytes that a pass may keep for the next, `KEPT_BYTES` when not given.
        tell: is given a line when the kind of bounds changes.
    """
    threads = threads or torch.get_num_threads()
    library = native.library() if compiled else None
    if library is None:
        return dense_engine(threads)
    chosen = level or int(library.ktransfer_level())
    memory: Memory | None = None

    def scan(rows: Rows, centroids: Floats, tick: Callable[[int], object]) -> Pass:
        nonlocal memory
        if memory is None or memory.rows is not rows or jumped(centroids, memory):
            memory = Memory(rows, KEPT_BYTES if room is None else room, tell)
        return _scan(rows, centroids, tick, memory, chosen, threads)

    return Engine(f"exact on CPU, {('AVX2', 'AVX-512')[chosen - 1]}", __version__, scan)


def _scan(
    rows: Rows, centroids: Floats, tick: Callable[[int], object], memory: Memory, level: int, threads: int
) -> Pass:
    found = empty_pass(rows, centroids)
    k = len(centroids)
    kind = choose(centroids, memory)
    if memory.passes:
        found.labels[:] = memory.labels
        found.distances[:] = memory.distances
    target = centre(centroids, memory.basis.origin if memory.basis else None)
    fields = _fields(target, level)
    clear = np.zeros(rows.count, np.bool_) if memory.clear is None else memory.clear.copy()
    work = {"projected": _by_projection, "pairs": _by_pairs}.get(kind, _by_products)(
        memory, target, fields, kind, level, threads
    )
    for start, stop in blocks(rows.count, max(1, rows.dim // BLOCKS_AT_ONCE)):
        block: native.Fields = {
            "rows": stop - start,
            "x": np.ascontiguousarray(rows.read(start, stop), np.float32),
            "labels": found.labels[start:stop],
            "distances": found.distances[start:stop],
            "clear": clear[start:stop],
        }
        work(start, stop, block)
        if rows.weights is not None:
            block["weights"] = np.ascontiguousarray(rows.weights[start:stop], np.float64)
        order = native.order(block["labels"], k)
        if memory.sums is not None:  # so this block is all: clusters of the same rows keep their sums
            again = np.zeros(k, bool)
            other = memory.labels != found.labels
            again[memory.labels[other]] = again[found.labels[other]] = True
            found.sums[~again] = memory.sums[~again]
            order = order[again[found.labels[order]]]
        native.update(level, threads, fields | block | {"rows": len(order), "order": order, "sums": found.sums})
        tick(stop - start)
    found.counts[:] = np.bincount(found.labels, minlength=k)
    memory.labels, memory.distances, memory.counts = found.labels.copy(), found.distances.copy(), found.counts
    memory.sums = found.sums.copy() if block["rows"] == rows.count else None
    memory.clear = clear if kind == "projected" and memory.projected is not None else None
    memory.last = target.raw
    if memory.pairs is not None:
        memory.pairs.whole = True
    memory.passes += 1
    return found


Work = Callable[[int, int, native.Fields], object]  # (start, stop, block): sets the labels of the block


def _by_products(memory: Memory, target: Centred, fields: native.Fields, kind: str, level: int, threads: int) -> Work:
    dense = fields | {"packed": native.pack(level, target.centred)}
    pairs = keep_pairs(target, memory, len(fields["bias"])) if kind == "keeping" else None
    if pairs:
        dense["scale"] = pairs.scale

    def work(start: int, stop: int, block: native.Fields) -> None:
        kept = {"bounds": pairs.bounds[start:stop]} if pairs else {}
        native.run(level, threads, native.DENSE, dense | block | kept)

    return work


def _by_pairs(memory: Memory, target: Centred, fields: native.Fields, kind: str, level: int, threads: int) -> Work:
    pairs = memory.pairs
    assert pairs is not None
    far = moved(target.raw, pairs.centroids) * pairs.scale**0.5 * (1 + 4 * UNIT)
    by_pairs = fields | {"scale": pairs.scale, "moved": native.pad(level, far.astype(np.float32), 0)}

    def work(start: int, stop: int, block: native.Fields) -> None:
        # Neighbours in this order have most of their candidates in common, so those stay in cache.
        order = native.order(block["labels"], len(target.raw))
        kept = {"bounds": pairs.bounds[start:stop], "order": order}
        native.run(level, threads, native.PAIRED, by_pairs | block | kept)

    return work


def _by_projection(memory: Memory, target: Centred, fields: native.Fields, kind: str, level: int, threads: int) -> Work:
    basis = memory.basis
    assert basis is not None
    project, filtered = _filter_fields(memory, target, basis, fields, level, threads)
    width = basis.vectors.shape[1] + 2
    fresh = memory.projected is None
    if fresh and 4 * memory.rows.count * width <= memory.room:
        memory.projected, memory.projected_at = np.empty((memory.rows.count, width), np.float32), memory.passes
    kept = memory.projected
    guess = not memory.passes
    stays, some = _settled(memory, target, fields, level)

    def work(start: int, stop: int, block: native.Fields) -> None:
        rows = np.empty((stop - start, width), np.float32) if kept is None else kept[start:stop]
        given = block | {"projected": rows}
        if fresh or kept is None:
            native.run(level, threads, native.PROJECT, project | given)
        if guess:
            native.run(level, threads, native.GUESS, filtered | given)
        order = native.order(block["labels"], len(target.raw))
        if some:
            settled = (stays[block["labels"]] & block["clear"])[order]
            few = order[settled]
            native.run(level, threads, native.FILTERED, filtered | some | given | {"order": few, "rows": len(few)})
            order = order[~settled]
        native.run(level, threads, native.FILTERED, filtered | given | {"order": order, "rows": len(order)})

    return work


def _settled(
    memory: Memory, target: Centred, fields: native.Fields, level: int
) -> tuple[NDArray[np.bool_], native.Fields]:
    """Which centroids have not moved, and what looks at the others only; that is empty where all are to be looked at.

    SETTLED ROWS in exact.cpp has the proof, and why centroids far out end it.
    """
    k = len(target.raw)
    assert memory.across is not None
    stays = np.ones(k, bool)
    stays[_gone(memory.last, target)] = False
    if memory.clear is None or not stays.any() or not fields["longest"] <= 1.2 * memory.longest:
        memory.clear, memory.longest = None, fields["longest"]
        return stays, {}
    memory.longest = min(memory.longest, fields["longest"])
    gone = np.flatnonzero(~stays).astype(np.int32)
    return (
        stays,
        {
            "some": np.append(gone, np.int32(-1)),  # the address of nothing would mean all
            "few": len(gone),
            "some_bias": native.pad(level, fields["bias"][gone]),
            "packed": native.pack(level, np.ascontiguousarray(memory.across[1][gone, :-1])),
        },
    )


def _links(d: int) -> int:
    """The longest chain of additions in a score of d columns by the tiled product."""
    return min(d, _CHUNK) + -(-d // _CHUNK) + 2


def _dot_links(d: int) -> int:
    """The same in a single product, in the narrower of the two instruction sets."""
    return d // 16 + 40


def _fields(target: Centred, level: int) -> native.Fields:
    k, d = target.raw.shape
    return {
        "d": d,
        "k": k,
        "origin": target.origin,
        "middle": target.middle,
        "widest": target.widest,
        "raw": target.raw,
        "centroids": target.centred,
        "bias": native.pad(level, (-target.lengths / 2).astype(np.float32)),
        "longest": longest(target),
        # 6 links: centring of x and c, in the product and in the bias, and the bias's own rounding.
        "dense_error": SAFETY * UNIT * (_links(d) + 6),
        "dot_error": SAFETY * UNIT * (_dot_links(d) + 6),
        # Each product, and each sum where subnormal numbers count as zero, may lose the smallest normal number.
        "tiny": 8 * (d + 8) * 2.0**-126,
        "floor": 2 * (d * 2.0**-126) ** 0.5,
    }


def _filter_fields(
    memory: Memory, target: Centred, basis: Basis, fields: native.Fields, level: int, threads: int
) -> tuple[native.Fields, native.Fields]:
    """What PROJECT and FILTERED need; the names are those of the proof in exact.cpp."""
    d, p = basis.vectors.shape
    e_x = basis.error + _links(d) * UNIT * p**0.5 * (1 + basis.error)
    rest_error = 2 * e_x + e_x**2 + 2 * UNIT * (_dot_links(d) + 8)
    bound_error = (_links(p + 1) + 6) * UNIT * (1 + rest_error) + 2 * e_x + e_x**2
    project = fields | {
        "k": p,
        "p": p,
        "packed": native.pack(level, np.ascontiguousarray(basis.vectors.T)),
        "bias": native.pad(level, np.zeros(p, np.float32)),
        "rest_error": SAFETY * rest_error,
    }
    then, across = memory.across or (None, np.empty((len(target.raw), p + 2), np.float32))
    memory.across, gone = None, _gone(then, target)  # none while they are written to
    if len(gone):
        projected = np.empty((len(gone), p + 2), np.float32)
        job = {"rows": len(gone), "x": target.raw[gone], "projected": projected}
        native.run(level, threads, native.PROJECT, project | job)
        across[gone] = projected
    memory.across = target.raw, across
    filtered = fields | {
        "p": p,
        "packed": native.pack(level, np.ascontiguousarray(across[:, :-1])),
        # Half of both errors together: `doubt` doubles it.
        "filter_error": (SAFETY * bound_error + fields["dot_error"]) / 2,
    }
    return project, filtered


def _gone(then: Floats | None, target: Centred) -> NDArray[np.int64]:
    """The centroids that are not where they were."""
    if then is None:
        return np.arange(len(target.raw))
    return np.flatnonzero((then != target.raw).any(axis=1))
