"""Faults of the machine: a clear line within a minute, and the same bytes once the fault is gone."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import Workplace, contents
from kills import Tally, problems
from scenarios import EVAL, PRETEXT, RETRAIN, SCENARIOS

PATIENCE = 60  # seconds until a clear line must be there
STAGES = ("pretext", "extract", "cluster exact", "assign", "retrain", "eval linear", "selftrain", "pack", "predict csv")
PAIR = {
    "pretext": ("", ("--run", "mine", *PRETEXT, "--permutations", "6")),
    "extract": ("pretext", ("--run", "mine", "extract", "--batch", "8", "--max-broken", "0.1")),
    "cluster": ("extract", ("--run", "mine", "cluster", "--k", "5")),
    "assign": ("cluster", ("--run", "mine", "assign")),
    "retrain": ("assign", ("--run", "mine", *RETRAIN)),
    "eval": ("retrain", ("--run", "mine", *EVAL, "--layers", "conv2,conv4", "--epochs", "2")),
}


def _disturbed(
    place: Workplace, name: str, what: str, tally: Tally, may_finish: bool = True, ready: bool = False, **order: Any
) -> None:
    """One command under a fault: it ends with one line of ours (or well), and given again it ends the same."""
    if not ready:
        place.before(name)
    end = place.run("tortured", SCENARIOS[name].argv, **order)
    tally.add(name, what)
    if end.status == -signal.SIGKILL and "memory" in order:
        tally.find(name, f"{what}: killed")
    elif end.status not in (1, 2) and not (may_finish and end.status == 0):
        tally.find(name, f"{what}: ended with {end.status}: {end.said[-400:]}")
    elif end.status and (wrong := problems(end.said)):
        tally.find(name, f"{what}: {wrong[0]}")
    elif end.seconds > PATIENCE + place.seconds[name]:
        tally.find(name, f"{what}: a line only after {end.seconds:.0f} s")


def _again(place: Workplace, name: str, what: str, tally: Tally) -> None:
    end = place.run("tortured", SCENARIOS[name].argv)
    if end.status:
        tally.find(name, f"{what}: given again, it ends with {end.status}: {end.said[-400:]}")
    elif wrong := place.differing(name):
        tally.find(name, f"{what}: given again, other bytes: {', '.join(wrong)}")


def memory(place: Workplace, name: str, tally: Tally) -> None:
    """Address space that ends 16, 64 or 256 MB beyond what the imports take."""
    for megabytes in (16, 64, 256):
        _disturbed(place, name, "RLIMIT_AS", tally, memory=megabytes << 20)
        _again(place, name, "RLIMIT_AS", tally)


def small_files(place: Workplace, name: str, tally: Tally) -> None:
    """No file may grow beyond 1 or 8 kB (RLIMIT_FSIZE)."""
    for size in (1000, 8000):
        _disturbed(place, name, "RLIMIT_FSIZE", tally, largest=size)
        _again(place, name, "RLIMIT_FSIZE", tally)


def clock(place: Workplace, name: str, tally: Tally) -> None:
    """A clock that stands ten years ago, and one that is ten years ahead when the run goes on."""
    place.before(name)
    place.run("tortured", SCENARIOS[name].argv, strike=(1, max(1, place.deeds[name] // 2)), clock=-315_000_000)
    _disturbed(place, name, "clock", tally, clock=315_000_000, ready=True)
    _again(place, name, "clock", tally)


def read_only(place: Workplace, name: str, tally: Tally) -> None:
    """The folder of the run cannot be written. Root may write anywhere: then it is a bind mount, or left out."""
    folder = place.before(name)
    mounted = os.geteuid() == 0
    if mounted and subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
        tally.add(name, "read-only, left out: no right to mount")
        return
    if not mounted:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
    try:
        _disturbed(place, name, "read-only", tally, may_finish=False, ready=True)
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        else:
            for path in (folder, *folder.rglob("*")):
                path.chmod(path.stat().st_mode | 0o200)
    _again(place, name, "read-only", tally)


def vanishing(place: Workplace, name: str, tally: Tally) -> None:
    """The folder of the run is renamed away while the command is at work."""
    folder = place.before(name)
    gone = folder.with_name("gone")
    shutil.rmtree(gone, ignore_errors=True)
    away = threading.Timer(
        0.4 * place.seconds[name], lambda: (folder / "mine").exists() and (folder / "mine").rename(gone)
    )
    away.start()
    _disturbed(place, name, "vanishing folder", tally, ready=True)
    away.join()
    if gone.exists():
        shutil.rmtree(folder / "mine", ignore_errors=True)
        gone.rename(folder / "mine")
    _again(place, name, "vanishing folder", tally)


SINGLE: tuple[Callable[[Workplace, str, Tally], None], ...] = (memory, small_files, clock, read_only, vanishing)


class Pair:
    """Commands of two processes, as torchrun starts them (tests/support/launcher.py)."""

    def __init__(self, place: Workplace) -> None:
        self.place, self.wanted = place, dict[str, dict[str, str]]()
        self.root = place.root / "pair"
        (self.root / "logs").mkdir(parents=True, exist_ok=True)
        for name in ("images",):
            if not (self.root / name).exists():
                shutil.copytree(place.root / name, self.root / name)

    def start(self, argv: tuple[str, ...], folder: Path) -> list[subprocess.Popen[bytes]]:
        """Two processes, each with a log of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        port = str(20000 + os.getpid() % 20000 + int(time.time()) % 1000)
        started = []
        for rank in (0, 1):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            environment = self.place.environment | {key: str(value) for key, value in given.items()}
            environment["MASTER_ADDR"] = "127.0.0.1"
            with (self.root / "logs" / str(rank)).open("wb") as log:
                command = [sys.executable, "-m", "ktransfer", *argv]
                started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
        return started

    def said(self) -> str:
        """What both said."""
        return "".join((self.root / "logs" / rank).read_text(errors="replace") for rank in "01")

    def before(self, name: str) -> Path:
        """A folder with the run that a stage starts from."""
        folder = self.root / "tortured"
        shutil.rmtree(folder, ignore_errors=True)
        after = PAIR[name][0]
        if after:
            self.whole(after)
            shutil.copytree(self.root / "whole" / after, folder)
        return folder

    def whole(self, name: str) -> dict[str, str]:
        """What two undisturbed processes leave."""
        if name not in self.wanted:
            folder = self.before(name)
            codes = [process.wait() for process in self.start(PAIR[name][1], folder)]
            if codes != [0, 0]:
                raise RuntimeError(f"{name} by two fails undisturbed {codes}: {self.said()[-1500:]}")
            (self.root / "whole").mkdir(exist_ok=True)
            folder.rename(self.root / "whole" / name)
            self.wanted[name] = contents(self.root / "whole" / name)
        return self.wanted[name]

    def disturbed(self, name: str, rank: int, after: float, sign: int, tally: Tally) -> None:
        """One of the two gets a signal; the other ends with a line within a minute, and given again both end well."""
        self.whole(name)
        what = f"{signal.Signals(sign).name} of {'the leader' if rank == 0 else 'the second'} of two"
        both = self.start(PAIR[name][1], self.before(name))
        time.sleep(after)
        landed = both[rank].poll() is None
        if landed:
            both[rank].send_signal(sign)
        began = time.monotonic()
        try:
            code = both[1 - rank].wait(PATIENCE)
            lost = landed and sign == signal.SIGKILL and both[rank].wait() != 0
            if lost and code == 0 and rank == 0:
                tally.find(name, f"{what} after {after:.1f} s: the other ends as if nothing were")
        except subprocess.TimeoutExpired:
            tally.find(
                name, f"{what} after {after:.1f} s: the other still waits after {time.monotonic() - began:.0f} s"
            )
        for process in both:
            process.kill()
            process.wait()
        tally.add(f"{name} by two", what if landed else f"{what}, finished")
        codes = [process.wait() for process in self.start(PAIR[name][1], self.root / "tortured")]
        if codes != [0, 0]:
            tally.find(name, f"{what} after {after:.1f} s: given again, it ends with {codes}: {self.said()[-400:]}")
        elif (found := contents(self.root / "tortured")) != (wanted := self.wanted[name]):
            wrong = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
            tally.find(name, f"{what} after {after:.1f} s: given again, other bytes: {', '.join(wrong)}")
