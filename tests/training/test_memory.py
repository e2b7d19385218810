"""What a training needs of memory, against what its tensors are; and the end of memory as one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ktransfer.errors import StageError
from ktransfer.training import loop, memory
from ktransfer.training.options import TrainOptions

CPU = torch.device("cpu")
SIDE = 8


class Rows:
    """Grey "images"."""

    def batches(self, index_batches):
        for rows in index_batches:
            yield rows, torch.full((len(rows), 3, SIDE, SIDE), 7, dtype=torch.uint8), rows >= 0, 0.0


def loss(model, batch):
    assert batch.whole and bool(batch.valid.all())
    logits = model(batch.pixels.float())
    return F.cross_entropy(logits, batch.rows % 2), {"count": batch.valid.sum()}


def network():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(16 * SIDE**2, 2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_kept_is_counted(momentum):
    options = TrainOptions(precision="float32", momentum=momentum, batch=100)
    model = network()
    need = memory.measure(model, loss, Rows(), torch.arange(10), options, CPU, 0)
    # Of an image: its floats, the sigmoid's result, the same in the order of the linear layer, log-softmax and label;
    # on the way back the largest has a gradient and gets one.
    kept = 4 * (3 * SIDE**2 + 2 * 16 * SIDE**2 + 2) + 8
    assert need.each == kept + 2 * 4 * 16 * SIDE**2
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert need.fixed == pytest.approx(weights * (2 + (momentum > 0)) + 100 * 3 * SIDE**2, abs=100)


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Sequential(network(), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory.measure(model, loss, Rows(), torch.arange(10), TrainOptions(), CPU, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def told(monkeypatch, capsys, free, model=None, **more):
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    options = TrainOptions(precision="float32", batch=1000, **more)
    memory.tell_plan(model or network(), loss, Rows(), torch.arange(5000), options, CPU, "pretext")
    return capsys.readouterr().err.splitlines()


def test_the_plan_is_told_with_the_flag_that_helps(monkeypatch, capsys):
    lines = told(monkeypatch, capsys, 10**9)
    assert len(lines) == 1 and "for 1000 images at once; 1 GB are free on cpu" in lines[0]
    assert "0.017 GB for 1000 images" in lines[0]
    _, second = told(monkeypatch, capsys, 2 * 10**6)
    assert second == "pretext: memory may not suffice; if it runs out, give --micro-batch 103"
    (line,) = told(monkeypatch, capsys, 2 * 10**6, micro_batch=103)
    assert "for 100 images at once" in line
    _, second = told(monkeypatch, capsys, 10**3)
    assert "a smaller --width or --size" in second
    _, second = told(monkeypatch, capsys, 2 * 10**6, nn.Sequential(network(), nn.BatchNorm1d(2)))
    assert second.endswith("(batch norm will use statistics of so many images)")
    memory.tell_plan(network(), loss, Rows(), torch.arange(2), TrainOptions(), CPU, "pretext")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_no_memory_left_is_one_line_with_the_flag(tmp_path, error):
    def full(model, batch):
        raise error

    options = TrainOptions(precision="float32", batch=8, epochs=1)
    batches = torch.arange(16).view(2, 8)
    with pytest.raises(StageError, match=r"^t: out of memory on cpu with 8 images[^\n]*--micro-batch 4[^\n]*$"):
        loop.fit(network(), full, Rows(), lambda epoch: batches, options, tmp_path, CPU, "t")


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes$"), memory.explained(network(), CPU, "t", TrainOptions()):
        raise RuntimeError("shapes")
