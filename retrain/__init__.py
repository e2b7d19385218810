"""Room 3: pseudo-labels -> a target network."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .config import RetrainConfig as RetrainConfig
    from .stage import retrain as retrain

__all__ = ["RetrainConfig", "retrain"]
__getattr__ = exports(__name__, {"retrain": "stage", "RetrainConfig": "config"})
