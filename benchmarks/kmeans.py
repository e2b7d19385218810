"""k-means on the CPU beside its peers, as in docs/papers.md: same data, start, iterations, all points.

Run as `python benchmarks/kmeans.py [--quick] [--repeats 5] [--threads 2] [--only relu-1024] [--methods exact,faiss]`.
`--features FILE --k 200,1000` takes the rows of a feature file instead, as the cluster stage sees them (length 1).
Methods are interleaved, so that a busy machine hits all alike; the median counts. `faiss.SuperKmeans` and `superkmeans`
take no start and are not exact; scikit-learn does one more assignment. Inertia is measured in float64 by one exact
pass for every method. Peers that are not installed are left out. Labels of single passes of ours are compared with
float64 brute force on 4096 rows each.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Case = tuple[str, int, int, int]  # kind, rows, columns, clusters
CASES: dict[str, Case] = {
    "relu-256": ("relu", 400_000, 256, 2000),
    "relu-1024": ("relu", 50_000, 1024, 2000),
    "relu-4096": ("relu", 24_000, 4096, 2000),
    "gmm-256": ("gmm", 100_000, 256, 2000),
    "unif-256": ("unif", 100_000, 256, 2000),
    "relu-256-k500": ("relu", 400_000, 256, 500),
    "relu-1024-k500": ("relu", 50_000, 1024, 500),
    "relu-4096-k500": ("relu", 24_000, 4096, 500),
    "gmm-256-k500": ("gmm", 100_000, 256, 500),
    "unif-256-k500": ("unif", 100_000, 256, 500),
}


def blocks(kind: str, n: int, d: int, size: int = 8192) -> Iterator[np.ndarray]:
    """Rows of one kind, (size, d) float32 at a time."""
    rng = np.random.default_rng(0)
    components, inner = (500, d) if kind == "gmm" else (300, 128)
    weights = np.arange(1, components + 1) ** -0.5
    chosen = rng.choice(components, n, p=weights / weights.sum())
    scale = np.full(inner, 1.0) if kind == "gmm" else np.arange(1, inner + 1) ** -0.5
    centres = rng.standard_normal((components, inner)) * scale * (0.5 if kind == "gmm" else 1.0)
    mix = rng.standard_normal((inner, d), dtype=np.float32)
    for start in range(0, n, size):
        part = chosen[start : start + size]
        if kind == "unif":
            yield rng.random((len(part), d), dtype=np.float32)
            continue
        latent = (centres[part] + rng.standard_normal((len(part), inner)) * scale).astype(np.float32)
        noise = np.float32(0.5) * rng.standard_normal((len(part), d), dtype=np.float32) if kind == "relu" else None
        yield latent if noise is None else np.maximum(latent @ mix - 0.5 + noise, 0)


def make(kind: str, n: int, d: int) -> np.ndarray:
    data = np.empty((n, d), np.float32)
    for number, block in enumerate(blocks(kind, n, d)):
        data[number * 8192 : number * 8192 + len(block)] = block
    return data


def lloyd(
    data: np.ndarray, start: np.ndarray, iterations: int, nearest: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """What one writes by hand, in chunks of 1024 rows: `nearest` is given rows and centroids."""
    from scipy.sparse import csr_matrix

    centroids = start.copy()
    for _ in range(iterations):
        labels = np.concatenate([nearest(data[i : i + 1024], centroids) for i in range(0, len(data), 1024)])
        ones = np.ones(len(data), np.float32)
        members = csr_matrix((ones, (labels, np.arange(len(data)))), (len(centroids), len(data)))
        counts = np.bincount(labels, minlength=len(centroids))
        centroids = np.where(counts[:, None] > 0, members @ data / np.maximum(counts, 1)[:, None], centroids)
        centroids = centroids.astype(np.float32)
    return centroids


def in_numpy(data: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    return lloyd(data, start, iterations, lambda x, c: (x @ c.T - (c * c).sum(axis=1) / 2).argmax(axis=1))


def in_torch(data: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    import torch

    def nearest(x: np.ndarray, c: np.ndarray) -> np.ndarray:
        rows, centroids = torch.from_numpy(x), torch.from_numpy(c)
        return torch.addmm(centroids.square().sum(1) / -2, rows, centroids.T).argmax(dim=1).numpy()

    return lloyd(data, start, iterations, nearest)


def ours(data: np.ndarray, start: np.ndarray, iterations: int, **options: Any) -> np.ndarray:
    centroids = start
    for state in states(data, start, iterations, **options):
        centroids = state.centroids
    return centroids


def states(data: np.ndarray, start: np.ndarray, iterations: int, **options: Any) -> Iterator[Any]:
    """After each iteration."""
    from ktransfer.cluster.algorithms import lloyd as module
    from ktransfer.cluster.engines.engine import Rows
    from ktransfer.cluster.engines.exact import exact_engine

    rows = Rows(len(data), data.shape[1], lambda begin, end: data[begin:end])
    empty: list[Any] = [[], [], [], [], []]
    state = module.State(start, np.full(len(data), -1, np.int32), *empty)
    engine = exact_engine(**options)
    while len(state.objective) < iterations and not state.converged:
        state = module._iterate(rows, state, engine, lambda done: None)
        yield state


def check(data: np.ndarray, start: np.ndarray, iterations: int) -> str:
    """Labels of some passes beside float64 brute force on 4096 rows each: how many differ, and by how much at most."""
    looked = wrong = 0
    gap = 0.0
    centroids = start
    for number, state in enumerate(states(data, start, iterations)):
        if number in (0, 1, 2, 4, 8, 15):
            chosen = np.sort(np.random.default_rng(number).choice(len(data), min(4096, len(data)), replace=False))
            wide = centroids.astype(np.float64)
            rows = data[chosen].astype(np.float64)
            scores = (wide * wide).sum(axis=1) - 2 * rows @ wide.T
            own = state.labels[chosen]
            behind = (scores[np.arange(len(rows)), own] - scores.min(axis=1)) / (rows * rows).sum(axis=1)
            looked, wrong = looked + len(rows), wrong + int((own != scores.argmin(axis=1)).sum())
            gap = max(gap, float(behind.max()))
        centroids = state.centroids
    return (
        f"labels of single passes: {wrong} of {looked} differ from float64 brute force, by at most {gap:.1e} of |x|^2"
    )


def with_faiss(data: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    import faiss

    k, d = start.shape
    trained = faiss.Kmeans(d, k, niter=iterations, max_points_per_centroid=len(data), min_points_per_centroid=1)
    trained.train(data, init_centroids=start)
    return np.asarray(trained.centroids)


def with_faiss_super(data: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    import faiss

    k, d = start.shape
    trained = faiss.SuperKmeans(d, k)
    trained.niter = iterations
    trained.max_points_per_centroid = len(data)
    trained.train(data)
    centroids = trained.centroids
    flat = centroids if isinstance(centroids, np.ndarray) else faiss.vector_to_array(centroids)
    return np.asarray(flat).reshape(k, d)


def with_superkmeans(data: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    from superkmeans import SuperKMeans  # type: ignore[import-not-found,unused-ignore]

    k, d = start.shape
    options = {"hierarchical": False, "sampling_fraction": 1.0, "early_termination": False, "tol": 0.0}
    trained = SuperKMeans(k, d, iters=iterations, max_points_per_cluster=len(data), **options)
    return np.asarray(trained.train(data), np.float32).reshape(k, d)


def with_sklearn(data: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    found = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(data)
    return found.cluster_centers_.astype(np.float32)


METHODS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "exact": ours,
    "exact-avx2": lambda data, start, iterations: ours(data, start, iterations, level=1),
    "exact-numpy": lambda data, start, iterations: ours(data, start, iterations, compiled=False),
    "faiss": with_faiss,
    "faiss-super*": with_faiss_super,
    "superkmeans*": with_superkmeans,
    "sklearn": with_sklearn,
    "torch": in_torch,
    "numpy": in_numpy,
}


def inertia(data: np.ndarray, centroids: np.ndarray) -> float:
    from ktransfer.cluster.engines.engine import Rows
    from ktransfer.cluster.engines.exact import exact_engine

    rows = Rows(len(data), data.shape[1], lambda begin, end: data[begin:end])
    return float(exact_engine().scan(rows, centroids, lambda done: None).distances.sum(dtype=np.float64))


def stored(path: Path) -> np.ndarray:
    from ktransfer.artifacts.features import open_features
    from ktransfer.cluster.rows import rows_of

    rows = rows_of(open_features(path), None, True)
    return rows.read(0, rows.count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, a quarter of the clusters, 8 it")
    parser.add_argument("--repeats", type=int, default=0, help="5 when not given, 1 with --quick")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--features", type=Path, help="a feature file instead of made rows")
    parser.add_argument("--k", default="200,1000", help="numbers of clusters for --features")
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, with commas; faiss is the yardstick")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), OPENBLAS_NUM_THREADS=str(options.threads))
    import faiss
    import torch

    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    print(f"{options.threads} threads; load before {os.getloadavg()[0]:.1f}; faiss {faiss.__version__}", flush=True)
    repeats = options.repeats or (1 if options.quick else 5)
    iterations = 8 if options.quick else 20
    for name in (options.k if options.features else options.only).split(","):
        if options.features:
            data, k = stored(options.features), int(name)
        else:
            kind, n, d, k = CASES[name]
            if options.quick:
                n, k = n // 10, k // 4
            data = make(kind, n, d)
        n, d = data.shape
        start = data[np.random.default_rng(1).choice(n, k, replace=False)].copy()
        seconds: dict[str, list[float]] = {}
        quality: dict[str, float] = {}
        missing = set()
        for _ in range(repeats):
            for method in options.methods.split(","):
                if method in missing:
                    continue
                began = time.perf_counter()
                try:
                    centroids = METHODS[method](data, start, iterations)
                except (ImportError, AttributeError) as error:
                    print(f"{method}: left out ({error})", flush=True)
                    missing.add(method)
                    continue
                seconds.setdefault(method, []).append(time.perf_counter() - began)
                quality[method] = inertia(data, centroids)
        print(f"\n{name}: n={n} D={d} k={k}, {iterations} iterations, median of {repeats}", flush=True)
        yardstick = statistics.median(seconds.get("faiss", [float("nan")]))
        for method, times in seconds.items():
            median = statistics.median(times)
            share = quality[method] / quality.get("faiss", float("nan")) - 1
            print(f"  {method:13} {median:8.2f} s  {yardstick / median:5.2f}x  inertia {share:+.1e}", flush=True)
        if "exact" in seconds:
            print(f"  {check(data, start, iterations)}", flush=True)


if __name__ == "__main__":
    main()
