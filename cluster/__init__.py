"""Room 2: teacher -> features -> centroids -> pseudo-labels."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .config import AssignConfig as AssignConfig
    from .config import ClusterConfig as ClusterConfig
    from .config import ExtractConfig as ExtractConfig
    from .estimator import KMeans as KMeans
    from .extraction import extract as extract
    from .stage import assign as assign
    from .stage import cluster as cluster

__all__ = ["AssignConfig", "ClusterConfig", "ExtractConfig", "KMeans", "assign", "cluster", "extract"]
__getattr__ = exports(
    __name__,
    {
        "extract": "extraction",
        "cluster": "stage",
        "assign": "stage",
        "KMeans": "estimator",
        "ExtractConfig": "config",
        "ClusterConfig": "config",
        "AssignConfig": "config",
    },
)
