"""`ktransfer pack`: every image of a data set made small once, on all cores, into one file (see `packs`)."""

import io
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktransfer.data import packs
from ktransfer.data.dataset import Dataset, Reader, check_broken
from ktransfer.data.folders import PACKS
from ktransfer.data.opening import open_dataset
from ktransfer.data.packing import Packed, Recipe, Unfinished, beside, forget, header
from ktransfer.errors import BrokenImage, StageError, Unreadable, UsageError, remedy, why
from ktransfer.images import decoding, tolerated
from ktransfer.machine import cores
from ktransfer.progress import bar, say

QUALITY = 90
LARGEST = 8192  # no network sees more
_LONGEST_JPEG = 65_500  # the format's own limit is 65,535, libjpeg's is this
_JOB = 16  # images a worker takes at a time
_AHEAD = 3  # jobs a worker, so that none waits for the writer
_GUARD = (
    "a worker begins by running your script up to its end: put the call of pack below if __name__ == '__main__':, or "
    "give workers=1"
)
_SAMPLE = 16  # images that are encoded to guess the size of the file


def pack(
    data: str,
    out: str | Path,
    size: int = 256,
    raw: bool = False,
    quality: int | None = None,
    workers: int = 0,
    max_broken: float = 0.01,
) -> Path:
    """Write all images of a data set into one file, upright, as RGB, with the short side at most `size`.

    Killed at any time and given again, it goes on and ends with the same bytes; how many workers there are changes
    nothing either. A finished file of the same images and settings is left as it is.

    Args:
        data: what `dataset.open_dataset` takes, also a pack.
        out: the file, *.h5.
        size: short side in pixels, 1 to 8192; smaller images stay as they are, and nothing is cut off (but what a
            JPEG cannot hold beyond 65,500 pixels).
        raw: uint8 pixels instead of JPEG.
        quality: of the JPEGs, 1 to 100; 90 by default.
        workers: processes; 0 takes one for each core.
        max_broken: the largest share of broken images that is accepted; their rows stay, with the reason.

    Returns:
        The path of the file.

    Raises:
        UsageError: what was asked for cannot be done.
        StageError: too many images are broken, or the disk is full.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that runs the script once more
        raise UsageError(f"pack: called while a worker process begins; {_GUARD}")
    out = Path(out)
    recipe = _recipe(out, size, raw, quality, workers, max_broken)
    source = open_dataset(data)
    if os.path.lexists(out):  # a link to nothing is something too
        _refuse_another(out, source, recipe)
        say(f"pack: done before, skipped ({out})")
        forget(out)
        return out
    if not beside(out)[0].exists():
        _need_disk(out, source, recipe)
    with _disk_errors(out), ExitStack() as stack:
        unfinished = stack.enter_context(closing(Unfinished(out, source, recipe)))
        if unfinished.rows_done:
            say(f"pack: goes on after {unfinished.rows_done:,} of {len(source):,} images ({out})")
        with bar(len(source), "pack", done=unfinished.rows_done) as shown:
            results = stack.enter_context(closing(_encoded(source, unfinished.rows_done, recipe, workers or cores())))
            for rows in results:
                unfinished.append(rows)
                shown.update(len(rows))
        broken = unfinished.broken()
        check_broken(broken, len(source), max_broken, source)
        unfinished.finish()
    stored = out.stat().st_size
    say(
        f"pack: done; {len(source):,} images, {stored / 1e9:.2f} GB ({stored / len(source) / 1e3:.1f} kB each), "
        f"{len(broken)} of them broken; {out}"
    )
    tolerated.say_tolerated()
    return out


def _recipe(out: Path, size: int, raw: bool, quality: int | None, workers: int, max_broken: float) -> Recipe:
    if out.suffix.lower() not in PACKS:
        raise UsageError(f"--out {out}: packs have the ending .h5; name it {out.with_suffix(PACKS[0]).name}")
    if not 1 <= size <= LARGEST:
        raise UsageError(f"--size {size}: give the short side in pixels, 1 to {LARGEST}")
    if raw and quality is not None:
        raise UsageError("--quality: raw pixels have none; give --raw or --quality")
    if quality is not None and not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality}: give 1 to 100")
    if not 0 <= workers <= 256:
        raise UsageError(f"--workers {workers}: give 1 to 256, or 0 for one per CPU core")
    if not 0 <= max_broken <= 1:
        raise UsageError(f"--max-broken {max_broken}: give a share from 0 to 1")
    return Recipe(size, 0 if raw else quality or QUALITY)


def encode(read: Reader, recipe: Recipe) -> Packed:
    """Read one image, make it small and encode it; a broken one gives its reason."""
    try:
        # `decoding.decode` leaves twice what it is asked for; here a JPEG at half the scale will do for half the size.
        pixels = shrink(read(-(-recipe.size // 2)), recipe.size)
    except BrokenImage as error:
        reason = (str(error) or "broken").encode("utf-8", "backslashreplace")
        return Packed(reason, packs.digest_of(reason), 0, 0, False)
    if recipe.quality:
        pixels = _middle(pixels, _LONGEST_JPEG)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=recipe.quality)
        data = buffer.getvalue()
    else:
        data = pixels.tobytes()
    return Packed(data, packs.digest_of(data), pixels.shape[0], pixels.shape[1], True)


def shrink(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8, the short side at most `size` by an antialiased bilinear filter; never enlarged."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= size:
        return pixels
    # Rounded to the nearest in whole numbers, which are the same everywhere.
    height, width = ((2 * side * size + short) // (2 * short) for side in (height, width))
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _middle(pixels: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    for axis in (0, 1):
        over = pixels.shape[axis] - longest
        if over > 0:
            pixels = np.take(pixels, range(over // 2, over // 2 + longest), axis)
    return pixels


def _encode_all(readers: Sequence[Reader], recipe: Recipe) -> tuple[list[Packed], dict[str, set[str]]]:
    """Images, and what was passed over in them, which another process would not tell."""
    return [encode(read, recipe) for read in readers], tolerated.taken()


def _told(done: tuple[list[Packed], dict[str, set[str]]]) -> list[Packed]:
    rows, passed_over = done
    for kind, names in passed_over.items():
        for name in names:
            tolerated.note(name, [kind])
    return rows


def _encoded(data: Dataset, first: int, recipe: Recipe, workers: int) -> Generator[list[Packed], None, None]:
    """The images from row `first` on, in order and some at a time, encoded by so many processes (1: by this one)."""
    assert data.reader is not None  # of whatever open_dataset gives
    reader = data.reader
    starts = range(first, len(data), _JOB)
    jobs = ([reader(row) for row in range(at, min(at + _JOB, len(data)))] for at in starts)
    work = partial(_encode_all, recipe=recipe)
    workers = min(workers, len(starts))
    if workers <= 1:
        yield from map(_told, map(work, jobs))
        return
    # A fork would copy whatever locks the threads of torch hold.
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(context.Lock(), begun))
    try:
        pending = deque(pool.submit(work, job) for job in islice(jobs, workers * _AHEAD))
        while pending:
            done = pending.popleft().result()
            pending.extend(pool.submit(work, job) for job in islice(jobs, 1))
            yield _told(done)
    except BrokenProcessPool as error:
        if not begun.is_set():
            raise UsageError(f"pack: a worker process could not begin; {_GUARD}") from error
        raise StageError(
            "pack: a worker process was killed, perhaps because memory ran out; give the same command again with fewer "
            "--workers: it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(giants: AbstractContextManager[bool], begun: Event) -> None:
    begun.set()
    decoding.share_giants(giants)
    # Ctrl-C is for the parent, which stops its workers; one that is killed cannot, so they watch it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _refuse_another(out: Path, data: Dataset, recipe: Recipe) -> None:
    """UsageError unless `out` is a finished pack of these images and settings."""
    try:
        found = packs.read_pack(out)
    except Unreadable:
        raise
    except UsageError as error:
        raise UsageError(
            f"--out {out}: exists, and is not a complete pack; remove it or choose another name"
        ) from error
    tables, attributes = header(data, recipe, None)
    differing = [
        name for name in ("source", "encoding", "size", "quality") if found.attributes[name] != attributes[name]
    ]
    differing += [name for name in ("key", "target", "class") if not np.array_equal(found.tables[name], tables[name])]
    if differing:
        raise UsageError(
            f"--out {out}: exists and was packed differently ({', '.join(differing)}); remove it or choose another name"
        )


def _need_disk(out: Path, data: Dataset, recipe: Recipe) -> None:
    from ktransfer.run import need_disk

    assert data.reader is not None
    count = min(_SAMPLE, len(data))
    sample = [encode(data.reader(row * len(data) // count), recipe) for row in range(count)]
    need_disk(out.parent, sum(len(found.data) for found in sample) * len(data) // count, f"pack ({len(data):,} images)")


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StageError(
            f"{out}: cannot go on ({why(error)}); {remedy(error, 'look at the disk')}, and give the same command again"
        ) from error
