"""Every image below a folder, in one order everywhere; what a folder lists is remembered while it is unchanged.

Unchanged is what git takes for it: times (also that of the change of the entry, which nobody can set), inode and size.
An image whose entry changed while its size did not is compared with a sample of its bytes that was taken before.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ktransfer.errors import UsageError
from ktransfer.files import commit

ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif",
)  # fmt: skip
PACKS = (".h5", ".hdf5")
VAL_NAMES = ("val", "valid", "validation", "test")
JUNK = (
    "@eadir",
    "@tmp",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "lost+found",
    "found.000",
    "system volume information",
    "__macosx",
    "__pycache__",
)
"""Folders that systems and programs put among images, in lower case; what lies in them are not images of the data."""
UNREADABLE = -1
_LAYOUT = 2
_SAMPLE = 2**12  # bytes in the middle and at the end of a file
_DIGITS = 16
UNSAMPLED = "-" * _DIGITS
# Of so many images a sample is read when they are first seen, so that others with their size can be told from the same
# ones touched. Of more that would take a disk hours; those count as changed where their entry did.
SAMPLED = 20_000
_FIRST = slice(-2 * _DIGITS - 1, -_DIGITS - 1)
# A change within the same tick of the file system's clock leaves the folder's time as it was (FAT ticks every 2 s).
_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class Found:
    """Images below a folder: relative names with "/" in code-point order (for valid Unicode that of the UTF-8 bytes).

    `sizes` are bytes, -1 for a link that leads nowhere; `ignored` counts files with other endings, `repeated` links to
    folders that are already in; `junk` are the folders that were passed over (`JUNK`). `changed` are names of images
    that have other bytes than when they were seen first, in the same number, with a digest of a sample of these.
    """

    names: list[str]
    sizes: list[int]
    ignored: int
    repeated: int
    junk: list[str]
    changed: dict[str, str]


class Listing(NamedTuple):
    """One folder as it was: what its entry said (`_entry`), its images, sub-folders and links, the count of others."""

    entry: str
    images: list[str]
    folders: list[str]
    links: list[str]
    ignored: int


class Index(NamedTuple):
    """What is remembered of all folders, and of their images, by their names below the root.

    Of an image that is its size, its entry (`_entry`; nothing where its bytes may be newer), its first sample and the
    last one, with blanks between them: a million strings are no work for the garbage collector, as lists would be.
    """

    folders: dict[str, Listing]
    images: dict[str, str]


def walk(root: Path) -> Found:
    """Search a folder and all below it, links included; UsageError where a folder cannot be read.

    A folder is entered once, under its own name if it lies below `root`, else under the first link to it; so loops end.
    Hidden names are skipped. Listings come from the cache where a folder's entry is unchanged; each image is asked for
    its entry, once, so that a file that was rewritten in place is noticed too.
    """
    settled = time.time_ns() - _TICK_NS
    cache = _cache_file(root)
    known = _load(cache)
    index = Index({}, {})
    names: list[str] = []
    sizes: list[int] = []
    visited: set[tuple[int, int]] = set()
    ignored = repeated = 0
    junk: list[str] = []

    def add(name: str, status: os.stat_result | None) -> None:
        names.append(name)
        sizes.append(UNREADABLE if status is None else status.st_size)
        if status is not None and cache is not None:
            index.images[name] = _seen(
                _join(root, name), status, known.images.get(name, ""), settled, len(names) <= SAMPLED
            )

    # Links wait until all real folders are done, so that these keep their own names.
    folders, links = [""], list[str]()
    while folders or links:
        name = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(_join(root, name))  # noqa: PTH116 -- Path objects cost more than the call
            if (status.st_dev, status.st_ino) in visited:
                repeated += 1
                continue
            visited.add((status.st_dev, status.st_ino))
            listing = known.folders.get(name)
            if listing is None or listing.entry != _entry(status):
                listing = _list(_join(root, name), _entry(status))
        except OSError as error:
            raise UsageError(
                f"{_join(root, name)} cannot be read ({error.strerror}); allow it, or name the images in a list"
            ) from error
        if status.st_mtime_ns < settled:
            index.folders[name] = listing
        ignored += listing.ignored
        prefix = name and name + "/"
        junk += [prefix + folder for folder in listing.folders if folder.lower() in JUNK]
        folders += [prefix + folder for folder in reversed(listing.folders) if folder.lower() not in JUNK]
        for image in listing.images:
            add(prefix + image, _status(_join(root, prefix + image)))
        for link in listing.links:
            led = _status(_join(root, prefix + link))
            if led is not None and stat.S_ISDIR(led.st_mode):
                links.append(prefix + link)
            elif _is_image(link):
                add(prefix + link, led)
            else:
                ignored += 1
    if index != known and cache is not None:
        _save(cache, index)
    order = sorted(range(len(names)), key=names.__getitem__)
    changed = {name: seen[-_DIGITS:] for name, seen in index.images.items() if not seen.endswith(seen[_FIRST])}
    return Found([names[i] for i in order], [sizes[i] for i in order], ignored, repeated, sorted(junk), changed)


def names_in(root: Path) -> dict[str, str]:
    """What lies in a folder: names in lower case -> as they are written, the first of those that differ in case alone.

    Nothing where it cannot be read, which `walk` says.
    """
    try:
        return {name.lower(): name for name in sorted(os.listdir(root), reverse=True)}  # noqa: PTH208
    except OSError:
        return {}


def find_named(root: Path, there: Mapping[str, str], names: Iterable[str]) -> Path | None:
    """What of `there` (`names_in`) has the first of some names, as it is written, else in any case; None for nothing.

    Args:
        names: in lower case.
    """
    found = next((name for name in names if name in there), None)
    if found is None:
        return None
    return exact if os.path.lexists(exact := root / found) else root / there[found]


def only_folder(root: Path, there: Mapping[str, str]) -> Path | None:
    """The folder that all else lies in, as some archives unpack: the only one, beside no image or pack; else None."""
    names = [name for lower, name in there.items() if not lower.startswith(".") and lower not in JUNK]
    if any(name.lower().endswith((*ENDINGS, *PACKS)) for name in names):
        return None
    folders = (root / name for name in names if (root / name).is_dir())
    first, second = next(folders, None), next(folders, None)
    return first if second is None else None


def file_size(path: str) -> int:
    """Bytes, -1 where there is no such file."""
    status = _status(path)
    return UNREADABLE if status is None else status.st_size


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 -- Path objects cost more than the call
    except (OSError, ValueError):
        return None


def _entry(status: os.stat_result) -> str:
    """What is believed of a file or folder as long as it is the same."""
    return f"{status.st_mtime_ns:x} {status.st_ctime_ns:x} {status.st_ino:x}"


def _seen(path: str, status: os.stat_result, before: str, settled: int, sampled: bool) -> str:
    entry, size = _entry(status), f"{status.st_size:x} "
    if before.startswith(f"{size}{entry} "):
        return before
    # Neither seen before, nor seen so soon after it was written that its entry was not kept.
    new = not before.startswith(size) or before == f"{size} {UNSAMPLED} {UNSAMPLED}"
    last = UNSAMPLED if new and not sampled else _sample(path, status.st_size)
    first = last if new else before[_FIRST]
    return f"{size}{entry if status.st_mtime_ns < settled else ''} {first} {last}"


def _sample(path: str, size: int) -> str:
    """A digest of some of the bytes of a file, of all of them where it is small; zeros where it cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            # Compressed pixels differ to the end where they differ at all.
            places = (size // 2, size - _SAMPLE) if size > 2 * _SAMPLE else (0, _SAMPLE)
            parts = [os.pread(handle, _SAMPLE, place) for place in places if place < size]
        finally:
            os.close(handle)
    except OSError:
        return "0" * _DIGITS
    return hashlib.blake2b(b"".join(parts), digest_size=_DIGITS // 2).hexdigest()


def _join(root: Path, name: str) -> str:
    return f"{root}/{name}" if name else str(root)


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _list(path: str, entry: str) -> Listing:
    images, folders, links, ignored = list[str](), list[str](), list[str](), 0
    with os.scandir(path) as entries:
        for found in entries:
            if found.name.startswith("."):
                continue
            if found.is_symlink():
                links.append(found.name)
            elif found.is_dir():
                folders.append(found.name)
            elif found.is_file() and _is_image(found.name):
                images.append(found.name)
            else:
                ignored += 1
    return Listing(entry, sorted(images), sorted(folders), sorted(links), ignored)


def _cache_file(root: Path) -> Path | None:
    """Where the index of a folder is kept; None where there is no home."""
    own = os.environ.get("XDG_CACHE_HOME", "")
    home = own if os.path.isabs(own) else os.path.expanduser("~/.cache")  # noqa: PTH111, PTH117 -- never raise
    if not os.path.isabs(home):  # noqa: PTH117
        return None
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return Path(home) / "ktransfer" / "index" / f"{name}.json"


def _load(path: Path | None) -> Index:
    """What was saved; nothing where the file is missing, damaged or of another layout."""
    try:
        check, _, text = path.read_text(encoding="ascii").partition("\n") if path else ("", "", "")
    except (OSError, ValueError):
        return Index({}, {})
    if not check or check != _check(text):
        return Index({}, {})
    folders, images = json.loads(text)  # the check says that it is ours
    return Index({name: Listing(*row) for name, row in folders.items()}, images)


def _save(path: Path, index: Index) -> None:
    text = json.dumps(index)
    # Its own name for each process: all ranks of a run may save at once.
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(f"{_check(text)}\n{text}", encoding="ascii")
        commit(part, path)
    except OSError:  # a read-only home: the next start lists again
        with suppress(OSError):
            part.unlink()


def _check(text: str) -> str:
    return hashlib.sha256(f"{_LAYOUT} {' '.join(ENDINGS)}\n{text}".encode()).hexdigest()
