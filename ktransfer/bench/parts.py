"""What `ktransfer bench PART` calls."""

from pathlib import Path
from typing import Any

from ktransfer.bench import measure, rounds
from ktransfer.errors import UsageError

PREDICT = "predict"
READ = ("arch", "width", "size", "batch", "device", "seconds")


def measured(part: str, model: str | None, out: Path | None, **given: Any) -> str:
    """The table of one part; `given` is what the command line gives.

    Raises:
        UsageError: it cannot be done, or nothing reads what was given.
    """
    if part != PREDICT:
        if model:
            raise UsageError(f"bench {part}: --model is read by predict alone; leave it out")
        return measure.command(part, out=out, **given)
    if given["data"]:
        raise UsageError("bench predict: --data is not read, as random pixels are computed; leave it out")
    return rounds.command(model, out=out, **{name: given[name] for name in READ})
