"""Room 3: pseudo-labels -> a target network; pseudo-boxes -> a student detector; networks for use elsewhere."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .config import ExportConfig, RetrainConfig, SelftrainConfig
    from .selftraining.stage import selftrain
    from .stage import retrain
    from .students.exporting import export
    from .students.loading import load_model

__all__ = ["ExportConfig", "RetrainConfig", "SelftrainConfig", "export", "load_model", "retrain", "selftrain"]
__getattr__ = exports(
    __name__,
    {
        "export": "students.exporting",
        "load_model": "students.loading",
        "retrain": "stage",
        "selftrain": "selftraining.stage",
        "ExportConfig": "config",
        "RetrainConfig": "config",
        "SelftrainConfig": "config",
    },
)
