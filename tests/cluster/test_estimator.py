"""The estimator: scikit-learn's own checks, the same results as its k-means, every kind of array."""

import pickle
import time

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import cluster as sk
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from ktransfer.cluster import KMeans, estimator
from ktransfer.cluster.engines import engine


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK_NUMBERS", 600)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(n=300, d=6, centres=10, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, d)) * 3
    return means[rng.integers(0, centres, n)] + rng.normal(size=(n, d)) + offset


def peer(data, start, weights=None, max_iter=300, tol=0.0):
    model = sk.KMeans(len(start), init=start, n_init=1, algorithm="lloyd", max_iter=max_iter, tol=tol)
    return model.fit(data, sample_weight=weights)


def ours(start, **options):
    return KMeans(len(start), init=start, **{"tol": 0, "engine": "faiss"} | options)


@pytest.mark.parametrize("options", [{}, {"n_clusters": 3, "init": "random", "n_init": 2, "max_iter": 5, "tol": 0}])
@pytest.mark.parametrize("name", ["faiss", "exact"])
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_s_own_checks(name, options):
    # No exceptions are declared, sample weights included: sums of float32 in float64 and starts drawn by content make
    # weights and repeated rows the same.
    done = check_estimator(KMeans(engine=name, **options), on_skip=None)
    assert len(done) > 40
    assert {check["status"] for check in done} <= {"passed", "skipped"}
    assert all(
        "is not installed" in str(check["exception"]) or "SCIPY_ARRAY_API" in str(check["exception"])
        for check in done
        if check["status"] == "skipped"
    )


@pytest.mark.parametrize("name", ["faiss", "exact", "auto"])
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_as_scikit_learn(name, offset, dtype):
    data = blobs(offset=offset).astype(dtype)
    start = data[:9]
    weights = np.random.default_rng(1).uniform(0.1, 5, len(data))
    for weight in (None, weights):
        expected = peer(data.astype(np.float64), start.astype(np.float64), weight)
        found = ours(start, engine=name).fit(data, sample_weight=weight)
        np.testing.assert_array_equal(found.labels_, expected.labels_)
        # float32 centres a million from the origin are rounded to 1/16, and labels and inertia are theirs.
        rounded = dtype == np.float32 and abs(offset) == 1e6
        assert found.inertia_ == pytest.approx(expected.inertia_, rel=1e-3 if rounded else 1e-5)
        np.testing.assert_allclose(found.cluster_centers_, expected.cluster_centers_, rtol=1e-6, atol=1e-5)
        assert found.cluster_centers_.dtype == dtype
        assert found.n_iter_ == expected.n_iter_
        assert found.engine_.startswith("" if name == "auto" else name) and found.engine_.endswith(")")
        np.testing.assert_array_equal(found.predict(data), found.labels_)
        assert found.score(data, sample_weight=weight) == pytest.approx(-found.inertia_, rel=1e-6)
        fresh = blobs(n=50, seed=5, offset=offset).astype(dtype)
        if not rounded:
            np.testing.assert_array_equal(found.predict(fresh), expected.predict(fresh.astype(np.float64)))
        distances = found.transform(fresh)
        assert distances.dtype == np.float64
        centres = found.cluster_centers_.astype(np.float64)
        np.testing.assert_allclose(
            distances, np.linalg.norm(fresh[:, None].astype(np.float64) - centres, axis=2), rtol=1e-6
        )
        np.testing.assert_array_equal(distances.argmin(axis=1), found.predict(fresh))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 7),
    dim=st.integers(1, 5),
    offset=st.sampled_from([0.0, -40.0, 1e6]),
    scale=st.sampled_from([1.0, 1e-30, 1e25]),
)
def test_any_shape_weights_and_scale(seed, k, dim, offset, scale):
    rng = np.random.default_rng(seed)
    data = (rng.normal(size=(40, dim)) + offset) * scale
    weights = rng.integers(0, 4, 40).astype(float)
    start = data[weights > 0][:k]
    expected = peer(data / scale, start / scale, weights)
    found = ours(start).fit(data, sample_weight=weights)
    if len(np.unique(expected.labels_[weights > 0])) == len(start):  # empty clusters are filled in another way
        np.testing.assert_array_equal(found.labels_, expected.labels_)
        assert found.inertia_ == pytest.approx(expected.inertia_ * scale**2, rel=1e-5, abs=1e-9 * scale**2)
        nearest = found.transform(data).min(axis=1) / scale
        assert nearest**2 @ weights == pytest.approx(expected.inertia_, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_weights_repetition_and_order_are_the_same(init):
    rng = np.random.default_rng(3)
    data = blobs(n=80, offset=30)
    weights = rng.integers(0, 4, 80)
    order = rng.permutation(80)
    options = {"init": init, "engine": "faiss", "random_state": 4, "tol": 1e-3}
    repeated = KMeans(7, **options).fit(data.repeat(weights, axis=0))
    weighed = KMeans(7, **options).fit(data[order], sample_weight=weights[order])
    np.testing.assert_allclose(weighed.cluster_centers_, repeated.cluster_centers_, rtol=1e-7)
    np.testing.assert_array_equal(weighed.labels_, repeated.predict(data)[order])
    assert weighed.inertia_ == pytest.approx(repeated.inertia_, rel=1e-6)
    assert weighed.n_iter_ == repeated.n_iter_
    again = KMeans(7, **options)
    np.testing.assert_array_equal(again.fit_predict(data[order], sample_weight=weights[order]), weighed.labels_)
    assert not np.array_equal(
        again.set_params(random_state=5).fit(data).cluster_centers_, again.set_params(random_state=6).fit(data)
    )


@pytest.mark.parametrize(("init", "k"), [("random", 2), ("k-means++", 1)])
def test_starts_are_distinct_rows_drawn_by_weight(monkeypatch, init, k):
    data = np.arange(4.0)[:, None].repeat(5, axis=0)
    weights = np.repeat([1.0, 1, 1, 7], 5)
    seen = []
    monkeypatch.setattr(estimator, "_lloyd", lambda rows, k, start, *rest: seen.append(start) or 1 / 0)
    for seed in range(300):
        with pytest.raises(ZeroDivisionError):
            KMeans(k, init=init, n_init=1, random_state=seed, engine="faiss").fit(data, sample_weight=weights)
    starts = np.stack(seen)[:, :, 0]
    assert all(len(set(start)) == k for start in starts.tolist())
    # The first of them: 7 in 10; standard deviation 0.026.
    assert 0.6 < (starts[:, 0] == 3).mean() < 0.8


def test_k_means_plus_plus_is_as_good_as_scikit_learn_s():
    data = blobs(n=400, centres=12, seed=2)
    found = np.mean([KMeans(12, random_state=s, max_iter=1, engine="faiss").fit(data).inertia_ for s in range(12)])
    expected = np.mean([sk.KMeans(12, random_state=s, max_iter=1, n_init=1).fit(data).inertia_ for s in range(12)])
    random = np.mean(
        [
            KMeans(12, init="random", n_init=1, random_state=s, max_iter=1, engine="faiss").fit(data).inertia_
            for s in range(12)
        ]
    )
    assert found < 1.1 * expected
    assert found < 0.9 * random


def test_the_best_of_several_runs_is_kept(monkeypatch):
    data = blobs()
    model = KMeans(9, init="random", random_state=0, engine="faiss").fit(data)
    runs = []
    original = estimator._lloyd
    monkeypatch.setattr(estimator, "_lloyd", lambda *given: runs.append(original(*given)) or runs[-1])
    again = clone(model).fit(data)
    assert len(runs) == 10
    assert again.inertia_ == model.inertia_ == min(run.final_objective for run in runs)
    assert len({run.final_objective for run in runs}) > 1


def test_tolerance_is_scikit_learn_s():
    data = blobs(n=600, centres=3, seed=9, offset=5) * 7
    start = data[:20]
    for tol in (1e-4, 1e-2, 0.3):
        expected = peer(data, start, tol=tol)
        found = ours(start, tol=tol).fit(data)
        assert found.n_iter_ == expected.n_iter_
        np.testing.assert_array_equal(found.labels_, expected.labels_)
    assert ours(start).fit(data).n_iter_ > found.n_iter_
    assert ours(start, max_iter=2).fit(data).n_iter_ == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16])
@pytest.mark.parametrize("name", ["faiss", "exact"])
def test_tensors_give_tensors(name, dtype):
    data = torch.from_numpy(blobs(offset=3) * 4).to(dtype).requires_grad_(dtype.is_floating_point)
    plain = data.detach().double().numpy()
    weights = torch.rand(len(data), generator=torch.Generator().manual_seed(0))
    found = ours(data[:8].detach(), engine=name).fit(data, sample_weight=weights)
    expected = ours(plain[:8], engine=name).fit(plain, sample_weight=weights.numpy())
    for tensor in (found.labels_, found.cluster_centers_, found.predict(data), found.transform(data)):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.device == data.device
    assert found.labels_.dtype == torch.int64
    wide = dtype in (torch.float64, torch.int16)
    assert found.cluster_centers_.dtype == (torch.float64 if wide else torch.float32)
    assert found.transform(data).dtype == torch.float64
    np.testing.assert_array_equal(found.labels_.numpy(), expected.labels_)
    np.testing.assert_array_equal(found.predict(data).numpy(), expected.labels_)
    np.testing.assert_allclose(found.transform(data).numpy(), expected.transform(plain), rtol=1e-6, atol=1e-6)
    assert found.inertia_ == pytest.approx(expected.inertia_, rel=1e-6)
    assert isinstance(found.inertia_, float)
    assert isinstance(found.predict(plain), np.ndarray)
    assert isinstance(clone(found).fit_predict(data[:50]), torch.Tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_on_a_gpu_give_tensors_there():
    data = torch.from_numpy(blobs()).half().cuda()
    found = ours(data[:8]).fit(data)
    expected = ours(data[:8].cpu()).fit(data.cpu())
    for name in ("labels_", "cluster_centers_"):
        assert getattr(found, name).device == data.device
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name))
    assert found.transform(data).device == data.device


class Watched:
    """An array of slices that remembers the longest."""

    def __init__(self, data):
        self.data, self.shape, self.dtype, self.longest = data, data.shape, data.dtype, 0

    def __getitem__(self, part):
        self.longest = max(self.longest, part.stop - part.start)
        return self.data[part]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_files_are_read_by_blocks(tmp_path, dtype):
    data = (blobs() * 5).astype(dtype)
    weights = (np.arange(len(data)) % 7 == 0).astype(float)
    start = data[:8].astype(np.float64)
    expected = ours(start).fit(data.astype(np.float64), sample_weight=weights)
    data.tofile(tmp_path / "rows")
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        watched = Watched(data)
        kinds = [
            np.memmap(tmp_path / "rows", dtype, "r", shape=data.shape),
            file.create_dataset("rows", data=data),
            watched,
            np.asfortranarray(data),
        ]
        for rows in kinds:
            found = ours(start).fit(rows, sample_weight=weights)
            np.testing.assert_array_equal(found.labels_, expected.labels_)
            np.testing.assert_array_equal(found.predict(rows), expected.labels_)
            np.testing.assert_allclose(found.transform(rows), expected.transform(data), rtol=1e-5, atol=1e-5)
            assert found.inertia_ == pytest.approx(expected.inertia_, rel=1e-6)
            assert found.n_features_in_ == 6
    assert 0 < watched.longest <= 600 // 6 * 4  # the exact engine takes four blocks at once


def test_rows_without_weight_change_nothing_and_are_labelled():
    data = blobs(n=60)
    far = np.concatenate([data, np.full((1, 6), 1e12), data[:3]])
    weights = np.concatenate([np.ones(60), np.zeros(4)])
    found = KMeans(5, random_state=0, engine="faiss").fit(far, sample_weight=weights)
    expected = KMeans(5, random_state=0, engine="faiss").fit(data)
    np.testing.assert_array_equal(found.cluster_centers_, expected.cluster_centers_)
    np.testing.assert_array_equal(found.labels_[:60], expected.labels_)
    np.testing.assert_array_equal(found.labels_[61:], expected.labels_[:3])
    assert found.inertia_ == pytest.approx(expected.inertia_, rel=1e-6)


@pytest.mark.parametrize("init", ["random", "k-means++", "array"])
def test_fewer_distinct_rows_than_clusters_warn(init):
    data = np.repeat([[0.0, 1], [5, 5], [9, -3]], 4, axis=0)
    given = np.resize(data[::4], (6, 2)) if init == "array" else init
    with pytest.warns(ConvergenceWarning, match=r"clusters \(3\) found smaller than n_clusters \(6\)"):
        found = KMeans(6, init=given, n_init=1, random_state=0, engine="faiss").fit(data)
    assert found.inertia_ == 0
    assert found.cluster_centers_.shape == (6, 2)
    assert len(np.unique(found.labels_)) == 3
    assert np.isfinite(found.transform(data)).all()


def test_pickled_cloned_searched_and_unfitted():
    data = blobs()
    found = KMeans(4, random_state=0, engine="faiss").fit(data)
    twin = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(twin.transform(data), found.transform(data))
    fresh = clone(found)
    assert fresh.get_params() == found.get_params()
    with pytest.raises(NotFittedError):
        fresh.predict(data)
    assert list(found.get_feature_names_out()) == ["kmeans0", "kmeans1", "kmeans2", "kmeans3"]
    best = GridSearchCV(fresh, {"n_clusters": [2, 9]}, cv=2).fit(data)
    assert best.best_params_ == {"n_clusters": 9}
    assert adjusted_rand_score(found.labels_, fresh.fit_predict(data)) == 1
    found.cluster_centers_ = found.cluster_centers_[::-1].copy()  # some set centres by hand
    np.testing.assert_array_equal(found.predict(data), 3 - twin.labels_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters = 0: give a whole number"),
        ({"n_clusters": 2.5}, r"n_clusters = 2\.5"),
        ({"max_iter": True}, "max_iter = True"),
        ({"n_init": "some"}, "n_init = 'some': give auto"),
        ({"tol": -1}, "tol = -1"),
        ({"engine": "fast"}, "engine = 'fast': give one of auto, faiss, faiss-float16, exact"),
        ({"init": "kmeans"}, r"init = 'kmeans': give k-means\+\+ or random"),
        ({"init": np.zeros((3, 5))}, r"init has shape \(3, 5\), not .* \(8, 6\)"),
        ({"init": np.full((8, 6), np.nan)}, "init contains NaN"),
        ({"n_clusters": 301}, "n_samples=300 should be >= n_clusters=301"),
    ],
)
def test_what_is_wrong_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        KMeans(**options).fit(blobs())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(299), r"shape \(299,\), not \(300,\)"),
        (np.full(300, -1.0), "negative"),
        (np.full(300, np.nan), "NaN"),
        (np.zeros(300), "all sample weights are zero"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        KMeans(engine="faiss").fit(blobs(), sample_weight=weights)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(5), "Expected 2D"),
        (torch.zeros(0, 4), r"0 sample\(s\)"),
        (torch.zeros(9, 2, dtype=torch.complex64), "complex64"),
        (torch.full((9, 2), torch.nan), "NaN"),
        (np.full((9, 2), np.inf, np.float16), "infinity"),
        (torch.zeros(9, 2).to_sparse(), "sparse"),
    ],
)
def test_wrong_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        KMeans(2, engine="faiss").fit(rows)


def test_rows_of_another_length_or_size_are_refused_later():
    found = KMeans(3, engine="faiss").fit(blobs())
    for rows in (torch.zeros(4, 5), np.zeros((4, 5)), Watched(np.zeros((4, 5)))):
        with pytest.raises(ValueError, match="5 features, but KMeans is expecting 6"):
            found.predict(rows)
    with pytest.raises(ValueError, match="too large"):
        found.transform(np.full((2, 6), 1e300))
    with pytest.warns(RuntimeWarning, match="one run"):
        KMeans(3, init=blobs()[:3], n_init=4, engine="faiss").fit(blobs())


def test_every_parameter_of_scikit_learn_s_is_taken():
    ours, theirs = KMeans().get_params(), sk.KMeans().get_params()
    assert ours == theirs | {"engine": "auto"}
    given = {"n_clusters": 3, "algorithm": "elkan", "verbose": 0, "copy_x": False, "n_init": 2, "random_state": 4}
    model = clone(KMeans(**given)).set_params(max_iter=7)
    assert {**given, "max_iter": 7}.items() <= model.get_params().items()
    plain = KMeans(3, n_init=2, random_state=4, max_iter=7).fit(blobs())
    np.testing.assert_array_equal(model.fit(blobs()).cluster_centers_, plain.cluster_centers_)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(blobs()), model.labels_)


@pytest.mark.parametrize("name", ["faiss", "exact"])
def test_a_function_gives_the_centres(name):
    data, seen = blobs(offset=1e3), []

    def init(X, n_clusters, random_state):  # noqa: N803 -- scikit-learn's name
        seen.append((X.shape, n_clusters))
        return X[random_state.permutation(len(X))[:n_clusters]]

    model = KMeans(4, init=init, random_state=0, engine=name, tol=0).fit(data)
    assert seen == [(data.shape, 4)] * 10
    assert KMeans(4, init=init, n_init=2, random_state=0).fit(data).n_iter_ >= 1 and len(seen) == 12
    best = min(
        peer(data, data[np.random.RandomState(seed).permutation(len(data))[:4]]).inertia_
        for seed in np.random.RandomState(0).randint(2**31 - 1, size=10)
    )
    assert model.inertia_ == pytest.approx(best, rel=1e-6)
    with pytest.raises(ValueError, match=r"init has shape \(3, 6\), not"):
        KMeans(4, init=lambda rows, n_clusters, random_state: rows[:3]).fit(data)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64", "uint64", "float16", "float32", "float64"])
def test_numbers_of_any_type(dtype, tmp_path):
    data = (blobs(centres=4) * 3).round().clip(0, 100).astype(dtype)
    start = data[[0, 5, 9]].astype(np.float64) + 0.25
    wanted = peer(data.astype(np.float64), start)
    kept = data.copy()
    model = ours(start, copy_x=False).fit(data)
    np.testing.assert_array_equal(data, kept)
    np.testing.assert_allclose(model.cluster_centers_, wanted.cluster_centers_, rtol=1e-5)
    np.testing.assert_array_equal(model.labels_, wanted.labels_)
    np.testing.assert_array_equal(model.predict(data), wanted.labels_)
    assert model.score(data) == pytest.approx(wanted.score(data.astype(np.float64)), rel=1e-5)
    if dtype != "uint64":
        tensor = ours(start).fit(torch.from_numpy(data))
        np.testing.assert_allclose(np.asarray(tensor.cluster_centers_), wanted.cluster_centers_, rtol=1e-5)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = data
        np.testing.assert_array_equal(ours(start).fit(file["x"]).labels_, wanted.labels_)
    yes = data > data.mean()
    np.testing.assert_array_equal(ours(start).fit(yes).labels_, ours(start).fit(yes.astype(float)).labels_)


def test_it_says_nothing_unless_asked(capfd, monkeypatch):
    monkeypatch.setattr("ktransfer.cluster.algorithms.initialisation.SAMPLE_EACH", 1)
    monkeypatch.setattr(estimator, "START_SAMPLE", 8)
    original = estimator.passing

    def slow(*given):
        for block in original(*given):
            time.sleep(0.3)
            yield block

    monkeypatch.setattr(estimator, "passing", slow)
    model = KMeans(3, random_state=0).fit(blobs())
    model.predict(blobs()), model.transform(blobs()), model.score(blobs()), model.fit_predict(blobs())
    assert capfd.readouterr() == ("", "")
    KMeans(3, random_state=0, verbose=1).fit(blobs())
    said = capfd.readouterr()
    assert said.out == "" and "k-means engine:" in said.err and "distinct rows" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "full"}, "algorithm = 'full': give lloyd or elkan"),
        ({"verbose": -1}, "verbose = -1"),
        ({"copy_x": "no"}, "copy_x = 'no'"),
    ],
)
def test_what_is_wrong_in_the_others_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        KMeans(**options).fit(blobs())


def test_warnings_point_to_the_caller():
    with pytest.warns(RuntimeWarning, match="n_init = 3") as caught:
        KMeans(2, init=np.eye(2), n_init=3).fit(np.eye(2))
    assert caught[0].filename == __file__
