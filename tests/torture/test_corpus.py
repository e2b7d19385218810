"""What the campaign once found, a file each (corpus/TARGET/): read, or refused in one line, and no more happens."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FINDS = sorted(path for path in (HERE / "corpus").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def targets():
    """The readers; they stand beside this file, and import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        import targets

        yield targets
    for name in ("targets", "seeds", "mutators"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", FINDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_find_is_read_or_refused(path, targets, tmp_path):
    name = next(name for name in targets.TARGETS if name.replace(" ", "-") == path.parent.name)
    targets.check(targets.TARGETS[name], path.read_bytes(), tmp_path)


def test_sound_inputs_are_read(targets, tmp_path):
    """The campaign begins with them: a target that refuses its own would test nothing."""
    refused = {}
    for name, target in targets.TARGETS.items():
        found = [targets.check(target, seed, tmp_path / name / str(place)) for place, seed in enumerate(target.seeds())]
        if all(found):
            refused[name] = found
    assert refused == {}
