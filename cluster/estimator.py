"""k-means with scikit-learn's interface for numpy, memory-mapped and HDF5 arrays and torch tensors, read by blocks."""

# ruff: noqa: N803 (X is the name that scikit-learn's callers give)

import warnings
from collections.abc import Callable
from hashlib import blake2b
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ktransfer.progress import quiet, say

from .algorithms.initialisation import SAMPLE_EACH, SAMPLE_NUMBERS, kmeans_plus_plus
from .algorithms.lloyd import Clustering, State, assign_rows, kmeans
from .arrays import (
    Doubles,
    as_numpy,
    check_weights,
    device_reader,
    frame_of,
    into,
    like,
    passing,
    reader,
    streams,
    variance,
    weighed,
)
from .engines.choose import ENGINES, choose_engine
from .engines.engine import Engine, Rows, described

STARTS = ("k-means++", "random")
ALGORITHMS = ("lloyd", "elkan")
START_SAMPLE = 2**16  # distinct rows that k-means++ looks at, if no more are needed for many clusters


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Lloyd's k-means on all rows, a drop-in for `sklearn.cluster.KMeans` on dense rows.

    Rows may be whatever scikit-learn takes, a memory map, an HDF5 data set (or another array with `shape`, `dtype` and
    slices), which is read block by block and never as a whole, or a torch tensor on any device. What comes back is of
    the same kind: for a tensor, labels (int64), distances and centres are tensors on its device.

    Rows are float32 inside. Columns that lie far from the origin are centred before on the middle of their range, and
    numbers beyond 2**30 or below 2**-30 scaled by a power of two; for float32 rows both are exact. So what float64 rows
    lose is 2**-22 of their column's range. Distances and inertia are float64.

    The result is a function of `random_state` and of the weighted set of points: neither the order of the rows nor
    whether a point is repeated or weighs more matters, up to float summation order. A cluster without rows gets half of
    the heaviest one. Rows of weight 0 have no influence; they are labelled in the end.

    Args:
        n_clusters: k >= 1, at most the number of rows; with fewer distinct ones some clusters stay empty, and a
            ConvergenceWarning says so.
        init: "k-means++" (on 65,536 random ones of the distinct rows, or 64 k if that is more, at most 1 GiB of them),
            "random" (distinct rows, by weight), (k, d) centres, or a function of (X, n_clusters, random_state) that
            gives them, X as it was given.
        n_init: runs, of which the one with the least inertia is kept; "auto": 10 for "random" and functions, else 1.
        max_iter: iterations of a run, at least 1.
        tol: a run ends when the squared shifts of all centres add up to at most this share of the mean variance of
            the columns; 0: when no label moves.
        verbose: 0 says nothing at all; 1 or more shows bars, and says what happens.
        random_state: int, numpy RandomState, or None.
        copy_x: as in scikit-learn; here rows are never changed.
        algorithm: "lloyd" or "elkan": the labels are the same, and `engine` says how distances are saved.
        engine: "auto", "faiss", "faiss-float16" or "exact", as `ktransfer cluster --engine`; all give the same labels.

    Attributes:
        cluster_centers_: (k, d); float64 for float64 and integer rows, else float32.
        labels_: (n,) int32, in tensors int64: the nearest centre, the lowest of those equally near.
        inertia_: weighted sum of squared distances to it.
        n_iter_: iterations of the run that was kept.
        engine_: what did the work, with its version.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Raises:
        ValueError: by `fit`, a parameter out of its range.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
        engine: str = "auto",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.engine = engine

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "KMeans":
        """Find the centres of rows X (n, d), of weights (n,) >= 0; y is ignored.

        Raises:
            ValueError: a parameter, shape or weight that cannot be, NaN or infinity in X, or n < k.
        """
        with quiet(not self.verbose):
            return self._fit(X, sample_weight)

    def _fit(self, X: Any, sample_weight: Any) -> "KMeans":
        k = self.n_clusters
        runs = self._check_parameters()
        table = self._table(X, reset=True)
        count, dim = table.shape
        if count < k:
            raise ValueError(f"n_samples={count} should be >= n_clusters={k}: take fewer clusters")
        weights = check_weights(sample_weight, count)
        given = None if isinstance(self.init, str) or callable(self.init) else self._given_centres(self.init, dim)
        frame = frame_of(table, weights)
        everything = Rows(count, dim, reader(table, frame), on_device=device_reader(table, frame))
        rows = weighed(everything, weights)
        draw: Callable[[int], NDArray[np.float32]]
        if given is not None:
            start = into(frame, given)
            draw = lambda seed: start  # noqa: E731
        elif callable(self.init):
            draw = lambda seed: into(frame, self._asked(X, dim, seed))  # noqa: E731
        else:
            draw = _drawer(rows, k, self.init)
        tolerance = self.tol * variance(rows) if self.tol else 0.0
        engine = self._engine()
        best: Clustering | None = None
        generator: Any = check_random_state(self.random_state)
        for seed in generator.randint(2**31 - 1, size=runs).tolist():
            found = _lloyd(rows, k, draw(seed), self.max_iter, tolerance, engine)
            if best is None or found.final_objective < best.final_objective:
                best = found
        assert best is not None
        centres = best.centroids.astype(np.float64) * frame.unit + frame.offset
        self._frame = frame
        self.cluster_centers_ = like(X, centres.astype(frame.offset.dtype))
        self._n_features_out = k
        labels, inertia = best.labels, best.final_objective
        centroids = self._centroids()
        if rows.count < count or not np.array_equal(centroids, best.centroids):
            # Labels belong to the centres that the caller sees, rounded as they are, and so agree with `predict`.
            labels, squares = assign_rows(everything, centroids, engine)
            inertia = _total(squares, weights)
        self.labels_ = like(X, labels)
        self.inertia_ = inertia * frame.unit * frame.unit
        self.n_iter_ = len(best.objective)
        self.engine_ = described(engine)
        filled = len(np.unique(labels))
        if filled < k:
            warnings.warn(
                f"Number of distinct clusters ({filled}) found smaller than n_clusters ({k}): "
                "there may be too few distinct rows",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def predict(self, X: Any) -> Any:
        """(n,) the nearest centre of each row, int32, or an int64 tensor for a tensor.

        Raises:
            ValueError: NaN or infinity in X, or rows of another length (also raised by the methods below).
        """
        return like(X, self._nearest(X)[0])

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, then `labels_`."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def transform(self, X: Any) -> Any:
        """(n, k) float64: Euclidean distances to all centres, right to about 1e-8 of the largest."""
        check_is_fitted(self)
        with quiet(not self.verbose):
            return like(X, self._distances(X))

    def _distances(self, X: Any) -> NDArray[np.float64]:
        table = self._table(X, reset=False)
        read = reader(table, self._frame)
        centroids = self._centroids().astype(np.float64)
        middle = centroids.mean(axis=0)
        centroids -= middle
        lengths = np.einsum("ij,ij->i", centroids, centroids)
        distances = np.empty((table.shape[0], len(centroids)))
        for start, stop in passing("distances", table.shape[0], max(table.shape[1], len(centroids))):
            block = read(start, stop) - middle
            squares = np.einsum("ij,ij->i", block, block)[:, None] - 2 * block @ centroids.T + lengths
            distances[start:stop] = np.sqrt(np.maximum(squares, 0)) * self._frame.unit
        return distances

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, then `transform` of the same rows."""
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of X, with its weights (n,) >= 0."""
        squares = self._nearest(X)[1]
        return -_total(squares, check_weights(sample_weight, len(squares))) * self._frame.unit * self._frame.unit

    def _check_parameters(self) -> int:
        """How many runs.

        Raises:
            ValueError: a parameter out of its range.
        """
        for name in ("n_clusters", "max_iter"):
            if not _at_least_1(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r}: give a whole number of at least 1")
        if not isinstance(self.tol, Real) or not 0 <= self.tol < np.inf:
            raise ValueError(f"tol = {self.tol!r}: give a number of at least 0")
        if self.engine not in ENGINES:
            raise ValueError(f"engine = {self.engine!r}: give one of {', '.join(ENGINES)}")
        if not isinstance(self.verbose, Integral | np.bool_) or self.verbose < 0:
            raise ValueError(f"verbose = {self.verbose!r}: give a whole number of at least 0")
        if not isinstance(self.copy_x, bool | np.bool_):
            raise ValueError(f"copy_x = {self.copy_x!r}: give True or False")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm = {self.algorithm!r}: give {' or '.join(ALGORITHMS)}")
        if isinstance(self.init, str) and self.init not in STARTS:
            raise ValueError(f"init = {self.init!r}: give {' or '.join(STARTS)}, an array of centres or a function")
        drawn = callable(self.init) or (isinstance(self.init, str) and self.init == "random")
        if isinstance(self.n_init, str) and self.n_init == "auto":
            return 10 if drawn else 1
        if not _at_least_1(self.n_init):
            raise ValueError(f"n_init = {self.n_init!r}: give auto or a whole number of at least 1")
        if not isinstance(self.init, str) and not drawn and self.n_init != 1:
            warnings.warn(f"n_init = {self.n_init}: one run, as init gives the centres", RuntimeWarning, stacklevel=4)
            return 1
        return int(self.n_init)

    def _engine(self) -> Engine:
        return choose_engine(self.engine, tell=say if self.verbose else lambda line: None)

    def _asked(self, X: Any, dim: int, seed: int) -> Doubles:
        """The centres of a function that gives them, for one run."""
        return self._given_centres(self.init(X, self.n_clusters, random_state=np.random.RandomState(seed)), dim)

    def _given_centres(self, given: Any, dim: int) -> Doubles:
        centres = as_numpy(given).astype(np.float64)
        if centres.shape != (self.n_clusters, dim):
            raise ValueError(f"init has shape {centres.shape}, not (n_clusters, n_features) = {(self.n_clusters, dim)}")
        if not np.isfinite(centres).all():
            raise ValueError("init contains NaN or infinity")
        return centres

    def _table(self, X: Any, reset: bool) -> Any:
        """X checked, as something with a shape (n, d) and slices; nothing but lists and the like is copied."""
        tensor = isinstance(X, Tensor)
        if not tensor and not streams(X):
            return validate_data(self, X, reset=reset, ensure_all_finite=False)
        if tensor and (X.is_complex() or X.layout != torch.strided):
            raise ValueError(f"X is a tensor of {X.dtype}, {X.layout}: give a dense tensor of real numbers")
        shape = tuple(X.shape)
        if len(shape) != 2:
            raise ValueError(f"Expected 2D array, got {len(shape)}D array instead: give rows and columns")
        if not all(shape):
            raise ValueError(
                f"Found array with {shape[0]} sample(s) and {shape[1]} feature(s) (shape={shape}) "
                "while a minimum of 1 is required."
            )
        return validate_data(self, X, reset=reset, skip_check_array=True)

    def _centroids(self) -> NDArray[np.float32]:
        return into(self._frame, as_numpy(self.cluster_centers_))

    def _nearest(self, X: Any) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        check_is_fitted(self)
        table = self._table(X, reset=False)
        read, on_device = reader(table, self._frame), device_reader(table, self._frame)
        rows = Rows(table.shape[0], table.shape[1], read, on_device=on_device)
        with quiet(not self.verbose):
            return assign_rows(rows, self._centroids(), self._engine())


class _Settled(Exception):
    """The centres moved less than the tolerance."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state


def _lloyd(
    rows: Rows, k: int, start: NDArray[np.float32], iterations: int, tolerance: float, engine: Engine
) -> Clustering:
    before = start

    def watch(state: State) -> None:
        nonlocal before
        shift = np.square(state.centroids - before, dtype=np.float64).sum()
        before = state.centroids
        if shift <= tolerance:
            raise _Settled(state)

    try:
        return kmeans(rows, k, iterations, on_iteration=watch if tolerance else None, engine=engine, start=start)
    except _Settled as settled:
        # As many iterations as are done: what is left is the measurement at the end.
        return kmeans(rows, k, len(settled.state.objective), state=settled.state, engine=engine)


def _drawer(rows: Rows, k: int, init: str) -> Callable[[int], NDArray[np.float32]]:
    """seed -> (k, d) centroids to start from.

    Rows are drawn by what they hold and not by where they stand, each content with the sum of its weights.
    """
    # Two rows that share a digest by chance can only keep one another from being drawn.
    digests = b"".join(
        blake2b(row.tobytes(), digest_size=8).digest()
        for start, stop in passing("distinct rows", rows.count, rows.dim)
        for row in rows.read(start, stop) + np.float32(0)  # -0.0 becomes 0.0, the same point with other bytes
    )
    _, first, inverse = np.unique(np.frombuffer(digests, np.uint64), return_index=True, return_inverse=True)
    weights = np.bincount(inverse, rows.weights).astype(np.float64)

    def take(places: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.concatenate([rows.read(row, row + 1) for row in first[places].tolist()])

    def draw(seed: int) -> NDArray[np.float32]:
        if len(first) <= k:
            return take(np.resize(np.arange(len(first)), k))
        generator = np.random.default_rng(seed)
        if init == "random":
            # The least of exponential waiting times draws without replacement, in proportion to weight.
            return take(np.argsort(generator.exponential(size=len(first)) / weights, kind="stable")[:k])
        sample = max(k, min(max(SAMPLE_EACH * k, START_SAMPLE), SAMPLE_NUMBERS // rows.dim))
        points = Rows(len(first), rows.dim, lambda start, stop: take(np.arange(start, stop)), weights)
        return kmeans_plus_plus(points, k, seed, sample)

    return draw


def _total(squares: NDArray[np.float32], weights: Doubles | None) -> float:
    return float(squares.sum(dtype=np.float64) if weights is None else squares.astype(np.float64) @ weights)


def _at_least_1(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
