"""The C++ kernels of `exact.cpp`, where they were built: found, described to ctypes, called on numpy arrays."""

import ctypes
import importlib.util
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Fields = dict[str, Any]  # of a job: numbers, and C-contiguous arrays

DENSE, FILTERED, PROJECT, PAIRED, GUESS = range(5)


class Job(ctypes.Structure):
    """What a kernel works on; the fields are explained at `Job` in exact.cpp."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "d", "k", "p")),
        *((name, c_void_p) for name in ("x", "origin", "middle", "raw", "centroids", "packed", "bias")),
        *((name, c_void_p) for name in ("bounds", "moved", "projected", "order", "some", "some_bias")),
        ("few", c_int64),
        ("clear", c_void_p),
        *((name, c_void_p) for name in ("weights", "labels", "distances", "sums")),
        *((name, c_float) for name in ("longest", "dense_error", "dot_error", "filter_error", "rest_error", "tiny")),
        *((name, c_float) for name in ("floor", "scale")),
        ("widest", c_double),
    )


@cache
def library() -> Any:
    """The loaded library; None where it was not built of these sources or the processor lacks AVX2."""
    found = importlib.util.find_spec("ktransfer.cluster.engines._exact")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
        loaded.ktransfer_panel.restype = c_int64
        loaded.ktransfer_pack.argtypes = (c_int, c_int64, c_int64, c_void_p, c_void_p)
        loaded.ktransfer_pack.restype = None
        loaded.ktransfer_run.argtypes = (c_int, c_int, c_int, POINTER(Job))
        loaded.ktransfer_run.restype = c_int64
        loaded.ktransfer_order.argtypes = (c_int64, c_int64, c_void_p, c_void_p)
        loaded.ktransfer_order.restype = None
        loaded.ktransfer_update.argtypes = (c_int, c_int, POINTER(Job))
        loaded.ktransfer_update.restype = None
        same = loaded.ktransfer_job_bytes() == ctypes.sizeof(Job)
    except (OSError, AttributeError):
        return None
    return loaded if same and loaded.ktransfer_level() else None


def pack(level: int, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k, d) in the panels that the kernels read."""
    panel = library().ktransfer_panel(level)
    k, d = matrix.shape
    packed = np.empty(-(-k // panel) * panel * d, np.float32)
    library().ktransfer_pack(level, k, d, matrix.ctypes.data, packed.ctypes.data)
    return packed


def pad(level: int, values: NDArray[np.float32], beyond: float = -np.inf) -> NDArray[np.float32]:
    """(k,) padded to whole panels; a bias of -inf never wins."""
    panel = library().ktransfer_panel(level)
    return np.concatenate([values, np.full(-len(values) % panel, beyond, np.float32)])


def run(level: int, threads: int, kind: int, fields: Fields) -> int:
    """Work on one block; how many products of full length finished what the bounds left open.

    Raises:
        MemoryError: there is none for the scratch of a thread.
    """
    dots = int(library().ktransfer_run(level, threads, kind, byref(_job(fields))))
    if dots < 0:
        raise MemoryError("no memory for the scratch of the k-means kernels")
    return dots


def update(level: int, threads: int, fields: Fields) -> None:
    """The rows of a block, in the order of `order`, added to `sums`."""
    library().ktransfer_update(level, threads, byref(_job(fields)))


def order(labels: NDArray[np.int32], k: int) -> NDArray[np.int64]:
    """Places sorted by label (in [0, k)), then by place."""
    places = np.empty(len(labels), np.int64)
    library().ktransfer_order(len(labels), k, labels.ctypes.data, places.ctypes.data)
    return places


def _job(fields: Fields) -> Job:
    made = Job()
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            value = value.ctypes.data
        setattr(made, name, value)
    return made
