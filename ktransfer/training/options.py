"""The settings of every training, and those of every stage that are about the machine."""

import importlib.util
from dataclasses import dataclass

from ktransfer.config import option
from ktransfer.errors import UsageError

SEED_LIMIT = 2**32 - 1


@dataclass(frozen=True)
class MachineOptions:
    """Where and how a stage runs; nothing here changes results beyond float rounding, but for the seed."""

    seed: int = option(0, "seed of all random choices", low=0, high=SEED_LIMIT)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", execution=True)
    precision: str = option(
        "auto",
        "arithmetic of convolutions; auto: bfloat16 where the device has it in hardware",
        choices=("auto", "float32", "bfloat16"),
    )
    workers: int = option(0, "threads that read images; 0: one per CPU core", low=0, high=256, execution=True)
    max_broken: float = option(0.01, "largest share of broken images that is accepted", low=0, high=1, execution=True)


@dataclass(frozen=True)
class LoopOptions(MachineOptions):
    """The settings of the training loop. Stages inherit them and choose their own defaults."""

    epochs: int = option(90, "passes over the training images", low=1)
    batch: int = option(256, "images per training step", low=2)
    micro_batch: int = option(
        0,
        "images of a step that are computed at once, so that a batch of any size fits into memory; 0: all. Results "
        "stay the same, except with batch norm, whose statistics are then of so many images",
        low=0,
        execution=True,
    )
    cache_images: str = option(
        "auto",
        "where decoded images are kept between epochs; auto: in half of a GPU's free memory, else in a quarter of the "
        "machine's free memory, if they fit",
        choices=("auto", "device", "ram", "off"),
        execution=True,
    )
    compile: str = option(
        "auto",
        "compile the training step; auto: on CUDA, and if that fails, go on without",
        choices=("auto", "on", "off"),
        execution=True,
    )
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay; not applied to biases and batch norms", low=0)
    schedule: str = option(
        "cosine",
        "learning rate after the warm-up. cosine: down to 0; step: x 0.1 after 1/3, 2/3 and 8/9 of the training; "
        "sevenths: after 2/7, 4/7 and 6/7, as Caffe's solvers for ImageNet; he: "
        "x 0.1 when 960,000 and 320,000 images are left, in short trainings after 2/3 and 8/9; constant",
        choices=("cosine", "step", "sevenths", "he", "constant"),
    )
    tensorboard: bool = option(False, "write TensorBoard events beside metrics.jsonl", execution=True)
    warmup: float = option(0.05, "share of the steps over which the learning rate rises from 0", low=0, high=0.5)

    def __post_init__(self) -> None:
        """Refuse impossible values, and what is not installed, when the command starts."""
        if self.micro_batch == 1:
            raise UsageError("--micro-batch 1: batch norm needs two images; give 0 (all) or at least 2")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError("--tensorboard: TensorBoard is not installed; pip install 'ktransfer[report]'")


@dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """The settings of a training with one learning rate."""

    lr: float = option(0.01, "learning rate after the warm-up", low=0)
    clip: float = option(
        0.0, "largest norm of a step's gradient; larger ones are scaled down to it; 0: no limit", low=0
    )
