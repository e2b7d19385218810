"""`ktransfer demo`: the whole chain on the embedded data set, and the table that it is all for.

It does what a user's commands would do, and shows them.
"""

from pathlib import Path
from typing import Any

import click

from ktransfer.config import in_words
from ktransfer.progress import say
from ktransfer.run import FOLDERS, read_record
from ktransfer.stages import function

SIZE = 96
CLUSTERS = 50

STEPS = {"extract": "scenes", "eval": "linear"}  # in stage.json; those of the other stages have the stage's name
PUZZLE = {"permutations": 100, "epochs": 30, "batch": 64, "lr": 0.05}
TARGET: dict[str, Any] = {"arch": "alexnet_bn", "width": 0.5}
LEARN = {"stride": 2, "size": 80, "batch": 64, "lr": 0.05, "epochs": 20, "crop": 0.3}

PROBE = {"epochs": 20}


def run_demo(out: Path, images: int = 2000) -> None:
    """Run every stage for four networks in three runs below `out`, then print times, paths and the table.

    Args:
        out: folder of the runs `transfer`, `direct` and `supervised`; an interrupted demo goes on there.
        images: images of the training part, more than CLUSTERS.

    Raises:
        UsageError, StageError: as the stages do.
    """
    data = f"scenes:images={images},size={SIZE}"
    transfer, direct, supervised = (out / name for name in ("transfer", "direct", "supervised"))
    line: list[tuple[Path, str, dict[str, Any]]] = [
        (transfer, "pretext", {"data": data, "arch": "vgg16_bn", "width": 0.25} | PUZZLE),
        (transfer, "extract", {}),
        (transfer, "cluster", {"k": CLUSTERS}),
        (transfer, "assign", {}),
        (transfer, "retrain", TARGET | LEARN),
        (direct, "pretext", {"data": data} | TARGET | PUZZLE),
        (supervised, "retrain", {"data": data, "labels": "classes"} | TARGET | LEARN),
        (transfer, "eval", {"labelled": data, "beside": f"{direct},{supervised}"} | PROBE),
    ]
    for run, stage, options in line:
        say(f"\n$ {in_words(run, stage, options)}")
        function(stage)(run, **options)
    click.echo("\n".join(_times(line)))


def _times(line: list[tuple[Path, str, dict[str, Any]]]) -> list[str]:
    rows = ["", f"{'stage':24} {'seconds':>8}  files"]
    total = 0.0
    for run, stage, _ in line:
        folder = FOLDERS[stage]
        record = read_record(run, folder, STEPS.get(stage, stage))
        assert record is not None
        total += record["seconds"]
        files = ", ".join(str(run / folder / name) for name in record["outputs"])
        rows.append(f"{run.name + ' ' + stage:24} {record['seconds']:8.1f}  {files}")
    return [*rows, f"{'together':24} {total:8.1f}"]
