"""Broken images, as many as `--max-broken 1` allows: one line before the work, or a table of numbers."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.eval import evaluate
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.intervals import mean_of
from ktransfer.networks import Network
from ktransfer.run import begin

SMALL = {"random": False, "size": 35, "stride": 2, "max_broken": 1, "precision": "float32"}
LEARNING = {"epochs": 1, "batch": 4}
TUNED = LEARNING | {"lrs": "0.01", "test_crops": 0}
PROTOCOLS = {
    "linear": LEARNING,
    "knn": {},
    "svm": {},
    "logreg": {},
    "lowshot": {},
    "retrieve": {},
    "clusters": {},
    "robust": LEARNING | {"robust_steps": 1, "robust_images": 6},
    "nonlinear": TUNED,
    "finetune": TUNED | {"strategy": "joint"},
}


@pytest.fixture
def student(tmp_path):
    network = Network("alexnet_bn", 0.05, 2, 35, classes=10, task="pseudo-labels")
    with begin(tmp_path / "run", "retrain", "retrain", EvalConfig(), {}, ["model.safetensors"], False, "cpu") as step:
        path = step.folder / "model.safetensors"
        networks.save(path, networks.build(network, 5, "test").state_dict(), network)
        step.finish([path])
    return tmp_path / "run"


@pytest.fixture
def labelled(tmp_path):
    """24 training and 8 test images of two classes; all but the ones named are broken."""

    def make(sound):
        draws = np.random.default_rng(0)
        for part, count in (("train", 24), ("val", 8)):
            for number in range(count):
                path = tmp_path / "data" / part / "ab"[number % 2] / f"{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draws.integers(0, 255, (44, 44, 3)).astype(np.uint8)).save(path)
                if number not in sound[part]:
                    path.write_bytes(b"\x89PNG no image")
        return str(tmp_path / "data")

    return make


def options(protocol):
    layers = {} if protocol == "finetune" else {"layers": "conv5"}
    return SMALL | layers | PROTOCOLS[protocol] | {"protocol": protocol}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (range(24), (), "none of its 8 test images can be read"),
        ((), range(8), "none of its 24 training images can be read"),
        (range(0, 24, 2), range(8), "its training images that can be read all have one label"),
    ],
)
def test_nothing_left_is_one_line_before_the_work(student, labelled, protocol, train, val, words):
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(student, labelled=labelled({"train": train, "val": val}), **options(protocol))
    assert "\n" not in str(caught.value) and not (student / "eval").exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_hardly_anything_left_gives_numbers_or_a_line(student, labelled, protocol):
    for seed in range(3):
        draws = np.random.default_rng(seed)
        sound = {part: set(draws.permutation(count)[:left].tolist()) for part, count, left in _LEFT[seed]}
        try:
            made = evaluate(student, labelled=labelled(sound), overwrite=True, **options(protocol))
        except UsageError as error:
            assert "can be read" in str(error)
        else:
            assert _finite(json.loads(made[protocol].read_text()))


_LEFT = [[("train", 24, 4), ("val", 8, 1)], [("train", 24, 10), ("val", 8, 2)], [("train", 24, 12), ("val", 8, 1)]]


def _finite(found):
    if isinstance(found, dict | list):
        return all(map(_finite, found.values() if isinstance(found, dict) else found))
    return not isinstance(found, float) or math.isfinite(found)


def test_labels_that_only_broken_images_have(student, labelled, tmp_path):
    root = labelled({"train": range(2, 24), "val": range(8)})
    (tmp_path / "list.txt").write_text("a/00.png\nb/01.png\n")
    given = options("lowshot") | {"subset": str(tmp_path / "list.txt")}
    with pytest.raises(UsageError, match="none of its 2 training images whose labels are used"):
        evaluate(student, labelled=root, **given)


@pytest.mark.parametrize("protocol", ["nonlinear", "finetune"])
def test_two_training_images_are_too_few_for_batch_norm(student, tmp_path, protocol):
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / "two" / part / name).mkdir(parents=True)
            Image.new("RGB", (44, 44), "red").save(tmp_path / "two" / part / name / "x.png")
    with pytest.raises(UsageError, match="only 1 of its 1 training images beside those that are held out can be read"):
        evaluate(student, labelled=str(tmp_path / "two"), **options(protocol))


def test_one_number_has_the_widest_interval():
    assert mean_of("x", np.array([0.3])) == {"x": 0.3, "x_interval": [0.0, 1.0]}
