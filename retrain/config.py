"""The settings of `ktransfer retrain`, `selftrain` and `export`."""

from dataclasses import dataclass
from typing import ClassVar

from ktransfer.config import option
from ktransfer.training.options import TrainOptions


@dataclass(frozen=True)
class RetrainConfig(TrainOptions):
    """Train a target network from scratch to predict the pseudo-labels.

    The paper's target network is a standard AlexNet; how it was trained is not known.
    """

    first: ClassVar = ("arch", "width", "epochs", "size", "labels")

    data: str | None = option(None, "images; if not given, those that the labels were made for", execution=True)
    labels: str | None = option(
        None,
        "a label file (.csv, .h5, .bin), or classes: the class folders of the data; if not given, the run's "
        "pseudo-labels",
    )
    objective: str = option(
        "clusters",
        "what is learned of an image. clusters: its pseudo-label; multi: those of several clusterings (cluster "
        "--views); soft: how near it is to every centroid; features: the direction of the teacher's features; "
        "relations: its similarities to other images",
        choices=("clusters", "multi", "soft", "features", "relations"),
        before="clusters",
    )
    features: str | None = option(
        None,
        "soft, features and relations: the teacher's features; if not given, those of the run",
        execution=True,
    )
    temperature: float = option(
        0.0, "soft, features, relations: temperature; 0: 0.05, 0.05 and 0.04", low=0, high=10, before=0.0
    )
    arch: str = option(
        "alexnet",
        "alexnet, alexnet_bn, the name of a classifier of torchvision, timm:NAME, or pkg.module:function, "
        "a function of your own that makes an nn.Module; list: show all names",
    )
    width: float = option(
        1.0, "factor on the number of channels of every layer (alexnet, alexnet_bn)", low=0.05, high=4
    )
    stride: int = option(4, "stride of AlexNet's first convolution; 2 suits images under 128 pixels", low=1, high=8)
    size: int = option(
        0, "side of the network's input in pixels; 0: 224, or less where the images are smaller", low=0, high=2048
    )
    crop: float = option(0.08, "smallest share of an image's area that a random crop shows", low=0.01, high=1)
    normalise: str = option(
        "imagenet",
        "how the network's input is normalised. imagenet: by the mean and deviation of ImageNet's colours; picture: by "
        "each image's own",
        choices=("imagenet", "picture"),
        before="imagenet",
    )
    grey: float = option(0.0, "share of the images that lose their colours", low=0, high=1, before=0.0)
    jitter: float = option(
        0.0,
        "strength of random changes of brightness, contrast, saturation and hue; SimCLR's is 1, for small images 0.5",
        low=0,
        high=2,
        before=0.0,
    )
    randaugment: str | None = option(
        None,
        "N,M: each image is changed by N of the 14 operations of RandAugment, of level M of 30, such as 2,9; if not "
        "given, by none",
    )
    init: str | None = option(
        None,
        "weights to start from: a run, a model.safetensors, torchvision:NAME, or a checkpoint of another project; if "
        "not given, fresh ones",
        execution=True,
    )
    uniform: bool = option(False, "draw all clusters equally often, instead of all images")
    overwrite: bool = option(False, "remove what the stage has made, and make it again", execution=True)


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
        0.0,
        "learning rate after the warm-up; 0: 0.32 (segment: 0.08) at a batch of 256, in proportion at others",
        low=0,
    )
    weight_decay: float = option(1e-4, "weight decay; not applied to biases and normalisation layers", low=0)

    labelled: str | None = option(
        None, "images with boxes: a root with COCO files or a VOCdevkit, one COCO file, or scenes:", execution=True
    )
    exif: str = option(
        "obey",
        "obey: boxes and masks are for images as their EXIF turns them upright; ignore: for images as they are stored. "
        "It is kept with the detectors, for eval and predict",
        choices=("obey", "ignore"),
        execution=True,
    )
    fraction: float = option(1.0, "share of the labelled training images whose boxes are used", low=0.0001, high=1)
    stratified: bool = option(False, "keep the proportions of the classes in that share")
    ids: str | None = option(
        None, "a JSON list of the ids of images whose boxes are used, instead of a share", execution=True
    )
    unlabelled: str | None = option(
        None, "images to be given pseudo-boxes; if not given, those that --fraction or --ids leaves out", execution=True
    )
    task: str = option(
        "detect",
        "what is learned. detect: boxes; segment: the class of every pixel; instance: boxes with masks, by Mask R-CNN",
        choices=("detect", "segment", "instance"),
    )
    detector: str = option("retinanet", "detector of --task detect", choices=("retinanet", "fasterrcnn"))
    head: str = option(
        "fcn",
        "head of --task segment. fcn, deeplab: on the deepest map; fpn: on the summed maps of a pyramid",
        choices=("fcn", "deeplab", "fpn"),
    )
    backbone: str = option(
        "resnet50",
        "alexnet, alexnet_bn, vgg16, vgg16_bn, or a ResNet, EfficientNet or VGG of torchvision; not read where --init "
        "is run, a model.safetensors, torchvision:NAME or efficientnet-lite0, which determine the network",
    )
    width: float = option(
        1.0,
        "with --init random: factor on the number of channels (alexnet, alexnet_bn, vgg16, vgg16_bn)",
        low=0.05,
        high=4,
    )
    stride: int = option(4, "with --init random: stride of AlexNet's first convolution", low=1, high=8)
    norm: str = option(
        "gn",
        "normalisation layers: batch norm, group norm, or batch norm with frozen statistics",
        choices=("bn", "gn", "frozen"),
    )
    anchor: float = option(
        4.0, "side of the smallest anchors of a feature map, in strides of that map", low=0.5, high=64
    )
    focal_alpha: float = option(0.25, "RetinaNet: alpha of the focal loss", low=0, high=1)
    focal_gamma: float = option(1.5, "RetinaNet: gamma of the focal loss", low=0, high=10)
    huber_delta: float = option(0.1, "RetinaNet: delta of the Huber loss on boxes", low=0.001, high=10)
    huber_weight: float = option(50.0, "RetinaNet: weight of the Huber loss on boxes", low=0)
    soft_nms: float = option(0.0, "sigma of soft-NMS; 0: NMS at IoU 0.5", low=0, high=10, of=("pseudo", "scores"))
    channels: int = option(
        256,
        "channels of the feature pyramid and of the heads on it; with --task segment, of --head fpn",
        low=8,
        high=1024,
    )
    size: int = option(640, "side of the square that the detector sees, in pixels", low=64, high=2048)
    init: str = option(
        "random",
        "initial weights of the backbone: random; run: this run's target network; a model.safetensors; "
        "torchvision:NAME; efficientnet-lite0 to 4; or a checkpoint of another project, for --backbone",
        execution=True,
    )
    augment: str = option(
        "S1", "strength of the augmentation, S4 being the strongest", choices=("none", "S1", "S2", "S3", "S4")
    )
    methods: str = option(
        "self",
        "how the unlabelled images are used, separated by commas. self: with pseudo-boxes; joint: the classes that "
        "their folders name are learned together with the boxes",
        execution=True,
    )
    teacher: str | None = option(
        None, "weights of a detector that a selftrain step made, to use instead of training a teacher", execution=True
    )
    pseudo: str | None = option(
        None, "a COCO file with boxes of the unlabelled images, instead of the teacher's", execution=True
    )
    threshold: float = option(
        0.5,
        "lowest score of a pseudo-box; in a pseudo-mask, pixels of lower probability are ignored",
        low=0,
        high=1,
        of=("pseudo", "student"),
    )
    scales: str = option(
        "1",
        "with --task segment: scales at which the teacher predicts an image and its mirror image, separated by commas; "
        "the paper's are 0.5,0.75,1,1.25,1.5,1.75, which take nine times as long",
        of=("pseudo",),
    )
    jitter_filter: float = option(
        0.0,
        "leave out pseudo-boxes whose sides move by more than this share of the box when the teacher sees the image "
        "smaller or mirrored; 0: leave out none",
        low=0,
        of=("pseudo",),
    )
    adaptive: bool = option(
        False,
        "raise the threshold of a class until it has no more boxes per image than in the labelled images",
        of=("student",),
    )
    empty: str = option(
        "keep", "what to do with images in which the teacher finds nothing", choices=("keep", "drop"), of=("student",)
    )
    rounds: int = option(
        1,
        "how many students are trained, one after the other; each labels the images for the next",
        low=1,
        high=20,
        of=("rounds",),
    )
    balance: str = option(
        "normalised",
        "how the losses on labelled and unlabelled images are added. normalised: the second scaled to the size of the "
        "first by moving averages; plain: as they are",
        choices=("normalised", "plain"),
        of=("student", "joint"),
    )
    alpha: float = option(1.0, "weight of the loss on pseudo-boxes or classes", low=0, of=("student", "joint"))
    decay: float = option(
        0.9997, "decay of the moving averages of the losses", low=0, high=0.999999, of=("student", "joint")
    )
    ema: float = option(
        0.0,
        "decay of a moving average of the student's weights, which is then the result; 0: no average",
        low=0,
        high=0.9999,
        of=("student", "joint"),
    )
    samples: int = option(
        0,
        "labelled images that each training sees in total, so that small shares train as long as large ones (a student "
        "with --student-epochs excepted); 0: --epochs passes",
        low=0,
    )
    student_epochs: int = option(
        0, "passes of the student over the labelled images; 0: as many as the teacher", low=0, of=("student", "joint")
    )
    patience: int = option(
        0,
        "stop when the average precision on held-out labelled images has not improved for so many passes, and keep the "
        "best weights; 0: never",
        low=0,
        of=("teacher", "student", "joint"),
    )
    held_out: float = option(
        0.1,
        "with --patience: share of the labelled images that are evaluated on, and not trained on",
        low=0.0001,
        high=0.9,
        of=("teacher", "student", "joint"),
    )
    test_threshold: float = option(0.05, "lowest score of a box that is evaluated", low=0, high=1, of=("scores",))
    overwrite: bool = option(
        False,
        "make the steps again: those that were made differently and what depends on them; if there are none, all",
        execution=True,
    )


@dataclass(frozen=True)
class ExportConfig:
    """Write the target network in a format that other programs take, with a card that says what it is.

    Nothing is written where the other library does not compute what torch does.
    """

    first: ClassVar = ("model", "format", "int8", "licence", "overwrite")

    model: str | None = option(
        None, "a model.safetensors of retrain, or another run; if not given, this run's", execution=True
    )
    format: str = option(
        "onnx",
        "onnx and torch (a program of torch.export) have normalisation inside and take every network; torchvision and "
        "timm: weights for their own class of the same name; hf: a folder for transformers (ResNets)",
        choices=("onnx", "torch", "torchvision", "timm", "hf"),
    )
    licence: str | None = option(
        None, "licence of the weights, for the card; if not given, it is left for you to fill in"
    )
    opset: int = option(18, "version of ONNX's operators", low=18, high=23, of=("onnx",))
    int8: bool = option(
        False, "write the network in whole numbers of 8 bits too, with what that costs in the card", of=("onnx",)
    )
    data: str | None = option(
        None,
        "images that calibrate, and others that are compared; if not given, those that the network was trained on",
        execution=True,
        of=("int8",),
    )
    calibration: int = option(256, "images that calibrate", low=1, of=("int8",))
    held_out: int = option(1000, "images that are compared", low=1, of=("int8",))
    tolerance: float = option(
        1e-4,
        "largest difference of a number from torch's, as a share of the largest number where that is above 1",
        low=0,
    )
    overwrite: bool = option(False, "remove what the stage has made, and make it again", execution=True)
