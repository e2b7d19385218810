"""`ktransfer bench`: how fast decoding, training and feature extraction are on this machine.

What the machine could do at best is measured in the same run.
"""

import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ktransfer import files
from ktransfer.bench.ceilings import copies, jpegs, products
from ktransfer.bench.photographs import photograph, write_photographs
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.machine import cores
from ktransfer.progress import bar
from ktransfer.stages import worker
from ktransfer.training import loop
from ktransfer.training.batch import Batch, Loss
from ktransfer.training.compiled import Compiled
from ktransfer.training.device import autocast, bfloat16, choose_device, move
from ktransfer.training.options import MachineOptions, TrainOptions

MADE = 64  # images where none are given
CPU_BATCH = 16  # a step of 256 would take minutes
SCHEMA = 1


@dataclass(frozen=True)
class Wanted:
    """What is measured; `size` is 0 for the stage's default, `arch` None for its default network.

    `images` is how many there are.
    """

    arch: str | None
    width: float
    size: int
    batch: int
    task: str
    precision: str
    device: torch.device
    images: int = 0


@dataclass(frozen=True)
class Work:
    """What a stage does with a batch of images.

    Attributes:
        name: for people, such as "pretext step".
        side: of the squares that it reads, in pixels.
        following: images that a batch has beyond its own.
        prepare: what the network takes, made of a batch.
        network: the network's part of the work alone, on what `prepare` made.
        whole: all of it.
    """

    name: str
    side: int
    following: int
    prepare: Callable[[Batch], Tensor]
    network: Callable[[Tensor], None]
    whole: Callable[[Batch], None]


def training(model: nn.Module, loss: Loss, options: TrainOptions, device: torch.device) -> Callable[[Batch], None]:
    """A step of training as the loop does it, compiled where the loop compiles it."""
    move(model, device)
    model.train()
    optimiser = loop.sgd(model, options, device)
    network = Compiled(model, options, device, "bench", shared=False)

    def gradients(called: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with autocast(options, device):
            value, sums = loss(called, batch)
        value.backward()
        return sums

    def step(batch: Batch) -> None:
        optimiser.zero_grad(set_to_none=True)
        network.run(partial(gradients, batch=batch))
        optimiser.step()

    return step


def command(
    part: str,
    data: str | None,
    arch: str | None,
    width: float,
    size: int,
    batch: int,
    task: str,
    device: str,
    precision: str,
    workers: int,
    seconds: float,
    out: Path | None,
) -> str:
    """What the command line gives, resolved; see `bench`."""
    chosen = choose_device(MachineOptions(device=device))
    batch = batch or (CPU_BATCH if chosen.type == "cpu" else TrainOptions.batch)
    if batch < 2:
        raise UsageError(f"--batch {batch}: batch norm needs two images; give at least 2")
    return bench(part, data, Wanted(arch, width, size, batch, task, precision, chosen), workers, seconds, out)


def bench(part: str, data: str | None, wanted: Wanted, workers: int, seconds: float, out: Path | None) -> str:
    """Measure one part, alone and together with what feeds it.

    Args:
        part: decode, data, step, extract or retrain.
        data: images, as for `opening.open_dataset`; generated JPEGs where not given.
        workers: threads that read; 0 takes one for each core.
        seconds: for each measurement.
        out: write everything as JSON here.

    Returns:
        A table for people.

    Raises:
        UsageError: it cannot be done.
    """
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--json {out}: the folder {out.parent} does not exist; make it first")
    device = wanted.device
    stage = "step" if part in ("decode", "data") else part
    with ExitStack() as stack:
        if data is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_photographs(folder, MADE)
            found = open_dataset(str(folder))
        else:
            found = open_dataset(data)
        work: Work = worker(stage)(replace(wanted, images=len(found)))
        images = ImageLoader(found, work.side, workers, cache="off", device=device)
        options = MachineOptions(device=str(device), precision=wanted.precision)
        half = bfloat16(options, device)
        threads = images.workers
        ceilings = {
            "gemm_tflops": products(torch.bfloat16 if half else torch.float32, device, seconds),
            "copy_gbps": copies(device, seconds),
            "jpeg_per_second": jpegs(photograph(0), threads, seconds),
        }
        rows = _measured(part, work, images, wanted, seconds, made=data is None, ceilings=ceilings)
    facts = {
        "machine": machine(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "workers": threads,
        "arithmetic": "bfloat16" if half else "float32",
        "data": data or "made",
        "side": work.side,
        **asdict(wanted) | {"device": str(device), "images": len(found)},
    }
    result = {"schema": SCHEMA, "part": part, "facts": facts, "ceilings": ceilings, "rows": rows}
    if out is not None:
        files.write_json(out, result)
    return _table(result)


def _measured(
    part: str,
    work: Work,
    images: ImageLoader,
    wanted: Wanted,
    seconds: float,
    made: bool,
    ceilings: dict[str, float],
) -> dict[str, dict[str, float]]:
    """Name of a row -> its numbers."""
    device = wanted.device
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, do: Callable[[Batch], object], batches: Iterator[tuple[Batch, float]], flops: float) -> None:
        rows[name] = found = timed(name, do, batches, wanted.batch, seconds, device)
        if flops:
            found["tflops"] = flops * found["images_per_second"] / 1e12
            found["of_gemm"] = found["tflops"] / ceilings["gemm_tflops"]

    add("decode", lambda batch: None, read_batches(images, wanted, work.following), 0)
    if made:
        rows["decode"]["of_jpeg"] = rows["decode"]["images_per_second"] / ceilings["jpeg_per_second"]
    if part == "decode":
        return rows
    batch, _ = next(read_batches(images, wanted, work.following))
    with autocast(MachineOptions(device=str(device), precision=wanted.precision), device):
        prepared = work.prepare(batch)
    add("prepare", work.prepare, _same(batch), 0)
    bytes_each = prepared.numel() * prepared.element_size() / wanted.batch
    rows["prepare"]["of_copy"] = bytes_each * rows["prepare"]["images_per_second"] / (ceilings["copy_gbps"] * 1e9)
    add("decode + prepare", work.prepare, read_batches(images, wanted, work.following), 0)
    if part == "data":
        return rows
    flops = count_flops(lambda: work.network(prepared)) / wanted.batch
    add("network", lambda _: work.network(prepared), _same(batch), flops)
    add(work.name, work.whole, _same(batch), flops)
    add(f"{work.name} + reading", work.whole, read_batches(images, wanted, work.following), flops)
    for row in rows.values():
        row["flops_per_image"] = flops
    return rows


def timed(
    name: str,
    do: Callable[[Batch], object],
    batches: Iterator[tuple[Batch, float]],
    count: int,
    seconds: float,
    device: torch.device,
) -> dict[str, float]:
    """Images a second, the share of the time that was waited for data, and peak memory in GB.

    Args:
        do: what is done with each batch; once before the clock starts.
        batches: without end, with the seconds waited for each.
        count: images in a batch.
        seconds: measure for so long, and at least one batch.
    """
    batch, _ = next(batches)
    do(batch)
    _forget_peak(device)
    _settle(device)
    began = time.perf_counter()
    done, waited, spent = 0, 0.0, 0.0
    with bar(round(seconds), name, "s") as shown:
        while spent < seconds:
            batch, wait = next(batches)
            do(batch)
            done += count
            waited += wait
            spent = time.perf_counter() - began
            shown.update(min(round(spent), round(seconds)) - shown.n)
    _settle(device)
    spent = time.perf_counter() - began
    return {"images_per_second": done / spent, "data_wait": waited / spent, "peak_gb": _peak(device)}


def count_flops(do: Callable[[], object]) -> float:
    """Floating-point operations of convolutions and products, forward and backward; a multiply-add is two."""
    # torch counts the backward pass of grouped convolutions, which AlexNet has, as if they had no groups.
    mapping = {torch.ops.aten.convolution_backward: _backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        do()
    return float(counter.get_total_flops())


def _backward_flops(grad: list[int], x: list[int], weight: list[int], *rest: Any, **_: Any) -> int:
    wanted = rest[-1]  # of the gradients of input, weight and bias
    return 2 * grad[0] * prod(grad[2:]) * prod(weight) * (bool(wanted[0]) + bool(wanted[1]))


def read_batches(images: ImageLoader, wanted: Wanted, following: int) -> Iterator[tuple[Batch, float]]:
    """Batches of random images, read as in training, without end."""
    count = len(images.dataset)

    def rows() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(0, count, (wanted.batch + following,), generator=generator)

    for chosen, pixels, valid, wait in images.batches(rows()):
        moved = [part.to(wanted.device, non_blocking=True) for part in (chosen, pixels, valid)]
        yield Batch(moved[0], moved[1], moved[2], 0, bool(valid.all())), wait


def _same(batch: Batch) -> Iterator[tuple[Batch, float]]:
    while True:
        yield batch, 0.0


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then it is the peak of the process so far
        return


def _peak(device: torch.device) -> float:
    """GB: of the GPU where one computes, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine(device: torch.device) -> str:
    """What computes, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {cores()} cores"


def _table(result: dict[str, Any]) -> str:
    facts, ceilings = result["facts"], result["ceilings"]
    network = f"{facts['arch'] or 'the default network'}, width {facts['width']:g}"
    lines = [
        f"{result['part']}: {facts['machine']}, {facts['threads']} threads, {facts['workers']} readers; {network}, "
        f"{facts['arithmetic']}, batch {facts['batch']}; {facts['images']:,} images ({facts['data']}), squares of "
        f"{facts['side']}",
        f"ceilings: {ceilings['gemm_tflops']:.3g} TFLOP/s of products, {ceilings['copy_gbps']:.3g} GB/s copied, "
        f"{ceilings['jpeg_per_second']:,.0f} JPEGs of 500 x 375 a second",
        f"{'':24} {'images/s':>10} {'data-wait':>10} {'peak GB':>8} {'TFLOP/s':>8}  of the ceiling",
    ]
    for name, row in result["rows"].items():
        share = next((f"{row[key]:.0%} of {key[3:]}" for key in ("of_gemm", "of_jpeg", "of_copy") if key in row), "")
        done = f"{row['tflops']:8.3f}" if "tflops" in row else f"{'':8}"
        rate, wait, peak = row["images_per_second"], row["data_wait"], row["peak_gb"]
        lines.append(f"{name:24} {rate:10,.1f} {wait:10.1%} {peak:8.2f} {done}  {share}")
    return "\n".join(lines)
