"""Early stopping: it ends where told by hand, keeps the best weights, and a kill changes nothing."""

import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ktransfer.errors import StageError, UsageError
from ktransfer.training import loop
from ktransfer.training.options import TrainOptions
from ktransfer.training.stopping import Stopping

CPU = torch.device("cpu")
ROWS, STEPS, PASSES = 12, 3, 9
LONG = TrainOptions(seed=3, precision="float32", epochs=PASSES, batch=4, lr=0.1, device="cpu", schedule="constant")


class Rows:
    """Hands out rows of a tensor of "images"."""

    def __init__(self):
        self.pixels = torch.randint(0, 256, (ROWS, 3, 6, 6), generator=torch.Generator().manual_seed(0)).byte()

    def batches(self, index_batches):
        for rows in index_batches:
            yield rows, self.pixels[rows], torch.ones(len(rows), dtype=torch.bool), 0.001


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        return body.append(nn.Linear(64, 2))


def plain_loss(model, batch):
    logits = model(batch.pixels.float() / 255)
    return F.cross_entropy(logits, batch.rows % 2), {"count": batch.valid.sum()}


def order(epoch):
    return loop.epoch_batches(torch.arange(ROWS), 4, 3, epoch)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def often(monkeypatch):
    """A log line and a checkpoint after every step."""
    monkeypatch.setattr(loop, "LOG_SECONDS", 0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", math.inf)


def told(model, values, patience, seen=None):
    """An evaluate that says these values in turn; `seen` gets the weights that it is shown."""

    def evaluate(network):
        assert not network.training
        assert not torch.is_grad_enabled()
        if seen is not None:
            seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"AP": values[stopping.evaluated], "AP50": 1.0}

    stopping = Stopping(model, evaluate, "AP", patience)
    return stopping


def fit(folder, model, stopping, loss=plain_loss, options=LONG):
    loop.fit(model, loss, Rows(), order, options, folder, CPU, "t", stopping)


@pytest.mark.parametrize(
    ("values", "patience", "passes", "best"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.9], 2, 4, 2),  # as good is no better
        ([0.1, 0.3, 0.2, 0.4, 0.3, 0.3], 2, 6, 4),
        ([0.0, 0.0, 0.0, 0.0, 0.2, 0.1], 1, 6, 5),  # nobody is impatient before anything is found
        ([0.0] * PASSES, 1, PASSES, PASSES),
        ([0.1 * place for place in range(PASSES)], 1, PASSES, PASSES),
        ([0.5, *[0.1] * PASSES], PASSES, PASSES, 1),
    ],
)
def test_it_ends_where_patience_does_with_the_best_weights(tmp_path, values, patience, passes, best):
    model, seen = small_model(), []
    stopping = told(model, values, patience, seen)
    fit(tmp_path, model, stopping)
    assert (len(seen), stopping.evaluated, stopping.best_epoch) == (passes, passes, best)
    assert_same(model.state_dict(), seen[best - 1])
    found = [line for line in lines(tmp_path) if "AP" in line]
    assert [(line["epoch"], line["AP"]) for line in found] == list(enumerate(values[:passes]))
    assert found[-1]["best_epoch"] == best
    assert lines(tmp_path)[-1]["step"] == passes * STEPS
    assert any("loss" in line for line in lines(tmp_path))


def test_what_is_enough_ends_it_at_once(tmp_path):
    model, seen = small_model(), []
    stopping = told(model, [0.1, 0.5, 0.9, 1.0], PASSES, seen)
    stopping.enough = 0.9
    fit(tmp_path, model, stopping)
    assert (len(seen), stopping.best, stopping.best_epoch) == (3, 0.9, 3)


VALUES = [0.1, 0.3, 0.2, 0.1, 0.25]


def test_interrupted_at_any_step_it_stops_with_the_same_weights(tmp_path, often):
    model = small_model()
    fit(tmp_path / "whole", model, told(model, VALUES, 3))
    whole, noted = model.state_dict(), [line for line in lines(tmp_path / "whole") if "AP" in line]
    for step in range(len(VALUES) * STEPS):
        calls = iter(range(10**6))

        def loss(model, batch, calls=calls, step=step):
            if next(calls) == step:
                raise KeyboardInterrupt
            return plain_loss(model, batch)

        folder = tmp_path / str(step)
        for own in (loss, plain_loss):
            model = small_model()
            stopping = told(model, VALUES, 3)
            if own is loss:
                with pytest.raises(KeyboardInterrupt):
                    fit(folder, model, stopping, own)
            else:
                fit(folder, model, stopping, own)
        assert_same(model.state_dict(), whole)
        assert [line for line in lines(folder) if "AP" in line] == noted


@pytest.mark.parametrize("steps", [STEPS, 1])
def test_ctrl_c_at_the_end_of_an_epoch_or_in_its_evaluation(tmp_path, often, steps):
    """Once after every epoch's last step, then once in every evaluation."""
    order_ = order if steps == STEPS else lambda epoch: order(epoch)[:1]
    model = small_model()
    whole = told(model, VALUES, 3)
    loop.fit(model, plain_loss, Rows(), order_, LONG, tmp_path / "whole", CPU, "t", whole)
    for when in range(1, len(VALUES) + 1):
        for where in ("step", "evaluate"):
            folder = tmp_path / f"{where}{when}"
            calls = []

            def loss(network, batch, calls=calls, when=when, where=where):
                calls.append(1)
                if where == "step" and len(calls) == when * steps:
                    signal.raise_signal(signal.SIGINT)
                return plain_loss(network, batch)

            again = small_model()
            stopping = told(again, VALUES, 3)
            inner = stopping.evaluate

            def evaluate(network, inner=inner, stopping=stopping, when=when, where=where):
                if where == "evaluate" and stopping.evaluated + 1 == when:
                    signal.raise_signal(signal.SIGINT)
                return inner(network)

            stopping.evaluate = evaluate
            with pytest.raises(KeyboardInterrupt):
                loop.fit(again, loss, Rows(), order_, LONG, folder, CPU, "t", stopping)
            again = small_model()
            stopping = told(again, VALUES, 3)
            loop.fit(again, plain_loss, Rows(), order_, LONG, folder, CPU, "t", stopping)
            assert (stopping.evaluated, stopping.best_epoch) == (whole.evaluated, whole.best_epoch)
            assert_same(again.state_dict(), model.state_dict())
            assert [line["epoch"] for line in lines(folder) if "AP" in line] == list(range(len(VALUES)))


def test_a_part_of_the_model_is_what_is_evaluated_and_kept(tmp_path):
    model = small_model()
    part = model[0]
    seen = []
    fit(tmp_path, model, told(part, VALUES, 3, seen))
    assert_same(part.state_dict(), seen[1])
    assert set(seen[0]) == {"weight", "bias"}


def test_without_patience_it_is_the_same_training(tmp_path):
    models = small_model(), small_model()
    fit(tmp_path / "a", models[0], told(models[0], [0.1 * n + 0.1 for n in range(PASSES)], 1))
    loop.fit(models[1], plain_loss, Rows(), order, LONG, tmp_path / "b", CPU, "t")
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_a_checkpoint_of_a_training_without_evaluations_is_refused(tmp_path, often):
    def loss(model, batch):
        if batch.epoch == 1:
            raise KeyboardInterrupt
        return plain_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        loop.fit(small_model(), loss, Rows(), order, LONG, tmp_path, CPU, "t")
    model = small_model()
    with pytest.raises(UsageError, match="not a checkpoint of this training"):
        fit(tmp_path, model, told(model, VALUES, 3))


def test_a_training_that_diverged_is_told(tmp_path):
    def nan(model, batch):
        value, sums = plain_loss(model, batch)
        return value * (math.nan if batch.epoch else 1), sums

    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    with pytest.raises(StageError, match="the loss is nan"):
        fit(tmp_path, model, told(model, [0.1, 0.0, 0.0], 2), nan)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["AP"] == 0.1
