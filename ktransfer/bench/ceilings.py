"""What the machine at hand can do at best: large products, memory copies, JPEGs."""

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from ktransfer.bench.photographs import QUALITY
from ktransfer.images import decoding

LEAST = 3  # repetitions


def products(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """TFLOP/s of a large product of matrices in the given arithmetic."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: torch.mm(a, b), device, seconds) / 1e12


def copies(device: torch.device, seconds: float) -> float:
    """GB/s of a large copy within the device's memory: what is read, once; as much is written."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / _best(lambda: target.copy_(source), device, seconds) / 1e9


def jpegs(image: Image.Image, threads: int, seconds: float) -> float:
    """Images a second that so many threads decode from memory, at full size."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    data = buffer.getvalue()
    each = 16

    def some(_: int) -> None:
        for _ in range(each):
            decoding.decode(data)

    with ThreadPoolExecutor(threads) as pool:
        best = _best(lambda: list(pool.map(some, range(threads))), torch.device("cpu"), seconds)
    return each * threads / best


def _best(do: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the repetitions, in seconds: a ceiling is what was reached once."""
    do()
    best, began, count = float("inf"), time.perf_counter(), 0
    while count < LEAST or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        count += 1
    return best
