"""The pretext stage: what it writes, measures, bears and refuses; and that puzzles can be learned."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models import vgg16

from ktransfer import networks, rng
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.pretext import permutations as perms
from ktransfer.pretext import pretext, solving, stage, tasks
from ktransfer.pretext.config import PretextConfig
from ktransfer.pretext.network import TaskNet
from ktransfer.pretext.puzzles import make_puzzles
from ktransfer.pretext.tasks import open_task
from ktransfer.training.batch import Batch

SCENES = "scenes:images=40,size=48"
SMALL = {
    "data": SCENES,
    "arch": "alexnet_bn",
    "width": 0.05,
    "permutations": 20,
    "epochs": 2,
    "batch": 16,
    "precision": "float32",
    "device": "cpu",
}


def metrics(run):
    return [json.loads(line) for line in (run / "pretext" / "metrics.jsonl").read_text().splitlines()]


def record(run):
    return json.loads((run / "pretext" / "stage.json").read_text())["pretext"]


def folder_of_images(root, count=20, size=48):
    root.mkdir()
    random = np.random.default_rng(0)
    for row in range(count):
        pixels = random.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(root / f"{row:02}.jpg")
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "small"
    return run, pretext(run, **SMALL)


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
def test_the_first_loss_is_that_of_guessing_among_701(tmp_path, arch):
    pretext(tmp_path, **SMALL | {"arch": arch, "permutations": 701, "batch": 40, "epochs": 1, "width": 0.1})
    first = metrics(tmp_path)[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(701), rel=0.02)
    assert first["accuracy"] < 0.2


@pytest.mark.parametrize(("arch", "width"), [("alexnet_bn", 0.1), ("vgg16_bn", 0.125)])
def test_it_learns_32_puzzles_by_heart(tmp_path, capsys, arch, width):
    run = tmp_path / "run"
    pretext(run, data=SCENES, arch=arch, width=width, overfit=32, lr=0.05, precision="float32", device="cpu")
    assert "all 32 puzzles solved" in capsys.readouterr().err
    assert not run.exists()


def test_what_cannot_learn_by_heart_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(solving, "OVERFIT_STEPS", 5)
    with pytest.raises(StageError, match="not all puzzles solved in 5 steps"):
        pretext(tmp_path, **SMALL | {"overfit": 8, "lr": 0.0})


def test_it_learns_images_that_it_has_not_seen(tmp_path):
    """Few permutations and quadrants that tell where they are: puzzles of held-out images are solved too."""
    root = tmp_path / "data"
    root.mkdir()
    random = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    for row in range(64):
        noise = random.integers(0, 40, (48, 48))
        turns = np.stack([np.sin(x * (0.1 + y // 16 * 0.3)), np.sin(y * (0.1 + x // 16 * 0.3)), (x + y) / 48 - 1])
        pixels = (128 + 80 * turns + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(root / f"{row:02}.png")
    options = SMALL | {"data": str(root), "permutations": 4, "epochs": 25, "held_out": 0.25, "width": 0.1, "lr": 0.05}
    pretext(tmp_path / "run", **options)
    found = metrics(tmp_path / "run")
    held_out = [line for line in found if "held_out_accuracy" in line]
    assert [line["epoch"] for line in held_out] == list(range(25))
    assert held_out[-1]["held_out_accuracy"] > 0.8 and held_out[-1]["held_out_puzzles"] == 16
    assert record(tmp_path / "run")["result"]["held_out_accuracy"] == held_out[-1]["held_out_accuracy"]


def test_the_files_of_a_finished_stage(finished):
    run, weights = finished
    assert weights == run / "pretext" / "model.safetensors"
    files = {path.name for path in weights.parent.iterdir()}
    assert files == {"stage.json", "metrics.jsonl", "model.safetensors", "puzzles.png"}
    state = load_file(weights)
    network = networks.describe(weights)
    assert network == Network("alexnet_bn", 0.05, 2, 48, 0, "picture", "jigsawpp")
    trunk = networks.build(network, 0, "t").state_dict()
    assert {name for name in state if not name.startswith("head.")} == set(trunk)
    assert state["head.fc8.weight"].shape[0] == 20
    loaded = networks.load(weights, network).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in trunk)
    with Image.open(weights.parent / "puzzles.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG" and min(sheet.size) > 100
    facts = record(run)
    assert facts["state"] == "done" and facts["broken"] == []
    assert set(facts["outputs"]) == {"model.safetensors", "puzzles.png"}


def test_nothing_written_is_not_json(finished):
    """Numbers of occlusions that no held-out puzzle has are left out, instead of NaN."""
    run, _ = finished

    def refuse(name):
        raise AssertionError(name)

    for path in (run / "pretext" / "stage.json", run / "pretext" / "metrics.jsonl"):
        for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(text, parse_constant=refuse)


def test_a_vgg_teacher_has_torchvisions_names(tmp_path):
    state = load_file(pretext(tmp_path, **SMALL | {"arch": "vgg16", "width": 1.0, "epochs": 1, "limit": 4, "batch": 2}))
    trunk = {name: value for name, value in state.items() if not name.startswith("head.")}
    with torch.device("meta"):
        theirs = vgg16().state_dict()
    assert len(trunk) == 20
    assert all(theirs[name].shape == value.shape for name, value in trunk.items())


def test_done_is_skipped_changed_is_refused_and_overwrite_makes_the_same_bytes(finished, capsys):
    run, weights = finished
    before = weights.read_bytes()
    assert pretext(run, **SMALL | {"workers": 3}) == weights
    assert "skipped" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"epochs was 2, is 3[^\n]*--overwrite"):
        pretext(run, **SMALL | {"epochs": 3})
    assert weights.read_bytes() == before
    pretext(run, **SMALL | {"workers": 2, "overwrite": True})
    assert weights.read_bytes() == before


def test_a_stopped_run_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("ktransfer.training.checkpoint.SECONDS", 0)
    monkeypatch.setattr("ktransfer.training.checkpoint.SHARE", math.inf)
    real, calls = solving.loss, []

    def stopping(*given, **named):
        calls.append(1)
        found = real(*given, **named)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(solving, "loss", stopping)
    monkeypatch.setattr(stage, "tell_plan", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        pretext(tmp_path, **SMALL)
    assert record(tmp_path)["state"] == "running" and not (tmp_path / "pretext" / "model.safetensors").exists()
    pretext(tmp_path, **SMALL)
    assert len(calls) == 4 + 1  # two epochs of two steps: the last one again
    for name in ("model.safetensors", "puzzles.png"):
        assert (tmp_path / "pretext" / name).read_bytes() == (finished[1].parent / name).read_bytes()


def test_jigsaw_has_no_occlusions(tmp_path):
    weights = pretext(tmp_path, **SMALL | {"task": "jigsaw", "epochs": 1, "held_out": 0.5})
    result = record(tmp_path)["result"]
    assert set(result) == {"held_out_accuracy", "held_out_puzzles", "held_out_accuracy_0_occluded"}
    assert networks.describe(weights).task == "jigsaw"
    assert puzzle(task="jigsaw", tile=7).occlusions == 0 and puzzle(task="jigsaw", tile=7).tile == 7
    assert (puzzle(colour="released").occlusions, puzzle(colour="released").colour) == (2, "released")
    paper, released = (puzzle(task="jigsaw", colour=colour) for colour in ("paper", "released"))
    assert (paper.colour, paper.shift, released.colour, released.shift) == ("jigsaw", 2, "plain", 0)
    assert released.occlusions == 0


def puzzle(**options):
    return open_task(replace(PretextConfig(), size=48, **options)).make.keywords["puzzle"]


def some(count=12, **options):
    data = open_dataset(SCENES)
    rows = torch.arange(count)
    pixels, valid = ImageLoader(data, 48).batch(rows)
    task = open_task(replace(PretextConfig(), size=48, permutations=30, **options))
    return data, Batch(rows, pixels, valid, 3), task


def test_a_puzzle_takes_foreign_tiles_from_the_image_that_follows():
    _, batch, task = some()
    found = task.make(batch)
    table, config = task.make.keywords["permutations"](), task.make.keywords["puzzle"]
    ok = torch.ones(11).bool()
    expected = make_puzzles(batch.pixels[:-1], batch.pixels[1:], batch.rows[:-1], ok, table, config, 0, 3)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert len(found.label) == 11 and found.occluded.any()


def test_a_broken_image_makes_no_puzzle_lends_no_tiles_and_changes_no_other():
    _, batch, task = some()
    whole = task.make(batch)
    number = int(whole.occluded.sum(1)[:-1].argmax()) + 1  # the one before it would borrow its tiles
    valid = batch.valid.clone()
    valid[number] = False
    pixels = batch.pixels.clone()
    pixels[number] = 0
    left = task.make(replace(batch, valid=valid, pixels=pixels))
    kept = [row for row in range(11) if row != number]
    assert torch.equal(left.label, whole.label[kept])
    for place, row in enumerate(kept):
        assert torch.equal(left.tiles[place], whole.tiles[row]) == (row != number - 1)
    assert not left.occluded[number - 1].any()


@pytest.mark.parametrize(("images", "limit", "share", "held"), [
    (40, 0, 0.0, 0), (40, 0, 0.1, 4), (40, 0, 0.12, 5), (40, 30, 0.1, 3), (40, 50, 0.5, 20),
    (40, 0, 0.01, 2), (4, 0, 0.9, 2), (3, 0, 0.5, 1),
])  # fmt: skip
def test_images_are_split_by_the_words_of_the_seed(images, limit, share, held):
    """Two are held out at least, as many of them as leave two to train on."""
    config = PretextConfig(seed=5, limit=limit, held_out=share)
    rows, tested = stage._split(range(images), config)
    order = rng.words(5, "pretext/split", 0, torch.arange(images), 1)[:, 0].tolist()
    ranked = sorted(range(images), key=order.__getitem__)[: limit or images]
    assert tested.tolist() == ranked[:held] and rows.tolist() == ranked[held:]


def test_held_out_accuracy_is_counted_by_occluded_tiles():
    data, _, task = some()
    config = replace(PretextConfig(), batch=7, precision="float32")
    seen = []

    def readable(batch):
        """Puzzles whose tiles are the prediction; a wrong one where one tile is occluded."""
        puzzles = task.make(batch)
        seen.append((puzzles.label, puzzles.occluded))
        wrong = puzzles.occluded.sum(1) == 1
        prediction = torch.where(wrong, (puzzles.label + 1) % 30, puzzles.label)
        return puzzles._replace(tiles=nn.functional.one_hot(prediction, 30).float())

    rows = torch.arange(40)
    seeing = replace(task, make=readable)
    found = solving.accuracy(nn.Identity(), seeing, ImageLoader(data, 48), rows, config, torch.device("cpu"))
    occluded = torch.cat([part[1] for part in seen]).sum(1)
    assert set(found) == {"held_out_accuracy", "held_out_puzzles"} | {
        f"held_out_accuracy_{n}_occluded" for n in range(3)
    }
    assert [found[f"held_out_accuracy_{n}_occluded"] for n in range(3)] == [1, 0, 1]
    assert found["held_out_accuracy"] == pytest.approx((occluded != 1).double().mean().item())
    assert found["held_out_puzzles"] == 40
    first, seen[:] = list(seen), []
    solving.accuracy(nn.Identity(), seeing, ImageLoader(data, 48), rows, config, torch.device("cpu"))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(first, seen, strict=True))


def test_held_out_numbers_without_any_puzzle_are_left_out(tmp_path):
    data, _, task = some(task="jigsaw")
    config, cpu = replace(PretextConfig(), precision="float32", batch=2), torch.device("cpu")

    def model(tiles):
        return torch.zeros(len(tiles), 30)

    found = solving.accuracy(model, task, ImageLoader(data, 48), torch.arange(5), config, cpu)
    assert set(found) == {"held_out_accuracy", "held_out_puzzles", "held_out_accuracy_0_occluded"}
    assert solving.accuracy(model, task, ImageLoader(data, 48), torch.arange(0), config, cpu) == {}

    root = folder_of_images(tmp_path / "data", 6)
    for row in (4, 5):
        (root / f"{row:02}.jpg").write_text("broken")
    data = open_dataset(str(root))
    found = solving.accuracy(model, task, ImageLoader(data, 48), torch.arange(6), config, cpu)
    assert found["held_out_puzzles"] == 4
    assert solving.accuracy(model, task, ImageLoader(data, 48), torch.tensor([4, 5]), config, cpu) == {}


def test_a_broken_image_is_counted_and_borne_up_to_a_share(tmp_path):
    root = folder_of_images(tmp_path / "data")
    (root / "03.jpg").write_text("not an image")
    options = SMALL | {"data": str(root), "epochs": 1, "held_out": 0.0}
    weights = pretext(tmp_path / "run", **options, max_broken=0.05)
    assert len(record(tmp_path / "run")["broken"]) == 1
    assert all(value.isfinite().all() for value in load_file(weights).values())
    assert math.isfinite(metrics(tmp_path / "run")[0]["loss"])
    assert not any("held_out_accuracy" in line for line in metrics(tmp_path / "run"))
    with pytest.raises(StageError, match=r"1 of 20 images[^\n]*03\.jpg"):
        pretext(tmp_path / "strict", **options, max_broken=0.04)
    assert record(tmp_path / "strict")["state"] == "failed"
    assert not (tmp_path / "strict" / "pretext" / "model.safetensors").exists()


def test_limit_takes_the_first_of_a_seeded_order():
    data = open_dataset(SCENES)
    sets = {}
    for limit in (4, 10, 20, 0):
        rows, held_out = stage._split(data, replace(PretextConfig(), limit=limit, held_out=0.2))
        together = rows.tolist() + held_out.tolist()
        assert len(set(together)) == len(together) == (limit or 40)
        assert len(held_out) == max(2, round(0.2 * (limit or 40)))
        sets[limit] = set(together)
    assert sets[4] < sets[10] < sets[20] < sets[0] == set(range(40))
    other = stage._split(data, replace(PretextConfig(), limit=20, seed=1))
    assert set(torch.cat(other).tolist()) != sets[20]
    rows, held_out = stage._split(data, replace(PretextConfig(), held_out=0.0))
    assert (len(rows), len(held_out)) == (40, 0)


def test_limit_is_what_is_trained_on(tmp_path):
    pretext(tmp_path, **SMALL | {"limit": 10, "batch": 4, "epochs": 1})
    steps = [line["step"] for line in metrics(tmp_path)]
    assert steps == [2, 2]  # 8 images, two steps: the epoch's line, and the held-out one
    assert metrics(tmp_path)[1]["held_out_puzzles"] == 2


def test_permutations_from_a_file(tmp_path):
    path = tmp_path / "perms.bin"
    perms.write(path, perms.generate(9, 5, seed=3))
    weights = pretext(tmp_path / "run", **SMALL | {"permutation_file": str(path), "epochs": 1})
    assert load_file(weights)["head.fc8.weight"].shape[0] == 9
    digest = record(tmp_path / "run")["inputs"]["permutations"]
    assert digest == perms.summarise(perms.generate(9, 5, seed=3)).sha256
    config = replace(PretextConfig(), permutation_file=str(path))
    assert torch.equal(tasks._permutations(config), torch.from_numpy(perms.generate(9, 5, seed=3)).long())
    perms.write(path, perms.generate(3, 2, tiles=4))
    with pytest.raises(UsageError, match="holds 3 permutations of 4 tiles; a puzzle needs at least 2 of 9"):
        pretext(tmp_path / "other", **SMALL | {"permutation_file": str(path)})
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="not a permutation file"):
        pretext(tmp_path / "other", **SMALL | {"permutation_file": str(path)})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": None}, "no images were given; name them with --data"),
        ({"data": "scenes:images=40,size=48,shape=1"}, "scenes"),
        ({"data": "/no/such/folder"}, "does not exist"),
        ({"arch": "resnet18"}, "--arch resnet18: no such network"),
        ({"arch": "torchvision:vgg16"}, "no such network"),
        ({"tile": 17}, "tile 17 is larger than a cell of 16"),
        ({"size": 24}, "tiles of 6 pixels are too small for any network; give at least --size 30"),
        ({"tile": 7}, "--tile 7: too small"),
        ({"colour": "projected"}, "--colour projected: --task jigsawpp takes paper or released"),
        ({"task": "rotations"}, "must be one of jigsawpp, jigsaw, rotation, context"),
        ({"overfit": 41}, "40 images are too few"),
        ({"limit": 3}, "--limit 3: too few"),
        ({"device": "abacus"}, "--device abacus"),
        ({"permutations": 9**9}, "permutations"),
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"batch": 1}, "must be at least 2"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(tmp_path, given, message):
    with pytest.raises(UsageError) as caught:
        pretext(tmp_path / "run", **SMALL | given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_too_few_images(tmp_path):
    root = folder_of_images(tmp_path / "data", 3)
    with pytest.raises(UsageError, match="3 images are too few; give at least 4"):
        pretext(tmp_path / "run", **SMALL | {"data": str(root)})


@pytest.mark.parametrize("arch", ["alexnet", "vgg16_bn"])
def test_the_network_sees_all_nine_tiles_in_their_slots(arch):
    network = Network(arch, 0.1, 2, 144, normalise="picture")
    model = TaskNet(network, 9, 36, 20, seed=1).eval()
    assert all(module.training for module in TaskNet(network, 9, 36, 20, seed=1).modules())
    tiles = torch.randn(2, 9, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tiles)
        assert logits.shape == (2, 20)
        torch.testing.assert_close(model(tiles[1:]), logits[1:], atol=1e-5, rtol=1e-4)
        for slot in range(9):
            changed = tiles.clone()
            changed[0, slot] *= -1
            other = model(changed)
            assert not torch.allclose(other[0], logits[0], atol=1e-6)
            torch.testing.assert_close(other[1], logits[1], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(tiles.roll(1, dims=1)), logits, atol=1e-6)
    # The trunk and fc6 are shared: their size does not grow with the number of tiles.
    fc6, fc7 = model.head.fc6, model.head.fc7
    assert fc7.in_features == 9 * fc6.out_features


def test_full_sizes_of_the_head():
    with torch.random.fork_rng():
        alexnet = TaskNet(Network("alexnet", 1.0, 2, 255), 9, 64, 701, 0).head
    assert (alexnet.fc6.in_features, alexnet.fc6.out_features) == (256 * 3 * 3, 1024)
    assert (alexnet.fc7.in_features, alexnet.fc7.out_features, alexnet.fc8.out_features) == (9216, 4096, 701)
    vgg = TaskNet(Network("vgg16_bn", 0.25, 2, 255), 9, 64, 701, 0).head
    assert vgg.fc6.in_features == 128 * 4 * 4
