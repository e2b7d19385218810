"""Opening what `--data` and `--labelled` name: a folder, a list of paths, a pack, shards or `scenes:`."""

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktransfer.data import shards
from ktransfer.data.dataset import UNKNOWN, Dataset, escaped, of_files
from ktransfer.data.folders import ENDINGS, PACKS, VAL_NAMES, find_named, names_in, only_folder, walk
from ktransfer.data.labelled import open_layout
from ktransfer.data.lists import found, read_list
from ktransfer.errors import UsageError
from ktransfer.progress import say_once

LISTS = (".txt", ".csv", ".tsv")
TRAIN, VAL = ("train", "training"), (*VAL_NAMES, "testing")
STRAY = 0.1  # the largest share of images outside of folders that are taken as classes


def open_dataset(spec: str, turned: bool = True) -> Dataset:
    """Open a folder, a list (.txt, .csv, .tsv), a pack (.h5), shards (.tar, .parquet; see `shards.py`) or `scenes:...`;
    UsageError when it names no images.

    A folder is searched with all its sub-folders; a linked folder counts once, hidden names are skipped. Where every
    image lies in one of at least two first-level folders, those are its classes; folders around all of them do not
    count, and a few images outside of them have no class. A folder that holds `train` beside `val` (or `valid`,
    `validation`, `test`) in any case, as folders or as packs such as `train.h5`, means its `train`. A line says what of
    this was found. The images are upright, or, where not `turned`, as they are stored, whatever their EXIF says.
    """
    if spec.startswith("scenes:"):
        return _scenes(spec, "train")
    if paths := shards.named(spec):
        return shards.open_shards(spec, paths, turned)
    path = _existing(spec)
    if path.is_dir():
        if parts := _parts(path):
            train, val = parts
            say_once(f"{spec} has {train.name} and {val.name}: using {train}")
            path = train
        return _folder_or_pack(spec, path, turned)
    if path.suffix.lower() in PACKS:
        return _folder_or_pack(spec, path, turned)
    if path.suffix.lower() not in LISTS:
        raise UsageError(
            f"{spec} is neither a folder, nor a list ({', '.join(LISTS)}), nor a pack ({', '.join(PACKS)}), "
            f"nor shards ({', '.join(shards.SHARDS)}), nor scenes:; give one of these"
        )
    return _list(spec, path, turned)


def open_splits(spec: str) -> tuple[Dataset, Dataset]:
    """The train and val splits that `--labelled` names: `scenes:...`, or a root with `train` and `val`.

    Each is a folder of class folders or, where there is none, a pack of such a folder (`train.h5`). A root with CSV
    files, a VOCdevkit or COCO's annotations is known by what lies in it (`labelled.py`).

    Both splits have the same `classes`, and a target for every image or, where an image may have several labels,
    `tags`; UsageError where a folder or file is missing, the classes differ or an image lies outside of the class
    folders.
    """
    if spec.startswith("scenes:"):
        return _scenes(spec, "train"), _scenes(spec, "val")
    root = _existing(spec)
    for place, _ in _around(root):
        if other := open_layout(spec, place):
            return other
    there = names_in(root)
    train, val = _parts(root) or (_split_place(root, there, TRAIN), _split_place(root, there, VAL))
    if (train is None or val is None) and (found := _sharded_splits(spec, root)):
        return found
    if train is None or val is None:
        missing = f"{' or '.join(VAL_NAMES)}" if train else "train"
        raise UsageError(
            f"{spec} has no folder {missing}; --labelled takes a root with train/CLASS/ and val/CLASS/, or with packs "
            "of them, train.h5 and val.h5, or with train.csv and val.csv, or a VOCdevkit, or COCO's instances_*.json"
        )
    return _with_same_classes((train, val), (_folder_or_pack(spec, train), _folder_or_pack(spec, val)))


def _shards_of(spec: str, root: Path) -> list[Path]:
    """Those of a folder, or of its folder data; where some are called train and others val, the first."""
    folder = root if shards.inside(root) else root / "data"
    if not folder.is_dir():
        return []
    train = shards.inside(folder, ("train",))
    if train and shards.inside(folder, VAL_NAMES):
        say_once(f"{spec} has shards called train and others: using {len(train)} of {folder}/train*")
        return train
    return shards.inside(folder)


def _sharded_splits(spec: str, root: Path) -> tuple[Dataset, Dataset] | None:
    """Shards train-... and val-... (or validation, test) in a root, or in its folder data, as on Hugging Face."""
    for folder in (root, root / "data"):
        if folder.is_dir():
            train, val = (shards.inside(folder, names) for names in (("train",), VAL_NAMES))
            if train and val:
                splits = shards.open_shards(spec, train), shards.open_shards(spec, val)
                return _with_same_classes((train[0], val[0]), splits)
    return None


def _with_same_classes(places: tuple[Path, Path], splits: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
    train, val = places
    for path, split in zip(places, splits, strict=True):
        if not split.classes or (split.targets == UNKNOWN).any():
            outside = next((key for key in split.keys if "/" not in key), None)
            why = "there is only one class folder"
            if split.classes:
                why = f"{split.keys[int(np.argmin(split.targets))]} has no class"
            if outside and path.is_dir():
                why = f"{outside} lies outside of the class folders"
            raise UsageError(f"{path}: {why}; every image needs a folder that names its class, at least two of them")
    differing = sorted(set(splits[0].classes) ^ set(splits[1].classes))
    if differing:
        raise UsageError(
            f"{train} and {val} have different classes ({len(differing)}: {', '.join(differing[:5])}); "
            "give both the same class folders, each with at least one image"
        )
    return splits


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


def _parts(root: Path) -> tuple[Path, Path] | None:
    """Training and test part of a folder, or of one that all in it lies in; None where there are no such parts."""
    for place, there in _around(root):
        train, val = _split_place(place, there, TRAIN), _split_place(place, there, VAL)
        if train and val:
            return train, val
    return None


def _around(root: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder and, where that holds a single one, this, and so on; each with the names in it (`names_in`)."""
    place: Path | None = root
    while place is not None and place.is_dir():
        there = names_in(place)
        yield place, there
        place = only_folder(place, there)


def _split_place(root: Path, there: Mapping[str, str], names: Sequence[str]) -> Path | None:
    """The first folder of these names, in any case, or, where there is none, the first pack."""
    folder = find_named(root, there, names)
    if folder is not None and folder.is_dir():
        return folder
    pack = find_named(root, there, [f"{name}{ending}" for name in names for ending in PACKS])
    return pack if pack is not None and pack.is_file() else None


def _folder_or_pack(spec: str, path: Path, turned: bool = True) -> Dataset:
    if path.is_dir():
        return _folder(spec, path, turned)
    if not turned:
        raise UsageError(f"--exif ignore: the images of a pack ({spec}) are upright already; name the files themselves")
    from ktransfer.data.packs import open_pack

    return open_pack(spec, path)


def _folder(spec: str, root: Path, turned: bool) -> Dataset:
    found = walk(root)
    if not found.names and (held := _shards_of(spec, root)):
        return shards.open_shards(spec, held, turned)
    if found.junk:
        say_once(
            f"{root}: {len(found.junk):,} folders that no images of the data lie in are passed over, such as "
            f"{found.junk[0]}"
        )
    if found.ignored or found.repeated:
        say_once(
            f"{root}: {len(found.names):,} images; {found.ignored:,} files with other endings are ignored, "
            f"{found.repeated:,} links to folders that are already included are not followed"
        )
    if found.changed:
        say_once(
            f"{root}: {len(found.changed):,} images are not those that were there before, such as {min(found.changed)}"
        )
    if not found.names:
        raise UsageError(f"{spec}: no images in {root} (looked for {' '.join(ENDINGS)}); name a folder that has images")
    labels = _classes(root, escaped(found.names))
    return of_files(spec, root, root.name, found.names, found.sizes, labels, turned, found.changed)


def _classes(root: Path, keys: Sequence[str]) -> list[str]:
    """The class of each image, "" of those without one: the first folder in which not all of them lie."""
    around = os.path.commonprefix([min(keys), max(keys)]).rpartition("/")[0]  # noqa: RUF071 -- of all, by two of them
    cut = len(around) + 1 if around else 0
    labels = [key[cut:].partition("/")[0] if "/" in key[cut:] else "" for key in keys]
    classes, outside = set(labels) - {""}, labels.count("")
    if len(classes) < 2:
        return [""] * len(keys)
    if around:
        say_once(f"{root}: the {len(classes):,} folders of {around} are its classes")
    if outside:
        stray = f"{outside:,} of its {len(keys):,} images, such as {keys[labels.index('')]}, lie outside of its folders"
        if outside > STRAY * len(keys):
            say_once(f"{root}: {stray}, so that these are not taken as classes")
            return [""] * len(keys)
        say_once(f"{root}: {stray}, which are the classes, and have none")
    return labels


def _list(spec: str, path: Path, turned: bool) -> Dataset:
    names, labels = read_list(path)
    if not names:
        raise UsageError(f"{spec} lists no images; write one path per line, relative to the folder of the list")
    names, labels, sizes = found(path, names, labels)
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{spec} lists {name} {times} times; name each image once")
    return of_files(spec, path.parent, path.stem, names, sizes, labels, turned)


def _scenes(spec: str, split: str) -> Dataset:
    from ktransfer.data import scenes

    chosen = scenes.parse(spec)
    classes = scenes.CLASSES
    count = chosen.images if split == "train" else max(len(classes), chosen.images // 4)
    identity = f"scenes {scenes.VERSION} {split} images={count} size={chosen.size} seed={chosen.seed}"

    return Dataset(
        spec=spec,
        name="scenes" if split == "train" else f"scenes-{split}",
        keys=tuple(f"{classes[row % len(classes)]}/{row:06d}" for row in range(count)),
        targets=(np.arange(count) % len(classes)).astype(np.int32),
        classes=classes,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        read=lambda row, short_side: _render(chosen.seed, split, row, chosen.size, short_side),
        short_side=lambda row: chosen.size,
        reader=lambda row: partial(_render, chosen.seed, split, row, chosen.size),
    )


def _render(seed: int, split: str, row: int, size: int, short_side: int | None) -> NDArray[np.uint8]:
    from ktransfer.data import scenes

    return scenes.render(seed, split, row, size)[0]
