"""A batch divided into pieces, and among processes: the same training as undivided, but for the order of sums."""

import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import StochasticDepth

from ktransfer.errors import UsageError
from ktransfer.training import batch_divider, loop, norms
from ktransfer.training.dropout_masks import RowsOfBatch
from ktransfer.training.options import TrainOptions

CPU = torch.device("cpu")
SCENES = "scenes:images=41,size=48"


@given(st.integers(2, 300), st.integers(0, 300))
def test_pieces_cover_a_batch_and_hold_two_at_least(width, most):
    found = batch_divider.pieces(width, most)
    assert [row for first, last in found for row in range(first, last)] == list(range(width))
    sizes = {last - first for first, last in found}
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= (max(most, 3) if most else width)
    if not most or most >= width:
        assert found == [(0, width)]


@pytest.mark.parametrize("each", [1, 9])
@pytest.mark.parametrize("maps", [False, True])
def test_masks_are_those_of_the_whole_batch(each, maps):
    shape = (5, 6, 7) if maps else (11,)
    x = torch.rand(7 * each, *shape) + 1
    if maps:
        x = x.to(memory_format=torch.channels_last)
    layers = nn.Sequential(nn.Dropout(0.3), nn.ReLU(), nn.Dropout(0.5), StochasticDepth(0.4, "row"), nn.Dropout(0))
    torch.manual_seed(1)
    whole = layers(x)
    parts = []
    for first, last in ((0, 2), (2, 3), (3, 7)):
        torch.manual_seed(1)
        with RowsOfBatch(first, last - first, 7):
            parts.append(layers(x[first * each : last * each]))
    assert torch.equal(torch.cat(parts), whole)
    with RowsOfBatch(0, 2, 7):
        assert torch.equal(layers.eval()(x[:2]), x[:2])


def test_draws_that_are_not_of_images_stay_as_they_are():
    torch.manual_seed(1)
    wanted = F.dropout(torch.ones(5), 0.5)
    torch.manual_seed(1)
    with RowsOfBatch(0, 2, 4):
        assert torch.equal(F.dropout(torch.ones(5), 0.5), wanted)


class Rows:
    """Rows of a tensor of "images", some of them invalid."""

    def __init__(self):
        self.pixels = torch.randint(0, 256, (40, 3, 6, 6), generator=torch.Generator().manual_seed(0)).byte()

    def batches(self, index_batches):
        for rows in index_batches:
            yield rows, self.pixels[rows], rows % 6 != 5, 0.001


def model(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *more, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2))


def plain_loss(model, batch):
    """The label of an image is told by the row that follows it."""
    own = len(batch.rows) - 1
    kept = slice(None) if batch.whole else batch.valid[:own]
    rows, following = batch.rows[:own][kept], batch.rows[1:][kept]
    logits = model(batch.pixels[:own][kept].float() / 255)
    return F.cross_entropy(logits, (rows + following) % 2), {"count": batch.valid[:own].sum()}


def train(folder, micro_batch, network):
    options = TrainOptions(precision="float32", epochs=3, batch=10, lr=0.05, micro_batch=micro_batch)

    def batches(epoch):
        return loop.epoch_batches(torch.arange(40), 10, 0, epoch, 1)

    loop.fit(network, plain_loss, Rows(), batches, options, folder, CPU, "t", following=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return network.state_dict(), [line["loss"] for line in lines]


@pytest.mark.parametrize("micro_batch", [2, 3, 4, 7])
def test_pieces_make_the_same_steps(tmp_path, monkeypatch, micro_batch):
    monkeypatch.setattr(loop, "LOG_SECONDS", 0)
    wanted, curve = train(tmp_path / "whole", 0, model())
    found, losses = train(tmp_path / "pieces", micro_batch, model())
    np.testing.assert_allclose(losses, curve, rtol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    exact, _ = train(tmp_path / "one", 10, model())
    assert all(torch.equal(exact[name], wanted[name]) for name in wanted)


def test_batch_norm_sees_a_piece_at_a_time(tmp_path):
    found, _ = train(tmp_path, 5, model(nn.BatchNorm2d(4)))
    assert found["1.num_batches_tracked"] == 2 * 4 * 3


@pytest.mark.parametrize("kind", ["maps", "rows", "plain", "average", "bfloat16"])
def test_batch_norm_over_processes_is_batch_norm_over_all(kind):
    """Two processes in turn, in one: sums of both are known from a first round."""
    shape = (12, 5, 4, 4) if kind in ("maps", "bfloat16", "average") else (12, 5)
    make = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    own, theirs = (make(5, affine=kind != "plain", momentum=None if kind == "average" else 0.1) for _ in range(2))
    if own.affine:
        with torch.no_grad():
            for norm in (own, theirs):
                norm.weight.copy_(torch.arange(5) - 1.5)
                norm.bias.copy_(torch.arange(5.0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 40
    if kind == "bfloat16":
        x = x.bfloat16()
    towards = torch.randn(shape, generator=generator).to(x.dtype)
    whole = x.clone().requires_grad_()
    wanted = theirs(whole)
    (wanted * towards).sum().backward()

    calls = {}

    def total(place):
        seen = iter(range(100))

        def add(tensor):
            key = next(seen)
            calls.setdefault(key, {})[place] = tensor.clone()
            tensor.copy_(sum(calls[key].values()))

        return add

    parts = (slice(0, 5), slice(5, 5), slice(5, 12))  # the second has no image
    for _ in range(3):  # once for the sums forward, once for those backward, and once with all known
        own.reset_running_stats()
        own.zero_grad()
        made, grads = [], []
        for place, part in enumerate(parts):
            tracked = own.state_dict()
            tracked = {name: value.clone() for name, value in tracked.items()}
            piece = x[part].clone().requires_grad_()
            with norms.over_all(own, total(place)):
                y = own(piece)
                (y * towards[part]).sum().backward()
            made.append(y.detach())
            grads.append(piece.grad)
            if place < 2:
                own.load_state_dict(tracked)  # all processes count the same batch
    assert "forward" not in vars(own)
    close = {"rtol": 2e-2, "atol": 2e-2} if kind == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat(made), wanted.detach(), **close)
    torch.testing.assert_close(torch.cat(grads), whole.grad, **close)
    torch.testing.assert_close(own.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    if own.affine:
        torch.testing.assert_close(own.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own.bias.grad, theirs.bias.grad, rtol=1e-3, atol=1e-3)


def pretext(run, *more):
    fixed = ("--epochs", "2", "--batch", "9", "--width", "0.05", "--precision", "float32", "--permutations", "10")
    # At larger rates a deep network makes more of rounding in every step: it would look like a fault.
    return ("--run", run, "pretext", "--data", SCENES, *fixed, "--lr", "0.001", *more)


def retrain(run, arch, *more):
    fixed = ("--labels", "classes", "--epochs", "2", "--batch", "10", "--precision", "float32", "--lr", "0.01")
    return ("--run", run, "retrain", "--data", SCENES, "--arch", arch, *fixed, *more)


def outcome(run, stage):
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return load_file(run / stage / "model.safetensors"), [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, launch):
    """Runs of one process: stage and architecture -> weights and losses."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for arch in ("alexnet", "vgg16_bn"):
        status, said = launch(1, *pretext(folder / arch, "--arch", arch))
        assert status == [0], said
        found["pretext", arch] = outcome(folder / arch, "pretext")
    for arch in ("alexnet_bn",):
        status, said = launch(1, *retrain(folder / arch, arch, "--width", "0.1"))
        assert status == [0], said
        found["retrain", arch] = outcome(folder / arch, "retrain")
    return found


def assert_alike(run, stage, wanted):
    found, losses = outcome(run, stage)
    weights, curve = wanted
    assert len(losses) == len(curve) > 4
    # Biases before a batch norm have no gradient but rounding.
    relative, absolute = (1e-4, 2e-5) if len(weights) > 60 else (1e-5, 1e-7)
    np.testing.assert_allclose(losses, curve, rtol=1e-5)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        far = (found[name] - value).double().norm()
        assert far <= relative * value.double().norm() + absolute, name


@pytest.mark.parametrize(
    ("world", "stage", "arch", "more"),
    [
        (2, "pretext", "vgg16_bn", ()),
        (3, "pretext", "alexnet", ("--micro-batch", "4")),
        (2, "retrain", "alexnet_bn", ("--width", "0.1")),
    ],
)
def test_as_one_process(tmp_path, launch, alone, world, stage, arch, more):
    run = tmp_path / "run"
    line = pretext(run, "--arch", arch, *more) if stage == "pretext" else retrain(run, arch, *more)
    status, said = launch(world, *line)
    assert status == [0] * world, said
    assert f"{stage}: done" in said[0] and said[1:] == [""] * (world - 1)
    assert_alike(run, stage, alone[stage, arch])


def test_broken_images_are_left_out_by_all(tmp_path, folder, launch):
    found = []
    for world in (1, 3):
        run = tmp_path / str(world)
        line = ("--run", run, "retrain", "--data", folder, "--labels", "classes", "--arch", "alexnet", "--width", "0.1")
        line += ("--epochs", "2", "--batch", "6", "--precision", "float32", "--stride", "2")
        status, said = launch(world, *line, "--max-broken", "0.1")
        assert status == [0] * world, said
        record = json.loads((run / "retrain" / "stage.json").read_text())["retrain"]
        assert record["result"]["images"] == 23 and len(record["broken"]) == 1
        assert record["broken"][0].startswith("a/05.jpg: ")
        found.append(outcome(run, "retrain"))
    assert_alike(tmp_path / "3", "retrain", found[0])
    status, said = launch(3, *line, "--overwrite")
    assert status == [1, 1, 1] and "--max-broken" in said[0].splitlines()[-1], said


STEP = "ktransfer.training.loop:_gradients"


@pytest.mark.parametrize(
    ("rank", "kind", "call", "at"),
    [
        (0, "kill", STEP, 3),
        (1, "kill", STEP, 3),
        (1, "error", STEP, 4),
        (0, "error", STEP, 4),
        (1, "stop", STEP, 5),
        (0, "error", "ktransfer.training.checkpoint:_write", 2),
        (1, "error", "ktransfer.training.reading:same_data", 1),
        (1, "error", "ktransfer.training.reading:_valid", 1),
        (1, "error", "ktransfer.pretext.stage:open_task", 1),
        (0, "stop", "ktransfer.pretext.solving:accuracy", 2),
    ],
)
def test_an_error_ends_all_and_one_process_goes_on(tmp_path, launch, alone, rank, kind, call, at):
    run = tmp_path / "run"
    fault = {"rank": rank, "call": call, "at": at, "kind": kind}
    status, said = launch(2, *pretext(run, "--arch", "vgg16_bn"), fault=fault)
    assert said[1].strip() == ""  # click ends the line after a ^C
    voices = [text for text in said[0].splitlines() if text.startswith("ktransfer:")]
    assert "Traceback" not in said[0] and len(voices) == (rank != 0 or kind != "kill"), said
    if kind == "kill":
        assert status == [-signal.SIGKILL if who == rank else 1 for who in range(2)]
        assert rank == 0 or "another process of this command ended" in voices[0]
    elif kind == "stop":
        assert status[0] == 130 and voices[0].startswith("ktransfer: stopped; nothing is lost")
    else:
        assert status == [1, 1]
        whose = "process 1: " if rank else ""
        memory = "pretext: out of memory on cpu with 9 images at once; give the same command with --micro-batch 4"
        assert f"{whose}{memory}" in voices[0] or f"{whose}MemoryError: no room" in voices[0]
    if "reading" in call or "open_task" in call:  # nothing was trained yet
        return
    status, said = launch(1, *pretext(run, "--arch", "vgg16_bn"))
    assert status == [0], said
    assert "resumed at step" in said[0]
    assert_alike(run, "pretext", alone["pretext", "vgg16_bn"])


def test_a_piece_that_batch_norm_sees_is_not_changed_by_a_resume(tmp_path):
    from ktransfer.retrain import retrain

    given = {"data": SCENES, "labels": "classes", "epochs": 1, "batch": 10, "precision": "float32", "width": 0.1}
    line = retrain(tmp_path / "bn", **given, arch="alexnet_bn", micro_batch=5)
    with pytest.raises(UsageError, match=r"micro-batch, which batch norm sees, changed"):
        retrain(tmp_path / "bn", **given, arch="alexnet_bn", micro_batch=4)
    assert retrain(tmp_path / "bn", **given, arch="alexnet_bn", micro_batch=5) == line
    retrain(tmp_path / "plain", **given, arch="alexnet", micro_batch=5)
    retrain(tmp_path / "plain", **given, arch="alexnet", micro_batch=4)


def test_one_image_at_once_is_refused():
    with pytest.raises(UsageError, match=r"^--micro-batch 1: [^\n]+$"):
        TrainOptions(micro_batch=1)
