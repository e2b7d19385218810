"""Steps of a run: begun, finished, skipped, refused, and locked against other processes."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktransfer import files
from ktransfer import run as runs
from ktransfer.artifacts import lock
from ktransfer.config import option
from ktransfer.errors import KTransferError, UsageError


@dataclass(frozen=True)
class Some:
    k: int = option(5, "")
    min_size: int = option(1, "")
    workers: int = option(0, "", execution=True)


def begin(
    run: Path, config: Some | None = None, inputs: dict[str, str] | None = None, overwrite: bool = False
) -> AbstractContextManager[runs.Step]:
    inputs = {"data": "d1"} if inputs is None else inputs
    return runs.begin(run, "stage", "step", config or Some(), inputs, ["out", "work"], overwrite, "cpu")


def finish(run: Path, text: str = "result", **facts: Any) -> None:
    with begin(run) as step:
        (step.folder / "out").write_text(text)
        step.finish([step.folder / "out"], **facts)


def record(run: Path) -> dict[str, Any]:
    found = runs.read_record(run, "stage", "step")
    assert found is not None
    return found


def refusal(run: Path, **changed: Any) -> str:
    before = (run / "stage/stage.json").read_bytes()
    with pytest.raises(UsageError) as caught, begin(run, **changed):
        raise AssertionError("the step was begun")
    assert (run / "stage/stage.json").read_bytes() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_record_of_a_finished_step(tmp_path):
    with begin(tmp_path / "a/run") as step:
        assert not step.done and step.folder == tmp_path / "a/run/stage"
        running = record(tmp_path / "a/run")
        assert running["state"] == "running" and running["outputs"] == {}
        (step.folder / "out").write_text("result")
        step.finish([step.folder / "out"], result={"score": 1})
    found = record(tmp_path / "a/run")
    assert found["state"] == "done" and found["error"] is None and found["device"] == "cpu"
    assert found["config"] == {"k": 5, "min_size": 1, "workers": 0} and found["inputs"] == {"data": "d1"}
    assert found["outputs"] == {"out": {"sha256": files.sha256(step.folder / "out"), "bytes": 6}}
    assert found["result"] == {"score": 1} and found["seconds"] >= 0 and found["started"]
    assert {"ktransfer", "python", "torch", "numpy"} <= set(found["versions"])


def test_done_is_skipped_and_untouched(tmp_path, capsys):
    finish(tmp_path)
    before = (tmp_path / "stage/stage.json").read_bytes()
    with begin(tmp_path, Some(workers=9)) as step:
        assert step.done
    assert "step: done before, skipped" in capsys.readouterr().err
    assert (tmp_path / "stage/stage.json").read_bytes() == before


def test_steps_of_one_stage_do_not_touch_each_other(tmp_path):
    finish(tmp_path)
    with runs.begin(tmp_path, "stage", "other", Some(k=7), {}, ["more"], True, "cpu") as step:
        (step.folder / "more").write_text("")
        step.finish([step.folder / "more"])
    assert list(json.loads((tmp_path / "stage/stage.json").read_text())) == ["step", "other"]
    with begin(tmp_path) as step:
        assert step.done


def test_changes_are_refused_with_old_and_new_value(tmp_path):
    finish(tmp_path)
    said = refusal(tmp_path, config=Some(k=6, min_size=2), inputs={"data": "d2"})
    assert "k was 5, is 6" in said and "min-size was 1, is 2" in said and "data changed" in said
    assert "--overwrite" in said and "another --run" in said
    assert "workers" not in refusal(tmp_path, config=Some(k=6, workers=3))
    assert "more changed" in refusal(tmp_path, inputs={"data": "d1", "more": "x"})
    assert "data changed" in refusal(tmp_path, inputs={})


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("other")])
def test_missing_or_changed_output_is_refused(tmp_path, damage):
    finish(tmp_path)
    damage(tmp_path / "stage/out")
    assert f"{tmp_path / 'stage/out'} is missing or changed" in refusal(tmp_path)


def test_overwrite_removes_what_was_there(tmp_path):
    finish(tmp_path)
    files.write_text(tmp_path / "stage/work/state", "")
    files.write_text(tmp_path / "stage/foreign", "")
    with begin(tmp_path, Some(k=6), overwrite=True) as step:
        assert not step.done
        assert sorted(path.name for path in step.folder.iterdir()) == ["foreign", "stage.json"]
        (step.folder / "out").write_text("new")
        step.finish([step.folder / "out"])
    assert record(tmp_path)["config"]["k"] == 6


def test_failure_is_recorded_and_the_step_goes_on(tmp_path, capsys):
    with pytest.raises(ValueError), begin(tmp_path) as step:
        (step.folder / "work").write_text("half")
        raise ValueError("the reason")
    found = record(tmp_path)
    assert found["state"] == "failed" and found["error"] == "the reason" and found["outputs"] == {}
    assert "k was 5, is 6" in refusal(tmp_path, config=Some(k=6))
    with begin(tmp_path) as step:
        assert not step.done and (step.folder / "work").read_text() == "half"
        assert record(tmp_path)["state"] == "running"
        (step.folder / "out").write_text("")
        step.finish([step.folder / "out"])
    assert "goes on where it stopped" in capsys.readouterr().err
    assert record(tmp_path)["state"] == "done" and record(tmp_path)["error"] is None


def test_an_unfinished_step_that_wrote_nothing_takes_other_settings(tmp_path, capsys):
    with pytest.raises(ValueError), begin(tmp_path):
        raise ValueError("k is too large")
    with begin(tmp_path, Some(k=3), inputs={"data": "d2"}) as step:
        assert not step.done and record(tmp_path)["config"]["k"] == 3 and record(tmp_path)["inputs"] == {"data": "d2"}
        said = capsys.readouterr().err
        assert "step: starts over, as it has written nothing yet (k was 5, is 3; data changed)" in said
        assert "goes on" not in said
        (step.folder / "out").write_text("")
        step.finish([step.folder / "out"])


def test_an_unfinished_step_with_something_to_lose_says_why_and_how_to_go_on(tmp_path):
    with pytest.raises(ValueError), begin(tmp_path) as step:
        (step.folder / "work").write_text("half")
        raise ValueError("the disk\nis full")
    said = refusal(tmp_path, config=Some(k=6))
    assert "step in" in said and "is unfinished (the disk is full) and was begun differently: k was 5, is 6" in said
    assert "--overwrite to drop what it has and start over, the old settings to go on" in said
    path = tmp_path / "stage/stage.json"
    steps = json.loads(path.read_text())
    del steps["step"]["writes"]  # a record of an older version: what it wrote is not known
    path.write_text(json.dumps(steps))
    (tmp_path / "stage/work").unlink()
    assert "was begun differently" in refusal(tmp_path, config=Some(k=6))


def test_ctrl_c_is_no_failure_and_seconds_add_up(tmp_path):
    with pytest.raises(KeyboardInterrupt), begin(tmp_path) as step:
        step.started -= 100
        raise KeyboardInterrupt
    assert record(tmp_path)["state"] == "running" and record(tmp_path)["error"] is None
    with begin(tmp_path) as step:
        step.started -= 10
        (step.folder / "out").write_text("")
        step.finish([step.folder / "out"])
    assert 110 <= record(tmp_path)["seconds"] < 115


def test_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="the reason"), begin(tmp_path):
        monkeypatch.setattr(files, "write_json", full)
        raise ValueError("the reason")


def test_a_step_must_be_finished(tmp_path):
    with pytest.raises(KTransferError, match="without finishing"), begin(tmp_path):
        pass
    assert record(tmp_path)["state"] == "running"


def test_done_record(tmp_path):
    with pytest.raises(UsageError, match=r"step is missing; make it first: ktransfer --run .* make"):
        runs.done_record(tmp_path, "stage", "step", "make")
    with pytest.raises(ValueError), begin(tmp_path):
        raise ValueError
    assert record(tmp_path)["error"] == "ValueError"
    with pytest.raises(UsageError, match="step is not finished"):
        runs.done_record(tmp_path, "stage", "step", "make")
    finish(tmp_path)
    assert runs.done_record(tmp_path, "stage", "step", "make") == record(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"step": 1}', '{"step": {"state": "done"}}', "\ufffd", "null"])
def test_damaged_record(tmp_path, text):
    files.write_text(tmp_path / "stage/stage.json", text)
    for call in (
        lambda: runs.read_record(tmp_path, "stage", "step"),
        lambda: begin(tmp_path).__enter__(),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(tmp_path / "stage/stage.json") in str(caught.value) and "\n" not in str(caught.value)
        assert "remove the folder" in str(caught.value)


def test_no_record(tmp_path):
    assert runs.read_record(tmp_path / "none", "stage", "step") is None
    (tmp_path / "file").write_text("")
    assert runs.read_record(tmp_path, "file", "step") is None


def test_input_hash_reads_the_bytes_whatever_a_record_says(tmp_path):
    finish(tmp_path, "abc")
    out = tmp_path / "stage/out"
    assert runs.input_hash(out) == files.sha256(out)
    out.write_text("xyz")  # as long as before
    assert runs.input_hash(out) == hashlib.sha256(b"xyz").hexdigest()
    with pytest.raises(UsageError, match="No such file"):
        runs.input_hash(tmp_path / "stage/none")


def test_need_disk(tmp_path):
    runs.need_disk(tmp_path / "not/yet/there", 1, "it")
    with pytest.raises(UsageError, match=r"it needs 1000000000\.00 GB, but .* free; make room"):
        runs.need_disk(tmp_path / "not/yet/there", 10**18, "it")
    assert not (tmp_path / "not").exists()


def held(run: Path) -> bool:
    """Whether another process finds the run locked."""
    script = (
        "import sys; from pathlib import Path\n"
        "from ktransfer.run import locked; from ktransfer.errors import UsageError\n"
        "try:\n  with locked(Path(sys.argv[1])): print('free')\nexcept UsageError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, check=True).stdout
    assert said == "free\n" or "another ktransfer process is using it" in said
    return said != "free\n"


def test_lock(tmp_path):
    run = tmp_path / "a/run"
    with runs.locked(run):
        with runs.locked(run):
            assert held(run)
        assert held(run)
        with runs.locked(tmp_path / "other"):
            assert held(run)
    assert not held(run)
    with pytest.raises(ValueError), begin(run):
        assert held(run)
        raise ValueError
    assert not held(run)


def test_unwritable_run(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UsageError, match="cannot be written"), runs.locked(place):
            pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stage").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), begin(tmp_path / "run"):
        pass


def test_versions():
    assert runs.versions()["numpy"] == np.__version__ and "torch" in runs.versions()


def test_changed_defaults_of_a_newer_version(tmp_path):
    """A setting that the record does not know yet is a change, unless it has no say in results."""
    finish(tmp_path)
    path = tmp_path / "stage/stage.json"
    steps = json.loads(path.read_text())
    del steps["step"]["config"]["min_size"], steps["step"]["config"]["workers"]
    path.write_text(json.dumps(steps))
    assert "min-size was None, is 1" in refusal(tmp_path)
    assert "min-size was None, is 1" in refusal(tmp_path, config=replace(Some(), workers=4))


NO_FLOCK = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
HOLDER = """
import errno, fcntl, os, sys
def refuse(*_): raise OSError({number}, os.strerror({number}))
fcntl.flock = refuse
from pathlib import Path
from ktransfer import run
with run.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=NO_FLOCK)
def without_flock(request, monkeypatch):
    """A file system that knows no flock, as Lustre and some kinds of NFS."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", refuse)
    return request.param


def test_a_file_system_without_flock(tmp_path, without_flock):
    run = tmp_path / "run"
    finish(run)
    assert not list(run.glob(".lock.*"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(number=without_flock), str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert runs.in_use(run)
    words = (
        rf"another ktransfer process is using it \(process {holder.pid} on .*\); wait for it, remove .*\.lock\.owner"
    )
    with pytest.raises(UsageError, match=words), runs.locked(run):
        raise AssertionError("the lock was taken")
    holder.kill()  # it cannot let go
    holder.communicate()
    assert (run / ".lock.owner").is_file() and not runs.in_use(run)
    with runs.locked(run), runs.locked(run):
        assert json.loads((run / ".lock.owner").read_text())["pid"] == os.getpid()
    assert not list(run.glob(".lock.*"))


def test_of_another_machine_nothing_is_assumed(tmp_path, without_flock):
    owner = {"host": "elsewhere", "boot": "x", "pid": 2**22 + 1}
    (tmp_path / ".lock.owner").write_text(json.dumps(owner))
    with pytest.raises(UsageError, match="on elsewhere"), runs.locked(tmp_path):
        raise AssertionError("the lock was taken")
    assert json.loads((tmp_path / ".lock.owner").read_text()) == owner


@pytest.mark.parametrize("field", [{"boot": "an earlier one"}, {"began": "1"}, {"pid": 2**22 + 1}])
def test_what_has_ended_is_taken_over(tmp_path, without_flock, field):
    (tmp_path / ".lock.owner").write_text(json.dumps(lock.holder() | {"pid": 1} | field))
    with runs.locked(tmp_path):
        assert json.loads((tmp_path / ".lock.owner").read_text())["pid"] == os.getpid()


def test_a_thread_is_kept_out_and_told_so(tmp_path):
    said = []

    def other():
        try:
            with runs.locked(tmp_path):
                said.append("free")
        except UsageError as error:
            said.append(str(error))

    with runs.locked(tmp_path), runs.locked(tmp_path):
        for _ in range(2):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert ["another thread of this process is using it" in one for one in said] == [True, True]
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said[-1] == "free"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "mount it for writing"),
        (errno.EACCES, "permissions"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ESTALE, "mount it again"),
        (errno.EIO, "the disk failed"),
    ],
)
def test_each_reason_has_its_way_out(tmp_path, monkeypatch, number, words):
    finish(tmp_path)
    before = (tmp_path / "stage/stage.json").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(UsageError, match=words) as caught:
            record(tmp_path)
    assert os.strerror(number) in str(caught.value) and "remove the folder" not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr("os.open", fail)
        with pytest.raises(UsageError, match=words), runs.locked(tmp_path / "new"):
            raise AssertionError("the lock was taken")
    assert (tmp_path / "stage/stage.json").read_bytes() == before
