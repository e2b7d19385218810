"""Every image below a folder, in one order everywhere; what a folder lists is remembered while it is unchanged."""

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

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
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
_LAYOUT = 1
# A change within the same tick of the file system's clock leaves the folder's time as it was (FAT ticks every 2 s).
_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class Found:
    """Images below a folder: relative names with "/" in code-point order (for valid Unicode that of the UTF-8 bytes).

    `sizes` are bytes, -1 for a link that leads nowhere; `ignored` counts files with other endings, `repeated` links to
    folders that are already in; `junk` are the folders that were passed over (`JUNK`).
    """

    names: list[str]
    sizes: list[int]
    ignored: int
    repeated: int
    junk: list[str]


class Listing(NamedTuple):
    """One folder as it was at `mtime_ns`: names of images, sub-folders and links, and the number of other files."""

    mtime_ns: int
    images: list[str]
    folders: list[str]
    links: list[str]
    ignored: int


def walk(root: Path) -> Found:
    """Search a folder and all below it, links included; UsageError where a folder cannot be read.

    A folder is entered once, under its own name if it lies below `root`, else under the first link to it; so loops end.
    Hidden names are skipped. Listings come from the cache where a folder's modification time is unchanged; sizes are
    always taken from the file system, so that a file rewritten in place is noticed too.
    """
    began = time.time_ns()
    cache = _cache_file(root)
    known = _load(cache)
    listings: dict[str, Listing] = {}
    names: list[str] = []
    sizes: list[int] = []
    seen: set[tuple[int, int]] = set()
    ignored = repeated = 0
    junk: list[str] = []
    # Links wait until all real folders are done, so that these keep their own names.
    folders, links = [""], list[str]()
    while folders or links:
        name = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(_join(root, name))  # noqa: PTH116 -- Path objects cost more than the call
            if (status.st_dev, status.st_ino) in seen:
                repeated += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            listing = known.get(name)
            if listing is None or listing.mtime_ns != status.st_mtime_ns:
                listing = _list(_join(root, name), status.st_mtime_ns)
        except OSError as error:
            raise UsageError(
                f"{_join(root, name)} cannot be read ({error.strerror}); allow it, or name the images in a list"
            ) from error
        listings[name] = listing
        ignored += listing.ignored
        prefix = name and name + "/"
        junk += [prefix + folder for folder in listing.folders if folder.lower() in JUNK]
        folders += [prefix + folder for folder in reversed(listing.folders) if folder.lower() not in JUNK]
        for image in listing.images:
            names.append(prefix + image)
            sizes.append(file_size(_join(root, prefix + image)))
        for link in listing.links:
            size, folder = _follow(_join(root, prefix + link))
            if folder:
                links.append(prefix + link)
            elif _is_image(link):
                names.append(prefix + link)
                sizes.append(size)
            else:
                ignored += 1
    kept = {name: listing for name, listing in listings.items() if listing.mtime_ns < began - _TICK_NS}
    if kept != known:
        _save(cache, kept)
    order = sorted(range(len(names)), key=names.__getitem__)
    return Found([names[i] for i in order], [sizes[i] for i in order], ignored, repeated, sorted(junk))


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
    try:
        return os.stat(path).st_size  # noqa: PTH116 -- Path objects cost more than the call
    except (OSError, ValueError):
        return UNREADABLE


def _join(root: Path, name: str) -> str:
    return f"{root}/{name}" if name else str(root)


def _follow(path: str) -> tuple[int, bool]:
    """Size of what a link leads to (-1: nothing), and whether that is a folder."""
    try:
        status = os.stat(path)  # noqa: PTH116 -- Path objects cost more than the call
    except OSError:
        return UNREADABLE, False
    return status.st_size, stat.S_ISDIR(status.st_mode)


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _list(path: str, mtime_ns: int) -> Listing:
    images, folders, links, ignored = list[str](), list[str](), list[str](), 0
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                links.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
            elif entry.is_file() and _is_image(entry.name):
                images.append(entry.name)
            else:
                ignored += 1
    return Listing(mtime_ns, sorted(images), sorted(folders), sorted(links), ignored)


def _cache_file(root: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 -- never raises
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return Path(home) / "ktransfer" / "index" / f"{name}.json"


def _load(path: Path) -> dict[str, Listing]:
    """What was saved; nothing where the file is missing, damaged or of another layout."""
    try:
        check, _, text = path.read_text(encoding="ascii").partition("\n")
    except (OSError, ValueError):
        return {}
    return {name: Listing(*row) for name, row in json.loads(text).items()} if check == _check(text) else {}


def _save(path: Path, listings: dict[str, Listing]) -> None:
    text = json.dumps(listings)
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
    return hashlib.sha256(f"{_LAYOUT}\n{text}".encode()).hexdigest()
