"""Self-training: a teacher learns the labelled images, labels others, and a student learns both.

After Zoph et al. (docs/papers.md). Three steps, each resumable, with files between them,

    selftrain/teacher/model.safetensors  selftrain/pseudo.json  selftrain/student/model.safetensors

and a fourth that evaluates both (selftrain/scores.json). What differs between boxes and masks is in `tasks.Task`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer import files, progress, tables
from ktransfer.config import build
from ktransfer.data.dataset import check_broken
from ktransfer.data.duplicates import tell_shared
from ktransfer.data.enough import need
from ktransfer.data.loader import cache_place, readable
from ktransfer.data.opening import open_dataset
from ktransfer.detection import canvas, saved
from ktransfer.detection.data import Detection, fraction, load_ids, subset
from ktransfer.detection.detectors import Settings
from ktransfer.detection.enough import need_boxes, need_pixels
from ktransfer.detection.frames import OBEY
from ktransfer.detection.losses import check_batches
from ktransfer.detection.saved import Described
from ktransfer.detection.strengths import STRENGTHS
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import TRUNKS, Network, check_arch, functions, published, teachers
from ktransfer.networks.descriptors import MODULES
from ktransfer.networks.made import network_of
from ktransfer.networks.zoos import TIMM, TORCHVISION
from ktransfer.plan import Plan, latest
from ktransfer.progress import say, track
from ktransfer.run import input_hash
from ktransfer.training import loop
from ktransfer.training.device import choose_device

from ..config import RATES, SelftrainConfig
from . import boxes, early_stopping, joint, student
from .parts import PARTS, SHEET, STAGE, Data, Work, begun, finish, held_out, show, tested
from .steps import end_of, planned, remove, rounds
from .tasks import TASKS, suited

SHOWN = 8  # images on it
RUN = "run"  # of --init
FEW = 0.2  # of the things in a labelled image: with fewer, students found less than their teachers (results.md)


@dataclass(frozen=True, kw_only=True)
class SelftrainPlan(Plan):
    """What the stage will do: `work` with the settings resolved and the images; `detector` is what it makes."""

    work: Work


def selftrain(run: str | Path, **options: Any) -> Path:
    """Train a teacher, label images with it, train a student on both, and evaluate both on the test part.

    Args:
        run: the run folder; the stage writes below `run/selftrain`.
        options: the fields of `SelftrainConfig`.

    Returns:
        The path of `scores.json`.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: SelftrainPlan) -> Path:
    """Train the teacher, label, train the student, as often as there are rounds, and evaluate all of them."""
    run, work, config = plan.run, plan.work, plan.work.config
    if config.overwrite:
        remove(run, plan.steps)
    weights = [Path(config.teacher) if config.teacher else _train(run, work, "teacher", None)]
    arms = {"teacher": weights[0]}
    for number in rounds(config):
        end = end_of(number)
        pseudo = Path(config.pseudo) if config.pseudo else _label(run, work, weights[-1], end)
        weights.append(_train(run, work, f"student{end}", pseudo))
        arms["student"] = weights[-1]
    if joint.NAME in joint.methods(config):
        arms[joint.NAME] = joint.train(run, work)
    if joint.BOTH in joint.methods(config):
        arms[joint.BOTH] = _train(run, work, joint.BOTH, pseudo)
    return _evaluate(run, work, arms)


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> SelftrainPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(SelftrainConfig, options, STAGE)
    config = replace(config, lr=config.lr or RATES[config.task] * config.batch / 256)
    device = choose_device(config)
    if not config.labelled:
        raise UsageError("selftrain: no images with boxes were given; name them with --labelled")
    if config.pseudo and (config.rounds > 1 or config.adaptive or config.jitter_filter):
        raise UsageError(
            "--pseudo: given boxes are used as they are, for one round; leave --rounds, --adaptive and "
            "--jitter-filter out"
        )
    for name in ("teacher", "pseudo", "ids") if config.overwrite else ():
        given = getattr(config, name)
        if given and Path(given).resolve().is_relative_to((run / STAGE).resolve()):
            raise UsageError(f"--{name} {given}: --overwrite would remove it; copy it to another place first")
    check_batches(config, 2 * config.batch)
    task = TASKS[config.task]
    suited(config)
    whole, test = task.open_data(config.labelled, config.exif)
    if config.ids and config.fraction < 1:
        raise UsageError("--ids: already chooses the labelled images; leave --fraction out")
    rows = load_ids(Path(config.ids), whole) if config.ids else np.arange(len(whole))
    if config.fraction < 1:
        rows = fraction(whole, config.fraction, config.seed, config.stratified)
    left = np.setdiff1d(np.arange(len(whole)), rows)
    labelled = subset(whole, rows)
    if not any((~one.crowd).any() for one in labelled.objects):
        given = "ids" if config.ids else "fraction" if config.fraction < 1 else "labelled"
        raise UsageError(f"--{given} {getattr(config, given)}: no box in {len(rows)} images; give more images")
    early_stopping.rows(labelled, config)
    if not config.unlabelled and not len(left):
        raise UsageError("selftrain: no images for pseudo-boxes; name some with --unlabelled, or give --fraction")
    unlabelled = open_dataset(config.unlabelled, config.exif == OBEY) if config.unlabelled else subset(whole, left)
    task.check(config, len(labelled), len(unlabelled))
    cache_place(config.cache_images, len(labelled) + len(unlabelled), config.size, device)
    described, file, foreign = _detector(run, config, whole.classes, before)
    coming = config.init == RUN and latest(before, "retrain") is not None  # what lies there now will be another one
    saved.make(described, 0, None if coming else file, foreign, coming)  # what does not fit is found here
    if config.teacher:
        held = saved.describe(Path(config.teacher))
        if held.settings.kind not in task.NECKS:
            raise UsageError(
                f"--teacher {config.teacher}: a {held.settings.kind}, and --task {config.task} takes one of "
                f"{', '.join(task.NECKS)}"
            )
        if held.classes != whole.classes:
            raise UsageError(f"--teacher {config.teacher}: has other classes than {config.labelled}")
        if held.exif != config.exif:
            raise UsageError(f"--teacher {config.teacher}: learned with --exif {held.exif}; give the same")
    if config.pseudo:
        # The file is what is checked, and images are not read.
        any_size = np.full((len(unlabelled), 2), boxes.ANY, np.int32)
        task.read(Path(config.pseudo), boxes.without_boxes(unlabelled, labelled, any_size), labelled, config)
    joint.check(config, unlabelled)
    evaluating = boxes.shared(labelled, test)
    if len(evaluating):
        raise UsageError(
            f"--labelled {config.labelled}: {len(evaluating)} of its training images are test images too, such as "
            f"{labelled.keys[evaluating[0]]}; give a training and a test set that share none, or leave them out by "
            "--ids"
        )
    flag, masked = f"--size {config.size}", config.task != "detect"
    canvas.look(flag, labelled, config.size, "training", STRENGTHS[config.augment].scales[1], masked)
    canvas.look(flag, test, config.size, "test", None, masked)
    (need_pixels if config.task == "segment" else need_boxes)(labelled, test, config.size)
    need(unlabelled, range(len(unlabelled)), 1, "images without boxes")
    tell_shared(config.labelled, labelled, test)
    data = Data(labelled, unlabelled, test)
    reads = ("retrain",) if config.init == RUN else ()
    steps = [step._replace(reads=reads) for step in planned(config, data, None if coming else file)]
    return SelftrainPlan(
        stage=STAGE,
        run=run,
        steps=steps,
        overwrite=config.overwrite,
        images=labelled,
        detector=described,
        labelled=config.labelled,
        work=Work(config, data, device, {step.name: step for step in steps}, described, file, foreign),
    )


def _train(run: Path, work: Work, name: str, pseudo: Path | None) -> Path:
    """One training: of the teacher on the labelled images, or of a student on these and on pseudo-boxes."""
    config, data, device = work.config, work.data, work.device
    inputs = {"pseudo-boxes": input_hash(pseudo)} if pseudo else {}
    with begun(run, work, name, work.beginning() | inputs, [name, f"{name}.ids.json"]) as step:
        folder, weights = step.folder / name, step.folder / name / "model.safetensors"
        if step.done:
            return weights
        model = work.new_detector()
        how, task = work.detector.network.normalise, TASKS[config.task]
        images, facts = data.labelled, dict[str, Any](labelled=len(data.labelled))
        by_class: dict[str, Any] = {}
        listed = np.empty(0, np.int64)
        if pseudo:
            images, listed, more, by_class = _with_pseudo(config, data, name, pseudo)
            facts |= more
            average = work.new_detector() if config.ema else None
            if name == joint.BOTH:
                model = joint.Both(model, len(data.unlabelled.classes), config.seed, average, config.ema)
            else:
                model = student.Student(model, average, config.ema)
        source = canvas.canvases(images, config.size, config.workers, config.cache_images, device)
        good = readable(source, torch.arange(len(images)), config.max_broken)
        split = len(data.labelled)
        rows, added = good[good < split], good[good >= split]
        rows, evaluating = early_stopping.divided(rows, early_stopping.rows(data.labelled, config))
        if not len(rows) or (pseudo and not len(added)):
            which = "pseudo-labelled" if len(rows) else "labelled"
            raise StageError(f"{name}: none of the {which} images can be read; repair them")
        weighing = student.Weighing(config.balance, config.alpha, config.decay) if pseudo else None
        known, unknown = task.known(images, config, device)
        check_broken(source.broken | unknown, len(images), config.max_broken, images)
        seed = config.seed if name == "teacher" else config.seed + 1
        task.draw(folder / SHEET, data.labelled, known, source, config.augment, seed, rows[:SHOWN])
        batches: Callable[[int], Tensor] = partial(loop.epoch_batches, rows, config.batch, seed)
        if pseudo:
            batches = partial(student.batches, rows, added, config.batch, seed)
        config = replace(config, epochs=student.passes(config, rows, bool(pseudo)))
        loss = task.losses(known, how, config.augment, seed, weighing, split)
        if name == joint.BOTH:
            assert weighing
            told = torch.from_numpy(data.unlabelled.targets[listed]).long().to(device)
            loss = joint.losses_of_both(loss, known.extents, told, how, config.augment, seed, weighing)
        early = early_stopping.stopping(model, data.labelled, source, evaluating, config, device, folder)
        loop.fit(model, loss, source, batches, config, folder, device, name, early)
        facts |= early_stopping.facts(early, evaluating)
        broken = source.broken | unknown
        finish(step, name, data, images, broken, model, work.detector, early, facts, by_class)
        return weights


def _with_pseudo(
    config: SelftrainConfig, data: Data, name: str, pseudo: Path
) -> tuple[Detection, NDArray[np.int64], dict[str, int], dict[str, Any]]:
    """The labelled images and behind them the pseudo-labelled ones that a student learns, these as rows of the
    unlabelled ones, and how much there is.

    Raises:
        StageError: there is nothing in the pseudo-labels.
    """
    task = TASKS[config.task]
    one, several = task.THINGS
    sizes = None if config.pseudo else boxes.stated_sizes(pseudo, data.unlabelled)
    other = boxes.without_boxes(data.unlabelled, data.labelled, sizes)
    other, listed = task.read(pseudo, other, data.labelled, config)
    if config.pseudo:  # a teacher of ours was not shown them
        listed = np.setdiff1d(listed, tested(data, name))
    listed = np.setdiff1d(listed, held_out(config, data, name))
    each = {row: task.count(other, row) for row in track(listed.tolist(), len(listed), "count pseudo-labels")}
    if config.empty == "drop":
        listed = listed[[each[row].any() for row in listed.tolist()]]
    counted = sum(each.values(), np.zeros(len(other.classes), np.int64))
    if not counted.any():
        steady_too = ", raise --jitter-filter" if config.jitter_filter else ""
        raise StageError(
            f"selftrain: no pseudo-{one} reaches the score {config.threshold} in {len(listed)} images; train the "
            f"teacher longer{steady_too}, or lower --threshold, with --overwrite"
        )
    own = np.sum([task.count(data.labelled, row) for row in range(len(data.labelled))], axis=0)
    pairs = {kind: [int(human), int(made)] for kind, human, made in zip(other.classes, own, counted, strict=True)}
    words = ", ".join(f"{kind} {number}" for kind, number in zip(other.classes, counted, strict=True))
    say(f"{name}: {counted.sum()} pseudo-{several} in {len(listed)} images: {words}")
    made, usual = counted.sum() / len(listed), own.sum() / len(data.labelled)
    if config.task != "segment" and made < FEW * usual:  # of masks, what is not sure is ignored, not background
        say(
            f"{name}: only {made:.2g} per image, where labelled images have {usual:.2g}: the student learns all "
            "others as "
            "background; train the teacher longer, lower --threshold, or give --empty drop"
        )
    facts = {"pseudo-labelled": len(listed), f"pseudo-{several}": int(counted.sum())}
    by_class = {f"{several} by class, labelled and pseudo": pairs}
    return student.joined(data.labelled, subset(other, listed)), listed, facts, by_class


def _label(run: Path, work: Work, teacher: Path, end: str) -> Path:
    """What a teacher sees in the unlabelled images, with scores from the threshold on."""
    config, data, device = work.config, work.data, work.device
    name, other, inputs = f"pseudo{end}", data.unlabelled, {"teacher": input_hash(teacher)}
    with begun(run, work, name, inputs, [f"{name}.json", name, f"{name}{PARTS}"]) as step:
        path, parts = step.folder / f"{name}.json", step.folder / f"{name}{PARTS}"
        if step.done:
            return path
        sizes = boxes.kept_sizes(parts / "sizes", other)
        shown = show(teacher, boxes.without_boxes(other, data.labelled, sizes), config, device)
        rows = torch.from_numpy(np.setdiff1d(np.arange(len(other)), tested(data, name)))
        about = {"teacher": inputs["teacher"], "threshold": config.threshold, "size": shown.described.size}
        facts = TASKS[config.task].label(path, shown, rows, about)
        broken = [f"{other.keys[row]}: {reason}" for row, reason in shown.source.broken.items()]
        files.remove(parts)
        step.finish([path], broken=broken, result=facts)
        say(f"{name}: done; {', '.join(f'{number} {what}' for what, number in facts.items())}; {path}")
        return path


def _evaluate(run: Path, work: Work, arms: dict[str, Path]) -> Path:
    """What teacher and student reach on the test part."""
    config, data, device = work.config, work.data, work.device
    with begun(run, work, "scores", {name: input_hash(path) for name, path in arms.items()}, ["scores.json"]) as step:
        path = step.folder / "scores.json"
        if not step.done:
            found: dict[str, Any] = {}
            for name, weights in arms.items():
                shown = show(weights, data.test, config, device)
                found[name] = TASKS[config.task].evaluate(shown, f"evaluate {name}")
            images = {"labelled": len(data.labelled), "test": len(data.test)}
            evaluated = {name: getattr(config, name) for name in TASKS[config.task].EVALUATED}
            files.write_json(path, {"schema": 1, "data": images, **evaluated, "scores": found})
            step.finish([path])
        progress.show(_table(files.read_json(path)))
        return path


def _detector(
    run: Path, config: SelftrainConfig, classes: tuple[str, ...], before: Sequence[Plan]
) -> tuple[Described, Path | None, bool]:
    """What the detector is, the weights that its backbone begins with, and whether those were made elsewhere."""
    network, weights, foreign = _backbone(run, config, before)
    task = TASKS[config.task]
    settings = Settings(
        task.kind(config),
        config.norm,
        config.anchor,
        config.focal_alpha,
        config.focal_gamma,
        config.huber_delta,
        config.huber_weight,
        threshold=config.test_threshold,
    )
    network = replace(network, size=config.size)
    neck = task.NECKS[settings.kind]
    described = Described(network, neck, settings, classes, config.size, config.channels, config.exif)
    return described, weights, foreign


def _backbone(run: Path, config: SelftrainConfig, before: Sequence[Plan]) -> tuple[Network, Path | None, bool]:
    if config.init == "random":
        check_arch(config.backbone, config.width, config.backbone in TRUNKS, "--backbone")
        network = Network(config.backbone, config.width, config.stride, config.size, 0, "imagenet", "random")
        return network, None, False
    if config.init == RUN:
        network, weights = network_of(run, "retrain", before)
        return replace(network, classes=0), weights, False
    if config.init.startswith(TIMM):
        raise UsageError(
            f"--init {config.init}: a name of timm comes without weights; give torchvision:NAME, "
            f"{published.NAMES[0]}, or a checkpoint with --backbone"
        )
    named = config.init.startswith(TORCHVISION) or config.init in (*published.NAMES, *MODULES)
    ours = config.init.endswith(teachers.SAFETENSORS)
    by_name = named or ours or functions.is_name(config.init)
    try:
        found = teachers.find(config.init, None if by_name else config.backbone, None, 0)
    except UsageError as error:
        raise UsageError(str(error).replace("--teacher", "--init")) from error
    if found.weights is None:
        raise UsageError(f"--init {config.init}: has no weights; give a network")
    return replace(found.network, classes=0 if ours else found.network.classes), found.weights, found.foreign


def _table(result: dict[str, Any]) -> str:
    """The measures in per cent with 95 % intervals over resampled images."""
    cells = [
        (arm, name, _with_interval(found[name], *found[f"{name}_interval"]))
        for arm, found in result["scores"].items()
        for name in found
        if f"{name}_interval" in found
    ]
    lines, images = tables.markdown(*tables.crossed("", cells)), result["data"]
    least = f"; scores from {result['test_threshold']} on" if "test_threshold" in result else ""
    return "\n".join(lines) + (f"\n\n{images['labelled']} labelled images, {images['test']} to test{least}.\n")


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
