"""Tables of HDF5 files, read only where the file holds what it states."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def table(file: Any, name: str, kinds: str, axes: int) -> NDArray[Any]:
    """A data set as an array.

    Args:
        file: an open file or group of h5py.
        kinds: letters of numpy's `dtype.kind` that are allowed.
        axes: how many it must have, each of at least 1.

    Raises:
        ValueError: it is missing, of another kind or shape, or states more numbers than are stored: a few bytes can
            state terabytes.
    """
    found = file.get(name)
    if getattr(found, "ndim", None) != axes or found.dtype.kind not in kinds or not found.size:
        raise ValueError(f"{name} is no table of {axes} axes of numbers of the right kind")
    if found.nbytes > found.id.get_storage_size():
        raise ValueError(f"{name} states {found.shape}, and not all of it is stored")
    return np.asarray(found)
