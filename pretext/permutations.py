"""The permutations a puzzle is made with: a greedy generator, a summary, and the authors' `.bin` format."""

import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.errors import UsageError

DEFAULT = (701, 3)
"""How many `generate` chooses where nothing is asked for, and their least Hamming distance."""

DEFAULT_SHA256 = "34e21e6e33cdb2047fe95be7b7b8c8877141f7c7204a93133e2c8dae68500532"
"""SHA-256 of `to_bytes(generate())`."""

_EXCLUDED = -(2**30)


def generate(
    count: int = DEFAULT[0], min_distance: int = DEFAULT[1], seed: int = 0, tiles: int = 9
) -> NDArray[np.uint8]:
    """Choose permutations that differ from each other as much as possible.

    Greedy: the first is random, each next one has the largest summed Hamming distance to those chosen among all that
    keep `min_distance` to every one of them; ties fall by a random order of the candidates. Identity (the solved
    puzzle) is never chosen. The published set (docs/papers.md) has the same size, minimum and mean, but how
    it was picked is not known. The same arguments give the same rows with any numpy: only raw Philox words are drawn.

    Args:
        count: how many, 1..tiles! - 1.
        min_distance: least Hamming distance of any two, 1..tiles. Two permutations never differ in one place only, so
            1 means 2. Puzzles with at most k occluded tiles are unambiguous from k + 1 on.
        seed: 0 <= seed < 2**64.
        tiles: 2..9 tiles.

    Returns:
        (count, tiles) uint8, values 0..tiles-1: output slot i of puzzle p shows cell `rows[p, i]`.

    Raises:
        UsageError: an argument out of range, or no further permutation keeps the distance (says how many did).
    """
    _check(count, min_distance, seed, tiles)
    every = itertools.chain.from_iterable(itertools.permutations(range(tiles)))
    ordered = np.fromiter(every, np.uint8).reshape(-1, tiles)[1:]  # the first is identity
    candidates = ordered[np.random.Philox(key=seed).random_raw(len(ordered)).argsort(kind="stable")]
    columns = np.ascontiguousarray(candidates.T)
    score = np.zeros(len(candidates), dtype=np.int32)
    distance = np.empty(len(candidates), dtype=np.uint8)
    chosen: list[int] = []
    while len(chosen) < count:
        best = int(score.argmax())
        if score[best] < 0:
            raise UsageError(
                f"{count} permutations of {tiles} tiles were asked for, but the search ends at {len(chosen)} with "
                f"Hamming distance >= {min_distance}: give a smaller count or distance"
            )
        chosen.append(best)
        distance.fill(0)
        for column in columns:
            distance += column != column[best]
        score += distance
        score[distance < min_distance] = _EXCLUDED
    return candidates[chosen]


def _check(count: int, min_distance: int, seed: int, tiles: int) -> None:
    if not 2 <= tiles <= 9:
        raise UsageError(f"{tiles} tiles: permutations are searched exhaustively, for 2 to 9 tiles")
    if not 1 <= min_distance <= tiles:
        raise UsageError(
            f"minimum Hamming distance {min_distance}: permutations of {tiles} tiles differ in 1 to {tiles}"
        )
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed}: give one from 0 to 2**64 - 1")
    # Those with one common prefix of tiles - d + 1 entries are closer than d, so each prefix serves once at most.
    most = min(math.factorial(tiles) // math.factorial(max(min_distance, 2) - 1), math.factorial(tiles) - 1)
    if not 1 <= count <= most:
        raise UsageError(
            f"{count} permutations: 1 to {most} can exist for {tiles} tiles at Hamming distance >= {min_distance}"
        )


@dataclass(frozen=True)
class Summary:
    """What a set of permutations is like: distances are Hamming distances over all pairs."""

    count: int
    tiles: int
    min_distance: int
    mean_distance: float
    histogram: dict[int, int]
    sha256: str


def summarise(permutations: NDArray[np.uint8]) -> Summary:
    """Sizes, distances (0 and no histogram for a single permutation) and the SHA-256 of `to_bytes`."""
    count, tiles = permutations.shape
    pairs = np.zeros(tiles + 1, dtype=np.int64)
    for row, later in ((permutations[i], permutations[i + 1 :]) for i in range(count)):
        pairs += np.bincount((later != row).sum(axis=1), minlength=tiles + 1)
    histogram = {distance: int(number) for distance, number in enumerate(pairs) if number}
    return Summary(
        count=count,
        tiles=tiles,
        min_distance=min(histogram, default=0),
        mean_distance=sum(d * n for d, n in histogram.items()) / max(sum(histogram.values()), 1),
        histogram=histogram,
        sha256=hashlib.sha256(to_bytes(permutations)).hexdigest(),
    )


def to_bytes(permutations: NDArray[np.uint8]) -> bytes:
    """The authors' layout (docs/papers.md): little-endian int32: count, tiles, values 1..tiles by row."""
    header = np.array(permutations.shape, dtype="<i4")
    return header.tobytes() + (permutations.astype("<i4") + 1).tobytes()


def write(path: Path, permutations: NDArray[np.uint8]) -> None:
    """Write the authors' `.bin`, whole or not at all."""
    files.write_bytes(path, to_bytes(permutations))


def from_file(path: Path) -> NDArray[np.uint8]:
    """Read an authors' `.bin`.

    Returns:
        (count, tiles) uint8, values 0..tiles-1.

    Raises:
        UsageError: the file cannot be read, has another layout, or rows that are no permutations or occur twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): name a permutation file") from error
    header = np.frombuffer(data[:8], dtype="<i4") if len(data) >= 8 else np.zeros(2, dtype="<i4")
    count, tiles = int(header[0]), int(header[1])
    if count < 1 or not 2 <= tiles <= 255 or len(data) != 8 + 4 * count * tiles:
        raise UsageError(
            f"{path}: not a permutation file: {len(data)} bytes are not int32 count, int32 tiles, count x tiles int32; "
            f"`ktransfer perms --out FILE` writes one"
        )
    rows = np.frombuffer(data, dtype="<i4", offset=8).reshape(count, tiles)
    wrong = (np.sort(rows, axis=1) != np.arange(1, tiles + 1)).any(axis=1)
    if wrong.any():
        raise UsageError(
            f"{path}: row {int(wrong.argmax()) + 1} does not hold each of 1..{tiles} once: use another file"
        )
    if len(np.unique(rows, axis=0)) < count:
        raise UsageError(f"{path}: a permutation occurs twice, so that two labels mean the same: use another file")
    return (rows - 1).astype(np.uint8)
