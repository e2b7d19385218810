"""Clusters of equal size: each row goes to the nearest centroid *plus its price*, and prices make the sizes equal.

Minimise the sum of squared distances over all labellings whose cluster sizes are n / k rounded down or up. The dual has
one price for each cluster, and an update needs one look at the rows, so nothing of size n x k is ever held:

1. Prices: Sinkhorn's iteration (Cuturi 2013) with falling temperature. At temperature t a row belongs to cluster j with
   weight softmin((cost_ij + price_j) / t); a cluster of `size` instead of n / k gets dearer by t log(size k / n), and
   by more where rows hardly waver.
2. Rounding: rows go to their cheapest cluster. That labelling is the best of all with *its* sizes, which are nearly
   equal. What is over is then moved along shortest paths in the graph of clusters, whose edge from a to b is the row of
   a that can go to b at the least increase (successive shortest paths: Ahuja, Magnanti and Orlin, "Network flows",
   1993, chapter 9.7). Each step keeps the labelling the best of its sizes as far as the `WIDTH` cheapest clusters of
   each row are concerned.
3. Proof: for any prices, sum_i min_j (cost_ij + price_j) - sum_j size_j price_j is a lower bound of the cost of *every*
   labelling with these sizes (weak duality). It is computed with the labels, so that each result says how far it may be
   from the best.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.errors import UsageError
from ktransfer.progress import bar

from ..engines.engine import Rows

SCORES = 2**23  # a block's scores with all centroids: 32 MiB of float32
WIDTH = 16  # clusters that are kept for each row
SAMPLE = 4096
COOLING = 0.8
DAMPING = 0.7
BOLDEST = 8.0  # times Sinkhorn's step
ROUNDS = 8
ENOUGH = 1e-3
COLDEST = 1 / 16  # of the mean gap between a row's nearest and second-nearest centroid

Costs = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Tick = Callable[[int], object]


class Balanced(NamedTuple):
    """A labelling with equal sizes.

    Attributes:
        labels: (n,) int32 in [0, k); each occurs n // k or n // k + 1 times.
        distances: (n,) float32, squared Euclidean distance to the row's centroid.
        cost: sum of these.
        bound: no labelling with such sizes costs less (up to float32 rounding).
    """

    labels: NDArray[np.int32]
    distances: NDArray[np.float32]
    cost: float
    bound: float


class Lists(NamedTuple):
    """The clusters that a row may go to.

    Attributes:
        clusters: (n, w) int32; the last column is spare, and holds the row's first cluster at the start.
        costs: (n, w) float32, squared distance less the row's own share of it, |x|^2.
    """

    clusters: NDArray[np.int32]
    costs: NDArray[np.float32]


class Edges(NamedTuple):
    """Ways between clusters: the other end, the increase of the cost, and the row that goes, the lowest of equals."""

    targets: NDArray[np.int32]
    increases: NDArray[np.float64]
    movers: NDArray[np.int64]


def assign_balanced(rows: Rows, centroids: NDArray[np.float32], passes: int = 30) -> Balanced:
    """Label rows so that all clusters have n / k rows, rounded down or up, at nearly the least sum of squares.

    The sizes are exact. Where k <= `WIDTH` the cost is the least possible up to float32 rounding; else `Balanced.bound`
    says how near it is, and rounding is done again with better prices until that is within `ENOUGH`, at most `ROUNDS`
    times. Ties go to the lowest cluster and row. It looks passes + 2 times at all rows, twice more for each further
    round, each time at the price of a dense k-means iteration, and holds 8 (`WIDTH` + 1) bytes a row.

    Args:
        rows: n rows; their weights are ignored.
        centroids: (k, d) float32.
        passes: looks at all rows to find prices; fewer leave more to the rounding.

    Raises:
        UsageError: rows and centroids differ in length.
    """
    if rows.dim != centroids.shape[1]:
        raise UsageError(f"rows of {rows.dim} numbers cannot be assigned to centroids of {centroids.shape[1]}")
    k = len(centroids)
    origin = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
    costs = _costs(centroids, origin)
    with bar((passes + 2) * rows.count, "balance clusters", "rows") as shown:
        prices = _prices(rows, costs, k, passes, shown.update)
        found = Balanced(np.empty(0, np.int32), np.empty(0, np.float32), np.inf, -np.inf)
        for step in range(ROUNDS):
            shown.total = (passes + 2 * step + 2) * rows.count
            lists, labels = _shortlist(rows, costs, prices, shown.update)
            # Its prices make better lists, should these have been too short.
            _equalise(rows, costs, lists, labels, prices)
            del lists  # as large as the next ones
            again = _measure(rows, costs, centroids, origin, labels, prices, shown.update)
            bound = max(found.bound, again.bound)
            found = (again if again.cost < found.cost else found)._replace(bound=bound)
            if found.cost - found.bound <= ENOUGH * found.cost:
                break
        return found


def _costs(centroids: NDArray[np.float32], origin: NDArray[np.float32]) -> Costs:
    """(b, d) rows -> (b, k) squared distances less |x - origin|^2, which no comparison within a row needs."""
    centred = centroids - origin
    lengths = np.einsum("ij,ij->i", centred, centred, dtype=np.float64).astype(np.float32)
    turned = np.ascontiguousarray(-2 * centred.T)

    def costs(block: NDArray[np.float32]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = (block - origin) @ turned
        scores += lengths
        return scores

    return costs


def _blocks(rows: Rows, k: int) -> Iterator[tuple[int, int]]:
    size = max(1, SCORES // max(rows.dim, k))
    for start in range(0, rows.count, size):
        yield start, min(start + size, rows.count)


def _prices(rows: Rows, costs: Costs, k: int, passes: int, tick: Tick) -> NDArray[np.float64]:
    prices = np.zeros(k)
    spread, gap = _scales(rows, costs, k)
    heat = spread
    for _ in range(passes):
        if gap == 0:  # one cluster, or centroids that are all alike: prices cannot tell rows apart
            tick(rows.count)
            continue
        sizes, squares = np.zeros(k), np.zeros(k)
        for start, stop in _blocks(rows, k):
            scores = costs(rows.read(start, stop))
            scores += prices.astype(np.float32)
            scores -= scores.min(axis=1, keepdims=True)
            scores *= np.float32(-1 / heat)
            np.exp(scores, out=scores)
            shares = 1 / scores.sum(axis=1)
            sizes += shares @ scores
            squares += shares**2 @ scores**2
            tick(stop - start)
        # Newton's step by the diagonal: a cold size gives way by less than Sinkhorn's step supposes.
        gain = sizes / np.maximum(sizes - squares, np.maximum(sizes / BOLDEST, 1e-12))
        prices += DAMPING * gain * heat * np.log(np.maximum(sizes * k / rows.count, 1e-3))
        prices -= prices.mean()
        heat = max(heat * COOLING, COLDEST * gap)
    return prices


def _scales(rows: Rows, costs: Costs, k: int) -> tuple[float, float]:
    """On a sample: the mean gap from a row's nearest centroid to the average one, and to the second-nearest."""
    if k == 1:
        return 0.0, 0.0
    piece = min(max(1, SAMPLE // 8), rows.count)
    places = np.linspace(0, rows.count - piece, 8).astype(int).tolist()
    found = [np.sort(costs(rows.read(place, place + piece)), axis=1) for place in places]
    gaps = [(float((one.mean(axis=1) - one[:, 0]).mean()), float((one[:, 1] - one[:, 0]).mean())) for one in found]
    spread, gap = np.mean(gaps, axis=0).tolist()
    return spread, gap


def _shortlist(rows: Rows, costs: Costs, prices: NDArray[np.float64], tick: Tick) -> tuple[Lists, NDArray[np.int32]]:
    """The cheapest clusters of each row, and the cheapest of all."""
    k = len(prices)
    width = min(WIDTH, k)
    lists = Lists(np.empty((rows.count, width + 1), np.int32), np.empty((rows.count, width + 1), np.float32))
    for start, stop in _blocks(rows, k):
        found = costs(rows.read(start, stop))
        near = np.broadcast_to(np.arange(k), found.shape)
        if width < k:
            near = np.sort(np.argpartition(found + prices.astype(np.float32), width - 1, axis=1)[:, :width], axis=1)
        kept = np.take_along_axis(found, near, axis=1)
        first = (kept + prices[near]).argmin(axis=1)[:, None]
        lists.clusters[start:stop] = np.hstack([near, np.take_along_axis(near, first, axis=1)])
        lists.costs[start:stop] = np.hstack([kept, np.take_along_axis(kept, first, axis=1)])
        tick(stop - start)
    return lists, lists.clusters[:, -1].copy()


def _equalise(
    rows: Rows,
    costs: Costs,
    lists: Lists,
    labels: NDArray[np.int32],
    prices: NDArray[np.float64],
) -> None:
    """Move rows until each cluster has its size; `labels` and `prices` are changed in place.

    Which n % k clusters get one row more is part of the optimum: node k of the graph holds what they have more. From it
    each cluster of the larger size can be reached (it gives that up), and from each of the smaller size it can.
    """
    k = len(prices)
    larger = np.zeros(k, bool)
    dearest = np.argsort(-prices, kind="stable")[: rows.count % k]
    larger[dearest] = True
    level = prices[dearest].min() if len(dearest) else np.inf
    levels = np.append(prices, level)
    missing = np.append(rows.count // k + larger - np.bincount(labels, minlength=k), 0)
    own = lists.costs[:, -1].astype(np.float64)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.searchsorted(labels[order], np.arange(1, k)))
    edges: dict[int, Edges] = {}

    def leave(cluster: int) -> Edges:
        if cluster == k:
            targets = np.flatnonzero(larger).astype(np.int32)
            return Edges(targets, np.zeros(len(targets)), np.full(len(targets), -1))
        if cluster not in edges:
            edges[cluster] = _edges(cluster, members[cluster], lists, own, k)
        ways = edges[cluster]
        if larger[cluster] or not rows.count % k:
            return ways
        return Edges(np.append(ways.targets, np.int32(k)), np.append(ways.increases, 0), np.append(ways.movers, -1))

    with bar(int(-missing[missing < 0].sum()), "make sizes equal", "rows") as shown:
        for source in np.flatnonzero(missing < 0).tolist():
            while missing[source] < 0:
                settled, via = _search(source, leave, levels, missing)
                end = next(reversed(settled))
                if missing[end] <= 0:
                    # The lists of all rows within reach lead nowhere: show each the clusters that still want rows.
                    _widen(rows, costs, lists, labels, levels[:k], settled, np.flatnonzero(missing > 0))
                    for cluster in settled:
                        edges.pop(cluster, None)
                    continue
                for cluster, distance in settled.items():
                    levels[cluster] += settled[end] - distance
                missing[source] += 1
                missing[end] -= 1
                while end != source:
                    before, row = int(via.targets[end]), int(via.movers[end])
                    if k in (before, end):
                        larger[min(before, end)] = end == k
                    else:
                        members[before] = members[before][members[before] != row]
                        members[end] = np.insert(members[end], np.searchsorted(members[end], row), row)
                        labels[row] = end
                        own[row] += via.increases[end]
                    edges.pop(end, None)
                    end = before
                edges.pop(source, None)
                shown.update()
    prices[:] = levels[:k]


def _search(
    source: int, leave: Callable[[int], Edges], levels: NDArray[np.float64], missing: NDArray[np.int64]
) -> tuple[dict[int, float], Edges]:
    """Dijkstra's algorithm to the nearest cluster that wants rows.

    Returns:
        The clusters reached for good with their distances, in this order; and how each was reached, for all clusters:
        from which one, by what increase of the cost, by which row.
    """
    settled: dict[int, float] = {}
    distances = np.full(len(levels), np.inf)
    waiting = distances.copy()
    distances[source] = waiting[source] = 0
    via = Edges(np.zeros(len(levels), np.int32), np.zeros(len(levels)), np.zeros(len(levels), np.int64))
    while waiting[cluster := int(waiting.argmin())] < np.inf:
        settled[cluster] = float(distances[cluster])
        if missing[cluster] > 0:
            break
        waiting[cluster] = np.inf
        ways = leave(cluster)
        # Below 0 by rounding, and where a list was widened late; so a settled cluster is never reached sooner.
        steps = np.maximum(ways.increases + levels[ways.targets] - levels[cluster], 0)
        nearer = np.flatnonzero(distances[cluster] + steps < distances[ways.targets])
        targets = ways.targets[nearer]
        distances[targets] = waiting[targets] = distances[cluster] + steps[nearer]
        via.targets[targets], via.increases[targets], via.movers[targets] = (
            cluster,
            ways.increases[nearer],
            ways.movers[nearer],
        )
    return settled, via


def _edges(cluster: int, members: NDArray[np.int64], lists: Lists, own: NDArray[np.float64], k: int) -> Edges:
    targets = lists.clusters[members].ravel()
    increases = (lists.costs[members] - own[members][:, None]).ravel()
    least = np.full(k, np.inf)
    np.minimum.at(least, targets, increases)
    least[cluster] = -np.inf  # no way out
    best = np.flatnonzero(increases == least[targets])
    found, first = np.unique(targets[best], return_index=True)
    best = best[first]
    return Edges(found, increases[best], members[best // lists.clusters.shape[1]])


def _widen(
    rows: Rows,
    costs: Costs,
    lists: Lists,
    labels: NDArray[np.int32],
    prices: NDArray[np.float64],
    inside: dict[int, float],
    wanting: NDArray[np.int64],
) -> None:
    """Put the cheapest of the clusters `wanting` rows into the spare column of all rows `inside`."""
    chosen = np.zeros(len(prices) + 1, bool)
    chosen[list(inside)] = True
    for start, stop in _blocks(rows, len(prices)):
        places = np.flatnonzero(chosen[labels[start:stop]])
        if len(places):
            found = costs(rows.read(start, stop)[places])[:, wanting]
            best = (found + prices[wanting]).argmin(axis=1)
            lists.clusters[start + places, -1] = wanting[best]
            lists.costs[start + places, -1] = found[np.arange(len(places)), best]


def _measure(
    rows: Rows,
    costs: Costs,
    centroids: NDArray[np.float32],
    origin: NDArray[np.float32],
    labels: NDArray[np.int32],
    prices: NDArray[np.float64],
    tick: Tick,
) -> Balanced:
    k = len(prices)
    distances = np.empty(rows.count, np.float32)
    cost = bound = 0.0
    for start, stop in _blocks(rows, k):
        block = rows.read(start, stop)
        gap = block - centroids[labels[start:stop]]
        squares = np.einsum("ij,ij->i", gap, gap, dtype=np.float64)
        distances[start:stop] = squares
        cost += float(squares.sum())
        centred = block - origin
        bound += float(np.einsum("ij,ij->", centred, centred, dtype=np.float64))
        bound += float((costs(block) + prices).min(axis=1).sum())
        tick(stop - start)
    # Of all ways to hand out the sizes the one that makes the bound lowest, so that it holds for each of them.
    bound -= rows.count // k * float(prices.sum()) + float(np.sort(prices)[k - rows.count % k :].sum())
    return Balanced(labels, distances, cost, min(bound, cost))
