"""The exact engine against float64 brute force and faiss: every kernel, every shape, the same bytes each time."""

import importlib.util
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ktransfer.cluster.algorithms.lloyd import assign_rows, kmeans, load_state, save_state
from ktransfer.cluster.engines import bounds, choose, dense, engine, exact, native
from ktransfer.cluster.engines.device import device_engine
from ktransfer.cluster.engines.engine import Rows, faiss_engine
from ktransfer.cluster.engines.exact import exact_engine
from ktransfer.errors import UsageError

COMPILED = native.library() is not None
LEVELS = list(range(1, native.library().ktransfer_level() + 1)) if COMPILED else []
VARIANTS = [
    {"compiled": False},
    {"device": "cpu"},
    {"float16": True},
    *({"level": level, "threads": level} for level in LEVELS),
]
needs_extension = pytest.mark.skipif(not COMPILED, reason="the extension is not built, or no AVX2 here")


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 2000)


def made(variant):
    if "float16" in variant:
        return faiss_engine(**variant)
    return device_engine(**variant) if "device" in variant else exact_engine(**variant)


def rows_of(data):
    return Rows(len(data), data.shape[1], lambda start, stop: data[start:stop].astype(np.float32))


def decaying(n, d, seed=0):
    """Rows whose spectrum decays, as that of features behind a rectifier: the bounds pay."""
    rng = np.random.default_rng(seed)
    inner = max(2, d // 6)
    scale = np.arange(1, inner + 1) ** -0.5
    latent = (rng.normal(size=(20, inner))[rng.integers(0, 20, n)] + rng.normal(size=(n, inner))) * scale
    return np.maximum(latent @ rng.normal(size=(inner, d)) + rng.normal(size=(n, d)) * 0.1, 0).astype(np.float32)


def nearest64(data, centroids):
    """Lowest index of those nearest, ties included, and its squared distance, from float64 differences."""
    squares = np.stack([((data.astype(np.float64) - c) ** 2).sum(axis=1) for c in centroids.astype(np.float64)], axis=1)
    middle = centroids.mean(axis=0, dtype=np.float64)
    scale = ((data - middle) ** 2).sum(axis=1) + ((centroids - middle) ** 2).sum(axis=1).max()
    labels = (squares <= squares.min(axis=1, keepdims=True) + 1e-12 * scale[:, None]).argmax(axis=1)
    return labels, squares[np.arange(len(data)), labels]


def check(found, data, centroids):
    labels, squares = nearest64(data, centroids)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.distances, squares, rtol=1e-6, atol=1e-30)
    sums = np.zeros(centroids.shape)
    np.add.at(sums, labels, data.astype(np.float64))
    np.testing.assert_allclose(found.sums, sums, rtol=1e-12, atol=1e-12 * abs(data).max() * len(data))
    np.testing.assert_array_equal(found.counts, np.bincount(labels, minlength=len(centroids)))


def same(first, second, but=("seconds",)):
    for field in fields(first):
        if field.name not in but:
            left, right = getattr(first, field.name), getattr(second, field.name)
            assert left.tobytes() == right.tobytes() if isinstance(left, np.ndarray) else left == right, field.name


def forced_bounds(monkeypatch, *widths):
    """Bounds in so many dimensions from the first pass on, or of pairs from the second, whether they pay or not."""
    values = {"DENSE_COST": 1e9, "CHOICE_WORK": 1e9, "PREFIXES": widths, "FIRST_PREFIX": 999, "HOPELESS": 1e9}
    for name, value in values.items():
        monkeypatch.setattr(bounds, name, value)
    for name in ("FIRST_ROWS", "PAIR_ROWS"):
        monkeypatch.setattr(bounds, name, 0)


def kinds_of(monkeypatch):
    """The kinds of the kernels that run from now on, with the full products that each one took."""
    seen = []
    run = native.run

    def spy(*args):
        seen.append((args[2], run(*args)))
        return seen[-1][1]

    monkeypatch.setattr(native, "run", spy)
    return seen


def steps(variant, data, start, count):
    """(pass, the centroids it was given), `count` times, by one engine that keeps its memory."""
    scan = made(variant).scan
    rows, centroids = rows_of(data), start
    for _ in range(count):
        found = scan(rows, centroids, lambda done: None)
        yield found, centroids
        means = (found.sums / np.maximum(found.counts, 1)[:, None]).astype(np.float32)
        centroids = np.where(found.counts[:, None] > 0, means, centroids)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 150),
    dim=st.integers(1, 40),
    share=st.floats(0, 1),
    kind=st.sampled_from(["normal", "grid", "repeated", "constant", "far", "half", "tiny", "huge"]),
)
@example(seed=150, n=71, dim=1, share=1.0, kind="normal")  # a row within a tie of two centroids, one of them itself
def test_every_shape_and_range(variant, seed, n, dim, share, kind):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(n, dim))
    if kind == "grid":
        data = np.rint(data)
    if kind == "repeated":
        data = data[rng.integers(0, max(1, n // 5), n)]
    if kind == "constant":
        data[:, :: 1 + seed % 3] = 7.5
    data = data * {"half": 2e4, "tiny": 1e-22, "huge": 1e12}.get(kind, 1.0) + (1e6 if kind == "far" else 0.0)
    if kind == "half":
        data = np.clip(data, -65504, 65504).astype(np.float16)
    data = data.astype(np.float32)
    k = 1 + int(share * (n - 1))
    start = data[rng.permutation(n)[:k]]
    with pytest.MonkeyPatch.context() as monkeypatch:
        forced_bounds(monkeypatch, *([max(1, dim // 2)] if seed % 2 else []))
        for found, centroids in steps(variant, data, start, 4):
            check(found, data, centroids)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(400, 300, 37), (150, 530, 70), (700, 64, 33), (90, 1030, 90)])
@pytest.mark.parametrize("by", ["projection", "pairs"])
def test_columns_rows_and_centroids_beyond_one_tile(variant, n, d, k, by, monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 10**6)
    forced_bounds(monkeypatch, *([min(d, k) // 2] if by == "projection" else []))
    seen = kinds_of(monkeypatch)
    data = decaying(n, d)
    for found, centroids in steps(variant, data, data[:k].copy(), 5):
        check(found, data, centroids)
    if "level" in variant:
        assert {native.FILTERED, native.GUESS} <= {kind for kind, _ in seen} or by == "pairs"
        assert native.PAIRED in {kind for kind, _ in seen} or by == "projection"


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_more_centroids_than_a_group(level):
    data = decaying(700, 24)
    for found, centroids in steps({"level": level}, data, data[:600].copy(), 3):
        check(found, data, centroids)


@pytest.mark.parametrize(("k", "d"), [(30, 500), (300, 500)])
def test_directions_of_long_rows_are_the_leading_ones(k, d):
    matrix = np.random.default_rng(0).normal(size=(k, 40)) * np.arange(1, 41) ** -1.0
    matrix = (matrix @ np.linalg.qr(np.random.default_rng(1).normal(size=(d, 40)))[0].T).astype(np.float32)
    found = bounds._leading(matrix, 64).astype(np.float64)
    rank = min(k, 40)
    assert rank <= found.shape[1] <= 64
    np.testing.assert_allclose(found.T @ found, np.eye(found.shape[1]), atol=1e-6)
    axes = np.linalg.svd(matrix.astype(np.float64))[2][:8]
    np.testing.assert_allclose(np.linalg.norm(axes @ found[:, :8], axis=1), 1, atol=1e-3)


@needs_extension
@pytest.mark.parametrize("widths", [(12,), ()])
def test_any_memory_gives_the_same_labels(widths, monkeypatch):
    """What a pass leaves for the next are hints: wrong ones cost time, not exactness."""
    forced_bounds(monkeypatch, *widths)
    data = decaying(300, 30)
    rows = rows_of(data)
    scan = exact_engine().scan
    rng = np.random.default_rng(0)
    for _ in range(6):
        centroids = data[rng.permutation(300)[:50]] + rng.normal(size=30).astype(np.float32)
        check(scan(rows, centroids, lambda done: None), data, centroids)
    other = decaying(200, 30, seed=1)
    check(scan(rows_of(other), centroids, lambda done: None), other, centroids)
    check(scan(rows_of(other), centroids[:20], lambda done: None), other, centroids[:20])


@needs_extension
def test_bounds_leave_few_pairs_and_work_is_saved(monkeypatch, capsys):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 2**22)
    monkeypatch.setattr(bounds, "CHOICE_WORK", np.inf)
    dots = kinds_of(monkeypatch)
    data = decaying(3000, 256)
    kmeans(rows_of(data), 200, 4, engine=exact_engine())
    kinds = [kind for kind, _ in dots]
    # Centroids are projected for each pass, rows once.
    assert kinds[:6] == [native.DENSE, native.PROJECT, native.PROJECT, native.FILTERED, native.PROJECT, native.FILTERED]
    assert kinds.count(native.DENSE) == 1 and kinds.count(native.FILTERED) >= 4
    for kind, count in dots:
        assert count < (0.05 * 3000 * 200 if kind == native.FILTERED else 100)
    assert "bounds in" in capsys.readouterr().err
    flat = np.random.default_rng(0).random((3000, 256), dtype=np.float32)
    monkeypatch.setattr(bounds, "PAIR_ROWS", 0)
    dots.clear()
    kmeans(rows_of(flat), 200, 12, engine=exact_engine())
    kinds = [kind for kind, _ in dots]
    assert set(kinds) == {native.DENSE, native.PAIRED}
    assert min(count for kind, count in dots if kind == native.PAIRED) < 0.1 * 3000 * 200
    assert "bounds of pairs" in capsys.readouterr().err
    monkeypatch.setattr(exact, "KEPT_BYTES", 0)
    dots.clear()
    kmeans(rows_of(flat), 200, 12, engine=exact_engine())
    assert {kind for kind, _ in dots} == {native.DENSE}


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["decaying", "grid", "repeated", "far"]),
    share=st.sampled_from([0.0, 0.02, 0.2, 0.9]),
    blocks=st.sampled_from([2000, 10**6]),
)
def test_rows_that_settled_give_the_bytes_of_a_fresh_pass(level, seed, kind, share, blocks):
    """Only some centroids move from pass to pass, sometimes onto others, or far out, which makes more rows tie."""
    rng = np.random.default_rng(seed)
    data = decaying(220, 48, seed) + np.float32(1e5 * (kind == "far"))
    if kind == "grid":
        data = np.rint(data)
    if kind == "repeated":
        data = data[rng.integers(0, 40, 220)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        forced_bounds(monkeypatch, 8)
        monkeypatch.setattr(engine, "BLOCK_NUMBERS", blocks)
        rows, kept = rows_of(data), exact_engine(level=level)
        centroids = data[rng.permutation(220)[:40]]
        looked = []
        run = native.run
        monkeypatch.setattr(native, "run", lambda *args: looked.append(args[3].get("few", -1)) or run(*args))
        for step in range(7):
            found = kept.scan(rows, centroids, lambda done: None)
            np.testing.assert_array_equal(found.labels, nearest64(data, centroids)[0])
            fresh = exact_engine(level=level).scan(rows, centroids, lambda done: None)
            for left, right in zip(found, fresh, strict=True):
                assert left.tobytes() == right.tobytes()
            centroids = centroids.copy()
            going = np.flatnonzero(rng.random(40) < (1 if step == 1 else share))
            means = (found.sums / np.maximum(found.counts, 1)[:, None]).astype(np.float32)
            centroids[going] = np.where(rng.random(len(going))[:, None] < 0.3, data[going], means[going])
        assert share == 0.9 or max(looked) >= 0


@needs_extension
@pytest.mark.parametrize("d", [40, 300])
def test_runs_that_settle_look_at_few_centroids(d, monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 10**6)
    forced_bounds(monkeypatch, 16)
    looked = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda *args: looked.append(args[3].get("few", 50)) or run(*args))
    data = decaying(900, d)
    found = kmeans(rows_of(data), 50, 40, seed=3, engine=exact_engine())
    assert found.moved[-1] == 0 and min(looked) <= 2
    same(found, kmeans(rows_of(data), 50, 40, seed=3, engine=exact_engine(room=0)))


@needs_extension
def test_the_bound_is_one():
    """Projected scores are never below exact ones by more than the doubt that the filter allows."""
    data = decaying(500, 200)
    centroids = np.stack([part.mean(axis=0) for part in np.array_split(data, 40)])
    target = bounds.centre(centroids)
    basis = bounds.Basis(target.origin, bounds._leading(target.centred, 24), 1e-6)
    level = LEVELS[-1]
    given = exact._fields(target, level)
    memory = bounds.Memory(rows_of(data), 0, print)
    project, filtered = exact._filter_fields(memory, target, basis, given, level, 1)
    projected = np.empty((500, 26), np.float32)
    native.run(level, 1, native.PROJECT, project | {"rows": 500, "x": data, "projected": projected})
    x = data.astype(np.float64) - target.origin
    c = centroids.astype(np.float64) - target.origin
    scores = x @ c.T - (c**2).sum(axis=1) / 2
    upper = projected[:, :25] @ memory.across[1][:, :25].T - (c**2).sum(axis=1) / 2
    longest = given["longest"]
    doubt = filtered["filter_error"] * (projected[:, 25:] * longest + longest**2 / 2)
    assert (upper >= scores - doubt).all()
    np.testing.assert_allclose(projected[:, 25], np.linalg.norm(x, axis=1), rtol=1e-6)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_bounds_of_pairs_are_lower_ones(level):
    data, centroids = decaying(300, 70), decaying(45, 70, seed=1)
    target = bounds.centre(centroids)
    fields = exact._fields(target, level)
    width = len(fields["bias"])
    kept = np.empty((300, width), np.uint16)
    work = fields | {"packed": native.pack(level, target.centred), "bounds": kept, "scale": 4.0}
    work |= {"rows": 300, "x": data, "labels": np.empty(300, np.int32), "distances": np.empty(300, np.float32)}
    native.run(level, 1, native.DENSE, work)
    squares = ((data[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    lower = kept.view(np.float16)[:, :45].astype(np.float64) / 4
    assert (lower <= squares).all()
    np.testing.assert_allclose(lower, squares, rtol=1e-3, atol=1e-2)


EDGES = {
    "beyond": ([1.2, 1.15, -1.1, -1.0], [1.1, -1.1], [1.1, 1.2]),
    "far apart": ([0.5, 0.49, -0.1, 0.0], [0.5, 0.0, -0.1, -0.2, -0.3], [1.6, 0.0, -3.0, -3.0, -3.0]),
    "farther": ([0.5, 0.49, -0.1, 0.0], [0.5, 0.0, -0.1, -0.2, -0.3], [1.6, 0.0, *[-1.9] * 3]),
}


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", EDGES)
def test_bounds_of_pairs_near_the_largest_float32(level, name, monkeypatch):
    """Squares that overflow must not exclude a pair."""
    forced_bounds(monkeypatch)
    monkeypatch.setattr(bounds, "FEW_COLUMNS", 0)
    data, first, then = (np.array(values, np.float32)[:, None] * np.float32(1e19) for values in EDGES[name])
    scan = exact_engine(level=level).scan
    rows = rows_of(data)
    for centroids in (first, first, first, then):
        with np.errstate(all="ignore"):
            found = scan(rows, centroids, lambda done: None)
        np.testing.assert_array_equal(found.labels, nearest64(data, centroids)[0])


@needs_extension
def test_directions_of_nothing_and_of_the_largest_numbers():
    assert bounds._leading(np.zeros((20, 400), np.float32), 16).shape == (400, 0)
    large = np.random.default_rng(0).normal(size=(20, 400)).astype(np.float32) * np.float32(1e19)
    assert np.isfinite(bounds._leading(large, 16)).all()
    alike = np.ones((9000, 400), np.float32)
    for found, centroids in steps({}, alike, alike[:1].copy(), 3):
        check(found, alike, centroids)


@needs_extension
@pytest.mark.parametrize("widths", [(12,), ()])
def test_the_caller_may_write_to_its_arrays(widths, monkeypatch):
    forced_bounds(monkeypatch, *widths)
    data = decaying(300, 40)
    rows, scan = rows_of(data), exact_engine().scan
    centroids = data[:30].copy()
    for step in range(8):
        found = scan(rows, centroids, lambda done: None)
        check(found, data, centroids)
        found.labels[:] = -1
        centroids += np.random.default_rng(step).normal(size=centroids.shape).astype(np.float32) * 0.1


@needs_extension
@pytest.mark.parametrize("widths", [(), (12, 16)])
def test_a_pass_that_broke_off_leaves_no_bounds(widths, monkeypatch):
    forced_bounds(monkeypatch, *widths)
    data = decaying(300, 40)
    broken = False

    def read(start, stop):
        if broken and start > 100:
            raise OSError("gone")
        return data[start:stop]

    rows, scan = Rows(300, 40, read), exact_engine().scan
    generator = np.random.default_rng(0)
    centroids = data[:30].copy()
    for step in range(14):
        broken = step in (2, 4, 5, 7, 9, 11)
        if broken:
            with pytest.raises(OSError, match="gone"):
                near = centroids + 0.6 * generator.normal(size=(30, 40)).astype(np.float32)
                scan(rows, near, lambda done: None)
            broken = False
        check(scan(rows, centroids, lambda done: None), data, centroids)
        going = generator.random(30) < (1 if step < 5 else 0.5)
        far = generator.normal(size=(30, 40)) * (0.3 if step < 5 else 1e-3)
        centroids = (centroids + far * going[:, None]).astype(np.float32)


@needs_extension
def test_another_start_begins_anew(monkeypatch):
    data = decaying(3000, 256)
    monkeypatch.setattr(bounds, "CHOICE_WORK", np.inf)
    rows, engine_, seen = rows_of(data), exact_engine(), kinds_of(monkeypatch)
    kmeans(rows, 200, 6, seed=0, engine=engine_)
    assert native.FILTERED in {kind for kind, _ in seen}
    seen.clear()
    again = kmeans(rows, 200, 6, seed=1, engine=engine_)
    assert seen[0][0] == native.DENSE
    same(again, kmeans(rows, 200, 6, seed=1, engine=exact_engine()))


@needs_extension
def test_weights_count_as_often(monkeypatch):
    data = decaying(200, 24)
    weights = np.random.default_rng(0).integers(1, 5, 200).astype(float)
    centroids = data[:20].copy()
    for variant in VARIANTS:
        weighed = Rows(200, 24, lambda start, stop: data[start:stop], weights)
        found = made(variant).scan(weighed, centroids, lambda done: None)
        repeated = np.repeat(data, weights.astype(int), axis=0)
        again = made(variant).scan(rows_of(repeated), centroids, lambda done: None)
        np.testing.assert_allclose(found.sums, again.sums, rtol=1e-12)


@needs_extension
def test_threads_instruction_sets_blocks_and_cache_change_no_byte(monkeypatch):
    data = decaying(900, 96)
    first = kmeans(rows_of(data), 60, 8, seed=2, engine=exact_engine(threads=1, level=LEVELS[-1]))
    for threads, level in ((2, LEVELS[-1]), (1, LEVELS[0]), (3, LEVELS[0])):
        again = kmeans(rows_of(data), 60, 8, seed=2, engine=exact_engine(threads, level))
        same(first, again, but=("seconds", "engine"))
    monkeypatch.setattr(exact, "KEPT_BYTES", 0)
    same(first, kmeans(rows_of(data), 60, 8, seed=2, engine=exact_engine(2)))
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 10**6)
    same(first, kmeans(rows_of(data), 60, 8, seed=2, engine=exact_engine()))
    monkeypatch.setattr(bounds, "DENSE_COST", 0)
    same(first, kmeans(rows_of(data), 60, 8, seed=2, engine=exact_engine()))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("d", "k", "offset"), [(5, 40, 0), (96, 70, 0), (40, 500, 0), (30, 25, 1e4)])
def test_whole_runs_equal_those_of_faiss(variant, d, k, offset):
    data = decaying(500, d) + np.float32(offset)
    found = kmeans(rows_of(data), k, 12, seed=1, engine=made(variant))
    peer = kmeans(rows_of(data), k, 12, seed=1, engine=faiss_engine())
    np.testing.assert_array_equal(found.labels, peer.labels)
    np.testing.assert_array_equal(found.moved, peer.moved)
    assert (found.empties, found.splits) == (peer.empties, peer.splits)
    np.testing.assert_allclose(found.centroids, peer.centroids, rtol=1e-6)
    np.testing.assert_allclose(found.objective, peer.objective, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_resume_after_every_iteration_gives_the_same_bytes(variant, tmp_path):
    data = decaying(500, 64)
    paths = []

    def save(state):
        paths.append(tmp_path / f"{len(paths)}.npz")
        save_state(paths[-1], state)

    expected = kmeans(rows_of(data), 45, 8, seed=5, on_iteration=save, engine=made(variant))
    assert len(paths) == 8
    for path in paths:
        same(expected, kmeans(rows_of(data), 45, 8, seed=5, state=load_state(path), engine=made(variant)))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_near_ties_are_decided_in_float64(variant):
    """Two centroids a hair apart: their scores are equal in float32, and the nearer one has the higher index."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(200, 48)).astype(np.float32)
    base = rng.normal(size=(20, 48)).astype(np.float32)
    centroids = np.concatenate([np.nextafter(base, np.float32(9)), base])
    labels, _ = assign_rows(rows_of(data), centroids, made(variant))
    np.testing.assert_array_equal(labels, nearest64(data, centroids)[0])
    assert len(np.unique(labels >= 20)) == 2


@pytest.mark.parametrize("kind", ["products", "directions", "pairs"])
@pytest.mark.parametrize("variant", [one for one in VARIANTS if "float16" not in one and "device" not in one], ids=str)
def test_scores_are_never_off_by_more_than_the_doubt(variant, kind, monkeypatch):
    """Rows on the plane between their two nearest centroids: their own rounding decides, that of scores must not."""
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 2**20)
    if kind != "products":
        forced_bounds(monkeypatch, *((4,) if kind == "directions" else ()))
    monkeypatch.setattr(bounds, "FEW_COLUMNS", 0)
    rng = np.random.default_rng(0)
    for d in (1, 2, 3, 8, 40):
        centroids = rng.normal(size=(12, d)).astype(np.float32)
        first, second = rng.integers(0, 12, (2, 20000))
        middles = (centroids[first].astype(np.float64) + centroids[second]) / 2
        apart = (centroids[first] - centroids[second]).astype(np.float64)
        aside = rng.normal(size=middles.shape) * 0.1
        along = np.einsum("ij,ij->i", aside, apart) / np.maximum(np.einsum("ij,ij->i", apart, apart), 1e-9)
        data = (middles + aside - along[:, None] * apart).astype(np.float32)
        scan, rows = made(variant).scan, rows_of(data)
        for _ in range(2):  # of pairs, bounds are kept by the first pass
            labels = scan(rows, centroids, lambda done: None).labels
            np.testing.assert_array_equal(labels, nearest64(data, centroids)[0])


def test_without_the_extension_a_dense_product_stands_in(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    native.library.cache_clear()
    try:
        data = decaying(200, 20)
        assert choose.choose_engine("exact").name == "exact, dense in numpy"
        assert "dense product" in capsys.readouterr().err
        assert "faiss" in choose.choose_engine("auto").name
        assert "not built" in capsys.readouterr().err
        found = kmeans(rows_of(data), 15, 5, engine=exact_engine())
        np.testing.assert_array_equal(found.labels, nearest64(data, found.centroids)[0])
    finally:
        native.library.cache_clear()


def test_threads_without_the_extension_change_no_byte_and_pass_on_errors(monkeypatch):
    data = decaying(700, 64)
    first = kmeans(rows_of(data), 40, 6, seed=2, engine=exact_engine(1, compiled=False))
    monkeypatch.setattr(dense, "SCORES_AT_ONCE", 40 * 7)
    for threads in (2, 5):
        same(first, kmeans(rows_of(data), 40, 6, seed=2, engine=exact_engine(threads, compiled=False)))

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(dense, "_nearest", fail)
    with pytest.raises(MemoryError, match="no room"):
        kmeans(rows_of(data), 40, 6, seed=2, engine=exact_engine(2, compiled=False))


def test_engines_by_name(capsys):
    assert choose.choose_engine("faiss").name.startswith("faiss")
    assert choose.choose_engine("exact").name.startswith("exact")
    choose.choose_engine("auto")
    assert capsys.readouterr().err.count("k-means engine: ") == 3
    with pytest.raises(UsageError, match="'flash'"):
        choose.choose_engine("flash")


@needs_extension
def test_no_memory_is_an_error_and_not_a_crash(monkeypatch):
    data = decaying(50, 8)
    work = exact._fields(bounds.centre(data[:5]), LEVELS[-1]) | {"packed": native.pack(LEVELS[-1], data[:5])}
    work |= {"rows": 50, "x": data, "labels": np.empty(50, np.int32), "d": 2**55}
    with pytest.raises(MemoryError, match="scratch"):
        native.run(LEVELS[-1], 1, native.DENSE, work)
