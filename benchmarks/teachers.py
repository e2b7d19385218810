"""What comes across from several teachers at equal budget, beside true labels: a table of docs/results.md.

Run as `python benchmarks/teachers.py [--data DIR] [--out RUNS] [--quick]`; DIR holds train/ and val/. Killed and given
again, it goes on.

Every task trains the same AlexNet (half width) on the same images for the same number of epochs; `random-cc` is that
network before any training, `hog` and `pixels` have nothing to train. Their features of the training part are clustered
into 200, and the same smaller AlexNet learns each clustering from the same crops. One call of `eval` evaluates all.
"""

import argparse
from pathlib import Path

from ktransfer import networks
from ktransfer.cluster import assign, cluster, extract
from ktransfer.eval import evaluate
from ktransfer.networks import Network
from ktransfer.pretext import pretext
from ktransfer.retrain import retrain

TASKS = ("jigsawpp", "jigsaw", "rotation", "context")
TEACHER = {"arch": "alexnet_bn", "width": 0.5, "epochs": 40, "batch": 128, "lr": 0.05}
TARGET = {"arch": "alexnet_bn", "width": 0.25, "stride": 2, "size": 80, "batch": 64, "lr": 0.05, "crop": 0.3}
PERMUTATIONS = 100
CLUSTERS = 200


def random_teacher(path: Path, size: int) -> Path:
    """The network of the tasks before its training."""
    network = Network(str(TEACHER["arch"]), float(str(TEACHER["width"])), 2, size, 0, "picture", "random")
    networks.save(path, networks.build(network, 0, "teacher").state_dict(), network)
    return path


def run_all(data: str, out: Path, epochs: dict[str, int]) -> None:
    """Every teacher through `pretext` (or none), `extract`, `cluster`, `assign` and `retrain`, then one table."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*TASKS, "random-cc", "hog", "pixels", "classes"):
        run = out / name
        if name == "classes":
            retrain(run, data=data, labels="classes", epochs=epochs["retrain"], **TARGET)
            continue
        if name in TASKS:
            puzzles = {"permutations": PERMUTATIONS} if name.startswith("jigsaw") else {}
            pretext(run, data=data, task=name, **TEACHER | puzzles | {"epochs": epochs["pretext"]})
            extract(run)
        else:
            size = networks.describe(out / "jigsawpp" / "pretext" / "model.safetensors").size
            teacher = str(random_teacher(out / "random.safetensors", size)) if name == "random-cc" else name
            extract(run, data=data, teacher=teacher)
        cluster(run, k=CLUSTERS)
        assign(run)
        retrain(run, epochs=epochs["retrain"], **TARGET)
    beside = ",".join(str(out / name) for name in (*TASKS[1:], "random-cc", "hog", "pixels", "classes"))
    evaluate(out / "jigsawpp", labelled=data, beside=beside, epochs=epochs["eval"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes:images=600,size=64")
    parser.add_argument("--out", type=Path, default=Path("runs/teachers"))
    parser.add_argument("--quick", action="store_true", help="one epoch of each")
    given = parser.parse_args()
    quick = {"pretext": 1, "retrain": 1, "eval": 1}
    run_all(given.data, given.out, quick if given.quick else {"pretext": 40, "retrain": 40, "eval": 30})
