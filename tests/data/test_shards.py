"""Shards: tar files as WebDataset lays them out, Parquet files as Hugging Face's datasets do."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from ktransfer.data import shards
from ktransfer.data.opening import open_dataset, open_splits
from ktransfer.data.scenes import write_scenes
from ktransfer.errors import BrokenImage, StageError, UsageError
from ktransfer.images import decoding


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 24, 32, 0)
    return folder


def images(root, part):
    """(class, file) of each, in order."""
    return [(path.parent.name, path) for path in sorted((root / part).rglob("*.jpg"))]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))


def samples(found):
    """As WebDataset writes them: the files of a sample behind each other."""
    for number, (kind, path) in enumerate(found):
        yield f"{number:04d}.v1.jpg", path.read_bytes()
        yield f"{number:04d}.cls", kind.encode()
        yield f"{number:04d}.json", b"{}"


def write_parquet(path, found, group=5, more=None, names=None):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    names = names or sorted({kind for kind, _ in found})
    labels = [names.index(kind) for kind, _ in found] if more is None else more
    held = [{"bytes": file.read_bytes() if file else None, "path": "a/b.jpg"} for _, file in found]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"label": pa.array(labels), "image": pa.array(held, kind)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata(about), path, row_group_size=group)


def same(data, found):
    assert len(data) == len(found) == len(data.keys) == len(set(data.keys))
    for row, (kind, path) in enumerate(found):
        assert np.array_equal(data.read(row, None), decoding.decode(path))
        assert np.array_equal(pickle.loads(pickle.dumps(data.reader(row)))(16), decoding.decode(path, 16))
        assert data.classes[data.targets[row]] == kind


def test_tars_and_parquet_files_hold_what_the_folder_holds(root, tmp_path):
    found = images(root, "train")
    for number in range(3):
        write_tar(tmp_path / "tars" / f"train-{number:03d}.tar", samples(found[8 * number : 8 * number + 8]))
        write_parquet(tmp_path / "parquet" / f"{number}.parquet", found[8 * number : 8 * number + 8])
    for spec in ("tars", "tars/train-*.tar", "tars/train-{000..002}.tar", "tars/train-{000,001,002}.tar", "parquet"):
        same(open_dataset(str(tmp_path / spec)), found)
    folder, pattern = open_dataset(str(tmp_path / "tars")), open_dataset(str(tmp_path / "tars" / "*.tar"))
    assert folder.fingerprint == pattern.fingerprint and folder.keys == pattern.keys
    same(open_dataset(str(tmp_path / "tars" / "train-001.tar")), found[8:16])


def test_a_tar_of_class_folders_has_their_classes(root, tmp_path):
    found = images(root, "train")
    with tarfile.open(tmp_path / "all.tar", "w") as file:
        for kind, path in found:
            file.add(path, f"./{kind}/{path.name}")
    data = open_dataset(str(tmp_path / "all.tar"))
    assert data.classes == open_dataset(str(root / "train")).classes
    same(data, found)


@pytest.mark.parametrize("layout", ["tar", "parquet", "data/parquet"])
def test_training_and_test_shards(root, tmp_path, layout):
    for part, name in (("train", "train-00000-of-00001"), ("val", "validation-00000-of-00001")):
        if layout == "tar":
            write_tar(tmp_path / f"{name}.tar", samples(images(root, part)))
        else:
            write_parquet(tmp_path / layout.removesuffix("parquet") / f"{name}.parquet", images(root, part))
    train, val = open_splits(str(tmp_path))
    same(train, images(root, "train"))
    same(val, images(root, "val"))
    assert open_dataset(str(tmp_path)).fingerprint == train.fingerprint


def test_labels_that_are_kept_back_and_samples_without_a_class(root, tmp_path):
    found = images(root, "train")[:4]
    write_parquet(tmp_path / "test.parquet", found, more=[-1, -1, -1, -1])
    assert open_dataset(str(tmp_path / "test.parquet")).classes == ()
    write_tar(tmp_path / "some.tar", [*list(samples(found))[1:], ("z/extra.jpg", found[0][1].read_bytes())])
    data = open_dataset(str(tmp_path / "some.tar"))
    assert data.targets.tolist()[-1] == -1 and data.keys[-1] == "some.tar/z/extra.jpg"


def test_what_is_no_image_stays_out(root, tmp_path):
    with tarfile.open(tmp_path / "odd.tar", "w") as file:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dir.jpg", tarfile.DIRTYPE)):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "/etc/passwd"
            file.addfile(about)
        file.add(images(root, "train")[0][1], "../../a\n.jpg")
        empty = tarfile.TarInfo("empty.jpg")
        file.addfile(empty)
    data = open_dataset(str(tmp_path / "odd.tar"))
    assert data.keys == ("odd.tar/../../a\\x0a.jpg", "odd.tar/empty.jpg")
    with pytest.raises(BrokenImage, match="no bytes"):
        data.read(1, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"not a tar" * 200), "not a whole tar file"),
        (lambda path: tarfile.open(path, "w:gz").close(), "must be uncompressed"),
        (lambda path: tarfile.open(path, "w").close(), "holds no images"),
        (lambda path: path.mkdir(), "cannot be read"),
    ],
)
def test_bad_tars_are_one_line(tmp_path, make, words):
    make(tmp_path / "bad.tar")
    with pytest.raises(UsageError, match=words) as caught:
        open_dataset(str(tmp_path / "bad.tar"))
    assert "\n" not in str(caught.value) and "bad.tar" in str(caught.value)


def test_a_tar_that_is_cut_off_is_refused_and_one_that_shrinks_stops_the_stage(root, tmp_path):
    found = images(root, "train")[:3]
    path = tmp_path / "cut.tar"
    write_tar(path, samples(found))
    data, whole = open_dataset(str(path)), path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(StageError, match="must stay as it is"):
        data.read(2, None)
    write_tar(path, [("a.jpg", found[0][1].read_bytes())])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UsageError, match=r"cut off|not a whole tar"):
        open_dataset(str(path))


def test_bad_parquet_files_are_one_line(root, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    found = images(root, "train")[:3]
    write_parquet(tmp_path / "paths.parquet", [(kind, None) for kind, _ in found])
    write_parquet(tmp_path / "label.parquet", found, more=[0, 1, 99])
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "label.parquet").read_bytes()[:-30])
    for name, words in (
        ("paths", "paths instead of images"),
        ("label", "label 99"),
        ("text", "no column of images among text"),
        ("cut", "not a whole Parquet file"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            open_dataset(str(tmp_path / f"{name}.parquet"))
        assert "\n" not in str(caught.value)


def test_a_pattern_that_fits_nothing_and_names_that_repeat(root, tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*b-000.tar"):
        open_dataset(str(tmp_path / "b-{000..002}.tar"))
    assert shards.expanded("a{1..3}b{x,y}.tar")[:3] == ["a1bx.tar", "a1by.tar", "a2bx.tar"]
    found = images(root, "train")[:4]
    for name in ("one", "two"):
        write_tar(tmp_path / name / "0.tar", samples(found))
    data = open_dataset(str(tmp_path / "*" / "0.tar"))
    assert len(set(data.keys)) == 8
