"""Which labels few-label protocols may see, and the episodes against a hand-written prototype classifier."""

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from ktransfer.data.opening import open_dataset, open_splits
from ktransfer.errors import UsageError
from ktransfer.eval import episodes as module
from ktransfer.eval.config import EvalConfig
from ktransfer.eval.episodes import EPISODES, QUERIES, WAYS, episodes
from ktransfer.eval.protocols.lowshot import subsets


def test_shares_of_each_class_and_at_least_one():
    train = open_splits("scenes:images=1200,size=48")[0]
    targets = train.targets.copy()
    targets[targets == 3] = np.where(np.arange(100) < 30, 3, 4)  # 30 of one class, 170 of another
    from dataclasses import replace

    train = replace(train, targets=targets)
    found = subsets(train, EvalConfig())
    assert list(found) == ["one", "ten"]
    sizes = np.bincount(targets)
    assert np.bincount(targets[found["one"]]).tolist() == np.maximum(1, np.round(sizes * 0.01)).tolist()
    assert np.bincount(targets[found["ten"]]).tolist() == np.round(sizes * 0.1).tolist()
    assert set(found["one"]) < set(found["ten"])
    assert (np.diff(found["ten"]) > 0).all()
    assert all((found[name] == subsets(train, EvalConfig())[name]).all() for name in found)
    assert set(found["one"]) != set(subsets(train, EvalConfig(seed=1))["one"])


def test_a_published_list(tmp_path, folder):
    train = open_dataset(str(folder))
    given = tmp_path / "list.txt"
    given.write_text("a/03.jpg\n\n14.jpg\r\n 02.jpg \n14.jpg\n")  # keys, or the names of files; once each
    found = subsets(train, EvalConfig(subset=str(given)))
    assert {name: [train.keys[row] for row in rows] for name, rows in found.items()} == {
        "subset": ["a/02.jpg", "a/03.jpg", "b/14.jpg"]
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a/03.jpg\nb/03.jpg\n",
            r"line 2: b/03.jpg: it is not an image of the training set; give keys such as a/00.jpg",
        ),
        ("", "is empty"),
        ("a/03.jpg\na/04.jpg\n", "of one class"),
        (None, "cannot be read"),
        (b"\xff\xfe", "is empty"),
    ],
)
def test_wrong_lists_are_one_line(tmp_path, folder, text, words):
    given = tmp_path / "list.txt"
    if text is not None:
        given.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=words) as caught:
        subsets(open_dataset(str(folder)), EvalConfig(subset=str(given)))
    assert "\n" not in str(caught.value) and "--subset" in str(caught.value)


def test_names_that_several_images_have(tmp_path, folder):
    (folder / "b" / "03.jpg").write_bytes((folder / "a" / "03.jpg").read_bytes())
    (tmp_path / "list.txt").write_text("03.jpg\nb/14.jpg\n")
    with pytest.raises(UsageError, match=r"line 1: 03.jpg: it is the name of 2 training images"):
        subsets(open_dataset(str(folder)), EvalConfig(subset=str(tmp_path / "list.txt")))


def vectors(count, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    means = np.random.default_rng(5).normal(size=(classes, 8))
    return (means[labels] + 1.5 * rng.normal(size=(count, 8))).astype(np.float32), labels


def test_episodes_are_those_of_a_nearest_centroid_classifier(monkeypatch):
    (train, labels), (test, wanted) = vectors(400, 7, 0), vectors(300, 7, 1)
    drawn = []
    inner = module._drawn

    def watch(*args):
        drawn.append(inner(*args))
        return drawn[-1]

    monkeypatch.setattr(module, "_drawn", watch)
    right = episodes(train, labels, test, wanted, 20, 0)
    support, asked = drawn
    assert (
        right.shape == (EPISODES,)
        and support.shape == (EPISODES, WAYS, 20)
        and asked.shape == (EPISODES, WAYS, QUERIES)
    )
    for number in range(0, EPISODES, 50):
        own, other = labels[support[number]], wanted[asked[number]]
        ways = own[:, 0]
        assert (own == ways[:, None]).all() and (other == ways[:, None]).all() and len(set(ways)) == WAYS
        assert len(set(support[number].ravel())) == 100 and len(set(asked[number].ravel())) == 75
        theirs = NearestCentroid().fit(train[support[number].ravel()], own.ravel())
        assert right[number] == pytest.approx(theirs.score(test[asked[number].ravel()], other.ravel()))
    # All classes and images come up, and no two episodes are alike.
    assert len(np.unique(labels[support[:, :, 0]])) == 7 and len(np.unique(support)) > 390
    assert len({tuple(row) for row in support.reshape(EPISODES, -1)}) == EPISODES
    assert (episodes(train, labels, test, wanted, 20, 0) == right).all()
    assert (episodes(train, labels, test, wanted, 20, 1) != right).any()


def test_classes_with_too_few_images_are_not_drawn():
    (train, labels), (test, wanted) = vectors(400, 6, 0), vectors(300, 6, 1)
    few = labels.copy()
    few[np.flatnonzero(labels == 2)[19:]] = 0  # 19 are left
    broken = train.copy()
    broken[few == 2] = np.nan
    assert np.isfinite(episodes(broken, few, test, wanted, 20, 0)).all()
    asked = wanted.copy()
    asked[np.flatnonzero(wanted == 4)[14:]] = 0
    assert len(episodes(train, few, test, asked, 20, 0)) == 0  # four classes are left
    assert len(episodes(train, few, test, asked, 19, 0)) == EPISODES
