"""The tests leave nothing behind in the user's own cache."""

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
    ask = (
        "import sys; from pathlib import Path; from ktransfer.data import folders as f; print(f._cache_file(Path('x')))"
    )
    theirs = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    for place in (Path(early), folders._cache_file(tmp_path), Path(theirs)):
        assert place.is_relative_to(base)
