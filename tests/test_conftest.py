"""The tests leave nothing behind in the user's own cache."""

import builtins
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktransfer.data import folders


@pytest.fixture(scope="module")
def early() -> str:
    return os.environ["XDG_CACHE_HOME"]


def test_folders_are_remembered_below_the_temporary_folder(
    early: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    ask = "from pathlib import Path; from ktransfer.data import folders; print(folders._cache_file(Path('x')))"
    theirs = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    for place in (Path(early), folders._cache_file(tmp_path), Path(theirs)):
        assert place.is_relative_to(base)


@pytest.mark.parametrize("category", ["DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"])
def test_what_will_be_gone_is_an_error_here_and_in_sub_processes(category: str) -> None:
    code = f"import warnings; warnings.warn('this will be gone', {category})"
    with pytest.raises(getattr(builtins, category), match="will be gone"):
        exec(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"{category}: this will be gone" in done.stderr


def test_every_entry_about_warnings_counts_in_sub_processes() -> None:
    """Python tells on stderr of those that it cannot read, and goes on."""
    done = subprocess.run([sys.executable, "-c", ""], capture_output=True, text=True, check=True)
    assert done.stderr == ""
