"""What a protocol says of one network."""

from typing import Any, NotRequired, TypedDict


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
