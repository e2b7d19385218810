"""The counter-based generator against published vectors, an independent implementation and statistics."""

import itertools
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ktransfer import rng

WORD = st.integers(0, 2**32 - 1)


def philox_by_hand(counter, key):
    """Philox4x32-10 in unbounded Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def philox(counter, key):
    return [int(part) for part in rng.philox(tuple(torch.tensor(word) for word in counter), tuple(key))]


def assert_uniform(values: torch.Tensor, high: int) -> None:
    """Chi-square test of equal frequencies that a good generator fails once in a million."""
    assert stats.chisquare(torch.bincount(values.flatten(), minlength=high).numpy()).pvalue > 1e-6


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert philox(counter, key) == expected
    assert philox_by_hand(counter, key) == expected


@settings(max_examples=30, deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_agrees_with_unbounded_integers(counter, key):
    assert philox(counter, key) == philox_by_hand(counter, key)


@settings(max_examples=30, deadline=None)
@given(WORD, WORD, st.integers(0, 2**63 - 1), st.integers(1, 11))
def test_words_are_philox_of_row_epoch_block_under_seed_and_purpose(seed, epoch, row, count):
    key = (seed, zlib.crc32(b"purpose"))
    blocks = [philox_by_hand((row % 2**32, row >> 32, epoch, block), key) for block in range(3)]
    got = rng.words(seed, "purpose", epoch, torch.tensor([row]), count)
    assert got.shape == (1, count) and got.dtype == torch.int64
    assert got[0].tolist() == list(itertools.chain(*blocks))[:count]


def test_the_batch_and_the_count_do_not_change_a_draw():
    index = torch.tensor([7, 0, 123456789, 2**40 + 3, 7])
    together = rng.words(1, "p", 2, index, 9)
    assert torch.equal(together, torch.cat([rng.words(1, "p", 2, row[None], 9) for row in index]))
    assert torch.equal(together[:, :5], rng.words(1, "p", 2, index, 5))
    assert torch.equal(together[0], together[4])


def test_every_argument_gives_unrelated_words():
    index = torch.arange(20_000)
    base = rng.uniform(0, "a", 0, index, 1)[:, 0]
    others = [
        rng.uniform(1, "a", 0, index, 1)[:, 0],
        rng.uniform(0, "b", 0, index, 1)[:, 0],
        rng.uniform(0, "a", 1, index, 1)[:, 0],
        rng.uniform(0, "a", 0, index + 20_000, 1)[:, 0],
        rng.uniform(0, "a", 0, index + 1, 1)[:, 0],
        rng.uniform(0, "a", 0, index + 2**32, 1)[:, 0],
        rng.uniform(0, "a", 0, index, 2)[:, 1],
    ]
    correlation = torch.corrcoef(torch.stack([base, *others])) - torch.eye(8)
    # The neighbour's draws are `base` moved by one, so its correlation tests draw i against draw i + 1.
    assert correlation.abs().max() < 5 / math.sqrt(20_000)


def test_uniform_is_uniform_in_the_half_open_unit_interval():
    values = rng.uniform(3, "u", 4, torch.arange(25_000), 4)
    assert values.dtype == torch.float32 and values.shape == (25_000, 4)
    assert values.min() >= 0 and values.max() < 1
    assert torch.equal(values * 2**24, (values * 2**24).round())
    assert_uniform((values * 256).long(), 256)


def test_pairs_of_neighbouring_draws_are_uniform():
    low = rng.integers(3, "u", 4, torch.arange(25_000), 4, 16)
    assert_uniform(low[:, :-1] * 16 + low[:, 1:], 256)
    assert_uniform(low[:-1] * 16 + low[1:], 256)


@pytest.mark.parametrize("high", [1, 2, 3, 9, 701])
def test_integers_are_uniform_below_high(high):
    values = rng.integers(0, "i", 0, torch.arange(30_000), 2, high)
    assert values.dtype == torch.int64 and values.min() >= 0 and values.max() < high
    if high > 1:
        assert_uniform(values, high)


def test_the_largest_high_stays_exact():
    values = rng.integers(0, "i", 0, torch.arange(1000), 2, 2**31)
    assert torch.equal(values, rng.words(0, "i", 0, torch.arange(1000), 2) >> 1)


def test_shuffles_are_permutations_and_all_equally_frequent():
    orders = rng.shuffles(0, "s", 0, torch.arange(24_000), 4)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(24_000, 4))
    code = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    kinds, which = code.unique(return_inverse=True)
    assert len(kinds) == 24
    assert_uniform(which, 24)


@settings(max_examples=20, deadline=None)
@given(WORD, st.integers(0, 1000), st.integers(1, 500))
def test_epoch_order_visits_each_image_once(seed, epoch, size):
    order = rng.epoch_order(seed, epoch, size)
    assert torch.equal(order.sort().values, torch.arange(size))
    assert torch.equal(order, rng.epoch_order(seed, epoch, size))


def test_epoch_orders_of_other_epochs_and_seeds_are_unrelated():
    orders = torch.stack([rng.epoch_order(*which, 10_000).double() for which in ((0, 0), (0, 1), (1, 0))])
    correlation = torch.corrcoef(torch.cat([orders, torch.arange(10_000.0)[None].double()])) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(10_000)


def test_torch_seed_differs_by_every_argument_and_is_accepted():
    seeds = {rng.torch_seed(*which) for which in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))}
    assert len(seeds) == 4
    for seed in seeds:
        torch.Generator().manual_seed(seed)
    assert rng.torch_seed(0, "a", 0) == rng.torch_seed(0, "a", 0)
