"""Which bounds the exact engine works by: what they need, what they promise to cost on a sample, and the choice.

What is chosen changes the speed and never the result (the proofs are in exact.cpp).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .engine import Rows

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

UNIT = 2.0**-24  # half the distance of 1 to the next float32
SAFETY = 1.05  # covers the higher orders of `UNIT` in each count of links

PREFIXES = (16, 24, 32, 48, 64, 96, 128, 192, 256)
FIRST_PREFIX = 64  # the same before the first pass, when the centroids are rarely averages
FIRST_ROWS = 8192  # below, the first pass is dense without a look
PAIR_ROWS = 16384  # below, pairs are not worth a look
FEW_COLUMNS = 32  # below, nothing is
SAMPLE = 512
CHOOSE_AT = (0, 1, 4)  # passes before which directions are chosen: the spectrum settles in the first few
DENSE_COST = 0.8  # bounds must promise to be below this share of a dense pass
CHOICE_WORK = 0.25  # of a dense pass that finding directions may take, at half its speed
SERVES = 8  # passes that a projection of the rows is taken to serve, if there is room to keep it
HOPELESS = 2.0  # dense passes that bounds may cost before they are tried no more
SMALL = 384  # columns up to which all eigenvectors are found at once
ROW_COST = 40.0  # of a row under bounds whatever is left of it, in products of the tiled kernel
KEEP_COST = 0.1  # of writing bounds of pairs, in dense passes
DOT_COST = 4.5  # a survivor's product of full length, in products of the tiled kernel
READ_COST = 32.0  # reading the bound of a pair, in multiplications of the tiled kernel


class Centred(NamedTuple):
    """Centroids as the bounds see them.

    Attributes:
        raw: (k, d) float32.
        middle: (d,) float32, their mean, rounded.
        origin: (d,) float32, the middle of this pass or of an earlier one.
        centred: (k, d) float32, raw - origin.
        lengths: (k,) float64, squared norms of `centred`.
        widest: the largest squared distance of a centroid to the middle.
    """

    raw: Floats
    middle: Floats
    origin: Floats
    centred: Floats
    lengths: Doubles
    widest: float


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


@dataclass
class Pairs:
    """Bounds of all pairs, kept by a dense pass.

    Attributes:
        bounds: (n, panels of k) uint16, the bits of float16: scaled lower bounds of squared distances.
        centroids: (k, d) float32 of that pass.
        scale: an even power of two.
        sample_distances: (s, k) float32, distances of the sample to those centroids.
        regret: dense passes that bounds of the respective pass before would have saved since.
        used: whether a pass has gone by them.
        whole: whether the pass that writes them came to its end.
    """

    bounds: NDArray[np.uint16]
    centroids: Floats
    scale: float
    sample_distances: Floats
    regret: float = 0.0
    used: bool = False
    whole: bool = False


@dataclass
class Memory:
    """What a pass leaves for the next: hints that make it faster and cannot change its result.

    Attributes:
        rows: what is clustered.
        room: bytes that projected rows, or bounds of pairs, may take.
        tell: is given a line for people when the kind of pass changes.
        labels, distances, counts: of the pass before.
        sums: of the pass before, where one block holds all rows.
        clear: (n,) which rows the pass before found nearer to their centroid than to any other by more than a tie.
        across: centroids, and (k, p + 2) those in the basis, as `projected` has the rows.
        projected_at: the pass that fills `projected`.
        longest: the least of `longest` since `clear` began.
        passes: how many there were.
        vectors, basis, projected: directions to choose from, those chosen, and the rows in them.
        places, sample: some rows, to estimate costs on.
        last: centroids of the pass before.
        centroids, sample_distances: those of the last pass that looked at pairs, and the sample's distances to them.
        pairs: the bounds of pairs, if any.
    """

    rows: Rows
    room: int
    tell: Callable[[str], object]
    labels: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    distances: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    sums: Doubles | None = None
    clear: NDArray[np.bool_] | None = None
    across: tuple[Floats, Floats] | None = None
    projected_at: int = 0
    longest: float = 0.0
    passes: int = 0
    vectors: Floats | None = None
    basis: Basis | None = None
    projected: Floats | None = None
    sample: Floats | None = None
    places: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    last: Floats | None = None
    centroids: Floats | None = None
    sample_distances: Floats | None = None
    pairs: Pairs | None = None


def centre(centroids: Floats, origin: Floats | None = None) -> Centred:
    """The centroids centred on their mean, or on an earlier one."""
    raw = np.array(centroids, np.float32, order="C")  # a copy: the caller may go on writing to his
    middle = raw.mean(axis=0, dtype=np.float64).astype(np.float32)
    origin = middle if origin is None else origin
    centred = raw - origin
    lengths = _squares(centred)
    widest = lengths if origin is middle else _squares(raw - middle)
    return Centred(raw, middle, origin, centred, lengths, float(widest.max()))


def _squares(rows: Floats) -> Doubles:
    return np.asarray(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))


def longest(target: Centred) -> float:
    """At least the largest norm of a centred centroid."""
    return float(np.sqrt(target.lengths.max())) * (1 + 2 * UNIT)


def moved(now: Floats, then: Floats) -> Doubles:
    """(k,) how far each centroid is from where it was."""
    far: Doubles = np.sqrt(np.square(now.astype(np.float64) - then).sum(axis=1))
    return far


def jumped(centroids: Floats, memory: Memory) -> bool:
    """Whether these centroids cannot come from those of the pass before: another number, or another start.

    Bounds and labels of the pass before would still be right, but cost more than none.
    """
    then = memory.last
    if then is None or then.shape != centroids.shape:
        return then is not None
    few = np.linspace(0, len(then) - 1, min(len(then), 64)).astype(int)
    now, before = centroids[few].astype(np.float64), then[few].astype(np.float64)
    # After the second pass, centroids move by a small part of what is between them.
    far = np.square(now - before).sum() > 0.25 * np.square(before - before.mean(axis=0)).sum()
    return memory.passes > 1 and bool(far)


def choose(centroids: Floats, memory: Memory) -> str:
    """The kind of the coming pass: `projected`, `pairs`, `dense`, or `keeping` (dense, and bounds of pairs are kept).

    `memory.basis` and `memory.pairs` are brought up to date; a line says why a kind follows another.
    """
    n, k = memory.rows.count, len(centroids)
    if centroids.shape[1] < FEW_COLUMNS or (n < FIRST_ROWS and not memory.passes):
        return "dense"
    if memory.basis is not None and memory.passes not in CHOOSE_AT:
        return "projected"
    if memory.sample is None:
        memory.places, memory.sample = _sample(memory.rows)
    fits = 2 * n * (k + -k % 32) <= memory.room and n >= PAIR_ROWS
    if not fits and memory.passes not in CHOOSE_AT:
        return "dense"
    target = centre(centroids)
    now = _distances(memory.sample, target) if fits or not memory.passes else memory.sample[:0]
    labels = memory.labels[memory.places] if memory.passes else now.argmin(axis=1)
    if memory.passes in CHOOSE_AT:
        _choose_basis(target, memory, labels, DENSE_COST / 2 if fits and memory.passes else DENSE_COST)
    if memory.basis is not None:
        memory.pairs = memory.sample_distances = None
        return "projected"
    return _choose_pairs(target, memory, labels, now) if fits else "dense"


def _sample(rows: Rows) -> tuple[NDArray[np.int64], Floats]:
    """Places and rows of eight stretches, or of all that there is; fewer where passes are short."""
    size = min(SAMPLE // 8, max(16, rows.count // 256), rows.count)
    starts = np.linspace(0, rows.count - size, 8).astype(int)
    places = np.concatenate([np.arange(start, start + size) for start in starts])
    return places, np.concatenate([rows.read(start, start + size) for start in starts.tolist()])


def _distances(sample: Floats, target: Centred) -> Floats:
    """(s, k), as good as float32 gives them."""
    centred = sample - target.origin
    squares = np.einsum("ij,ij->i", centred, centred)[:, None] + target.lengths.astype(np.float32)
    far: Floats = np.sqrt(np.maximum(squares - 2 * (centred @ target.centred.T), 0))
    return far


def _tell(memory: Memory, kind: str, share: float, cost: float) -> None:
    memory.tell(
        f"k-means, exact engine: pass {memory.passes + 1} by {kind}, which leave {100 * share:.2g} % of the pairs and "
        f"cost {cost:.2f} of a dense pass"
    )


def _choose_pairs(target: Centred, memory: Memory, labels: NDArray[Any], now: Floats) -> str:
    """Bounds of pairs where they pay on the sample; they are made anew when that would have paid."""
    k, d = target.raw.shape
    own = now[np.arange(len(now)), labels][:, None]

    def left(far: Floats, then: Floats) -> tuple[float, float]:
        share = float((far - moved(target.raw, then).astype(np.float32) <= own).mean())
        return share, (READ_COST + DOT_COST * share * (d + 64)) / (d + 8) + ROW_COST / k + 0.02

    fresh = np.inf
    if memory.sample_distances is not None and memory.centroids is not None:
        fresh = left(memory.sample_distances, memory.centroids)[1]
    memory.sample_distances, memory.centroids = now, target.raw
    if memory.pairs is not None and memory.pairs.whole:
        share, cost = left(memory.pairs.sample_distances, memory.pairs.centroids)
        memory.pairs.regret += cost - fresh
        if cost < DENSE_COST and memory.pairs.regret < 1:
            if not memory.pairs.used:
                _tell(memory, "bounds of pairs", share, cost)
            memory.pairs.used = True
            return "pairs"
    return "keeping" if fresh + KEEP_COST < DENSE_COST else "dense"


def keep_pairs(target: Centred, memory: Memory, width: int) -> Pairs:
    """Room for the bounds that a dense pass is about to write, `width` for each row; that of old ones is used again."""
    assert memory.sample_distances is not None
    farthest = max(2 * float(memory.sample_distances.max()), 1e-15)
    scale = float(np.clip(4.0 ** np.floor(np.log2(6e4 / farthest**2) / 2), 4.0**-50, 4.0**50))
    bounds = np.empty((memory.rows.count, width), np.uint16) if memory.pairs is None else memory.pairs.bounds
    memory.pairs = Pairs(bounds, target.raw, scale, memory.sample_distances)
    return memory.pairs


def _choose_basis(target: Centred, memory: Memory, labels: NDArray[Any], limit: float) -> None:
    """Set the basis that costs least on the sample, or none if that is not below `limit`."""
    k, d = target.raw.shape
    before, rows, clear, across = memory.basis, memory.projected, memory.clear, memory.across
    memory.basis = memory.projected = memory.clear = memory.across = None
    if memory.vectors is None or memory.passes <= 1:
        # Operations a column; a dense pass has n k of them. Rows at random, the usual start, promise little.
        tried = [p for p in PREFIXES if p <= d // 2 and (memory.passes or p <= FIRST_PREFIX)]
        work = {p: 10 * d * d if d <= SMALL else 6 * k * p + 8 * p * p for p in tried}
        widths = [p for p, count in work.items() if count <= CHOICE_WORK * memory.rows.count * k]
        weights = np.sqrt(memory.counts, dtype=np.float32) if memory.passes else np.ones(k, np.float32)
        memory.vectors = _leading(target.centred * weights[:, None], widths[-1] if widths else 0)
    widths = [p for p in PREFIXES if p <= memory.vectors.shape[1]]
    if not widths:
        return
    assert memory.sample is not None
    shares = _shares_left(target, memory.sample, labels, memory.vectors, widths)
    # Those that rows were projected on cost nothing to project on.
    whole = rows is not None and memory.projected_at < memory.passes
    had = before.vectors.shape[1] if before and whole and memory.passes > 1 else 0
    serves = [SERVES if 4 * memory.rows.count * (p + 2) <= memory.room else 1 for p in widths]
    costs = [
        _cost(p, k, d, share, not memory.passes) + (p != had) * p / (k * passes)
        for p, share, passes in zip(widths, shares, serves, strict=True)
    ]
    best = int(np.argmin(costs))
    if memory.passes and costs[best] > HOPELESS:
        memory.vectors = memory.vectors[:, :0]
    if not costs[best] < limit:  # NaN near the limits of float32
        return
    if widths[best] == had:
        memory.basis, memory.projected, memory.clear, memory.across = before, rows, clear, across
        return
    chosen = np.ascontiguousarray(memory.vectors[:, : widths[best]])
    wide = chosen.astype(np.float64)
    error = float(np.linalg.norm(wide.T @ wide - np.eye(widths[best]))) + 1e-12
    memory.basis = Basis(target.origin, chosen, error)
    if before is None or before.vectors.shape != chosen.shape:
        _tell(memory, f"bounds in {widths[best]} of {d} dimensions", shares[best], costs[best])


def _cost(p: int, k: int, d: int, share: float, guess: bool) -> float:
    """Of a projected pass, in dense passes: the small product with its filter, and the survivors' dots."""
    return (1 + guess) * (p + 9) / (d + 8) + DOT_COST * share * (d + 64) / d + (ROW_COST + guess * p) / k + 0.02


def _leading(matrix: Floats, width: int) -> Floats:
    """(d, width) leading right singular vectors, or fewer, by subspace iteration from fixed numbers for long rows.

    How good they are is a matter of speed only.
    """
    d = matrix.shape[1]
    top = float(np.abs(matrix).max())
    if not width or not 0 < top < np.inf:
        return np.empty((d, 0), np.float32)
    matrix = matrix / np.float32(top)  # squares of large numbers would overflow
    if d <= SMALL:
        return np.linalg.eigh((matrix.T @ matrix).astype(np.float64))[1][:, : -width - 1 : -1].astype(np.float32)
    start = np.random.default_rng(0).standard_normal((len(matrix), width + 16)).astype(np.float32)
    wide = _orthonormal(matrix.T @ start)
    wide = _orthonormal(matrix.T @ (matrix @ wide.astype(np.float32)))[:, :width]
    # One step of Newton's towards the nearest orthonormal matrix leaves the square of what was missing.
    return np.asarray(wide @ (1.5 * np.eye(wide.shape[1]) - 0.5 * wide.T @ wide), np.float32)


def _orthonormal(matrix: Floats) -> Doubles:
    """(d, m) or fewer columns that span those of `matrix` (d, m), in the order of how much of it lies along them."""
    wide = matrix.astype(np.float64)
    squares, axes = np.linalg.eigh(wide.T @ wide)
    kept = squares > 1e-12 * squares[-1]  # fewer where the centroids span less
    return np.asarray((wide @ (axes[:, kept] / np.sqrt(squares[kept])))[:, ::-1])


def _shares_left(target: Centred, raw: Floats, labels: NDArray[Any], vectors: Floats, widths: list[int]) -> list[float]:
    """The share of pairs that the first p vectors leave open, for each p of `widths`."""
    sample = raw - target.origin
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
