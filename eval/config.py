"""The settings of `ktransfer eval`."""

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
"""Each is a module of `eval/protocols` (see protocol.py there)."""
FROZEN = ("knn", "lowshot", "svm", "logreg", "clusters", "retrieve")
"""Those that read one vector per image and layer."""
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
"""What a protocol uses for a setting that was left at 0, -1 or ""."""
PRESETS: dict[str, dict[str, Any]] = {
    "zhang": {},
    "deepcluster": {"epochs": 90, "batch": 256, "weight_decay": 1e-7, "lrs": "0.01"},
    "fair": {"epochs": 28, "batch": 256, "weight_decay": 5e-4, "lrs": "0.01", "stride": 2},
}
"""The same for the presets of linear (presets.py)."""


@dataclass(frozen=True)
class EvalConfig(LoopOptions):
    """Evaluate the run's network by named protocols.

    The same network with random weights is evaluated for comparison. Several protocols are separated by commas.
    docs/reference/protocols.md describes each of them.
    """

    first: ClassVar = ("labelled", "protocol", "beside", "layers", "seeds")

    labelled: str | None = option(
        None,
        "a root with train/ and val/ class folders or packs, or train.csv and val.csv, a VOCdevkit or COCO, or "
        "scenes:; if not given, that of the run",
        execution=True,
    )
    protocol: str = option("linear", f"protocols, separated by commas: {', '.join(PROTOCOLS)}", execution=True)
    layers: str | None = option(
        None,
        "layers, separated by commas; if not given, conv1..conv5 of an AlexNet",
        of=("linear", "nonlinear", "robust", *FROZEN),
    )
    beside: str | None = option(
        None, "other runs, separated by commas, whose networks are evaluated in the same table", execution=True
    )
    random: bool = option(True, "evaluate the same network with random weights for comparison")
    supervised: bool = option(
        False, "evaluate the same network trained on the true labels for comparison; it is trained once", execution=True
    )
    supervised_epochs: int = option(90, "passes over the training set", low=1, of=("supervised",))
    size: int = option(
        0,
        "side of the images in pixels; 0: that of the network's training",
        low=0,
        high=2048,
        of=(*(name for name in PROTOCOLS if name not in LOCATED), "supervised"),
    )
    stride: int = option(
        0, "stride of AlexNet's first convolution; 0: as in retraining, or 4 after a puzzle task", low=0, high=8
    )
    seeds: int = option(
        1, "evaluate with so many different seeds, and show means and standard deviations", low=1, high=100
    )
    lrs: str = option(
        "",
        "learning rates to choose from, separated by commas; if empty, those of the protocol",
        of=("linear", "robust", *TUNED),
    )
    preset: str = option(
        "zhang",
        "whose pooling, views and schedule to use; all but zhang's are for AlexNet",
        choices=tuple(PRESETS),
        of=("linear",),
    )
    dtype: str = option(
        "float16",
        "number format of the stored feature maps",
        choices=("float16", "float32"),
        of=("linear", "robust", *FROZEN),
    )
    cache: float = option(
        20.0,
        "GB of disk that the feature maps may take during the evaluation; where they need more, linear computes them "
        "again in each epoch, and robust stops at the start",
        low=0,
        execution=True,
        of=("linear", "robust"),
    )
    epochs: int = option(0, "passes over the training set; 0: the protocol's default", low=0, of=TRAINED)
    batch: int = option(0, "images per training step; 0: the protocol's default", low=0, of=TRAINED)
    momentum: float = narrowed(LoopOptions, "momentum", TRAINED)
    weight_decay: float = option(-1.0, "weight decay; -1: the protocol's default", low=-1, of=TRAINED)
    schedule: str = narrowed(LoopOptions, "schedule", TRAINED)
    warmup: float = narrowed(LoopOptions, "warmup", TRAINED)
    grid: int = option(1, "feature maps are averaged to GRID x GRID numbers per channel", low=1, high=64, of=FROZEN)
    neighbours: str = option("10,20,100,200", "numbers of neighbours to choose from, separated by commas", of=("knn",))
    temperature: float = option(
        0.07, "the vote of a neighbour has the weight exp(similarity / temperature)", low=1e-3, high=1e3, of=("knn",)
    )
    subset: str | None = option(
        None,
        "a list of the training images whose labels are used, one per line; if not given, 1 % and 10 % are drawn",
        execution=True,
        of=("lowshot",),
    )
    crop: float = option(
        0.2, "smallest share of an image's area that a random crop shows in training", low=0.01, high=1, of=TUNED
    )
    test_crops: int = option(
        10,
        "random crops of each test image whose predictions are averaged; 0: the centre crop",
        low=0,
        high=100,
        of=TUNED,
    )
    strategy: str = option("joint", "any of frozen, staged, joint, layerwise, separated by commas", of=("finetune",))
    rescale: bool = option(
        False, "first scale the weights so that the outputs of all layers have variance 1", of=("finetune",)
    )
    robust_images: int = option(
        500, "test images that are corrupted and attacked, drawn by the seed; 0: all", low=0, of=("robust",)
    )
    robust_eps: str = option("0.5,1,2,4", "radii of the attack in steps of 1/255, separated by commas", of=("robust",))
    robust_steps: int = option(10, "steps of the attack", low=1, high=1000, of=("robust",))
    robust_noise: str = option(
        "0.2,0.4,0.6,0.8", "shares of wrong training labels, separated by commas", of=("robust",)
    )
    clusters_k: str | None = option(
        None, "numbers of clusters, separated by commas; if not given, the number of classes", of=("clusters",)
    )
    clusters_starts: int = option(
        3, "k-means is run from so many seeds, to measure its stability", low=2, high=100, of=("clusters",)
    )
    detector: str = option("fasterrcnn", "kind of detector", choices=("fasterrcnn", "retinanet"), of=("detect",))
    neck: str = option(
        "auto",
        "feature maps that the detector reads: a single one, or a pyramid; auto: single for fasterrcnn on our AlexNet "
        "and VGG-16, else a pyramid",
        choices=("auto", "single", "p2-p6", "p3-p7"),
        of=("detect",),
    )
    head: str = option(
        "fcn",
        "segmentation head. fcn, deeplab: on the deepest map; fpn: on the summed maps of a pyramid",
        choices=("fcn", "deeplab", "fpn"),
        of=("segment",),
    )
    norm: str = option("bn", "trainable batch norm, or group norm in its place", choices=("bn", "gn"), of=LOCATED)
    lr: float = option(0.01, "learning rate after the warm-up", low=0, of=LOCATED)
    trunk: str = option(
        "frozen,full",
        "frozen: the backbone is not trained; partial: but for the layers of --freeze, it is; full: it is; separated "
        "by commas. finished, only for detect: the detectors of the run's selftrain stage as they are; a run without "
        "another network does that by itself",
        of=LOCATED,
    )
    freeze: str | None = option(
        None, "with --trunk partial: layers that are not trained, such as conv1,conv2; their norms neither", of=LOCATED
    )
    threshold: float = option(0.05, "lowest score of a box that counts as a prediction", low=0, high=1, of=("detect",))
    canvas: int = option(320, "long side of the images in pixels", low=64, high=2048, of=LOCATED)
    exif: str | None = option(
        None,
        "obey: boxes and masks are for images as their EXIF turns them upright; ignore: for images as they are stored; "
        "if not given, as the detectors of selftrain learned, else obey",
        choices=("obey", "ignore"),
        execution=True,
        of=LOCATED,
    )
    jitter: str = option("0.8,1.2", "range of random scaling in training", of=LOCATED)
    test_scales: str = option(
        "1",
        "factors on the image size in testing, separated by commas; with any but 1 alone, mirrored images are "
        "predicted too, and the predictions merged by NMS",
        of=("detect",),
    )
    queries: str = option(
        "8", "keys of test images, separated by commas, or a number of images to draw", of=("retrieve",)
    )
    compare: str | None = option(
        None,
        "evaluate nothing, but show the results of this run and of these runs, separated by commas",
        execution=True,
    )
    published: bool = option(False, "show published results of others beside these", execution=True)
    overwrite: bool = option(False, "remove the results of these protocols, and make them again", execution=True)

    @staticmethod
    def parts_read(given: Mapping[str, Any]) -> list[str]:
        """The parts of the stage that a call has: its protocols, and the arm that learns the true labels."""
        names = str(given.get("protocol", EvalConfig.protocol)).split(",")
        return [*(name.strip() for name in names), *(["supervised"] if given.get("supervised") else [])]

    def __post_init__(self) -> None:
        """Refuse what would be refused hours later."""
        super().__post_init__()
        if self.batch == 1:
            raise UsageError("--batch 1: batch norm needs two images; give 0 (the protocol's default) or at least 2")
        if -1 < self.weight_decay < 0:
            raise UsageError(f"--weight-decay {self.weight_decay:g}: below 0; give -1 (the default), 0 or more")


def own_settings(given: EvalConfig, name: str) -> dict[str, Any]:
    """What the protocol `name` uses for settings that were left at 0, -1 or ""."""
    own = DEFAULTS.get(name, {}) | (PRESETS[given.preset] if name == "linear" else {})
    return {key: value for key, value in own.items() if getattr(given, key) == getattr(EvalConfig, key)}
