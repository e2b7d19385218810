"""k-means on a GPU: right first, then as fast as what beside it.

Run as `python benchmarks/gpu.py [--json FILE] [--quick] [--device cuda] [--columns 256,512,4096,8192] [--only ...]`;
meant to take about five minutes on one H200. Without a GPU it says so and ends; `--device cpu --quick` runs every
part on a few rows.

right   labels of the exact engine beside float64 brute force and a float32 product, on three kinds of rows; the largest
        error of a float16 score as a share of the bound that device_rounding.py proves for it.
ceiling rates of large products: what no k-means of this kind can pass.
lloyd   1.3 million rows, k = 2000, 20 iterations from the same start, rows and centroids on the device: the exact
        engine, dense torch in bfloat16 and float32, flash-kmeans where it is installed. Slow ones do fewer, scaled up.
faiss   faiss.Kmeans on the GPU from host memory, where faiss sees one; few rows and iterations, scaled up.
tiles   the fused kernel's tiles, and the product in chunks, one pass each.
whole   `kmeans` as `ktransfer cluster` calls it: the host makes the next centroids.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Line = dict[str, Any]


def made(kind: str, n: int, d: int, device: torch.device) -> Tensor:
    """(n, d) float32 rows as those of benchmarks/kmeans.py, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.empty(n, d, device=device)
    inner, components = (d, 500) if kind == "gmm" else (128, 300)
    scale = torch.ones(inner, device=device) if kind == "gmm" else torch.arange(1, inner + 1, device=device) ** -0.5
    centres = torch.randn(components, inner, generator=generator, device=device) * scale
    mix = torch.randn(inner, d, generator=generator, device=device)
    for part in rows.split(2**15):
        if kind == "unif":
            part.uniform_(generator=generator)
            continue
        weights = torch.arange(1, components + 1, device=device) ** -0.5
        chosen = torch.multinomial(weights, len(part), True, generator=generator)
        noise = torch.randn(len(part), inner, generator=generator, device=device) * scale
        if kind == "gmm":
            part.copy_(centres[chosen] * 0.5 + noise)
        else:
            part.copy_(((centres[chosen] + noise) @ mix - 0.5).relu_())
            part.add_(torch.randn(part.shape, generator=generator, device=device), alpha=0.5).relu_()
    return rows


def start_of(rows: Tensor, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return rows[torch.randperm(len(rows), generator=generator)[:k].to(rows.device)].clone()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def stocked(rows: Tensor, centroids: Tensor) -> Any:
    from ktransfer.cluster.device_rows import Stock
    from ktransfer.cluster.engine import Rows

    held = Rows(len(rows), rows.shape[1], host_of(rows), None, partial(part_of, rows))
    return Stock(held, centroids.mean(dim=0), len(rows))


def part_of(rows: Tensor, begin: int, end: int) -> Tensor:
    return rows[begin:end]


def host_of(rows: Tensor) -> Callable[[int, int], np.ndarray]:
    return lambda begin, end: rows[begin:end].cpu().numpy()


def kernels_on(device: torch.device) -> Any:
    from ktransfer.cluster.device import _kernels

    return _kernels(device, lambda line: print(line, flush=True))


def brute(rows: Tensor, centroids: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) nearest centroids by products in this precision, centred; the lower index of equals."""
    middle = centroids.mean(dim=0, dtype=torch.float64)
    wide = (centroids.double() - middle).to(dtype)
    half = wide.double().square().sum(dim=1).div(2).to(dtype)
    return torch.cat([((part.double() - middle).to(dtype) @ wide.T - half).argmax(dim=1) for part in rows.split(4096)])


def right(device: torch.device, quick: bool, lines: list[Line]) -> None:
    from ktransfer.cluster.device import look
    from ktransfer.cluster.device_rounding import doubt, ratio
    from ktransfer.cluster.device_steps import product

    kernels = kernels_on(device)
    n, k = (600, 30) if quick else (100_000, 2000)
    for kind in ("relu", "gmm", "unif"):
        for d in (32, 1100) if quick else (256, 512, 4096, 8192):
            rows = made(kind, n, d, device)
            centroids = start_of(rows, k)
            stock = stocked(rows, centroids)
            for step in range(3):
                labels, _, sums, counts = look(stock, centroids, kernels, lambda done: None)
                if step < 2:
                    centroids = moved(centroids, sums, counts)
            exact = brute(rows, centroids, torch.float64)
            single = brute(rows, centroids, torch.float32)
            some = stock.resident.half._replace(half=stock.resident.half.half)
            target = aimed(centroids, stock)
            part = type(some)(*(field[:4096] for field in some))
            scores = product(part.half, target.half).double() * ratio(part, target).double()[:, None] + target.bias
            x = (rows[:4096].double() - stock.origin) / target.unit
            c = (centroids.double() - stock.origin) / target.unit
            off = (scores - (x @ c.T - c.square().sum(dim=1) / 2)).abs().amax(dim=1)
            lines.append(
                {
                    "part": "right",
                    "what": f"{kind} D={d}",
                    "equal_float64": float((labels == exact).double().mean()),
                    "equal_float32": float((labels == single).double().mean()),
                    "float32_equal_float64": float((single == exact).double().mean()),
                    "in_doubt": stock.doubted / n,
                    "error_of_bound": float((off / (doubt(part, target) / 2)).max()),
                }
            )
            print(lines[-1], flush=True)
            del rows, stock, some, part
            clean(device)


def aimed(centroids: Tensor, stock: Any) -> Any:
    from ktransfer.cluster.device_rounding import aim

    return aim(centroids, stock.origin)


def moved(centroids: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    means = (sums / counts.clamp(min=1)[:, None]).float()
    return torch.where(counts[:, None] > 0, means, centroids)


def ceiling(device: torch.device, quick: bool, lines: list[Line]) -> float:
    """Rates of products in TFLOP/s; that of bfloat16 is returned."""
    found = {}
    size = 128 if quick else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        times = [seconds(partial(multiplied, a, b), device) / 5 for _ in range(5)]
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / statistics.median(times) / 1e12
    lines.append({"part": "ceiling", "what": f"{size}^3", **found})
    print(lines[-1], flush=True)
    return found["bfloat16"]


def multiplied(a: Tensor, b: Tensor) -> None:
    for _ in range(5):
        torch.mm(a, b)


def ours(rows: Tensor, start: Tensor, kernels: Any, iterations: int) -> tuple[Tensor, dict[str, float]]:
    from ktransfer.cluster.device import look

    device = rows.device
    stock: Any = None

    def prepare() -> None:
        nonlocal stock
        stock = stocked(rows, start)

    prepared = seconds(prepare, device)
    look(stock, start, kernels, lambda done: None)  # compiled
    doubts: list[float] = []
    labels = torch.empty(0)
    centroids = start

    def run() -> None:
        nonlocal centroids, labels
        for _ in range(iterations):
            labels, _, sums, counts = look(stock, centroids, kernels, lambda done: None)
            doubts.append(stock.doubted / len(rows))
            centroids = moved(centroids, sums, counts)

    taken = seconds(run, device)
    return labels, {"seconds": taken, "prepare": prepared, "doubt_first": doubts[0], "doubt_last": doubts[-1]}


def dense(rows: Tensor, start: Tensor, dtype: torch.dtype, iterations: int) -> tuple[Tensor, dict[str, float]]:
    """What one writes by hand: products in chunks, argmax, index_add."""
    operand = rows.to(dtype)
    labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)

    def run() -> None:
        centroids = start
        for _ in range(iterations):
            half, across = centroids.square().sum(dim=1) / 2, centroids.to(dtype).T
            sums, counts = torch.zeros_like(centroids), torch.zeros(len(centroids), device=rows.device)
            for begin in range(0, len(rows), 8192):
                part = slice(begin, begin + 8192)
                labels[part] = (operand[part] @ across).sub(half).argmax(dim=1)
                sums.index_add_(0, labels[part], rows[part])
                counts.index_add_(0, labels[part], torch.ones_like(labels[part], dtype=torch.float32))
            centroids = moved(centroids, sums, counts)

    return labels, {"seconds": seconds(run, rows.device)}


def flash(rows: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, dict[str, float]]:
    from flash_kmeans import batch_kmeans_Euclid  # type: ignore[import-not-found,unused-ignore]

    operand, k = rows.to(torch.bfloat16)[None], len(start)
    options = {"tol": -1.0, "init_centroids": start.to(torch.bfloat16)[None]}
    batch_kmeans_Euclid(operand, k, max_iters=1, **options)  # compiled
    found: list[Any] = []
    taken = seconds(lambda: found.append(batch_kmeans_Euclid(operand, k, max_iters=iterations, **options)), rows.device)
    return found[0][0][0], {"seconds": taken}


def lloyd(device: torch.device, quick: bool, columns: list[int], rate: float, lines: list[Line]) -> None:
    kernels = kernels_on(device)
    n, k, iterations = (2000, 20, 3) if quick else (1_300_000, 2000, 20)
    for d in columns:
        rows = made("relu", n, d, device)
        start = start_of(rows, k)
        slow = 3 if d > 1024 else iterations
        methods: dict[str, tuple[int, Callable[[int], tuple[Tensor, dict[str, float]]]]] = {
            "ours": (iterations, partial(ours, rows, start, kernels)),
            "torch bf16": (iterations, partial(dense, rows, start, torch.bfloat16)),
            "torch fp32": (min(slow, iterations), partial(dense, rows, start, torch.float32)),
            "flash-kmeans": (iterations, partial(flash, rows, start)),
        }
        for name, (times, method) in methods.items():
            try:
                _, found = method(times)
            except Exception as error:  # a peer's failure must not end the others' measurement
                print(f"D={d} {name}: left out ({type(error).__name__}: {str(error).splitlines()[:1]})", flush=True)
                clean(device)
                continue
            found["seconds"] *= iterations / times
            work = 2 * n * k * d * iterations / found["seconds"] / 1e12
            lines.append({"part": "lloyd", "what": name, "D": d, **found, "tflops": work, "share": work / rate})
            print(lines[-1], flush=True)
            clean(device)
        del rows, start, methods
        clean(device)


def with_faiss(device: torch.device, quick: bool, columns: list[int], lines: list[Line]) -> None:
    try:
        import faiss
    except ImportError as error:
        return print(f"faiss: left out ({error})", flush=True)
    if not quick and not faiss.get_num_gpus():
        return print("faiss: left out (it sees no GPU)", flush=True)
    n, k = (2000, 20) if quick else (1_300_000, 2000)
    for d in columns:
        few = n if quick else min(n, 2**30 // d)
        rows = made("relu", few, d, device)
        start = start_of(rows, k).cpu().numpy()
        host = rows.cpu().numpy()
        del rows
        clean(device)
        trained = faiss.Kmeans(
            d, k, niter=3, gpu=not quick, max_points_per_centroid=few, min_points_per_centroid=1, seed=0
        )
        taken = seconds(partial(trained.train, host, init_centroids=start), device) * n / few * 20 / 3
        work = 2 * n * k * d * 20 / taken / 1e12
        lines.append({"part": "faiss", "what": f"faiss, {few} rows scaled", "D": d, "seconds": taken, "tflops": work})
        print(lines[-1], flush=True)


def tiles(device: torch.device, quick: bool, lines: list[Line]) -> None:
    """One pass of labels alone: each tile of the fused kernel, and chunks."""
    from ktransfer.cluster import device_steps
    from ktransfer.cluster.device_rounding import ratio

    kernels = kernels_on(device)
    n, k = (2000, 20) if quick else (2**18, 2000)
    for d in (32,) if quick else (128, 256, 512, 1024):
        rows = made("relu", n, d, device)
        start = start_of(rows, k)
        stock = stocked(rows, start)
        half, target = stock.resident.half, aimed(start, stock)
        by = ratio(half, target)
        before = device_steps.FUSED_COLUMNS
        device_steps.FUSED_COLUMNS = 0
        chunks = [seconds(partial(device_steps._two_best, half, target, kernels), device) for _ in range(5)][1:]
        device_steps.FUSED_COLUMNS = before
        found = {"chunks": min(chunks)}
        for tile in (kernels.WHOLE_TILES if d <= kernels.WHOLE_COLUMNS else kernels.TILES) if kernels else ():
            run = partial(kernels.nearest_two, half.half, by, target.half, target.bias, tile)
            try:
                found[str(tuple(tile))] = min([seconds(run, device) for _ in range(5)][1:])
            except Exception as error:  # too large for this device
                print(f"D={d} {tile}: {type(error).__name__}", flush=True)
        line = {name: round(2 * n * k * d / taken / 1e12, 3) for name, taken in found.items()}
        lines.append({"part": "tiles", "what": f"D={d}, TFLOP/s", **line})
        print(lines[-1], flush=True)


def whole(device: torch.device, quick: bool, lines: list[Line]) -> None:
    from ktransfer.cluster.device import device_engine
    from ktransfer.cluster.engine import Rows
    from ktransfer.cluster.kmeans import kmeans

    n, k, iterations = (2000, 20, 3) if quick else (1_300_000, 2000, 20)
    for d in (32,) if quick else (256, 4096):
        rows = made("relu", n, d, device)
        start = start_of(rows, k).cpu().numpy()
        held = Rows(n, d, host_of(rows), None, partial(part_of, rows))
        found = kmeans(held, k, iterations, engine=device_engine(device), start=start)
        lines.append({"part": "whole", "what": "kmeans()", "D": d, "seconds": sum(found.seconds)})
        lines[-1]["iterations"] = [round(value, 4) for value in found.seconds]
        print(lines[-1], flush=True)
        del rows, held
        clean(device)


def table(lines: list[Line], rate: float) -> None:
    """The one table: what was right, and seconds for 20 iterations."""
    print(f"\nproducts in bfloat16: {rate:.1f} TFLOP/s")
    print(f"{'':34} {'equal f64':>10} {'in doubt':>9} {'of bound':>9}")
    for line in lines:
        if line["part"] == "right":
            numbers = f"{line['equal_float64']:10.6f} {line['in_doubt']:9.4f} {line['error_of_bound']:9.4f}"
            print(f"{'right  ' + line['what']:34} {numbers}")
    print(f"{'':34} {'seconds':>10} {'TFLOP/s':>9} {'of bf16':>9} {'ours is':>9}")
    mine = {line["D"]: line["seconds"] for line in lines if line["what"] == "ours"}
    for line in lines:
        if line["part"] in ("lloyd", "faiss", "whole"):
            taken, work = line["seconds"], line.get("tflops", float("nan"))
            times = f"{taken / mine[line['D']]:8.2f}x" if line["D"] in mine else f"{'':9}"
            print(
                f"{'D=' + str(line['D']) + '  ' + line['what']:34} {taken:10.4f} {work:9.2f} {work / rate:9.3f} {times}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda where there is one; cpu to try the script")
    parser.add_argument("--quick", action="store_true", help="a few rows")
    parser.add_argument("--columns", help="lengths of rows, with commas; 256,512,4096,8192 when not given")
    parser.add_argument("--only", default="right,ceiling,tiles,lloyd,faiss,whole", help="parts, with commas")
    parser.add_argument("--json", type=Path, help="all numbers")
    options = parser.parse_args()
    if not options.device and not torch.cuda.is_available():
        return print("benchmarks/gpu.py: torch sees no GPU here, so nothing is measured")
    device = torch.device(options.device or "cuda")
    torch.set_float32_matmul_precision("highest")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}", flush=True)
    columns = [
        int(word) for word in (options.columns or ("32,1100" if options.quick else "256,512,4096,8192")).split(",")
    ]
    lines: list[Line] = []
    rate = ceiling(device, options.quick, lines)
    parts: dict[str, Callable[[], object]] = {
        "right": lambda: right(device, options.quick, lines),
        "tiles": lambda: tiles(device, options.quick, lines),
        "lloyd": lambda: lloyd(device, options.quick, columns, rate, lines),
        "faiss": lambda: with_faiss(device, options.quick, columns, lines),
        "whole": lambda: whole(device, options.quick, lines),
    }
    for part in options.only.split(","):
        if part in parts:
            began = time.perf_counter()
            parts[part]()
            print(f"{part}: {time.perf_counter() - began:.1f} s", flush=True)
        if options.json:  # after each part, as a later one may be cut off
            options.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "lines": lines}, indent=1))
    table(lines, rate)


if __name__ == "__main__":
    main()
