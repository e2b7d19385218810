"""What came of a campaign, as Markdown: printed, and put into docs/reliability.md."""

import json
import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path

BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"
KILLS = ("before", "half-way", "instant")
FAILURES = ("full disk", "EIO")


def written(out: Path, seconds: float, words: str, page: Path | None) -> int:
    """Print the table, put it into the page; how many finds there were."""
    lines, found = described(out)
    words = re.sub(r"--(out|table) \S+ ?", "", words).strip()
    head = (
        f"`make torture` ({words or 'no options'}), {seconds / 60:.0f} minutes, {time.strftime('%Y-%m-%d')}: "
        f"{os.cpu_count()} cores of {platform.machine()}, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, torch {metadata.version('torch')}."
    )
    text = "\n".join([head, "", *lines])
    print(text)
    if page:
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return found


def described(out: Path) -> tuple[list[str], int]:
    """The lines of all tables of a folder, and the number of finds."""
    lines, found = [], 0
    if (out / "kills.json").exists():
        held = json.loads((out / "kills.json").read_text())
        lines += _kills(held)
        found += len(held["finds"])
        lines += [f"- {name}: {' '.join(what.split())[:300]}" for name, what in held["finds"]]
    reports = sorted(path for path in (out / "fuzz").glob("*.json") if path.is_file())
    if reports:
        lines += ["", "| reader | inputs | read | refused | finds |", "|---|---|---|---|---|"]
        total = [0, 0, 0]
        for path in reports:
            count = json.loads(path.read_text())
            finds = len(list((out / "fuzz" / path.stem).glob("*.txt")))
            row = [count["inputs"], count["read"], finds]
            total = [one + more for one, more in zip(total, row, strict=True)]
            lines.append(f"| {path.stem} | {row[0]:,} | {row[1]:,} | {row[0] - row[1]:,} | {finds} |")
        lines.append(f"| **all** | {total[0]:,} | {total[1]:,} | {total[0] - total[1]:,} | {total[2]} |")
        found += total[2]
    return lines, found


def _kills(held: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    lines = ["| command | points | killed before | half-way | at an instant | full disk | EIO | finds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    total = [0] * 6
    for name, count in held["counts"].items():  # a command without a row was not killed
        own = [count.get(kind, 0) for kind in (*KILLS, *FAILURES)]
        if not any(own):
            continue
        own.append(sum(one == name for one, _ in held["finds"]))  # type: ignore[misc]
        total = [one + more for one, more in zip(total, own, strict=True)]
        lines.append(f"| {name} | {held['deeds'].get(name, '')} | {' | '.join(map(str, own))} |")
    lines += [f"| **all** | | {' | '.join(map(str, total))} |", ""]
    others = [
        (kind, name, number)
        for name, count in held["counts"].items()
        for kind, number in sorted(count.items())
        if kind not in (*KILLS, *FAILURES) and not kind.endswith("finished")
    ]
    if others:
        lines += ["| fault | commands | times |", "|---|---|---|"]
        for kind in dict.fromkeys(kind for kind, _, _ in others):
            names = [name for one, name, _ in others if one == kind]
            number = sum(number for one, _, number in others if one == kind)
            lines.append(f"| {kind} | {', '.join(names)} | {number} |")
        lines.append("")
    return lines
