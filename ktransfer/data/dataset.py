"""What `--data` names: a folder, a list of paths, a pack or `scenes:`, as rows that never move."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ktransfer.errors import BrokenImage, StageError, UsageError
from ktransfer.files import LONGEST
from ktransfer.images import decoding
from ktransfer.machine import cores
from ktransfer.progress import bar

COMPARED = 64
_LONGEST_ENDING = ".progress.part"
UNKNOWN = -1
Reader = Callable[[int | None], NDArray[np.uint8]]
_ODD = re.compile("[\\\\\x00-\x1f\x7f\udc80-\udcff]")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in a fixed order; row i is the same image in every stage, also when it is broken.

    `spec` is what the user gave, `name` a file name without ending. `keys` are paths relative to the folder (with "/"),
    the paths of a list as written, or "CLASS/000012" for scenes. In all of them a backslash is written `\\\\`, and a
    control character or a byte that is not UTF-8 `\\xNN`: so every key is valid Unicode on one line, and can be turned
    back. `targets` is (n,) int32, an index into `classes`, -1 where unknown. `fingerprint` is the hex SHA-256 over keys
    and file sizes; of a pack it is that of the pack. `read(row, short_side)` returns (height, width, 3) uint8 (see
    `decoding.decode`), `short_side(row)` looks at the header alone; both raise `BrokenImage`. `reader(row)` is `read`
    of that row alone and can be pickled, for another process. `tags` are there where an image may belong to several of
    the `classes`: (n, classes) int8, 1 it does, 0 it does not, -1 not counted; `targets` are then all -1.
    """

    spec: str
    name: str
    keys: tuple[str, ...]
    targets: NDArray[np.int32]
    classes: tuple[str, ...]
    fingerprint: str
    read: Callable[[int, int | None], NDArray[np.uint8]]
    short_side: Callable[[int], int] | None = None
    reader: Callable[[int], Reader] | None = None
    tags: NDArray[np.int8] | None = None

    def __len__(self) -> int:
        """Number of rows, broken images included."""
        return len(self.keys)


def check_broken(broken: Mapping[int, str], total: int, max_broken: float, dataset: Dataset) -> None:
    """Raise StageError where more than the share `max_broken` (0 to 1) of `total` images is broken.

    Args:
        broken: row to reason, as `ImageLoader.broken`.
        total: images that were read.
        max_broken: the largest share that is accepted.
        dataset: gives the keys for the message.
    """
    if len(broken) <= max_broken * total:
        return
    examples = "; ".join(f"{dataset.keys[row]}: {broken[row]}" for row in sorted(broken)[:3])
    share = len(broken) / max(total, 1)
    raise StageError(
        f"{len(broken):,} of {total:,} images of {dataset.spec} are broken ({share:.2%}, more than the "
        f"{max_broken:.2%} that are allowed), for example {examples}; repair or remove them, or raise --max-broken"
    )


def same_images(data: Dataset, other: Dataset, pairs: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether the rows of each pair, one of `data` and one of `other`, show the same in all pixels; broken ones do not.

    They are compared at a short side of `COMPARED` pixels, so that a large JPEG is read at reduced scale.
    """

    def same(pair: tuple[int, int]) -> bool:
        try:
            return np.array_equal(data.read(pair[0], COMPARED), other.read(pair[1], COMPARED))
        except BrokenImage:
            return False

    found: list[bool] = []
    with bar(len(pairs), "compare images") as shown, ThreadPoolExecutor(cores()) as pool:
        for one in pool.map(same, pairs):
            found.append(one)
            shown.update(1)
    return found


def of_files(
    spec: str,
    root: Path,
    name: str,
    names: Sequence[str],
    sizes: Sequence[int],
    labels: Sequence[str],
    turned: bool = True,
    changed: Mapping[str, str] = MappingProxyType({}),
) -> Dataset:
    """Images that are files below `root`, of `sizes` bytes, with labels ("" where there is none).

    They are upright, or, where not `turned`, as they are stored. `changed`: what tells the bytes of those apart that
    are not as they were, in spite of their size.
    """
    keys = escaped(names)
    classes = class_names(escaped(labels))
    number = {label: index for index, label in enumerate(classes)}
    digest = hashlib.sha256()
    for key, file, size in zip(keys, names, sizes, strict=True):
        mark = f"\0{changed[file]}" if file in changed else ""
        digest.update(f"{key}\0{size}{mark}\n".encode())
    digest.update(b"" if turned else b"exif ignored")
    return Dataset(
        spec=spec,
        name=file_name(name),
        keys=tuple(keys),
        targets=np.array([number.get(label, UNKNOWN) for label in escaped(labels)], np.int32),
        classes=classes,
        fingerprint=digest.hexdigest(),
        read=lambda row, short_side: decoding.decode(root / names[row], short_side, turned),
        short_side=lambda row: decoding.short_side(root / names[row]),
        reader=lambda row: partial(decoding.decode, root / names[row], turned=turned),
    )


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The distinct labels in order: of value where all are whole numbers, else of code points."""
    found = set(labels) - {""}
    numeric = all(re.fullmatch("[0-9]{1,18}", label) for label in found)
    return tuple(sorted(found, key=lambda label: (int(label) if numeric else 0, label)))


def escaped(names: Sequence[str]) -> list[str]:
    """Names as keys are written (`Dataset`)."""
    return [_ODD.sub(_escape, name) for name in names]


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    # os.scandir hands over an undecodable byte as U+DC00 + byte.
    return "\\\\" if character == "\\" else f"\\x{ord(character) & 0xFF:02x}"


def rows_of(data: Dataset, keys: Sequence[str], source: Path) -> NDArray[np.int64]:
    """(m,) int64, the row of the data that each of m keys of the file `source` names.

    Raises:
        UsageError: one of them is no image of the data.
    """
    place = {key: row for row, key in enumerate(data.keys)}
    missing = [key for key in keys if key not in place]
    if missing:
        raise UsageError(
            f"{source}: {len(missing)} of {len(keys)} keys are not images of {data.spec}, such as {missing[0]}; give "
            "the --data that was labelled"
        )
    return np.array([place[key] for key in keys], np.int64)


def fits(name: str) -> bool:
    """Whether a file can be called so, and what is written beside it (`NAME.progress.part`)."""
    return len(os.fsencode(name)) <= LONGEST - len(_LONGEST_ENDING)


def file_name(name: str) -> str:
    """A file name without ending for what is called `name`.

    Short enough for whatever is added to it, in any alphabet: 60 characters, or fewer where they take many bytes."""
    found = re.sub(r"[^\w.-]+", "_", name).lstrip(".-")[:60] or "data"
    while not fits(found + ".h5"):
        found = found[:-1]
    return found
