"""`ktransfer bench`: operations are counted as by hand, and every part is measured, printed and written."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ktransfer.bench import ceilings, measure
from ktransfer.bench.photographs import photograph, write_photographs
from ktransfer.cli import main
from ktransfer.errors import UsageError
from ktransfer.networks import Network, build
from ktransfer.training.batch import Batch

CPU = torch.device("cpu")
SMALL = ["--width", "0.05", "--batch", "2", "--seconds", "0.1", "--workers", "1", "--device", "cpu"]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_operations_of_grouped_convolutions_forward_and_backward(precision: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 5, stride=2, groups=2))
    x = torch.randn(5, 3, 12, 12)
    first = 2 * 5 * 8 * 12 * 12 * 3 * 3 * 3
    second = 2 * 5 * 4 * 4 * 4 * (8 // 2) * 5 * 5

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            model(x).sum().backward()

    with torch.no_grad():
        assert measure.count_flops(lambda: model(x)) == first + second
    # Of the first one's input no gradient is wanted.
    assert measure.count_flops(step) == 2 * first + 3 * second


def test_operations_of_the_papers_alexnet() -> None:
    """0.7 G multiply-adds, as is well known of the two-tower AlexNet at 227."""
    model = build(Network("alexnet", size=227, classes=1000), 0, "t").eval()
    with torch.no_grad():
        flops = measure.count_flops(lambda: model(torch.zeros(1, 3, 227, 227)))
    assert flops / 2 == pytest.approx(0.72e9, rel=0.02)


def test_time_and_waiting_are_measured() -> None:
    batch = Batch(torch.arange(4), torch.zeros(4), torch.ones(4).bool(), 0, True)

    def batches():
        while True:
            time.sleep(0.02)
            yield batch, 0.02

    done = []
    found = measure.timed("t", lambda b: (done.append(b), time.sleep(0.02)), batches(), 4, 0.4, CPU)
    assert found["images_per_second"] == pytest.approx(100, rel=0.3)
    assert found["data_wait"] == pytest.approx(0.5, abs=0.15)
    assert 0.01 < found["peak_gb"] < 100


def test_the_peak_of_memory_is_that_of_the_measurement() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to forget an older peak")
    batch = Batch(torch.arange(1), torch.zeros(1), torch.ones(1).bool(), 0, True)

    def take(size: int) -> float:
        batches = iter([(batch, 0.0)] * 10**6)
        return measure.timed("t", lambda _: torch.ones(size, dtype=torch.uint8), batches, 1, 0.1, CPU)["peak_gb"]

    small, large, again = take(10**3), take(2 * 10**8), take(10**3)
    assert large - small == pytest.approx(0.2, abs=0.05) and again < small + 0.05


def test_ceilings() -> None:
    assert 1e-3 < ceilings.products(torch.float32, CPU, 0.01) < 100
    assert 0.1 < ceilings.copies(CPU, 0.01) < 1e4
    assert 10 < ceilings.jpegs(photograph(0, 64, 64), 1, 0.01) < 1e6


@pytest.mark.parametrize(
    ("part", "options", "rows"),
    [
        ("decode", [], ["decode"]),
        ("data", ["--task", "context"], ["decode", "prepare", "decode + prepare"]),
        ("step", ["--arch", "alexnet_bn"], ["network", "pretext step", "pretext step + reading"]),
        ("extract", [], ["network", "extract", "extract + reading"]),
        ("retrain", ["--size", "64"], ["network", "retrain step", "retrain step + reading"]),
    ],
)
def test_every_part(
    part: str,
    options: list[str],
    rows: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if part != "decode":  # once will do
        for name in ("products", "copies", "jpegs"):
            monkeypatch.setattr(measure, name, lambda *_: 1e6)
    folder = write_photographs(tmp_path / "images", 3)
    out = tmp_path / "b.json"
    assert main(["bench", part, "--data", str(folder), "--json", str(out), *SMALL, *options]) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert list(found["rows"])[-len(rows) :] == rows and all(f"\n{name} " in table for name in rows)
    assert found["part"] == part and found["facts"]["batch"] == 2 and found["facts"]["images"] == 3
    for row in found["rows"].values():
        assert row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 and row["peak_gb"] > 0
    assert all(value > 0 for value in found["ceilings"].values())
    if part in ("step", "extract", "retrain"):
        last = found["rows"][rows[-1]]
        assert 0 < last["of_gemm"] < 1
        assert last["tflops"] == pytest.approx(last["flops_per_image"] * last["images_per_second"] / 1e12)


def test_made_images_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(measure, "MADE", 3)
    assert main(["bench", "decode", *SMALL]) == 0
    assert "of jpeg" in capsys.readouterr().out
    for words, message in (
        (["decode", "--json", str(tmp_path / "no" / "b.json")], "does not exist; make it first"),
        (["step", "--batch", "1"], "--batch 1: batch norm needs two images"),
        (["retrain", "--arch", "vgg17"], "no such network"),
        (["step", "--task", "chess"], "chess"),
        (["everything"], "'everything' is not one of"),
    ):
        assert main(["bench", *SMALL, *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UsageError, match="batch norm"):
        measure.command("step", None, None, 1.0, 0, 1, "jigsawpp", "cpu", "auto", 1, 1.0, None)
