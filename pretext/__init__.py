"""Room 1: images -> a teacher that solves a pretext task."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .config import PretextConfig
    from .stage import pretext

__all__ = ["PretextConfig", "pretext"]
__getattr__ = exports(__name__, {"pretext": "stage", "PretextConfig": "config"})
