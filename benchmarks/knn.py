"""The exact search for neighbours beside the product of matrices that it cannot do without, and beside its peers.

Run as `python benchmarks/knn.py [--quick] [--references 1000000] [--queries 50000] [--dim 512] [--k 20,200]
[--threads 2] [--methods product,ours,faiss,torch] [--repeats 1] [--json FILE]`. `product` multiplies blocks and does
nothing else: what a search costs at least. All read float16 rows of a file, as eval keeps them. `faiss` is its brute
force, `torch` a product and topk; both are given one block of references after another, as whole ones do not fit in
the memory that is allowed.
Each method runs in a process of its own, which tells its peak memory: in all, with Python, libraries and queries, and
above what it had when the search began. The references themselves stay on disk as float16 and are read by blocks, never
mapped, so that no row of them counts but those of the block at work; as float32 in memory, 1 M x 512 would be 2.05 GB
alone. Methods take turns within a round; times are medians over the rounds, and so are the ratios, each to the product
of its own round. `--cpu` counts CPU seconds, with one thread for each product: for a machine on
which other work runs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("product", "ours", "faiss", "torch")
BLOCK = 65_536  # references that peers are given at once


def make(path: Path, count: int, dim: int, seed: int) -> None:
    """Rows of length 1 around 1000 centres, after a ReLU, float16."""
    centres = np.random.default_rng(0).standard_normal((1000, dim), dtype=np.float32)
    rng = np.random.default_rng(seed)
    stored = np.lib.format.open_memmap(path, "w+", np.float16, (count, dim))
    for start in range(0, count, 8192):
        size = min(8192, count - start)
        rows = np.maximum(centres[rng.integers(0, 1000, size)] + rng.standard_normal((size, dim), dtype=np.float32), 0)
        stored[start : start + size] = rows / np.linalg.norm(rows, axis=1)[:, None]


def reader(path: Path) -> tuple[Callable[[int, int], np.ndarray], int, int]:
    """(start, stop) -> rows, read and not mapped, so that they do not count as memory; how many, and how long."""
    stored = np.load(path, mmap_mode="r")
    offset, count, dim = stored.offset, *stored.shape
    handle = os.open(path, os.O_RDONLY)

    def read(start: int, stop: int) -> np.ndarray:
        block = np.empty((stop - start, dim), np.float16)
        os.preadv(handle, [block.reshape(-1).view(np.uint8).data], offset + start * dim * 2)
        return block

    return read, count, dim


def product(queries: np.ndarray, read: Any, count: int, k: int) -> np.ndarray:
    import torch

    out = np.empty((1024, 8192), np.float32)
    for start in range(0, count, 8192):
        block = torch.from_numpy(read(start, min(start + 8192, count))).float().numpy().T
        for at in range(0, len(queries), 1024):
            part = queries[at : at + 1024]
            np.matmul(part, block, out=out[: len(part), : block.shape[1]])
    return np.zeros((len(queries), k), np.float32)


def ours(queries: np.ndarray, read: Any, count: int, k: int) -> np.ndarray:
    from ktransfer.eval.learners.neighbours import search

    return search(queries, read, count, k).similarities


def best_of_blocks(queries: np.ndarray, read: Any, count: int, k: int, one: Any) -> np.ndarray:
    best = np.empty((len(queries), 0), np.float32)
    for start in range(0, count, BLOCK):
        block = np.asarray(read(start, min(start + BLOCK, count)), np.float32)
        both = np.concatenate([best, one(queries, block, min(k, len(block)))], axis=1)
        keep = max(0, both.shape[1] - k)
        best = np.partition(both, keep, axis=1)[:, keep:] if keep else both
    return -np.sort(-best, axis=1)


def with_faiss(queries: np.ndarray, read: Any, count: int, k: int) -> np.ndarray:
    import faiss

    return best_of_blocks(
        queries, read, count, k, lambda q, r, m: faiss.knn(q, r, m, metric=faiss.METRIC_INNER_PRODUCT)[0]
    )


def with_torch(queries: np.ndarray, read: Any, count: int, k: int) -> np.ndarray:
    import torch

    def one(q: np.ndarray, r: np.ndarray, m: int) -> np.ndarray:
        rows = torch.from_numpy(r).T
        return torch.cat([(part @ rows).topk(m, dim=1)[0] for part in torch.from_numpy(q).split(1024)]).numpy()

    return best_of_blocks(queries, read, count, k, one)


def run_one(folder: Path, method: str, k: int, cpu: bool) -> None:
    """One method in this process; prints seconds, peak memory above the start, and a digest of what it found."""
    read, count, _ = reader(folder / "references.npy")
    queries = np.asarray(np.load(folder / "queries.npy"), np.float32)
    search = {"product": product, "ours": ours, "faiss": with_faiss, "torch": with_torch}[method]
    search(queries[:8], read, min(count, 2048), min(k, 64))  # libraries loaded, threads started
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.process_time if cpu else time.perf_counter
    started = clock()
    found = search(queries, read, count, k)
    seconds = clock() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prediction = {
        "seconds": seconds,
        "gigabytes": (peak - before) / 1e6,
        "whole": peak / 1e6,
        "found": [float(found[:, 0].mean()), float(found[:, -1].mean())],
    }
    print(json.dumps(prediction))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", default="20,200")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "METHOD", "K"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(Path(given.one[0]), given.one[1], int(given.one[2]), given.cpu)
        return
    if given.quick:
        given.references, given.queries = 60_000, 3_000
    threads = "1" if given.cpu else str(given.threads)
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "references.npy", given.references, given.dim, 1)
        make(folder / "queries.npy", given.queries, given.dim, 2)
        size = given.references * given.dim
        print(
            f"{given.references} references, {given.queries} queries, {given.dim} numbers, {threads} threads; "
            f"references on disk: {2 * size / 1e9:.2f} GB of float16 (float32: {4 * size / 1e9:.2f} GB); "
            f"queries in memory: {4 * given.queries * given.dim / 1e9:.2f} GB of float32"
        )
        every: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for k in given.k.split(","):
            measured: dict[str, list[dict[str, Any]]] = {method: [] for method in given.methods.split(",")}
            for _ in range(given.repeats):
                for method, rounds in measured.items():
                    command = [sys.executable, __file__, "--one", str(folder), method, k, *["--cpu"] * given.cpu]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    rounds.append(json.loads(done.stdout))
            for method, rounds in measured.items():
                print(line(f"k {k:>4s}  {method:8s}", rounds, measured.get("product", [])), flush=True)
            every[k] = measured
        if given.json:
            given.json.write_text(json.dumps(vars(given) | {"json": str(given.json), "measured": every}, indent=1))


def line(name: str, rounds: list[dict[str, Any]], products: list[dict[str, Any]]) -> str:
    """What one method reached, beside the product of the same rounds."""
    seconds = [one["seconds"] for one in rounds]
    ratios = [mine / product["seconds"] for mine, product in zip(seconds, products, strict=False)]
    spread = f" ({min(seconds):.2f} to {max(seconds):.2f})" if len(rounds) > 1 else ""
    ratio = f"{statistics.median(ratios):.2f} x product  " if ratios else ""
    most, whole = (max(one[key] for one in rounds) for key in ("gigabytes", "whole"))
    first, last = rounds[0]["found"]
    return (
        f"{name} {statistics.median(seconds):8.2f} s{spread}  {ratio}peak {whole:.2f} GB, {most:.2f} of them by the "
        f"search  mean similarity of the first and the last: {first:.5f} {last:.5f}"
    )


if __name__ == "__main__":
    main()
