"""Room 3: pseudo-labels -> a target network; pseudo-boxes -> a student detector; networks for use elsewhere."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .classifier import load_model
    from .config import ExportConfig, RetrainConfig, SelftrainConfig
    from .exporting import export
    from .selftraining.stage import selftrain
    from .stage import retrain

__all__ = ["ExportConfig", "RetrainConfig", "SelftrainConfig", "export", "load_model", "retrain", "selftrain"]
__getattr__ = exports(
    __name__,
    {
        "export": "exporting",
        "load_model": "classifier",
        "retrain": "stage",
        "selftrain": "selftraining.stage",
        "ExportConfig": "config",
        "RetrainConfig": "config",
        "SelftrainConfig": "config",
    },
)
