"""A study of the chain, carried out: every step once, in a run folder of its own that links to those before it."""

import os
import shlex
import statistics
import subprocess  # of this Python alone  # nosec B404
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import click

from ktransfer import files
from ktransfer.config import in_words
from ktransfer.errors import KTransferError, StageError, UsageError
from ktransfer.machine import cores
from ktransfer.plan import carry_out_line, plan_line, refuse_changes
from ktransfer.progress import say
from ktransfer.run import locked, records

from . import findings
from .recipe import Recipe, Step, read, row_of

STEPS = "steps"


def study(recipe: str | Path, run: str | Path, jobs: int = 1, dry_run: bool = False) -> Path:
    """Make every step that is not there yet, then write `study.md`, `study.csv`, `study.json` and plots.

    Args:
        recipe: a TOML file (`recipe.py`).
        run: the folder of the study; killed and given again, it goes on; of a changed recipe it makes what
            depends on the change.
        jobs: steps that are made at once, each in a process with its share of the cores.
        dry_run: show the steps instead, what is there of them, and how long such steps took.

    Returns:
        The path of `study.md`.

    Raises:
        UsageError: the recipe, or a cell of it, is wrong; nothing was begun.
        StageError: some steps failed, which are named; all others are whole.
    """
    plan, run = read(Path(recipe)), Path(run)
    wanted = distinct(plan)
    if dry_run:
        click.echo(described(wanted, run))
        return run / "study.md"
    _check(plan, run, f"--recipe {recipe}")
    with locked(run):
        failed = _carry_out(wanted, run, jobs)
        if failed:
            names = "; ".join(f"{name} ({why})" for name, why in failed.items())
            raise StageError(
                f"study: {len(failed)} of {len(wanted)} steps failed: {names}; what rests on none of them is complete: "
                "remove the cause and give the same command again"
            )
        return findings.write(plan, run, [(cell, run / STEPS / cell.step.name) for cell in plan.cells])


def distinct(recipe: Recipe) -> list[Step]:
    """All steps, each once, none before the one that it rests on."""
    found: dict[str, Step] = {}
    for cell in recipe.cells:
        for step in cell.step.line():
            found.setdefault(step.name, step)
    return list(found.values())


def described(wanted: Sequence[Step], run: Path) -> str:
    """A row for each step: whether it is there, and how long it took, or others of its folder did."""
    seconds = {step.name: _seconds(run, step) for step in wanted}
    known: dict[str, list[float]] = {}
    for step in wanted:
        if (took := seconds[step.name]) is not None:
            known.setdefault(step.folder, []).append(took)
    lines, left = [], 0.0
    for step in wanted:
        usual = statistics.median(known[step.folder]) if step.folder in known else None
        took = seconds[step.name]
        words = f"took {took:.0f} s" if took is not None else "-" if usual is None else f"about {usual:.0f} s"
        left += (usual or 0.0) if took is None else 0.0
        state = "is done" if took is not None else "runs"
        lines.append(f"{step.name:24} {state:8} {words:12} {' '.join(_command(run, step).split()[3:])}")
    open_ones = sum(took is None for took in seconds.values())
    unknown = sorted({step.folder for step in wanted if step.folder not in known})
    words = f"; not known yet of {', '.join(unknown)}" if unknown else ""
    lines.append(f"{open_ones} of {len(wanted)} steps run, one by one in about {left / 60:.0f} min{words}")
    return "\n".join(lines)


def _check(recipe: Recipe, run: Path, where: str) -> None:
    """Plan the whole chain of every cell in a folder that is not there, so that all mistakes are found at once."""
    for cell in {row_of(recipe, cell): cell for cell in recipe.cells}.values():  # one of several seeds
        calls = [call for step in cell.step.line() for call in step.calls]
        try:
            plan_line(calls, run / STEPS / "none")
        except UsageError as error:
            raise UsageError(f"{where}: cell {row_of(recipe, cell)}: {error}") from error


def _carry_out(wanted: Sequence[Step], run: Path, jobs: int) -> dict[str, str]:
    """Make all steps; the name of each that failed, and why. What rests on a failed one is not begun."""
    if jobs > 1:
        return _carry_out_beside(wanted, run, jobs)
    failed: dict[str, str] = {}
    for number, step in enumerate(wanted, 1):
        if not _rests_on(step, failed) and (why := _made_here(step, run, number, len(wanted))):
            failed[step.name] = why
            say(f"study: {step.name} failed: {why}")
    return failed


def _carry_out_beside(wanted: Sequence[Step], run: Path, jobs: int) -> dict[str, str]:
    """The same, several at once."""
    failed: dict[str, str] = {}
    done: set[str] = set()
    waiting, running = list(wanted), dict[Future[str], Step]()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [step for step in waiting if step.before is None or step.before.name in done]
            for step in ready[: jobs - len(running)]:
                say(f"study: begins {step.name}: {_command(run, step)}")
                running[pool.submit(_made_beside, step, run, jobs)] = step
            waiting = [step for step in waiting if step not in running.values() and not _rests_on(step, failed)]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                if why := future.result():
                    failed[step.name] = why
                    say(f"study: {step.name} failed: {why}")
                else:
                    done.add(step.name)
    return failed


def _rests_on(step: Step, others: Mapping[str, object]) -> bool:
    return any(one.name in others for one in step.line())


def _made_here(step: Step, run: Path, number: int, of: int) -> str:
    """Make a step in this process; why it failed, "" where it did not."""
    say(f"\nstudy: step {number} of {of}: {_command(run, step)}")
    place = linked(step, run)
    try:
        for call in step.calls:
            line = plan_line([call], place)
            refuse_changes(line)
            with locked(place):
                carry_out_line(line)
    except KTransferError as error:
        return " ".join(str(error).split())
    return ""


def _made_beside(step: Step, run: Path, jobs: int) -> str:
    """Make a step in a process of its own."""
    place = linked(step, run)
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    for stage, options in step.calls:
        words = in_words(place, stage, options)
        made = subprocess.run(  # no shell  # nosec B603
            [sys.executable, "-m", *shlex.split(words)],
            env=os.environ | threads,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        files.write_text(place / f"{stage}.log", made.stderr)
        if made.returncode:
            said = [line for line in made.stderr.splitlines() if line.strip()]
            return (said or [f"ended with code {made.returncode}"])[-1].removeprefix("ktransfer: ")
    return ""


def linked(step: Step, run: Path) -> Path:
    """The run folder of a step, with links to the folders of the steps before it."""
    place = run / STEPS / step.name
    place.mkdir(parents=True, exist_ok=True)
    for other in step.line()[:-1]:
        link = place / other.folder
        if not link.is_symlink():
            link.symlink_to(Path("..") / other.name / other.folder)
    return place


def _command(run: Path, step: Step) -> str:
    place = run / STEPS / step.name
    words = [in_words(place, stage, options) for stage, options in step.calls]
    return " ".join([words[0], *(one.partition(f"{step.name} ")[2] for one in words[1:])])


def _seconds(run: Path, step: Step) -> float | None:
    """How long a step took, None where it is not whole."""
    held = [one for one in records(run / STEPS / step.name / step.folder).values() if one["state"] == "done"]
    return sum(one["seconds"] for one in held) if len(held) >= len(step.calls) else None
