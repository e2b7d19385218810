"""Room 2: teacher -> features -> centroids -> pseudo-labels."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .assignment import assign
    from .config import AssignConfig, ClusterConfig, ExtractConfig
    from .estimator import KMeans
    from .extraction import extract
    from .stage import cluster

__all__ = ["AssignConfig", "ClusterConfig", "ExtractConfig", "KMeans", "assign", "cluster", "extract"]
__getattr__ = exports(
    __name__,
    {
        "extract": "extraction",
        "cluster": "stage",
        "assign": "assignment",
        "KMeans": "estimator",
        "ExtractConfig": "config",
        "ClusterConfig": "config",
        "AssignConfig": "config",
    },
)
