"""Checks before a clustering: rows that would spoil it, and rows that are equal."""

from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts.features import Features, valid_rows
from ktransfer.errors import UsageError
from ktransfer.progress import bar

from .engines.engine import blocks


class Findings(NamedTuple):
    """What `check_features` saw: valid rows, distinct ones among them, columns, and columns that never change."""

    rows: int
    distinct: int
    columns: int
    constant: int


def check_features(features: Features, k: int) -> Findings:
    """Find what would spoil a clustering, in one pass over the valid rows.

    Raises:
        UsageError: no valid row, NaN, infinity or a number beyond 1e18 in one, or fewer than k distinct rows.
    """
    places = np.flatnonzero(features.valid)
    if not len(places):
        raise UsageError(f"{features.path}: no image is valid; see the broken images that extract listed")
    columns = features.rows.shape[1]
    first = np.asarray(features.rows[places[0]])
    constant = np.ones(columns, bool)
    digests = np.empty(len(places), np.uint64)
    broken: list[int] = []
    read = valid_rows(features)
    # Beyond, squares overflow float32 and lengths with them; float16 cannot get there.
    most = np.float32(1e18) if features.rows.dtype == np.float32 else np.float16(np.inf)
    with bar(len(places), "check features", "rows") as shown:
        for start, stop in blocks(len(places), columns):
            block = read(start, stop)
            broken.extend(places[start:stop][~(np.abs(block) < most).all(axis=1)].tolist())
            constant &= (block == first).all(axis=0)
            digests[start:stop] = row_digests(block)
            shown.update(stop - start)
    if broken:
        names = ", ".join(repr(features.keys[row]) for row in broken[:3])
        raise UsageError(
            f"{features.path}: {len(broken)} rows hold NaN, infinity or numbers beyond 1e18, first {names}: "
            + (
                "mend the file that they were taken from, or leave these rows out of it"
                if features.attributes.get("teacher") in (None, "made elsewhere")
                else "extract the features again, with --dtype float32 if that does not help"
            )
        )
    distinct = len(np.unique(digests))
    if distinct < k:
        raise UsageError(f"k = {k}, but only {distinct} of the {len(places)} rows are distinct: take a smaller --k")
    return Findings(len(places), distinct, columns, int(constant.sum()))


def row_digests(block: NDArray[Any]) -> NDArray[np.uint64]:
    """(b,) uint64 for (b, d) contiguous floats: equal for rows that are the same point, -0 and 0 being one number."""
    bits = block.view(f"u{block.dtype.itemsize}")
    plain = np.where(bits == 1 << 8 * block.dtype.itemsize - 1, 0, bits)  # -0 is 0
    return np.frombuffer(b"".join(blake2b(row.tobytes(), digest_size=8).digest() for row in plain), np.uint64)
