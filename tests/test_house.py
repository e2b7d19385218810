"""The rules of docs/architecture.md that no linter knows: who imports whom, how large a file is, what is public.

Each rule is a function from the files of a tree to the lines that say what breaks it. Trees with one fault each show
that the rules see it.
"""

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pretext", "cluster", "retrain", "eval")
PACKAGES = ("ktransfer", *ROOMS, "recipes")
# The table of stages names modules of all rooms as strings; the front door imports them. No room imports the table:
# it would look into another one.
TABLE = "ktransfer.stages"
KNOWS_ALL = {"ktransfer.cli", "ktransfer.tools", TABLE}
# Modules whose business is to import what they are told; the last one what users wrote themselves.
IMPORTERS = {TABLE, "ktransfer.lazy", "ktransfer.networks.functions"}
LINES = {"tests": 600, "benchmarks": 400} | dict.fromkeys(PACKAGES, 400)
FILES_IN_FOLDER = 20
# All that Python users may import by the name of a package; it grows on purpose or not at all.
PUBLIC = {
    "ktransfer.cluster": "AssignConfig ClusterConfig ExtractConfig KMeans assign cluster extract",
    "ktransfer.eval": "EvalConfig compare evaluate",
    "ktransfer.networks": (
        "CLASSIFIER HEAD IMAGENET TRUNKS AlexNet Network VGGTrunk build check_arch class_names classifier_names "
        "describe feature_maps fitting has_class_token he_init layers load normalise save scaled statistics "
        "statistics_name tokens_before trunk"
    ),
    "ktransfer.pretext": "PretextConfig pretext",
    "ktransfer.report": "ReportConfig report",
    "ktransfer.retrain": "ExportConfig RetrainConfig SelftrainConfig export load_model retrain selftrain",
}


class Source(NamedTuple):
    """A file of the package."""

    path: str
    """Below the root."""
    module: str
    """As Python imports it: `ktransfer.eval.stage`, or the package for an `__init__.py`."""
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def room(self) -> str | None:
        return room_of(self.module)


class Import(NamedTuple):
    """One imported name."""

    module: str
    """Absolute."""
    name: str
    """What is taken from the module, itself a module or not; empty for the module as a whole."""
    line: int
    for_types: bool
    """Under `if TYPE_CHECKING`: no import when the program runs."""

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def room_of(module: str) -> str | None:
    top, _, below = module.partition(".")
    first = below.split(".")[0]
    return first if top == "ktransfer" and first in ROOMS else None


def sources(root: Path) -> list[Source]:
    """All files of the package below `root`: `ktransfer/`, and the rooms, which install inside it."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = (() if package == "ktransfer" else ("ktransfer",)) + parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found.append(Source(path.relative_to(root).as_posix(), module, tree))
    return found


def absolute(source: Source, level: int, module: str) -> str:
    """The module that `from ..module import name` means in a file."""
    if not level:
        return module
    package = source.module.split(".") if source.is_package else source.module.split(".")[:-1]
    return ".".join([*package[: len(package) - level + 1], *([module] if module else [])])


def beginning(node: ast.expr) -> str | None:
    """The text of a string, or of an f-string up to its first value; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0] if node.values else ast.Constant("")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def imported_by_call(source: Source, call: ast.Call) -> Iterator[Import]:
    """Those of `import_module` and `__import__`, and of the lazy exports of a package."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in {"import_module", "__import__"} and call.args:
        text = beginning(call.args[0])
        if text is not None:
            below = text.lstrip(".")
            yield Import(absolute(source, len(text) - len(below), below).rstrip("."), "", call.lineno, False)
        elif source.module not in IMPORTERS:
            yield Import("?", "", call.lineno, False)
    if name == "exports" and source.is_package and len(call.args) == 2 and isinstance(call.args[1], ast.Dict):
        for value in call.args[1].values:
            yield Import(f"{source.module}.{beginning(value)}", "", call.lineno, False)


def imports(source: Source) -> list[Import]:
    """All imports of a file, wherever they stand in it; `?` is one whose name cannot be read there."""
    found: list[Import] = []

    def visit(node: ast.AST, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, "", node.lineno, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(source, node.level, node.module or "")
            found.extend(Import(module, alias.name, node.lineno, for_types) for alias in node.names)
        elif isinstance(node, ast.Call):
            found.extend(imported_by_call(source, node))
        typed = set()
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            typed = set(node.body)
        for child in ast.iter_child_nodes(node):
            visit(child, for_types or child in typed)

    visit(source.tree, False)
    return found


def foreign_imports(files: list[Source]) -> list[str]:
    """A room imports the ground floor and itself; the ground floor imports no room. A string that names one counts."""
    wrong = []
    for source in files:
        if source.module in KNOWS_ALL:
            continue
        for one in imports(source):
            if one.module == "?":
                wrong.append(f"{source.path}:{one.line}: imports a module whose name cannot be read there")
            elif room_of(one.full) not in {None, source.room}:
                wrong.append(f"{source.path}:{one.line}: imports {one.full}")
        for node in ast.walk(source.tree):
            text = beginning(node) if isinstance(node, ast.Constant | ast.JoinedStr) else None
            if not text or not re.fullmatch(r"ktransfer(\.\w+)*[.:]?\w*", text):
                continue
            if room_of(text.replace(":", ".")) not in {None, source.room}:
                wrong.append(f"{source.path}:{node.lineno}: names {text}")
            elif isinstance(node, ast.JoinedStr) and re.fullmatch(r"ktransfer\.\w*", text):
                wrong.append(f"{source.path}:{node.lineno}: names any module of the package")
    return wrong


def foreign_settings(files: list[Source]) -> list[str]:
    """A room reads no other room's settings: not by the name of their class, nor by the table of stages."""
    homes = {
        node.name: source.room
        for source in files
        if source.room and source.module.endswith(".config")
        for node in source.tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    }
    wrong = []
    for source in files:
        if source.module in KNOWS_ALL:
            continue
        for node in ast.walk(source.tree):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
            if isinstance(node, ast.Name | ast.Attribute | ast.Constant) and isinstance(name, str):
                wrong += [f"{source.path}:{node.lineno}: reads {name}"] * (homes.get(name, source.room) != source.room)
        for one in imports(source) if source.room else []:
            if TABLE in {one.full, one.module}:
                wrong.append(f"{source.path}:{one.line}: looks into {one.full}")
    return wrong


def circles(files: list[Source]) -> list[str]:
    """No file imports itself by way of others, when it is loaded or later; imports for types do not count."""
    names = {source.module for source in files}
    graph = {
        source.module: {
            (one.full if one.full in names else one.module): None
            for one in imports(source)
            if not one.for_types and (one.full in names or one.module in names)
        }
        for source in files
    }
    found = []
    while True:
        try:
            tuple(TopologicalSorter(graph).static_order())
        except CycleError as error:
            circle = error.args[1][::-1]
            found.append(" -> ".join(circle))
            del graph[circle[0]][circle[1]]  # to see the next one
        else:
            return found


def too_large(root: Path) -> list[str]:
    """Files and folders that nobody reads in one go."""
    wrong = []
    for top, most in LINES.items():
        inside: dict[Path, int] = {}
        for path in sorted((root / top).rglob("*.py")):
            inside[path.parent] = inside.get(path.parent, 0) + (path.name != "__init__.py")
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > most:
                wrong.append(f"{path.relative_to(root).as_posix()}: {lines} lines, at most {most}")
        wrong += [
            f"{folder.relative_to(root).as_posix()}/: {count} files, at most {FILES_IN_FOLDER}"
            for folder, count in inside.items()
            if count > FILES_IN_FOLDER
        ]
    return wrong


def made_public(source: Source) -> set[str] | None:
    """What the `__all__` of a file names; None where it has none. One that is no plain list names `?`."""
    named: set[str] | None = None
    for node in ast.walk(source.tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            plain = isinstance(node, ast.Assign) and isinstance(node.value, ast.List) and named is None
            named = {beginning(item) or "?" for item in node.value.elts} if plain else {"?"}
    return named


def unlisted(files: list[Source], public: dict[str, str]) -> list[str]:
    """Every `__all__` is listed in `public`; a package without one defines and re-exports nothing."""
    wrong = []
    for source in files:
        named, listed = made_public(source), set(public.get(source.module, "").split())
        if named is None and source.is_package:
            named = {node.name for node in source.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            named |= {one.name for one in imports(source) if one.name and one.module.split(".")[0] == "ktransfer"}
        wrong += [f"{source.path}: exports {name}, which is not listed" for name in sorted((named or set()) - listed)]
        wrong += [f"{source.path}: does not export {name}" for name in sorted(listed - (named or set()))]
    return wrong


FILES = sources(ROOT)


def test_all_files_of_the_package_are_seen():
    modules = {source.module for source in FILES}
    assert {
        "ktransfer",
        "ktransfer.cli",
        "ktransfer.eval",
        "ktransfer.eval.stage",
        "ktransfer.cluster.engines",
    } < modules


@pytest.mark.parametrize("rule", [foreign_imports, foreign_settings, circles])
def test_the_package_keeps_to_the_rule(rule: Callable[[list[Source]], list[str]]):
    assert rule(FILES) == []


def test_files_and_folders_are_small():
    assert too_large(ROOT) == []


def test_what_is_public_is_listed():
    assert unlisted(FILES, PUBLIC) == []


def tree(root: Path, files: dict[str, str]) -> list[Source]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return sources(root)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("cluster/a.py", "from ktransfer.eval import maps", "1: imports ktransfer.eval.maps"),
        ("cluster/a.py", "from ktransfer import eval", "1: imports ktransfer.eval"),
        ("cluster/a.py", "import ktransfer.eval.maps as maps", "1: imports ktransfer.eval.maps"),
        ("cluster/a.py", "from ..eval import maps", "1: imports ktransfer.eval.maps"),
        ("cluster/a.py", "from .. import eval", "1: imports ktransfer.eval"),
        ("cluster/b/__init__.py", "from ...eval import maps", "1: imports ktransfer.eval.maps"),
        ("cluster/a.py", "def f():\n    from ..eval import maps", "2: imports ktransfer.eval.maps"),
        ("cluster/a.py", "if TYPE_CHECKING:\n    from ..eval import maps", "2: imports ktransfer.eval.maps"),
        ("cluster/a.py", "import_module('..eval.maps', __package__)", "1: imports ktransfer.eval.maps"),
        ("cluster/a.py", "importlib.import_module(f'..eval.{x}', __package__)", "1: imports ktransfer.eval"),
        ("cluster/a.py", "importlib.import_module(name)", "1: imports a module whose name cannot be read there"),
        ("cluster/a.py", "NAMES = ['ktransfer.eval.maps']", "1: names ktransfer.eval.maps"),
        ("cluster/a.py", "NAME = 'ktransfer.eval:evaluate'", "1: names ktransfer.eval:evaluate"),
        ("cluster/a.py", "name = f'ktransfer.{x}'", "1: names any module of the package"),
        ("ktransfer/a.py", "from ktransfer.eval import maps", "1: imports ktransfer.eval.maps"),
        ("ktransfer/data/a.py", "from ..eval import maps", "1: imports ktransfer.eval.maps"),
        ("ktransfer/a.py", "NAME = 'ktransfer.eval'", "1: names ktransfer.eval"),
    ],
)
def test_an_import_of_another_room_is_seen(tmp_path: Path, name: str, text: str, found: str):
    assert foreign_imports(tree(tmp_path, {name: text})) == [f"{name}:{found}"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cluster/a.py", "from . import b\nfrom .engines.c import d\nfrom ktransfer.cluster import e"),
        ("cluster/engines/c.py", "from ..a import b\nimport_module(f'.{name}', __package__)"),
        ("cluster/a.py", "from ktransfer.data import opening\nfrom ktransfer.evaluation import f\nimport numpy as np"),
        (
            "cluster/a.py",
            "'''ktransfer.eval is another room.'''\nMESSAGE = f'see ktransfer.{x} there'\nsettings('eval')",
        ),
        ("ktransfer/cli.py", "from ktransfer.eval import maps"),
        ("ktransfer/stages.py", "NAME = 'ktransfer.eval'\nimportlib.import_module(NAME)"),
    ],
)
def test_a_room_imports_the_ground_floor_and_itself(tmp_path: Path, name: str, text: str):
    assert foreign_imports(tree(tmp_path, {name: text})) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from ..stages import settings", "1: looks into ktransfer.stages.settings"),
        ("from ktransfer import stages", "1: looks into ktransfer.stages"),
        ("import ktransfer.stages", "1: looks into ktransfer.stages"),
        ("getattr(module, 'EvalConfig')", "1: reads EvalConfig"),
        ("def f(plan: EvalConfig): ...", "1: reads EvalConfig"),
        ("def f():\n    return module.EvalConfig", "2: reads EvalConfig"),
    ],
)
def test_reading_the_settings_of_another_room_is_seen(tmp_path: Path, text: str, found: str):
    files = {"eval/config.py": "class EvalConfig: ...", "cluster/a.py": text}
    assert foreign_settings(tree(tmp_path, files)) == [f"cluster/a.py:{found}"]


def test_a_room_reads_its_own_settings(tmp_path: Path):
    files = {"eval/config.py": "class EvalConfig: ...", "eval/a.py": "from .config import EvalConfig\nEvalConfig()"}
    files["ktransfer/stages.py"] = "STAGES = {'eval': 'EvalConfig'}"
    files["eval/b.py"] = "from ktransfer.plan import Plan"
    assert foreign_settings(tree(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {"eval/a.py": "from .b import c", "eval/b.py": "def f():\n    from . import a"},
            [["ktransfer.eval.a", "ktransfer.eval.b"]],
        ),
        (
            {
                "eval/a.py": "from . import b",
                "eval/b.py": "import ktransfer.c",
                "ktransfer/c.py": "import_module('ktransfer.eval.a')",
            },
            [["ktransfer.c", "ktransfer.eval.a", "ktransfer.eval.b"]],
        ),
        (
            {"eval/__init__.py": "from .a import b", "eval/a.py": "from ktransfer.eval import c"},
            [["ktransfer.eval", "ktransfer.eval.a"]],
        ),
        (
            {"eval/__init__.py": "__getattr__ = exports(__name__, {'b': 'a'})", "eval/a.py": "from . import b"},
            [["ktransfer.eval", "ktransfer.eval.a"]],
        ),
        (
            {"eval/a.py": "from . import b, c", "eval/b.py": "from . import a", "eval/c.py": "from . import a"},
            [["ktransfer.eval.a", "ktransfer.eval.b"], ["ktransfer.eval.a", "ktransfer.eval.c"]],
        ),
        ({"eval/a.py": "import ktransfer.eval.a"}, [["ktransfer.eval.a"]]),
    ],
)
def test_a_circle_of_imports_is_seen(tmp_path: Path, files: dict[str, str], found: list[list[str]]):
    files = {"eval/__init__.py": "", "ktransfer/__init__.py": ""} | files
    assert sorted(sorted(set(circle.split(" -> "))) for circle in circles(tree(tmp_path, files))) == found


@pytest.mark.parametrize(
    "files",
    [
        {
            "eval/__init__.py": "from .a import b",
            "eval/a.py": "from .c import d",
            "eval/c.py": "import ktransfer.eval.e",
        },
        {"eval/a.py": "if TYPE_CHECKING:\n    from . import b", "eval/b.py": "from . import a"},
    ],
)
def test_what_only_looks_like_a_circle_is_none(tmp_path: Path, files: dict[str, str]):
    assert circles(tree(tmp_path, files)) == []


def test_a_large_file_and_a_full_folder_are_seen(tmp_path: Path):
    files = {"eval/a.py": "\n" * 401, "eval/b.py": "\n" * 400, "tests/a.py": "\n" * 601, "tests/b.py": "\n" * 600}
    files |= {f"eval/full/{number}.py": "" for number in range(21)} | {f"tests/{number}.py": "" for number in range(18)}
    tree(tmp_path, files | {"tests/__init__.py": ""})
    found = [
        "eval/a.py: 401 lines, at most 400",
        "eval/full/: 21 files, at most 20",
        "tests/a.py: 601 lines, at most 600",
    ]
    assert sorted(too_large(tmp_path)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("__all__ = ['a', 'b']", ["eval/__init__.py: exports b, which is not listed"]),
        ("__all__ = ['a', *more]", ["eval/__init__.py: exports ?, which is not listed"]),
        (
            "__all__ = ['a']\n__all__ += ['b']",
            ["eval/__init__.py: exports ?, which is not listed", "eval/__init__.py: does not export a"],
        ),
        ("", ["eval/__init__.py: does not export a"]),
        ("import os\nfrom .x import a\n__all__ = ['a']\ndef __getattr__(name): ...", []),
    ],
)
def test_what_a_package_exports_beside_the_list_is_seen(tmp_path: Path, text: str, found: list[str]):
    assert unlisted(tree(tmp_path, {"eval/__init__.py": text}), {"ktransfer.eval": "a"}) == found


@pytest.mark.parametrize("text", ["from .x import a", "from ktransfer.x import a", "def a(): ...", "class a: ..."])
def test_a_package_without_a_list_exports_nothing(tmp_path: Path, text: str):
    assert unlisted(tree(tmp_path, {"eval/__init__.py": text}), {}) == [
        "eval/__init__.py: exports a, which is not listed"
    ]
