"""Self-training on masks: its files, its loss by hand, kills, masks of others, and refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SELFTRAIN
from torch import nn

from ktransfer.detection import canvas, masks, saved
from ktransfer.detection.opening import open_detection
from ktransfer.errors import StageError, UsageError
from ktransfer.retrain import SelftrainConfig, selftrain
from ktransfer.retrain.selftraining import boxes, segmenting, student
from ktransfer.training import loop
from ktransfer.training.batch import Batch

SMALL = SELFTRAIN | {"task": "segment", "head": "fpn", "augment": "S4", "threshold": 0.05}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    selftrain(run, **SMALL)
    return run


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def contents(run):
    folder = run / "selftrain"
    names = ("teacher/model.safetensors", "student/model.safetensors", "pseudo.json", "scores.json")
    kept = [*names, *(f"pseudo/{path.name}" for path in sorted((folder / "pseudo").iterdir()))]
    return {name: (folder / name).read_bytes() for name in kept}


def config(**more):
    return SelftrainConfig(**(SMALL | more))


def test_files_and_scores(made, capsys):
    folder = made / "selftrain"
    steps = json.loads((folder / "stage.json").read_text())
    assert list(steps) == ["teacher", "pseudo", "student", "scores"]
    assert steps["pseudo"]["result"] == {"images": 8, "masks": 8}
    assert steps["student"]["result"]["pseudo-pixels"] > 0
    assert saved.describe(folder / "teacher" / "model.safetensors").settings.kind == "fpn"
    found = json.loads((folder / "scores.json").read_text())
    assert "test_threshold" not in found
    for scores in found["scores"].values():
        assert 0 <= scores["mIoU_interval"][0] <= scores["mIoU"] <= scores["mIoU_interval"][1] <= 1
        assert "background" in scores["classes"]
    lines = [json.loads(line) for line in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
    assert {"human_loss", "pseudo_loss", "ratio", "human_right", "pseudo_right", "pseudo_known"} <= set(lines[-1])
    before = contents(made)
    selftrain(made, **SMALL)
    assert contents(made) == before
    assert "| teacher |" in capsys.readouterr().out


def test_masks_are_the_teachers_predictions(made):
    """Each pixel again by hand: one image at a time, and its mirror image by turning the array."""
    folder = made / "selftrain"
    model, described = saved.load(folder / "teacher" / "model.safetensors")
    data = open_detection(SMALL["labelled"])[0]
    place = {key: row for row, key in enumerate(data.keys)}
    held = json.loads((folder / "pseudo.json").read_text())
    assert len(held["images"]) == 8
    ignored = 0
    for one in held["images"]:
        pixels = torch.from_numpy(data.read(place[one["file_name"]], None).copy()).permute(2, 0, 1)[None]
        prepared = canvas.normalise(pixels, torch.tensor([[64.0, 64.0]]), described.network.normalise)
        with torch.no_grad():
            seen = model.eval()(prepared).softmax(1) + model(prepared.flip(3)).softmax(1).flip(3)
        likely, wanted = (seen / 2).max(1)
        with Image.open(folder / one["mask"]) as image:
            assert image.mode == "P"
            found = np.array(image)
        sure = (likely - SMALL["threshold"]).abs()[0].numpy() > 1e-4
        expected = torch.where(likely >= SMALL["threshold"], wanted, 255)[0].numpy()
        assert (found == expected)[sure].mean() > 0.999
        ignored += (found == 255).sum()
    assert not ignored  # of 13 classes the likeliest has more than 1 / 20


def test_every_parameter_of_a_fresh_segmenter_moves(made):
    path = made / "selftrain" / "student" / "model.safetensors"
    fresh = dict(saved.make(saved.describe(path), 0).named_parameters())
    trained = dict(saved.load(path)[0].named_parameters())
    assert [name for name, value in fresh.items() if torch.equal(value, trained[name])] == []


def test_killed_between_two_masks_it_looks_at_the_same_groups_again(made, copy, monkeypatch):
    """One image alone differs in its last digits from the same in a group."""
    folder = copy / "selftrain"
    records = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({"teacher": records["teacher"]}))
    shutil.rmtree(folder / "pseudo")
    for name in ("pseudo.json", "scores.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "student")
    original, written = masks.save_map, []
    looks, seen = segmenting.segmentation.probabilities, []

    def save_map(path, found):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path.name)
        original(path, found)

    def probabilities(model, pixels, *rest):
        seen.append(pixels)
        return looks(model, pixels, *rest)

    monkeypatch.setattr(segmenting.segmentation, "probabilities", probabilities)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(masks, "save_map", save_map)
        selftrain(copy, **SMALL)
    assert sorted(path.name for path in (folder / "pseudo").iterdir()) == sorted(written)
    assert not (folder / "pseudo.json").exists()
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(masks, "save_map", lambda path, found: (written.append(path.name), original(path, found)))
        selftrain(copy, **SMALL)
    assert [len(pixels) for pixels in seen[:3]] == [4, 4, 4]
    assert torch.equal(seen[1], seen[2])
    assert written == [path.name for path in sorted((folder / "pseudo").iterdir())[4:]]
    assert contents(copy) == contents(made)


def test_a_killed_student_ends_with_the_same_bytes(made, copy, monkeypatch):
    folder = copy / "selftrain"
    records = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({name: records[name] for name in ("teacher", "pseudo")}))
    shutil.rmtree(folder / "student")
    original = loop.fit

    def fit(model, loss, *rest, **more):
        calls = []

        def killed(model, batch):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return loss(model, batch)

        original(model, killed, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ktransfer.training.checkpoint.SECONDS", 0.0)
        patch.setattr("ktransfer.training.checkpoint.SHARE", 1e9)
        patch.setattr(loop, "fit", fit)
        selftrain(copy, **SMALL)
    assert (folder / "student" / "checkpoint" / "last.pt").is_file()
    selftrain(copy, **SMALL)
    assert contents(copy) == contents(made)


def test_overwrite_makes_masks_anew(made, copy):
    changed = SMALL | {"threshold": 1.0}
    with pytest.raises(UsageError, match=r"pseudo in .* was made differently: threshold"):
        selftrain(copy, **changed)
    with pytest.raises(StageError, match=r"no pseudo-pixel of a class reaches the score 1.0"):
        selftrain(copy, **changed, overwrite=True)
    found = masks.read_map(copy / "selftrain" / "pseudo" / "0000000.png")
    assert (found == 255).all()


class Painted(nn.Module):
    """In place of a segmenter: logits that are functions of the pixels and one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, pixels):
        return torch.cat([pixels * self.weight, pixels.sum(1, keepdim=True)], dim=1)


def by_hand(model, pixels, wanted):
    logits = model(pixels).detach().double().numpy()
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    values = [-logs[image, wanted[image, y, x], y, x] for image, y, x in zip(*np.nonzero(wanted != 255), strict=True)]
    return float(np.mean(values))


@pytest.mark.parametrize("balance", ["normalised", "plain"])
def test_the_loss_is_the_formula_over_the_known_pixels_of_each_half(balance):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (4, 32, 32), generator=generator).byte()
    maps[2, :20] = 255
    extents = torch.tensor([[32.0, 32], [32, 32], [32, 32], [32, 16]])
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=generator).byte()
    known = segmenting.Known(maps, extents)
    alpha, decay = 0.3, 0.8
    model = student.Student(Painted())
    loss = segmenting.losses(known, "imagenet", "none", 0, student.Weighing(balance, alpha, decay), split=2)
    seen, wanted = canvas.normalise(pixels, extents, "imagenet"), maps.numpy().copy()
    wanted[3, 16:] = 255  # padding
    means = np.zeros(2)
    for weight in (0.7, 2.0):
        with torch.no_grad():
            model.detector.weight.fill_(weight)
        order = torch.tensor([2, 0, 3, 1])
        value, sums = loss(model, Batch(order, pixels[order], torch.ones(4).bool(), 0))
        halves = [by_hand(model.detector, seen[part], wanted[part]) for part in (slice(0, 2), slice(2, 4))]
        means = decay * means + (1 - decay) * np.array(halves)
        ratio = means[0] / means[1] if balance == "normalised" else 1.0
        expected = (halves[0] + alpha * ratio * halves[1]) / (1 + alpha if balance == "normalised" else 1)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert float(sums["human_loss"]) == pytest.approx(4 * halves[0], rel=1e-5)
        assert float(sums["pseudo_known"]) == pytest.approx(4 * (12 * 32 + 16 * 32) / (2 * 32 * 32))
    value.backward()
    assert model.detector.weight.grad.abs() > 0
    whole, sums = segmenting.losses(known, "imagenet", "none", 0)(
        model.detector, Batch(torch.arange(4), pixels, torch.ones(4).bool(), 0)
    )
    assert whole.item() == pytest.approx(by_hand(model.detector, seen, wanted), rel=1e-5)


def test_a_half_that_cannot_be_read_adds_nothing():
    known = segmenting.Known(torch.zeros(4, 32, 32).byte(), torch.full((4, 2), 32.0))
    loss = segmenting.losses(known, "imagenet", "S2", 0, student.Weighing("plain", 1.0, 0.9), split=2)
    pixels = torch.zeros(4, 3, 32, 32).byte()
    model = student.Student(Painted())
    value, sums = loss(model, Batch(torch.arange(4), pixels, torch.tensor([True, True, False, False]), 0))
    assert float(sums["pseudo_loss"]) == float(sums["pseudo_known"]) == 0
    assert torch.isfinite(value)


@pytest.fixture
def listed(tmp_path):
    """Masks of two scenes, made by somebody else, classes in another order: all of the first one's last class."""
    data = open_detection("scenes:images=12,size=64")[0]
    classes = list(reversed(data.classes))
    (tmp_path / "m").mkdir()
    for name, number in (("a", 1), ("b", 0)):
        image = Image.fromarray(np.full((64, 64), number, np.uint8))
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.save(tmp_path / "m" / f"{name}.png")
    found = [{"file_name": data.keys[row], "mask": f"m/{name}.png"} for row, name in ((4, "a"), (2, "b"))]
    (tmp_path / "list.json").write_text(json.dumps({"classes": classes, "images": found}))
    return boxes.without_boxes(data, data), tmp_path / "list.json"


def test_masks_of_others(listed):
    data, path = listed
    found, rows = segmenting.read(path, data, data, config())
    assert rows.tolist() == [2, 4]
    assert (masks.classes_of_pixels(found, 4) == 12).all()
    assert segmenting.count(found, 4).tolist() == [0] * 11 + [64 * 64]
    assert not segmenting.count(found, 2).any()
    data.sizes[4] = boxes.UNREADABLE  # a broken image stops nothing by itself
    assert not segmenting.count(segmenting.read(path, data, data, config())[0], 4).any()
    data.sizes[4] = 64
    truth = open_detection("scenes:images=12,size=64")[0]
    outlines = ({"size": [64, 64], "counts": [7]},) * len(truth.objects[0].boxes)
    object.__setattr__(truth, "objects", (truth.objects[0]._replace(outlines=outlines), *truth.objects[1:]))
    assert not segmenting.count(truth, 0).any() and segmenting.known(truth, config(), torch.device("cpu"))[
        1
    ].keys() == {0}
    both = student.joined(truth, found)
    np.testing.assert_array_equal(masks.classes_of_pixels(both, 3), masks.classes_of_pixels(truth, 3))
    assert (masks.classes_of_pixels(both, len(truth) + 4) == 12).all()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mask", "../out.png", "lies outside of its folder"),
        ("mask", "/etc/hostname", "lies outside of its folder"),
        ("mask", "m/none.png", "is missing"),
        ("mask", "m/\0.png", "is not a file name"),
        ("mask", "m" * 5000, "is not a file name"),
        ("file_name", "x/1", "1 of its images are not those"),
    ],
)
def test_a_list_that_leads_elsewhere_is_refused(listed, key, value, words):
    data, path = listed
    (path.parent.parent / "out.png").write_bytes((path.parent / "m" / "a.png").read_bytes())
    held = json.loads(path.read_text())
    held["images"][0][key] = value
    path.write_text(json.dumps(held))
    with pytest.raises(UsageError, match=words):
        segmenting.read(path, data, data, config())


def test_a_link_out_of_the_folder_is_refused(listed):
    data, path = listed
    (path.parent / "m" / "a.png").rename(path.parent.parent / "a.png")
    (path.parent / "m" / "a.png").symlink_to(path.parent.parent / "a.png")
    with pytest.raises(UsageError, match="lies outside"):
        segmenting.read(path, data, data, config())


def test_lists_and_masks_that_are_none(listed):
    data, path = listed
    text = path.read_text()
    for wrong, words in (("{", "cannot be read as JSON"), ("[]", "lacks"), ('{"images": []}', "lacks 'classes'")):
        path.write_text(wrong)
        with pytest.raises(UsageError, match=words):
            segmenting.read(path, data, data, config())
    path.write_text(text.replace("arrow", "barrow"))
    with pytest.raises(UsageError, match=r"1 of its classes .* such as barrow"):
        segmenting.read(path, data, data, config())
    held = json.loads(text)
    path.write_text(json.dumps(held | {"classes": held["classes"] * 2}))
    with pytest.raises(UsageError, match="names a class twice"):
        segmenting.read(path, data, data, config())
    held["images"][0]["sha256"] = "0"
    path.write_text(json.dumps(held))
    found, _ = segmenting.read(path, data, data, config())
    with pytest.raises(StageError, match="was changed afterwards"):
        segmenting.count(found, 4)
    path.write_text(text)
    found, _ = segmenting.read(path, data, data, config())
    for pixels in (np.ones((64, 32), np.uint8), np.full((64, 64), 77, np.uint8)):
        masks.save_map(path.parent / "m" / "a.png", pixels)
        with pytest.raises(StageError, match="64 x 64 pixels and the numbers of 12 classes"):
            segmenting.count(found, 4)
    Image.new("RGB", (64, 64)).save(path.parent / "m" / "a.png")
    with pytest.raises(StageError, match="no palette"):
        segmenting.count(found, 4)


def test_a_teacher_and_masks_of_another_run(made, tmp_path):
    folder = made / "selftrain"
    own = {"teacher": str(folder / "teacher" / "model.safetensors"), "pseudo": str(folder / "pseudo.json")}
    path = selftrain(tmp_path / "run", **(SMALL | own | {"empty": "drop", "balance": "plain", "ema": 0.5}))
    assert list(json.loads((path.parent / "stage.json").read_text())) == ["student", "scores"]
    with pytest.raises(UsageError, match=r"--teacher .*: a fpn, and --task detect takes one of retinanet, fasterrcnn"):
        selftrain(tmp_path / "other", **(SMALL | {"task": "detect", "head": "fcn", "teacher": own["teacher"]}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 2}, "--patience: is not for --task segment"),
        ({"held_out": 0.2}, "--held-out: is not for --task segment"),
        ({"head": "fcn"}, "--channels: is not for --head fcn"),
        ({"methods": "self,joint"}, "--methods joint: is not for --task segment"),
        ({"anchor": 2.0}, "--anchor: is not for --task segment; leave it out"),
        ({"test_threshold": 0.1}, "--test-threshold: is not for --task segment"),
        ({"adaptive": True}, "--adaptive: counts boxes"),
        ({"scales": "1,x"}, "--scales 1,x: must be numbers"),
        ({"scales": "0.1"}, "from 0.25 to 4"),
        (
            {"head": "deeplab", "channels": 256, "norm": "bn", "fraction": 0.0625},
            "--head deeplab: batch norm needs two",
        ),
        ({"head": "unet"}, "must be one of fcn, deeplab, fpn"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(tmp_path, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        selftrain(tmp_path / "run", **(SMALL | options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "selftrain").exists()


def test_masks_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "available_bytes", lambda: 1000)
    with pytest.raises(UsageError, match="--size 64: the masks of 16 images"):
        selftrain(tmp_path / "run", **SMALL)
