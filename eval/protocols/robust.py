"""How much a linear probe on a frozen network keeps where images or labels get worse.

Protocol `robust/2` (docs/papers.md). The classifier: one linear layer on the maps of one layer, learned
as in `linear` but with fewer epochs; layer and learning rate are the best on a tenth of the training split, which the
heads do not learn from. Then, on `--robust-images` of the test split, drawn by the seed, the same for all networks,
their centre squares:

top1         of the classifier; its expected calibration error (15 bins of equal width).
corruptions  15 kinds x 5 severities (corruptions.py), uint8, at the network's input size: mean accuracy, by severity
             and by kind; mCE: the mean over kinds of errors / errors of the table's first row.
pgd          L-infinity, untargeted, `--robust-steps` steps of 2.5 eps / steps, random start, all of `--robust-eps`.
noise        the classifier trained again, same layer and rate, on labels of which a share is drawn again among all
             classes (uniform), or moved to the next class (pair); what is touched stays so at larger shares.

Intervals: Wilson's for accuracies of one prediction an image; normal over images for means over corruptions; bootstrap
over images for calibration and mCE.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktransfer import files, networks, rng
from ktransfer.data.augment import centre_crop, stored_side
from ktransfer.data.dataset import Dataset, check_broken
from ktransfer.data.enough import TEST, need
from ktransfer.data.loader import ImageLoader, reasons
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.number_list import number_list
from ktransfer.progress import bar
from ktransfer.run import need_disk

from ..arms import Arm
from ..attack import pgd
from ..bootstrap import Places, with_intervals
from ..config import EvalConfig
from ..corruptions import KINDS, SEVERITIES, severities
from ..enough import held_out
from ..intervals import mean_of, share_of
from ..learners.classifier import HELD_OUT, KINDS_OF_NOISE, Classifier, choose, learn_from_noise, prepare
from ..learners.maps import FORWARD_BATCH, choose_layers, map_bytes
from ..result import Result, broken_lines, result_of
from .linear import rates

PROTOCOL = "robust/2"
TITLE = "robustness"
MEASURES = {
    "top1": "top-1 %",
    "mce": "mean corruption error, % of that of the first row",
    "ece": "expected calibration error %",
    "by_severity": "top-1 % by severity of corruption",
    "by_kind": "top-1 % by kind of corruption",
    "by_eps": "top-1 % under attack within eps / 255",
    "by_noise": "top-1 % by share of wrong training labels",
}
LOWER_IS_BETTER = ("mce", "ece")
RELATIVE = ("mce",)
BINS = 15


def check(evaluated: list[Network], splits: tuple[Dataset, Dataset], config: EvalConfig, run: Path) -> None:
    """Find wrong rates, layers, radii and shares, and maps that need more disk than there is.

    Raises:
        UsageError: one line.
    """
    rates(config)
    number_list("--robust-eps", config.robust_eps, 0, 255, "0.5,1,2")
    number_list("--robust-noise", config.robust_noise, 0, 1, "0.2,0.4")
    for network in evaluated:
        layers = choose_layers(networks.build(network, 0, "check"), network, config.layers)
        needed = map_bytes(layers, (splits[0], splits[0]), config) // 3 * 2
        if needed > config.cache * 1e9:
            raise UsageError(
                f"--cache {config.cache:g}: robust keeps the feature maps of {len(layers)} layers, {needed / 1e9:.3g} "
                "GB; "
                "name fewer with --layers, or give a larger --cache"
            )
        need_disk(run, needed, "eval")


def enough(splits: tuple[Dataset, Dataset], config: EvalConfig) -> None:
    """Find images that cannot be read, where none are left to choose or to judge by.

    Raises:
        UsageError: one line.
    """
    held_out(splits, config, HELD_OUT)
    need(splits[1], _drawn(splits[1], config).numpy(), 1, f"{TEST} that are drawn")


def evaluate(
    arm: Arm, splits: tuple[Dataset, Dataset], config: EvalConfig, folder: Path, device: torch.device
) -> Result:
    """Evaluate one network; killed, it goes on.

    Args:
        splits: the training split and the test split.
        folder: for what is written on the way.

    Returns:
        `Result`; beside it `hits`, for `relate`: by kind of corruption, how many severities of each image were right.
    """
    train, test = splits
    training = prepare(arm, train, config, folder, device)
    chosen = choose(training)
    noisy = learn_from_noise(training, chosen, _shares(config))
    classifier = Classifier(training, chosen.layer, [chosen.head, noisy]).to(device)
    columns = [f"{kind} {share:g}" for kind in KINDS_OF_NOISE for share in _shares(config)]

    rows = _drawn(test, config)
    side = stored_side(arm.network.size)
    images = ImageLoader(test, side, config.workers, cache="off")
    outcomes: list[dict[str, Any]] = []
    sweep = number_list("--robust-eps", config.robust_eps, 0, 255, "0.5,1,2")
    work = 1 + len(KINDS) * SEVERITIES + len(sweep) * 3 * config.robust_steps
    with bar(len(rows) * work, f"robustness of {arm.name}", "views") as shown:
        batches = images.batches(iter(rows.split(FORWARD_BATCH)))
        for number, (part, pixels, valid, _) in enumerate(batches):
            kept = folder / f"outcomes-{number:06d}.json"
            if not valid.any():
                shown.update(len(part) * work)
                continue
            if not kept.is_file():
                squares = centre_crop(pixels[valid], arm.network.size).to(device)
                wanted = torch.from_numpy(test.targets)[part[valid]].long().to(device)
                files.write_json(kept, _outcomes(classifier, squares, wanted, part[valid].to(device), sweep, config))
            outcomes.append(files.read_json(kept))
            shown.update(len(part) * work)
    check_broken(images.broken, len(rows), config.max_broken, test)

    hits = {
        kind: np.concatenate([np.array(one["kinds"][kind]).reshape(-1, SEVERITIES) for one in outcomes])
        for kind in KINDS
    }
    cells = _cells(outcomes, hits, columns, sweep, config.seed)
    cells["clean"] |= {"layer": chosen.layer.name, "lr": chosen.rate, "held_out": round(chosen.held_out, 4)}
    # Images of one name and key in both splits are listed once.
    lines = broken_lines(train, reasons(train, training.views[0].valid, side)) + broken_lines(test, images.broken)
    found = result_of(arm.network, cells, list(dict.fromkeys(lines)))
    found["hits"] = {kind: hits[kind].sum(axis=1).tolist() for kind in KINDS}
    return found


def relate(evaluated: dict[str, dict[str, Any]], config: EvalConfig) -> None:
    """Add to each network the mean corruption error relative to the first one, on the same images.

    Args:
        evaluated: arm -> what `evaluate` made; `hits` is taken out.
    """
    wrong = {name: SEVERITIES - np.array(list(one.pop("hits").values())) for name, one in evaluated.items()}
    reference = next(iter(wrong.values()))
    for name, one in evaluated.items():

        def measure(places: Places, mine: NDArray[np.int64] = wrong[name]) -> dict[str, float]:
            theirs = reference[:, places].sum(axis=1)
            return {"mce": float((mine[:, places].sum(axis=1) / np.maximum(theirs, 1)).mean())}

        one["scores"]["corrupted"] |= with_intervals(measure, reference.shape[1], config.seed, high=np.inf)
        one["scores"]["corrupted"]["mce_reference"] = next(iter(evaluated))


def expected_calibration_error(confidence: NDArray[np.float64], hit: NDArray[np.bool_], bins: int = BINS) -> float:
    """The mean distance of confidence and accuracy over bins of equal width, weighted by images (Guo et al. 2017).

    Args:
        confidence: (m,) in 0..1, of the predictions given.
        hit: (m,), whether they were right.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    total = np.bincount(place, confidence, bins) - np.bincount(place, hit.astype(np.float64), bins)
    return float(np.abs(total).sum() / len(hit))


def _outcomes(
    classifier: Classifier, pixels: Tensor, wanted: Tensor, rows: Tensor, sweep: list[float], config: EvalConfig
) -> dict[str, Any]:
    """What the classifier predicts for some images, as lists with one entry an image."""
    kinds: dict[str, list[list[bool]]] = {}
    with torch.no_grad():
        first, *noisy = classifier.heads(pixels.float())
        confidence, prediction = first.softmax(1).max(1)
        for kind in KINDS:
            worse = severities(kind, pixels, rows, config.seed)
            kinds[kind] = torch.stack([classifier(each.float()).argmax(1) == wanted for each in worse], 1).tolist()
    attacked = []
    for eps in sweep:
        found = pgd(classifier, pixels, wanted, rows, eps, config.robust_steps, config.seed)
        with torch.no_grad():
            attacked.append((classifier(found).argmax(1) == wanted).tolist())
    return {
        "wanted": wanted.tolist(),
        "prediction": prediction.tolist(),
        "confidence": confidence.tolist(),
        "noisy": [(logits.argmax(1) == wanted).tolist() for logits in noisy],
        "kinds": kinds,
        "attacked": attacked,
    }


def _cells(
    outcomes: list[dict[str, Any]], hits: dict[str, NDArray[Any]], columns: list[str], sweep: list[float], seed: int
) -> dict[str, dict[str, Any]]:
    """The scores, by column."""
    wanted, prediction = (
        np.concatenate([one[name] for one in outcomes]).astype(np.int64) for name in ("wanted", "prediction")
    )
    hit = wanted == prediction
    confidence = np.concatenate([one["confidence"] for one in outcomes])

    def calibration(places: Places) -> dict[str, float]:
        return {"ece": expected_calibration_error(confidence[places], hit[places])}

    every = np.stack(list(hits.values()), axis=1)  # (images, kinds, severities)
    cells: dict[str, dict[str, Any]] = {
        "clean": {
            "images": len(hit),
            **share_of("top1", hit),
            **with_intervals(calibration, len(hit), seed),
        },
        "corrupted": _mean("top1", every),
    }
    cells |= {f"severity {level + 1}": _mean("by_severity", every[:, :, level]) for level in range(SEVERITIES)}
    cells |= {kind.replace("_", " "): _mean("by_kind", hits[kind]) for kind in KINDS}
    attacked = [np.concatenate([one["attacked"][place] for one in outcomes]) for place in range(len(sweep))]
    cells |= {f"eps {eps:g}": share_of("by_eps", each) for eps, each in zip(sweep, attacked, strict=True)}
    noisy = [np.concatenate([one["noisy"][place] for one in outcomes]) for place in range(len(columns))]
    return cells | {column: share_of("by_noise", each) for column, each in zip(columns, noisy, strict=True)}


def _mean(measure: str, hit: NDArray[Any]) -> dict[str, Any]:
    """The mean over (m, ...) predictions to m images, with a normal interval over the images."""
    return mean_of(measure, hit.reshape(len(hit), -1).mean(axis=1))


def _drawn(test: Dataset, config: EvalConfig) -> Tensor:
    """(m,) int64 rows of the test images that are shown worse, rising."""
    order = rng.words(config.seed, "eval/robust", 0, torch.arange(len(test)), 1)[:, 0].argsort(stable=True)
    return order[: config.robust_images or len(test)].sort().values


def _shares(config: EvalConfig) -> list[float]:
    return number_list("--robust-noise", config.robust_noise, 0, 1, "0.2,0.4")
