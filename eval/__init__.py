"""Room 4: how good is a network: linear probes."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .config import EvalConfig as EvalConfig
    from .stage import evaluate as evaluate

__all__ = ["EvalConfig", "evaluate"]
__getattr__ = exports(__name__, {"evaluate": "stage", "EvalConfig": "config"})
