"""Random masks of a part of a batch: the rows that it would have in the masks of the whole batch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RowsOfBatch(TorchFunctionMode):
    """Within, dropout and masks drawn for each image are those of the whole batch, cut to the part's rows.

    So the same seed gives a batch the same masks however it is divided. Covers `F.dropout` (and `nn.Dropout`) and
    `Tensor.bernoulli_` (torchvision's stochastic depth) where the rows are a multiple of the part's images; other
    draws are the part's own.

    Args:
        first: images of the batch before the part's.
        count: images of the part.
        total: images of the batch.
    """

    def __init__(self, first: int, count: int, total: int) -> None:
        super().__init__()
        self.first, self.count, self.total = first, count, total

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is Tensor.bernoulli_ and self._divides(args[0]):
            mask: Tensor = args[0]
            whole = torch.empty_like(self._of_all(mask)).bernoulli_(*args[1:], **kwargs)
            return mask.copy_(self._own(whole, len(mask)))
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or not self._divides(x):
            return F.dropout(x, p, training, inplace)
        return x * self._own(F.dropout(self._of_all(x), p), len(x))

    def _divides(self, x: Tensor) -> bool:
        return x.ndim > 0 and len(x) > 0 and self.count > 0 and len(x) % self.count == 0

    def _of_all(self, x: Tensor) -> Tensor:
        """Ones in the shape and layout that `x` would have for the whole batch."""
        layout = torch.channels_last if x.ndim == 4 and not x.is_contiguous() else torch.contiguous_format
        shape = (len(x) // self.count * self.total, *x.shape[1:])
        return torch.ones(shape, dtype=x.dtype, device=x.device).to(memory_format=layout)

    def _own(self, whole: Tensor, rows: int) -> Tensor:
        each = rows // self.count
        return whole[self.first * each : (self.first + self.count) * each]
