"""Images that two parts of a data set share, by content: byte for byte, under whatever name.

Of files those of equal size are compared, by a digest of both ends first, and in full only where these agree; packs
hold a digest of each image. So to find them costs little beside decoding. What was encoded anew is not found.
"""

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ktransfer.data.dataset import Dataset
from ktransfer.data.packs import Place, read_image
from ktransfer.images import decoding
from ktransfer.machine import cores
from ktransfer.progress import say_once, track

END = 2**12  # bytes at either end of a file that are looked at first
TOLD, JOB = 3, 256
Look = Callable[[Path], Hashable]


def shared(data: Dataset, other: Dataset) -> list[tuple[int, int]]:
    """A row of `data`, the first, and one of `other` for each image of `other` that is in both.

    Empty files, and images that are drawn when they are asked for, are in no other part.
    """
    rows = [list(range(len(one))) for one in (data, other)]
    mine, theirs = dict[int, Hashable](), dict[int, Hashable]()
    for look in (_size, _ends, _whole):
        mine, theirs = (_looked(one, some, look) for one, some in zip((data, other), rows, strict=True))
        both = set(mine.values()) & set(theirs.values())
        rows = [[row for row, content in side.items() if content in both] for side in (mine, theirs)]
        if not both:
            return []
    first = {mine[row]: row for row in reversed(rows[0])}
    return [(first[theirs[row]], row) for row in rows[1]]


def tell_shared(spec: str, data: Dataset, other: Dataset) -> int:
    """Say how many images of the test part `other` are training images, `data`, too; their number."""
    pairs = shared(data, other)
    if pairs:
        such = ", ".join(other.keys[row] for _, row in pairs[:TOLD])
        say_once(
            f"{spec}: {len(pairs):,} of its {len(other):,} test images are training images too, byte for byte, such as "
            f"{such}: what is measured on these says nothing of new images"
        )
    return len(pairs)


def _looked(data: Dataset, rows: Sequence[int], look: Look) -> dict[int, Hashable]:
    """Row -> what `look` tells of its image, without those of which nothing is told."""

    def content(row: int) -> Hashable:
        source = _source(data, row)
        if isinstance(source, Place):
            return (source.digest, source.length) if source.valid else None
        try:
            return None if source is None else look(source)
        except (OSError, ValueError):  # a broken image, which is said elsewhere
            return None

    jobs = [rows[at : at + JOB] for at in range(0, len(rows), JOB)]
    with ThreadPoolExecutor(cores()) as pool:
        told = pool.map(lambda job: [(row, content(row)) for row in job], jobs)
        shown = track(told, len(jobs), f"compare images of {data.name}", "jobs")
        return {row: found for job in shown for row, found in job if found is not None}


def _source(data: Dataset, row: int) -> Path | Place | None:
    """The file, or the place in a pack, that an image is read from, as its `reader` holds it."""
    reader = data.reader(row) if data.reader is not None else None
    if not isinstance(reader, partial) or reader.func not in (decoding.decode, read_image):
        return None
    held = reader.args[0]
    return held if isinstance(held, Path | Place) else None


def _size(path: Path) -> Hashable:
    return os.stat(path).st_size or None  # noqa: PTH116 -- Path objects cost more than the call


def _ends(path: Path) -> Hashable:
    with path.open("rb", buffering=0) as handle:
        size = os.fstat(handle.fileno()).st_size
        ends = handle.read(END)
        if size > END:
            ends += os.pread(handle.fileno(), END, max(END, size - END))
    return size, hashlib.blake2b(ends, digest_size=16).digest()


def _whole(path: Path) -> Hashable:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
