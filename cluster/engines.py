"""Engines by name."""

from collections.abc import Callable

from ktransfer.errors import UsageError
from ktransfer.progress import say

from . import native
from .engine import Engine, faiss_engine
from .exact import exact_engine


def choose_engine(name: str, room: int | None = None, tell: Callable[[str], object] = say) -> Engine:
    """`faiss`, `exact`, or `auto`: the faster on this machine; says which, and why. All give the same labels.

    Args:
        name: one of the three.
        room: bytes that the exact engine may keep between passes; its own limit when not given.
        tell: is given a line for people, also when the exact engine changes its ways.

    Raises:
        UsageError: another name.
    """
    if name not in ("auto", "faiss", "exact"):
        raise UsageError(f"engine '{name}': give auto, faiss or exact")
    chosen, reason = _auto() if name == "auto" else (name, "")
    if name == "exact" and native.library() is None:
        reason = "; its extension was not built, or this processor has no AVX2: a dense product"
    engine = faiss_engine() if chosen == "faiss" else exact_engine(room=room, tell=tell)
    tell(f"k-means engine: {engine.name}{reason}")
    return engine


def _auto() -> tuple[str, str]:
    import faiss

    if faiss.get_num_gpus():
        return "faiss", ", as there is a GPU"
    if native.library() is None:
        return "faiss", ", as the exact engine's extension was not built or this processor has no AVX2"
    return "exact", ", as it is faster than faiss without a GPU"
