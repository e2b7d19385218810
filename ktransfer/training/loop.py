"""The training loop: every training of the project is this function with its own batches and loss.

Exact resume: batches are a pure function of the epoch, torch's own generator (dropout) is set anew before every step,
and a checkpoint holds weights, optimiser and the number of steps done.
"""

import contextlib
import json
import math
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ktransfer import files, rng
from ktransfer.errors import StageError, UsageError
from ktransfer.progress import bar, say
from ktransfer.training.options import LoopOptions, MachineOptions, TrainOptions

LOG_SECONDS = 10.0
CHECKPOINT_SECONDS = 1.0  # from one checkpoint to the next, at least
CHECKPOINT_SHARE = 0.02  # of the time, at most
MARKS = {"step": (1 / 3, 2 / 3, 8 / 9), "sevenths": (2 / 7, 4 / 7, 6 / 7)}
"""Where a schedule divides the rate by 10. "sevenths" and "sqrt" belong to presets of eval, no option names them."""


class Diverged(StageError):
    """The loss of a training is not finite."""


@dataclass(frozen=True)
class Batch:
    """Pictures of one step: `rows` (b,) int64, `pixels` (b, 3, s, s) uint8, `valid` (b,) bool, all on the device."""

    rows: Tensor
    pixels: Tensor
    valid: Tensor
    epoch: int


class Source(Protocol):
    """What batches are read from: pictures, or anything that hands out rows in the same way."""

    def batches(self, rows: Iterable[Tensor], /) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        """(b,) rows -> those rows, their content (b, ...), (b,) valid, and the seconds that the caller waited."""


class Loss(Protocol):
    """(model, batch) -> the loss, and sums over the batch for the log; `count` is what the others are divided by."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""


Evaluate = Callable[[nn.Module], dict[str, float]]


def choose_device(options: MachineOptions) -> torch.device:
    """The device that `--device` names.

    Raises:
        UsageError: it is not there.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no such device; give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: not supported; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu")
    return device


def bfloat16(options: MachineOptions, device: torch.device) -> bool:
    """Whether convolutions and products are computed in bfloat16; `auto`: where the hardware multiplies it faster."""
    if options.precision != "auto":
        return options.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def autocast(options: MachineOptions, device: torch.device) -> torch.autocast:
    """The arithmetic that `--precision` names."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16(options, device))


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def rate(step: int, total: int, options: LoopOptions, base: float = 0.0) -> float:
    """The factor on the learning rate `base` at `step` of `total` steps (0 <= step < total), in [0, 1]."""
    warm = round(options.warmup * total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if options.schedule == "sqrt":
        return 1 / math.sqrt(1 + base * options.weight_decay * step)
    return 0.1 ** sum(done >= mark for mark in MARKS[options.schedule])


def sgd(model: nn.Module, options: TrainOptions, device: torch.device) -> torch.optim.SGD:
    """SGD without weight decay on biases and batch norms."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0, fused=True)


def fit(
    model: nn.Module,
    loss: Loss,
    pictures: Source,
    batches: Callable[[int], Tensor],
    options: LoopOptions,
    folder: Path,
    device: torch.device,
    label: str,
    evaluate: Evaluate | None = None,
    optimiser: torch.optim.Optimizer | None = None,
) -> None:
    """Train `model` in place; interrupted at any instant and called again, it ends with the same weights.

    Args:
        batches: epoch -> (steps, b) int64 rows of the dataset, a pure function.
        folder: where `checkpoint/` and `metrics.jsonl` go.
        label: the stage's name, on the bar and in the seeds.
        evaluate: called after each epoch with the model in evaluation mode.
        optimiser: SGD of `options`, which are TrainOptions, when not given; its rates are scaled by the schedule.

    Raises:
        Diverged: the loss is not finite.
    """
    model.to(device).to(memory_format=torch.channels_last)
    if optimiser is None:
        assert isinstance(options, TrainOptions)
        optimiser = sgd(model, options, device)
    base_rates = [group["lr"] for group in optimiser.param_groups]
    per_epoch = len(batches(0))
    total = per_epoch * options.epochs
    checkpoint = folder / "checkpoint" / "last.pt"
    step = _restore(checkpoint, model, optimiser, device)
    log = Log(folder / "metrics.jsonl", step, options.tensorboard)
    last_save, save_cost = time.monotonic(), 0.0

    with bar(total * options.batch, label, done=step * options.batch) as shown, ctrl_c_between_steps() as stop:
        while step < total:
            epoch = step // per_epoch
            model.train()
            for batch, wait in stream(pictures, batches(epoch)[step % per_epoch :], epoch, device):
                for group, base in zip(optimiser.param_groups, base_rates, strict=True):
                    group["lr"] = base * rate(step, total, options, base)
                torch.manual_seed(rng.torch_seed(options.seed, f"{label}/step", step))
                with autocast(options, device):
                    value, sums = loss(model, batch)
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                optimiser.step()
                step += 1
                log.add(sums | {"loss": value.detach() * sums["count"]}, wait)
                shown.update(options.batch)
                if log.due() or step == total:
                    # Refreshed by hand, a bar that is younger than its delay would stay on the screen unclosed.
                    shown.set_postfix_str(log.write(step, epoch, optimiser.param_groups[0]["lr"], device), False)
                if stop.is_set() or time.monotonic() - last_save > max(
                    CHECKPOINT_SECONDS, save_cost / CHECKPOINT_SHARE
                ):
                    started = time.monotonic()
                    _save(checkpoint, model, optimiser, step)
                    last_save = time.monotonic()
                    save_cost = last_save - started
                if stop.is_set():
                    raise KeyboardInterrupt
            if evaluate is not None:
                log.note(step, epoch, evaluated(model, evaluate))
            if stop.is_set():  # while it was evaluated
                _save(checkpoint, model, optimiser, step)
                raise KeyboardInterrupt


@contextlib.contextmanager
def ctrl_c_between_steps() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that no step is cut in two; the second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers there alone
        yield stop
        return

    def note(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def evaluated(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Call `evaluate` with the model in evaluation mode and without gradients."""
    model.eval()
    with torch.no_grad():
        return evaluate(model)


def epoch_batches(rows: Tensor, batch: int, seed: int, epoch: int, extra: int = 0) -> Tensor:
    """The batches of an epoch: (steps, b + extra) int64, a pure function of its arguments.

    Each of (n,) `rows` comes at most once; the n % batch last ones of the epoch's order are left out, unless n < batch.
    The `extra` rows are those that follow a batch in the order (cyclically): the puzzles' sources of foreign tiles.
    """
    order = rows[rng.epoch_order(seed, epoch, len(rows))]
    width = min(batch, len(rows))
    places = torch.arange(len(rows) // width)[:, None] * width + torch.arange(width + extra)
    return order[places % len(rows)]


def stream(pictures: Source, rows: Tensor, epoch: int, device: torch.device) -> Iterator[tuple[Batch, float]]:
    """The batches of (steps, b) `rows` on the device, each with the seconds that the caller waited for it."""
    for chosen, pixels, valid, wait in pictures.batches(iter(rows)):
        moved = [part.to(device, non_blocking=True) for part in (chosen, pixels, valid)]
        yield Batch(moved[0], moved[1], moved[2], epoch), wait


class Log:
    """Running sums on the device, read only when a line is written; lines past `step` (of a killed run) are dropped."""

    def __init__(self, path: Path, step: int, tensorboard: bool) -> None:
        self.path = path
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(path.parent / "events", purge_step=step)
        self.sums: dict[str, Tensor] = {}
        self.wait, self.started = 0.0, time.monotonic()
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            files.write_text(path, "".join(line + "\n" for line in kept))

    def add(self, sums: dict[str, Tensor], wait: float) -> None:
        """Add one step's sums."""
        for name, value in sums.items():
            detached = value.detach().to(torch.float64) if value.device.type == "cpu" else value.detach().float()
            self.sums[name] = self.sums[name] + detached if name in self.sums else detached
        self.wait += wait

    def due(self) -> bool:
        """Whether it is time for a line."""
        return time.monotonic() - self.started > LOG_SECONDS

    def write(self, step: int, epoch: int, lr: float, device: torch.device) -> str:
        """Write a line to metrics.jsonl, start new sums, and return the line's short form for the bar."""
        seconds = time.monotonic() - self.started
        values = {name: float(value) for name, value in self.sums.items()}
        count = values.pop("count")
        means = {name: value / max(1.0, count) for name, value in values.items()}
        if not math.isfinite(means["loss"]):
            raise Diverged(f"the loss is {means['loss']} at step {step}; try a lower learning rate, with --overwrite")
        speed = {
            "lr": lr,
            "pictures_per_second": round(count / seconds, 1),
            # A wait that was going on at the start of the window counts whole.
            "data_wait": round(min(self.wait / seconds, 1.0), 4),
            "memory_gb": round(memory_gb(device), 2),
        }
        self.note(step, epoch, means | speed)
        self.sums, self.wait, self.started = {}, 0.0, time.monotonic()
        return ", ".join(f"{name} {value:.3f}" for name, value in means.items()) + f", wait {speed['data_wait']:.0%}"

    def note(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """Append a line of any values, and show them to TensorBoard if it was asked for."""
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "epoch": epoch} | values) + "\n")


def memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the device where it is a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62


def _save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    state = {"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
    files.write_whole(path, lambda part: torch.save(state, part))


def _restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device) -> int:
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = int(state["step"])
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise UsageError(f"{path}: not a checkpoint of this training; start again with --overwrite") from error
    say(f"resumed at step {step}")
    return step


def remove_checkpoint(folder: Path) -> None:
    """Free the checkpoint of a training that is done."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
