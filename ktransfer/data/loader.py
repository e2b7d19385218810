"""Batches of square uint8 images: decoded in threads, ahead of the consumer, kept in memory where they fit.

On a GPU they are copied beside the computation, from pinned memory, or kept there.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer.data.dataset import Dataset, check_broken
from ktransfer.distributed import environment_number
from ktransfer.errors import BrokenImage, StageError, UsageError
from ktransfer.images.decoding import square
from ktransfer.machine import cores
from ktransfer.progress import bar

CACHES = ("auto", "device", "ram", "off")
CPU = torch.device("cpu")
_AHEAD = 2
_MAX_WORKERS = 16
# Several jobs for each thread, so that one large image does not keep the others idle.
_JOBS_PER_WORKER = 4
_UNSEEN, _VALID, _BROKEN = 0, 1, 2


class _Job(NamedTuple):
    """A batch in preparation: `pixels` on the CPU, `copied` on a GPU (else None); `futures` fill them."""

    rows: Tensor
    pixels: Tensor
    valid: Tensor
    copied: Tensor | None
    futures: list[Future[None]]


class ImageLoader:
    """The images of a dataset as squares.

    A batch depends on its rows alone: not on the number of threads, the order of batches, or what is kept in memory.

    Args:
        dataset: where the images come from.
        size: side of the squares in pixels, > 0 (`images.square`).
        workers: threads that decode; by default one for each core, at most 16.
        cache_bytes: for "auto", what decoded squares may take in the machine's memory; by default a quarter of what is
            available, shared by the processes of a torchrun on this machine.
        cache: where decoded squares are kept (`cache_place`).
        device: where batches are wanted.

    Raises:
        UsageError: the cache that was asked for does not fit.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        workers: int | None = None,
        cache_bytes: int | None = None,
        cache: str = "auto",
        device: torch.device = CPU,
    ) -> None:
        self.dataset = dataset
        self.size = size
        self.workers = max(1, workers or min(_MAX_WORKERS, cores()))
        if device.type == "cuda" and device.index is None:  # tensors say which one they are on
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.cache = cache
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="images")
        self._reasons: dict[int, str] = {}
        self._state = np.zeros(len(dataset), np.uint8)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        place = cache_place(cache, len(dataset), size, device, cache_bytes)
        shape = (len(dataset), 3, size, size)
        self._kept = None if place is None else torch.empty(shape, dtype=torch.uint8, device=place)

    @property
    def broken(self) -> dict[int, str]:
        """Row and reason of the broken images among those that were asked for so far, in row order."""
        return dict(sorted(self._reasons.copy().items()))

    @property
    def kept_on(self) -> torch.device | None:
        """Where decoded squares are kept, None where they are not."""
        return None if self._kept is None else self._kept.device

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images of `rows`, (batch,) int64 on the CPU.

        Returns:
            (batch, 3, size, size) uint8 on the device and (batch,) bool on the CPU; a broken image is all zeros and
            False.
        """
        job = self._start(rows)
        return self._finished(job), job.valid

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """Batches in the order of `index_batches`, the next two being prepared while the consumer works.

        Yields:
            rows as they were given, pixels and valid as from `batch`, and the seconds that the consumer waited. What a
            thread raises is raised here; closing the iterator stops the preparation.
        """
        source = iter(index_batches)
        pending: deque[_Job] = deque(self._start(rows) for rows in islice(source, _AHEAD))
        try:
            while pending:
                pending.extend(self._start(rows) for rows in islice(source, 1))
                began = time.perf_counter()
                pixels = self._finished(pending[0])
                waited = time.perf_counter() - began
                job = pending.popleft()
                yield job.rows, pixels, job.valid, waited
        finally:
            left = [future for job in pending for future in job.futures if not future.cancel()]
            wait(left)

    def _start(self, rows: Tensor) -> _Job:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.dataset):
            raise IndexError(f"rows must lie in 0..{len(self.dataset) - 1}")
        seen = self._kept is not None and bool((self._state[rows.numpy()] != _UNSEEN).all())
        shape = (len(rows), 3, self.size, self.size)
        valid = torch.empty(len(rows), dtype=torch.bool)
        copied = None
        if self._copies is None:
            pixels = torch.empty(shape, dtype=torch.uint8)
        else:
            if seen and self.kept_on == self.device:  # nothing to be read, nothing to be copied
                shape = (len(rows), 0, 0, 0)
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            if self.kept_on != self.device:
                with torch.cuda.stream(self._copies):
                    copied = torch.empty(shape, dtype=torch.uint8, device=self.device)
        step = len(rows) if seen else -(-len(rows) // (self.workers * _JOBS_PER_WORKER))
        parts = [slice(at, at + step) for at in range(0, len(rows), max(1, step))]
        futures = [
            self._pool.submit(self._fill, rows[at], pixels[at], valid[at], None if copied is None else copied[at])
            for at in parts
        ]
        return _Job(rows, pixels, valid, copied, futures)

    def _fill(self, rows: Tensor, pixels: Tensor, valid: Tensor, copied: Tensor | None = None) -> None:
        on_cpu = self.kept_on == CPU
        for slot, row in enumerate(rows.tolist()):
            if self._kept is None:
                self._decode(row, pixels[slot])
            elif self._state[row] == _UNSEEN:
                self._decode(row, self._kept[row] if on_cpu else pixels[slot], None if on_cpu else self._kept[row])
        if on_cpu and self._kept is not None:
            torch.index_select(self._kept, 0, rows, out=pixels)
        valid.copy_(torch.from_numpy(self._state[rows.numpy()] == _VALID))
        if copied is not None:
            with torch.cuda.stream(self._copies):
                copied.copy_(pixels, non_blocking=True)

    def _decode(self, row: int, out: Tensor, kept: Tensor | None = None) -> None:
        """Decode into `out`, on the CPU, and copy it to where it is kept, if that is elsewhere."""
        # The state comes last, so that no other thread takes an image that is only half there.
        if self._state[row] == _BROKEN:
            out.zero_()
            return
        state = _VALID
        try:
            np.copyto(out.numpy(), square(self.dataset.read(row, self.size), self.size).transpose(2, 0, 1))
        except BrokenImage as error:
            out.zero_()
            self._reasons[row] = str(error)
            state = _BROKEN
        if kept is not None:
            with torch.cuda.stream(self._copies):
                kept.copy_(out)  # waits until it is there
        self._state[row] = state

    def _finished(self, job: _Job) -> Tensor:
        """The pixels of a batch, on the device, when they are ready."""
        for future in job.futures:
            future.result()
        if self._copies is None:
            return job.pixels
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        if job.copied is None:
            assert self._kept is not None
            return self._kept.index_select(0, job.rows.to(self.device, non_blocking=True))
        job.copied.record_stream(current)
        return job.copied


def cache_place(
    cache: str, count: int, size: int, device: torch.device, cache_bytes: int | None = None
) -> torch.device | None:
    """Where the squares of `count` images, `size` pixels wide, are to be kept; None for nowhere.

    Args:
        cache: "off"; "ram"; "device": in the memory of the GPU; "auto": there if that takes at most half of what is
            free, else in the machine's memory within `cache_bytes`, else nowhere.
        device: where batches are wanted.
        cache_bytes: see `ImageLoader`.

    Raises:
        UsageError: it was asked for and does not fit, or there is no such place.
    """
    needed = count * 3 * size * size
    on_gpu = device.type == "cuda"
    if cache == "off":
        return None
    if cache == "device" and not on_gpu:
        raise UsageError(f"--cache-images device: {device} has no memory of its own; give auto, ram or off")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu and cache != "ram" else available_bytes()
    if cache != "auto" and needed > free:
        raise UsageError(
            f"--cache-images {cache}: {count:,} images of {size} x {size} take {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; give auto or off"
        )
    if on_gpu and (cache == "device" or (cache == "auto" and needed <= free // 2)):
        return device
    budget = _default_cache_bytes() if cache_bytes is None else cache_bytes
    return CPU if cache == "ram" or needed <= budget else None


def typical_short_side(dataset: Dataset, sample: int = 64) -> int:
    """10th percentile (an observed value, in pixels) of the short sides of up to `sample` evenly spread images.

    Looks at headers alone where it can. Broken images are left out; StageError where all of them are broken.
    """
    count = min(sample, len(dataset))
    sides: list[int] = []
    reason = "there are no images"
    for row in (index * len(dataset) // count for index in range(count)):
        try:
            if dataset.short_side is not None:
                sides.append(dataset.short_side(row))
            else:
                sides.append(min(dataset.read(row, None).shape[:2]))
        except BrokenImage as error:
            reason = f"{dataset.keys[row]}: {error}"
    if not sides:
        raise StageError(f"{dataset.spec}: none of {count} images can be read ({reason}); check the data")
    return int(np.percentile(sides, 10, method="lower"))


def reasons(dataset: Dataset, valid: NDArray[np.bool_], size: int) -> dict[int, str]:
    """Row and reason of each image that is not `valid`; they are read again, as some were met before an interruption.

    Args:
        valid: (n,) bool, for the first n rows.
        size: side of the squares that were wanted.
    """
    found: dict[int, str] = {}
    for row in np.flatnonzero(~valid).tolist():
        try:
            dataset.read(row, size)
        except BrokenImage as error:
            found[row] = str(error)
        else:
            found[row] = "was broken when its turn came, and is not any more"
    return found


def readable(images: ImageLoader, rows: Tensor, max_broken: float) -> Tensor:
    """Read all of `rows` once before a training, so that broken images are known, counted and left out.

    Args:
        rows: (n,) int64.
        max_broken: the largest share of them that is accepted.

    Returns:
        Those that can be read, in the same order.

    Raises:
        StageError: more are broken, or fewer than two are left.
    """
    kept: list[Tensor] = []
    with bar(len(rows), "check images") as shown:
        for chosen, _, valid, _ in images.batches(iter(rows.split(256))):
            kept.append(chosen[valid])
            shown.update(len(chosen))
    check_broken(images.broken, len(rows), max_broken, images.dataset)
    found = torch.cat(kept)
    if len(found) < 2:
        raise StageError(f"{images.dataset.spec}: only {len(found)} images can be read; give more images")
    return found


def _default_cache_bytes() -> int:
    return available_bytes() // 4 // max(1, environment_number("LOCAL_WORLD_SIZE", 1))


def available_bytes() -> int:
    """Memory that can be had without swapping; inside a container no more than it is allowed."""
    try:
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = Path("/sys/fs/cgroup")
        allowed = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # not in a group of its own, or "max"
        return free
    return max(0, min(free, allowed))
