"""k-means where one machine gets small: rows from the disk, growth, new rows.

Run as `python benchmarks/kmeans_scale.py [full] [core] [growth] [assign] [--rows N] [--folder DIR]`.

full    1.3 million x 512 (the images of ImageNet) into 2000 clusters by `ktransfer cluster`, 20 iterations, in 2 GB.
core    rows, as float32, four times what the budget leaves beside the process; and the same with all of them in memory.
growth  ten times the rows, ten times the clusters: time over what linear growth gives.
assign  the nearest of 2000 centroids for new rows, beside faiss's exhaustive search; interleaved, median of five.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from kmeans import blocks, make


def write_features(path: Path, n: int, d: int) -> None:
    from ktransfer.artifacts.features import create_or_resume

    if path.is_file():
        return
    attributes = {"teacher": "none", "layer": "made", "pooling": "none", "transform": "none", "fingerprint": str(n)}
    writer = create_or_resume(path, [str(i) for i in range(n)], np.full(n, -1, np.int32), d, "float16", attributes)
    for block in blocks("relu", n, d):
        writer.write(writer.rows_done, block, np.ones(len(block), bool))
    writer.finish()


def cluster(features: Path, run: Path, k: int, iterations: int, memory: float) -> dict[str, object]:
    """`ktransfer cluster` in a process of its own: seconds in all and of each iteration, and the peak of its memory."""
    command = ["ktransfer", "--run", str(run), "cluster", "--features", str(features), "--k", str(k), "--overwrite"]
    command += ["--iterations", str(iterations), "--memory", str(memory)]
    print("$", *command, flush=True)
    began = time.perf_counter()
    # A process of its own, so that the peak of its children is this run's.
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    record = json.loads((run / "clusters" / "stage.json").read_text())["cluster"]
    return {
        "command": " ".join(command),
        "seconds": round(seconds, 1),
        "iterations": record["result"]["seconds"],
        "peak_gb": round(int(done.stdout.split()[-1]) * 1024 / 1e9, 2),
        "objective": record["result"]["objective"][-1],
    }


def full(folder: Path, n: int) -> None:
    features = folder / "full.h5"
    write_features(features, n, 512)
    print(json.dumps(cluster(features, folder / "full", 2000, 20, 2.0), indent=1))


def core(folder: Path, n: int) -> None:
    features = folder / "core.h5"
    write_features(features, n, 512)
    gigabytes = n * 512 * 4 / 1e9
    found = {"streamed": [], "in memory": []}
    for _ in range(3):
        for name, memory in (("streamed", 1.25 + gigabytes / 4), ("in memory", 3.0 + 1.5 * gigabytes)):
            found[name].append(cluster(features, folder / name.replace(" ", "-"), 500, 8, memory))
            print(name, json.dumps(found[name][-1]), flush=True)
    medians = {name: statistics.median(float(str(run["seconds"])) for run in runs) for name, runs in found.items()}
    print(f"streamed takes {medians['streamed'] / medians['in memory']:.2f} times the time of in memory; {medians}")


def growth(folder: Path, n: int) -> None:
    from kmeans import ours

    data = make("relu", n, 256)
    seconds: dict[tuple[int, int], float] = {}
    for rows, k in ((n // 10, 200), (n, 200), (n // 10, 2000), (n, 2000)):
        part = data[:rows]
        start = part[np.random.default_rng(1).choice(rows, k, replace=False)].copy()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            ours(part, start, 20)
            times.append(time.perf_counter() - began)
        seconds[rows, k] = statistics.median(times)
        print(f"n={rows} k={k} D=256, 20 iterations: {seconds[rows, k]:.2f} s", flush=True)
    for fixed, small, large in (
        ("k = 200", (n // 10, 200), (n, 200)),
        ("k = 2000", (n // 10, 2000), (n, 2000)),
        (f"n = {n // 10}", (n // 10, 200), (n // 10, 2000)),
        (f"n = {n}", (n, 200), (n, 2000)),
    ):
        print(f"ten times the rest at {fixed}: {seconds[large] / seconds[small] / 10:.2f} of linear")


def read(data: np.ndarray, start: int, stop: int) -> np.ndarray:
    return data[start:stop]


def assign(folder: Path, n: int) -> None:
    import faiss
    from kmeans import ours

    from ktransfer.cluster.algorithms.lloyd import assign_rows
    from ktransfer.cluster.engines.engine import Rows
    from ktransfer.cluster.engines.exact import exact_engine

    for d in (256, 1024):
        count = n * 256 // d
        data = make("relu", 2 * count, d)
        old, new = data[:count], data[count:]
        centroids = ours(old, old[np.random.default_rng(1).choice(count, 2000, replace=False)].copy(), 10)
        rows = Rows(count, d, partial(read, new))
        times: dict[str, list[float]] = {"faiss": [], "ours": []}
        for _ in range(5):
            began = time.perf_counter()
            index = faiss.IndexFlatL2(d)
            index.add(centroids)
            theirs = index.search(new, 1)[1][:, 0]
            times["faiss"].append(time.perf_counter() - began)
            began = time.perf_counter()
            labels = assign_rows(rows, centroids, exact_engine())[0]
            times["ours"].append(time.perf_counter() - began)
        median = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"assign n={count} D={d} k=2000: ours {median['ours']:.2f} s, faiss {median['faiss']:.2f} s, "
            f"{median['faiss'] / median['ours']:.2f}x; labels differ in {int((labels != theirs).sum())} rows (ties)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = {
        "full": (full, 1_300_000),
        "core": (core, 1_000_000),
        "growth": (growth, 200_000),
        "assign": (assign, 100_000),
    }
    parser.add_argument("job", choices=[[], *jobs], nargs="*", help="all when not given")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="for feature files and runs")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for name in options.job or jobs:
        job, rows = jobs[name]
        job(options.folder, options.rows or rows)
    print(f"load {os.getloadavg()[0]:.1f}; own peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
