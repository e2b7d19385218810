"""Clusters against scikit-learn and by hand, on features that fall into groups and on such that do not."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.cluster import KMeans

from ktransfer import files, networks
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.eval.arms import Arm
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.protocols import clusters
from ktransfer.networks import Network

CPU = torch.device("cpu")
CONFIG = EvalConfig(precision="float32", layers="conv1,conv2")
NETWORK = Network("alexnet_bn", 0.05, 2, 35)


@pytest.fixture(scope="module")
def splits(painted):
    return painted(90, 1), painted(45, 2)


def test_agreement_against_scikit_learn_and_by_hand():
    draws = np.random.default_rng(0)
    classes = draws.integers(0, 4, 300)
    found = np.where(draws.random(300) < 0.6, classes, draws.integers(0, 5, 300))
    scores = clusters.agreement(found, classes)
    assert scores["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(classes, found))
    assert scores["ami"] == pytest.approx(metrics.adjusted_mutual_info_score(classes, found))
    assert scores["ari"] == pytest.approx(metrics.adjusted_rand_score(classes, found))
    assert clusters.agreement(classes, draws.permutation(classes))["ami"] == pytest.approx(0, abs=0.02)
    purity = sum(np.bincount(classes[found == cluster]).max() for cluster in range(5)) / 300
    assert scores["purity"] == pytest.approx(purity)
    best = max(
        sum(((found == c) & (classes == k)).sum() for k, c in enumerate(order)) for order in permutations(range(5), 4)
    )
    assert scores["match"] == pytest.approx(best / 300)


def test_a_tiny_case_by_hand():
    scores = clusters.agreement(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1]))
    assert scores["purity"] == pytest.approx(5 / 6)
    assert scores["match"] == pytest.approx(4 / 6)
    assert clusters.agreement(np.array([5, 5, 2]), np.array([0, 0, 1])) == pytest.approx(dict.fromkeys(scores, 1.0))
    assert clusters.sizes(np.array([4, 4, 4, 0, 0, 7])) == {"met": 3, "min": 1, "median": 2.0, "max": 3}


def test_k_means_finds_groups_as_scikit_learn_does():
    draws = np.random.default_rng(1)
    centres = 10 * draws.normal(size=(4, 6))
    rows = (centres[np.arange(200) % 4] + draws.normal(size=(200, 6))).astype(np.float32)
    found = [clusters.clustered(rows[:150], rows[150:], 4, seed) for seed in range(3)]
    theirs = KMeans(4, n_init=10, random_state=0).fit(rows[:150]).predict(rows[150:])
    assert max(metrics.adjusted_rand_score(theirs, one) for one in found) == 1
    again = clusters.clustered(rows[:150], rows[150:], 4, 2)
    assert len(clusters.clustered(rows[:150], rows[150:], 4, 2**32 - 1)) == len(again)  # faiss takes 31 bits
    assert (again == found[2]).all()


def test_visible_classes_are_found(splits, tmp_path):
    found = clusters.evaluate(Arm("random", NETWORK, None), splits, CONFIG, tmp_path / "work", CPU)
    assert list(found["scores"]) == ["conv1", "conv2"]
    assert max(cell["match"] for cell in found["scores"].values()) > 0.8
    for cell in found["scores"].values():
        assert cell["k"] == 3
        for measure in clusters.MEASURES.keys() - {"heldout"}:
            low, high = cell[f"{measure}_interval"]
            assert low <= cell[measure] <= high
    assert json.loads(json.dumps(found)) == found


def test_labels_change_neither_clusters_nor_stability(splits, tmp_path):
    draws = np.random.default_rng(0)
    shuffled = tuple(replace(part, targets=draws.permutation(part.targets)) for part in splits)
    arm = Arm("random", NETWORK, None)
    mine, other = (
        clusters.evaluate(arm, given, CONFIG, tmp_path / name, CPU)["scores"]
        for name, given in (("mine", splits), ("other", shuffled))
    )
    for layer in mine:
        for name in ("sizes", "seeds", "twice", "seeds_interval"):
            assert mine[layer][name] == other[layer][name]
        assert abs(other[layer]["ami"]) < 0.15
        assert abs(other[layer]["ari"]) < 0.15


def test_several_numbers_of_clusters(splits, tmp_path):
    config = replace(CONFIG, clusters_k="2, 5", layers="conv1")
    found = clusters.evaluate(Arm("random", NETWORK, None), splits, config, tmp_path / "work", CPU)["scores"]
    assert list(found) == ["conv1, k = 2", "conv1, k = 5"]
    assert [cell["k"] for cell in found.values()] == [2, 5]
    assert all(cell["sizes"]["met"] <= cell["k"] for cell in found.values())


TOLD = [(row, (row + row % 2) % 3) for row in range(60)] + [(70, -1)]


@pytest.fixture
def labelled(tmp_path):
    """A network whose run labelled 61 images called as those of the training split, one of them broken."""
    run = tmp_path / "run"
    weights = run / "retrain" / "model.safetensors"
    networks.save(weights, networks.build(NETWORK, 0, "test").state_dict(), NETWORK)
    labels = run / "clusters" / "labels.csv"
    files.write_text(labels, "key,label,distance\n" + "".join(f"{key},{label},0.5\n" for key, label in TOLD))
    made = {"state": "done", "config": {"data": "painted"}, "inputs": {}, "outputs": {}, "seconds": 0}
    files.write_json(labels.with_name("stage.json"), {"assign": made})
    return Arm("run", NETWORK, weights)


def test_the_pseudo_labels_of_the_run(splits, labelled, tmp_path, monkeypatch):
    arm, told = labelled, TOLD
    labels = tmp_path / "run" / "clusters" / "labels.csv"
    monkeypatch.setattr(clusters, "open_dataset", lambda spec: splits[0])
    assert list(clusters.inputs([arm, Arm("random", NETWORK, None)], splits, CONFIG)) == ["labels run"]
    config = replace(CONFIG, layers="conv1")
    cell = clusters.evaluate(arm, splits, config, tmp_path / "work", CPU)["scores"]["pseudo-labels"]
    classes = splits[0].targets[:60]
    found = [label for _, label in told[:60]]
    assert cell["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(classes, found))
    assert cell["ari"] == pytest.approx(metrics.adjusted_rand_score(classes, found))
    assert "seeds" not in cell
    labels.write_text(labels.read_text() + "elsewhere,1,0.5\n")  # of other images: there is nothing to compare
    assert list(clusters.evaluate(arm, splits, config, tmp_path / "work", CPU)["scores"]) == ["conv1"]


def test_pseudo_labels_of_other_images_with_the_same_keys(splits, labelled, painted, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run" / "clusters" / "labels.csv"

    def left_out(data):
        with monkeypatch.context() as patch:
            if data is not None:
                patch.setattr(clusters, "open_dataset", lambda spec: data)
            found = clusters.pseudo_labels(path, splits, "mine")
        said = capsys.readouterr().err
        assert (found is None) == ("the pseudo-labels of mine are left out: " in said)
        return said.partition(": the pseudo-labels of mine are left out: ")[2].strip()

    assert left_out(splits[0]) == ""
    draws = np.random.default_rng(0)
    anew = {row: splits[0].read(row, 40) + draws.integers(-2, 3, (40, 40, 3)).clip(0) for row in range(90)}
    packed = replace(splits[0], fingerprint="of a pack", read=lambda row, side: anew[row].clip(0, 255).astype(np.uint8))
    assert left_out(packed) == ""
    assert left_out(painted(90, 9)) == "0 of painted and of painted are different images"

    def one_torn(row, side):
        if row == 59:
            raise BrokenImage("torn")
        return splits[0].read(row, side)

    assert left_out(replace(packed, read=one_torn)).startswith("59 of painted and of painted are different")
    assert left_out(None).startswith("painted does not exist")
    (tmp_path / "run" / "clusters" / "stage.json").unlink()
    assert left_out(splits[0]) == "it is not known which images they belong to"


@pytest.mark.parametrize("wanted", ["1", "46", "three", "3,", "-4"])
def test_misuse_is_one_line(splits, tmp_path, wanted):
    with pytest.raises(
        UsageError, match=f"--clusters-k {wanted}: must be whole numbers from 2 to half of the 90"
    ) as caught:
        clusters.check([NETWORK], splits, replace(CONFIG, clusters_k=wanted), tmp_path)
    assert "\n" not in str(caught.value)


def test_too_few_images_for_twice_as_many_clusters_as_classes(splits, tmp_path):
    crowded = replace(splits[0], classes=tuple(f"class{place}" for place in range(46)))
    with pytest.raises(UsageError, match=r"90 training images are too few .* \(46\); .*--clusters-k"):
        clusters.check([NETWORK], (crowded, splits[1]), CONFIG, tmp_path)


def test_which_clusterings_are_compared(splits, tmp_path, monkeypatch):
    whole, calls = clusters.clustered, []

    def watched(learn, tell, k, seed):
        calls.append((len(learn), len(tell), k, seed))
        return whole(learn, tell, k, seed)

    monkeypatch.setattr(clusters, "clustered", watched)
    config = replace(CONFIG, layers="conv1", clusters_k="4", clusters_starts=2, seed=7)
    clusters.evaluate(Arm("random", NETWORK, None), splits, config, tmp_path / "work", CPU)
    assert calls == [(90, 45, 4, 7), (90, 45, 4, 8), (90, 45, 8, 7)]
