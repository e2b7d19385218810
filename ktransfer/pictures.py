"""Batches of square uint8 pictures: decoded in threads, ahead of the consumer, kept in memory where they fit."""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer.dataset import Dataset
from ktransfer.dataset import check_broken as check_broken
from ktransfer.errors import BrokenPicture, StageError
from ktransfer.images import square
from ktransfer.machine import cores
from ktransfer.progress import bar

_AHEAD = 2
_MAX_WORKERS = 16
# Several jobs for each thread, so that one large picture does not keep the others idle.
_JOBS_PER_WORKER = 4
_UNSEEN, _VALID, _BROKEN = 0, 1, 2
_Job = tuple[Tensor, Tensor, Tensor, list[Future[None]]]


class Pictures:
    """The pictures of a dataset as squares.

    A batch depends on its rows alone: not on the number of threads, the order of batches, or what is kept in memory.

    Args:
        dataset: where the pictures come from.
        size: side of the squares in pixels, > 0 (`images.square`).
        workers: threads that decode; by default one for each core, at most 16.
        cache_bytes: decoded squares are kept when all of them fit in so many bytes; by default a quarter of the memory
            that is available, shared by the processes of a torchrun on this machine. 0 keeps none.
    """

    def __init__(self, dataset: Dataset, size: int, workers: int | None = None, cache_bytes: int | None = None) -> None:
        self.dataset = dataset
        self.size = size
        self.workers = max(1, workers or min(_MAX_WORKERS, cores()))
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="pictures")
        self._reasons: dict[int, str] = {}
        self._state = np.zeros(len(dataset), np.uint8)
        budget = _default_cache_bytes() if cache_bytes is None else cache_bytes
        fits = len(dataset) * 3 * size * size <= budget
        self._kept = torch.empty((len(dataset), 3, size, size), dtype=torch.uint8) if fits else None

    @property
    def broken(self) -> dict[int, str]:
        """Row and reason of the broken pictures among those that were asked for so far, in row order."""
        return dict(sorted(self._reasons.copy().items()))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of `rows`, (batch,) int64 on the CPU.

        Returns:
            (batch, 3, size, size) uint8 and (batch,) bool, on the CPU; a broken picture is all zeros and False.
        """
        _, pixels, valid, jobs = self._start(rows)
        _finish(jobs)
        return pixels, valid

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
                rows, pixels, valid, jobs = pending[0]
                began = time.perf_counter()
                _finish(jobs)
                waited = time.perf_counter() - began
                pending.popleft()
                yield rows, pixels, valid, waited
        finally:
            left = [job for _, _, _, jobs in pending for job in jobs if not job.cancel()]
            wait(left)

    def _start(self, rows: Tensor) -> _Job:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.dataset):
            raise IndexError(f"rows must lie in 0..{len(self.dataset) - 1}")
        pixels = torch.empty((len(rows), 3, self.size, self.size), dtype=torch.uint8)
        valid = torch.empty(len(rows), dtype=torch.bool)
        if self._kept is not None and (self._state[rows.numpy()] != _UNSEEN).all():
            step = len(rows)
        else:
            step = -(-len(rows) // (self.workers * _JOBS_PER_WORKER))
        parts = [slice(at, at + step) for at in range(0, len(rows), max(1, step))]
        return rows, pixels, valid, [self._pool.submit(self._fill, rows[at], pixels[at], valid[at]) for at in parts]

    def _fill(self, rows: Tensor, pixels: Tensor, valid: Tensor) -> None:
        for slot, row in enumerate(rows.tolist()):
            if self._kept is None:
                self._decode(row, pixels[slot])
            elif self._state[row] == _UNSEEN:
                self._decode(row, self._kept[row])
        if self._kept is not None:
            torch.index_select(self._kept, 0, rows, out=pixels)
        valid.copy_(torch.from_numpy(self._state[rows.numpy()] == _VALID))

    def _decode(self, row: int, out: Tensor) -> None:
        # The state comes last, so that no other thread takes a picture that is only half there.
        if self._state[row] == _BROKEN:
            out.zero_()
            return
        try:
            pixels = square(self.dataset.read(row, self.size), self.size)
        except BrokenPicture as error:
            out.zero_()
            self._reasons[row] = str(error)
            self._state[row] = _BROKEN
            return
        out.copy_(torch.tensor(pixels).permute(2, 0, 1))
        self._state[row] = _VALID


def typical_short_side(dataset: Dataset, sample: int = 64) -> int:
    """10th percentile (an observed value, in pixels) of the short sides of up to `sample` evenly spread pictures.

    Looks at headers alone where it can. Broken pictures are left out; StageError where all of them are broken.
    """
    count = min(sample, len(dataset))
    sides: list[int] = []
    reason = "there are none"
    for row in (index * len(dataset) // count for index in range(count)):
        try:
            if dataset.short_side is not None:
                sides.append(dataset.short_side(row))
            else:
                sides.append(min(dataset.read(row, None).shape[:2]))
        except BrokenPicture as error:
            reason = f"{dataset.keys[row]}: {error}"
    if not sides:
        raise StageError(f"{dataset.spec}: none of {count} pictures can be read ({reason}); check the data")
    return int(np.percentile(sides, 10, method="lower"))


def reasons(dataset: Dataset, valid: NDArray[np.bool_], size: int) -> dict[int, str]:
    """Row and reason of each picture that is not `valid`; they are read again, as some were met before an interruption.

    Args:
        valid: (n,) bool, for the first n rows.
        size: side of the squares that were wanted.
    """
    found: dict[int, str] = {}
    for row in np.flatnonzero(~valid).tolist():
        try:
            dataset.read(row, size)
        except BrokenPicture as error:
            found[row] = str(error)
        else:
            found[row] = "was broken when its turn came, and is not any more"
    return found


def readable(pictures: Pictures, rows: Tensor, max_broken: float) -> Tensor:
    """Read all of `rows` once before a training, so that broken pictures are known, counted and left out.

    Args:
        rows: (n,) int64.
        max_broken: the largest share of them that is accepted.

    Returns:
        Those that can be read, in the same order.

    Raises:
        StageError: more are broken, or fewer than two are left.
    """
    kept: list[Tensor] = []
    with bar(len(rows), "read") as shown:
        for chosen, _, valid, _ in pictures.batches(iter(rows.split(256))):
            kept.append(chosen[valid])
            shown.update(len(chosen))
    check_broken(pictures.broken, len(rows), max_broken, pictures.dataset)
    found = torch.cat(kept)
    if len(found) < 2:
        raise StageError(f"{pictures.dataset.spec}: only {len(found)} pictures can be read; there is nothing to learn")
    return found


def _finish(jobs: Iterable[Future[None]]) -> None:
    for job in jobs:
        job.result()


def _default_cache_bytes() -> int:
    return available_bytes() // 4 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
