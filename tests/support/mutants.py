"""Break the files that matter most in one place after the other, and list what their tests do not notice.

    make mutants [MINUTES=30]
    python tests/support/mutants.py [--minutes 30] [--out runs/mutants] [--again runs/mutants/survived.jsonl] [FILE ...]

cosmic-ray makes the mutants; this script draws them, in an order that is always the same, and runs the tests of each
file against a copy of the tree that is installed as a wheel is. Nothing is written to the tree but --out. See
docs/testing.md for what is mutated, what is not, and why.
"""

import argparse
import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("pretext", "cluster", "retrain", "eval")
COPIED = (*ROOMS, "ktransfer", "tests", "recipes", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
ONCE = (  # imported once and not for each mutant
    "faiss",
    "h5py",
    "hypothesis",
    "PIL.Image",
    "pytest",
    "sklearn.linear_model",
    "torch",
    "torchvision.models.detection",
)
NAMES: dict[str, tuple[str | None, ...]] = {  # where it is a few functions of the file; None: its constants
    "ktransfer/training/loop.py": (None, "rate", "sgd", "epoch_batches"),
    "ktransfer/detection/data.py": ("subset", "fraction", "_spread"),
    "pretext/stage.py": ("_split",),
    "eval/learners/probe.py": ("hold_out",),
    "eval/learners/logistic.py": ("stratified_folds",),
}
TESTS: dict[str, tuple[str, ...]] = {
    "ktransfer/rng.py": ("test_rng.py",),
    "pretext/puzzles.py": ("pretext/test_puzzles.py",),
    "pretext/permutations.py": ("pretext/test_permutations.py",),
    "cluster/engines/bounds.py": (
        "cluster/engines/test_bounds.py",
        "cluster/engines/test_exact.py::test_scores_are_never_off_by_more_than_the_doubt",
        "cluster/engines/test_exact.py::test_bounds_leave_few_pairs_and_work_is_saved",
        "cluster/engines/test_exact.py::test_bounds_of_pairs_near_the_largest_float32",
    ),
    "cluster/algorithms/lloyd.py": ("cluster/algorithms/test_lloyd.py",),
    "ktransfer/detection/detectors.py": ("detection/test_detectors.py",),
    "ktransfer/detection/losses.py": ("detection/test_losses.py",),
    "ktransfer/detection/metrics.py": ("detection/test_metrics.py",),
    "ktransfer/training/loop.py": (
        "training/test_schedule.py",
        "training/test_loop.py::test_steps_are_those_of_plain_sgd",
    ),
    "eval/metrics.py": ("eval/test_metrics.py",),
    "ktransfer/detection/data.py": ("detection/test_data.py",),
    "pretext/stage.py": ("pretext/test_pretext_stage.py",),
    "eval/learners/probe.py": ("eval/learners/test_probe.py",),
    "eval/learners/logistic.py": ("eval/learners/test_logistic.py",),
}


class Mutant(NamedTuple):
    """One change of one place: cosmic-ray's operator, and which of the places that it finds."""

    path: str
    line: int
    operator: str
    occurrence: int


def unseen(tree: ast.Module) -> list[tuple[int, int, int, int]]:
    """From where to where nothing is mutated: types, assertions and `strict`, which guard, and what errors say."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.Raise):
            found.append(node.exc)
        elif isinstance(node, ast.Assert):
            found.append(node.test)
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node.value)
    kept = [node for node in found if node is not None]
    return [(n.lineno, n.col_offset, n.end_lineno or 0, n.end_col_offset or 0) for n in kept]


def mutants(path: str, source: str) -> list[Mutant]:
    """One mutant for each place of a file that an operator finds, in a random order that is always the same."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery
    from cosmic_ray.plugins import get_operator, operator_names

    still, nodes = unseen(ast.parse(source)), list(ast_nodes(get_ast(source)))
    found = []
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or (name.endswith(("_Is", "_IsNot")) and "_Is_" not in name and "_IsNot_" not in name):
            continue  # `is` for `==` says the same of small numbers
        places = ((node, *at) for node in nodes for at in operator().mutation_positions(node))
        for occurrence, (node, start, end) in enumerate(places):
            hidden = any(at[:2] <= start and end <= at[2:] for at in still)
            if not hidden and (path not in NAMES or ASTQuery(node).get_definition_name() in NAMES[path]):
                kind = name.split("_")[0]
                found.append(((start, end, kind), Mutant(path, start[0], name, occurrence)))
    draw = random.Random(path)
    groups = groupby(sorted(found), key=lambda pair: pair[0])
    chosen = [draw.choice([mutant for _, mutant in group]) for _, group in groups]
    draw.shuffle(chosen)
    return chosen


def installed(copy: Path, path: str) -> Path:
    """Where a file of the tree lies in the installed package."""
    return copy / "site" / (path if path.startswith("ktransfer/") else f"ktransfer/{path}")


def prepare(copy: Path) -> None:
    """Copy the tree and install it, rooms and extension and all, into `copy`/site."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(copy / "site"), str(copy)]
    subprocess.run(pip, check=True)
    for name in ROOMS:  # else `import pretext` would find them beside the tests
        shutil.rmtree(copy / name)
    shutil.rmtree(copy / "ktransfer")
    for cached in (copy / "site").rglob("__pycache__"):
        shutil.rmtree(cached)


def run_tests(tests: tuple[str, ...], log: str) -> None:
    """In a process of its own: exits with pytest's code."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import pytest

    # A training's outcome notices much, says nothing about where, and takes long.
    words = [
        "-x",
        "-q",
        "-m",
        "not slow",
        "-k",
        "not by_heart",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:cov",
    ]
    os._exit(pytest.main([*words, "--hypothesis-seed=0", *(f"tests/{name}" for name in tests)]))


def passes(tests: tuple[str, ...], timeout: float, log: str = os.devnull) -> bool:
    """Whether the tests pass in time, in a fork of this process, which has the large libraries imported already."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tests, log))
    process.start()
    try:
        process.join(timeout)
        return process.exitcode == 0
    finally:
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()


def killed(mutant: Mutant, target: Path, source: str, timeout: float) -> tuple[bool, str]:
    """Whether a test fails with `source`, which lies at `target`, changed; and the lines that were changed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    pairs = zip_longest(source.splitlines(), changed.splitlines(), fillvalue="")
    lines = " | ".join(new.strip() for old, new in pairs if old != new)[:200]
    target.write_text(changed, encoding="utf-8")
    try:
        return not passes(TESTS[mutant.path], timeout), lines
    finally:
        target.write_text(source, encoding="utf-8")


def main() -> int:
    """Run the mutants in turns, one of each file, until they or the minutes are used up."""
    parser = argparse.ArgumentParser(description="mutants that the tests do not notice")
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants")
    parser.add_argument("--skip", type=int, default=0, help="of each file, the first ones: an earlier run tried them")
    parser.add_argument("--again", type=Path, help="the survivors of an earlier run alone")
    options = parser.parse_args()
    again = (
        [json.loads(line) for line in options.again.read_text(encoding="utf-8").splitlines()] if options.again else []
    )
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name in ONCE:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        copy = Path(folder)
        prepare(copy)
        os.chdir(copy)
        sys.path[:] = [str(copy / "site"), *(entry for entry in sys.path if Path(entry) != ROOT / "tests" / "support")]
        os.environ["PYTHONPATH"] = str(copy / "site")  # for what tests start themselves
        sources = {path: installed(copy, path).read_text(encoding="utf-8") for path in options.files}
        lists = {path: mutants(path, source)[options.skip :] for path, source in sources.items()}
        if options.again:
            lists = {path: [Mutant(*row[:4]) for row in again if row[0] == path] for path in options.files}
        return judge(
            {path: listed for path, listed in lists.items() if listed}, sources, copy, options.out, 60 * options.minutes
        )


def judge(lists: dict[str, list[Mutant]], sources: dict[str, str], copy: Path, out: Path, seconds: float) -> int:
    """Test all mutants that so much time allows; a line for each survivor, and a table in the end."""
    limits = {}
    for path in list(lists):
        began = time.monotonic()
        if not passes(TESTS[path], 600, str(out / "unchanged.txt")):
            print(f"{path}: {', '.join(TESTS[path])} fails without a mutant, see {out / 'unchanged.txt'}")
            return 1
        limits[path] = 10 + 4 * (time.monotonic() - began)
        print(f"{path}: {len(lists[path])} mutants, {time.monotonic() - began:.1f} s without one", flush=True)
    sys.dont_write_bytecode = True
    for path in lists:  # else what is compiled could be taken for that of a mutant of the same second
        for compiled in installed(copy, path).parent.glob(f"__pycache__/{Path(path).stem}.*"):
            compiled.unlink()
    until = time.monotonic() + seconds
    tried, died = dict.fromkeys(lists, 0), dict.fromkeys(lists, 0)
    with (out / "survived.jsonl").open("w", encoding="utf-8") as survived, contextlib.suppress(KeyboardInterrupt):
        for mutant in (one for turn in zip_longest(*lists.values()) for one in turn if one):
            if time.monotonic() > until:
                break
            dead, lines = killed(mutant, installed(copy, mutant.path), sources[mutant.path], limits[mutant.path])
            tried[mutant.path] += 1
            died[mutant.path] += dead
            if not dead:
                print(f"{mutant.path}:{mutant.line} {mutant.operator}: {lines}", flush=True)
                print(json.dumps([*mutant, lines]), file=survived, flush=True)
    print("\n| file | mutants | tried | died |\n|---|---|---|---|")
    for path, listed in lists.items():
        print(f"| {path} | {len(listed)} | {tried[path]} | {died[path]} |")
    print(f"| all | {sum(map(len, lists.values()))} | {sum(tried.values())} | {sum(died.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
