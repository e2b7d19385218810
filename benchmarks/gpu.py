"""k-means on a GPU: right first, then as fast as what beside it.

Run as `python benchmarks/gpu.py [--json FILE] [--seconds 450] [--quick] [--device cuda] [--columns 256,512,4096,8192]
[--only right,...]`; meant to take about five minutes on one H200. No measurement begins after --seconds, one that fails
is a line and does not end the others, and --json is written after each. The last thing is one table. Without a GPU it
says so and ends; `--device cpu --quick` runs every part on a few rows.

right   labels of the exact engine beside float64 brute force and a float32 product, on three kinds of rows; the largest
        error of a float16 score as a share of the bound that device_rounding.py proves for it; rows that are streamed
        beside rows that stay, which must give the same bytes.
ceiling rates of large products: what no k-means of this kind can pass.
tiles   the fused kernel's tiles, and the product in chunks, one pass each; how far their labels agree.
lloyd   1.3 million rows, k = 2000, 20 iterations from the same start, rows and centroids on the device: the exact
        engine, dense torch in bfloat16 and float32, flash-kmeans where it is installed. Slow ones do fewer, scaled up.
whole   `kmeans` as `ktransfer cluster` calls it, rows on the device and in the machine's memory: the host makes the
        next centroids.
faiss   faiss.Kmeans on the GPU from host memory, where faiss sees one; few rows and iterations, scaled up.

Peers run in processes of their own, of at most two minutes: their libraries may end a process, or compile for ever.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_right import Line, Tried, brute, clean, held, ignored, made, moved, on_host, right, seconds, start_of, stocked
from torch import Tensor

PEER_SECONDS = 120
REPEATS = 3


def full(quick: bool) -> tuple[int, int, int]:
    """Rows, clusters, iterations."""
    return (2000, 20, 3) if quick else (1_300_000, 2000, 20)


def ceiling(device: torch.device, quick: bool) -> Line:
    """Rates of products in TFLOP/s."""
    size = 128 if quick else 8192
    found: Line = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        times = [seconds(partial(multiplied, a, b), device) / 5 for _ in range(5)]
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / statistics.median(times) / 1e12
    return found


def multiplied(a: Tensor, b: Tensor) -> None:
    for _ in range(5):
        torch.mm(a, b)


def ours(rows: Tensor, start: Tensor, iterations: int, kernels: Any) -> Line:
    from ktransfer.cluster.engines.device import look

    device = rows.device
    stocks: list[Any] = []
    prepared = seconds(lambda: stocks.append(stocked(rows, start)), device)
    [stock] = stocks
    doubts: list[float] = []

    def run() -> None:
        centroids = start
        for _ in range(iterations):
            _, _, sums, counts = look(stock, centroids, kernels, ignored)
            doubts.append(stock.doubted / len(rows))
            centroids = moved(centroids, sums, counts)

    look(stock, start, kernels, ignored)  # compiled
    times = sorted(seconds(run, device) for _ in range(REPEATS))
    return {
        "seconds": statistics.median(times),
        "fastest": times[0],
        "slowest": times[-1],
        "prepare": prepared,
        "doubt_first": doubts[0],
        "doubt_last": doubts[-1],
    }


def dense(rows: Tensor, start: Tensor, iterations: int, dtype: torch.dtype) -> Line:
    """What one writes by hand: products in chunks, argmax, index_add."""
    operand = rows.to(dtype)
    labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)

    def run(times: int) -> None:
        centroids = start
        for _ in range(times):
            half, across = centroids.square().sum(dim=1) / 2, centroids.to(dtype).T
            sums, counts = torch.zeros_like(centroids), torch.zeros(len(centroids), device=rows.device)
            for begin in range(0, len(rows), 8192):
                part = slice(begin, begin + 8192)
                labels[part] = (operand[part] @ across).sub(half).argmax(dim=1)
                sums.index_add_(0, labels[part], rows[part])
                counts.index_add_(0, labels[part], torch.ones_like(labels[part], dtype=torch.float32))
            centroids = moved(centroids, sums, counts)

    run(1)
    return {"seconds": statistics.median(seconds(partial(run, iterations), rows.device) for _ in range(REPEATS))}


def flash(rows: Tensor, start: Tensor, iterations: int) -> Line:
    from flash_kmeans import batch_kmeans_Euclid  # type: ignore[import-not-found,unused-ignore]

    operand, k = rows.to(torch.bfloat16)[None], len(start)
    first = {"tol": -1.0, "init_centroids": start.to(torch.bfloat16)[None]}
    found: list[Any] = [batch_kmeans_Euclid(operand, k, max_iters=1, **first)]  # compiled
    right_labels = brute(rows[:4096], start.to(torch.bfloat16).float(), torch.float64)
    taken = seconds(lambda: found.append(batch_kmeans_Euclid(operand, k, max_iters=iterations, **first)), rows.device)
    return {"seconds": taken, "equal_float64": float((found[0][0][0][:4096] == right_labels).double().mean())}


def with_faiss(rows: Tensor, start: Tensor, iterations: int) -> Line:
    import faiss

    if rows.is_cuda and not faiss.get_num_gpus():
        raise RuntimeError("faiss sees no GPU")
    data, given = rows.cpu().numpy(), start.cpu().numpy()
    n, d = data.shape
    options = {"gpu": rows.is_cuda, "max_points_per_centroid": n, "min_points_per_centroid": 1, "seed": 0}
    trained = faiss.Kmeans(d, len(given), niter=iterations, **options)
    return {"seconds": seconds(partial(trained.train, data, init_centroids=given), rows.device)}


Peer = Callable[[Tensor, Tensor, int], Line]
PEERS: dict[str, tuple[str, Peer]] = {"flash-kmeans": ("flash_kmeans", flash), "faiss": ("faiss", with_faiss)}


def peer(name: str, d: int, device: torch.device, quick: bool) -> None:
    """What a process of its own does: the last line that it prints is what it found."""
    n, k, iterations = full(quick)
    few, times = (n, iterations) if name != "faiss" else (min(n, 2**30 // d), 3)
    rows = made("relu", few, d, device)
    found = PEERS[name][1](rows, start_of(rows, k), times)
    found["seconds"] *= n / few * iterations / times
    print(json.dumps(found | {"rows_measured": few, "iterations_measured": times}), flush=True)


def apart(name: str, d: int, device: torch.device, quick: bool) -> Line:
    if find_spec(PEERS[name][0]) is None:
        raise ImportError(f"{PEERS[name][0]} is not installed")
    command = [sys.executable, __file__, "--peer", name, "--columns", str(d), "--device", str(device)]
    command += ["--quick"] * quick
    done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"ended with {done.returncode}: {said[-1]}")
    found: Line = json.loads(done.stdout.splitlines()[-1])
    return found


def rated(d: int, quick: bool, work: Callable[[], Line]) -> Line:
    """With the rate in TFLOP/s that dense products in this time would have."""
    n, k, iterations = full(quick)
    found = work()
    return found | {"D": d, "tflops": 2 * n * k * d * iterations / found["seconds"] / 1e12}


def on_rows(d: int, device: torch.device, quick: bool, method: Peer, most: int) -> Line:
    """The 20 iterations on rows of their own, or `most` of them, scaled up."""
    n, k, iterations = full(quick)
    rows = made("relu", n, d, device)
    found = method(rows, start_of(rows, k), min(iterations, most))
    return found | {"seconds": found["seconds"] * iterations / min(iterations, most)}


def lloyd(device: torch.device, quick: bool, columns: list[int], kernels: Any, tried: Tried) -> None:
    for d in columns:
        methods: dict[str, tuple[Peer, int]] = {
            "ours": (partial(ours, kernels=kernels), 20),
            "torch bf16": (partial(dense, dtype=torch.bfloat16), 20),
            "torch fp32": (partial(dense, dtype=torch.float32), 3 if d > 1024 else 20),
        }
        for name, (method, most) in methods.items():
            tried("lloyd", name, partial(rated, d, quick, partial(on_rows, d, device, quick, method, most)))
        tried("lloyd", "flash-kmeans", partial(rated, d, quick, partial(apart, "flash-kmeans", d, device, quick)))


def tile_rates(d: int, device: torch.device, quick: bool, kernels: Any) -> Line:
    """TFLOP/s of one pass of labels alone: chunks, and each tile of the fused kernel."""
    from ktransfer.cluster.engines import device_steps
    from ktransfer.cluster.engines.device_rounding import halve_centroids, ratio

    n, k = (2000, 20) if quick else (2**18, 2000)
    rows = made("relu", n, d, device)
    start = start_of(rows, k)
    stock = stocked(rows, start)
    half, target = stock.resident.half, halve_centroids(start, stock.origin)
    by = ratio(half, target)
    before = device_steps.FUSED_COLUMNS
    device_steps.FUSED_COLUMNS = 0
    chunks = partial(device_steps._two_best, half, target, kernels)
    labels = chunks()[0]
    times = {"chunks": min(seconds(chunks, device) for _ in range(4))}
    device_steps.FUSED_COLUMNS = before
    agree = 1.0
    for tile in (kernels.WHOLE_TILES if d <= kernels.WHOLE_COLUMNS else kernels.TILES) if kernels else ():
        run = partial(kernels.nearest_two, half.half, by, target.half, target.bias, tile)
        try:
            agree = min(agree, float((run()[0] == labels).double().mean()))
            times[str(tuple(tile))] = min(seconds(run, device) for _ in range(4))
        except Exception as error:  # too large for this device
            print(f"D={d} {tile}: {type(error).__name__}", flush=True)
    return {"agree": agree} | {name: round(2 * n * k * d / taken / 1e12, 3) for name, taken in times.items()}


def whole(d: int, device: torch.device, quick: bool, from_host: bool) -> Line:
    from ktransfer.cluster.algorithms.lloyd import kmeans
    from ktransfer.cluster.engines.device import device_engine

    n, k, iterations = full(quick)
    rows = made("relu", n, d, device)
    start = start_of(rows, k).cpu().numpy()
    given = on_host(rows.cpu().numpy()) if from_host else held(rows)
    del rows
    clean(device)
    found = kmeans(given, k, iterations, engine=device_engine(device), start=start)
    taken = sum(found.seconds) * iterations / len(found.seconds)  # fewer, where no label moved any more
    return {"seconds": taken, "iterations": [round(value, 4) for value in found.seconds]}


def table(lines: list[Line], rate: float) -> None:
    """The one table: what was right, and seconds for 20 iterations."""
    print(f"\nproducts in bfloat16: {rate:.1f} TFLOP/s")
    print(f"{'':34} {'equal f64':>10} {'equal f32':>10} {'in doubt':>9} {'of bound':>9}")
    for line in lines:
        if "equal_float64" in line and line["part"] == "right":
            names = ("equal_float64", "equal_float32", "in_doubt", "error_of_bound")
            numbers = " ".join(f"{line[name]:10.6f}" if name in line else f"{'':10}" for name in names)
            same = f"  same bytes: {line['same_bytes']}" if "same_bytes" in line else ""
            print(f"{'right  ' + line['what']:34} {numbers}{same}")
    print(f"{'':34} {'seconds':>10} {'TFLOP/s':>9} {'of bf16':>9} {'asked':>6} {'ours is':>9}")
    mine = {line["D"]: line["seconds"] for line in lines if line["what"] == "ours" and "seconds" in line}
    for line in lines:
        if "tflops" in line:
            taken, work = line["seconds"], line["tflops"]
            times = f"{taken / mine[line['D']]:8.2f}x" if line["D"] in mine else f"{'':9}"
            asked = f"{0.8 if line['D'] >= 4096 else 0.65:6.2f}" if line["what"] == "ours" else f"{'':6}"
            name = f"{line['what']}  D={line['D']}"
            print(f"{name:34} {taken:10.4f} {work:9.2f} {work / rate:9.3f} {asked} {times}")
    for line in lines:
        if "failed" in line:
            print(f"{line['part']}  {line['what']}: {line['failed']}")


def tiles(device: torch.device, quick: bool, kernels: Any, tried: Tried) -> None:
    for d in (32,) if quick else (128, 256, 512, 1024):
        tried("tiles", f"D={d}, TFLOP/s", partial(tile_rates, d, device, quick, kernels))


def both(device: torch.device, quick: bool, tried: Tried) -> None:
    for d in (32,) if quick else (256, 4096):
        for where, host in (("on the device", False), ("from the host", True)):
            tried("whole", f"kmeans(), rows {where}", partial(rated, d, quick, partial(whole, d, device, quick, host)))


def from_host(device: torch.device, quick: bool, columns: list[int], tried: Tried) -> None:
    for d in columns:
        tried("faiss", "faiss from the host", partial(rated, d, quick, partial(apart, "faiss", d, device, quick)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda where there is one; cpu to try the script")
    parser.add_argument("--quick", action="store_true", help="a few rows")
    parser.add_argument("--columns", help="lengths of rows, with commas; 256,512,4096,8192 when not given")
    parser.add_argument("--only", default="right,tiles,lloyd,whole,faiss", help="parts, with commas")
    parser.add_argument("--seconds", type=float, default=450, help="nothing begins after so long")
    parser.add_argument("--json", type=Path, help="all numbers")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quick = options.quick
    if not options.device and not torch.cuda.is_available():
        return print("benchmarks/gpu.py: torch sees no GPU here, so nothing is measured")
    device = torch.device(options.device or "cuda")
    torch.set_float32_matmul_precision("highest")
    columns = [int(word) for word in (options.columns or ("32,1100" if quick else "256,512,4096,8192")).split(",")]
    if options.peer:
        return peer(options.peer, columns[0], device, quick)
    began = time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}", flush=True)
    lines: list[Line] = []

    def tried(part: str, what: str, work: Callable[[], Line]) -> None:
        line: Line = {"part": part, "what": what, "at": round(time.perf_counter() - began, 1)}
        try:
            line |= work() if line["at"] < options.seconds else {"failed": f"not begun after {options.seconds:g} s"}
        except ImportError as error:
            line["failed"] = str(error)
        except Exception as error:
            traceback.print_exc()
            line["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        lines.append(line)
        print(line, flush=True)
        if options.json:
            options.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "lines": lines}, indent=1))
        clean(device)

    from ktransfer.cluster.engines.device import _kernels

    kernels = _kernels(device, lambda line: print(line, flush=True))
    print("kernels: Triton " + version("triton") if kernels else "kernels: torch alone", flush=True)
    parts: dict[str, Callable[[], object]] = {
        "right": lambda: right(device, quick, kernels, tried),
        "tiles": lambda: tiles(device, quick, kernels, tried),
        "lloyd": lambda: lloyd(device, quick, columns, kernels, tried),
        "whole": lambda: both(device, quick, tried),
        "faiss": lambda: from_host(device, quick, columns, tried),
    }
    tried("ceiling", "TFLOP/s", partial(ceiling, device, quick))
    for part in options.only.split(","):
        if part in parts:
            parts[part]()
    table(lines, lines[0].get("bfloat16", float("nan")))


if __name__ == "__main__":
    main()
