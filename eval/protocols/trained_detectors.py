"""Detectors that selftrain has trained, evaluated as they are: `detect --trunk finished`.

Protocol `detect/2 finished`: nothing is trained. What the run's `selftrain` made (teacher, student, ...), and that of
the runs beside, is evaluated on the test part of the labelled images that it learned from, or of `--labelled`, on
canvases of its own size, or `--test-scales` of it. Scores from `--threshold` on, non-maximum suppression and measures
as in `detect/2`. A run that holds no other network is evaluated so by default.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ktransfer.data.dataset import check_broken
from ktransfer.detection import canvas, detectors, metrics, saved
from ktransfer.detection.data import Detection
from ktransfer.detection.scales import detect_at
from ktransfer.errors import UsageError
from ktransfer.run import done_record, output_with

from ..arms import Arm, runs_beside
from ..config import EvalConfig
from ..finished import LAST, STAGE, TRUNK, Finished
from ..result import Result
from . import detect

PROTOCOL = "detect/2 finished"
TITLE = detect.TITLE
MEASURES = detect.MEASURES
NOTE = "detectors as selftrain made them; their size, the images and the least score stand in its json."


def check(run: Path, config: EvalConfig, splits: tuple[Detection, Detection], finished: Finished) -> None:
    """Find a missing extra, and detectors that do not exist or have other classes.

    Raises:
        UsageError: one line.
    """
    metrics.need_extra()
    detect.test_scales(config)
    coming = finished.coming and finished.coming.detector
    if coming and coming.settings.kind not in detectors.DETECTORS:
        raise UsageError("--protocol detect: selftrain --task segment makes no detector; leave eval out")
    if config.supervised:
        raise UsageError(
            "--supervised: is not for the detectors of selftrain, which are evaluated as they are; leave it out"
        )
    described = [coming] if coming and finished.labelled != config.labelled else []
    for weights in (arm.weights for arm in arms(run, config, finished.coming is not None)):
        assert weights
        described.append(saved.describe(weights))
        if described[-1].settings.kind not in detectors.DETECTORS:
            kind = described[-1].settings.kind
            raise UsageError(f"{weights}: no detector, but {kind}; --protocol detect needs one")
    for size in sorted({one.size for one in described}):
        canvas.look(f"--size {size} of selftrain", splits[1], size, "test", None)
    for classes in (one.classes for one in described):
        if splits[1].classes != classes:
            raise UsageError(
                f"--labelled {config.labelled}: has other classes than the detectors ({', '.join(classes[:5])}, ...); "
                "name images with these classes"
            )


def arms(run: Path, config: EvalConfig, coming: bool = False) -> list[Arm]:
    """The detectors that the scores of selftrain are about, of the run and of those beside.

    Args:
        coming: those of the run are still to be made, and left out.

    Raises:
        UsageError: a selftrain is not finished, its files are gone, or two runs have the same name.
    """
    found: dict[str, Arm] = {}
    for place in [run, *runs_beside(config)]:
        if coming and place == run:
            continue
        record = done_record(place, STAGE, LAST, STAGE)
        given = [Path(record["config"]["teacher"])] if record["config"].get("teacher") else []
        for name, digest in record["inputs"].items():
            if name == "test":
                continue
            full = name if place == run else f"{place.resolve().name} {name}"
            if full in found:
                raise UsageError(f"--beside {place}: a second run named '{place.resolve().name}'; rename its folder")
            weights = output_with(place, STAGE, digest, given)
            if weights is None:
                raise UsageError(
                    f"--run {place}: its {name} is missing or was changed; make it again: ktransfer --run {place} "
                    f"{STAGE}"
                )
            network = replace(saved.describe(weights).network, task="detector")
            found[full] = Arm(full, network, weights)
    return list(found.values())


def evaluate(
    arm: Arm, splits: tuple[Detection, Detection], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """What one detector finds in the test part."""
    test = splits[1]
    assert arm.weights
    model, described = saved.load(arm.weights)
    source = canvas.canvases(test, described.size, config.workers, cache="off")
    predicting = replace(described.settings, threshold=config.threshold)
    rows = torch.arange(len(test))
    at, label = detect.test_scales(config), f"detect {arm.name}"
    found, broken = detect_at(model.to(device), test, source, rows, described.size, predicting, device, at, label)
    check_broken(broken, len(rows), config.max_broken, test)
    about = {"threshold": config.threshold, "size": described.size, "detector": described.settings.kind}
    return {
        "task": arm.network.task,
        "arch": arm.network.arch,
        "width": arm.network.width,
        "scores": {TRUNK: metrics.scores(test, found, config.seed) | about},
        "broken": [f"{test.name}/{test.keys[row]}: {why}" for row, why in sorted(broken.items())],
    }
