"""Coverage-guided fuzzing of one reader (`atheris`): fuzz.py TARGET SECONDS OUT, finds as files in OUT/TARGET.

A find is anything but a value or an error of ours: another exception, more than 10 seconds, more than 2 GB beyond what
the imports take, a program started, a file written outside of the folder.
"""

import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

SLOW, MEMORY = 10, 2 << 30


def main() -> None:
    """Fuzz until the time is up; the counts go to OUT/TARGET.json."""
    import atheris

    name, seconds, out = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    with atheris.instrument_imports(include=["ktransfer"]):
        import targets

        target = targets.TARGETS[name]
        seeds = target.seeds()
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        folder = Path(tempfile.mkdtemp(prefix="torture", dir=place))
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for seed in seeds:
            targets.check(target, seed, folder)
    finds = out / name.replace(" ", "-")
    corpus = out / "corpus" / name.replace(" ", "-")
    for made in (finds, corpus):
        made.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    count, known, until = {"inputs": 0, "read": 0, "finds": 0}, set[str](), time.time() + seconds
    report = out / f"{name.replace(' ', '-')}.json"

    def keep(data: bytes, what: str) -> None:
        # Messages differ in numbers; what is the same place and kind is one find.
        if (kind := re.sub(r"[0-9]+", "0", what)) not in known:
            known.add(kind)
            count["finds"] += 1
            stem = hashlib.sha256(data).hexdigest()[:16]
            (finds / stem).write_bytes(data)
            (finds / f"{stem}.txt").write_text(what)

    def too_long(*_: object) -> None:
        raise TimeoutError(f"over {SLOW} s")

    def one(data: bytes) -> None:
        count["inputs"] += 1
        if count["inputs"] % 200 == 0 or time.time() > until:
            report.write_text(json.dumps(count))
        if time.time() > until:
            os._exit(0)
        (out / "last").write_bytes(data)
        signal.alarm(SLOW)
        try:
            count["read"] += not targets.check(target, data, folder)
        except BaseException as error:  # what is written in Rust panics with one
            trace = [frame for frame in traceback.extract_tb(error.__traceback__) if "ktransfer" in frame.filename]
            where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in trace[-3:]]
            keep(data, f"{type(error).__name__} in {' < '.join(reversed(where))}: {str(error)[:300]}")
        finally:
            signal.alarm(0)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        try:
            if dice.random() < 0.6:
                return target.mutate(data if dice.random() < 0.7 else dice.choice(seeds), dice)[:most]
        except Exception:  # what is broken already cannot be changed by what it means
            pass
        return atheris.Mutate(data, most)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    largest = max(map(len, seeds)) * 2 + 4096
    quiet = [f"-artifact_prefix={out}/", f"-max_len={largest}", "-rss_limit_mb=0", "-timeout=0", "-verbosity=0"]
    limit = f"-max_total_time={int(seconds) + 30}"
    atheris.Setup([sys.argv[0], *quiet, limit, str(corpus)], one, custom_mutator=mutated)
    signal.signal(signal.SIGALRM, too_long)
    sys.addaudithook(targets.guard(folder, out))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
