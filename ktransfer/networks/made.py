"""The network that a stage of a run has made, or will make where it comes before in a line."""

from collections.abc import Sequence
from pathlib import Path

from ktransfer.networks.network import Network, describe
from ktransfer.plan import Plan, latest
from ktransfer.run import done_record


def network_of(run: Path, stage: str, before: Sequence[Plan] = ()) -> tuple[Network, Path]:
    """What a stage will make in the same line, else has made; and where its weights lie.

    Raises:
        UsageError: it is not made.
    """
    coming = latest(before, stage)
    if coming and coming.network and coming.weights:
        return coming.network, coming.weights
    done_record(run, stage, stage, stage)
    path = run / stage / "model.safetensors"
    return describe(path), path
