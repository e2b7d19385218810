"""The demo with everything as short as it can be; `make demo` is the same with time to learn."""

from pathlib import Path

import pytest

from ktransfer import demo


def test_the_demo_ends_with_the_table_the_times_and_files_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIZE", 64)
    monkeypatch.setattr(demo, "CLUSTERS", 5)
    monkeypatch.setattr(demo, "TARGET", {"arch": "alexnet_bn", "width": 0.1})
    monkeypatch.setattr(demo, "PUZZLE", {"permutations": 10, "epochs": 1, "batch": 16})
    monkeypatch.setattr(demo, "LEARN", {"stride": 2, "size": 56, "epochs": 1, "batch": 16})
    monkeypatch.setattr(demo, "PROBE", {"epochs": 1})
    demo.run_demo(tmp_path / "demo", images=36)
    shown = capsys.readouterr().out
    for arm in ("random weights", "trained on Jigsaw++", "retrained on pseudo-labels", "trained on true labels"):
        assert f"alexnet_bn, {arm}" in shown
    assert "chance 8.3%" in shown
    times = [line for line in shown.splitlines() if str(tmp_path) in line]
    assert len(times) == 8
    for line in times:
        for word in line.split():
            if word.startswith(str(tmp_path)):
                assert Path(word.rstrip(",")).is_file()
