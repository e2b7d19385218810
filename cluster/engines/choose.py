"""Engines by name."""

from collections.abc import Callable

import torch

from ktransfer import distributed
from ktransfer.errors import UsageError
from ktransfer.progress import say

from . import native
from .device import device_engine
from .engine import Engine, faiss_engine
from .exact import exact_engine

ENGINES = ("auto", "faiss", "faiss-float16", "exact")


def choose_engine(name: str, room: int | None = None, tell: Callable[[str], object] = say) -> Engine:
    """`exact` (on the GPU where there is one), `faiss`, `faiss-float16`, or `auto`: the faster on this machine.

    Says which, and why. All give the same labels.

    Args:
        name: one of the four.
        room: bytes of main memory that the exact engine may keep between passes; its own limit when not given.
        tell: is given a line for people, also when the exact engine changes its ways.

    Raises:
        UsageError: another name, or `faiss-float16` without a GPU.
    """
    if name not in ENGINES:
        raise UsageError(f"engine '{name}': give {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen, reason = _auto(gpus) if name == "auto" else (name, "")
    if chosen == "exact":
        if gpus:
            engine = device_engine("cuda", tell=tell)
            if gpus > 1 and distributed.world_size() == 1:
                reason += f"; on one of {gpus} GPUs: torchrun --nproc-per-node {gpus} -m -- ktransfer ... uses all"
        else:
            engine = exact_engine(room=room, tell=tell)
            if native.library() is None:
                reason = "; slower (a dense product), as its extension was not built or this processor has no AVX2"
    else:
        engine = faiss_engine(float16=_float16(chosen))
    tell(f"k-means engine: {engine.name}{reason}")
    return engine


def parts_engine(name: str) -> Engine:
    """For the batches and groups of the other algorithms, many and small: what is named; of `auto`, faiss.

    The exact engine keeps nothing of them for the next pass here: no plan counts their memory.

    Raises:
        UsageError: as `choose_engine`.
    """
    return choose_engine("faiss" if name == "auto" else name, 0, lambda line: None)


def device_of(name: str) -> str:
    """What `choose_engine` will work on: "cuda" or "cpu"."""
    if name in ("auto", "exact"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    import faiss

    return "cuda" if faiss.get_num_gpus() else "cpu"


def _auto(gpus: int) -> tuple[str, str]:
    if gpus:
        return "exact", ", as it keeps the rows on the GPU, to which faiss copies them in each pass"
    if native.library() is None:
        return "faiss", ", as the exact engine's extension was not built or this processor has no AVX2"
    return "exact", ", as it is faster than faiss without a GPU"


def _float16(name: str) -> bool:
    if name != "faiss-float16":
        return False
    import faiss

    if not faiss.get_num_gpus():
        raise UsageError(
            "--engine faiss-float16: faiss sees no GPU here, and on a CPU it is slower; give exact or faiss"
        )
    return True
