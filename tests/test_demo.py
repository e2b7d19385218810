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
    monkeypatch.setattr(demo, "LEARN", {"stride": 2, "size": 56, "epochs": 1, "batch": 16, "normalise": "picture"})
    monkeypatch.setattr(demo, "PUBLISHED", {"teacher": "efficientnet-lite0", "size": 32})
    monkeypatch.setattr(demo, "PROBE", {"epochs": 1, "size": 56, "stride": 2})
    demo.run_demo(tmp_path / "demo", images=36)
    shown = capsys.readouterr().out
    for arm in ("random weights", "trained on Jigsaw++", "retrained on pseudo-labels", "trained on true labels"):
        assert f"alexnet_bn, {arm}" in shown
    assert "chance 8.3%" in shown
    times = [line for line in shown.splitlines() if str(tmp_path) in line]
    assert len(times) == 13
    for line in times:
        for word in line.split():
            if word.startswith(str(tmp_path)):
                assert Path(word.rstrip(",")).is_file()


def test_the_table_in_words():
    def cell(value, half):
        return {"top1": value, "top1_interval": [value - half, value + half]}

    layers = ("conv3", "conv4", "conv5")
    random = {"scores": {layer: cell(0.30, 0.02) for layer in layers}}
    transfer = {"scores": dict(zip(layers, (cell(0.40, 0.03), cell(0.33, 0.02), cell(0.5, 0.02)), strict=True))}
    direct = {"scores": {layer: cell(0.29, 0.02) for layer in layers}}
    lines = demo._said({"arms": {"random": random, "transfer": transfer, "direct": direct}})
    assert len(lines) == 3
    assert lines[1].endswith(
        "(transfer): +10.0, +3.0, +20.0 points at conv3, conv4, conv5, beyond both intervals at conv3, conv5"
    )
    assert lines[2].endswith("(direct): -1.0, -1.0, -1.0 points at conv3, conv4, conv5, within the intervals")


def test_without_the_weights_the_row_is_left_out_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_not_installed", lambda: "timm")
    lines = []
    monkeypatch.setattr(demo, "carry_out_line", lambda planned: lines.extend(planned))
    monkeypatch.setattr(demo, "plan_line", lambda calls, run: [(calls[0][0], run.name)])
    with pytest.raises(AttributeError):  # nothing was made that times could be told of
        demo.run_demo(tmp_path)
    assert len(lines) == 9 and "published" not in {run for _, run in lines}
    assert "timm is not installed; pip install 'ktransfer[weights]'" in capsys.readouterr().err
