"""What is tortured: a tiny run of each stage, and the smallest run that it needs before it."""

import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

NET = ("--width", "0.05", "--batch", "8", "--max-broken", "0.1")
BOXES = "scenes:images=8,size=64"
SELFTRAIN = (
    *("selftrain", "--labelled", BOXES, "--unlabelled", "scenes:images=8,size=64,seed=1", "--backbone", "alexnet_bn"),
    *("--width", "0.05", "--channels", "16", "--size", "64", "--epochs", "2", "--batch", "2", "--lr", "0.1"),
    *("--threshold", "0", "--precision", "float32"),
)
# A Mask R-CNN takes seconds for an image, of whatever size.
FEW = tuple(word.replace("images=8", "images=2") for word in SELFTRAIN)
INSTANCE = (*FEW, "--task", "instance", "--epochs", "1")
PRETEXT = ("pretext", "--data", "../images/train", "--arch", "vgg16_bn", "--size", "48", "--epochs", "2", *NET)
RETRAIN = ("retrain", "--arch", "alexnet_bn", "--stride", "2", "--size", "40", "--epochs", "2", *NET)
EVAL = ("eval", "--labelled", "../images", "--max-broken", "0.1")
LAYERS = ("--layers", "conv2,conv4")
TRAINED = ("--batch", "8", "--epochs", "2", "--lrs", "0.01")
RECIPE = f"""[selftrain]
labelled = "{BOXES}"
unlabelled = "scenes:images=8,size=64,seed=1"
backbone = "alexnet_bn"
width = 0.05
channels = 16
size = 64
epochs = 1
batch = 4
lr = 0.1
threshold = 0.0
precision = "float32"

[grid]
fraction = [0.5, 1.0]
"""


class Scenario(NamedTuple):
    """One command line; `after` is the one whose finished run it starts from."""

    after: str
    argv: tuple[str, ...]


def _run(*words: str) -> tuple[str, ...]:
    return ("--run", "mine", *words)


def _learned(protocol: str, *words: str) -> Scenario:
    return Scenario("retrain", _run(*EVAL, "--protocol", protocol, *words))


SCENARIOS: dict[str, Scenario] = {
    "pretext": Scenario("", _run(*PRETEXT, "--permutations", "6")),
    "pretext rotation": Scenario("", _run(*PRETEXT, "--task", "rotation")),
    "pretext context": Scenario("", _run(*PRETEXT, "--task", "context")),
    "extract": Scenario("pretext", _run("extract", "--batch", "8", "--max-broken", "0.1")),
    **{
        f"cluster {engine}": Scenario("extract", _run("cluster", "--k", "5", "--pca", "6", "--engine", engine))
        for engine in ("faiss", "exact")
    },
    **{
        f"cluster {algorithm}": Scenario("extract", _run("cluster", "--k", "6", "--algorithm", algorithm))
        for algorithm in ("two-level", "minibatch")
    },
    "cluster views": Scenario("extract", _run("cluster", "--k", "5", "--views", "2", "--redo", "2")),
    "assign": Scenario("cluster views", _run("assign")),
    "assign balanced": Scenario("cluster faiss", _run("assign", "--balanced")),
    "retrain": Scenario("assign", _run(*RETRAIN)),
    **{
        f"retrain {objective}": Scenario("assign", _run(*RETRAIN, "--objective", objective))
        for objective in ("multi", "soft", "features", "relations")
    },
    "eval linear": _learned("linear", *LAYERS, *TRAINED),
    "eval nonlinear": _learned("nonlinear", *LAYERS, *TRAINED, "--test-crops", "2"),
    "eval finetune": _learned("finetune", *TRAINED, "--test-crops", "2"),
    "eval robust": _learned("robust", *LAYERS, *TRAINED, "--robust-images", "4"),
    "eval supervised": _learned("knn", *LAYERS, "--supervised", "--supervised-epochs", "2"),
    **{
        f"eval {protocol}": _learned(protocol, *LAYERS)
        for protocol in ("knn", "lowshot", "svm", "logreg", "clusters", "retrieve")
    },
    "eval filters": _learned("filters"),
    **{
        f"eval {protocol}": Scenario(
            "retrain", _run("eval", "--labelled", BOXES, "--protocol", protocol, "--epochs", "1", "--batch", "4")
        )
        for protocol in ("detect", "segment")
    },
    "selftrain": Scenario("", _run(*SELFTRAIN, "--methods", "self,joint")),
    "selftrain segment": Scenario("", _run(*SELFTRAIN, "--task", "segment", "--head", "fpn")),
    "selftrain instance": Scenario("", _run(*INSTANCE)),
    "study": Scenario("", ("study", "--recipe", "../recipe.toml", "--run", "mine")),
    "pack": Scenario("", ("pack", "--data", "../images/train", "--out", "p.h5", "--size", "32", "--max-broken", "0.1")),
    "export": Scenario("retrain", _run("export")),
    "export torch": Scenario("retrain", _run("export", "--format", "torch")),
    "predict csv": Scenario("retrain", ("predict", "--model", "mine", "--data", "../images/val", "--out", "p.csv")),
    "predict npy": Scenario("retrain", ("predict", "--model", "mine", "--data", "../images/val", "--out", "p.npy")),
    "predict h5": Scenario("retrain", ("predict", "--model", "mine", "--data", "../images/val", "--out", "p.h5")),
    "predict json": Scenario(
        "selftrain",
        (
            "predict",
            "--model",
            "mine/selftrain/student/model.safetensors",
            "--data",
            "../images/val",
            "--out",
            "p.json",
        ),
    ),
}


def draw(root: Path) -> None:
    """Two classes, 24 images to train (one of them broken) and 12 to test, and the recipe of the study."""
    for part, count in (("train", 12), ("val", 6)):
        for kind, name in enumerate(("round", "square")):
            for number in range(count):
                dice = random.Random(f"{part} {kind} {number}")
                image = Image.new("RGB", (60, 52), tuple(dice.randrange(256) for _ in range(3)))
                pen = ImageDraw.Draw(image)
                for _ in range(6):
                    x, y = dice.randrange(40), dice.randrange(40)
                    shape = pen.ellipse if kind else pen.rectangle
                    shape((x, y, x + 14, y + 14), fill=tuple(dice.randrange(256) for _ in range(3)))
                path = root / "images" / part / name / f"{number:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, quality=90)
    (root / "images/train/round/07.jpg").write_bytes(b"no image")
    (root / "recipe.toml").write_text(RECIPE)
