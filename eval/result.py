"""What a protocol says of one network."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from ktransfer.data.dataset import Dataset
from ktransfer.networks import Network


class Result(TypedDict):
    """What a protocol says of one network.

    Attributes:
        scores: column of the table (a layer, a number of labels, ...) -> {measure: value, measure + "_interval": [low,
            high] of the 95 % interval, and whatever else belongs to it}. Shares lie in 0..1.
        broken: images that could not be read, with the reason.
        files: images that were drawn, names below the folder of the protocol in the run's eval/.
        hits: what `relate` needs, and takes out.
    """

    task: str
    arch: str
    width: float
    scores: dict[str, dict[str, Any]]
    broken: list[str]
    files: NotRequired[list[str]]
    hits: NotRequired[dict[str, list[int]]]


def result_of(network: Network, scores: dict[str, dict[str, Any]], broken: list[str]) -> Result:
    """The result of a network, as far as all protocols have it."""
    return {"task": network.task, "arch": network.arch, "width": network.width, "scores": scores, "broken": broken}


def broken_lines(data: Dataset, broken: Mapping[int, str]) -> list[str]:
    """Row and reason of images that could not be read, as lines of a result in the order of the rows."""
    return [f"{data.name}/{data.keys[row]}: {reason}" for row, reason in sorted(broken.items())]
