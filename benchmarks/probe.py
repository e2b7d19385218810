"""Five layers probed in one pass beside five runs of one layer each.

Run as `python benchmarks/probe.py [--images N] [--epochs N] [--rounds N] [--json FILE]`, on a quiet machine.

An AlexNet with random weights is evaluated by the protocol linear/1, four learning rates a layer, on the embedded data
set: conv1..conv5 together, and each of them in a run of its own. Both decode, mirror and probe in the same way.

kept      maps of all images are kept on disk, so that each run computes them once
anew      maps are computed anew in each epoch, as in the frameworks of the field, where a run is one layer too

Ways take turns; what is printed are medians over the rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from ktransfer.data.opening import open_splits
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.learners.maps import GRIDS
from ktransfer.eval.protocols.linear import evaluate
from ktransfer.networks import Network

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    parts = open_splits(f"scenes:images={options.images},size={options.size}")
    arm = Arm("random", Network("alexnet", size=options.size * 7 // 8 // 8 * 8), None)
    base = EvalConfig(epochs=options.epochs, batch=64, weight_decay=1e-4, lrs="0.0003,0.001,0.003,0.01")
    names = list(GRIDS)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        for turn in range(options.rounds + 1):
            for way, cache in (("kept", base.cache), ("anew", 0.0)):
                for label, runs in (("together", [",".join(names)]), ("one by one", names)):
                    began = time.perf_counter()
                    for layers in runs:
                        evaluate(arm, parts, replace(base, layers=layers, cache=cache), Path(work) / "run", CPU)
                    if turn:  # the first one warms up
                        seconds.setdefault(f"{way}, {label}", []).append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for way in ("kept", "anew"):
        together, apart = medians[f"{way}, together"], medians[f"{way}, one by one"]
        print(f"maps {way}: together {together:.2f} s, one by one {apart:.2f} s: {apart / together:.2f} times as long")
    if options.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "images": options.images}
        facts |= {"size": options.size, "epochs": options.epochs}
        options.json.write_text(json.dumps({"facts": facts, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
