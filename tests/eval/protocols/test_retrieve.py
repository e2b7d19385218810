"""Neighbours against brute force, the sheet against the images it must show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ktransfer.data.sheets import FRAME, GAP, MARGIN, SIDE, TEXT
from ktransfer.errors import BrokenImage, StageError, UsageError
from ktransfer.eval.arms import Arm, model_of
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.learners.maps import choose_layers, frozen_maps
from ktransfer.eval.protocols import retrieve
from ktransfer.images.decoding import square
from ktransfer.networks import Network

CPU = torch.device("cpu")
ARM = Arm("random", Network("alexnet_bn", 0.05, 2, 35), None)
CONFIG = EvalConfig(precision="float32", layers="conv2", queries="3", dtype="float32")


@pytest.fixture(scope="module")
def splits(painted):
    return painted(60, 1), painted(30, 2)


def neighbours(splits, tmp_path):
    """(queries, gallery) places in order of cosine similarity, by numpy."""
    layers = choose_layers(model_of(ARM, 0), ARM.network, CONFIG.layers, 1)
    train, test = frozen_maps(ARM, splits, CONFIG, tmp_path / "maps", CPU, layers)
    gallery, queries = (part.layer(part.layers[0]).astype(np.float64) for part in (train, test))
    gallery, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (gallery, queries))
    return (queries @ gallery.T).argsort(axis=1)[:, ::-1]


def test_precisions_are_those_of_brute_force(splits, tmp_path):
    cell = retrieve.evaluate(ARM, splits, CONFIG, tmp_path / "eval" / "work-retrieve" / "random", CPU)["scores"][
        "conv2"
    ]
    near = neighbours(splits, tmp_path)
    alike = splits[0].targets[near] == splits[1].targets[:, None]
    for count in (1, 5, 10):
        assert cell[f"at{count}"] == pytest.approx(alike[:, :count].mean(), abs=2e-3)
        low, high = cell[f"at{count}_interval"]
        assert low <= cell[f"at{count}"] <= high + 1e-9
    assert cell["at10"] > 0.6


def test_the_sheet_shows_queries_and_their_nearest(splits, tmp_path):
    config = replace(CONFIG, queries="4,17")
    home = tmp_path / "eval" / "work-retrieve"
    found = retrieve.evaluate(ARM, splits, config, home / "random", CPU)
    assert found["files"] == ["random-conv2.png"]
    sheet = np.asarray(Image.open(tmp_path / "eval" / "retrieve" / "random-conv2.png"))
    near = neighbours(splits, tmp_path)
    step = TEXT + SIDE + MARGIN
    inner = slice(4, SIDE - 4)
    for line, row in enumerate((4, 17)):
        top = MARGIN + line * step + TEXT
        shown = [
            sheet[top : top + SIDE, left : left + SIDE]
            for left in range(MARGIN, MARGIN + 11 * (SIDE + GAP), SIDE + GAP)
        ]
        wanted = [splits[1].read(row, SIDE), *(splits[0].read(place, SIDE) for place in near[row, :10])]
        for cell, image in zip(shown, wanted, strict=True):
            assert (cell[inner, inner] == square(image, SIDE)[inner, inner]).all()
        framed = [tuple(cell[0, 0].tolist()) == FRAME for cell in shown]
        assert framed == [False, *(splits[0].targets[near[row, :10]] == splits[1].targets[row])]


def test_drawn_queries_are_functions_of_the_seed_and_skip_broken_images(splits, tmp_path):
    first, again, other = (retrieve.wanted_rows(replace(CONFIG, seed=seed), splits[1]) for seed in (0, 0, 1))
    assert first == again
    assert first[:3] != other[:3]
    torn = set(first[:2])

    def read(row, side):
        if row in torn:
            raise BrokenImage("torn")
        return splits[1].read(row, side)

    broken = splits[0], replace(splits[1], read=read)
    config = replace(CONFIG, max_broken=0.5)
    found = retrieve.evaluate(ARM, broken, config, tmp_path / "eval" / "work-retrieve" / "a", CPU)
    assert len(found["broken"]) == 2
    assert Image.open(tmp_path / "eval" / "retrieve" / "random-conv2.png").height == MARGIN + 3 * (TEXT + SIDE + MARGIN)
    with pytest.raises(StageError, match=f"--queries {first[0]}: this image cannot be read"):
        retrieve.evaluate(
            ARM, broken, replace(config, queries=str(splits[1].keys[first[0]]) + ",3"), tmp_path / "w", CPU
        )


def test_shuffled_labels_stay_at_chance(splits, tmp_path):
    draws = np.random.default_rng(0)
    shuffled = tuple(replace(part, targets=draws.permutation(part.targets)) for part in splits)
    cell = retrieve.evaluate(ARM, shuffled, CONFIG, tmp_path / "eval" / "work-retrieve" / "a", CPU)["scores"]["conv2"]
    assert abs(cell["at10"] - 1 / 3) < 0.12


@pytest.mark.parametrize("queries", ["-1", "nowhere", "1,x", ""])
def test_misuse_is_one_line(splits, tmp_path, queries):
    with pytest.raises(UsageError, match=r"--queries .*neither a number above 0 nor a test image") as caught:
        retrieve.check([ARM.network], splits, replace(CONFIG, queries=queries), tmp_path)
    assert "\n" not in str(caught.value)


def test_few_images(painted, tmp_path):
    with pytest.raises(UsageError, match="--protocol retrieve: 9 training images, but 10 are needed"):
        retrieve.check([ARM.network], (painted(9, 1), painted(9, 2)), replace(CONFIG, queries="1"), tmp_path)
