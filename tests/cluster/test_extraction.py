"""The extract stage against a forward pass written out here, over broken images and interruptions."""

import json
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchvision.models.vgg import cfgs, make_layers

from ktransfer import networks
from ktransfer.artifacts.features import create_or_resume, open_features
from ktransfer.cli import main
from ktransfer.cluster import extract, extraction
from ktransfer.data.opening import open_dataset
from ktransfer.errors import StageError, UsageError
from ktransfer.images.decoding import square
from ktransfer.networks import Network

EXACT = {"precision": "float32", "dtype": "float32"}


def record(run, name):
    return json.loads((run / "features" / "stage.json").read_text())[name]


def squares(data, size):
    """(n, 3, size, size) float32, each image normalised by itself."""
    pixels = np.stack([square(data.read(row, size), size) for row in range(len(data))]).astype(np.float64)
    mean = pixels.mean(axis=(1, 2, 3), keepdims=True)
    x = (pixels - mean) / np.sqrt(pixels.var(axis=(1, 2, 3), keepdims=True) + 1e-5)
    return torch.from_numpy(x.transpose(0, 3, 1, 2)).float()


@torch.no_grad()
def maps_of(weights, x, last):
    """The maps after module `last` of the teacher, in evaluation mode, through torchvision's own layers."""
    plan = [networks.scaled(c, 0.05) if isinstance(c, int) else c for c in cfgs["D"]]
    upto = [place for place, c in enumerate(plan) if c == "M"][3]
    trunk = make_layers(plan[:upto], batch_norm=True).eval()
    state = load_file(weights)
    trunk.load_state_dict({key.removeprefix("features."): v for key, v in state.items() if key.startswith("features.")})
    return trunk[: last + 1](x)


@pytest.mark.parametrize(
    ("layer", "module", "pool", "size"),
    [(None, 26, 4, 0), ("conv4_3", 32, 4, 0), ("conv1_2", 5, 3, 40), ("conv3_1", 16, 1, 48)],
)
def test_rows_are_a_forward_pass(run, layer, module, pool, size):
    path = extract(run, layer=layer, pool=pool, size=size, **EXACT)
    data = open_dataset("scenes:images=40,size=48")
    weights = run / "pretext" / "model.safetensors"
    side = size or networks.describe(weights).size
    wanted = maps_of(weights, squares(data, side), module)
    wanted = torch.nn.functional.adaptive_max_pool2d(wanted, pool).flatten(1).numpy()
    found = open_features(path)
    assert found.rows.dtype == np.float32
    np.testing.assert_allclose(found.rows, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    assert found.rows.std() > 0
    assert found.keys == list(data.keys)
    np.testing.assert_array_equal(found.targets, data.targets)
    assert found.valid.all()
    assert found.attributes["layer"] == (layer or "conv4_1")
    assert found.attributes["fingerprint"] == data.fingerprint
    assert str(side) in found.attributes["transform"]
    made = record(run, "scenes")
    assert made["result"] == {"rows": 40, "dim": found.rows.shape[1]}
    assert made["config"]["layer"] == (layer or "conv4_1")
    assert made["broken"] == []


def test_float16_and_any_batch_give_the_same_rows(run):
    wide = open_features(extract(run, name="wide", **EXACT)).rows
    half = open_features(extract(run, name="half", precision="float32", batch=7)).rows
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, wide, rtol=2e-3, atol=1e-3)


def test_l2_rows_have_length_one_and_the_same_direction(run):
    plain = open_features(extract(run, name="plain", **EXACT)).rows
    unit = open_features(extract(run, name="unit", l2=True, **EXACT))
    np.testing.assert_allclose(np.linalg.norm(unit.rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(unit.rows, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)
    assert "l2" in unit.attributes["pooling"]


def test_broken_images_keep_their_row(run, folder):
    path = extract(run, data=str(folder), max_broken=0.1, batch=4)
    found = open_features(path)
    assert path.name == "pics.h5"
    assert len(found.keys) == 24
    assert found.keys[5] == "a/05.jpg"
    assert np.flatnonzero(~found.valid).tolist() == [5]
    assert not found.rows[5].any()
    assert np.abs(found.rows[found.valid].astype(np.float32)).sum(axis=1).min() > 0
    assert found.targets.tolist() == [0] * 12 + [1] * 12
    [line] = record(run, "pics")["broken"]
    assert line.startswith("a/05.jpg: ")
    assert len(line) > len("a/05.jpg: ")


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
def test_interrupted_extraction_gives_the_same_bytes(run, folder, monkeypatch, batches):
    options = {"data": str(folder), "max_broken": 0.1, "batch": 4}
    whole = extract(run, **options)
    expected, listed = whole.read_bytes(), record(run, "pics")["broken"]
    extract(run, overwrite=True, name="other", **options)

    def killed_after(*args, **kwargs):
        writer = create_or_resume(*args, save_seconds=0.0, **kwargs)
        write, left = writer.write, iter(range(batches))

        def stop(start, rows, valid):
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(start, rows, valid)

        writer.write = stop
        return writer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "create_or_resume", killed_after)
        extract(run, overwrite=True, **options)
    assert not whole.exists()
    assert record(run, "pics")["state"] == "running"
    seen = []

    def watched(*args, **kwargs):
        writer = create_or_resume(*args, **kwargs)
        seen.append(writer.rows_done)
        return writer

    monkeypatch.setattr(extraction, "create_or_resume", watched)
    assert extract(run, **options).read_bytes() == expected
    assert seen == [4 * batches]
    assert record(run, "pics")["broken"] == listed
    assert record(run, "pics")["state"] == "done"
    assert sorted(p.name for p in (run / "features").iterdir()) == ["other.h5", "pics.h5", "stage.json"]


def test_too_many_broken_images_fail_also_when_they_were_met_before_an_interruption(run, folder, monkeypatch):
    options = {"data": str(folder), "batch": 4}
    with pytest.raises(StageError, match=r"1 of 24 .*a/05.jpg.*--max-broken"):
        extract(run, **options)
    assert not (run / "features" / "pics.h5").exists()
    assert record(run, "pics")["state"] == "failed"
    # What is done is on disk: now not one broken image is met, and still there are too many.
    monkeypatch.setattr(extraction, "create_or_resume", partial(create_or_resume, save_seconds=0.0))
    with pytest.raises(StageError, match="1 of 24"):
        extract(run, **options)
    with pytest.raises(StageError, match="1 of 24"):
        extract(run, **options)
    assert not (run / "features" / "pics.h5").exists()
    assert extract(run, max_broken=0.05, **options).is_file()
    assert len(record(run, "pics")["broken"]) == 1


def test_done_is_skipped_and_a_change_is_refused(run):
    path = extract(run)
    before = path.read_bytes()
    changed = path.stat().st_mtime_ns
    assert extract(run) == path
    assert extract(run, workers=1) == path
    assert path.stat().st_mtime_ns == changed
    with pytest.raises(UsageError, match=r"pool was 4, is 2.*extract --overwrite"):
        extract(run, pool=2)
    assert path.read_bytes() == before
    assert open_features(extract(run, pool=2, overwrite=True)).rows.shape[1] < 384


def test_two_data_sets_in_one_run(run, folder):
    first = extract(run)
    before = first.read_bytes()
    second = extract(run, data=str(folder), max_broken=0.1)
    third = extract(run, data=str(folder), name="other", layer="conv3_1", max_broken=0.1)
    assert [path.name for path in (first, second, third)] == ["scenes.h5", "pics.h5", "other.h5"]
    assert first.read_bytes() == before
    records = json.loads((run / "features" / "stage.json").read_text())
    assert set(records) == {"scenes", "pics", "other"}
    for name, path in (("scenes", first), ("pics", second), ("other", third)):
        assert list(records[name]["outputs"]) == [path.name]
        assert records[name]["inputs"]["data"] == open_features(path).attributes["fingerprint"]


def test_a_teacher_of_its_own(run, tmp_path):
    network = Network("alexnet", 0.05, 2, 48, 7)
    model = networks.build(network, 3, "test")
    weights = tmp_path / "given.safetensors"
    networks.save(weights, model.state_dict(), network)
    path = extract(tmp_path / "new", data="scenes:images=12,size=48", teacher=str(weights), pool=2, **EXACT)
    found = open_features(path)
    assert found.attributes["layer"] == "conv4"
    assert found.attributes["teacher"] == record(tmp_path / "new", "scenes")["inputs"]["teacher"]
    data = open_dataset("scenes:images=12,size=48")
    pixels = torch.stack([torch.tensor(data.read(row, None)).permute(2, 0, 1) for row in range(12)])
    keep = {}
    model.relu4.register_forward_hook(lambda _m, _i, out: keep.update(maps=out))
    with torch.no_grad():
        model.eval()(networks.normalise(pixels, "imagenet"))
    wanted = torch.nn.functional.adaptive_max_pool2d(keep["maps"], 2).flatten(1).numpy()
    np.testing.assert_allclose(found.rows, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    # A classifier whose weights belong to 48 pixels is no hindrance to another size: it is not read.
    assert extract(tmp_path / "new", data=data.spec, teacher=str(weights), size=64, name="larger").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": "conv9"}, r"--layer conv9: vgg16_bn.*conv1_1, conv1_2.*conv4_3"),
        ({"token": "cls"}, r"--token cls: vgg16_bn is not a transformer with tokens; leave --token out"),
        ({"arch": "resnet18"}, r"--arch resnet18: belongs to --teacher, which was not given"),
        ({"weights": "w.pth"}, r"--weights w.pth: belongs to --teacher, which was not given"),
        ({"teacher": "hog", "arch": "resnet18"}, r"--teacher hog already names the network; leave --arch out"),
        ({"teacher": "hog", "pool": 2}, r"--pool 2: the features of hog are not pooled"),
        ({"teacher": "hog", "size": 30}, r"--size 30: hog has cells of 8 pixels"),
        ({"teacher": "hog", "layer": "conv1"}, r"--layer conv1: hog has no such layer; valid: hog"),
        ({"teacher": "torchvision:resnet81"}, r"no such network; did you mean 'resnet18'"),
        ({"teacher": "hogg"}, r"--teacher hogg: no such file; give .*hog, pixels or pkg.module:function"),
        ({"size": 5}, r"--size 5: vgg16_bn does not take images so small"),
        ({"teacher": "none.safetensors"}, "none.safetensors"),
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"pool": 0}, "pool = 0"),
        ({"dtype": "float64"}, "float16, float32"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(run, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        extract(run, **options)
    assert "\n" not in str(caught.value)
    assert not (run / "features").exists()


def test_the_list_of_layers_is_an_prediction(run, capsys):
    before = sorted(run.rglob("*"))
    assert main(["--run", str(run), "extract", "--layer", "list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    side = networks.describe(run / "pretext" / "model.safetensors").size
    assert shown[0].startswith(f"vgg16_bn, images of {side} x {side}: ")
    names = [f"conv{block}_{place}" for block in (1, 2, 3, 4) for place in range(1, 3 + (block > 2))]
    assert [line.split()[0] for line in shown[1:]] == names
    assert shown[1].split()[1:] == ["8", "x", str(side), "x", str(side)]
    assert sorted(run.rglob("*")) == before
    assert main(["--run", str(run), "extract", "--teacher", "hog", "--layer", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["hog", "36", "x", "7", "x", "7"]


def test_without_teacher_or_images(tmp_path):
    with pytest.raises(UsageError, match="no images were given"):
        extract(tmp_path / "new")
    with pytest.raises(UsageError, match="pretext is missing"):
        extract(tmp_path / "new", data="scenes:images=12,size=48")
    (tmp_path / "wrong.safetensors").write_bytes(b"hello")
    with pytest.raises(UsageError, match="not a weight file"):
        extract(tmp_path / "new", data="scenes:images=12,size=48", teacher=str(tmp_path / "wrong.safetensors"))
    assert not (tmp_path / "new").exists()


def test_the_file_is_plain_hdf5(run):
    with h5py.File(extract(run)) as file:
        assert file["features"].chunks is None
        assert set(file) == {"features", "key", "valid", "target"}
        assert file.attrs["rows_done"] == 40
