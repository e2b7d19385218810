"""Rows on a device: kept there as float32 and float16 as far as its memory goes, the others streamed in each pass.

Rows are worked on in spans of fixed length, so that sums are added up in the same order however many rows are kept.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ktransfer.errors import StageError

from .device_rounding import Operand, padded
from .device_steps import CANDIDATES, NUMBERS_AT_ONCE, PAIRS_AT_ONCE, SCORES_AT_ONCE, operand
from .engine import Rows

SPAN_NUMBERS = 2**28  # of a span, 1 GiB of float32: sums are read and written once for each
STAGE_NUMBERS = 2**24  # of a copy to the device, from one of two buffers in pinned memory
LEFT_FREE = 0.1  # of the device's free memory, for what the libraries take
RUN_BYTES = 96  # of a row in work: label, scores, bounds, order


class Held(NamedTuple):
    """Rows that are on the device.

    Attributes:
        start, stop: which.
        wide: (m, d) float32, as `Rows.read` gives them.
        half: the same in float16, where they stay from pass to pass.
        weights: (m,) float64, or none.
        slot: of the memory that is used again for other rows.
    """

    start: int
    stop: int
    wide: Tensor
    half: Operand | None
    weights: Tensor | None
    slot: int = 0


class Stock:
    """The rows of one clustering: what stays on the device, and how the others come there.

    `doubted`: how many of them float16 left in doubt in the last pass.
    """

    def __init__(self, rows: Rows, origin: Tensor, kept: int) -> None:
        self.rows, self.origin, self.device = rows, origin, origin.device
        self._weights = None if rows.weights is None else torch.from_numpy(rows.weights).to(self.device)
        self._stage: list[Tensor] = []
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        # Of each buffer on the host and each place on the device: what has to happen before it is written again.
        self._copied = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self._used = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self._slots: list[Tensor] = []
        self.resident: Held | None = None
        self.doubted = 0
        if kept:
            if rows.on_device is not None:  # without a copy where that is possible
                wide = rows.on_device(0, kept).to(self.device).contiguous()
            else:
                wide = self._room(kept)
                self._fill(wide, 0, kept)
                self._wait()
            self.resident = Held(0, kept, wide, operand(wide, origin), self._part(0, kept))

    def parts(self) -> Iterator[Held]:
        """All rows in order: first those that stay, then spans of the others, each copied when it is asked for.

        The next one may be asked for while the device still works on one; `release` that before asking once more.
        """
        kept = 0
        if self.resident is not None:
            kept = self.resident.stop
            yield self.resident
        size = span(self.rows)
        for turn, start in enumerate(range(kept, self.rows.count, size)):
            stop = min(start + size, self.rows.count)
            if len(self._slots) <= turn % 2:
                self._slots.append(self._room(min(size, self.rows.count - kept)))
            elif self._stream is not None:
                self._stream.wait_event(self._used[turn % 2])
            wide = self._slots[turn % 2][: stop - start]
            self._fill(wide, start, stop)
            yield Held(start, stop, wide, None, self._part(start, stop), turn % 2)

    def ready(self, held: Held) -> Operand:
        """The rows in float16, once their copy has arrived."""
        if held.half is not None:
            return held.half
        self._wait()
        return operand(held.wide, self.origin)

    def release(self, held: Held) -> None:
        """The place of these rows may be taken by others when the work begun on them is done."""
        if held.half is None and self._used:
            self._used[held.slot].record()

    def _room(self, number: int) -> Tensor:
        room = torch.empty(number, self.rows.dim, device=self.device)
        if self._stream is not None:  # work that is still to be done may use the same memory
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return room

    def _part(self, start: int, stop: int) -> Tensor | None:
        return None if self._weights is None else self._weights[start:stop]

    def _wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _fill(self, wide: Tensor, start: int, stop: int) -> None:
        """Rows start .. stop - 1 on their way to `wide` when this returns; `_wait` before they are used."""
        if self.rows.on_device is not None:
            wide.copy_(self.rows.on_device(start, stop))
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            return
        step = max(1, STAGE_NUMBERS // self.rows.dim)
        for turn, begin in enumerate(range(start, stop, step)):
            end = min(begin + step, stop)
            room = wide[begin - start : end - start]
            if self._stream is None:
                np.copyto(room.numpy(), self.rows.read(begin, end))
                continue
            if not self._stage:
                self._stage = [torch.empty(step, self.rows.dim, pin_memory=True) for _ in range(2)]
            self._copied[turn % 2].synchronize()
            stage = self._stage[turn % 2][: end - begin]
            np.copyto(stage.numpy(), self.rows.read(begin, end))
            with torch.cuda.stream(self._stream):
                room.copy_(stage, non_blocking=True)
                self._copied[turn % 2].record()


def span(rows: Rows) -> int:
    """Rows of a span."""
    return max(1, min(SPAN_NUMBERS // rows.dim, rows.count))


def kept_rows(rows: Rows, k: int, budget: int) -> int:
    """How many rows may stay on the device: all, or whole spans.

    Args:
        rows: n rows.
        k: centroids.
        budget: bytes.

    Raises:
        StageError: the memory does not even suffice to stream them.
    """
    d, w = rows.dim, padded(rows.dim)
    row = 4 * d + 2 * w + 12 + RUN_BYTES
    # Sums, centroids in float64 twice and in float32, in float16; scores and their look; a recheck; copies to convert.
    fixed = k * (32 * d + 2 * w) + 12 * min(SCORES_AT_ONCE, rows.count * k) + 16 * NUMBERS_AT_ONCE
    fixed += 24 * min(PAIRS_AT_ONCE, rows.count * max(k, d * CANDIDATES)) + 16 * rows.count
    if fixed + row * rows.count <= budget:
        return rows.count
    size = span(rows)
    fixed += size * (8 * d + 2 * w + 12 + RUN_BYTES)
    if fixed > budget:
        raise StageError(
            f"the GPU has {budget / 1e9:.2f} GB for k-means, and {k} centroids of {d} numbers need "
            f"{fixed / 1e9:.2f} GB even if all rows are streamed; give --engine faiss, or a smaller --k or --pca"
        )
    return (budget - fixed) // row // size * size


def free_bytes(device: torch.device) -> int:
    """What may be taken of the device's memory."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + cached) * (1 - LEFT_FREE))
