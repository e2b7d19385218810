"""What `ktransfer retrain`, `selftrain` and `export` can be told."""

from dataclasses import dataclass
from typing import ClassVar

from ktransfer.config import option
from ktransfer.training.options import TrainOptions


@dataclass(frozen=True)
class RetrainConfig(TrainOptions):
    """Train a target network from scratch to predict the pseudo-labels.

    The paper's is a standard AlexNet; its settings are not known.
    """

    first: ClassVar = ("arch", "width", "epochs", "size", "labels")

    data: str | None = option(None, "images; those that were labelled when not given", execution=True)
    labels: str | None = option(
        None,
        "a label file (.csv, .h5, .bin), or classes: the folder's own classes; the run's pseudo-labels if not given",
    )
    arch: str = option("alexnet", "alexnet, alexnet_bn, or any classifier of torchvision by name; list shows them")
    width: float = option(1.0, "scales all channels (alexnet, alexnet_bn)", low=0.05, high=4)
    stride: int = option(4, "stride of AlexNet's first convolution; 2 suits images under 128 pixels", low=1, high=8)
    size: int = option(
        0, "side of the network's input in pixels; 0: 224, or what the images have if less", low=0, high=2048
    )
    crop: float = option(0.08, "smallest share of an image's area that a random crop shows", low=0.01, high=1)
    uniform: bool = option(False, "draw clusters, not images, equally often")
    overwrite: bool = option(False, "make the stage again", execution=True)


RATES = {"detect": 0.32, "instance": 0.32, "segment": 0.08}
"""Rates for batches of 256: those of Zoph et al.; of instance He et al.'s 0.02 for 16 (docs/papers.md)."""


@dataclass(frozen=True)
class SelftrainConfig(TrainOptions):
    """Train a detector, let it label more images, and train a student on both.

    After Zoph et al.: batch, rate, size and the detector's constants are theirs, for COCO and 350 epochs; backbone,
    normalisation and length are not (docs/choices.md).
    """

    first: ClassVar = ("labelled", "fraction", "unlabelled", "backbone", "augment")

    lr: float = option(
        0.0, "learning rate after the warm-up; 0: 0.32 (segment: 0.08) for a batch of 256, others in proportion", low=0
    )
    weight_decay: float = option(1e-4, "weight decay; none on biases and norms", low=0)

    labelled: str | None = option(
        None, "images with boxes: a root with COCO files or a VOCdevkit, one COCO file, or scenes:", execution=True
    )
    fraction: float = option(1.0, "share of the labelled training images whose boxes are used", low=0.0001, high=1)
    stratified: bool = option(False, "keep the mix of classes in that share")
    ids: str | None = option(None, "a JSON list of image ids, whose boxes are used instead of a share", execution=True)
    unlabelled: str | None = option(
        None, "images for pseudo-boxes; those that --fraction or --ids leaves when not given", execution=True
    )
    task: str = option(
        "detect",
        "what is learned: boxes; the class of every pixel; or, instance, boxes with masks, by Mask R-CNN",
        choices=("detect", "segment", "instance"),
    )
    detector: str = option("retinanet", "the detector, of --task detect", choices=("retinanet", "fasterrcnn"))
    head: str = option(
        "fcn",
        "of --task segment: fcn or deeplab on the deepest map, or fpn: the summed maps of a pyramid",
        choices=("fcn", "deeplab", "fpn"),
    )
    backbone: str = option(
        "resnet50",
        "alexnet, alexnet_bn, vgg16, vgg16_bn, or a ResNet, EfficientNet or VGG of torchvision; what --init run, a "
        "model.safetensors or torchvision: names says itself what it is",
    )
    width: float = option(
        1.0, "of --init random: scales all channels (alexnet, alexnet_bn, vgg16, vgg16_bn)", low=0.05, high=4
    )
    stride: int = option(4, "of --init random: stride of AlexNet's first convolution", low=1, high=8)
    norm: str = option("gn", "normalisation", choices=("bn", "gn", "frozen"))
    anchor: float = option(4.0, "side of a map's smallest anchors, in its strides", low=0.5, high=64)
    focal_alpha: float = option(0.25, "RetinaNet: alpha of the focal loss", low=0, high=1)
    focal_gamma: float = option(1.5, "RetinaNet: gamma of the focal loss", low=0, high=10)
    huber_delta: float = option(0.1, "RetinaNet: delta of the Huber loss on boxes", low=0.001, high=10)
    huber_weight: float = option(50.0, "RetinaNet: weight of the Huber loss on boxes", low=0)
    soft_nms: float = option(0.0, "sigma of soft-NMS; 0: NMS at IoU 0.5", low=0, high=10, of=("pseudo", "scores"))
    channels: int = option(
        256, "channels of the pyramid and of the heads on it; of --task segment: of --head fpn", low=8, high=1024
    )
    size: int = option(640, "side of the square that the detector sees, in pixels", low=64, high=2048)
    init: str = option(
        "random",
        "weights of the backbone: random; run: the target network of this run; a model.safetensors; torchvision:NAME; "
        "or a checkpoint made elsewhere for --backbone",
        execution=True,
    )
    augment: str = option("S1", "strength of the augmentation", choices=("none", "S1", "S2", "S3", "S4"))
    methods: str = option(
        "self",
        "what the unlabelled images are for, separated by commas. self: pseudo-boxes; joint: the classes that their "
        "folders give them are learned together with the boxes",
        execution=True,
    )
    teacher: str | None = option(None, "a detector that a selftrain step made, instead of a new one", execution=True)
    pseudo: str | None = option(
        None, "a COCO file with boxes of the unlabelled images, instead of the teacher's", execution=True
    )
    threshold: float = option(
        0.5,
        "least score of a pseudo-box; in a pseudo-mask pixels of a lower probability are ignored",
        low=0,
        high=1,
        of=("pseudo", "student"),
    )
    scales: str = option(
        "1",
        "of --task segment: scales at which the teacher looks at an image and its mirror image, by commas; the "
        "paper's are 0.5,0.75,1,1.25,1.5,1.75, which take nine times as long",
        of=("pseudo",),
    )
    jitter_filter: float = option(
        0.0,
        "leave out pseudo-boxes whose sides move by more than this share of the box when the teacher sees the image "
        "smaller or mirrored; 0: none",
        low=0,
        of=("pseudo",),
    )
    adaptive: bool = option(
        False,
        "raise the threshold of a class until it has no more boxes an image than the labelled ones have",
        of=("student",),
    )
    empty: str = option("keep", "images in which the teacher sees nothing", choices=("keep", "drop"), of=("student",))
    rounds: int = option(1, "how often a student becomes the next teacher", low=1, high=20, of=("rounds",))
    balance: str = option(
        "normalised",
        "normalised: by moving averages of both losses; plain: their sum",
        choices=("normalised", "plain"),
        of=("student", "joint"),
    )
    alpha: float = option(1.0, "weight of the loss on pseudo-boxes or classes", low=0, of=("student", "joint"))
    decay: float = option(0.9997, "of the moving averages of the losses", low=0, high=0.999999, of=("student", "joint"))
    ema: float = option(
        0.0,
        "decay of the student's own average, which is then the result; 0: none",
        low=0,
        high=0.9999,
        of=("student", "joint"),
    )
    samples: int = option(
        0,
        "labelled images that each training sees in all, so that small shares train as long as large ones, but for a "
        "student with --student-epochs; 0: --epochs passes",
        low=0,
    )
    student_epochs: int = option(
        0, "passes of the student over the labelled images; 0: as the teacher", low=0, of=("student", "joint")
    )
    patience: int = option(
        0,
        "stop when average precision on held-out labelled images has not grown for so many passes, and take the best "
        "weights; 0: never",
        low=0,
        of=("teacher", "student", "joint"),
    )
    held_out: float = option(
        0.1,
        "of --patience: share of the labelled images that evaluates, and is not learned from",
        low=0.0001,
        high=0.9,
        of=("teacher", "student", "joint"),
    )
    test_threshold: float = option(0.05, "least score of a box that is evaluated", low=0, high=1, of=("scores",))
    overwrite: bool = option(
        False, "make the steps again: from the first one that was made otherwise on, else all", execution=True
    )


@dataclass(frozen=True)
class ExportConfig:
    """Write the target network as an ONNX file, with a card that says what it is and how to run it.

    Normalisation is inside. Nothing is written where onnxruntime does not compute what torch does.
    """

    first: ClassVar = ("model", "licence", "opset", "tolerance", "overwrite")

    model: str | None = option(
        None, "a model.safetensors of retrain, or another run; this run's when not given", execution=True
    )
    licence: str | None = option(None, "licence of the weights, for the card; left for you to fill in when not given")
    opset: int = option(18, "version of ONNX's operators", low=18, high=23)
    tolerance: float = option(
        1e-4, "largest difference of a logit from torch's, as a share of the largest logit where that is above 1", low=0
    )
    overwrite: bool = option(False, "make the stage again", execution=True)
