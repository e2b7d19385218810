"""The settings of `ktransfer extract`, `cluster` and `assign`."""

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

    data: str | None = option(None, "images; if not given, those of the pretext stage", execution=True)
    name: str | None = option(None, "name of the feature file; if not given, that of the data folder")
    teacher: str | None = option(
        None,
        "a model.safetensors, a checkpoint of another project (with --arch), torchvision:NAME, timm:NAME, a folder of "
        "Hugging Face, efficientnet-lite0, hog, pixels or pkg.module:function; if not given, the run's teacher",
        execution=True,
    )
    arch: str | None = option(None, "the network of a checkpoint of another project, such as resnet50")
    weights: str | None = option(
        None,
        "weights of torchvision:NAME or timm:NAME: a file, or torchvision's name; if not given, those in torch's cache",
        execution=True,
    )
    layer: str | None = option(
        None,
        "layer to read, or list: show all; if not given, conv4_1 of our VGG, conv4 of our AlexNet, else the last",
    )
    token: str | None = option(
        None,
        "of a vision transformer: its class token, the mean of its patches, or these as maps; if not given, cls",
        choices=("cls", "mean", "patch"),
    )
    pool: int = option(4, "max-pool the maps to this grid", low=1, high=64)
    size: int = option(0, "side of the images in pixels; 0: that of the teacher's training", low=0, high=2048)
    l2: bool = option(False, "scale each row to length 1")
    dtype: str = option("float16", "number format of the stored features", choices=("float16", "float32"))
    batch: int = option(64, "images per forward pass", low=1)
    overwrite: bool = option(False, "remove what the stage has made, and make it again", execution=True)


@dataclass(frozen=True)
class ClusterConfig:
    """Group the features of all images by k-means.

    Features are extracted first where they are missing. The paper's k is 2000, for 1.3 million images.
    """

    first: ClassVar = ("k", "features", "engine", "memory", "sheet")

    features: str | None = option(
        None, "a feature file, or a .npy or .npz made elsewhere; if not given, that of the run", execution=True
    )
    keys: str | None = option(
        None,
        "of features made elsewhere: a list of their images, one path per line, in the order of the rows",
        execution=True,
    )
    data: str | None = option(
        None, "the images whose features are clustered; if not given, those of the run", execution=True
    )
    k: int = option(2000, "number of clusters", low=1)
    views: int = option(
        1,
        "how many clusterings are made: the first of k clusters, the others of k/4, k/2, k and 2k in turn, each along "
        "other random directions; for retrain --objective multi",
        low=1,
        high=64,
        before=1,
    )
    iterations: int = option(20, "largest number of iterations; it stops earlier when no label changes", low=1)
    algorithm: str = option(
        "lloyd",
        "lloyd: k-means on all rows; two-level: within sqrt(k) groups, for a k of 100,000 and more; minibatch: "
        "centroids move after each batch, for a quick first result",
        choices=("lloyd", "two-level", "minibatch"),
    )
    refine: int = option(0, "iterations of lloyd that follow two-level", low=0)
    batch_rows: int = option(4096, "rows per batch of minibatch", low=1)
    pca: int = option(0, "project the features onto so many principal components first; 0: no PCA", low=0)
    whiten: bool = option(False, "scale each principal component to variance 1; needs --pca")
    normalise: bool = option(True, "scale each row (after the PCA) to length 1")
    spherical: bool = option(False, "spherical k-means: centroids are scaled to length 1 too")
    start: str = option(
        "random",
        "first centroids. random: distinct rows; kmeans++: far apart, from a sample; kmeans-parallel: far apart, from "
        "all rows; or a file of centroids (.npy, or a clusters.h5)",
    )
    start_sample: int = option(
        0, "random rows that kmeans++ chooses from, held in memory; 0: 64 per cluster, at most 1 GiB", low=0
    )
    redo: int = option(1, "cluster so many times from different starts, and keep the best", low=1)
    min_size: int = option(
        0,
        "smallest number of rows of a cluster; smaller ones are filled from the heaviest, or dissolved at the end",
        low=0,
    )
    seed: int = option(0, "seed of the start", low=0, high=SEED_LIMIT)
    stability: bool = option(
        False, "cluster again from another seed and record how well both agree; takes twice as long"
    )
    quality_rows: int = option(2000, "rows on which silhouette and margin are measured", low=1, high=20_000)
    sheet: int = option(12, "clusters whose 16 nearest images are shown in clusters.png; 0: none", low=0, high=100)
    engine: str = option(
        "auto",
        "exact: our own, on a GPU where there is one; faiss, faiss-float16: on all GPUs; auto: the faster one on this "
        "machine (for two-level and minibatch, faiss). All give the same labels",
        choices=("auto", "faiss", "faiss-float16", "exact"),
        execution=True,
    )
    memory: float = option(
        0.0,
        "GB of memory per process; rows that do not fit are read again in each pass; 0: 3/4 of what is free",
        low=0,
        execution=True,
    )
    overwrite: bool = option(False, "remove what the stage has made, and make it again", execution=True)


@dataclass(frozen=True)
class AssignConfig:
    """Give each image its nearest centroid as pseudo-label.

    Clusters of one data set may label another, as in the paper.
    """

    first: ClassVar = ("data", "names", "features", "balanced", "memory")

    balanced: bool = option(
        False, "clusters of equal size, n / k rounded down or up, with the smallest sum of squares; on the CPU"
    )
    features: str | None = option(
        None,
        "a feature file, or a .npy or .npz made elsewhere; if not given, the one that was clustered",
        execution=True,
    )
    keys: str | None = option(
        None,
        "of features made elsewhere: a list of their images, one path per line, in the order of the rows",
        execution=True,
    )
    data: str | None = option(
        None, "label these images instead; their features are extracted in the same way", execution=True
    )
    names: str | None = option(
        None,
        "names of clusters, as the report's page saves them: clusters of one name become one label, junk has none",
        execution=True,
    )
    engine: str = option(
        "auto",
        "exact: our own, on a GPU where there is one; faiss, faiss-float16: on all GPUs; auto: the faster one on this "
        "machine. All give the same labels",
        choices=("auto", "faiss", "faiss-float16", "exact"),
        execution=True,
    )
    memory: float = option(
        0.0,
        "GB of memory per process; rows that do not fit are read again in each pass; 0: 3/4 of what is free",
        low=0,
        execution=True,
    )
    overwrite: bool = option(False, "remove what the stage has made, and make it again", execution=True)
