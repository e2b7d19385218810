"""The import rule of docs/architecture.md: a room imports the ground floor and itself, never another room.

Run by `make check`; prints what breaks the rule and exits with 1.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pretext", "cluster", "retrain", "eval")


def imported(path: Path) -> set[str]:
    """All modules that a file imports by absolute name, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong(path: Path, room: str | None) -> list[str]:
    """The imports of one file that its place in the house does not allow."""
    found = imported(path)
    rooms = {name for name in ROOMS for module in found if module.startswith(f"ktransfer.{name}")}
    if room is None and path.name == "cli.py":  # the front door
        return []
    return [f"{path.relative_to(ROOT)}: imports ktransfer.{name}" for name in sorted(rooms - {room})]


def main() -> int:
    """Check all rooms and the ground floor."""
    problems = [line for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) for line in wrong(path, room)]
    problems += [line for path in sorted((ROOT / "ktransfer").rglob("*.py")) for line in wrong(path, None)]
    print("\n".join(problems) or "imports: every room keeps to itself")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
