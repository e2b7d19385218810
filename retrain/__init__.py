"""Room 3: pseudo-labels -> a target network; pseudo-boxes -> a student detector."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .config import RetrainConfig as RetrainConfig
    from .config import SelftrainConfig as SelftrainConfig
    from .selftraining import selftrain as selftrain
    from .stage import retrain as retrain

__all__ = ["RetrainConfig", "SelftrainConfig", "retrain", "selftrain"]
__getattr__ = exports(
    __name__,
    {
        "retrain": "stage",
        "selftrain": "selftraining",
        "RetrainConfig": "config",
        "SelftrainConfig": "config",
    },
)
