"""`ktransfer status`: a run that works, one that was stopped, one that failed, and what is no run."""

import json
import re
import time
from pathlib import Path

import pytest

from ktransfer import cli, progress
from ktransfer import run as runs
from ktransfer.errors import UsageError
from ktransfer.pretext.config import PretextConfig
from ktransfer.retrain.config import RetrainConfig
from ktransfer.status import in_time, status

DONE = PretextConfig(data="images")


def finish(run: Path, folder: str = "pretext") -> None:
    with runs.begin(run, folder, folder, DONE, {}, [], False, "cpu") as step:
        step.finish([])


def test_a_working_run_tells_how_far_until_when_and_what_comes_next(tmp_path, monkeypatch):
    finish(tmp_path)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    line = ["pretext", "retrain", "eval"]
    with runs.locked(tmp_path), progress.kept_in(tmp_path / runs.PROGRESS, line):
        assert status(tmp_path).endswith("nothing is known of its progress yet")
        with runs.begin(tmp_path, "retrain", "retrain", RetrainConfig(), {}, [], False, "cpu") as step:
            with progress.bar(400, "retrain", done=100) as shown:
                time.sleep(0.6)
                shown.update(100)
                said = status(tmp_path).splitlines()
            step.finish([])
    assert said[0].split()[:2] == ["pretext", "done"] and said[1].split()[:2] == ["retrain", "running"]
    found = re.fullmatch(
        r"now: retrain: 200 of 400 images \(50%\), ([\d.]+) a second; [12] s more, until \d\d:\d\d", said[2]
    )
    assert found and float(found[1]) == pytest.approx(100 / 0.6, rel=0.3)
    assert said[3:] == ["then: eval"]
    assert not (tmp_path / runs.PROGRESS).exists()
    assert status(tmp_path).splitlines()[2:] == ["nothing works in it", f"next: ktransfer --run {tmp_path} eval ..."]


def test_stopped_and_failed_runs_say_so(tmp_path):
    finish(tmp_path)
    with pytest.raises(KeyboardInterrupt), runs.begin(tmp_path, "retrain", "retrain", DONE, {}, [], False, "cpu"):
        raise KeyboardInterrupt
    said = status(tmp_path).splitlines()
    assert said[1].split()[:2] == ["retrain", "stopped"]
    assert said[2] == "nothing works in it; to go on with retrain, give its command again"
    with pytest.raises(ValueError), runs.begin(tmp_path, "retrain", "retrain", DONE, {}, [], False, "cpu"):
        raise ValueError("no\nluck")
    assert status(tmp_path).splitlines()[1].split(maxsplit=2)[1:] == ["failed", "failed: no luck"]


def test_what_is_left_of_a_killed_process_is_not_taken_for_work(tmp_path):
    finish(tmp_path)
    state = {"line": [], "label": "x", "done": 1, "total": 2, "unit": "images", "per_second": 1.0, "time": time.time()}
    (tmp_path / runs.PROGRESS).write_text(json.dumps(state))
    assert "nothing works in it" in status(tmp_path)


def test_no_run_is_refused_in_one_line(tmp_path, capsys):
    for run in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="--run"):
            status(run)
    assert cli.main(["status", "--run", str(tmp_path)]) == 2
    assert "holds no stage of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (3661, "1 h 1 min"), (200000, "2 d 7 h")],
)
def test_times_in_words(seconds, words):
    assert in_time(seconds) == words


def test_lines_of_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    line = ["--log-format", "json", "--run", str(tmp_path / "run"), "pretext", "--data", "scenes:images=16,size=48"]
    options = [
        "--permutations",
        "4",
        "--epochs",
        "1",
        "--batch",
        "4",
        "--width",
        "0.05",
        "--arch",
        "alexnet",
        "--size",
        "48",
    ]
    try:
        assert cli.main([*line, *options]) == 0
        assert cli.main(["--log-format", "json", "--run", str(tmp_path / "other"), "assign"]) == 2
    finally:
        progress.speak_json(False)
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(abs(one["time"] - time.time()) < 600 for one in said)
    bars = [one for one in said if one.get("label") == "pretext"]
    assert bars and bars[-1]["done"] == bars[-1]["total"] and bars[-1]["unit"] == "images"
    assert any("message" in one for one in said)
    assert next(one for one in said if "error" in one)["error"].startswith("--run")
