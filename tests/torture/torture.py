"""The campaign (`make torture`): kills, faults and hostile inputs for some time, and a table of what came of it.

    python tests/torture/torture.py                          ten minutes
    python tests/torture/torture.py --hours 8                a night
    python tests/torture/torture.py --only kills             kills, faults or fuzz alone
    python tests/torture/torture.py --scenarios pack,study   some commands alone
    python tests/torture/torture.py --again runs/torture/fuzz/pack/FILE --target pack    one find, with its traceback

Finds stand in OUT/finds.json and, as files, in OUT/fuzz/TARGET; the exit code is 1 where there are any.
"""

import argparse
import importlib.util
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import faults
from bench import Workplace
from kills import Tally, torture
from scenarios import SCENARIOS
from table import written

HERE = Path(__file__).parent
SLOW = ("selftrain instance",)  # minutes for a run: only where there are hours


def fuzzed(out: Path, seconds: float, names: list[str]) -> None:
    """Each reader its share of the time, in a process of its own, which starts again where it was ended."""
    share = seconds / len(names)
    for name in names:
        until, stem = time.time() + share, name.replace(" ", "-")
        while (left := until - time.time()) > 1:
            command = [sys.executable, "-W", "ignore", str(HERE / "fuzz.py"), name, f"{left:.0f}", str(out)]
            with (out / "log").open("wb") as log:
                ended = subprocess.run(command, stdout=log, stderr=log, timeout=left + 120, check=False)
            if ended.returncode:
                (out / stem).mkdir(exist_ok=True)
                if (out / "last").exists():
                    shutil.copy(out / "last", out / stem / f"ended{int(time.time())}")
                said = (out / "log").read_text(errors="replace")[-1500:]
                (out / stem / f"ended{int(time.time())}.txt").write_text(f"ended with {ended.returncode}: {said}")


def single_faults(place: Workplace, tally: Tally, until: float) -> None:
    """Each fault for each stage, as far as the time goes, in another order each time."""
    both = [(fault, name) for name in faults.STAGES for fault in faults.SINGLE]
    random.Random(int(until)).shuffle(both)
    for fault, name in both:
        if time.time() > until:
            return
        place.whole(name)
        fault(place, name, tally)


def pair_faults(place: Workplace, tally: Tally, until: float) -> None:
    """One of two processes killed or stopped, at instants over the whole life of each stage."""
    pair, dice = faults.Pair(place), random.Random(int(until))
    while time.time() < until:
        for name in faults.PAIR:
            for rank, sign in ((1, 9), (0, 9), (1, 19)):
                if time.time() > until:
                    return
                pair.disturbed(name, rank, dice.uniform(1, 8), sign, tally)


def again(name: str, file: Path) -> None:
    """Read one find once more."""
    import targets

    with tempfile.TemporaryDirectory() as folder:
        print(targets.check(targets.TARGETS[name], file.read_bytes(), Path(folder)) or "read")


def main() -> int:
    """Run the campaign; 1 where it found something."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--hours", type=float, default=1 / 6)
    ask.add_argument("--out", type=Path, default=Path("runs/torture"))
    ask.add_argument("--only", default="kills,faults,fuzz")
    ask.add_argument("--scenarios", default="")
    ask.add_argument("--targets", default="")
    ask.add_argument("--table", type=Path, help="docs/reliability.md, whose table is written anew")
    ask.add_argument("--again", type=Path)
    ask.add_argument("--target")
    given = ask.parse_args()
    if given.again:
        again(given.target, given.again)
        return 0
    parts, seconds, out = given.only.split(","), given.hours * 3600, given.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "fuzz").mkdir(parents=True)
    began, tally = time.time(), Tally()
    chosen = (
        given.scenarios.split(",") if given.scenarios else [n for n in SCENARIOS if n not in SLOW or seconds > 7200]
    )
    side = None
    if "fuzz" in parts and importlib.util.find_spec("atheris") is None:
        print("fuzz left out: atheris is not installed; pip install 'ktransfer[torture]'")
    elif "fuzz" in parts:
        import targets

        names = given.targets.split(",") if given.targets else list(targets.TARGETS)
        side = threading.Thread(target=fuzzed, args=(out / "fuzz", seconds, names))
        side.start()
    if "kills" in parts or "faults" in parts:
        place = Workplace(out / "work")
        if not place.preloads:
            print("kills at every write left out: no gcc; kills at random instants are made")
        share = 0.6 if "faults" in parts else 1.0
        if "kills" in parts:
            torture(place, began + share * seconds, tally, chosen, out / "kills.json")
        if "faults" in parts:
            single_faults(place, tally, began + 0.8 * seconds)
            pair_faults(place, tally, began + seconds)
        place.close()
        tally.save(out / "kills.json")
    if side:
        side.join()
    found = written(out, time.time() - began, " ".join(sys.argv[1:]), given.table)
    shutil.rmtree(out / "work", ignore_errors=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
