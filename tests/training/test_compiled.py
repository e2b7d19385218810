"""The compiled step: the same training and the same names, and a way on where compiling fails."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ktransfer.errors import StageError
from ktransfer.training import compiled, loop
from ktransfer.training.options import TrainOptions

CPU = torch.device("cpu")


class Rows:
    """Noise as "images"."""

    pixels = torch.randint(0, 256, (24, 3, 6, 6), generator=torch.Generator().manual_seed(0)).byte()

    def batches(self, index_batches):
        for rows in index_batches:
            yield rows, self.pixels[rows], rows >= 0, 0.0


def loss(model, batch):
    logits = model(batch.pixels.float() / 255)
    return F.cross_entropy(logits, batch.rows % 2), {"count": batch.valid.sum()}


def train(folder, how, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    options = TrainOptions(precision="float32", epochs=2, batch=8, lr=0.05, compile=how, **more)
    loop.fit(model, loss, Rows(), lambda epoch: torch.arange(24).view(3, 8), options, folder, CPU, "t")
    return model.state_dict()


def assert_close(found, wanted):
    assert list(found) == list(wanted)  # no _orig_mod.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_same_training(tmp_path, monkeypatch, capsys, micro_batch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # inductor wants a compiler of C++, and a minute
    wanted = train(tmp_path / "off", "off", micro_batch=micro_batch)
    capsys.readouterr()
    assert_close(train(tmp_path / "auto", "auto", micro_batch=micro_batch), wanted)
    assert "compiling" not in capsys.readouterr().err  # not on a CPU
    assert_close(train(tmp_path / "on", "on", micro_batch=micro_batch), wanted)
    assert "t: compiling the step" in capsys.readouterr().err


def test_where_compiling_fails_it_goes_on_without_or_says_so(tmp_path, monkeypatch, capsys):
    wanted = train(tmp_path / "off", "off")

    def broken(graph, examples):
        raise OSError("no compiler\nhere")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    torch._dynamo.reset()
    with pytest.raises(StageError, match=r"^--compile on: \w+: [^\n]*no compiler here[^\n]*--compile off"):
        train(tmp_path / "on", "on")

    class OnCuda(compiled.Compiled):
        def __init__(self, model, options, device, label, shared):
            super().__init__(model, options, torch.device("cuda"), label, shared)

    monkeypatch.setattr(loop, "Compiled", OnCuda)
    torch._dynamo.reset()
    capsys.readouterr()
    found = train(tmp_path / "auto", "auto")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "t: goes on without compiling (" in capsys.readouterr().err


def test_batch_norm_over_processes_is_not_compiled(capsys):
    model = nn.BatchNorm1d(2)
    found = compiled.Compiled(model, TrainOptions(compile="on"), CPU, "t", shared=True)
    assert found.used is model and "not compiled" in capsys.readouterr().err
