"""Engines by name."""

from ktransfer.errors import UsageError
from ktransfer.progress import say

from . import native
from .engine import Engine, faiss_engine
from .exact import exact_engine


def choose_engine(name: str) -> Engine:
    """`faiss`, `exact`, or `auto`: the faster on this machine; says which, and why. All give the same labels.

    Raises:
        UsageError: another name.
    """
    if name == "exact":
        engine, reason = exact_engine(), "" if native.library() else "; its extension was not built: a dense product"
    elif name == "faiss":
        engine, reason = faiss_engine(), ""
    elif name == "auto":
        engine, reason = _auto()
    else:
        raise UsageError(f"engine '{name}': give auto, faiss or exact")
    say(f"k-means engine: {engine.name}{reason}")
    return engine


def _auto() -> tuple[Engine, str]:
    import faiss

    if faiss.get_num_gpus():
        return faiss_engine(), ", as there is a GPU"
    if native.library() is None:
        return faiss_engine(), ", as the exact engine's extension was not built or this processor has no AVX2"
    return exact_engine(), ", as it is faster than faiss without a GPU"
