"""`ktransfer bench predict`: each way has its turn in every round, and the medians are what is shown."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from ktransfer.bench import rounds
from ktransfer.cli import main

QUICK = ["--seconds", "0.1", "--device", "cpu"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    from ktransfer.retrain import export, retrain

    run = tmp_path_factory.mktemp("bench") / "mine"
    small = {"arch": "alexnet_bn", "width": 0.05, "stride": 2, "size": 40, "epochs": 1, "batch": 8, "device": "cpu"}
    retrain(run, data="scenes:images=40,size=48", labels="classes", **small)
    export(run, int8=True, calibration=8)
    return run


def test_every_way_has_its_turn_in_every_round() -> None:
    calls: list[str] = []

    def way(name: str, seconds: float):
        def do(images: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            time.sleep(seconds)
            return images

        return do

    found = rounds.in_turn("test", {"a": way("a", 0.001), "b": way("b", 0.02)}, torch.zeros(1), 0.3)
    assert calls == ["a", "b"] * (len(calls) // 2) and len(calls) // 2 == len(found["a"]) + 1
    assert 5 <= len(found["a"]) == len(found["b"]) < 20
    assert min(found["b"]) >= 0.02 and sorted(found["a"])[2] < 0.02


def test_a_run_its_exports_and_fresh_weights(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.json"
    assert main(["bench", "predict", "--model", str(exported), "--batch", "4", "--json", str(out), *QUICK]) == 0
    table, found = capsys.readouterr().out, json.loads(out.read_text())
    assert list(found["rows"]) == ["torch", "onnx", "int8"] and f"{torch.get_num_threads()} threads in each" in table
    for name, row in found["rows"].items():
        assert f"\n{name:8} {row['images_per_second']:10,.1f} {row['milliseconds']:12.2f}" in table
        assert row["images_per_second"] > 0 < row["milliseconds"] and row["rounds"] >= 5
    assert found["facts"]["size"] == 40 and found["facts"]["batch"] == 4
    file = exported / "export" / "student.int8.onnx"
    assert main(["bench", "predict", "--model", str(file), *QUICK]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["onnx"]
    assert main(["bench", "predict", "--arch", "alexnet_bn", "--width", "0.05", "--size", "64", *QUICK]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["torch", "onnx"]


def test_an_export_of_other_weights_is_left_out(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ktransfer import networks

    run = tmp_path / "run"
    shutil.copytree(exported, run)
    weights = run / "retrain" / "model.safetensors"
    network = networks.describe(weights)
    networks.save(weights, networks.build(network, 5, "other").state_dict(), network)
    assert main(["bench", "predict", "--model", str(weights), *QUICK]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["torch", "onnx"]


def test_misuse_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["predict", "--data", "scenes:"], "--data is not read"),
        (["retrain", "--model", "x"], "--model is read by predict alone"),
        (["predict", "--model", str(tmp_path / "none")], "no such file"),
        (["predict", "--arch", "vgg17"], "no such network"),
        (["predict", "--model", "x", "--size", "64"], "leave --arch and --size out"),
        (["predict", "--json", str(tmp_path / "no" / "b.json")], "does not exist; make it first"),
    ):
        assert main(["bench", *words, *QUICK]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
