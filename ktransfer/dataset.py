"""What `--data` names: a folder, a list of paths, a pack or `scenes:`, as rows that never move."""

import csv
import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktransfer import images
from ktransfer.errors import BrokenPicture, StageError, UsageError
from ktransfer.folders import ENDINGS, file_size, walk
from ktransfer.machine import cores
from ktransfer.progress import bar, say_once

COMPARED = 64
LISTS = (".txt", ".csv", ".tsv")
PACKS = (".h5", ".hdf5")
PATH_COLUMNS = ("path", "file", "filename", "key")
LABEL_COLUMNS = ("label", "class", "target")
VAL_NAMES = ("val", "valid", "validation", "test")
UNKNOWN = -1
Reader = Callable[[int | None], NDArray[np.uint8]]
_ODD = re.compile("[\\\\\x00-\x1f\x7f\udc80-\udcff]")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures in a fixed order; row i is the same picture in every stage, also when it is broken.

    `spec` is what the user gave, `name` a file name without ending. `keys` are paths relative to the folder (with "/"),
    the paths of a list as written, or "CLASS/000012" for scenes. In all of them a backslash is written `\\\\`, and a
    control character or a byte that is not UTF-8 `\\xNN`: so every key is valid Unicode on one line, and can be turned
    back. `targets` is (n,) int32, an index into `classes`, -1 where unknown. `fingerprint` is the hex SHA-256 over keys
    and file sizes; of a pack it is that of the pack. `read(row, short_side)` returns (height, width, 3) uint8 (see
    `images.decode`), `short_side(row)` looks at the header alone; both raise `BrokenPicture`. `reader(row)` is `read`
    of that row alone and can be pickled, for another process. `tags` are there where a picture may belong to several of
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
        """Number of rows, broken pictures included."""
        return len(self.keys)


def open_dataset(spec: str) -> Dataset:
    """Open a folder, a list (.txt, .csv, .tsv), a pack (.h5) or `scenes:...`; UsageError when it names no pictures.

    A folder is searched with all its sub-folders; a linked folder counts once, hidden names are skipped. Where every
    picture lies in one of at least two first-level folders, those are its classes. A folder that holds `train` beside
    `val` (or `valid`, `validation`, `test`), as folders or as packs such as `train.h5`, means its `train`, and a line
    says so.
    """
    if spec.startswith("scenes:"):
        return _scenes(spec, "train")
    path = _existing(spec)
    if path.is_dir():
        if (train := _part(path, ("train",))) and (val := _part(path, VAL_NAMES)):
            say_once(f"{spec} holds {train.name} and {val.name}: taking {train}")
            path = train
        return _folder_or_pack(spec, path)
    if path.suffix.lower() in PACKS:
        return _folder_or_pack(spec, path)
    if path.suffix.lower() not in LISTS:
        raise UsageError(
            f"{spec} is neither a folder, nor a list ({', '.join(LISTS)}), nor a pack ({', '.join(PACKS)}), "
            "nor scenes:; give one of these"
        )
    return _list(spec, path)


def open_parts(spec: str) -> tuple[Dataset, Dataset]:
    """The train and val parts that `--labelled` names: `scenes:...`, or a root with `train` and `val`.

    Each is a folder of class folders or, where there is none, a pack of such a folder (`train.h5`). A root with CSV
    files, a VOCdevkit or COCO's annotations is known by what lies in it (`labelled.py`).

    Both parts have the same `classes`, and a target for every picture or, where a picture may have several labels,
    `tags`; UsageError where a folder or file is missing, the classes differ or a picture lies outside of the class
    folders.
    """
    if spec.startswith("scenes:"):
        return _scenes(spec, "train"), _scenes(spec, "val")
    root = _existing(spec)
    from ktransfer.labelled import open_layout

    if other := open_layout(spec, root):
        return other
    train, val = _part(root, ("train",)), _part(root, VAL_NAMES)
    if train is None or val is None:
        missing = f"{' or '.join(VAL_NAMES)}" if train else "train"
        raise UsageError(
            f"{spec} has no folder {missing}; --labelled takes a root with train/CLASS/ and val/CLASS/, or with packs "
            "of them, train.h5 and val.h5, or with train.csv and val.csv, or a VOCdevkit, or COCO's instances_*.json"
        )
    parts = _folder_or_pack(spec, train), _folder_or_pack(spec, val)
    for path, part in zip((train, val), parts, strict=True):
        if not part.classes or (part.targets == UNKNOWN).any():
            outside = next((key for key in part.keys if "/" not in key), None)
            why = f"{outside} lies outside of the class folders" if outside else "there is only one class folder"
            if part.classes:
                why = f"{part.keys[int(np.argmin(part.targets))]} has no class"
            raise UsageError(f"{path}: {why}; every picture needs a folder that names its class, at least two of them")
    differing = sorted(set(parts[0].classes) ^ set(parts[1].classes))
    if differing:
        raise UsageError(
            f"{train} and {val} have different classes ({len(differing)}: {', '.join(differing[:5])}); "
            "give both the same class folders, each with at least one picture"
        )
    return parts


def check_broken(broken: Mapping[int, str], total: int, max_broken: float, dataset: Dataset) -> None:
    """Raise StageError where more than the share `max_broken` (0 to 1) of `total` pictures is broken.

    Args:
        broken: row to reason, as `Pictures.broken`.
        total: pictures that were looked at.
        max_broken: the largest share that is accepted.
        dataset: gives the keys for the message.
    """
    if len(broken) <= max_broken * total:
        return
    examples = "; ".join(f"{dataset.keys[row]}: {broken[row]}" for row in sorted(broken)[:3])
    share = len(broken) / max(total, 1)
    raise StageError(
        f"{len(broken):,} of {total:,} pictures of {dataset.spec} are broken ({share:.2%}, more than the "
        f"{max_broken:.2%} that are allowed), for example {examples}; mend or remove them, or raise --max-broken"
    )


def same_pictures(data: Dataset, other: Dataset, pairs: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether the rows of each pair, one of `data` and one of `other`, show the same in all pixels; broken ones do not.

    They are compared at a short side of `COMPARED` pixels, so that a large JPEG is read at reduced scale.
    """

    def same(pair: tuple[int, int]) -> bool:
        try:
            return np.array_equal(data.read(pair[0], COMPARED), other.read(pair[1], COMPARED))
        except BrokenPicture:
            return False

    found: list[bool] = []
    with bar(len(pairs), "compare") as shown, ThreadPoolExecutor(cores()) as pool:
        for one in pool.map(same, pairs):
            found.append(one)
            shown.update(1)
    return found


def _existing(spec: str) -> Path:
    if not spec:
        raise UsageError("the name of the data is empty; give a folder, a list or scenes:")
    # Not Path.resolve: it would rename a linked folder. Not Path.exists: it raises where a folder is forbidden.
    path = Path(os.path.abspath(os.path.expanduser(spec)))  # noqa: PTH100, PTH111
    if os.path.exists(path):  # noqa: PTH110
        return path
    known = next(parent for parent in path.parents if os.path.isdir(parent))  # noqa: PTH112
    lost = path.relative_to(known).parts[0]
    try:
        similar = difflib.get_close_matches(lost, os.listdir(known), n=3)  # noqa: PTH208
    except OSError:
        similar = []
    hint = f"; did you mean {' or '.join(str(known / name) for name in similar)}?" if similar else ""
    raise UsageError(f"{spec} does not exist: there is no {lost} in {known}{hint or '; check the path'}")


def _part(root: Path, names: Sequence[str]) -> Path | None:
    """The first folder of these names or, where there is none, the first pack."""
    packs = (root / f"{name}{ending}" for name in names for ending in PACKS)
    return next((root / name for name in names if (root / name).is_dir()), None) or next(
        (path for path in packs if path.is_file()), None
    )


def _folder_or_pack(spec: str, path: Path) -> Dataset:
    if path.is_dir():
        return _folder(spec, path)
    from ktransfer.packs import open_pack

    return open_pack(spec, path)


def _folder(spec: str, root: Path) -> Dataset:
    found = walk(root)
    if found.ignored or found.repeated:
        say_once(
            f"{root}: {len(found.names):,} pictures; {found.ignored:,} files with other endings are ignored, "
            f"{found.repeated:,} links to folders that are already in are not followed"
        )
    if not found.names:
        raise UsageError(f"{spec}: no pictures in {root} (looked for {' '.join(ENDINGS)}); name a folder that has some")
    keys = escaped(found.names)
    labels = [key.partition("/")[0] if "/" in key else "" for key in keys]
    if "" in labels or len(set(labels)) < 2:
        labels = [""] * len(keys)
    return of_files(spec, root, root.name, found.names, found.sizes, labels)


def _list(spec: str, path: Path) -> Dataset:
    names, labels = read_list(path)
    if not names:
        raise UsageError(f"{spec} lists no pictures; write one path a line, relative to the folder of the list")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{spec} lists {name} {times} times; name each picture once")
    sizes = [file_size(os.path.join(path.parent, name)) for name in names]  # noqa: PTH118 -- Path objects cost more
    return of_files(spec, path.parent, path.stem, names, sizes, labels)


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """Paths and labels ("" where there is none) of a list, as they are written.

    Raises:
        UsageError: it cannot be read, or has no column of paths.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{path}, line {line}: a NUL character; a list is plain text with one path a line")
    if path.suffix.lower() == ".txt":
        # Not splitlines(): a path may hold any of the other characters that Unicode counts as line ends.
        names = [line.removesuffix("\r") for line in text.split("\n")]
        names = [name for name in names if name.strip()]
        return names, [""] * len(names)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        table = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise UsageError(f"{path} is not a table ({error}); write a header with a column path") from error
    header = [cell.strip().lower() for cell in table[0]] if table else []
    column = next((header.index(name) for name in PATH_COLUMNS if name in header), None)
    if column is None:
        if any(len(row) > 1 for row in table):
            raise UsageError(f"{path} has no column {', '.join(PATH_COLUMNS)}; its first line must name the columns")
        return [row[0] for row in table], [""] * len(table)
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    names, labels = [], []
    for number, row in enumerate(table[1:], start=2):
        if len(row) <= column or not row[column]:
            raise UsageError(f"{path}, row {number} has no {header[column]}; fill it in or leave the row out")
        names.append(row[column])
        labels.append(row[label].strip() if label is not None and len(row) > label else "")
    return names, labels


def of_files(
    spec: str, root: Path, name: str, names: Sequence[str], sizes: Sequence[int], labels: Sequence[str]
) -> Dataset:
    """Pictures that are files below `root`, of `sizes` bytes, with labels ("" where there is none)."""
    keys = escaped(names)
    classes = class_names(escaped(labels))
    number = {label: index for index, label in enumerate(classes)}
    digest = hashlib.sha256()
    for key, size in zip(keys, sizes, strict=True):
        digest.update(f"{key}\0{size}\n".encode())
    return Dataset(
        spec=spec,
        name=file_name(name),
        keys=tuple(keys),
        targets=np.array([number.get(label, UNKNOWN) for label in escaped(labels)], np.int32),
        classes=classes,
        fingerprint=digest.hexdigest(),
        read=lambda row, short_side: images.decode(root / names[row], short_side),
        short_side=lambda row: images.short_side(root / names[row]),
        reader=lambda row: partial(images.decode, root / names[row]),
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


def file_name(name: str) -> str:
    """A file name without ending for what is called `name`.

    At most 60 characters, so that "NAME.h5.part" stays under 255 bytes in any alphabet."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".-")[:60] or "data"


def _scenes(spec: str, part: str) -> Dataset:
    from ktransfer import scenes

    chosen = scenes.parse(spec)
    classes = scenes.CLASSES
    count = chosen.images if part == "train" else max(len(classes), chosen.images // 4)
    identity = f"scenes {scenes.VERSION} {part} images={count} size={chosen.size} seed={chosen.seed}"

    return Dataset(
        spec=spec,
        name="scenes" if part == "train" else f"scenes-{part}",
        keys=tuple(f"{classes[row % len(classes)]}/{row:06d}" for row in range(count)),
        targets=(np.arange(count) % len(classes)).astype(np.int32),
        classes=classes,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        read=lambda row, short_side: _render(chosen.seed, part, row, chosen.size, short_side),
        short_side=lambda row: chosen.size,
        reader=lambda row: partial(_render, chosen.seed, part, row, chosen.size),
    )


def _render(seed: int, part: str, row: int, size: int, short_side: int | None) -> NDArray[np.uint8]:
    from ktransfer import scenes

    return scenes.render(seed, part, row, size)[0]
