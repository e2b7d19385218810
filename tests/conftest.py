"""A run with a small teacher, trained once and copied for each test that wants it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCENES = "scenes:images=40,size=48"

# A suite that was started in the background inherits an ignored Ctrl-C, and so would the commands that it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def index_of_its_own(tmp_path_factory):
    """Keep the index of folders out of the user's own cache, in sub-processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def warnings_are_errors_in_sub_processes(pytestconfig):
    """What pyproject.toml makes of warnings, for the commands that tests start: of its entries, all can be said so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", ",".join(pytestconfig.getini("filterwarnings")))
        yield


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    from ktransfer.pretext import pretext

    run = tmp_path_factory.mktemp("taught") / "run"
    pretext(run, data=SCENES, arch="vgg16_bn", width=0.05, epochs=1, batch=8, permutations=10)
    return run


@pytest.fixture
def run(taught, tmp_path):
    """A run folder of its own, whose pretext stage is done."""
    shutil.copytree(taught, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path):
    """24 JPEGs in two classes, one of the files broken and one no image: row 5 is `a/05.jpg`."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    root = tmp_path / "pics"
    for place in range(24):
        path = root / "ab"[place // 12] / f"{place:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((60, 50), Image.Resampling.BICUBIC).save(path)
    (root / "a" / "05.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    (root / "README.txt").write_text("not an image")
    return root


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Run a line in `world` processes (launcher.py): their exit codes, and what each said."""
    script = Path(__file__).parent / "support" / "launcher.py"
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads,
    )
    logs = tmp_path_factory.mktemp("logs")

    def run(world, *argv, **order):
        order |= {"world": world, "argv": [str(word) for word in argv], "logs": str(logs)}
        launcher.stdin.write(json.dumps(order) + "\n")
        launcher.stdin.flush()
        status = json.loads(launcher.stdout.readline())["status"]
        return status, [(logs / str(rank)).read_text() for rank in range(world)]

    yield run
    launcher.stdin.close()
    launcher.wait()
