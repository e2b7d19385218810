"""HDF5 files that another process holds, or that the machine does not give: they may be sound, and are to be kept."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ktransfer.artifacts import hdf5
from ktransfer.artifacts.features import create_or_resume, open_features
from ktransfer.artifacts.labels import read_labels, write_labels
from ktransfer.data.pack import pack
from ktransfer.data.packs import read_pack
from ktransfer.errors import StageError, Unreadable, UsageError

HOLD = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'{more}); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def made(tmp_path: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """A feature file, a label file and a pack, and what reads them."""
    keys = ["a.png", "b.png"]
    writer = create_or_resume(tmp_path / "f.h5", keys, np.zeros(2, np.int32), 3, "float32", {"teacher": "t"})
    writer.write(0, np.ones((2, 3)), np.ones(2, bool))
    writer.finish()
    labels = np.arange(2, dtype=np.int32)
    write_labels(tmp_path / "l", keys, labels, np.zeros(2, np.float32), 2, "c", "f", np.zeros((2, 0), np.int32))
    pack("scenes:images=16,size=32", tmp_path / "p.h5", 16, workers=1)
    return {
        "features": (tmp_path / "f.h5", open_features),
        "labels": (tmp_path / "l" / "labels.h5", read_labels),
        "pack": (tmp_path / "p.h5", read_pack),
    }


@pytest.mark.parametrize("kind", ["features", "labels", "pack"])
def test_what_another_process_holds_open_is_read(made, kind: str) -> None:
    path, read = made[kind]
    with subprocess.Popen(
        [sys.executable, "-c", HOLD.format(more=""), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        read(path)
        holder.communicate(b"")


@pytest.mark.parametrize("kind", ["features", "labels", "pack"])
@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EAGAIN, errno.ENOLCK, errno.ENOSYS]
)
def test_what_the_machine_does_not_give_is_not_called_damaged(
    made, kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = made[kind]

    def fail(*_: object, **__: object) -> None:
        raise OSError(f"[Errno {number}] Unable to synchronously open file (unable to lock file, errno = {number})")

    monkeypatch.setattr("h5py.File", fail)
    with pytest.raises(Unreadable) as caught:
        read(path)
    said = str(caught.value)
    assert os.strerror(number) in said and "\n" not in said
    assert not any(word in said for word in ("whole", "again with --overwrite", "extract", "remove", "not a"))


def test_left_open_for_writing_by_a_program_that_ended(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"has it open for writing.*h5clear -s"):
        hdf5.refuse(tmp_path, OSError("Unable to open file (file is already open for write (may use <h5clear>))"), "x")


def test_what_is_cut_off_is_still_said_to_be(made) -> None:
    path, read = made["features"]
    os.truncate(path, 200)
    with pytest.raises(UsageError, match="not a whole HDF5 file") as caught:
        read(path)
    assert not isinstance(caught.value, Unreadable)


def test_progress_that_cannot_be_read_now_is_no_reason_to_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "f.h5", ["a.png", "b.png"], np.zeros(2, np.int32), 3, "float32", {"teacher": "t"}
    writer = create_or_resume(*given, save_seconds=0)
    writer.write(0, np.ones((1, 3)), np.ones(1, bool))
    writer.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(StageError, match="Input/output error"):
            create_or_resume(*given)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert create_or_resume(*given).rows_done == 1
