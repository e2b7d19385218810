"""Randomness as a function: every draw is a pure function of (seed, purpose, epoch, index of the image).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer tensor operations, so
that CPU and GPU, any batch size, any number of workers and a resumed run all draw the same numbers.
"""

import zlib

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four broadcastable int64 counters in [0, 2**32): four int64 tensors in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32x32-bit product wraps in int64, but its low 64 bits are right, and so is each masked half.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, purpose: str, epoch: int, index: Tensor, count: int) -> Tensor:
    """`count` random 32-bit words for each image.

    Args:
        seed: 0 <= seed < 2**32.
        purpose: names the choice ("pretext/jitter"), so that a new choice never shifts the draws of another.
        epoch: 0 <= epoch < 2**32.
        index: (batch,) int64, the images' rows in their dataset.
        count: words per image.

    Returns:
        (batch, count) int64 in [0, 2**32), on the device of `index`.
    """
    blocks = torch.arange((count + 3) // 4, device=index.device)
    row = index.to(torch.int64)[:, None]
    counter = (row & _MASK, (row >> 32) & _MASK, torch.full_like(row, epoch & _MASK), blocks[None, :])
    out = philox(counter, (seed & _MASK, zlib.crc32(purpose.encode("utf-8", "surrogateescape"))))
    stacked = torch.stack([part.expand(len(row), len(blocks)) for part in out], dim=2)
    return stacked.flatten(1)[:, :count]


def uniform(seed: int, purpose: str, epoch: int, index: Tensor, count: int) -> Tensor:
    """(batch, count) float32 in [0, 1), multiples of 2**-24 (arguments as for `words`)."""
    return (words(seed, purpose, epoch, index, count) >> 8).to(torch.float32) * 2.0**-24


def integers(seed: int, purpose: str, epoch: int, index: Tensor, count: int, high: int) -> Tensor:
    """(batch, count) int64 in [0, high), 1 <= high <= 2**31; bias at most high / 2**32 (arguments as for `words`)."""
    return (words(seed, purpose, epoch, index, count) * high) >> 32


def shuffles(seed: int, purpose: str, epoch: int, index: Tensor, count: int) -> Tensor:
    """(batch, count) int64: for each image an independent permutation of 0..count-1 (arguments as for `words`)."""
    return words(seed, purpose, epoch, index, count).argsort(dim=1, stable=True)


def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """(size,) int64: the order in which an epoch visits `size` images, a pure function of (seed, epoch)."""
    high, low = words(seed, "order", epoch, torch.arange(size), 2).unbind(1)
    return ((high << 31) ^ low).argsort(stable=True)


def torch_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for torch's own generators (weights, dropout) that depends on (seed, purpose, step) alone."""
    high, low = words(seed, purpose, 0, torch.tensor([step]), 2)[0].tolist()
    return int(high << 31 ^ low)
