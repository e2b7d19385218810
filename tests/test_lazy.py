"""Names that are imported when they are first used."""

import importlib
import subprocess
import sys

import pytest

from ktransfer.lazy import exports
from ktransfer.stages import STAGES


def test_a_name_is_found_in_its_submodule_and_no_other_is():
    get = exports("ktransfer", {"uniform": "rng", "nothing": "rng"})
    assert get("uniform") is importlib.import_module("ktransfer.rng").uniform
    with pytest.raises(AttributeError, match="module 'ktransfer' has no attribute 'words'"):
        get("words")
    with pytest.raises(AttributeError):
        get("nothing")


@pytest.mark.parametrize("room", ["pretext", "cluster", "retrain", "eval"])
def test_every_exported_name_of_a_room_exists(room):
    module = importlib.import_module(f"ktransfer.{room}")
    for name in module.__all__:
        assert getattr(module, name).__module__.startswith(f"ktransfer.{room}.")
    assert not hasattr(module, "nothing_of_this_name")


def test_importing_the_rooms_imports_no_torch():
    code = (
        "import sys, ktransfer.pretext, ktransfer.cluster, ktransfer.retrain, ktransfer.eval, ktransfer.cli\n"
        "print(sorted({'torch', 'torchvision', 'faiss', 'sklearn', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torchvision_is_imported_for_detectors_alone():
    """It takes a third of the time that torch takes, and planning the stages of a chain needs it as little."""
    names = sorted({stage.module for stage in STAGES.values() if stage.folder != "selftrain"})
    code = f"import sys, {', '.join(names)}\nprint('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
