"""What a user gets from the wheel and from the sdist, each installed alone and used from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ktransfer import __version__

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ktransfer", "pretext", "cluster", "retrain", "eval", "recipes")
INSTALLED = ("ktransfer", f"ktransfer-{__version__}.dist-info")
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")

pytestmark = pytest.mark.slow  # the extension is compiled twice


def tool(*words: str | Path) -> None:
    """A command of the developer's, whose own warnings are not ours."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONWARNINGS"}}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def used(folder: Path, *words: str | Path) -> str:
    """What a command of a user's says, in a folder where no source lies."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, of a copy of the sources; the wheel is made of the sdist, which so proves to be complete."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in (*FOLDERS, "tests", "docs", "benchmarks", ".ci"):
        shutil.copytree(ROOT / folder, source / folder, ignore=built)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    tool(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def test_the_wheel_has_all_that_is_needed_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    assert {name.split("/")[0] for name in names} == set(INSTALLED)
    sources = [path.relative_to(ROOT) for top in FOLDERS for path in (ROOT / top).rglob("*")]
    wanted = {
        path.as_posix() if path.parts[0] == "ktransfer" else f"ktransfer/{path.as_posix()}"
        for path in sources
        if path.suffix in {".py", ".toml", ".csv", ".html", ".css", ".js"} or path.name == "py.typed"
    }
    assert {"ktransfer/py.typed", "ktransfer/eval/published.csv", "ktransfer/recipes/__init__.py"} < wanted
    found = {name for name in names if name.split("/")[0] == "ktransfer"}
    extension = f"ktransfer/cluster/engines/_exact{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert found == wanted | ({extension} if COMPILER else set())


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_works_where_it_is_installed(tmp_path: Path, built: dict[str, Path], kind: str) -> None:
    home, away = tmp_path / "environment", tmp_path / "away"
    away.mkdir()
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(used(away, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The packages of this environment, but not the ktransfer that it may have as a link to its sources.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    tool(sys.executable, "-m", "pip", "--python", python, *install, built[kind])
    assert {path.name for path in site.iterdir()} == {*INSTALLED, "others.pth"}

    door = home / "bin" / "ktransfer"
    assert "retrain" in used(away, door, "--help")
    assert ("extension built" if COMPILER else "no extension") in used(away, door, "doctor")
    code = (
        "import json, importlib; from ktransfer.cluster.engines import native\n"
        "print(json.dumps([native.__file__, native.library() is not None]))"
    )
    place, loaded = json.loads(used(away, python, "-c", code))
    assert Path(place).is_relative_to(site)
    assert loaded or not COMPILER or "avx2" not in Path("/proc/cpuinfo").read_text()
