"""`ktransfer status`: what a run folder holds, what works in it now, how far it is, until when, and what comes next."""

import time
from pathlib import Path
from typing import Any

from ktransfer.errors import UsageError
from ktransfer.files import read_json
from ktransfer.progress import State
from ktransfer.run import PROGRESS, in_use, records
from ktransfer.stages import STAGES, command_of

CHAIN = ("pretext", "extract", "cluster", "assign", "retrain", "eval")


def status(run: Path) -> str:
    """A row for each step that was begun, then what works and what comes next; for people.

    Raises:
        UsageError: no run folder, or a damaged record in it.
    """
    if not run.is_dir():
        raise UsageError(f"--run {run}: is not there; name the folder of a run")
    steps = [
        (command_of(folder, name), name, record)
        for folder in dict.fromkeys(row.folder for row in STAGES.values())
        for name, record in records(run / folder).items()
    ]
    if not steps:
        raise UsageError(f"--run {run}: holds no stage of a run; name the folder that --run had")
    works = in_use(run)
    rows = [_row(stage, name, record, works) for stage, name, record in steps]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    table = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    done = {stage for stage, _, record in steps if record["state"] == "done"}
    begun = [stage for stage, _, record in steps if record["state"] == "running"]
    return "\n".join([*table, *(_now(run, begun) if works else _next(run, done, steps))])


def in_time(seconds: float) -> str:
    """A length of time as people say it: 12 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    whole = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    parts: list[str] = []
    for name, length in units:
        count, whole = divmod(whole, length)
        if count or parts or name == "s":
            parts.append(f"{count} {name}")
    return " ".join(part for part in parts[:2] if not part.startswith("0 ")) or "0 s"


def _row(stage: str, name: str, record: dict[str, Any], works: bool) -> tuple[str, str, str, str]:
    state = record["state"]
    if state == "running" and not works:
        state = "stopped"
    why = f"failed: {' '.join(record['error'].split())}" if record.get("error") else ""
    return stage, "" if name == stage else name, state, why or f"{in_time(record['seconds'])}{_since(record, state)}"


def _since(record: dict[str, Any], state: str) -> str:
    return f" until now, begun {record['started']}" if state == "running" else ""


def _now(run: Path, begun: list[str]) -> list[str]:
    try:
        now: State = read_json(run / PROGRESS)
        age = time.time() - now["time"]
        done, total, rate = now["done"], now["total"], now["per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["now: a ktransfer process works in it; nothing is known of its progress yet"]
    share = f" ({done / total:.0%})" if total else ""
    said = f"now: {now['label']}: {done} of {total} {now['unit']}{share}, {rate:.3g} a second"
    left = (total - done) / rate - age if rate else 0.0
    if left > 0:
        said += f"; {in_time(left)} more, until {time.strftime('%H:%M', time.localtime(time.time() + left))}"
    if age > 60:
        said += f"; silent for {in_time(age)}"
    at = max((now["line"].index(stage) for stage in begun if stage in now["line"]), default=-1)
    after = now["line"][at + 1 :]
    return [said, *([f"then: {', '.join(after)}"] if after else [])]


def _next(run: Path, done: set[str], steps: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    unfinished = next((stage for stage, _, record in steps if record["state"] != "done"), None)
    if unfinished:
        return [f"nothing works in it; to go on with {unfinished}, give its command again"]
    last = max((CHAIN.index(stage) for stage in done if stage in CHAIN), default=len(CHAIN))
    following = CHAIN[last + 1 : last + 2]
    return ["nothing works in it", *(f"next: ktransfer --run {run} {stage} ..." for stage in following)]
