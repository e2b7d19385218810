"""Room 3: pseudo-labels -> a target network; pseudo-boxes -> a student detector."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .config import RetrainConfig, SelftrainConfig
    from .selftraining.stage import selftrain
    from .stage import retrain

__all__ = ["RetrainConfig", "SelftrainConfig", "retrain", "selftrain"]
__getattr__ = exports(
    __name__,
    {
        "retrain": "stage",
        "selftrain": "selftraining.stage",
        "RetrainConfig": "config",
        "SelftrainConfig": "config",
    },
)
