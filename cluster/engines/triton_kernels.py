"""Triton kernels of the exact engine on GPUs (device_steps.py calls them; no other file needs Triton).

`nearest_two` multiplies float16 rows and centroids and keeps the two best scores of each row in registers, so that
the (n, k) scores are never written; `top_two` does the same look at scores that cuBLAS wrote; `pair_squares`
rechecks; `add_rows` adds up the rows of each cluster in float64, without atomic additions, and measures their
distances on the way. With TRITON_INTERPRET=1 in the environment they run on the CPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

BEYOND = 2**31 - 1


class Tile(NamedTuple):
    """How much a program of `nearest_two` works on at a time; it changes the speed alone."""

    rows: int
    centroids: int
    columns: int
    warps: int
    stages: int


# Rows of up to 256 columns are loaded once and stay; longer ones pass by in pieces with each tile of centroids. What
# does not fit the shared memory of a device or gives other scores is passed over; of the rest, the fastest on the first
# large block is taken.
WHOLE_COLUMNS = 256
WHOLE_TILES = (
    Tile(128, 128, 0, 8, 2),
    Tile(128, 128, 0, 8, 3),
    Tile(128, 64, 0, 4, 3),
    Tile(64, 64, 0, 4, 2),
    Tile(32, 32, 0, 4, 1),
)
TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(64, 256, 64, 8, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(32, 32, 32, 4, 1),
)
LARGEST_TILE = 256  # centroids; every tile's number of them divides it
TUNE_ROWS = 2**15  # below, tiles are not worth a comparison
SUM_COLUMNS = 256
_tuned: dict[tuple[Any, ...], Tile] = {}


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _merge(best: "Any", second: "Any", label: "Any", scores: "Any", columns: "Any") -> "Any":
    """The two best of those so far and a tile of scores (rows, centroids); the lower index of equals."""
    top = tl.max(scores, 1)
    where = tl.min(tl.where(scores == top[:, None], columns[None, :], 2147483647), 1)
    # Only that one is taken out: a second centroid with the same score is second best.
    next_ = tl.max(tl.where(columns[None, :] == where[:, None], float("-inf"), scores), 1)
    second = tl.where(top > best, tl.maximum(best, next_), tl.maximum(second, top))
    label = tl.where(top > best, where, label)
    return tl.maximum(best, top), second, label


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _part(place: "Any", column: "Any", width: "Any", even: tl.constexpr) -> "Any":
    """Numbers of vectors of so many columns; masks cost time, and are left out where pieces divide the columns."""
    if even:
        return tl.load(place)
    return tl.load(place, mask=column < width, other=0.0)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _nearest_two(
    rows: "Any",
    ratios: "Any",
    centroids: "Any",
    bias: "Any",
    labels: "Any",
    bests: "Any",
    seconds: "Any",
    n: "Any",
    k: "Any",
    width: "Any",
    tile_rows: tl.constexpr,
    tile_centroids: tl.constexpr,
    tile_columns: tl.constexpr,
    whole: tl.constexpr,
    even: tl.constexpr,
) -> None:
    at = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    inside = at < n
    own = tl.minimum(at, n - 1)  # the last row again instead of a mask
    base = own.to(tl.int64)[:, None] * width
    ratio = tl.load(ratios + own)
    best = tl.full((tile_rows,), float("-inf"), tl.float32)
    second = tl.full((tile_rows,), float("-inf"), tl.float32)
    label = tl.zeros((tile_rows,), tl.int32)
    j = tl.arange(0, tile_columns)
    if whole:
        x = _part(rows + base + j[None, :], j[None, :], width, even)
    other = centroids + tl.arange(0, tile_centroids)[None, :] * width
    for first in range(0, k, tile_centroids):
        c = first + tl.arange(0, tile_centroids)
        if whole:
            acc = tl.dot(x, _part(other + j[:, None], j[:, None], width, even))
        else:
            acc = tl.zeros((tile_rows, tile_centroids), tl.float32)
            for begin in range(0, width, tile_columns):
                i = begin + j
                x = _part(rows + base + i[None, :], i[None, :], width, even)
                acc = tl.dot(x, _part(other + i[:, None], i[:, None], width, even), acc)
        half = tl.load(bias + c)
        best, second, label = _merge(best, second, label, acc * ratio[:, None] + half[None, :], c)
        other += tile_centroids * width
    tl.store(labels + at, label, mask=inside)
    tl.store(bests + at, best, mask=inside)
    tl.store(seconds + at, second, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _top_two(
    scores: "Any",
    ratios: "Any",
    bias: "Any",
    labels: "Any",
    bests: "Any",
    seconds: "Any",
    n: "Any",
    k: "Any",
    tile_rows: tl.constexpr,
    tile_centroids: tl.constexpr,
) -> None:
    at = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    inside = at < n
    ratio = tl.load(ratios + at, mask=inside, other=0.0)
    best = tl.full((tile_rows,), float("-inf"), tl.float32)
    second = tl.full((tile_rows,), float("-inf"), tl.float32)
    label = tl.zeros((tile_rows,), tl.int32)
    for first in range(0, k, tile_centroids):
        c = first + tl.arange(0, tile_centroids)
        place = scores + at.to(tl.int64)[:, None] * k + c[None, :]
        acc = tl.load(place, mask=inside[:, None] & (c < k)[None, :], other=0.0)
        half = tl.load(bias + c, mask=c < k, other=float("-inf"))
        best, second, label = _merge(best, second, label, acc * ratio[:, None] + half[None, :], c)
    tl.store(labels + at, label, mask=inside)
    tl.store(bests + at, best, mask=inside)
    tl.store(seconds + at, second, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _add_rows(
    wide: "Any",
    weights: "Any",
    order: "Any",
    edges: "Any",
    raw: "Any",
    sums: "Any",
    squares: "Any",
    d: "Any",
    pieces: "Any",
    weighted: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    cluster = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    j = piece * tile_columns + tl.arange(0, tile_columns)
    inside = j < d
    begin = tl.load(edges + cluster)
    end = tl.load(edges + cluster + 1)
    centre = tl.load(raw + cluster * d + j, mask=inside, other=0.0)
    total = tl.load(sums + cluster * d + j, mask=inside, other=0.0)
    added = tl.zeros((tile_columns,), tl.float64)
    for first in range(begin, end, tile_rows):
        i = first + tl.arange(0, tile_rows)
        own = i < end
        row = tl.load(order + i, mask=own, other=0)
        x = tl.load(wide + row[:, None] * d + j[None, :], mask=own[:, None] & inside[None, :], other=0.0)
        gap = tl.where(own[:, None] & inside[None, :], x - centre[None, :], 0.0).to(tl.float64)
        tl.store(squares + row * pieces + piece, tl.sum(gap * gap, 1), mask=own)
        if weighted:
            weight = tl.load(weights + row, mask=own, other=0.0)
            added += tl.sum(x.to(tl.float64) * weight[:, None], 0)
        else:
            added += tl.sum(x.to(tl.float64), 0)
    tl.store(sums + cluster * d + j, total + added, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _pair_squares(
    wide: "Any",
    places: "Any",
    raw: "Any",
    middle: "Any",
    near: "Any",
    squares: "Any",
    lengths: "Any",
    d: "Any",
    tile_pairs: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64)
    pair = at * tile_pairs + tl.arange(0, tile_pairs)
    centroid = tl.load(near + pair)
    row = wide + tl.load(places + at) * d
    total = tl.zeros((tile_pairs,), tl.float64)
    length = tl.zeros((tile_columns,), tl.float64)
    for first in range(0, d, tile_columns):
        j = first + tl.arange(0, tile_columns)
        x = tl.load(row + j, mask=j < d, other=0.0).to(tl.float64)
        m = tl.load(middle + j, mask=j < d, other=0.0).to(tl.float64)
        inside = (centroid >= 0)[:, None] & (j < d)[None, :]
        y = tl.load(raw + centroid[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float64)
        gap = tl.where(inside, x[None, :] - y, 0.0)
        total += tl.sum(gap * gap, 1)
        length += (x - m) * (x - m)
    tl.store(squares + pair, tl.where(centroid >= 0, total, float("inf")))
    tl.store(lengths + at, tl.sum(length, 0))


def nearest_two(
    rows: Tensor, ratios: Tensor, centroids: Tensor, bias: Tensor, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The two largest of ratios q.p + bias for each row.

    Args:
        rows: (n, w) float16; w a multiple of 16.
        ratios: (n,) float32.
        centroids: (k, w) float16.
        bias: (k,) float32.
        tile: the fastest of those that fit when not given.

    Returns:
        labels (n,) int32, the best and the second best score (n,) float32.
    """
    n, width = rows.shape
    whole = width <= WHOLE_COLUMNS
    found = _room(ratios)
    # Whole tiles of centroids, of which the last ones never win.
    beyond = -len(bias) % LARGEST_TILE
    centroids = torch.nn.functional.pad(centroids, (0, 0, 0, beyond))
    bias = torch.nn.functional.pad(bias, (0, beyond), value=-torch.inf)

    def launch(tile: Tile) -> None:
        columns = triton.next_power_of_2(width) if whole else tile.columns
        _nearest_two[(triton.cdiv(n, tile.rows),)](
            rows,
            ratios,
            centroids,
            bias,
            *found,
            n,
            len(bias),
            width,
            tile_rows=tile.rows,
            tile_centroids=tile.centroids,
            tile_columns=columns,
            whole=whole,
            even=width % columns == 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    key = rows.device, width
    if not tile and n >= TUNE_ROWS and key not in _tuned:
        _tuned[key] = _fastest(launch, WHOLE_TILES if whole else TILES, found)
    if tile := tile or _tuned.get(key):
        launch(tile)
    else:
        _fitting(launch, WHOLE_TILES if whole else TILES)
    return found


def _fitting(launch: Callable[[Tile], object], tiles: tuple[Tile, ...]) -> None:
    """Launch the first tile that the device has room for."""
    for tile in tiles:
        try:
            launch(tile)
            return
        except triton.runtime.errors.OutOfResources:
            if tile is tiles[-1]:
                raise


def _fastest(launch: Callable[[Tile], object], tiles: tuple[Tile, ...], found: tuple[Tensor, ...]) -> Tile:
    """The tile that takes least, of those that fit and give the scores of the first one (which `trial` checked)."""
    times: dict[Tile, float] = {}
    right: list[Tensor] = []
    for tile in tiles:
        try:
            launch(tile)  # compiled
            scores = [score.clone() for score in found[1:]]
        # It does not fit, or the compiler fails on it, which is no reason to do without the others.
        except Exception:  # nosec B112
            continue
        right = right or scores
        if not all(map(_close, scores, right)):
            continue
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(3):
            launch(tile)
        ended.record()
        ended.synchronize()
        times[tile] = began.elapsed_time(ended)
    if not times:
        raise RuntimeError("no tile fits the shared memory of this device, or its compiler fails on all")
    return min(times, key=lambda tile: times[tile])


def _close(scores: Tensor, right: Tensor) -> bool:
    """Whether they differ by no more than rounding, by far."""
    far = 1e-3 * float(right.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(scores, right, rtol=1e-3, atol=far, equal_nan=True)


def top_two(scores: Tensor, ratios: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from products (n, k) float32 that were written to memory."""
    n, k = scores.shape
    found = _room(ratios)
    columns = min(1024, triton.next_power_of_2(k))
    _top_two[(triton.cdiv(n, 4),)](scores, ratios, bias, *found, n, k, tile_rows=4, tile_centroids=columns, num_warps=4)
    return found


def pair_squares(wide: Tensor, places: Tensor, raw: Tensor, middle: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances in float64 of some rows to some centroids each, and to the middle.

    Args:
        wide: (n, d) float32.
        places: (m,) int64, which rows.
        raw: (k, d) float32 centroids.
        middle: (d,) float32.
        near: (m, c) int64, which centroids, c a power of two; -1: none.

    Returns:
        (m, c) float64, infinite for none, and (m,) float64.
    """
    near = near.contiguous()
    squares = near.new_empty(near.shape, dtype=torch.float64)
    lengths = near.new_empty(len(near), dtype=torch.float64)
    _pair_squares[(len(near),)](
        wide,
        places,
        raw,
        middle,
        near,
        squares,
        lengths,
        wide.shape[1],
        tile_pairs=near.shape[1],
        tile_columns=512,
        num_warps=4,
    )
    return squares, lengths


def add_rows(wide: Tensor, weights: Tensor | None, order: Tensor, edges: Tensor, raw: Tensor, sums: Tensor) -> Tensor:
    """Add the rows of each cluster, times their weights, to its sum, in the given order.

    Args:
        wide: (m, d) float32.
        weights: (m,) float64, or none.
        order: (m,) int64, rows sorted by cluster.
        edges: (k + 1,) int64, where in that order each cluster begins and the last one ends.
        raw: (k, d) float32 centroids.
        sums: (k, d) float64, added to in place.

    Returns:
        (m,) float32, the squared distance of each row to its centroid.
    """
    d = wide.shape[1]
    pieces = triton.cdiv(d, SUM_COLUMNS)
    squares = wide.new_empty((len(wide), pieces), dtype=torch.float64)
    _add_rows[(len(raw), pieces)](
        wide,
        wide if weights is None else weights,
        order,
        edges,
        raw,
        sums,
        squares,
        d,
        pieces,
        weighted=weights is not None,
        tile_rows=16,
        tile_columns=SUM_COLUMNS,
        num_warps=4,
    )
    return squares.sum(dim=1).float()


def _room(ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(ratios, dtype=torch.int32), torch.empty_like(ratios), torch.empty_like(ratios)
