"""The networks that are evaluated side by side: the run's own, those of other runs, random weights, and true labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.networks.made import network_of
from ktransfer.plan import Plan, latest
from ktransfer.run import read_record

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


class Trained(NamedTuple):
    """The last network of a run, made or still to be made.

    Attributes:
        run: the run folder.
        stage: that makes it.
        weights: where it lies.
        network: what it is; how many classes it has may be known only when it is made.
        images: those that the run learned from, where it has learned already.
    """

    run: Path
    stage: str
    weights: Path
    network: Network
    images: str | None

    def made(self) -> "Trained":
        """The same as its weights, by now there, say it."""
        return self._replace(network=networks.describe(self.weights))


def last_network(run: Path, before: Sequence[Plan] = ()) -> Trained:
    """The last network that the stages before in the same line will make, else that the run has made.

    Raises:
        UsageError: there is none, or it is not finished.
    """
    pretext, retrain = (read_record(run, stage, name) for stage, name in reversed(FINAL))
    first = pretext or retrain
    images = first["config"].get("data") if first else None
    coming = latest(before, "retrain") or (None if retrain else latest(before, "pretext"))
    if coming and coming.network and coming.weights:
        return Trained(run, coming.stage, coming.weights, coming.network, images)
    if not first:
        raise UsageError(f"--run {run}: holds no trained network; make one first: ktransfer --run {run} pretext")
    stage = "retrain" if retrain else "pretext"
    network, weights = network_of(run, stage)
    return Trained(run, stage, weights, network, images)


def runs_beside(config: EvalConfig) -> list[Path]:
    """The run folders of `--beside`."""
    return [Path(part.strip()) for part in (config.beside or "").split(",") if part.strip()]


def trained_networks(run: Path, config: EvalConfig, before: Sequence[Plan] = ()) -> list[Trained]:
    """The last network of the run, and those of the runs beside.

    Raises:
        UsageError: a run holds no finished network.
    """
    return [last_network(run, before), *(last_network(place) for place in runs_beside(config))]


def find_arms(trained: Sequence[Trained], config: EvalConfig) -> list[Arm]:
    """Random weights, the networks of the run itself and of those beside, and with `--supervised` the one that learns
    the true labels (whose weights may be still to be made).

    Raises:
        UsageError: two have the same name.
    """
    found: list[Arm] = []
    for one in trained:
        name = one.run.resolve().name
        if name in (arm.name for arm in found):
            raise UsageError(f"--beside {one.run}: a second run named '{name}'; rename its folder")
        network = resized(one.network, config.size, config.stride)
        found.append(Arm(name, network, one.weights, _whole(one.network, config)))
    own = found[0]
    if config.random:
        if RANDOM in (arm.name for arm in found):
            raise UsageError(f"eval: a run named '{RANDOM}' beside random weights; rename its folder, or --no-random")
        whole = own.whole and replace(own.whole, task="random")
        found.insert(0, Arm(RANDOM, replace(own.network, task="random"), None, whole))
    if config.supervised:
        if SUPERVISED in (arm.name for arm in found):
            raise UsageError(f"eval: a run named '{SUPERVISED}' beside --supervised; rename its folder")
        weights = trained[0].run / "eval" / LEARNED
        described = networks.describe(weights) if weights.is_file() else own.network
        network = replace(resized(described, config.size, config.stride), task="classes")
        found.append(Arm(SUPERVISED, network, weights, _whole(described, config)))
    return found


def _whole(described: Network, config: EvalConfig) -> Network | None:
    """See `Arm`."""
    fits = (described.size, described.stride) == (config.size, config.stride)
    return described if fits and networks.trunk(described) != described else None


def resized(network: Network, size: int, stride: int) -> Network:
    """The network as it is evaluated: on images of `size`, an AlexNet with `stride`."""
    return networks.trunk(replace(network, size=size, stride=stride))


def model_of(arm: Arm, seed: int) -> nn.Module:
    """The network of an arm on the CPU; fresh weights are a function of the seed."""
    if arm.weights is None:
        return networks.build(arm.network, seed, "eval/random")
    return networks.load(arm.weights, arm.network)
