"""Several repetitions of one evaluation as one: means, and how far they lie apart."""

import statistics
from typing import Any


def merged(repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    """What several seeds say of one network (`Result`, without `broken` and `files`), as one of the same form.

    Measures and both ends of their intervals are means; `MEASURE_deviation` is the standard deviation over the seeds
    (n - 1) and `MEASURE_seeds` lists them. What belongs to no measure is from the first. One alone stays as it is.
    """
    first = repetitions[0]
    if len(repetitions) == 1:
        return first
    scores: dict[str, Any] = {}
    for column, of_first in first["scores"].items():
        cell = dict(of_first)
        for measure in [name.removesuffix("_interval") for name in of_first if name.endswith("_interval")]:
            values = [one["scores"][column][measure] for one in repetitions]
            ends = [one["scores"][column][f"{measure}_interval"] for one in repetitions]
            cell[measure] = statistics.fmean(values)
            cell[f"{measure}_interval"] = [statistics.fmean(side) for side in zip(*ends, strict=True)]
            cell[f"{measure}_deviation"] = statistics.stdev(values)
            cell[f"{measure}_seeds"] = values
        scores[column] = cell
    return first | {"scores": scores}
