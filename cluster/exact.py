"""The engine of our own: the labels of a search in float64, for less than a dense product (reference/kmeans.md §4).

The kernels and the proof that they lose no label are in exact.cpp, the choice of bounds in bounds.py; here a pass is
made. Without the extension, dense.py stands in.
"""

from collections.abc import Callable

import numpy as np
import torch

from ktransfer import __version__
from ktransfer.progress import say

from . import native
from .bounds import SAFETY, UNIT, Basis, Floats, Memory, Target, aim, choose, jumped, keep_pairs, longest, moved
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
        return dense_engine()
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
    target = aim(centroids, memory.basis.origin if memory.basis else None)
    fields = _fields(target, level)
    work = {"projected": _by_projection, "pairs": _by_pairs}.get(kind, _by_products)(
        memory, target, fields, kind, level, threads
    )
    for start, stop in blocks(rows.count, max(1, rows.dim // BLOCKS_AT_ONCE)):
        block: native.Fields = {
            "rows": stop - start,
            "x": np.ascontiguousarray(rows.read(start, stop), np.float32),
            "labels": found.labels[start:stop],
            "distances": found.distances[start:stop],
        }
        work(start, stop, block)
        if rows.weights is not None:
            block["weights"] = np.ascontiguousarray(rows.weights[start:stop], np.float64)
        order = native.order(block["labels"], k)
        native.update(level, threads, fields | block | {"order": order, "sums": found.sums})
        tick(stop - start)
    found.counts[:] = np.bincount(found.labels, minlength=k)
    memory.labels, memory.counts, memory.last = found.labels.copy(), found.counts, target.raw
    if memory.pairs is not None:
        memory.pairs.whole = True
    memory.passes += 1
    return found


Work = Callable[[int, int, native.Fields], object]  # (start, stop, block): sets the labels of the block


def _by_products(memory: Memory, target: Target, fields: native.Fields, kind: str, level: int, threads: int) -> Work:
    dense = fields | {"packed": native.pack(level, target.centred)}
    pairs = keep_pairs(target, memory, len(fields["bias"])) if kind == "keeping" else None
    if pairs:
        dense["scale"] = pairs.scale

    def work(start: int, stop: int, block: native.Fields) -> None:
        kept = {"bounds": pairs.bounds[start:stop]} if pairs else {}
        native.run(level, threads, native.DENSE, dense | block | kept)

    return work


def _by_pairs(memory: Memory, target: Target, fields: native.Fields, kind: str, level: int, threads: int) -> Work:
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


def _by_projection(memory: Memory, target: Target, fields: native.Fields, kind: str, level: int, threads: int) -> Work:
    basis = memory.basis
    assert basis is not None
    project, filtered = _filter_fields(target, basis, fields, level)
    width = basis.vectors.shape[1] + 2
    fresh = memory.projected is None
    if fresh and 4 * memory.rows.count * width <= memory.room:
        memory.projected = np.empty((memory.rows.count, width), np.float32)
    kept = memory.projected
    guess = not memory.passes

    def work(start: int, stop: int, block: native.Fields) -> None:
        rows = np.empty((stop - start, width), np.float32) if kept is None else kept[start:stop]
        given = block | {"projected": rows}
        if fresh or kept is None:
            native.run(level, threads, native.PROJECT, project | given)
        if guess:
            native.run(level, threads, native.GUESS, filtered | given)
        order = native.order(block["labels"], len(target.raw))
        native.run(level, threads, native.FILTERED, filtered | given | {"order": order})

    return work


def _links(d: int) -> int:
    """The longest chain of additions in a score of d columns by the tiled product."""
    return min(d, _CHUNK) + -(-d // _CHUNK) + 2


def _dot_links(d: int) -> int:
    """The same in a single product, in the narrower of the two instruction sets."""
    return d // 16 + 40


def _fields(target: Target, level: int) -> native.Fields:
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
    target: Target, basis: Basis, fields: native.Fields, level: int
) -> tuple[native.Fields, native.Fields]:
    """What PROJECT and FILTERED need; the names are those of the proof in exact.cpp."""
    d, p = basis.vectors.shape
    e_x = basis.error + _links(d) * UNIT * p**0.5 * (1 + basis.error)
    e_c = basis.error + 2 * UNIT
    rest_error = 2 * e_x + e_x**2 + 2 * UNIT * (_dot_links(d) + 8)
    bound_error = (_links(p + 1) + 6) * UNIT * (1 + rest_error) + e_x + e_c + e_x * e_c
    project = fields | {
        "k": p,
        "p": p,
        "packed": native.pack(level, np.ascontiguousarray(basis.vectors.T)),
        "bias": native.pad(level, np.zeros(p, np.float32)),
        "rest_error": SAFETY * rest_error,
    }
    filtered = fields | {
        "p": p,
        "packed": native.pack(level, _project_centroids(target, basis, e_c)),
        # Half of both errors together: `doubt` doubles it.
        "filter_error": (SAFETY * bound_error + fields["dot_error"]) / 2,
    }
    return project, filtered


def _project_centroids(target: Target, basis: Basis, e_c: float) -> Floats:
    """(k, p + 1): coefficients in the basis and the norm of the rest, rounded up."""
    along = target.centred.astype(np.float64) @ basis.vectors.astype(np.float64)
    rest = np.maximum(target.lengths - np.einsum("ij,ij->i", along, along), 0)
    beyond = np.sqrt(rest + SAFETY * (2 * e_c + e_c**2) * target.lengths) * (1 + 2 * UNIT)
    return np.column_stack([along, beyond]).astype(np.float32)
