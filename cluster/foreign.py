"""Features made elsewhere: a .npy or .npz with a key for each row, written into the run as a feature file of ours."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer import files
from ktransfer.artifacts.features import Features, create_or_resume, open_features
from ktransfer.config import option
from ktransfer.data.dataset import Dataset, file_name, fits
from ktransfer.data.lists import spellings
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError, refuse_machine
from ktransfer.progress import bar, say
from ktransfer.run import begin, changes, input_hash, need_disk

SUFFIXES = (".npy", ".npz")
ROWS = "features"  # in a .npz
BLOCK = 2**24  # numbers read at a time


@dataclasses.dataclass(frozen=True)
class AdoptConfig:
    """What the record of an adopted feature file says; `teacher` is the file that it was made of."""

    data: str | None = option(None, "the images, where they are known", execution=True)
    teacher: str = option("", "the file that was given", execution=True)
    keys: str | None = option(None, "the list of keys", execution=True)
    elsewhere: bool = option(True, "the teacher is not known")


class Foreign(NamedTuple):
    """What a file of features holds.

    Attributes:
        rows: (n, d) float16, float32 or float64; mapped from a .npy.
        keys: n distinct keys, row by row.
    """

    rows: NDArray[Any]
    keys: list[str]


def is_foreign(features: str) -> bool:
    """Whether a file of features is none of ours, by its ending."""
    return Path(features).suffix.lower() in SUFFIXES


def check_keys(features: str | None, keys: str | None) -> None:
    """UsageError where a list of keys is given with nothing that needs one."""
    if keys and not (features and is_foreign(features)):
        raise UsageError(f"--keys {keys}: is for --features FILE.npy or FILE.npz only; leave it out")


def open_foreign(features: str, keys: str | None, data: str | None) -> Foreign:
    """Open a file of features and check everything but its numbers.

    Args:
        features: a .npy of (n, d) floats, or a .npz that holds such an array as `features` (or nothing else of two
            dimensions) and maybe n strings as `keys`; nothing is unpickled.
        keys: a text file with one key a line, row by row; beats the `keys` of a .npz.
        data: the images that the keys must name, None where they are not at hand.

    Raises:
        UsageError: unreadable, of another shape or type; keys that are missing, double, too many or no images of
            `data`.
    """
    path = Path(features)
    rows, held = _arrays(path)
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind != "f":
        raise UsageError(
            f"{path}: {rows.dtype} of shape {rows.shape}, must be floats of shape (n, d), n and d at least 1"
        )
    if keys:
        names, where = _lines(Path(keys)), keys
    elif held is not None:
        names, where = _strings(path, held), f"{path}, keys"
    else:
        raise UsageError(
            f"{path}: has no keys; give --keys FILE with the path of one image per line, in the order of the rows"
        )
    if len(names) != len(rows):
        raise UsageError(f"{where}: {len(names)} keys for {len(rows)} rows of {path}; give one for each row")
    if data:
        known = set(open_dataset(data).keys)
        names = [next((one for one in spellings(name) if one in known), name) for name in names]
        strange = [name for name in names if name not in known]
        if strange:
            raise UsageError(
                f"{where}: {len(strange)} of {len(names)} keys are no images of {data}, such as {strange[0]}; keys "
                "are paths below the folder, with /"
            )
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError(f"{where}: key {name} occurs twice; give each row its own")
        seen.add(name)
    return Foreign(rows, names)


def preview(features: str, keys: str | None, data: str | None) -> Features:
    """The rows as they stand in the file, for counting what they will need (errors as `open_foreign`)."""
    found = open_foreign(features, keys, data)
    count = len(found.rows)
    return Features(Path(features), found.rows, np.ones(count, np.bool_), np.full(count, -1, np.int32), {})


def adopted(run: Path, features: str) -> Path:
    """Where `adopt` writes a file of features."""
    return run / "features" / f"{_name(features)}.h5"


def _name(features: str) -> str:
    return Path(features).stem if fits(f"{Path(features).stem}.h5") else file_name(Path(features).stem)


def adopt(run: Path, features: str, keys: str | None, data: str | None, overwrite: bool, stage: str) -> Path:
    """Write a file of features into the run as `features/NAME.h5`, NAME being that of the file.

    With `data`, row i is image i of it, and images without a row are marked as not valid. Otherwise rows stay as
    they are. float64 becomes float32.

    Raises:
        UsageError: as `open_foreign`; numbers that are not finite; the run holds other features of this name, and
            `overwrite` was not given (`stage` is the command that has it).
    """
    found = open_foreign(features, keys, data)
    source = open_dataset(data) if data else None
    dtype = "float16" if found.rows.dtype == np.float16 else "float32"
    _refuse_infinite(Path(features), found, dtype)
    name = _name(features)
    inputs = {"features": input_hash(Path(features)), "keys": _digest(found.keys)}
    if source:
        inputs["data"] = source.fingerprint
    config = AdoptConfig(data, features, keys)
    if not overwrite and (wrong := changes(run, "features", name, config, inputs)):
        raise UsageError(
            f"{features}: features/{name}.h5 in {run} was made differently: {'; '.join(wrong)}; give {stage} "
            "--overwrite to make it again, or choose another --run"
        )
    outputs = [f"{name}.h5", f"{name}.h5.part", f"{name}.h5.progress"]
    with begin(run, "features", name, config, inputs, outputs, overwrite, "cpu") as step:
        file = step.folder / outputs[0]
        if step.done:
            return file
        _write(file, found, source, inputs["keys"], dtype)
        rows = open_features(file)
        step.finish([file], result={"rows": len(rows.valid), "dim": found.rows.shape[1]})
        say(f"{stage}: took {len(found.rows)} x {found.rows.shape[1]} from {features}; {file}")
        return file


def _write(file: Path, found: Foreign, source: Dataset | None, digest: str, dtype: str) -> None:
    count, dim = found.rows.shape
    places = np.arange(count)
    names, targets, fingerprint = found.keys, np.full(count, -1, np.int32), digest
    if source:
        row_of = {key: row for row, key in enumerate(found.keys)}
        places = np.array([row_of.get(key, -1) for key in source.keys])
        names, targets, fingerprint = list(source.keys), source.targets, source.fingerprint
    need_disk(file.parent, len(places) * dim * np.dtype(dtype).itemsize, f"{file.name} ({dim} numbers each)")
    # The file itself is no part of it: rows of other images, made in the same way in a second file, can be assigned.
    attributes = {
        "teacher": "made elsewhere",
        "layer": "made elsewhere",
        "pooling": f"{dim} numbers",
        "transform": "made elsewhere",
        "fingerprint": fingerprint,
    }
    writer = create_or_resume(file, names, targets, dim, dtype, attributes)
    with bar(len(places), "copy features", "rows", done=writer.rows_done) as shown:
        for start in range(writer.rows_done, len(places), max(1, BLOCK // dim)):
            chosen = places[start : start + max(1, BLOCK // dim)]
            writer.write(start, found.rows[chosen].astype(dtype), chosen >= 0)
            shown.update(len(chosen))
    writer.finish()


def _arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The features and, of a .npz that has them, the keys."""
    if not path.is_file():
        raise UsageError(f"{path}: no such feature file; check the path")
    try:
        if path.suffix.lower() == ".npy":
            mapped: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
            return mapped, None
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive)
            held = archive["keys"] if "keys" in names else None
            if ROWS not in names:
                flat = [name for name in names if archive[name].ndim == 2]
                if len(flat) != 1:
                    raise UsageError(f"{path}: holds {', '.join(names) or 'nothing'}; save the rows as `{ROWS}`")
                return archive[flat[0]], held
            return archive[ROWS], held
    except UsageError:
        raise
    except Exception as error:  # a damaged header makes numpy raise anything, or ask for terabytes
        refuse_machine(path, error)
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{path}: cannot be read ({reason}); save plain arrays with numpy.save or numpy.savez"
        ) from error


def _lines(path: Path) -> list[str]:
    try:
        text = files.read_text(path, "surrogateescape")
        if "\0" in text:
            raise ValueError("no text")
    except (OSError, ValueError) as error:
        raise UsageError(f"--keys {path}: cannot be read ({error}); give a text file with one key a line") from error
    return files.lines_of(text)


def _strings(path: Path, held: NDArray[Any]) -> list[str]:
    if held.ndim != 1 or held.dtype.kind not in "US":
        raise UsageError(f"{path}: keys is {held.dtype} of shape {held.shape}, must be (n,) strings")
    try:
        return [key if isinstance(key, str) else key.decode("utf-8") for key in held.tolist()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: a key is not UTF-8 ({error}); save them as strings") from error


def _refuse_infinite(path: Path, found: Foreign, dtype: str) -> None:
    step = max(1, BLOCK // found.rows.shape[1])
    for start in range(0, len(found.rows), step):
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(found.rows[start : start + step], dtype)).all(axis=1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise UsageError(
                f"{path}: row {row} ({found.keys[row]}) holds NaN, infinity or numbers beyond {dtype}; correct it"
            )


def _digest(keys: list[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()
