"""What `ktransfer extract`, `cluster` and `assign` can be told."""

from dataclasses import dataclass
from typing import ClassVar

from ktransfer.config import option
from ktransfer.training.options import SEED_LIMIT, MachineOptions


@dataclass(frozen=True)
class ExtractConfig(MachineOptions):
    """Write a layer's features of every image.

    The defaults are those reported of the paper: conv4 of VGG-16, max-pooled to 4x4x512.
    """

    first: ClassVar = ("data", "teacher", "layer", "pool", "size")

    data: str | None = option(None, "images; those of the pretext stage when not given", execution=True)
    name: str | None = option(None, "name of the feature file; the data folder's own name when not given")
    teacher: str | None = option(
        None,
        "a model.safetensors, a checkpoint made elsewhere (with --arch), torchvision:NAME, timm:NAME, hog or pixels; "
        "that of the run when not given",
        execution=True,
    )
    arch: str | None = option(None, "the network that a checkpoint made elsewhere belongs to, such as resnet50")
    weights: str | None = option(
        None,
        "of torchvision:NAME or timm:NAME: a file, or a name of torchvision's; what is in torch's cache when not given",
        execution=True,
    )
    layer: str | None = option(
        None,
        "which layer to read, or list; when not given, conv4_1 of our VGG, conv4 of our AlexNet, else the last",
    )
    token: str | None = option(
        None,
        "of a vision transformer: its class token, the mean of its patches, or these as maps; cls when not given",
        choices=("cls", "mean", "patch"),
    )
    pool: int = option(4, "max-pool the maps to this grid", low=1, high=64)
    size: int = option(0, "side of the images in pixels; 0: as in the teacher's training", low=0, high=2048)
    l2: bool = option(False, "scale each row to length 1")
    dtype: str = option("float16", "how the features are stored", choices=("float16", "float32"))
    batch: int = option(64, "images a forward pass", low=1)
    overwrite: bool = option(False, "make the stage again", execution=True)


@dataclass(frozen=True)
class ClusterConfig:
    """Group the features of all images by k-means.

    Features are extracted first where they are missing. The paper's k is 2000, for 1.3 million images.
    """

    first: ClassVar = ("k", "features", "engine", "memory", "sheet")

    features: str | None = option(
        None, "a feature file, also a .npy or .npz made elsewhere; that of the run when not given", execution=True
    )
    keys: str | None = option(
        None, "of features made elsewhere: a list of their images, one path a line, row by row", execution=True
    )
    data: str | None = option(
        None, "the images whose features are clustered; those of the run when not given", execution=True
    )
    k: int = option(2000, "number of clusters", low=1)
    iterations: int = option(20, "at most so many; fewer if no label moves", low=1)
    algorithm: str = option(
        "lloyd",
        "lloyd: k-means on all rows; two-level: in sqrt(k) groups first, for a k of 100,000 and more; minibatch: "
        "centroids move after each batch, for a first look",
        choices=("lloyd", "two-level", "minibatch"),
    )
    refine: int = option(0, "iterations of lloyd after two-level", low=0)
    batch_rows: int = option(4096, "rows of a batch of minibatch", low=1)
    pca: int = option(0, "project onto so many principal components before; 0: none", low=0)
    whiten: bool = option(False, "scale each principal component to variance 1; needs --pca")
    normalise: bool = option(True, "scale each row (after the PCA) to length 1")
    spherical: bool = option(False, "k-means by cosine: centroids of length 1 too")
    start: str = option(
        "random",
        "random: distinct rows; kmeans++: spread out, on a sample; kmeans-parallel: spread out, on all rows; "
        "or a file of centroids (.npy, or a clusters.h5)",
    )
    start_sample: int = option(
        0, "random rows that kmeans++ looks at, held in memory; 0: 64 for each cluster, at most 1 GiB", low=0
    )
    redo: int = option(1, "cluster from so many starts and keep the best", low=1)
    min_size: int = option(
        0, "least rows of a cluster; smaller ones are filled from the heaviest, or dissolved at the end", low=0
    )
    seed: int = option(0, "the start is a function of it", low=0, high=SEED_LIMIT)
    stability: bool = option(False, "cluster again from another seed and record how far both agree; twice the time")
    quality_rows: int = option(2000, "rows whose silhouette and margin are recorded", low=1, high=20_000)
    sheet: int = option(12, "clusters whose 16 nearest images are drawn (clusters.png); 0: none", low=0, high=100)
    engine: str = option(
        "auto",
        "exact: our own, on a GPU where there is one; faiss, faiss-float16: on all GPUs; auto: the faster here (groups "
        "and batches: faiss); labels are the same",
        choices=("auto", "faiss", "faiss-float16", "exact"),
        execution=True,
    )
    memory: float = option(
        0.0, "GB of memory for a process; what does not fit is streamed; 0: 3/4 of what is free", low=0, execution=True
    )
    overwrite: bool = option(False, "make the stage again", execution=True)


@dataclass(frozen=True)
class AssignConfig:
    """Give each image its nearest centroid as pseudo-label.

    Clusters of one data set may label another, as in the paper.
    """

    first: ClassVar = ("data", "features", "balanced", "engine", "memory")

    balanced: bool = option(
        False, "clusters of equal size, n / k rounded down or up, at the least sum of squares; on the CPU"
    )
    features: str | None = option(
        None, "a feature file, also a .npy or .npz made elsewhere; the one clustered when not given", execution=True
    )
    keys: str | None = option(
        None, "of features made elsewhere: a list of their images, one path a line, row by row", execution=True
    )
    data: str | None = option(
        None, "label these images instead (their features are extracted as the others were)", execution=True
    )
    engine: str = option(
        "auto",
        "exact: our own, on a GPU where there is one; faiss, faiss-float16: on all GPUs; auto: the faster here; "
        "labels are the same",
        choices=("auto", "faiss", "faiss-float16", "exact"),
        execution=True,
    )
    memory: float = option(
        0.0, "GB of memory for a process; what does not fit is streamed; 0: 3/4 of what is free", low=0, execution=True
    )
    overwrite: bool = option(False, "make the stage again", execution=True)
