"""Features made elsewhere: rows land at their images, and whatever is wrong with a file is one line."""

import json

import numpy as np
import pytest

from ktransfer.artifacts.features import open_features
from ktransfer.artifacts.labels import read_labels
from ktransfer.cluster import assign, cluster, extract
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.retrain import retrain

SCENES = "scenes:images=40,size=48"


@pytest.fixture
def rows():
    """Rows of 40 images around 4 far centres."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(4, 6))[np.arange(40) % 4] * 5 + rng.normal(size=(40, 6)) * 0.1).astype(np.float32)


def listed(path, keys):
    path.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    return str(path)


def keys_of(spec=SCENES):
    return list(open_dataset(spec).keys)


def test_rows_come_to_their_images_and_the_chain_goes_on(tmp_path, rows):
    order = np.random.default_rng(1).permutation(40)[:37]  # three images have no row
    keys = [keys_of()[place] for place in order]
    np.save(tmp_path / "dino.npy", rows[order].astype(np.float64))
    run = tmp_path / "run"
    given = {"features": str(tmp_path / "dino.npy"), "keys": listed(tmp_path / "keys.txt", keys), "data": SCENES}
    cluster(run, k=4, **given)
    found = open_features(run / "features" / "dino.h5")
    assert found.rows.dtype == np.float32 and found.keys == keys_of()
    assert sorted(np.flatnonzero(found.valid)) == sorted(order)
    np.testing.assert_array_equal(found.rows[order], rows[order])
    assert not found.rows[~found.valid].any()
    assert found.attributes["fingerprint"] == open_dataset(SCENES).fingerprint
    np.testing.assert_array_equal(found.targets, open_dataset(SCENES).targets)
    labels = read_labels(assign(run)).labels
    assert (labels[~found.valid] == -1).all()
    for group in range(4):
        members = [place for place in order if place % 4 == group]
        assert len(set(labels[members])) == 1
    assert len(set(labels[order])) == 4
    assert (run / "clusters" / "clusters.png").is_file()
    assert retrain(run, arch="alexnet_bn", width=0.05, epochs=1, batch=8, stride=2).is_file()


def test_without_images_rows_stay_and_npz_brings_its_keys(tmp_path, rows):
    keys = keys_of()[::-1]
    np.savez(tmp_path / "mine.npz", features=rows.astype(np.float16), keys=np.array(keys))
    run = tmp_path / "run"
    file = cluster(run, features=str(tmp_path / "mine.npz"), k=4)
    found = open_features(run / "features" / "mine.h5")
    assert found.rows.dtype == np.float16 and found.keys == keys and found.valid.all()
    np.testing.assert_array_equal(found.rows, rows.astype(np.float16))
    stamp = file.stat().st_mtime_ns
    assert cluster(run, features=str(tmp_path / "mine.npz"), k=4).stat().st_mtime_ns == stamp
    assign(run)
    # A second file, made alike, is labelled by the same centroids; the images are named only now.
    other = tmp_path / "other.npy"
    np.save(other, rows[:8])
    labels = assign(run, features=str(other), keys=listed(tmp_path / "k.txt", keys[:8]), overwrite=True)
    assert read_labels(labels).keys == keys[:8]
    assert retrain(run, data=SCENES, arch="alexnet_bn", width=0.05, epochs=1, batch=4, stride=2).is_file()


def test_the_same_bytes_again_and_a_change_is_refused(tmp_path, rows):
    path, keys = tmp_path / "mine.npy", listed(tmp_path / "keys.txt", keys_of())
    np.save(path, rows)
    run = tmp_path / "run"
    cluster(run, features=str(path), keys=keys, k=4)
    before = (run / "features" / "mine.h5").read_bytes()
    np.save(path, np.asfortranarray(rows[:, ::-1]))
    with pytest.raises(
        UsageError, match=r"features/mine.h5 in .* was made differently: features changed; give cluster --ov"
    ):
        cluster(run, features=str(path), keys=keys, k=4)
    assert (run / "features" / "mine.h5").read_bytes() == before
    cluster(run, features=str(path), keys=keys, k=4, overwrite=True)
    np.testing.assert_array_equal(open_features(run / "features" / "mine.h5").rows, rows[:, ::-1])
    np.save(path, rows)
    cluster(run, features=str(path), keys=keys, k=4, overwrite=True)
    assert (run / "features" / "mine.h5").read_bytes() == before
    assert json.loads((run / "features" / "stage.json").read_text())["mine"]["result"] == {"rows": 40, "dim": 6}


def test_features_of_another_kind_are_not_assigned(tmp_path, rows):
    np.save(tmp_path / "mine.npy", rows)
    np.save(tmp_path / "wide.npy", np.hstack([rows, rows]))
    keys, run = listed(tmp_path / "keys.txt", keys_of()), tmp_path / "run"
    cluster(run, features=str(tmp_path / "mine.npy"), keys=keys, k=4)
    with pytest.raises(UsageError, match="pooling is '12 numbers', not '6 numbers'"):
        assign(run, features=str(tmp_path / "wide.npy"), keys=keys)
    hog = extract(run, data=SCENES, teacher="hog", name="hog")
    with pytest.raises(UsageError, match="layer is 'hog', not 'made elsewhere'"):
        assign(run, features=str(hog))
    with pytest.raises(UsageError, match="was made elsewhere; make the features of these images there too"):
        assign(run, data="scenes:images=24,size=48,seed=5")


WRONG = {
    "no keys": (lambda rows: rows, None, None, r"has no keys; give --keys FILE"),
    "too few keys": (lambda rows: rows, lambda keys: keys[:-1], None, r"39 keys for 40 rows"),
    "a key twice": (lambda rows: rows, lambda keys: [*keys[:-1], keys[0]], None, r"occurs twice"),
    "other images": (lambda rows: rows, lambda keys: ["x.jpg", *keys[1:]], SCENES, r"1 of 40 keys .* such as x.jpg"),
    "one dimension": (lambda rows: rows[0], lambda keys: keys, None, r"float32 of shape \(6,\), must be floats"),
    "integers": (lambda rows: rows.astype(int), lambda keys: keys, None, r"int64 of shape"),
    "NaN": (
        lambda rows: np.where(rows == rows[7, 2], np.nan, rows),
        lambda keys: keys,
        None,
        r"row 7 \(.*\) holds NaN",
    ),
    "too large": (lambda rows: rows * 1e300, lambda keys: keys, None, r"row 0 .* beyond float32"),
    "k": (lambda rows: rows[:3], lambda keys: keys[:3], None, r"--k 4: more clusters than the 3 images"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_and_writes_nothing(tmp_path, rows, what):
    change, choose, data, words = WRONG[what]
    np.save(tmp_path / "mine.npy", change(rows.astype(np.float64) if what == "too large" else rows))
    keys = choose and listed(tmp_path / "keys.txt", choose(keys_of()))
    with pytest.raises(UsageError, match=words) as caught:
        cluster(tmp_path / "run", features=str(tmp_path / "mine.npy"), keys=keys, data=data, k=4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


class Bomb:
    def __reduce__(self):
        return print, ("ran",)


def test_files_that_cannot_be_read(tmp_path, rows, capsys):
    keys = keys_of()
    files = {
        "pickle.npy": lambda path: np.save(path, np.array([Bomb()], object), allow_pickle=True),
        "pickle.npz": lambda path: np.savez(path, features=rows, keys=np.array([Bomb()] * 40, object)),
        "cut.npy": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"),
        "text.npz": lambda path: path.write_text("hello"),
        "two.npz": lambda path: np.savez(path, a=rows, b=rows, keys=np.array(keys)),
        "numbers.npz": lambda path: np.savez(path, features=rows, keys=np.arange(40)),
        "bytes.npz": lambda path: np.savez(path, features=rows, keys=np.array([b"\xff"] * 40)),
    }
    for name, write in files.items():
        write(tmp_path / name)
        with pytest.raises(UsageError) as caught:
            cluster(tmp_path / "run", features=str(tmp_path / name), k=4)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out
    np.save(tmp_path / "good.npy", rows)
    for keys_file, words in (("nowhere.txt", "cannot be read"), ("cut.npy", "cannot be read")):
        with pytest.raises(UsageError, match=words):
            cluster(tmp_path / "run", features=str(tmp_path / "good.npy"), keys=str(tmp_path / keys_file), k=4)
    with pytest.raises(UsageError, match="no such feature file"):
        cluster(tmp_path / "run", features=str(tmp_path / "nowhere.npy"), k=4)
    with pytest.raises(UsageError, match=r"--keys k.txt: is for --features FILE.npy"):
        cluster(tmp_path / "run", features=str(tmp_path / "mine.h5"), keys="k.txt", k=4)
    assert not (tmp_path / "run").exists()
