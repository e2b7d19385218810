"""Images of which nothing can be read, as many as `--max-broken 1` allows: each stage says so in one line."""

import shutil

import numpy as np
import pytest
from PIL import Image

from ktransfer.cluster import cluster, extract
from ktransfer.errors import StageError, UsageError
from ktransfer.pretext import pretext
from ktransfer.retrain import retrain, selftrain

PRETEXT = {"arch": "vgg16_bn", "width": 0.05, "epochs": 1, "batch": 64, "permutations": 10, "max_broken": 1, "size": 48}
SELFTRAIN = {
    "backbone": "alexnet_bn",
    "width": 0.1,
    "size": 64,
    "epochs": 1,
    "batch": 2,
    "detector": "retinanet",
    "channels": 16,
    "init": "random",
    "max_broken": 1,
}


@pytest.fixture
def data(tmp_path):
    """`names` as images of two class folders, of which those that are not `sound` are no images."""

    def make(sound, count=12):
        draws = np.random.default_rng(0)
        for number in range(count):
            path = tmp_path / "data" / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 255, (50, 50, 3)).astype(np.uint8)).save(path)
            if number not in sound:
                path.write_bytes(b"\x89PNG no image")
        return str(tmp_path / "data")

    return make


def refused(kind, words, stage, run, **options):
    with pytest.raises(kind, match=words) as caught:
        stage(run, **options)
    assert "\n" not in str(caught.value)


def test_pretext(tmp_path, data):
    spec = data(())
    refused(UsageError, "none of its .* training images can be read", pretext, tmp_path / "run", data=spec, **PRETEXT)
    assert not (tmp_path / "run").exists()


def test_pretext_of_which_only_held_out_images_are_left(tmp_path, data):
    from ktransfer.data.opening import open_dataset
    from ktransfer.pretext.config import PretextConfig
    from ktransfer.pretext.stage import _split

    _, held = _split(open_dataset(data(range(12))), PretextConfig(held_out=0.5))
    keys = open_dataset(data(range(12))).keys
    spec = data([int(keys[row][2:4]) for row in held.tolist()])
    options = PRETEXT | {"data": spec, "held_out": 0.5}
    refused(UsageError, "none of its 6 training images can be read", pretext, tmp_path / "run", **options)


def test_a_batch_larger_than_the_data(tmp_path, data):
    assert pretext(tmp_path / "run", data=data(range(12)), **PRETEXT).is_file()


def test_extract_and_cluster(run, data):
    refused(UsageError, "none of its 12 images can be read", extract, run, data=data(()), max_broken=1)
    assert not (run / "features").exists()
    path = extract(run, data=data(range(3)), max_broken=1, size=48)
    assert path.is_file()
    refused(UsageError, "--k 4: more clusters than the 3 images", cluster, run, k=4, features=str(path))


def test_retrain(tmp_path, data):
    small = {"labels": "classes", "arch": "alexnet_bn", "width": 0.05, "stride": 2, "epochs": 1, "size": 48}
    small |= {"max_broken": 1, "batch": 64}
    refused(StageError, "cannot be read|can be read", retrain, tmp_path / "none", data=data(()), **small)
    one = data(range(0, 12, 2))
    refused(StageError, "the 6 images .* all have one label", retrain, tmp_path / "one", data=one, **small)
    shutil.rmtree(one)
    assert retrain(tmp_path / "two", data=data(range(2)), **small).is_file()


@pytest.fixture
def boxes(tmp_path):
    """A COCO folder of 6 training and 3 test images with a box each; those that are not `sound` are no images."""

    def make(train, val):
        import json

        for part, count, sound in (("train", 6, train), ("val", 3, val)):
            folder = tmp_path / "coco" / part
            folder.mkdir(parents=True, exist_ok=True)
            images, notes = [], []
            for number in range(count):
                path = folder / f"{part}{number}.png"
                Image.new("RGB", (64, 64), (40 * number, 9, 90)).save(path)
                if number not in sound:
                    path.write_bytes(b"\x89PNG no image")
                images.append({"id": number, "file_name": path.name, "width": 64, "height": 64})
                corners = [8, 8, 40, 8, 40, 40, 8, 40]
                notes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 32, 32]})
                notes[-1] |= {"area": 1024, "iscrowd": 0, "segmentation": [corners]}
            held = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "square"}]}
            path = tmp_path / "coco" / "annotations" / f"instances_{part}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(held))
        return str(tmp_path / "coco")

    return make


@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (range(6), (), "none of its 3 test images"),
        ((), range(3), "none of its 6 training images"),
        ((2,), range(3), "only 1 of its 6 training images"),
    ],
)
def test_selftrain(tmp_path, boxes, task, train, val, words):
    unlabelled = {"unlabelled": "scenes:images=4,size=64"}
    given = SELFTRAIN | unlabelled | {"labelled": boxes(train, val), "task": task}
    if task == "segment":
        del given["detector"], given["channels"]
    refused(UsageError, words, selftrain, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_selftrain_without_an_image_to_label(tmp_path, boxes, data):
    given = SELFTRAIN | {"labelled": boxes(range(6), range(3)), "unlabelled": data(())}
    refused(UsageError, "none of its 12 images without boxes can be read", selftrain, tmp_path / "run", **given)


@pytest.mark.parametrize("protocol", ["detect", "segment"])
def test_eval_of_boxes(tmp_path, boxes, protocol):
    from ktransfer import networks
    from ktransfer.eval import evaluate
    from ktransfer.eval.config import EvalConfig
    from ktransfer.networks import Network
    from ktransfer.run import begin

    network = Network("alexnet_bn", 0.1, size=64, classes=10, task="pseudo-labels")
    with begin(tmp_path / "run", "retrain", "retrain", EvalConfig(), {}, ["model.safetensors"], False, "cpu") as step:
        path = step.folder / "model.safetensors"
        networks.save(path, networks.build(network, 5, "test").state_dict(), network)
        step.finish([path])
    given = {"protocol": protocol, "canvas": 64, "epochs": 1, "batch": 2, "max_broken": 1}
    for train, val, words in (
        (range(6), (), "none of its 3 test images"),
        ((), range(3), "none of its 6 training images"),
    ):
        refused(UsageError, words, evaluate, tmp_path / "run", labelled=boxes(train, val), **given)
    assert not (tmp_path / "run" / "eval").exists()
