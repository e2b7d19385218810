"""The training loop: every training of the project is this function with its own batches and loss.

Exact resume: batches are a pure function of the epoch, torch's own generator (dropout) is seeded before every step,
and a checkpoint holds weights, optimiser and the number of steps done.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ktransfer import distributed, rng
from ktransfer.progress import bar
from ktransfer.training.batch import Loss, Source
from ktransfer.training.batch_divider import BatchDivider, Piece
from ktransfer.training.checkpoint import Checkpoint
from ktransfer.training.compiled import Compiled
from ktransfer.training.device import autocast, move
from ktransfer.training.log import Log
from ktransfer.training.memory import explained
from ktransfer.training.options import LoopOptions, TrainOptions
from ktransfer.training.stopping import Stopping

LOG_SECONDS = 10.0
MARKS = {"step": (1 / 3, 2 / 3, 8 / 9), "sevenths": (2 / 7, 4 / 7, 6 / 7)}
"""Where a schedule divides the rate by 10. "sqrt" belongs to a preset of eval, no option names it."""
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
    folder: Path | None,
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
        folder: where `checkpoint/` and `metrics.jsonl` go; with None nothing is written.
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
        PeerFailed: in the others, when one of them failed or is to stop.
    """
    if not distributed.is_leader():
        folder = evaluate = None
    steps, width = batches(0).shape
    with BatchDivider(model, width - following, options.micro_batch, following, device, shared) as divider:
        move(model, device)
        if optimiser is None:
            assert isinstance(options, TrainOptions)
            optimiser = sgd(model, options, device)
        training = _Training(model, loss, optimiser, options, device, label, divider, steps, folder, evaluate)
        total, done = steps * options.epochs * options.batch, training.step * options.batch
        with bar(total, label, done=done) as shown, ctrl_c_between_steps(divider.shared) as stop:
            training.run(images, batches, shown, stop)


class _Training:
    """A training from its checkpoint, or the beginning, to its end; between two steps, `step` of them are done."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimiser: torch.optim.Optimizer,
        options: LoopOptions,
        device: torch.device,
        label: str,
        divider: BatchDivider,
        per_epoch: int,
        folder: Path | None,
        evaluate: Evaluate | Stopping | None,
    ) -> None:
        self.model, self.loss, self.optimiser, self.options = model, loss, optimiser, options
        self.device, self.label, self.divider, self.evaluate = device, label, divider, evaluate
        self.per_epoch, self.total = per_epoch, per_epoch * options.epochs
        self.stopping = evaluate if isinstance(evaluate, Stopping) else None
        assert not (self.stopping and divider.shared)
        self.rates = [group["lr"] for group in optimiser.param_groups]  # a checkpoint brings those of its step
        self.checkpoint = Checkpoint(folder, model, optimiser, self.stopping)
        self.step = _begin(self.checkpoint, divider, device)
        self.network = Compiled(model, options, device, label, divider.shared)
        self.log = Log(folder / "metrics.jsonl", self.step, options.tensorboard) if folder else None

    def run(self, images: Source, batches: Callable[[int], Tensor], shown: "tqdm[Any]", stop: threading.Event) -> None:
        """All steps that are left, shown on a bar; with `stop`, up to the end of the present one."""
        stopping, epoch = self.stopping, self.step // self.per_epoch
        if stopping and stopping.evaluated < epoch:  # stopped between an epoch and its evaluation
            self._evaluate(epoch - 1)
        while self.step < self.total and not (stopping and stopping.over):
            epoch = self.step // self.per_epoch
            self._learn(images, batches(epoch)[self.step % self.per_epoch :], epoch, shown, stop)
            self._end(epoch, stop)
        if stopping:
            stopping.restore()
        if self.divider.shared:  # the leader may have failed after the last step, or be told to stop
            if self.divider.sync(None, stop.is_set())[1]:
                self._leave()
            self.divider.close()

    def _learn(self, images: Source, rows: Tensor, epoch: int, shown: "tqdm[Any]", stop: threading.Event) -> None:
        """An epoch, or what is left of one: a step for each of (steps, b + following) `rows`."""
        self.model.train()
        for share in self.divider.stream(images, rows, epoch):
            pieces, stopped = self.divider.sync(share, stop.is_set())
            if stopped and self.divider.shared:
                self._leave()
            sums = self._step(pieces)
            self.step += 1
            shown.update(self.options.batch)
            if self.log:
                self.log.add(sums, share.wait)
                if self.log.due(LOG_SECONDS) or self.step == self.total:
                    # Refreshed by hand, a bar that is younger than its delay would stay on the screen unclosed.
                    shown.set_postfix_str(self._write_line(self.log, epoch), False)
            # What is to be evaluated first is kept after that, so that its line is written once.
            evaluated_first = self.stopping and self.step % self.per_epoch == 0
            if stop.is_set() or (self.checkpoint.due() and not evaluated_first):
                self.checkpoint.save(self.step)
            if stop.is_set() and not self.divider.shared:
                raise KeyboardInterrupt

    def _step(self, pieces: list[Piece]) -> dict[str, Tensor]:
        """One step of all processes with this one's `pieces` of the batch; sums over the batch for the log."""
        options = self.options
        for group, base in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = base * rate(self.step, self.total, options, base)
        self.optimiser.zero_grad(set_to_none=True)
        seed = rng.torch_seed(options.seed, f"{self.label}/step", self.step)

        def gradients(called: nn.Module) -> dict[str, Tensor]:
            return _gradients(called, self.loss, pieces, seed, options, self.device, called is self.model)

        with explained(self.model, self.device, self.label, options):
            sums = self.divider.all_reduce(self.network.run(gradients))
            self.optimiser.step()
        return sums

    def _end(self, epoch: int, stop: threading.Event) -> None:
        """Evaluate an epoch that has ended; where that may end the training, what it found is kept with the weights."""
        stopping = self.stopping
        if self.evaluate is None or (stop.is_set() and not stopping):
            return
        self._evaluate(epoch)
        if self.log and self.log.sums and stopping and stopping.over:
            self._write_line(self.log, epoch)
        if (stop.is_set() or (stopping and self.checkpoint.due())) and not self.divider.shared:
            self.checkpoint.save(self.step)
            if stop.is_set():  # while it was evaluated
                raise KeyboardInterrupt

    def _evaluate(self, epoch: int) -> None:
        assert self.evaluate is not None
        values = evaluated(self.model, self.evaluate)
        if self.log:
            self.log.note(self.step, epoch, values)

    def _write_line(self, log: Log, epoch: int) -> str:
        return log.write(self.step, epoch, self.optimiser.param_groups[0]["lr"], self.device)

    def _leave(self) -> None:
        """All processes together: the leader keeps what it has."""
        self.divider.close()
        if not distributed.is_leader():
            raise distributed.PeerFailed("stopped")
        self.checkpoint.save(self.step)
        raise KeyboardInterrupt


def _begin(checkpoint: Checkpoint, divider: BatchDivider, device: torch.device) -> int:
    """Go on from the checkpoint if there is one, all processes with the leader's numbers; the steps done."""
    step = checkpoint.restore(device)
    if not divider.shared:
        return step
    state = divider.same(checkpoint.state(step))
    return step if distributed.is_leader() else checkpoint.load(state)


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
