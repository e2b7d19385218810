"""Arrays of any kind as rows for k-means: numpy, memory-mapped, HDF5, torch on any device; float32, block by block."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer.progress import bar

from .engines.engine import Rows, blocks

Doubles = NDArray[np.float64]

FAR = 3.0  # half-ranges between a column's middle and 0 from which it is centred
NOT_FINITE = "Input X contains NaN, infinity or a number too large: leave such rows out"
PLAIN = 2.0**30  # numbers up to this size and down to its inverse have squares that float32 can add up


class Frame(NamedTuple):
    """How rows become float32 without losing digits: (x - offset) / unit.

    Attributes:
        offset: (d,) float32 for rows of float32 and narrower, else float64; 0 where a column is near the origin.
        unit: a power of two.
    """

    offset: NDArray[Any]
    unit: float


def frame_of(table: Any, weights: Doubles | None) -> Frame:
    """The frame of the rows that weigh something; their order and number do not matter.

    Raises:
        ValueError: NaN or infinity in a row, also in one of no weight.
    """
    count, dim = table.shape
    low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
    narrow = True
    for start, stop in passing("check rows", count, dim):
        block = _block(table, start, stop)
        _check_finite(block)
        narrow = block.dtype == np.float32
        if weights is not None:
            block = block[weights[start:stop] > 0]
        low = np.minimum(low, block.min(axis=0, initial=np.inf))
        high = np.maximum(high, block.max(axis=0, initial=-np.inf))
    middle = low / 2 + high / 2
    # So far out, float32 subtraction of the middle is exact (Sterbenz); nearer, centring would save two bits at most.
    middle[np.abs(middle) < FAR * (high / 2 - low / 2)] = 0
    offset = middle.astype(np.float32 if narrow else np.float64)
    size = float(np.maximum(high - offset, offset - low).max())
    unit = 1.0 if size == 0 or 1 / PLAIN <= size <= PLAIN else 2.0 ** int(np.frexp(size)[1] - 1)
    return Frame(offset, unit)


def into(frame: Frame, centres: NDArray[Any]) -> NDArray[np.float32]:
    """(k, d) centres as the frame's rows are."""
    return np.asarray((centres - frame.offset.astype(np.float64)) / frame.unit, np.float32)


def passing(label: str, count: int, dim: int) -> Iterator[tuple[int, int]]:
    """`blocks`, with a bar."""
    with bar(count, label, "rows") as shown:
        for start, stop in blocks(count, dim):
            yield start, stop
            shown.update(stop - start)


def reader(table: Any, frame: Frame) -> Callable[[int, int], NDArray[np.float32]]:
    """(start, stop) -> rows in the frame; raises ValueError where one is not finite there."""
    centred = bool(frame.offset.any())

    def read(start: int, stop: int) -> NDArray[np.float32]:
        block = _block(table, start, stop)
        if centred:
            block = block - frame.offset
        if frame.unit != 1:
            block = block / np.float64(frame.unit)
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(block, np.float32)
        _check_finite(block)
        return block

    return read


def device_reader(table: Any, frame: Frame) -> Callable[[int, int], Tensor] | None:
    """For a tensor on a GPU, the same rows as `reader` gives, as tensors there; None for all else."""
    return _tensor_reader(table, frame) if isinstance(table, Tensor) and table.is_cuda else None


def _tensor_reader(table: Tensor, frame: Frame) -> Callable[[int, int], Tensor]:
    offset = torch.from_numpy(frame.offset).to(table.device)
    narrow = table.dtype in (torch.float16, torch.bfloat16, torch.float32)

    def read(start: int, stop: int) -> Tensor:
        block = table[start:stop].detach().to(torch.float32 if narrow else torch.float64)
        if frame.offset.any():
            block = block - offset
        if frame.unit != 1:
            block = block.double() / frame.unit
        block = block.float()
        if not bool(block.isfinite().all()):
            raise ValueError(NOT_FINITE)
        return block

    return read


def _block(table: Any, start: int, stop: int) -> NDArray[Any]:
    """Rows as float32 where that holds them, else as float64."""
    block = as_numpy(table[start:stop])
    return block.astype(np.float32 if block.dtype in (np.float16, np.float32) else np.float64, copy=False)


def _check_finite(block: NDArray[Any]) -> None:
    if not np.isfinite(block).all():
        raise ValueError(NOT_FINITE)


def weighed(rows: Rows, weights: Doubles | None) -> Rows:
    """Those of the rows that weigh something, with their weights."""
    if weights is None:
        return rows
    kept = np.flatnonzero(weights)

    def read(start: int, stop: int) -> NDArray[np.float32]:
        if len(kept) == rows.count:
            return rows.read(start, stop)
        # In pieces, so that memory stays that of one block however few rows are kept; files are read in order.
        first, end = int(kept[start]), int(kept[stop - 1]) + 1
        edges = [(at, min(at + stop - start, end)) for at in range(first, end, stop - start)]
        return np.concatenate([rows.read(a, b)[weights[a:b] > 0] for a, b in edges])

    return Rows(len(kept), rows.dim, read, weights[kept], rows.on_device if len(kept) == rows.count else None)


def variance(rows: Rows) -> float:
    """The mean of the columns' variances."""
    mass, sums, squares = 0.0, np.zeros(rows.dim), np.zeros(rows.dim)
    for start, stop in passing("variance", rows.count, rows.dim):
        weights = np.ones(stop - start) if rows.weights is None else rows.weights[start:stop]
        block = rows.read(start, stop).astype(np.float64)
        mass += float(weights.sum())
        sums += weights @ block
        squares += weights @ np.square(block)
    return float(np.maximum(squares / mass - np.square(sums / mass), 0).mean())


def check_weights(given: Any, count: int) -> Doubles | None:
    """(count,) float64 >= 0, or None where none are given.

    Raises:
        ValueError: another shape, NaN, infinity, a negative number, or nothing but zeros.
    """
    if given is None:
        return None
    weights = as_numpy(given).astype(np.float64)
    if weights.shape != (count,):
        raise ValueError(f"sample_weight has shape {weights.shape}, not ({count},): give one number for each row")
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError("sample_weight contains NaN, infinity or a negative number: give weights of at least 0")
    if not weights.any():
        raise ValueError("all sample weights are zero: at least one row must count")
    return weights


def streams(given: Any) -> bool:
    """Whether it is an array that is no numpy array, to be read by slices."""
    # Those that count their nonzeros are sparse, and scikit-learn's to refuse.
    if isinstance(given, np.ndarray | np.generic) or hasattr(given, "nnz"):
        return False
    kind = getattr(getattr(given, "dtype", None), "kind", None)
    return len(getattr(given, "shape", ())) == 2 and kind in ("f", "i", "u")


def as_numpy(values: Any) -> NDArray[Any]:
    """What numpy makes of it; tensors of any device too, half precision as float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)


def like(given: Any, values: NDArray[Any]) -> Any:
    """For a tensor, values as a tensor on its device; labels as int64, torch's type for indices."""
    if not isinstance(given, Tensor):
        return values
    made = torch.from_numpy(values)
    if values.dtype.kind == "i":
        made = made.long()
    elif given.device.type == "mps":
        made = made.float()  # it has no float64
    return made.to(given.device)
