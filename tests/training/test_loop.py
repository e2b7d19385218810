"""The training loop: interrupted anywhere it ends with the same weights; schedules, batches, logs and checkpoints."""

import copy
import json
import math
import os
import pickle
import signal
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ktransfer.errors import StageError, UsageError
from ktransfer.training import checkpoint, device, loop
from ktransfer.training.batch import Batch
from ktransfer.training.device import autocast, bfloat16, choose_device
from ktransfer.training.options import MachineOptions, TrainOptions

CPU = torch.device("cpu")
ROWS, STEPS, EPOCHS = 23, 5, 3
TOTAL = STEPS * EPOCHS
OPTIONS = TrainOptions(seed=3, precision="float32", epochs=EPOCHS, batch=4, lr=0.1, device="cpu")


class Rows:
    """Hands out rows of a tensor of "images", some of them invalid."""

    def __init__(self):
        self.pixels = torch.randint(0, 256, (ROWS, 3, 6, 6), generator=torch.Generator().manual_seed(0)).byte()

    def batches(self, index_batches):
        for rows in index_batches:
            yield rows, self.pixels[rows], rows != 5, 0.001


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        return body.append(nn.Linear(64, 2))


def plain_loss(model, batch):
    pixels, rows = batch.pixels[batch.valid], batch.rows[batch.valid]
    logits = model(pixels.float() / 255)
    return F.cross_entropy(logits, rows % 2), {"count": batch.valid.sum()}


def order(epoch):
    return loop.epoch_batches(torch.arange(ROWS), 4, 3, epoch)


def train(folder, loss=plain_loss, model=None, evaluate=None, options=OPTIONS, optimiser=None, batches=order):
    model = model or small_model()
    loop.fit(model, loss, Rows(), batches, options, folder, CPU, "t", evaluate, optimiser)
    return model.state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopping(at, after_forward=True):
    """A loss that is interrupted the `at`-th time that it is called, before or after batch norm saw the batch."""
    calls = iter(range(TOTAL + 1))

    def loss(model, batch):
        stop = next(calls) == at
        if stop and not after_forward:
            raise KeyboardInterrupt
        found = plain_loss(model, batch)
        if stop:
            raise KeyboardInterrupt
        return found

    return loss


@pytest.fixture
def often(monkeypatch):
    """A log line and a checkpoint after every step."""
    monkeypatch.setattr(loop, "LOG_SECONDS", 0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", math.inf)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("after_forward", [False, True])
def test_interrupted_at_any_step_it_ends_with_the_same_weights(tmp_path, often, undisturbed, after_forward, capsys):
    for step in range(TOTAL):
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            train(folder, stopping(step, after_forward))
        capsys.readouterr()
        assert_same(train(folder), undisturbed)
        assert (f"resumed at step {step}\n" in capsys.readouterr().err) == (step > 0)
        assert [line["step"] for line in lines(folder)] == list(range(1, TOTAL + 1))


def test_interrupted_again_and_again(tmp_path, often, undisturbed):
    for _ in range(TOTAL - 1):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stopping(1))
    assert_same(train(tmp_path), undisturbed)


def test_interrupted_within_the_optimisers_step(tmp_path, often, undisturbed):
    class Stopping(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            super().step(closure)
            self.calls += 1
            if self.calls == 7:
                raise KeyboardInterrupt

    def optimiser(model, kind):
        wanted = loop.sgd(model, OPTIONS, CPU)
        return kind(wanted.param_groups, lr=OPTIONS.lr)

    model = small_model()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model=model, optimiser=optimiser(model, Stopping))
    model = small_model()
    assert_same(train(tmp_path, model=model, optimiser=optimiser(model, torch.optim.SGD)), undisturbed)


@pytest.mark.parametrize("step", [0, 6, TOTAL - 1])
def test_ctrl_c_waits_for_the_end_of_the_step_and_keeps_it(tmp_path, undisturbed, capsys, step):
    calls = iter(range(TOTAL))

    def loss(model, batch):
        found = plain_loss(model, batch)
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return found

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss)
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(train(tmp_path), undisturbed)
    assert f"resumed at step {step + 1}\n" in capsys.readouterr().err


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_ctrl_c_while_it_is_evaluated_is_obeyed(tmp_path, undisturbed, capsys, epoch):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == epoch + 1:
            signal.raise_signal(signal.SIGINT)
        return {"held_out": 1.0}

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, evaluate=evaluate)
    assert_same(train(tmp_path, evaluate=evaluate), undisturbed)
    assert f"resumed at step {(epoch + 1) * STEPS}\n" in capsys.readouterr().err
    assert [line["epoch"] for line in lines(tmp_path) if "held_out" in line] == list(range(EPOCHS))


def test_the_second_ctrl_c_interrupts_at_once(tmp_path):
    def loss(model, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss)
    assert not (tmp_path / "checkpoint").exists()


def test_it_trains_in_a_thread_too(tmp_path, undisturbed):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert_same(found[0], undisturbed)


def test_killed_between_checkpoints_it_goes_back_to_the_last(tmp_path, often, monkeypatch, undisturbed):
    save, kept = checkpoint.Checkpoint.save, []

    def once(self, step):
        if step == 7 or kept:
            kept.append(step)
        if kept == [7]:
            save(self, step)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", once)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stopping(11))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 12))
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 12, "ep')  # a line cut short by the kill
    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    steps = []

    def watched(model, batch):
        steps.append([line["step"] for line in lines(tmp_path)])
        return plain_loss(model, batch)

    assert_same(train(tmp_path, watched), undisturbed)
    assert steps[0] == list(range(1, 8)) and len(steps) == TOTAL - 7
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, TOTAL + 1))


def test_without_a_folder_nothing_is_written(tmp_path, often, monkeypatch, undisturbed):
    monkeypatch.chdir(tmp_path)
    found = []
    assert_same(train(None, evaluate=lambda model: found.append(1) or {"held_out": 1.0}), undisturbed)
    assert len(found) == EPOCHS
    assert not list(tmp_path.rglob("*"))


def test_global_randomness_and_where_it_is_logged_change_nothing(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(loop, "LOG_SECONDS", 0)

    def noisy(model):
        torch.rand(5)
        assert not model.training and not torch.is_grad_enabled()
        return {"held_out": 0.5}

    torch.manual_seed(99)
    assert_same(train(tmp_path, evaluate=noisy), undisturbed)
    found = [line for line in lines(tmp_path) if "held_out" in line]
    assert [(line["step"], line["epoch"]) for line in found] == [(5, 0), (10, 1), (15, 2)]


def test_each_step_draws_its_own_dropout(tmp_path):
    draws = []

    def loss(model, batch):
        draws.append(torch.rand(1).item())
        return plain_loss(model, batch)

    train(tmp_path / "a", loss)
    assert len(set(draws)) == TOTAL
    train(tmp_path / "b", loss)
    assert draws[:TOTAL] == draws[TOTAL:]


def test_another_seed_trains_otherwise(tmp_path, undisturbed):
    other = train(tmp_path, options=replace(OPTIONS, seed=4))
    assert not torch.equal(other["0.weight"], undisturbed["0.weight"])


@pytest.mark.parametrize("clip", [0.0, 0.8])
def test_steps_are_those_of_plain_sgd(tmp_path, clip):
    """Without dropout the loop is torch's SGD, its rates, order and clipping written out."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    twin = copy.deepcopy(model)
    train(tmp_path, model=model, options=replace(OPTIONS, schedule="step", warmup=0.2, weight_decay=0.1, clip=clip))
    weight, bias = twin[1].weight, twin[1].bias
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    factors = [1 / 3, 2 / 3, 1, *[1] * 4, *[0.1] * 4, *[0.01] * 3, 0.001]
    source, clipped = Rows(), 0
    for step, factor in enumerate(factors):
        rows, pixels, valid, _ = next(source.batches([order(step // STEPS)[step % STEPS]]))
        for group in sgd.param_groups:
            group["lr"] = 0.1 * factor
        sgd.zero_grad()
        plain_loss(twin, Batch(rows, pixels, valid, 0))[0].backward()
        length = float((weight.grad**2).sum() + (bias.grad**2).sum()) ** 0.5
        clipped += 0 < clip < length
        for part in (weight, bias) if 0 < clip < length else ():
            part.grad *= clip / length
        sgd.step()
    assert 0 < clipped < TOTAL or not clip
    assert step == TOTAL - 1
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_log_lines_are_means_over_the_images(tmp_path):
    def loss(model, batch):
        return model[1].weight.sum() * 0 + batch.rows.sum(), {"count": batch.valid.sum(), "hits": batch.valid.sum() * 2}

    train(tmp_path, loss, nn.Sequential(nn.Flatten(), nn.Linear(108, 2)))
    (line,) = lines(tmp_path)
    expected = sum(float(rows.sum() * (rows != 5).sum()) for epoch in range(EPOCHS) for rows in order(epoch))
    count = sum(float((rows != 5).sum()) for epoch in range(EPOCHS) for rows in order(epoch))
    assert line["loss"] == pytest.approx(expected / count, rel=1e-6)
    assert (line["hits"], line["step"], line["epoch"]) == (2, TOTAL, EPOCHS - 1)
    assert line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["memory_gb"] > 0


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    def nan(model, batch):
        value, sums = plain_loss(model, batch)
        return value * math.nan, sums

    with pytest.raises(StageError, match=r"^the loss is nan at step 15; [^\n]+$"):
        train(tmp_path, nan)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_is_never_executed(tmp_path):
    path = tmp_path / "checkpoint" / "last.pt"
    path.parent.mkdir()
    hole = tmp_path / "executed"
    for write in (
        lambda: torch.save(Bomb(hole), path),
        lambda: path.write_bytes(pickle.dumps(Bomb(hole), protocol=2)),
    ):
        write()
        with pytest.raises(UsageError, match="not a checkpoint of this training; start again with --overwrite"):
            train(tmp_path)
        assert not hole.exists()
    pickle.loads(path.read_bytes())
    assert hole.exists()  # it was a bomb


def test_damaged_and_foreign_checkpoints_are_one_line(tmp_path, often):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stopping(3))
    path = tmp_path / "checkpoint" / "last.pt"
    good = path.read_bytes()
    contents = [b"", b"x", b"no checkpoint\n" * 50, good[:10], good[: len(good) // 2], good[:-30], bytes(len(good))]
    contents.append(good.replace(b"optimiser", b"optimizer"))
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"^[^\n]*last.pt: not a checkpoint[^\n]*$"):
            train(tmp_path)
    for state in ([1, 2], {"step": 1}, {"step": 1, "model": nn.Linear(2, 2).state_dict(), "optimiser": {}}):
        torch.save(state, path)
        with pytest.raises(UsageError):
            train(tmp_path)
    checkpoint.remove(tmp_path)
    assert not path.parent.exists()
    checkpoint.remove(tmp_path)


def test_devices_that_are_not_there(monkeypatch):
    for name in ("gpu", "cuda:99", "mps", "meta", "cuda:-1", ""):
        with pytest.raises(UsageError, match=rf"^--device {name}: [^\n]+$"):
            choose_device(MachineOptions(device=name))
    assert choose_device(MachineOptions(device="cpu")) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device(MachineOptions()) == CPU
    with pytest.raises(UsageError, match="this machine has 0 CUDA devices; give cpu"):
        choose_device(MachineOptions(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(MachineOptions()) == torch.device("cuda")
    assert choose_device(MachineOptions(device="cuda:1")) == torch.device("cuda:1")


def test_bfloat16_where_the_hardware_has_it(monkeypatch):
    for precision in ("bfloat16", "float32"):
        assert bfloat16(MachineOptions(precision=precision), CPU) == (precision == "bfloat16")
    for flags, expected in (({"avx2"}, False), ({"amx_bf16", "avx2"}, True), ({"avx512_bf16"}, True)):
        monkeypatch.setattr(device, "_cpu_flags", lambda flags=flags: flags)
        assert bfloat16(MachineOptions(), CPU) is expected
    with autocast(MachineOptions(precision="bfloat16"), CPU):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


def test_tensorboard_shows_what_metrics_hold(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, options=replace(OPTIONS, tensorboard=True))
    shown = accumulator.EventAccumulator(str(tmp_path / "events"))
    shown.Reload()
    (event,) = shown.Scalars("loss")
    assert (event.step, event.value) == (TOTAL, pytest.approx(lines(tmp_path)[-1]["loss"], rel=1e-6))


def test_tensorboard_that_is_not_installed_is_told_before_the_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ktransfer\[report\]'"):
        TrainOptions(tensorboard=True)
