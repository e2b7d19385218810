"""The engine of our own: the labels of a search in float64, for less than a dense product (reference/kmeans.md §4).

The kernels and the proof that they lose no label are in exact.cpp; here the bounds' constants are made, the mode is
chosen, and a dense product in numpy stands in where the extension was not built.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ktransfer import __version__
from ktransfer.progress import say

from . import native
from .engine import TIE, Engine, Pass, Rows, add_rows, blocks

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCKS_AT_ONCE = 4  # of `BLOCK_NUMBERS`: rows sorted by label share more centroids in larger blocks
PROJECTED_BYTES = 3 * 2**28  # projected rows are kept between passes up to this size, else made again
PREFIXES = (16, 24, 32, 48, 64, 96, 128, 192, 256)
SAMPLE = 512
CHOOSE_AT = (1, 4)  # passes before which the mode is chosen: the spectrum settles in the first few
DENSE_COST = 0.8  # bounds must promise to be below this share of a dense pass
CHOICE_WORK = 0.5  # of a dense pass that finding directions may take, at half its speed
HOPELESS = 2.0  # dense passes that bounds may cost before they are tried no more
SMALL = 384  # columns up to which all eigenvectors are found at once
DOT_COST = 5.0  # a survivor's product of full length, in products of the tiled kernel
_U = 2.0**-24
_SAFETY = 1.05  # covers the higher orders of u in each count of links
_CHUNK = 256  # columns in a chain of additions, as in exact.cpp


class Basis(NamedTuple):
    """Directions that the centroids lie along.

    Attributes:
        origin: (d,) float32, what rows and centroids are centred on before.
        vectors: (d, p) float32, nearly orthonormal.
        error: at least |V'V - I|.
    """

    origin: Floats
    vectors: Floats
    error: float


class Target(NamedTuple):
    """Centroids as the bounds see them.

    Attributes:
        raw: (k, d) float32.
        middle: (d,) float32, their mean, rounded.
        origin: (d,) float32, the middle of this pass or of an earlier one.
        centred: (k, d) float32, raw - origin.
        lengths: (k,) float64, squared norms of `centred`.
    """

    raw: Floats
    middle: Floats
    origin: Floats
    centred: Floats
    lengths: Doubles


@dataclass
class Memory:
    """What a pass leaves for the next: hints that make it faster and cannot change its result."""

    rows: Rows
    labels: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    passes: int = 0
    vectors: Floats | None = None
    basis: Basis | None = None
    projected: Floats | None = None


def exact_engine(threads: int | None = None, level: int | None = None, compiled: bool = True) -> Engine:
    """Lloyd's pass by certified bounds on the CPU.

    Args:
        threads: torch's number when not given (`OMP_NUM_THREADS` sets it).
        level: 2: AVX-512, 1: AVX2; the best of the machine when not given.
        compiled: False: the dense product in numpy, although the extension is there.
    """
    threads = threads or torch.get_num_threads()
    library = native.library() if compiled else None
    if library is None:
        return Engine("exact, dense in numpy", f"{__version__}, numpy {np.__version__}", _scan_in_numpy)
    chosen = level or int(library.ktransfer_level())
    memory: Memory | None = None

    def scan(rows: Rows, centroids: Floats, tick: Callable[[int], object]) -> Pass:
        nonlocal memory
        if memory is not None and (memory.rows is not rows or len(memory.counts) != len(centroids)):
            memory = None
        found, memory = _scan(rows, centroids, tick, memory, chosen, threads)
        return found

    return Engine(f"exact on CPU, {('AVX2', 'AVX-512')[chosen - 1]}", __version__, scan)


def _scan(
    rows: Rows, centroids: Floats, tick: Callable[[int], object], memory: Memory | None, level: int, threads: int
) -> tuple[Pass, Memory]:
    target = _target(centroids)
    found = _empty_pass(rows, centroids)
    k = len(centroids)
    if memory is None:
        memory = Memory(rows)
    else:
        found.labels[:] = memory.labels
        if memory.passes in CHOOSE_AT:
            _choose(target, memory)
    basis = memory.basis
    if basis is not None:
        target = _target(centroids, basis.origin)
    fields = _fields(target, level)
    if basis is None:
        dense = fields | {"packed": native.pack(level, target.centred)}
    else:
        project, filtered = _filter_fields(target, basis, fields, level)
        width = basis.vectors.shape[1] + 2
        fresh = memory.projected is None
        if fresh and 4 * rows.count * width <= PROJECTED_BYTES:
            memory.projected = np.empty((rows.count, width), np.float32)
    for start, stop in blocks(rows.count, max(1, rows.dim // BLOCKS_AT_ONCE)):
        labels = found.labels[start:stop]
        block = {
            "rows": stop - start,
            "x": np.ascontiguousarray(rows.read(start, stop), np.float32),
            "labels": labels,
            "distances": found.distances[start:stop],
        }
        if basis is None:
            native.run(level, threads, native.DENSE, dense | block)
        else:
            kept = memory.projected
            block["projected"] = np.empty((stop - start, width), np.float32) if kept is None else kept[start:stop]
            if fresh:
                native.run(level, threads, native.PROJECT, project | block)
            # Neighbours in this order have most of their candidates in common, so those stay in cache.
            block["order"] = native.order(labels, k)
            native.run(level, threads, native.FILTERED, filtered | block)
        native.update(level, threads, fields | block | {"order": native.order(labels, k), "sums": found.sums})
        tick(stop - start)
    found.counts[:] = np.bincount(found.labels, minlength=k)
    memory.labels, memory.counts = found.labels, found.counts
    memory.passes += 1
    return found, memory


def _target(centroids: Floats, origin: Floats | None = None) -> Target:
    raw = np.ascontiguousarray(centroids, np.float32)
    middle = raw.mean(axis=0, dtype=np.float64).astype(np.float32)
    origin = middle if origin is None else origin
    centred = raw - origin
    return Target(raw, middle, origin, centred, np.einsum("ij,ij->i", centred, centred, dtype=np.float64))


def _empty_pass(rows: Rows, centroids: Floats) -> Pass:
    return Pass(
        np.empty(rows.count, np.int32),
        np.empty(rows.count, np.float32),
        np.zeros(centroids.shape),
        np.zeros(len(centroids), np.int64),
    )


def _links(d: int) -> int:
    """The longest chain of additions in a score of d columns by the tiled product."""
    return min(d, _CHUNK) + -(-d // _CHUNK) + 2


def _dot_links(d: int) -> int:
    """The same in a single product, in the narrower of the two instruction sets."""
    return d // 32 + 40


def _fields(target: Target, level: int) -> native.Fields:
    k, d = target.raw.shape
    return {
        "d": d,
        "k": k,
        "origin": target.origin,
        "middle": target.middle,
        "widest": float(np.square(target.raw - target.middle, dtype=np.float64).sum(axis=1).max()),
        "raw": target.raw,
        "centroids": target.centred,
        "bias": native.pad(level, (-target.lengths / 2).astype(np.float32)),
        "longest": _longest(target),
        # 6 links: centring of x and c, in the product and in the bias, and the bias's own rounding.
        "dense_error": _SAFETY * _U * (_links(d) + 6),
        "dot_error": _SAFETY * _U * (_dot_links(d) + 6),
        # Each product, and each sum where subnormal numbers count as zero, may lose the smallest normal number.
        "tiny": 8 * (d + 8) * 2.0**-126,
        "floor": 2 * (d * 2.0**-126) ** 0.5,
    }


def _longest(target: Target) -> float:
    return float(np.sqrt(target.lengths.max())) * (1 + 2 * _U)


def _filter_fields(
    target: Target, basis: Basis, fields: native.Fields, level: int
) -> tuple[native.Fields, native.Fields]:
    """What PROJECT and FILTERED need; the names are those of the proof in exact.cpp."""
    d, p = basis.vectors.shape
    e_x = basis.error + _links(d) * _U * p**0.5 * (1 + basis.error)
    e_c = basis.error + 2 * _U
    rest_error = 2 * e_x + e_x**2 + 2 * _U * (_dot_links(d) + 8)
    bound_error = (_links(p + 1) + 6) * _U * (1 + rest_error) + e_x + e_c + e_x * e_c
    project = fields | {
        "k": p,
        "p": p,
        "packed": native.pack(level, np.ascontiguousarray(basis.vectors.T)),
        "bias": native.pad(level, np.zeros(p, np.float32)),
        "rest_error": _SAFETY * rest_error,
    }
    filtered = fields | {
        "p": p,
        "packed": native.pack(level, _project_centroids(target, basis, e_c)),
        # Half of both errors together: `doubt` doubles it.
        "filter_error": (_SAFETY * bound_error + fields["dot_error"]) / 2,
    }
    return project, filtered


def _project_centroids(target: Target, basis: Basis, e_c: float) -> Floats:
    """(k, p + 1): coefficients in the basis and the norm of the rest, rounded up."""
    along = target.centred.astype(np.float64) @ basis.vectors.astype(np.float64)
    rest = np.maximum(target.lengths - np.einsum("ij,ij->i", along, along), 0)
    beyond = np.sqrt(rest + _SAFETY * (2 * e_c + e_c**2) * target.lengths) * (1 + 2 * _U)
    return np.column_stack([along, beyond]).astype(np.float32)


def _choose(target: Target, memory: Memory) -> None:
    """Set the basis that costs least on a sample, or none; say which, and why."""
    k, d = target.raw.shape
    if memory.vectors is None:
        # Operations a column; a dense pass has n k of them.
        work = {p: 10 * d * d if d <= SMALL else 10 * k * p + 8 * p * p for p in PREFIXES if p <= d // 2}
        widths = [p for p, count in work.items() if count <= CHOICE_WORK * memory.rows.count * k]
        if not widths:
            return
        weights = np.sqrt(memory.counts, dtype=np.float32)
        memory.vectors = _leading(target.centred * weights[:, None], widths[-1])
    vectors = memory.vectors
    widths = [p for p in PREFIXES if p <= vectors.shape[1]]
    if not widths:
        return
    before = memory.basis
    shares = _shares_left(target, memory, vectors, widths)
    costs = [_cost(p, d, share) for p, share in zip(widths, shares, strict=True)]
    best = int(np.argmin(costs))
    memory.basis = memory.projected = None
    if costs[best] > HOPELESS:
        memory.vectors = vectors[:, :0]
    if costs[best] < DENSE_COST:
        chosen = np.ascontiguousarray(vectors[:, : widths[best]])
        wide = chosen.astype(np.float64)
        error = float(np.linalg.norm(wide.T @ wide - np.eye(widths[best]))) + 1e-12
        memory.basis = Basis(target.origin, chosen, error)
    if before is None or memory.basis is None or before.vectors.shape != memory.basis.vectors.shape:
        name = "dense" if memory.basis is None else f"bounds in {widths[best]} of {d} dimensions"
        say(
            f"k-means, exact engine: pass {memory.passes + 1} {name}; the best bounds leave {100 * shares[best]:.2g} % "
            f"of the pairs and cost {costs[best]:.2f} of a dense pass (dense from {DENSE_COST:g})"
        )


def _cost(p: int, d: int, share: float) -> float:
    """Of a filtered pass, in dense passes: the small product with its filter, and the survivors' dots."""
    return (p + 9) / (d + 8) + DOT_COST * share * (d + 64) / d + 0.02


def _leading(matrix: Floats, width: int) -> Floats:
    """(d, width) leading right singular vectors, or fewer, by subspace iteration from fixed numbers for long rows.

    How good they are is a matter of speed only.
    """
    d = matrix.shape[1]
    if d <= SMALL:
        return np.linalg.eigh((matrix.T @ matrix).astype(np.float64))[1][:, : -width - 1 : -1].astype(np.float32)
    basis = np.random.default_rng(0).standard_normal((d, width + 16)).astype(np.float32)
    for _ in range(2):
        wide = (matrix.T @ (matrix @ basis)).astype(np.float64)
        squares, axes = np.linalg.eigh(wide.T @ wide)
        kept = squares > 1e-12 * squares[-1]  # fewer where the centroids span less
        basis = (wide @ (axes[:, kept] / np.sqrt(squares[kept]))).astype(np.float32)
    small = (matrix @ basis).astype(np.float64)
    wide = basis @ np.linalg.eigh(small.T @ small)[1][:, : -width - 1 : -1]
    # One step of Newton's towards the nearest orthonormal matrix leaves the square of what was missing.
    return np.asarray(wide @ (1.5 * np.eye(wide.shape[1]) - 0.5 * wide.T @ wide), np.float32)


def _shares_left(target: Target, memory: Memory, vectors: Floats, widths: list[int]) -> list[float]:
    """The share of pairs that the first p vectors leave open, for each p of `widths`."""
    rows = memory.rows
    places = np.linspace(0, rows.count - min(SAMPLE // 8, rows.count), 8).astype(int)
    stretches = [(start, start + min(SAMPLE // 8, rows.count)) for start in places.tolist()]
    sample = np.concatenate([rows.read(start, stop) for start, stop in stretches]) - target.origin
    labels = np.concatenate([memory.labels[start:stop] for start, stop in stretches])
    half = (target.lengths / 2).astype(np.float32)
    own = np.einsum("ij,ij->i", sample, target.centred[labels]) - half[labels]
    along, across = sample @ vectors, target.centred @ vectors
    rest = np.einsum("ij,ij->i", sample, sample)
    beyond = target.lengths.astype(np.float32)
    bound = np.tile(-half, (len(sample), 1))
    shares, done = [], 0
    for p in widths:
        bound += along[:, done:p] @ across[:, done:p].T
        rest = rest - np.einsum("ij,ij->i", along[:, done:p], along[:, done:p])
        beyond = beyond - np.einsum("ij,ij->i", across[:, done:p], across[:, done:p])
        done = p
        far = np.sqrt(np.maximum(rest, 0))[:, None] * np.sqrt(np.maximum(beyond, 0))
        shares.append(float((bound + far >= own[:, None]).mean()))
    return shares


def _scan_in_numpy(rows: Rows, centroids: Floats, tick: Callable[[int], object]) -> Pass:
    """The same contract without the extension."""
    target = _target(centroids)
    found = _empty_pass(rows, centroids)
    # A row's scores with all centroids are at most BLOCK_NUMBERS numbers times the share of k in d.
    for start, stop in blocks(rows.count, max(rows.dim, len(centroids))):
        block = rows.read(start, stop)
        labels = _nearest_in_numpy(block, target)
        gap = block.astype(np.float64) - centroids[labels]
        found.labels[start:stop] = labels
        found.distances[start:stop] = np.einsum("ij,ij->i", gap, gap)
        add_rows(found.sums, block, labels)
        tick(stop - start)
    found.counts[:] = np.bincount(found.labels, minlength=len(centroids))
    return found


def _nearest_in_numpy(block: Floats, target: Target) -> NDArray[np.int64]:
    centred = block - target.origin
    # numpy and not torch, whose products may round to bfloat16 by a global setting.
    scores = torch.from_numpy(centred @ target.centred.T)
    scores -= torch.from_numpy((target.lengths / 2).astype(np.float32))
    best, winners = scores.max(dim=1)
    labels = winners.numpy()
    longest = _longest(target)
    length = np.sqrt(np.einsum("ij,ij->i", centred, centred, dtype=np.float64))
    d = block.shape[1]
    # d links: nothing is known of the order in which the library adds.
    error = _SAFETY * _U * (d + 8)
    doubt = 2 * error * (length * longest + longest**2 / 2) + TIE * (length**2 + longest**2) + 8 * (d + 8) * 2.0**-126
    limit = torch.from_numpy(np.nextafter((best.numpy() - doubt).astype(np.float32), np.float32(-np.inf)))[:, None]
    close = ~(scores < limit)
    open_rows = np.flatnonzero((close.sum(dim=1) != 1).numpy())
    if len(open_rows):
        pairs = close.numpy()[open_rows]
        wide = target.raw.astype(np.float64) - target.origin
        lengths = np.einsum("ij,ij->i", wide, wide)
        scale = length[open_rows] ** 2 + lengths.max()
        exact = lengths - 2 * (block[open_rows].astype(np.float64) - target.origin) @ wide.T
        exact[~pairs] = np.inf
        labels[open_rows] = (exact <= (exact.min(axis=1) + TIE * scale)[:, None]).argmax(axis=1)
    return labels
