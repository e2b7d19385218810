"""The run folder: what each step was made of, whether it is done, and a lock (docs/architecture.md).

`STAGE/stage.json` maps each step of a stage to its record; a stage has one step, but for `features` (one per data set)
and `clusters` (`cluster` and `assign`).
"""

import contextlib
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ktransfer import __version__, files
from ktransfer.artifacts import lock
from ktransfer.config import all_settings, result_settings, settings_before
from ktransfer.errors import KTransferError, UsageError, refuse_machine, remedy, why
from ktransfer.progress import say
from ktransfer.stages import command_of

RECORD = "stage.json"
PROGRESS = ".progress.json"  # what `ktransfer status` reads, while a line of stages works in the run
NEEDED = {"state": str, "config": dict, "inputs": dict, "outputs": dict, "seconds": int | float}
_guard = threading.Lock()


@dataclass
class _Holder:
    """Who holds a run folder in this process, how often, and what lets go of it."""

    who: tuple[int, int]
    times: int
    release: Callable[[], None]


_locks: dict[Path, _Holder] = {}


@dataclass
class Step:
    """One step of a run, from `begin` to `finish`."""

    run: Path
    folder: Path
    name: str
    record: dict[str, Any]
    done: bool
    started: float = field(default_factory=time.monotonic)

    def finish(self, outputs: Iterable[Path], **facts: Any) -> None:
        """Mark the step done: hashes of its outputs, seconds, and whatever `facts` are worth keeping."""
        self.record |= {"state": "done", "error": None}
        self.record["seconds"] = round(self.record["seconds"] + time.monotonic() - self.started, 1)
        self.record["outputs"] = {
            path.relative_to(self.folder).as_posix(): {"sha256": files.sha256(path), "bytes": path.stat().st_size}
            for path in outputs
        }
        self.record |= facts
        _save(self.folder, self.name, self.record)
        self.done = True

    def interrupted(self, error: BaseException | None) -> None:
        """Keep the time spent, and why it failed if it did."""
        self.record["seconds"] = round(self.record["seconds"] + time.monotonic() - self.started, 1)
        if error is not None:
            self.record |= {"state": "failed", "error": str(error) or type(error).__name__}
        _save(self.folder, self.name, self.record)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep others out of a run folder while this thread works in it (re-entrant): processes, and threads of this one.

    Raises:
        UsageError: the folder cannot be made or written, or another one holds it.
    """
    who = os.getpid(), threading.get_ident()
    key = run.resolve()
    with _guard:
        held = _locks.get(key)
        if held is None or held.who[0] != who[0]:  # what a fork has copied is not held
            held = _locks[key] = _Holder(who, 0, _taken(run))
        elif held.who != who:
            raise UsageError(
                f"--run {run}: another thread of this process is using it; wait for it or choose another folder"
            )
        held.times += 1
    try:
        yield
    finally:
        with _guard:
            held.times -= 1
            if not held.times:
                del _locks[key]
                held.release()


def _taken(run: Path) -> Callable[[], None]:
    """Lock a run folder against other processes; what lets go of it."""
    path = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        release = lock.take(handle, path)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(lock.holder()).encode(), 0)
    except lock.Busy as busy:
        who = busy.who or lock.named(lock.parsed(os.pread(handle, 4096, 0).decode(errors="replace")))
        os.close(handle)
        raise UsageError(
            f"--run {run}: another ktransfer process is using it ({who}); {busy} or choose another folder"
        ) from busy
    except OSError as error:
        os.close(handle)
        raise _unwritable(run, error) from error

    def let_go() -> None:
        os.close(handle)
        release()

    return let_go


def _unwritable(run: Path, error: OSError) -> UsageError:
    return UsageError(f"--run {run}: cannot be written ({why(error)}); {remedy(error, 'choose another folder')}")


def in_use(run: Path) -> bool:
    """Whether a process works in a run folder (False where that cannot be told)."""
    return lock.taken(run / ".lock")


@contextlib.contextmanager
def begin(
    run: Path,
    stage: str,
    name: str,
    config: Any,
    inputs: dict[str, str],
    outputs: Iterable[str],
    overwrite: bool,
    device: str,
    aside: bool = False,
) -> Iterator[Step]:
    """Open a step: new, to be resumed, or done already (`step.done`: a line says that it is skipped).

    Args:
        inputs: name -> SHA-256 of everything that the step reads.
        outputs: files and folders below the stage's folder that `overwrite` removes first.
        aside: keep other processes out of the stage's folder only, not out of the run.

    Raises:
        UsageError: the step exists with other settings or inputs, and `overwrite` was not given.
    """
    outputs = list(outputs)
    with locked(run / stage if aside else run):
        folder = run / stage
        old = read_record(run, stage, name)
        if old and overwrite:
            for output in outputs:
                files.remove(folder / output)
            old = None
        found = changes(run, stage, name, config, inputs) if old else []
        if found and old and leaves_nothing(folder, old):
            say(f"{name}: starts over, as it has written nothing yet ({'; '.join(found)})")
            old = None
        elif found:
            raise refusal(run, stage, name, found)
        if old and old["state"] == "done":
            say(f"{name}: done before, skipped ({folder})")
            yield Step(run, folder, name, old, done=True)
            return
        if old:
            say(f"{name}: goes on where it stopped ({folder})")
        record = {
            "state": "running",
            "config": all_settings(config),
            "inputs": inputs,
            "outputs": {},
            "writes": outputs,
            "versions": versions(),
            "device": device,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": old["seconds"] if old else 0.0,
            "error": None,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _save(folder, name, record)
        except OSError as error:
            raise _unwritable(run, error) from error
        step = Step(run, folder, name, record, done=False)
        try:
            yield step
        except KeyboardInterrupt:
            step.interrupted(None)
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide the error that it caused
                step.interrupted(error)
            raise
        if not step.done:
            raise KTransferError(f"{name} ended without finishing; this is a bug of ktransfer, please report it")


def read_record(run: Path, stage: str, name: str) -> dict[str, Any] | None:
    """The record of a step, or None where there is none.

    Raises:
        UsageError: stage.json is damaged.
    """
    record = records(run / stage).get(name)
    return record if isinstance(record, dict) else None


def done_record(run: Path, stage: str, name: str, make: str) -> dict[str, Any]:
    """The record of a step that must be done.

    Raises:
        UsageError: it is not; the message names the command `make` that does it.
    """
    record = read_record(run, stage, name)
    if not record or record["state"] != "done":
        state = "is missing" if not record else "is not finished"
        raise UsageError(f"--run {run}: {name} {state}; make it first: ktransfer --run {run} {make}")
    return record


def input_hash(path: Path) -> str:
    """The SHA-256 of a file that a step reads.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return files.sha256(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({why(error)}); {remedy(error, 'check it')}") from error


def drop(run: Path, stage: str, goes: Callable[[str], bool]) -> None:
    """Remove the steps of a stage's folder whose name `goes`, with all that they wrote.

    The records go last, so that a removal that was killed is not taken for a whole stage.
    """
    with locked(run):
        folder = run / stage
        held = records(folder)
        kept = {name: record for name, record in held.items() if not goes(name)}
        for name in held.keys() - kept.keys():
            for output in held[name].get("writes", []):
                files.remove(folder / output)
        if held:
            files.write_json(folder / RECORD, kept)


def output_with(run: Path, stage: str, digest: str, others: Iterable[Path] = ()) -> Path | None:
    """The file with this SHA-256 among the outputs of a stage's steps, and others; None where it is gone or changed."""
    made = records(run / stage).values()
    paths = [
        run / stage / path for step in made for path, facts in step["outputs"].items() if facts["sha256"] == digest
    ]
    return next((path for path in (*paths, *others) if path.is_file() and files.sha256(path) == digest), None)


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    found = {"ktransfer": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "faiss-gpu", "faiss-cpu", "numpy", "scikit-learn", "h5py", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def need_disk(folder: Path, needed: int, what: str) -> None:
    """Check free space before the work.

    Raises:
        UsageError: fewer than `needed` bytes are free where `folder` is (or will be).
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(f"{what} needs {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free; make room")


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of all steps of a stage's folder, by name; none where it was never begun.

    Raises:
        UsageError: stage.json is damaged.
    """
    path = folder / RECORD
    try:
        steps: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(steps, dict) or not all(map(_is_record, steps.values())):
            raise ValueError("not a table of steps")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        refuse_machine(path, error)
        raise UsageError(f"{path}: not a stage record ({error}); remove the folder {folder} to start over") from error
    return steps


def _is_record(step: Any) -> bool:
    return (
        isinstance(step, dict)
        and all(isinstance(step.get(name), kind) for name, kind in NEEDED.items())
        and all(isinstance(facts, dict) and isinstance(facts.get("bytes"), int) for facts in step["outputs"].values())
        and all(isinstance(step.get(name), str | None) for name in ("error", "started"))
    )


def _save(folder: Path, name: str, record: dict[str, Any]) -> None:
    files.write_json(folder / RECORD, records(folder) | {name: record})


def changes(
    run: Path, stage: str, name: str, config: Any, inputs: Mapping[str, str], partly: bool = False
) -> list[str]:
    """What keeps a step from being skipped or resumed: a phrase for each changed setting, input or output.

    Args:
        stage: the folder of the step.
        inputs: as for `begin`; `partly`: those that are known before the line starts.

    Returns:
        Nothing where there is no such step yet.
    """
    old = read_record(run, stage, name)
    if old is None:
        return []
    settings, before, known = result_settings(config), settings_before(config) | old["config"], old["inputs"]
    found = [
        f"{key.replace('_', '-')} was {before.get(key)!r}, is {settings[key]!r}"
        for key in sorted(settings)
        if before.get(key) != settings[key]
    ]
    compared = inputs if partly else inputs | known
    found += [f"{key} changed" for key in sorted(compared) if known.get(key) != inputs.get(key)]
    folder = run / stage
    return found + [
        f"{folder / output} is missing or changed"
        for output, facts in old["outputs"].items()
        if not (folder / output).is_file() or (folder / output).stat().st_size != facts["bytes"]
    ]


def leaves_nothing(folder: Path, old: dict[str, Any]) -> bool:
    """Whether an unfinished step has written none of its files, so that a change throws nothing away."""
    return old["state"] != "done" and not any((folder / name).exists() for name in old.get("writes", ["."]))


def refusal(run: Path, stage: str, name: str, found: list[str]) -> UsageError:
    """The error for a step that exists and was made differently, as `found` by `changes`."""
    old = read_record(run, stage, name)
    command = command_of(stage, name)
    if old and old["state"] != "done":
        why = f" ({' '.join(old['error'].split())})" if old["error"] else ""
        return UsageError(
            f"{name} in {run} is unfinished{why} and was begun differently: {'; '.join(found)}. Give {command} "
            "--overwrite to drop what it has and start over, the old settings to go on, or choose another --run"
        )
    return UsageError(
        f"{name} in {run} was made differently: {'; '.join(found)}. Give {command} --overwrite to make it again, "
        "or choose another --run"
    )
