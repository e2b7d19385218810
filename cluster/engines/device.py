"""The exact engine on a GPU: labels of a search in float64 at the speed of float16.

Rows stay on the device, as float32 and as centred float16, where they fit; the rest is streamed by spans through
pinned memory, one being copied while the device works on the one before. A pass multiplies in float16, with float32
sums, on the tensor cores; device_rounding.py proves how far a score can be off, and only rows whose best two are
closer than that are computed again, in float64, from the float32 rows. So labels equal those of the other engines,
and sums, in float64, are of the float32 rows.

Deterministic by construction: labels do not depend on how a product was rounded, each sum is one thread's work in the
order of the rows, and spans do not depend on how many rows are kept. No atomic addition is used anywhere.

This was tested on CPU tensors, and its Triton kernels in Triton's interpreter. It was never run on a GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer import __version__
from ktransfer.errors import StageError
from ktransfer.progress import say

from .device_rounding import HalfCentroids, halve_centroids
from .device_rows import Held, Stock, free_bytes, kept_rows, span
from .device_steps import add_up, label, settle, trial
from .engine import Engine, Pass, Rows

Tell = Callable[[str], object]


def device_engine(
    device: str | torch.device = "cuda", budget: int | None = None, fused: bool = True, tell: Tell = say
) -> Engine:
    """Lloyd's pass on one device.

    Args:
        device: where; "cuda" is the current GPU, and "cpu" is there for tests.
        budget: bytes that may be taken on it; nine tenths of what is free when not given (on the CPU: no limit).
        fused: False: products and looks by torch alone, although Triton is there.
        tell: is given a line when Triton is not used, and when rows are streamed.

    Raises:
        StageError: by `scan`, the device's memory does not suffice.
    """
    device = torch.device(device)
    kernels = _kernels(device, tell) if fused else None
    stock: Stock | None = None

    def scan(rows: Rows, centroids: NDArray[np.float32], tick: Callable[[int], object]) -> Pass:
        nonlocal stock
        try:
            with _current(device):
                raw = torch.from_numpy(np.array(centroids, np.float32, order="C")).to(device)
                if stock is None or stock.rows is not rows:
                    stock = None  # its memory first
                    stock = _stock(rows, raw, budget, tell)
                return _on_host(look(stock, raw, kernels, tick))
        except torch.OutOfMemoryError as error:
            stock = None
            raise StageError(
                f"the GPU ran out of memory ({str(error).splitlines()[0]}); "
                "see what else uses it, or give --engine faiss"
            ) from error

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    by = "" if kernels else ", torch alone"
    return Engine(f"exact on {name}{by}", f"{__version__}, torch {torch.__version__}", scan)


def look(
    stock: Stock, centroids: Tensor, kernels: ModuleType | None, tick: Callable[[int], object]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A pass, its centroids and results on the device: labels, distances, sums, counts as in `Pass`.

    The host waits for the device once for the rows that stay there, and once for each span that is streamed: for the
    number of rows in doubt (and once more where many centroids are equally near).
    """
    rows = stock.rows
    target = halve_centroids(centroids, stock.origin)
    labels = torch.empty(rows.count, dtype=torch.int32, device=stock.device)
    distances = torch.empty(rows.count, device=stock.device)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=stock.device)
    coming = stock.parts()
    stock.doubted = 0
    part = next(coming, None)
    while part is not None:
        half = stock.ready(part)
        labels[part.start : part.stop], unsure = label(half, target, kernels)
        ahead = next(coming, None)  # read and copied while the device works
        stock.doubted += settle(part.wide, half, target, labels[part.start : part.stop], unsure, kernels)
        _add(part, target, labels, distances, sums, counts, span(rows), kernels)
        stock.release(part)
        tick(part.stop - part.start)
        part = ahead
    return labels, distances, sums, counts


def _add(
    part: Held,
    target: HalfCentroids,
    labels: Tensor,
    distances: Tensor,
    sums: Tensor,
    counts: Tensor,
    size: int,
    kernels: ModuleType | None,
) -> None:
    for start in range(part.start, part.stop, size):
        stop = min(start + size, part.stop)
        own = slice(start - part.start, stop - part.start)
        weights = None if part.weights is None else part.weights[own]
        found, number = add_up(part.wide[own], weights, target, labels[start:stop], sums, kernels)
        distances[start:stop] = found
        counts += number


def _stock(rows: Rows, centroids: Tensor, budget: int | None, tell: Tell) -> Stock:
    device = centroids.device
    if budget is None:
        budget = free_bytes(device) if device.type == "cuda" else 2**62
    kept = kept_rows(rows, len(centroids), budget)
    if kept < rows.count:
        tell(
            f"k-means, exact engine: {kept} of {rows.count} rows stay on the GPU ({budget / 1e9:.1f} GB free), "
            "the others are copied there in each pass"
        )
    origin = centroids.mean(dim=0, dtype=torch.float64).float()
    return Stock(rows, origin, kept)


def _on_host(found: tuple[Tensor, Tensor, Tensor, Tensor]) -> Pass:
    labels, distances, sums, counts = (tensor.cpu().numpy() for tensor in found)
    return Pass(labels, distances, sums, counts)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _kernels(device: torch.device, tell: Tell) -> ModuleType | None:
    """The Triton kernels where they work here; said where they do not."""
    if device.type != "cuda":
        return None
    kernels, reason = _tried(device)
    if kernels is None:
        tell(f"k-means, exact engine: without Triton ({reason}): products in chunks by torch, same labels, slower")
    return kernels


@cache
def _tried(device: torch.device) -> tuple[ModuleType | None, str]:
    try:
        from . import triton_kernels

        with _current(device):
            trial(triton_kernels, device)
    except Exception as error:  # a compiler for another card, driver or release can fail in any way
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return triton_kernels, ""
