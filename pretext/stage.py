"""The pretext stage: pictures in, a teacher that solves puzzles out."""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import networks, rng
from ktransfer.config import build
from ktransfer.dataset import Dataset, open_dataset
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.pictures import Pictures, readable, typical_short_side
from ktransfer.progress import say
from ktransfer.run import begin
from ktransfer.training import loop
from ktransfer.training.loop import Batch

from . import permutations as perms
from .config import PretextConfig
from .network import TILES, PuzzleNet
from .preview import save_sheet
from .puzzles import PUZZLES, PuzzleConfig, Puzzles, make_puzzles

HELD_OUT_EPOCH = 2**32 - 1  # draws that no training epoch uses
OVERFIT_STEPS = 400
LEAST_TILE = 8


def pretext(run: str | Path, **options: Any) -> Path:
    """Train a teacher on puzzles (paper §3; reference jigsawpp.md §1, §2).

    Args:
        run: the run folder; the stage writes below `run/pretext`.
        options: the fields of `PretextConfig`.

    Returns:
        The path of `model.safetensors`.

    Raises:
        UsageError: what was asked for cannot be done.
        StageError: it failed while it ran.
    """
    run = Path(run)
    config, data = check(run, options)
    device = loop.choose_device(config)
    permutations = _permutations(config)
    rows, held_out = _split(data, config)
    if config.overfit:
        _overfit(config, data, permutations, torch.cat([rows, held_out])[: config.overfit], device)
        return run / "pretext" / "model.safetensors"

    inputs = {"data": data.fingerprint, "permutations": perms.summarise(permutations.numpy()).sha256}
    outputs = ("model.safetensors", "puzzles.png", "metrics.jsonl", "checkpoint", "events")
    with begin(run, "pretext", "pretext", config, inputs, outputs, config.overwrite, str(device)) as step:
        weights = step.folder / "model.safetensors"
        if step.done:
            return weights
        pictures = Pictures(data, config.size, config.workers)
        used = readable(pictures, torch.cat([rows, held_out]), config.max_broken)
        rows, held_out = (part[torch.isin(part, used)] for part in (rows, held_out))
        puzzle = _puzzle(config)
        network = Network(config.arch, config.width, 2, config.size, 0, "picture", config.task)
        model = PuzzleNet(network, puzzle.tile, len(permutations), config.seed)
        permutations = permutations.to(device)
        make = partial(_puzzles, permutations=permutations, puzzle=puzzle, seed=config.seed)
        _preview(step.folder / "puzzles.png", pictures, rows, make, permutations)
        evaluate = partial(_accuracy, make=make, pictures=pictures, rows=held_out, config=config, device=device)
        loop.fit(
            model,
            partial(_loss, make=make),
            pictures,
            lambda epoch: loop.epoch_batches(rows, config.batch, config.seed, epoch, extra=1),
            config,
            step.folder,
            device,
            "pretext",
            evaluate,
        )
        networks.save(weights, model.weights(), network)
        result = loop.evaluated(model, evaluate)
        broken = [f"{data.keys[row]}: {reason}" for row, reason in pictures.broken.items()]
        step.finish([weights, step.folder / "puzzles.png"], result=result, broken=broken)
        loop.remove_checkpoint(step.folder)
        say(f"pretext: done; {_summary(result, len(permutations))}; {len(broken)} broken pictures; {weights}")
        return weights


def check(
    run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None
) -> tuple[PretextConfig, Dataset]:
    """Everything that can be found wrong before the work; the settings with `size` and `tile` resolved.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(PretextConfig, options, "pretext")
    networks.check_arch(config.arch, trunk=True)
    if config.data is None:
        raise UsageError("pretext: no pictures given; name them with --data")
    data = open_dataset(config.data)
    if len(data) < 4 or (config.overfit and len(data) < config.overfit):
        raise UsageError(
            f"--data {config.data}: {len(data)} pictures are too few; give at least {max(4, config.overfit)}"
        )
    if 0 < config.limit < 4:
        raise UsageError(f"--limit {config.limit}: too few pictures to learn from; give 0 (all) or at least 4")
    loop.choose_device(config)
    size = config.size or min(255, typical_short_side(data) // 3 * 3)
    _, tile, _ = _puzzle(config).geometry(size)
    if tile < LEAST_TILE and config.tile:
        raise UsageError(f"--tile {tile}: too small for any network; give at least {LEAST_TILE}")
    if tile < LEAST_TILE:
        raise UsageError(
            f"--size {size}: tiles of {tile} pixels are too small for any network; give at least --size 33"
        )
    permutations = _permutations(config)
    if permutations.shape[1] != TILES or len(permutations) < 2:
        raise UsageError(
            f"--permutation-file {config.permutation_file}: holds {len(permutations)} permutations of "
            f"{permutations.shape[1]} tiles; a puzzle needs at least 2 of {TILES}"
        )
    trunk = Network(config.arch, config.width, 2, tile)
    with networks.fitting(replace(trunk, size=size)), torch.no_grad():
        networks.build(trunk, 0, "check").eval()(torch.zeros(1, 3, tile, tile))
    return replace(config, size=size, tile=tile), data


def _permutations(config: PretextConfig) -> Tensor:
    if config.permutation_file:
        return torch.from_numpy(perms.from_file(Path(config.permutation_file))).to(torch.int64)
    return torch.from_numpy(_generated(config.permutations, config.min_distance)).to(torch.int64)


_generated = lru_cache(perms.generate)  # a second each time, and the checks ask for it too


def _puzzle(config: PretextConfig) -> PuzzleConfig:
    return replace(PUZZLES[config.task, config.colour], tile=config.tile)


def _split(data: Dataset, config: PretextConfig) -> tuple[Tensor, Tensor]:
    """Rows for training, and rows held out for measuring puzzle accuracy."""
    order = torch.argsort(rng.words(config.seed, "pretext/split", 0, torch.arange(len(data)), 1)[:, 0], stable=True)
    if config.limit:
        order = order[: config.limit]
    held_out = min(len(order) - 2, max(2, round(config.held_out * len(order)))) if config.held_out else 0
    return order[held_out:], order[:held_out]


def _puzzles(batch: Batch, permutations: Tensor, puzzle: PuzzleConfig, seed: int) -> Puzzles:
    """Puzzles of all but the last picture; each takes its foreign tiles from the one that follows it.

    A broken picture makes no puzzle, and lends no tiles.
    """
    kept = batch.valid[:-1]
    return make_puzzles(
        batch.pixels[:-1][kept],
        batch.pixels[1:][kept],
        batch.rows[:-1][kept],
        batch.valid[1:][kept],
        permutations,
        puzzle,
        seed,
        batch.epoch,
    )


def _loss(model: nn.Module, batch: Batch, make: Any) -> tuple[Tensor, dict[str, Tensor]]:
    puzzles = make(batch)
    logits = model(puzzles.tiles)
    correct = (logits.argmax(1) == puzzles.label).sum()
    return F.cross_entropy(logits, puzzles.label), {"accuracy": correct, "count": batch.valid[:-1].sum()}


def _accuracy(
    model: nn.Module, make: Any, pictures: Pictures, rows: Tensor, config: PretextConfig, device: torch.device
) -> dict[str, float]:
    """Puzzle accuracy on the held-out pictures, overall and by the number of occluded tiles."""
    if not len(rows):
        return {}
    following = rows.roll(-1)
    batches = [
        torch.cat([part, after[-1:]])
        for part, after in zip(rows.split(config.batch), following.split(config.batch), strict=True)
    ]
    hits: list[Tensor] = []
    occlusions: list[Tensor] = []
    for chosen, pixels, valid, _ in pictures.batches(iter(batches)):
        if not valid[:-1].any():
            continue
        puzzles = make(Batch(chosen.to(device), pixels.to(device), valid.to(device), HELD_OUT_EPOCH))
        with loop.autocast(config, device):
            logits = model(puzzles.tiles)
        hits.append((logits.argmax(1) == puzzles.label).cpu())
        occlusions.append(puzzles.occluded.sum(1).cpu())
    if not hits:
        return {}
    hit, occluded = torch.cat(hits).double(), torch.cat(occlusions)
    result = {"held_out_accuracy": float(hit.mean()), "held_out_puzzles": float(len(hit))}
    for number in occluded.unique().tolist():
        result[f"held_out_accuracy_{number}_occluded"] = float(hit[occluded == number].mean())
    return result


def _summary(result: dict[str, float], classes: int) -> str:
    if not result:
        return "no pictures were held out"
    return f"{result['held_out_accuracy']:.1%} of held-out puzzles solved (chance {1 / classes:.1%})"


def _preview(path: Path, pictures: Pictures, rows: Tensor, make: Any, permutations: Tensor) -> None:
    chosen = torch.cat([rows[:8], rows[8:9] if len(rows) > 8 else rows[:1]])
    pixels, valid = pictures.batch(chosen)
    device = permutations.device
    puzzles = make(Batch(chosen.to(device), pixels.to(device), valid.to(device), 0))
    save_sheet(path, puzzles)


def _overfit(config: PretextConfig, data: Dataset, permutations: Tensor, rows: Tensor, device: torch.device) -> None:
    """Whether the network can learn one fixed puzzle of each picture by heart; nothing is written."""
    config = replace(config, batch=len(rows), epochs=OVERFIT_STEPS)
    puzzle = _puzzle(config)
    network = Network(config.arch, config.width, 2, config.size, 0, "picture", config.task)
    model = PuzzleNet(network, puzzle.tile, len(permutations), config.seed).to(device)
    rows = torch.cat([rows, rows[:1]])
    pixels, valid = Pictures(data, config.size, config.workers).batch(rows)
    batch = Batch(rows.to(device), pixels.to(device), valid.to(device), 0)
    make = partial(_puzzles, permutations=permutations.to(device), puzzle=puzzle, seed=config.seed)
    puzzles = make(batch)
    optimiser = loop.sgd(model, config, device)

    def solved(net: nn.Module) -> dict[str, float]:
        return {"share": float((net(puzzles.tiles).argmax(1) == puzzles.label).double().mean())}

    started = time.monotonic()
    for step in range(OVERFIT_STEPS):
        model.train()
        torch.manual_seed(rng.torch_seed(config.seed, "overfit", step))
        for group in optimiser.param_groups:
            group["lr"] = config.lr * loop.rate(step, OVERFIT_STEPS, config)
        with loop.autocast(config, device):
            value, _ = _loss(model, batch, make)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        if step % 5 == 4:
            share = loop.evaluated(model, solved)["share"]
            say(f"overfit: step {step + 1}, loss {value.item():.3f}, solved {share:.0%}")
            if share == 1:
                seconds = time.monotonic() - started
                say(f"overfit: all {len(puzzles.label)} puzzles solved after {seconds:.0f} s: it can learn")
                return
    raise StageError(f"overfit: not all puzzles solved in {OVERFIT_STEPS} steps; try another --lr or --arch vgg16_bn")
