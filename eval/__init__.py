"""Room 4: how good is a network: evaluated by named protocols, and compared."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from .comparison import compare
    from .config import EvalConfig
    from .stage import evaluate

__all__ = ["EvalConfig", "compare", "evaluate"]
__getattr__ = exports(__name__, {"evaluate": "stage", "compare": "comparison", "EvalConfig": "config"})
