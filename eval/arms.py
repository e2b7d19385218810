"""The networks that are evaluated side by side: the run's own, those of other runs, random weights, and true labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.plan import Plan, latest
from ktransfer.run import done_record, read_record

from .config import EvalConfig

RANDOM = "random"
SUPERVISED = "supervised"
LEARNED = f"{SUPERVISED}/model.safetensors"
"""Below run/eval: the weights that learned the true labels (supervised.py)."""
FINAL = (("retrain", "retrain"), ("pretext", "pretext"))


@dataclass(frozen=True)
class Arm:
    """One network to be evaluated: its own weights, or fresh ones where `weights` is None.

    `whole` is an AlexNet with the classifier that its weights hold, where it is evaluated on images of the size and
    with the stride that this was trained for.
    """

    name: str
    network: Network
    weights: Path | None
    whole: Network | None = None


def find_arms(run: Path, config: EvalConfig, coming: Network | None = None) -> list[Arm]:
    """Random weights, the run's own network (`coming` where it is still to be made), those of the runs beside, and with
    `--supervised` the one that learns the true labels (whose weights may be still to be made).

    Raises:
        UsageError: a run holds no finished network, or two have the same name.
    """
    runs = [run] + [Path(part.strip()) for part in (config.beside or "").split(",") if part.strip()]
    found: list[Arm] = []
    for place in runs:
        mine = coming if place == run else None
        weights = run / "to come" if mine else final_network(place)
        described = mine or networks.describe(weights)
        network = resized(described, config.size, config.stride)
        name = place.resolve().name
        if name in (arm.name for arm in found):
            raise UsageError(f"--beside {place}: a second run named '{name}'; rename its folder")
        found.append(Arm(name, network, weights, _whole(described, config)))
    own = found[0]
    if config.random:
        if RANDOM in (arm.name for arm in found):
            raise UsageError(f"eval: a run named '{RANDOM}' beside random weights; rename its folder, or --no-random")
        whole = own.whole and replace(own.whole, task="random")
        found.insert(0, Arm(RANDOM, replace(own.network, task="random"), None, whole))
    if config.supervised:
        if SUPERVISED in (arm.name for arm in found):
            raise UsageError(f"eval: a run named '{SUPERVISED}' beside --supervised; rename its folder")
        weights = run / "eval" / LEARNED
        described = networks.describe(weights) if weights.is_file() else own.network
        network = replace(resized(described, config.size, config.stride), task="classes")
        found.append(Arm(SUPERVISED, network, weights, _whole(described, config)))
    return found


def _whole(described: Network, config: EvalConfig) -> Network | None:
    """See `Arm`."""
    fits = (described.size, described.stride) == (config.size, config.stride)
    return described if fits and networks.trunk(described) != described else None


def final_network(run: Path) -> Path:
    """The weights of the last network that a run made.

    Raises:
        UsageError: there is none, or it is not finished.
    """
    for stage, name in FINAL:
        if read_record(run, stage, name):
            done_record(run, stage, name, stage)
            return run / stage / "model.safetensors"
    raise UsageError(f"--run {run}: holds no trained network; make one first: ktransfer --run {run} pretext")


def coming_network(run: Path, before: Sequence[Plan]) -> Network | None:
    """The final network that the stages before in the same line will make, if they do."""
    made = latest(before, "retrain")
    if made is None and not read_record(run, "retrain", "retrain"):
        made = latest(before, "pretext")
    return made.network if made else None


def resized(network: Network, size: int, stride: int) -> Network:
    """The network as it is evaluated: on images of `size`, an AlexNet with `stride`."""
    return networks.trunk(replace(network, size=size, stride=stride))


def model_of(arm: Arm, seed: int) -> nn.Module:
    """The network of an arm on the CPU; fresh weights are a function of the seed."""
    if arm.weights is None:
        return networks.build(arm.network, seed, "eval/random")
    return networks.load(arm.weights, arm.network)
