"""The training loop: every training of the project is this function with its own batches and loss.

Exact resume: batches are a pure function of the epoch, torch's own generator (dropout) is set anew before every step,
and a checkpoint holds weights, optimiser and the number of steps done.
"""

import contextlib
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer import distributed, files, rng
from ktransfer.errors import UsageError
from ktransfer.progress import bar, say
from ktransfer.training.batch import Loss, Source
from ktransfer.training.batch_divider import BatchDivider, Piece
from ktransfer.training.compiled import Compiled
from ktransfer.training.device import autocast, move
from ktransfer.training.log import Log
from ktransfer.training.memory import explained
from ktransfer.training.options import LoopOptions, TrainOptions
from ktransfer.training.stopping import Stopping

LOG_SECONDS = 10.0
CHECKPOINT_SECONDS = 1.0  # from one checkpoint to the next, at least
CHECKPOINT_SHARE = 0.02  # of the time, at most
MARKS = {"step": (1 / 3, 2 / 3, 8 / 9), "sevenths": (2 / 7, 4 / 7, 6 / 7)}
"""Where a schedule divides the rate by 10. "sevenths" and "sqrt" belong to presets of eval, no option names them."""
LEFT = ((60_000 * 16, 3), (20_000 * 16, 9))
"""Where "he" does: when so many images are left, 60,000 and 20,000 iterations of 16 (docs/papers.md).

In a training shorter than his shortest, 2x or 180,000 iterations, at a third and a ninth of it, as there."""
SAME_CTRL_C = 2.0  # seconds


Evaluate = Callable[[nn.Module], dict[str, float]]


def rate(step: int, total: int, options: LoopOptions, base: float = 0.0) -> float:
    """The factor on the learning rate `base` at `step` of `total` steps (0 <= step < total), in [0, 1]."""
    warm = round(options.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "he":
        return 0.1 ** sum(total - step <= min(left / options.batch, total / part) for left, part in LEFT)
    done = (step - warm) / max(1, total - warm)
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if options.schedule == "sqrt":
        return 1 / math.sqrt(1 + base * options.weight_decay * step)
    return 0.1 ** sum(done >= mark for mark in MARKS[options.schedule])


def sgd(model: nn.Module, options: TrainOptions, device: torch.device) -> torch.optim.SGD:
    """SGD without weight decay on biases and batch norms, with `clip` if wanted."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    made = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0, fused=True)

    def shorten(*_: Any) -> None:
        nn.utils.clip_grad_norm_(decayed + plain, options.clip)

    if options.clip:
        made.register_step_pre_hook(shorten)
    return made


def fit(
    model: nn.Module,
    loss: Loss,
    images: Source,
    batches: Callable[[int], Tensor],
    options: LoopOptions,
    folder: Path,
    device: torch.device,
    label: str,
    evaluate: Evaluate | Stopping | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    following: int = 0,
    shared: bool = False,
) -> None:
    """Train `model` in place; interrupted at any instant and called again, it ends with the same weights.

    Args:
        batches: epoch -> (steps, b + following) int64 rows of the dataset, a pure function.
        folder: where `checkpoint/` and `metrics.jsonl` go.
        label: the stage's name, on the bar and in the seeds.
        evaluate: called after each epoch with the model in evaluation mode; a `Stopping` may end the training there,
            and its network has its best weights in the end. Not for shared trainings.
        optimiser: SGD of `options`, which are TrainOptions, when not given; its rates are scaled by the schedule.
        following: rows that a batch has beyond its own images, those that come after them in the epoch's order.
        shared: whether all processes of the command call this together, with the same arguments; the first one alone
            evaluates and writes. The batches are those of one process, and so are the weights but for rounding.

    Raises:
        Diverged: the loss is not finite.
        StageError: none of a batch's images can be read, or another process failed.
        Told: in the others, when one of them failed or is to stop.
    """
    per_epoch, rows = batches(0).shape
    total = per_epoch * options.epochs
    checkpoint = folder / "checkpoint" / "last.pt"
    leads = distributed.is_leader()
    stopping = evaluate if isinstance(evaluate, Stopping) else None
    assert not (stopping and shared)
    with contextlib.ExitStack() as within:
        divider = within.enter_context(
            BatchDivider(model, rows - following, options.micro_batch, following, device, shared)
        )
        move(model, device)
        if optimiser is None:
            assert isinstance(options, TrainOptions)
            optimiser = sgd(model, options, device)
        base_rates = [group["lr"] for group in optimiser.param_groups]
        step = _begin(divider, checkpoint, model, optimiser, device, stopping)
        network = Compiled(model, options, device, label, divider.shared)

        def gradients(called: nn.Module, pieces: list[Piece], seed: int) -> dict[str, Tensor]:
            return _gradients(called, loss, pieces, seed, options, device, called is model)

        log = Log(folder / "metrics.jsonl", step, options.tensorboard) if leads else None
        last_save, save_cost = time.monotonic(), 0.0
        shown = within.enter_context(bar(total * options.batch, label, done=step * options.batch))
        stop = within.enter_context(ctrl_c_between_steps(divider.shared))

        def keep() -> None:
            nonlocal last_save, save_cost
            started = time.monotonic()
            _save(checkpoint, model, optimiser, step, stopping)
            last_save = time.monotonic()
            save_cost = last_save - started

        def due() -> bool:
            return time.monotonic() - last_save > max(CHECKPOINT_SECONDS, save_cost / CHECKPOINT_SHARE)

        def leave() -> None:
            """All processes together: the leader keeps what it has."""
            divider.close()
            if not leads:
                raise distributed.PeerFailed("stopped")
            keep()
            raise KeyboardInterrupt

        if stopping and log and stopping.evaluated < step // per_epoch:  # stopped between an epoch and its evaluation
            log.note(step, step // per_epoch - 1, evaluated(model, stopping))
        while step < total and not (stopping and stopping.over):
            epoch = step // per_epoch
            model.train()
            for share in divider.stream(images, batches(epoch)[step % per_epoch :], epoch):
                pieces, stopped = divider.sync(share, stop.is_set())
                if stopped and divider.shared:
                    leave()
                for group, base in zip(optimiser.param_groups, base_rates, strict=True):
                    group["lr"] = base * rate(step, total, options, base)
                optimiser.zero_grad(set_to_none=True)
                seed = rng.torch_seed(options.seed, f"{label}/step", step)
                with explained(model, device, label, options):
                    sums = divider.all_reduce(network.run(partial(gradients, pieces=pieces, seed=seed)))
                    optimiser.step()
                step += 1
                shown.update(options.batch)
                if log is None:
                    continue
                log.add(sums, share.wait)
                if log.due(LOG_SECONDS) or step == total:
                    # Refreshed by hand, a bar that is younger than its delay would stay on the screen unclosed.
                    shown.set_postfix_str(log.write(step, epoch, optimiser.param_groups[0]["lr"], device), False)
                # What is to be evaluated first is kept after that, so that its line is written once.
                if stop.is_set() or (due() and not (stopping and step % per_epoch == 0)):
                    keep()
                if stop.is_set() and not divider.shared:
                    raise KeyboardInterrupt
            if evaluate is not None and log is not None and (stopping or not stop.is_set()):
                log.note(step, epoch, evaluated(model, evaluate))
                if stopping and stopping.over and log.sums:
                    log.write(step, epoch, optimiser.param_groups[0]["lr"], device)
                if (stop.is_set() or (stopping and due())) and not divider.shared:
                    keep()
                    if stop.is_set():  # while it was evaluated
                        raise KeyboardInterrupt
        if stopping:
            stopping.restore()
        if divider.shared:  # the leader may have failed after the last step, or be told to stop
            if divider.sync(None, stop.is_set())[1]:
                leave()
            divider.close()


def _begin(
    divider: BatchDivider,
    checkpoint: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    device: torch.device,
    stopping: Stopping | None,
) -> int:
    """Go on from the checkpoint if there is one, all processes with the leader's numbers; the steps done."""
    step = _restore(checkpoint, model, optimiser, device, stopping) if distributed.is_leader() else 0
    if not divider.shared:
        return step
    state = divider.same(_state(model, optimiser, step, stopping))
    if not distributed.is_leader():
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def _gradients(
    model: nn.Module,
    loss: Loss,
    pieces: list[Piece],
    seed: int,
    options: LoopOptions,
    device: torch.device,
    plain: bool,
) -> dict[str, Tensor]:
    """Add the gradients of the mean loss over the batch that the `pieces` are parts of; sums for the log.

    A compiled model, one that is not `plain`, draws its masks by itself: there each piece has a seed of its own.
    """
    sums: dict[str, Tensor] = {}
    for piece in pieces:
        torch.manual_seed(seed if plain else seed + piece.first)
        with autocast(options, device), piece.masks() if plain else contextlib.nullcontext():
            value, found = loss(model, piece.batch)
        if piece.count == piece.total:
            value.backward()
        else:
            (value * (piece.count / piece.total)).backward()
        found = found | {"loss": value.detach() * found["count"]}
        for name, number in found.items():
            # A mean over nothing is no number; it adds nothing.
            added = number.detach() if piece.count else torch.zeros_like(number)
            sums[name] = sums[name] + added if name in sums else added
    return sums


@contextlib.contextmanager
def ctrl_c_between_steps(several: bool = False) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that no step is cut in two; the second one interrupts at once.

    With `several` processes one Ctrl-C comes twice, from the terminal and from torchrun: what follows within two
    seconds is taken for the same one.
    """
    stop = threading.Event()
    first = math.inf
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers there alone
        yield stop
        return

    def note(number: int, frame: object) -> None:
        nonlocal first
        if not several:
            signal.signal(signal.SIGINT, before)
        elif time.monotonic() - first > SAME_CTRL_C:
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
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


def _state(model: nn.Module, optimiser: torch.optim.Optimizer, step: int, stopping: Stopping | None) -> dict[str, Any]:
    found = {"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
    return found | ({"stopping": stopping.state()} if stopping else {})


def _save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int, stopping: Stopping | None) -> None:
    files.write_whole(path, lambda part: torch.save(_state(model, optimiser, step, stopping), part))


def _restore(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device, stopping: Stopping | None
) -> int:
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = int(state["step"])
        if stopping:
            stopping.load(state["stopping"])
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise UsageError(f"{path}: not a checkpoint of this training; start again with --overwrite") from error
    say(f"resumed at step {step}")
    return step


def remove_checkpoint(folder: Path) -> None:
    """Free the checkpoint of a training that is done."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
