"""How a batch is divided: into pieces that fit the device, one after the other, and each piece among the processes.

Whatever the division, the step is that of the whole batch: the loss is the mean over all its valid images, gradients
are added up, random masks are cut out of those of the whole batch, and batch norm learns from all processes' images.
What remains is the order of sums; and batch norm sees one piece at a time.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ktransfer import distributed
from ktransfer.errors import KTransferError, StageError
from ktransfer.training.batch import Batch, Source
from ktransfer.training.dropout_masks import RowsOfBatch
from ktransfer.training.norms import has_batch_norm, over_all
from ktransfer.training.options import LoopOptions


@dataclass(frozen=True)
class Piece:
    """What is computed at once: `count` valid images, `first` of the batch's `total` before them."""

    batch: Batch
    first: int
    count: int
    total: int

    def masks(self) -> contextlib.AbstractContextManager[object]:
        """The masks of the batch, where this is only a part of it."""
        if self.count == self.total:
            return contextlib.nullcontext()
        return RowsOfBatch(self.first, self.count, self.total)


@dataclass(frozen=True)
class Share:
    """This process's part of a batch as it was read: its pieces, their valid images, seconds waited."""

    batches: list[Batch]
    counts: list[int]
    wait: float


def pieces(width: int, most: int) -> list[tuple[int, int]]:
    """[first, last) of the pieces of a batch of `width` images: of about equal size, at most `most` (0: no limit).

    None is smaller than two images, which batch norm needs; so one of three may be made where `most` is 2.
    """
    count = max(1, min(-(-width // most), width // 2)) if most else 1
    return [(width * place // count, width * (place + 1) // count) for place in range(count)]


def seen_by_batch_norm(options: LoopOptions, build: Callable[[], nn.Module]) -> dict[str, str]:
    """An input of a step (`run.begin`) where `--micro-batch` changes what is learned: in a network with batch norm."""
    if not 0 < options.micro_batch < options.batch or not has_batch_norm(build()):
        return {}
    return {"--micro-batch, which batch norm sees,": str(options.micro_batch)}


class BatchDivider:
    """The processes that train together, from the first step to the last: a context.

    Whatever fails within, in any of them, all of them leave it: the leader with the error, the
    others by `distributed.PeerFailed`.

    Args:
        model: its batch norms are shared within.
        width: images of a batch; every batch has `following` more rows, which come after its own ones in the order.
        most: images that are computed at once by all processes together, 0 for the whole batch.
        shared: whether the other processes of the command do the same; else this one trains alone.

    Attributes:
        shared: as given, and there are others.
        places: (m,) int64, the rows of a batch that this process reads.
    """

    def __init__(
        self, model: nn.Module, width: int, most: int, following: int, device: torch.device, shared: bool
    ) -> None:
        self.model, self.following, self.device = model, following, device
        self.shared = shared and distributed.world_size() > 1
        who, of = (distributed.rank(), distributed.world_size()) if self.shared else (0, 1)
        self._who = who
        self._spans = [
            (first + (last - first) * who // of, first + (last - first) * (who + 1) // of)
            for first, last in pieces(width, most)
        ]
        self.places = torch.cat([torch.arange(first, last + following) for first, last in self._spans])
        self._within = contextlib.ExitStack()
        self._known = not self.shared  # that somebody failed, or all are done
        self._group: distributed.StepGroup | None = None

    def __enter__(self) -> Self:
        """Meet the others."""
        if self.shared:
            self._group = distributed.StepGroup(self.device.type == "cuda")
            self._within.callback(self._group.cut)
            self._within.enter_context(over_all(self.model, self._group.sum))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the other processes, and tell them if this one failed."""
        self._within.close()  # those who wait for this one's numbers wait no longer
        if not isinstance(error, Exception) or self._known:
            return
        self._known = True
        try:
            distributed.all_gather([0] * (1 + len(self._spans)), error)
        except distributed.PeerFailed:
            raise
        except KTransferError:
            if isinstance(error, distributed.PeerLost):  # the other one has said why
                raise

    def same(self, state: dict[str, Any]) -> dict[str, Any]:
        """The leader's state (tensors in plain containers) for all."""
        if not self.shared:
            return state
        data = np.zeros(0, np.uint8)
        if distributed.is_leader():
            buffer = io.BytesIO()
            torch.save(state, buffer)
            data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        length = self._exchange([len(data)] + [0] * len(self._spans))[0][0]
        data = distributed.broadcast(data if distributed.is_leader() else np.zeros(length, np.uint8))
        found: dict[str, Any] = torch.load(io.BytesIO(data.tobytes()), self.device, weights_only=True)
        return found

    def stream(self, source: Source, rows: Tensor, epoch: int) -> Iterator[Share]:
        """This process's part of the batches of (steps, b + following) `rows`, on the device."""
        sizes = [last - first + self.following for first, last in self._spans]
        for chosen, pixels, valid, wait in source.batches(iter(rows[:, self.places])):
            moved = [part.to(self.device, non_blocking=True).split(sizes) for part in (chosen, pixels, valid)]
            here = valid.split(sizes)
            counts = [int(part[: len(part) - self.following].sum()) for part in here]
            whole = [bool(part.all()) for part in here]
            batches = [
                Batch(at, squares, known, epoch, every) for at, squares, known, every in zip(*moved, whole, strict=True)
            ]
            yield Share(batches, counts, wait)

    def sync(self, share: Share | None, stop: bool) -> tuple[list[Piece], bool]:
        """All learn what the others have read, and whether one of them is to stop; the pieces of this process.

        Raises:
            StageError: another process failed, or there is not one valid image.
            PeerFailed: in the others.
        """
        counts = share.counts if share else [0] * len(self._spans)
        rows_of_all = self._exchange([int(stop), *counts]) if self.shared else [[int(stop), *counts]]
        total = sum(sum(row[1:]) for row in rows_of_all)
        found, first = [], 0
        if share and not total:
            self._known = True
            raise (StageError if distributed.is_leader() else distributed.PeerFailed)(
                "none of the images of a batch can be read; check the data, and give the same command again"
            )
        for place, batch in enumerate(share.batches if share else []):
            for who, row in enumerate(rows_of_all):
                # Where batch norm is shared, also he who has nothing must add his nothing.
                if who == self._who and (counts[place] or self.shared):
                    found.append(Piece(batch, first, counts[place], total))
                first += row[1 + place]
        return found, any(row[0] for row in rows_of_all)

    def close(self) -> None:
        """All are done."""
        self._known = True

    def all_reduce(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients and `sums` of all processes, for all."""
        if self._group is None:
            return sums
        names = sorted(sums)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        # What has no gradient here has none in the others, unless they are zeros.
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning] + [sums[name] for name in names]
        flat = torch.cat([part.detach().float().flatten() for part in parts])
        self._group.sum(flat)
        *summed, rest = flat.split([p.numel() for p in learning] + [len(names)])
        for parameter, part in zip(learning, summed, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))
        return dict(zip(names, rest.unbind(), strict=True))

    def _exchange(self, values: list[int]) -> list[list[int]]:
        try:
            return distributed.all_gather(values)
        except KTransferError:
            self._known = True
            raise
