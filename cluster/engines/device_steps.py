"""The steps of a pass on a device: nearest centroids by float16, the recheck of those in doubt, sums and distances.

Each function works on the rows that are on the device at the moment. Only `settle` waits for the device: how many
rows are in doubt decides how much is left to do. With `kernels` (triton_kernels.py) scores are not written to memory
for rows of up to `FUSED_COLUMNS` numbers; without, torch does the same in chunks.
"""

from types import ModuleType

import torch
from torch import Tensor

from .device_rounding import HalfCentroids, Operand, doubt, halve, halve_centroids, padded, ratio
from .engine import TIE

SCORES_AT_ONCE = (
    2**23
)  # 32 MiB of float32: they stay in the cache of a large GPU between the product and the look at them
PAIRS_AT_ONCE = 2**25  # float64 numbers of the recheck
NUMBERS_AT_ONCE = 2**25  # float32 numbers that are copied for conversion
FUSED_COLUMNS = 1024  # above, cuBLAS and a look at its scores take less than a fused kernel
CANDIDATES = 4  # centroids of a row in doubt that are compared by themselves; where more are near, all are


def operand(wide: Tensor, origin: Tensor) -> Operand:
    """`halve` in pieces, so that the float32 copies in between stay small."""
    m, d = wide.shape
    made = Operand(
        wide.new_empty((m, padded(d)), dtype=torch.float16), wide.new_empty(m), wide.new_empty(m), wide.new_empty(m)
    )
    step = max(1, NUMBERS_AT_ONCE // d)
    for start in range(0, m, step):
        for room, field in zip(made, halve(wide[start : start + step], origin), strict=True):
            room[start : start + step] = field
    return made


def label(rows: Operand, target: HalfCentroids, kernels: ModuleType | None) -> tuple[Tensor, Tensor]:
    """Nearest centroids as float16 sees them.

    Returns:
        labels (m,) int32, and (m,) bool: where they are not proved.
    """
    if len(target.raw) == 1:
        alone = rows.half.new_zeros(len(rows.half), dtype=torch.int32)
        return alone, alone.bool()
    labels, best, second = _two_best(rows, target, kernels)
    gap = best.double() - second
    return labels, ~((gap > doubt(rows, target)) & (gap < torch.inf))


def _two_best(rows: Operand, target: HalfCentroids, kernels: ModuleType | None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (m,) int32, and the best and second best score (m,) float32."""
    by = ratio(rows, target)
    if kernels and rows.half.shape[1] <= FUSED_COLUMNS:
        found: tuple[Tensor, Tensor, Tensor] = kernels.nearest_two(rows.half, by, target.half, target.bias)
        return found
    labels = by.new_empty(len(by), dtype=torch.int32)
    best, second = torch.empty_like(by), torch.empty_like(by)
    step = max(1, SCORES_AT_ONCE // len(target.bias))
    for start in range(0, len(by), step):
        part = slice(start, start + step)
        scores = product(rows.half[part], target.half)
        if kernels:
            labels[part], best[part], second[part] = kernels.top_two(scores, by[part], target.bias)
            continue
        top, places = scores.mul_(by[part, None]).add_(target.bias).max(dim=1)
        scores.scatter_(1, places[:, None], -torch.inf)
        labels[part], best[part], second[part] = places.int(), top, scores.amax(dim=1)
    return labels, best, second


def product(rows: Tensor, centroids: Tensor) -> Tensor:
    """(m, k) float32: float16 vectors multiplied, added up in float32."""
    if rows.device.type != "cuda":
        # numpy, as torch's float32 products may go by bfloat16 where a global setting allows it.
        return torch.from_numpy(rows.float().numpy() @ centroids.float().numpy().T)
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction, flags.allow_fp16_accumulation
    flags.allow_fp16_reduced_precision_reduction = flags.allow_fp16_accumulation = False
    try:
        return torch.mm(rows, centroids.T, out_dtype=torch.float32)
    finally:
        flags.allow_fp16_reduced_precision_reduction, flags.allow_fp16_accumulation = before


def settle(
    wide: Tensor, rows: Operand, target: HalfCentroids, labels: Tensor, unsure: Tensor, kernels: ModuleType | None
) -> int:
    """Decide the rows in doubt from their float32 numbers, in float64; `labels` is corrected in place.

    Squared distances within TIE (|x - middle|^2 + widest) of the least are a tie, and the lowest index wins, as in
    every engine. What a score excludes in spite of its doubt is left out here too, so few pairs remain of each row.

    Returns:
        the number of rows in doubt.
    """
    places = unsure.nonzero().squeeze(1)  # waits for the device
    if not len(places):
        return 0
    k, d = target.raw.shape
    width = min(k, CANDIDATES + 1)
    crowded = torch.zeros_like(places, dtype=torch.bool)
    step = max(1, min(SCORES_AT_ONCE // k, SCORES_AT_ONCE if kernels else PAIRS_AT_ONCE // (d * CANDIDATES)))
    for start in range(0, len(places), step):
        part = places[start : start + step]
        some = Operand(*(field[part] for field in rows))
        scores = product(some.half, target.half).mul_(ratio(some, target)[:, None]).add_(target.bias)
        best, near = scores.topk(width, dim=1)
        # Written so that NaN is within.
        within = ~(best < (best[:, 0] - doubt(some, target))[:, None])
        crowded[start : start + step] = within[:, CANDIDATES:].any(dim=1)
        chosen = torch.full_like(near[:, :1], -1).repeat(1, CANDIDATES)
        chosen[:, :width] = torch.where(within, near, -1)[:, :CANDIDATES]
        squares, lengths = (kernels.pair_squares if kernels else _pair_squares)(
            wide, part, target.raw, target.middle, chosen
        )
        labels[part] = _lowest(squares, chosen, lengths + target.widest)
    rest = places[crowded]
    if len(rest):
        _settle_all(wide, target, labels, rest)
    return len(places)


def _pair_squares(wide: Tensor, places: Tensor, raw: Tensor, middle: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """As `pair_squares` of triton_kernels.py."""
    some = wide[places].double()
    squares = (some[:, None] - raw[near.clamp(min=0)]).square_().sum(dim=2)
    return squares.masked_fill_(near < 0, torch.inf), (some - middle).square_().sum(dim=1)


def _settle_all(wide: Tensor, target: HalfCentroids, labels: Tensor, places: Tensor) -> None:
    """The same against all centroids."""
    k, d = target.raw.shape
    centred = target.raw.double() - target.middle
    lengths = centred.square().sum(dim=1)
    indices = torch.arange(k, device=labels.device)
    for part in places.split(max(1, PAIRS_AT_ONCE // max(k, d))):
        # Centred in float64, where subtracting float32 numbers leaves exact ties exact.
        raw = wide[part].double() - target.middle
        squares = lengths - 2 * raw @ centred.T
        labels[part] = _lowest(squares, indices.expand_as(squares), raw.square().sum(dim=1) + target.widest)


def _lowest(squares: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    """(m,) int32: the lowest of the indices (m, c) whose squares are the least, to TIE of the scale (m,)."""
    tied = squares <= (squares.amin(dim=1) + TIE * scale)[:, None]
    return torch.where(tied, indices, torch.iinfo(torch.int32).max).amin(dim=1).int()


def add_up(
    wide: Tensor,
    weights: Tensor | None,
    target: HalfCentroids,
    labels: Tensor,
    sums: Tensor,
    kernels: ModuleType | None,
) -> tuple[Tensor, Tensor]:
    """Add each row, times its weight, to its cluster's sum; the same numbers in the same order every time.

    Rows are sorted by label once, and each sum is one thread's work from first to last: no atomic additions.

    Args:
        wide: (m, d) float32.
        weights: (m,) float64, or none.
        target: the centroids.
        labels: (m,) int32.
        sums: (k, d) float64, added to in place.
        kernels: those of triton_kernels.py, or none.

    Returns:
        squared distances to the own centroid (m,) float32, and rows of each cluster (k,) int64.
    """
    k = len(target.raw)
    ranked, order = labels.sort(stable=True)
    edges = torch.searchsorted(ranked, torch.arange(k + 1, dtype=torch.int32, device=labels.device))
    counts = edges.diff()
    if kernels:
        return kernels.add_rows(wide, weights, order, edges, target.raw, sums), counts
    step = max(1, NUMBERS_AT_ONCE // (2 * len(wide)))
    for start in range(0, wide.shape[1], step):
        part = wide[:, start : start + step][order].double()
        if weights is not None:
            part *= weights[order, None]
        sums[:, start : start + step] += torch.segment_reduce(part, "sum", lengths=counts, axis=0, unsafe=True)
    distances = torch.empty_like(wide[:, 0])
    step = max(1, NUMBERS_AT_ONCE // (2 * wide.shape[1]))
    for start in range(0, len(wide), step):
        gap = (wide[start : start + step] - target.raw[labels[start : start + step].long()]).double()
        distances[start : start + step] = gap.square_().sum(dim=1)
    return distances, counts


def trial(kernels: ModuleType, device: torch.device) -> None:
    """Run every kernel on a small problem beside torch, before anything relies on it.

    Raises:
        ArithmeticError: a kernel gives other numbers.
        Exception: whatever Triton raises when it cannot compile or launch.
    """
    for m, k, d in ((130, 33, 48), (96, 70, 300)):
        wide = torch.sin(torch.arange(m * d, dtype=torch.float64) * 0.7123).reshape(m, d).float().to(device)
        rows = operand(wide, wide.new_zeros(d))
        target = halve_centroids(wide[:k] * 0.9, wide.new_zeros(d))
        by, allowed = ratio(rows, target), doubt(rows, target)
        scores = product(rows.half, target.half)
        expected = (scores * by[:, None] + target.bias).double().topk(2, dim=1).values
        looks = kernels.nearest_two(rows.half, by, target.half, target.bias), kernels.top_two(scores, by, target.bias)
        for labels, best, second in looks:
            own = (scores * by[:, None] + target.bias).gather(1, labels.long()[:, None])[:, 0].double()
            for found, right in ((best, expected[:, 0]), (second, expected[:, 1]), (own, expected[:, 0])):
                if not bool(((found - right).abs() <= allowed).all()):
                    raise ArithmeticError(f"scores of {m} rows of {d} numbers are wrong")
        places = torch.arange(0, m, 3, device=device)
        near = (places[:, None] + torch.arange(CANDIDATES, device=device)).remainder(k + 1) - 1
        pairs = [look(wide, places, target.raw, target.middle, near) for look in (kernels.pair_squares, _pair_squares)]
        weights = torch.linspace(0.5, 2, m, dtype=torch.float64, device=device)
        for found, right in zip(*pairs, strict=True):
            if not torch.allclose(found, right, rtol=1e-12, atol=0):
                raise ArithmeticError(f"distances of {len(places)} rows of {d} numbers are wrong")
        looked = []
        for given in (kernels, None):
            sums = wide.new_zeros((k, d), dtype=torch.float64)
            distances, _ = add_up(wide, weights, target, looks[0][0], sums, given)
            looked.append((sums, distances.double()))
        for found, right in zip(*looked, strict=True):
            if not torch.allclose(found, right, rtol=1e-6, atol=1e-9):
                raise ArithmeticError(f"sums of {m} rows of {d} numbers are wrong")
