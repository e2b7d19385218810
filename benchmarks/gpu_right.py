"""Rows for benchmarks/gpu.py, and whether what it measures is right; that script is the one to run."""

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Line = dict[str, Any]
Tried = Callable[[str, str, Callable[[], Line]], None]  # part, what is measured, the measurement


def made(kind: str, n: int, d: int, device: torch.device) -> Tensor:
    """(n, d) float32 rows as those of benchmarks/kmeans.py, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.empty(n, d, device=device)
    inner, components = (d, 500) if kind == "gmm" else (128, 300)
    scale = torch.ones(inner, device=device) if kind == "gmm" else torch.arange(1, inner + 1, device=device) ** -0.5
    centres = torch.randn(components, inner, generator=generator, device=device) * scale
    mix = torch.randn(inner, d, generator=generator, device=device)
    for part in rows.split(2**15):
        if kind == "unif":
            part.uniform_(generator=generator)
            continue
        weights = torch.arange(1, components + 1, device=device) ** -0.5
        chosen = torch.multinomial(weights, len(part), True, generator=generator)
        noise = torch.randn(len(part), inner, generator=generator, device=device) * scale
        if kind == "gmm":
            part.copy_(centres[chosen] * 0.5 + noise)
        else:
            part.copy_(((centres[chosen] + noise) @ mix - 0.5).relu_())
            part.add_(torch.randn(part.shape, generator=generator, device=device), alpha=0.5).relu_()
    return rows


def start_of(rows: Tensor, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return rows[torch.randperm(len(rows), generator=generator)[:k].to(rows.device)].clone()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def noted(found: list[Any], work: Callable[[], Any]) -> None:
    found.append(work())


def ignored(done: int) -> None:
    """No bar is drawn."""


def held(rows: Tensor) -> Any:
    """Rows for the engine that are on the device already."""
    from ktransfer.cluster.engines.engine import Rows

    def read(begin: int, end: int) -> np.ndarray:
        return rows[begin:end].cpu().numpy()

    def part(begin: int, end: int) -> Tensor:
        return rows[begin:end]

    return Rows(len(rows), rows.shape[1], read, None, part)


def on_host(data: np.ndarray) -> Any:
    """Rows for the engine that are in the machine's memory."""
    from ktransfer.cluster.engines.engine import Rows

    return Rows(len(data), data.shape[1], lambda begin, end: data[begin:end])


def stocked(rows: Tensor, centroids: Tensor) -> Any:
    from ktransfer.cluster.engines.device_rows import Stock

    return Stock(held(rows), centroids.mean(dim=0), len(rows))


def moved(centroids: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    means = (sums / counts.clamp(min=1)[:, None]).float()
    return torch.where(counts[:, None] > 0, means, centroids)


def brute(rows: Tensor, centroids: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) nearest centroids by products in this precision, centred; the lower index of equals."""
    middle = centroids.mean(dim=0, dtype=torch.float64)
    wide = (centroids.double() - middle).to(dtype)
    half = wide.double().square().sum(dim=1).div(2).to(dtype)
    return torch.cat([((part.double() - middle).to(dtype) @ wide.T - half).argmax(dim=1) for part in rows.split(4096)])


def labels_of(kind: str, n: int, d: int, k: int, device: torch.device, kernels: Any) -> Line:
    """After three passes, beside float64 and float32; and the largest error of a score, of what is allowed."""
    from ktransfer.cluster.engines.device import look
    from ktransfer.cluster.engines.device_rounding import doubt, halve_centroids, ratio
    from ktransfer.cluster.engines.device_steps import product

    rows = made(kind, n, d, device)
    centroids = start_of(rows, k)
    stock = stocked(rows, centroids)
    for step in range(3):
        labels, _, sums, counts = look(stock, centroids, kernels, ignored)
        if step < 2:
            centroids = moved(centroids, sums, counts)
    exact, single = (brute(rows, centroids, dtype) for dtype in (torch.float64, torch.float32))
    target = halve_centroids(centroids, stock.origin)
    some = stock.resident.half
    part = type(some)(*(field[:4096] for field in some))
    scores = product(part.half, target.half).double() * ratio(part, target).double()[:, None] + target.bias
    x = (rows[:4096].double() - stock.origin) / target.unit
    c = (centroids.double() - stock.origin) / target.unit
    off = (scores - (x @ c.T - c.square().sum(dim=1) / 2)).abs().amax(dim=1)
    return {
        "equal_float64": float((labels == exact).double().mean()),
        "equal_float32": float((labels == single).double().mean()),
        "float32_equal_float64": float((single == exact).double().mean()),
        "in_doubt": stock.doubted / n,
        "error_of_bound": float((off / (doubt(part, target) / 2)).max()),
    }


def streamed(n: int, d: int, k: int, device: torch.device, kernels: Any) -> Line:
    """The same pass with all rows on the device, two spans of them, none, and none again: the same bytes?"""
    from ktransfer.cluster.engines.device import look
    from ktransfer.cluster.engines.device_rows import Stock, span

    rows = made("relu", n, d, device)
    centroids = start_of(rows, k)
    data = rows.cpu().numpy()
    del rows
    clean(device)
    found: list[Any] = []
    times = []
    for kept in (n, min(2 * span(on_host(data)), n), 0, 0):
        stock = Stock(on_host(data), centroids.mean(dim=0), kept)
        once = partial(look, stock, centroids, kernels, ignored)
        times.append(seconds(partial(noted, found, once), device))
    same = all(torch.equal(left, right) for one in found[1:] for left, right in zip(found[0], one, strict=True))
    exact = brute(torch.from_numpy(data[:4096]).to(device), centroids, torch.float64)
    return {
        "equal_float64": float((found[-1][0][:4096] == exact).double().mean()),
        "same_bytes": same,
        "seconds_resident": times[0],
        "seconds_streamed": times[-1],
    }


def right(device: torch.device, quick: bool, kernels: Any, tried: Tried) -> None:
    n, k = (600, 30) if quick else (100_000, 2000)
    for kind in ("relu", "gmm", "unif"):
        for d in (32, 1100) if quick else (256, 512, 4096, 8192):
            tried("right", f"{kind} D={d}", partial(labels_of, kind, n, d, k, device, kernels))
    n, d = (600, 32) if quick else (300_000, 4096)
    tried("right", f"streamed D={d}", partial(streamed, n, d, k, device, kernels))
