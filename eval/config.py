"""What `ktransfer eval` can be told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ktransfer.config import narrowed, option
from ktransfer.errors import UsageError
from ktransfer.training.options import LoopOptions

PROTOCOLS = (
    "linear",
    "knn",
    "lowshot",
    "svm",
    "logreg",
    "nonlinear",
    "finetune",
    "robust",
    "clusters",
    "retrieve",
    "filters",
    "detect",
    "segment",
)
"""Each is a module of this room (see protocols.py)."""
FROZEN = ("knn", "lowshot", "svm", "logreg", "clusters", "retrieve")
"""Those that read one vector a layer."""
TUNED = ("nonlinear", "finetune")
"""Those that train networks."""
LOCATED = ("detect", "segment")
"""Those that train networks to find things in images."""
TRAINED = ("linear", "robust", *TUNED, *LOCATED)
"""Those that train anything in steps."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 30, "batch": 128, "weight_decay": 1e-4, "lrs": "0.0003,0.001,0.003,0.01"},
    "nonlinear": {"epochs": 30, "batch": 128, "weight_decay": 5e-4, "lrs": "0.003,0.01,0.03"},
    "robust": {"epochs": 10, "batch": 128, "weight_decay": 1e-4, "lrs": "0.0003,0.001,0.003,0.01"},
    "finetune": {"epochs": 60, "batch": 64, "weight_decay": 5e-4, "lrs": "0.003,0.01,0.03"},
    "detect": {"epochs": 12, "batch": 8, "weight_decay": 1e-4},
    "segment": {"epochs": 12, "batch": 8, "weight_decay": 1e-4},
}
"""What a protocol takes for a setting that was left at 0, -1 or ""."""
PRESETS: dict[str, dict[str, Any]] = {
    "zhang": {},
    "deepcluster": {"epochs": 90, "batch": 256, "weight_decay": 1e-7, "lrs": "0.01"},
    "fair": {"epochs": 28, "batch": 256, "weight_decay": 5e-4, "lrs": "0.01", "stride": 2},
}
"""The same of the presets of linear (presets.py)."""


@dataclass(frozen=True)
class EvalConfig(LoopOptions):
    """Evaluate the run's network by named protocols.

    The same with random weights stands beside it. Several protocols at once are separated by commas.
    docs/reference/protocols.md says what each does.
    """

    first: ClassVar = ("labelled", "protocol", "beside", "layers", "seeds")

    labelled: str | None = option(
        None,
        "a root with train/ and val/ class folders or packs, or train.csv and val.csv, a VOCdevkit or COCO; or scenes:;"
        " the run's if not given",
        execution=True,
    )
    protocol: str = option(
        "linear", f"how it is evaluated, separated by commas: {', '.join(PROTOCOLS)}", execution=True
    )
    layers: str | None = option(
        None,
        "layers, separated by commas; conv1..conv5 of an AlexNet when not given",
        of=("linear", "nonlinear", "robust", *FROZEN),
    )
    beside: str | None = option(
        None, "other runs, separated by commas, whose networks are evaluated in the same table", execution=True
    )
    random: bool = option(True, "evaluate the same network with random weights beside it")
    supervised: bool = option(
        False, "evaluate the same network trained on the true labels beside it; it is trained once", execution=True
    )
    supervised_epochs: int = option(90, "passes over the training part", low=1, of=("supervised",))
    size: int = option(
        0,
        "side of the images in pixels; 0: as in the network's training",
        low=0,
        high=2048,
        of=(*(name for name in PROTOCOLS if name not in LOCATED), "supervised"),
    )
    stride: int = option(
        0, "stride of AlexNet's first convolution; 0: as in retraining, 4 after a puzzle", low=0, high=8
    )
    seeds: int = option(1, "evaluate so many times, from so many seeds, and show means and deviations", low=1, high=100)
    lrs: str = option(
        "",
        "learning rates to choose from, separated by commas; the protocol's own if empty",
        of=("linear", "robust", *TUNED),
    )
    preset: str = option(
        "zhang",
        "whose pools, views and schedule; all but zhang's are of an AlexNet",
        choices=tuple(PRESETS),
        of=("linear",),
    )
    dtype: str = option(
        "float16",
        "how the maps of the layers are kept",
        choices=("float16", "float32"),
        of=("linear", "robust", *FROZEN),
    )
    cache: float = option(
        20.0,
        "GB of disk that the maps may take while it runs; where they need more, linear computes them anew in each "
        "epoch, and robust refuses",
        low=0,
        execution=True,
        of=("linear", "robust"),
    )
    epochs: int = option(0, "passes over the training part; 0: the protocol's own", low=0, of=TRAINED)
    batch: int = option(0, "images a step; 0: the protocol's own", low=0, of=TRAINED)
    momentum: float = narrowed(LoopOptions, "momentum", TRAINED)
    weight_decay: float = option(-1.0, "weight decay; -1: the protocol's own", low=-1, of=TRAINED)
    schedule: str = narrowed(LoopOptions, "schedule", TRAINED)
    warmup: float = narrowed(LoopOptions, "warmup", TRAINED)
    grid: int = option(1, "maps are averaged to GRID x GRID numbers a channel", low=1, high=64, of=FROZEN)
    neighbours: str = option("10,20,100,200", "numbers of neighbours to choose from, by commas", of=("knn",))
    temperature: float = option(0.07, "a neighbour counts exp(similarity / this)", low=1e-3, high=1e3, of=("knn",))
    subset: str | None = option(
        None,
        "a list of training images, one a line, whose labels are used; 1 % and 10 % when not given",
        execution=True,
        of=("lowshot",),
    )
    crop: float = option(0.2, "smallest share of an image's area in training", low=0.01, high=1, of=TUNED)
    test_crops: int = option(10, "random squares of each test image; 0: its centre", low=0, high=100, of=TUNED)
    strategy: str = option("joint", "frozen, staged, joint, layerwise, separated by commas", of=("finetune",))
    rescale: bool = option(False, "first give all layers outputs of unit variance", of=("finetune",))
    robust_images: int = option(
        500, "test images that are corrupted and attacked, drawn by the seed; 0: all", low=0, of=("robust",)
    )
    robust_eps: str = option("0.5,1,2,4", "radii of the attack, of 255, separated by commas", of=("robust",))
    robust_steps: int = option(10, "steps of the attack", low=1, high=1000, of=("robust",))
    robust_noise: str = option("0.2,0.4,0.6,0.8", "shares of wrong labels, separated by commas", of=("robust",))
    clusters_k: str | None = option(
        None, "numbers of clusters, separated by commas; as many as classes when not given", of=("clusters",)
    )
    clusters_starts: int = option(3, "seeds of k-means, for the stability", low=2, high=100, of=("clusters",))
    detector: str = option("fasterrcnn", "what finds boxes", choices=("fasterrcnn", "retinanet"), of=("detect",))
    neck: str = option(
        "auto",
        "maps of the trunk: one, or a pyramid; auto: one of our AlexNet and VGG-16 for fasterrcnn, else a pyramid",
        choices=("auto", "single", "p2-p6", "p3-p7"),
        of=("detect",),
    )
    head: str = option(
        "fcn",
        "on the deepest map, or, fpn, on the summed maps of a pyramid",
        choices=("fcn", "deeplab", "fpn"),
        of=("segment",),
    )
    norm: str = option("bn", "batch norm that learns, or group norm in its place", choices=("bn", "gn"), of=LOCATED)
    lr: float = option(0.01, "learning rate after the warm-up", low=0, of=LOCATED)
    trunk: str = option(
        "frozen,full",
        "frozen, full, separated by commas; finished, of detect: the detectors of the run's selftrain as they are, "
        "which a run without another network takes",
        of=LOCATED,
    )
    threshold: float = option(0.05, "boxes of a lower score are no predictions", low=0, high=1, of=("detect",))
    canvas: int = option(320, "long side of the images in pixels", low=64, high=2048, of=LOCATED)
    jitter: str = option("0.8,1.2", "range of the scale in training", of=LOCATED)
    test_scales: str = option(
        "1",
        "factors of the canvas at test, separated by commas; of others than 1 alone, images are mirrored too and "
        "predictions merged by NMS",
        of=("detect",),
    )
    queries: str = option("8", "keys of test images, separated by commas, or so many drawn", of=("retrieve",))
    compare: str | None = option(
        None, "evaluate nothing; show the results of this run and of these, separated by commas", execution=True
    )
    published: bool = option(False, "show what others have published beside ours", execution=True)
    overwrite: bool = option(False, "make the stage again", execution=True)

    def __post_init__(self) -> None:
        """Refuse what would be refused hours later."""
        super().__post_init__()
        if self.batch == 1:
            raise UsageError("--batch 1: batch norm needs two images; give 0 (the protocol's own) or at least 2")
        if -1 < self.weight_decay < 0:
            raise UsageError(f"--weight-decay {self.weight_decay:g}: below 0; give -1 (the protocol's own), 0 or more")


def own_settings(given: EvalConfig, name: str) -> dict[str, Any]:
    """What the protocol `name` takes for settings that were left at 0, -1 or ""."""
    own = DEFAULTS.get(name, {}) | (PRESETS[given.preset] if name == "linear" else {})
    return {key: value for key, value in own.items() if getattr(given, key) == getattr(EvalConfig, key)}


def _counting(given: Mapping[str, Any]) -> list[str]:
    """The parts of the stage that a call has: its protocols, and the arm that learns the true labels."""
    names = str(given.get("protocol", EvalConfig.protocol)).split(",")
    return [*(name.strip() for name in names), *(["supervised"] if given.get("supervised") else [])]


counting = {"eval": _counting}
"""Stage -> the parts of it that a call has, whose settings alone it takes from a file (`plan.with_table`)."""
