"""The choice of bounds: what the proofs of the exact engine need of its numbers, and when which bounds are taken."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ktransfer.cluster.engines import bounds
from ktransfer.cluster.engines.bounds import Basis, Memory, Pairs
from ktransfer.cluster.engines.engine import Rows


def rows_of(data):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop])


def remembered(data, **fields):
    said = []
    return replace(Memory(rows_of(data), 2**40, said.append), **fields), said


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flat_and_steep(n, d, seed=0):
    """Rows without a direction to prefer, and rows that lie along four directions but for a little."""
    rng = np.random.default_rng(seed)
    steep = rng.normal(size=(n, 4)) @ rng.normal(size=(4, d)) * 3 + rng.normal(size=(n, d)) * 0.01
    return rng.normal(size=(n, d)).astype(np.float32), steep.astype(np.float32)


@pytest.mark.parametrize("own", [True, False])
def test_centroids_are_centred_and_their_lengths_are_those_of_float64(own):
    centroids = normal(30, 17) + 5
    origin = None if own else normal(17, seed=1)
    target = bounds.centre(centroids, origin)
    wide = centroids.astype(np.float64)
    middle = wide.mean(axis=0)
    np.testing.assert_allclose(target.middle, middle, rtol=1e-6)
    assert target.origin is (target.middle if own else origin)
    centred = wide - (middle if own else origin)
    np.testing.assert_allclose(target.centred, centred, atol=1e-5)
    np.testing.assert_allclose(target.lengths, np.square(target.centred.astype(np.float64)).sum(axis=1), rtol=1e-12)
    assert target.widest == pytest.approx(np.square(wide - middle).sum(axis=1).max(), rel=1e-5)
    norms = np.linalg.norm(target.centred.astype(np.float64), axis=1)
    assert norms.max() * (1 + 2.0**-24) <= bounds.longest(target) <= norms.max() * (1 + 2.0**-21)
    centroids[:] = 0
    assert target.raw.any()


def test_how_far_centroids_moved():
    np.testing.assert_allclose(bounds.moved(normal(9, 4), normal(9, 4, seed=1)), [
        sum((float(a) - float(b)) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5
        for one, other in zip(normal(9, 4), normal(9, 4, seed=1), strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("offset", [0, 1e3])
def test_another_start_is_told_from_a_step(offset):
    """By how far centroids went, in deviations of the centroids; another number of them is always another start."""
    then = normal(100, 8) + np.float32(offset)
    spread = np.sqrt(np.square(then - then.mean(axis=0)).sum(axis=1).mean())
    step = normal(100, 8, seed=1)
    step *= spread / np.linalg.norm(step, axis=1, keepdims=True)

    def jumped(now, passes=2, last=then):
        return bounds.jumped(now.astype(np.float32), remembered(then, last=last, passes=passes)[0])

    assert jumped(then + step) and jumped(then + 0.7 * step)
    assert not jumped(then) and not jumped(then + 0.3 * step)
    assert not jumped(then + step, passes=1) and not jumped(then, passes=0, last=None)
    assert jumped(then[:50], passes=1) and not jumped(then[:1], last=then[:1])


@pytest.mark.parametrize(("n", "size"), [(5, 5), (100, 16), (2**13, 32), (2**14, 64), (10**5, 64)])
def test_the_sample_is_eight_stretches_from_end_to_end(n, size):
    data = np.arange(n, dtype=np.float32)[:, None]
    places, sample = bounds._sample(rows_of(data))
    np.testing.assert_array_equal(sample[:, 0], places)
    stretches = places.reshape(8, size)
    assert (np.diff(stretches, axis=1) == 1).all()
    assert places.min() == 0 and places.max() == n - 1
    if n > 8 * size:
        gaps = np.diff(stretches[:, 0])
        assert gaps.min() >= size and gaps.max() - gaps.min() <= 1


def test_distances_of_the_sample():
    data, centroids = normal(40, 12) + 3, normal(7, 12, seed=1) + 3
    expected = np.linalg.norm(data[:, None].astype(np.float64) - centroids, axis=2)
    np.testing.assert_allclose(bounds._distances(data, bounds.centre(centroids)), expected, rtol=1e-4)
    assert np.isfinite(bounds._distances(centroids, bounds.centre(centroids))).all()


def test_the_share_of_pairs_that_directions_leave_open():
    """Against scores in float64: a pair is closed where even the longest rest could not make it the nearest."""
    data, centroids = flat_and_steep(60, 32)[1], flat_and_steep(20, 32, seed=0)[1]
    target = bounds.centre(centroids)
    vectors = np.linalg.qr(normal(32, 32).astype(np.float64))[0].astype(np.float32)
    labels = np.linalg.norm(data[:, None] - centroids, axis=2).argmin(axis=1)
    x, c = data.astype(np.float64) - target.origin, target.centred.astype(np.float64)
    scores = x @ c.T - (c**2).sum(axis=1) / 2
    expected = []
    for p in (2, 8, 32):
        kept, left = vectors[:, :p].astype(np.float64), vectors[:, p:].astype(np.float64)
        rest = np.linalg.norm(x @ left, axis=1)[:, None] * np.linalg.norm(c @ left, axis=1)
        upper = (x @ kept) @ (c @ kept).T - (c**2).sum(axis=1) / 2 + rest
        assert (upper >= scores - 1e-3).all()
        expected.append((upper >= scores[np.arange(60), labels][:, None] - 1e-3).mean())
    found = bounds._shares_left(target, data, labels, vectors, [2, 8, 32])
    np.testing.assert_allclose(found[:2], expected[:2], atol=2.1 / 1200)
    assert expected[2] == pytest.approx(1 / 20) and found[2] == pytest.approx(1 / 20, abs=0.02)
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("d", [40, bounds.SMALL + 16])
def test_directions_are_those_along_which_most_lies(d):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    left = np.linalg.qr(rng.normal(size=(60, 40)))[0]
    matrix = ((left * 1.4 ** -np.arange(40.0)) @ basis[:40]).astype(np.float32)
    for scale in (1.0, 1e18, 1e-18):
        found = bounds._leading(matrix * np.float32(scale), 12)
        assert found.shape == (d, 12) and found.dtype == np.float32
        np.testing.assert_allclose(np.abs(basis[:8] @ found[:, :8]), np.eye(8), atol=1e-3)
    again = bounds._leading(matrix, 12)
    np.testing.assert_allclose(again.T.astype(np.float64) @ again, np.eye(12), atol=1e-5)
    for nothing in (matrix * 0, matrix * np.float32(np.inf)):
        with np.errstate(invalid="ignore"):
            assert bounds._leading(nothing, 12).shape == (d, 0)
    assert bounds._leading(matrix, 0).shape == (d, 0)


def test_a_span_is_not_wider_than_what_spans_it():
    thin = normal(30, 3).astype(np.float64) @ normal(3, 9, seed=1)
    found = bounds._orthonormal(thin)
    assert found.shape == (30, 3)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(found @ (found.T @ thin), thin, atol=1e-6)
    along = np.linalg.norm(found.T @ thin, axis=1)
    assert (np.diff(along) <= 0).all()


@pytest.mark.parametrize("farthest", [1e-30, 1e-9, 1.0, 3.0, 5.0, 1e3, 1e9, 1e16])
def test_bounds_of_pairs_fit_float16(farthest):
    """Squares of distances up to twice the farthest of the sample, times an even power of two."""
    centroids = normal(4, 3)
    memory, _ = remembered(normal(10, 3), sample_distances=np.full((2, 4), farthest, np.float32))
    pairs = bounds.keep_pairs(bounds.centre(centroids), memory, 32)
    assert np.log2(pairs.scale) % 2 == 0 and 2.0**-100 <= pairs.scale <= 2.0**100
    farthest = float(np.float32(farthest))
    assert pairs.scale * (2 * farthest) ** 2 <= np.finfo(np.float16).max
    if 1e-9 <= farthest <= 1e9:
        assert pairs.scale * (2 * farthest) ** 2 > np.finfo(np.float16).max / 32
    assert pairs.bounds.shape == (10, 32) and pairs.bounds.dtype == np.uint16
    assert memory.pairs is pairs and not pairs.whole and not pairs.used and pairs.regret == 0
    np.testing.assert_array_equal(pairs.centroids, centroids)
    assert bounds.keep_pairs(bounds.centre(centroids), memory, 32).bounds is pairs.bounds


def test_short_rows_and_few_rows_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(bounds, "_sample", None)  # whatever looks takes a sample first
    few, wide = bounds.FIRST_ROWS, bounds.FEW_COLUMNS
    for n, d in ((few * 2, wide - 1), (few - 1, wide)):
        memory, _ = remembered(np.zeros((n, d), np.float32))
        assert bounds.choose(normal(20, d), memory) == "dense"
    for n, passes in ((few, 0), (few - 1, 1)):
        memory, _ = remembered(np.zeros((n, wide), np.float32), passes=passes)
        with pytest.raises(TypeError):
            bounds.choose(normal(20, wide), memory)


def test_a_projection_stays_until_the_next_choice():
    memory, _ = remembered(np.zeros((9000, 64), np.float32), basis=Basis(np.zeros(64), np.zeros((64, 8)), 0), passes=2)
    assert bounds.choose(normal(20, 64), memory) == "projected"
    assert memory.sample is None
    memory.basis = None
    memory.room = 0
    assert bounds.choose(normal(20, 64), memory) == "dense"


@pytest.mark.parametrize(("steep", "kind"), [(True, "projected"), (False, "dense")])
def test_directions_are_taken_where_the_rows_lie_along_some(steep, kind):
    data = flat_and_steep(20000, 256)[steep]
    memory, said = remembered(data, room=0)
    centroids = data[:500]
    assert bounds.choose(centroids, memory) == kind
    assert (memory.basis is not None) == steep == bool(said)
    if steep:
        vectors = memory.basis.vectors.astype(np.float64)
        off = np.linalg.norm(vectors.T @ vectors - np.eye(vectors.shape[1]), 2)
        assert off <= memory.basis.error < 1e-3
        np.testing.assert_array_equal(memory.basis.origin, bounds.centre(centroids).origin)
        assert vectors.shape[1] == bounds.PREFIXES[0]  # four are enough, so the fewest
        assert "pass 1 by bounds in 16 of 256 dimensions" in said[0]


def test_the_same_directions_are_kept_with_what_was_projected():
    data = flat_and_steep(20000, 256)[1]
    memory, said = remembered(data, labels=np.zeros(20000, np.int32), counts=np.full(500, 40))
    assert bounds.choose(data[:500], memory) == "projected"
    basis, projected = memory.basis, np.zeros((20000, 18), np.float32)
    memory.projected, memory.clear, memory.across = projected, np.zeros(20000, bool), (data[:500], projected)
    for passes in (1, 4):
        memory.passes = passes
        distances = np.linalg.norm(data[memory.places][:, None] - data[:500], axis=2)
        memory.labels[memory.places] = distances.argmin(axis=1)
        assert bounds.choose(data[:500], memory) == "projected"
        assert (memory.basis is basis) == (memory.projected is projected) == (memory.clear is not None) == (passes == 4)
        basis = memory.basis
        memory.projected, memory.projected_at, memory.clear, memory.across = projected, 1, projected[:, 0] > 0, ()
    assert len(said) == 1


def pairs_of(seen, centroids, **fields):
    return Pairs(np.empty((0, 0), np.uint16), centroids, 1.0, seen, whole=True, **fields)


def test_bounds_of_pairs_serve_until_new_ones_would_have_paid():
    data, d = flat_and_steep(20000, 256)[0], 256
    centroids = data[:300]
    memory, said = remembered(data, passes=2, labels=np.zeros(20000, np.int32))
    assert bounds.choose(centroids, memory) == "dense"  # nothing is known yet of how far centroids go
    seen, sample = memory.sample_distances, data[memory.places]
    np.testing.assert_allclose(seen, np.linalg.norm(sample[:, None] - centroids, axis=2), rtol=1e-4, atol=0.02)
    memory.labels, memory.passes = np.zeros(20000, np.int32), 3
    memory.labels[memory.places] = seen.argmin(axis=1)
    assert bounds.choose(centroids, memory) == "keeping"  # they stood still, so bounds will leave few
    memory.pairs, memory.passes = pairs_of(memory.sample_distances, centroids), 5
    assert bounds.choose(centroids, memory) == "pairs" and memory.pairs.used
    assert "pass 6 by bounds of pairs" in said[-1]
    memory.passes = 6
    assert bounds.choose(centroids, memory) == "pairs" and len(said) == 1  # told once
    memory.pairs.whole = False
    assert bounds.choose(centroids, memory) == "keeping"
    memory.pairs = pairs_of(memory.sample_distances, centroids, regret=1.5)
    assert bounds.choose(centroids, memory) == "keeping"
    memory.pairs = pairs_of(memory.sample_distances, centroids)
    assert bounds.choose(centroids + normal(300, d, seed=5), memory) == "dense"  # all moved by a long way
    assert memory.pairs.regret == 0  # fresh ones would have cost as much


def test_regret_is_what_fresh_bounds_would_have_saved():
    """Bounds of long ago cost a product for each pair that they leave open; those of the pass before leave few."""
    data = flat_and_steep(20000, 256)[0]
    first, now = data[:300], data[:300] + 0.6 * normal(300, 256, seed=3) / 16
    memory, _ = remembered(data, passes=3, labels=np.zeros(20000, np.int32))
    memory.places, memory.sample = bounds._sample(memory.rows)
    seen = {name: bounds._distances(memory.sample, bounds.centre(of)) for name, of in (("first", first), ("now", now))}
    memory.labels[memory.places] = seen["now"].argmin(axis=1)
    memory.pairs, memory.sample_distances, memory.centroids = pairs_of(seen["first"], first), seen["now"], now
    assert bounds.choose(now, memory) in ("pairs", "keeping")
    own = seen["now"].min(axis=1, keepdims=True)
    far = np.linalg.norm(now - first, axis=1)
    old, fresh = (seen["first"] - far <= own).mean(), (seen["now"] <= own).mean()
    saved = bounds.DOT_COST * (old - fresh) * (256 + 64) / (256 + 8)
    assert memory.pairs.regret == pytest.approx(saved, rel=0.05, abs=1e-3)
    assert memory.pairs.regret > 0.005


def test_pairs_need_room_and_rows():
    data = flat_and_steep(bounds.PAIR_ROWS, 256)[0]
    needed = 2 * len(data) * 320  # two bytes for each row and centroid, 300 of them rounded up to panels of 32
    for count, room, looked in ((0, needed, True), (0, needed - 1, False), (1, needed, False)):
        memory, _ = remembered(data[count:], passes=3, room=room, labels=np.zeros(len(data), np.int32))
        assert bounds.choose(data[:300], memory) == "dense"
        assert (memory.sample_distances is not None) == looked


def test_costs_rise_with_what_is_left_and_with_width():
    cost = SimpleNamespace(p=32, k=1000, d=512, share=0.1, guess=False)

    def of(**changes):
        return bounds._cost(**(vars(cost) | changes))

    assert of(p=64) > of() > of(p=16) and of(share=0.2) > of() > of(share=0.0)
    assert of(k=100) > of() and of(guess=True) > of()
    # All pairs left cost their products, at their price, and so much more than a dense pass; none cost the small one.
    assert of(share=1.0) > bounds.DOT_COST
    assert 32 / 512 < of(share=0.0) < 4 * 32 / 512
