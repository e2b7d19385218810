"""The workplace of the campaign: runs are prepared once, tortured in copies, and compared with undisturbed ones."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scenarios import SCENARIOS, draw

HERE = Path(__file__).parent
LIMIT = 120  # seconds of one command; a command that is still at work then hangs
TIMES = ("seconds", "started")
LOGS = ("metrics.jsonl", ".lock", ".progress.json", "log")


class End(NamedTuple):
    """How a command ended: exit code or minus the signal, what it said, seconds, deeds of preload.c."""

    status: int
    said: str
    seconds: float
    deeds: int


class Workplace:
    """A folder with images, finished runs and one process that forks commands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        draw(root)
        library = root / "preload.so"
        self.preloads = shutil.which("gcc") is not None
        if self.preloads:
            source = str(HERE / "preload.c")
            subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
        self.environment = os.environ | {
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            "XDG_CACHE_HOME": str(root / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        preload = {"LD_PRELOAD": str(library)} if self.preloads else {}
        self.forker = subprocess.Popen(
            [sys.executable, str(HERE.parent / "support" / "forker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment | preload,
        )
        self.wanted: dict[str, dict[str, str]] = {}
        self.deeds: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def close(self) -> None:
        """End the forking process."""
        assert self.forker.stdin
        self.forker.stdin.close()
        self.forker.wait()

    def run(self, folder: str, argv: tuple[str, ...], **order: Any) -> End:
        """Run a command line in a fork within a folder."""
        assert self.forker.stdin and self.forker.stdout
        log = self.root / "log"
        order = {"limit": LIMIT, "argv": list(argv), "log": str(log), "cwd": str(self.root / folder)} | order
        began = time.monotonic()
        self.forker.stdin.write(json.dumps(order) + "\n")
        self.forker.stdin.flush()
        answer = json.loads(self.forker.stdout.readline())
        return End(answer["status"], log.read_text(errors="replace"), time.monotonic() - began, answer["deeds"])

    def before(self, name: str) -> Path:
        """A new folder with the run that a scenario starts from."""
        folder = self.root / "tortured"
        shutil.rmtree(folder, ignore_errors=True)
        after = SCENARIOS[name].after
        if after:
            self.whole(after)
            shutil.copytree(self.root / "whole" / after, folder)
        else:
            folder.mkdir()
        return folder

    def whole(self, name: str) -> dict[str, str]:
        """What an undisturbed run leaves: path -> digest. It is made once."""
        if name not in self.wanted:
            folder = self.before(name)
            end = self.run(folder.name, SCENARIOS[name].argv)
            if end.status != 0:
                raise RuntimeError(f"{name} fails undisturbed ({end.status}): {end.said[-2000:]}")
            kept = self.root / "whole" / name
            kept.parent.mkdir(exist_ok=True)
            folder.rename(kept)
            self.wanted[name] = contents(kept)
            self.deeds[name], self.seconds[name] = end.deeds, end.seconds
        return self.wanted[name]

    def differing(self, name: str) -> list[str]:
        """What the tortured run has otherwise than the undisturbed one: files that differ, lack or are too many."""
        found, wanted = contents(self.root / "tortured"), self.whole(name)
        return sorted(path for path in found | wanted if found.get(path) != wanted.get(path))


def contents(folder: Path) -> dict[str, str]:
    """All files below a folder by what they hold, but for logs; of JSON, times are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in LOGS and not path.name.startswith("events."):
            data = path.read_bytes()
            if path.suffix == ".json":
                data = json.dumps(_timeless(json.loads(data))).encode()
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def spread(count: int) -> Iterator[int]:
    """1..count, each once, those that come first spread over all of them."""
    bits = max(1, (count - 1).bit_length())
    for number in range(2**bits):
        place = int(f"{number:0{bits}b}"[::-1], 2) + 1
        if place <= count:
            yield place
