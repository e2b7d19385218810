"""`ktransfer demo`: the whole chain on the embedded data set, and the table that it is all for.

It does what a user's commands would do, and shows them.
"""

from pathlib import Path
from typing import Any

import click

from ktransfer.config import in_words
from ktransfer.plan import Plan, carry_out_line, plan_line
from ktransfer.progress import say
from ktransfer.run import read_record

SIZE = 96
CLUSTERS = 50

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
    done: list[Plan] = []
    for run, stage, options in line:
        say(f"\n$ {in_words(run, stage, options)}")
        planned = plan_line([(stage, options)], run)
        carry_out_line(planned)
        done += planned
    click.echo("\n".join(_times(done)))


def _times(done: list[Plan]) -> list[str]:
    rows = ["", f"{'stage':24} {'seconds':>8}  files"]
    total = 0.0
    for plan in done:
        folder = plan.run / plan.folder
        records = [read_record(plan.run, plan.folder, step.name) for step in plan.steps]
        seconds = sum(record["seconds"] for record in records if record)
        total += seconds
        files = ", ".join(str(folder / name) for record in records if record for name in record["outputs"])
        rows.append(f"{plan.run.name + ' ' + plan.stage:24} {seconds:8.1f}  {files}")
    return [*rows, f"{'total':24} {total:8.1f}"]
