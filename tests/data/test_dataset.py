"""Folders, lists and scenes: the same rows everywhere, whatever lies between the images."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktransfer.data import folders, scenes
from ktransfer.data.dataset import file_name
from ktransfer.data.opening import open_dataset, open_splits
from ktransfer.errors import BrokenImage, UsageError

PAST = 1_600_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def put(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path, "PNG")
    return path


def settle(root: Path) -> None:
    """Date all folders back, so that they are old enough to be remembered."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (PAST, PAST))


def test_flat_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b.PNG", "a.jpg", "Z.webp", ".hidden.png", "._a.jpg", ".git/x.png"):
        put(tmp_path / name)
    (tmp_path / "README.txt").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    data = open_dataset(str(tmp_path))
    assert data.keys == ("Z.webp", "a.jpg", "b.PNG", "empty.jpg")
    assert len(data) == 4 and data.classes == () and data.targets.tolist() == [-1] * 4
    assert data.targets.dtype == np.int32
    assert data.name == tmp_path.name.replace("[", "_").replace("]", "_")
    assert data.read(1, None).shape == (6, 8, 3)
    with pytest.raises(BrokenImage, match="empty file"):
        data.read(3, None)
    assert "1 files with other endings are ignored" in capsys.readouterr().err


def test_class_folders(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/er/a.png", "cat/b.png"):
        put(tmp_path / name)
    (tmp_path / "empty class").mkdir()
    data = open_dataset(str(tmp_path))
    assert data.keys == ("cat/b.png", "cat/deep/er/a.png", "dog/b.png")
    assert data.classes == ("cat", "dog") and data.targets.tolist() == [0, 0, 1]
    put(tmp_path / "loose.png")
    assert open_dataset(str(tmp_path)).classes == ()


def test_one_sub_folder_is_no_class(tmp_path: Path) -> None:
    put(tmp_path / "photos/a.png")
    assert open_dataset(str(tmp_path)).targets.tolist() == [-1]


def test_root_with_train_and_val_means_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png"):
        put(tmp_path / name)
    data = open_dataset(str(tmp_path))
    assert (data.name, data.keys, data.classes) == ("train", ("cat/1.png", "dog/2.png"), ("cat", "dog"))
    assert ": using" in capsys.readouterr().err
    assert open_dataset(str(tmp_path / "train")).fingerprint == data.fingerprint


def test_names_in_any_unicode(tmp_path: Path) -> None:
    names = ["猫.png", "ё é.png", "🙂.png", 'a,"b".png', "line\nbreak.png", "back\\slash.png", "back\\x0aslash.png"]
    for name in names:
        put(tmp_path / name)
    with open(os.fsencode(tmp_path) + b"/latin\xe9.png", "wb") as out:  # noqa: PTH123
        out.write((tmp_path / names[0]).read_bytes())
    data = open_dataset(str(tmp_path))
    assert len(set(data.keys)) == len(data) == 8
    assert {"猫.png", "🙂.png", 'a,"b".png', "line\\x0abreak.png", "back\\\\slash.png", "latin\\xe9.png"} <= set(
        data.keys
    )
    for row, key in enumerate(data.keys):
        assert key.encode().decode() == key and "\n" not in key
        assert data.read(row, None).shape == (6, 8, 3)


def test_order_is_that_of_the_bytes(tmp_path: Path) -> None:
    for name in ("b/1.png", "b.png", "a-1.png", "É.png", "z.png", "Z.png", "10.png", "9.png", "￿.png", "𐀀.png"):
        put(tmp_path / name)
    keys = open_dataset(str(tmp_path)).keys
    assert list(keys) == sorted(keys, key=lambda key: key.encode())


def test_links_and_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    put(root / "b/x.png")
    put(root / "c/y.png")
    put(outside / "z.png")
    (root / "a").symlink_to(root / "b")
    (root / "b/up").symlink_to(root)
    (root / "b/self").symlink_to("self")
    (root / "c/out").symlink_to(outside)
    (root / "c/link.png").symlink_to(outside / "z.png")
    (root / "c/dangling.png").symlink_to(outside / "gone.png")
    (outside / "back").symlink_to(root / "c")
    data = open_dataset(str(root))
    assert data.keys == ("b/x.png", "c/dangling.png", "c/link.png", "c/out/z.png", "c/y.png")
    assert data.classes == ("b", "c")
    assert "3 links to folders that are already in" in capsys.readouterr().err
    with pytest.raises(BrokenImage, match="No such file"):
        data.read(1, None)


def test_many_links_among_folders_end(tmp_path: Path) -> None:
    for here in range(12):
        put(tmp_path / f"{here:02}/p.png")
        for there in range(12):
            (tmp_path / f"{here:02}/to{there}").symlink_to(tmp_path / f"{there:02}")
    assert len(open_dataset(str(tmp_path))) == 12


def test_fingerprint_follows_names_and_sizes_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "one/data", tmp_path / "two/data"
    for root in (first, second):
        put(root / "a.png")
        put(root / "b.png")
    same = open_dataset(str(first)).fingerprint
    assert open_dataset(str(second)).fingerprint == same and len(same) == 64
    (second / "a.png").write_bytes(b"other")
    changed = open_dataset(str(second)).fingerprint
    (second / "a.png").write_bytes(b"longer")
    assert len({same, changed, open_dataset(str(second)).fingerprint}) == 3


def test_cache_is_used_and_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    put(tmp_path / "a/1.png")
    put(tmp_path / "b/2.png")
    settle(tmp_path)
    first = open_dataset(str(tmp_path))
    assert list(cache.rglob("*.json"))
    listed: list[str] = []
    real = os.scandir
    monkeypatch.setattr(folders.os, "scandir", lambda path: (listed.append(path), real(path))[1])
    again = open_dataset(str(tmp_path))
    assert listed == [] and again.keys == first.keys and again.fingerprint == first.fingerprint

    put(tmp_path / "a/3.png")
    assert open_dataset(str(tmp_path)).keys == ("a/1.png", "a/3.png", "b/2.png")
    assert listed == [str(tmp_path / "a")]
    (tmp_path / "b/2.png").unlink()
    assert open_dataset(str(tmp_path)).keys == ("a/1.png", "a/3.png")

    settle(tmp_path)
    before = open_dataset(str(tmp_path)).fingerprint
    with (tmp_path / "a/1.png").open("ab") as out:
        out.write(b"more")
    listed.clear()
    assert open_dataset(str(tmp_path)).fingerprint != before and listed == []


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    open_dataset(str(tmp_path))
    status = tmp_path.stat()
    put(tmp_path / "b.png")
    os.utime(tmp_path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_dataset(str(tmp_path)).keys == ("a.png", "b.png")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b'abc\n{"": [1]}'])
def test_damaged_cache_is_ignored(tmp_path: Path, cache: Path, damage: bytes) -> None:
    put(tmp_path / "a.png")
    settle(tmp_path)
    keys = open_dataset(str(tmp_path)).keys
    (index,) = cache.rglob("*.json")
    intact = index.read_bytes()
    index.write_bytes(damage)
    assert open_dataset(str(tmp_path)).keys == keys
    assert index.read_bytes() == intact and not list(cache.rglob("*.json.*"))
    assert json.loads(intact.split(b"\n")[1])


def test_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "data/a.png")
    settle(tmp_path / "data")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_dataset(str(tmp_path / "data"))) == 1


def test_text_list(tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", "red")
    elsewhere = put(tmp_path / "b.png", "blue")
    lines = ["in/a.png", "", str(elsewhere), "missing.jpg", "../" + tmp_path.name + "/b.png"]
    (tmp_path / "my list.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    data = open_dataset(str(tmp_path / "my list.txt"))
    assert data.name == "my_list"
    assert list(data.keys) == [line for line in lines if line]
    assert data.read(0, None)[0, 0].tolist() == [255, 0, 0]
    assert data.read(1, None)[0, 0].tolist() == data.read(3, None)[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(BrokenImage, match="No such file"):
        data.read(2, None)
    assert (data.targets == -1).all() and data.classes == ()


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_table_with_labels(tmp_path: Path, ending: str, delimiter: str) -> None:
    rows = [["Class", "id", "Path"], ["zebra", "1", 'a,"1".png'], ["", "2", "b.png"], ["ape", "3", "c.png"]]
    with (tmp_path / f"list.{ending}").open("w", newline="") as out:
        csv.writer(out, delimiter=delimiter).writerows(rows)
    data = open_dataset(str(tmp_path / f"list.{ending}"))
    assert data.keys == ('a,"1".png', "b.png", "c.png")
    assert data.classes == ("ape", "zebra") and data.targets.tolist() == [1, -1, 0]


def test_numbers_as_labels_are_in_numeric_order(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,target\na.png,10\nb.png,9\nc.png,10\n")
    data = open_dataset(str(tmp_path / "list.csv"))
    assert data.classes == ("9", "10") and data.targets.tolist() == [1, 0, 1]


def test_table_of_paths_alone(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a.png\nb.png\n")
    assert open_dataset(str(tmp_path / "list.csv")).keys == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "", "lists no images"),
        ("l.txt", "a.png\nb\0.png\n", "line 2: a NUL"),
        ("l.csv", "image,label\na.png,1\n", "no column path"),
        ("l.csv", "path,label\na.png,1\n,2\n", "row 3 has no path"),
        ("l.csv", "path,label\n", "lists no images"),
        ("l.txt", "a.png\nb.png\na.png\n", "lists a.png 2 times"),
        ("l.json", "[]", "neither a folder, nor a list"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        open_dataset(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/notes.txt").touch()
    with pytest.raises(UsageError, match=r"no images in .* \(looked for .jpg"):
        open_dataset(str(tmp_path / "images"))
    with pytest.raises(UsageError, match=r"did you mean .*/images"):
        open_dataset(str(tmp_path / "imgaes/deep/er"))
    with pytest.raises(UsageError, match="does not exist"):
        open_dataset(str(tmp_path / ("x" * 300)))
    with pytest.raises(UsageError, match="is empty"):
        open_dataset("")


def test_forbidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a/x.png")
    real = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"/a cannot be read \(Permission denied\)"):
        open_dataset(str(tmp_path))


def test_file_names_are_safe(tmp_path: Path) -> None:
    put(tmp_path / ".. a:b*猫" / "x.png")
    assert open_dataset(str(tmp_path / ".. a:b*猫")).name == "_a_b_猫"
    put(tmp_path / ("猫" * 80) / "x.png")
    assert len(f"{open_dataset(str(tmp_path / ('猫' * 80))).name}.h5.part".encode()) < 255


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_parts(tmp_path: Path, val: str) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", f"{val}/cat/3.png", f"{val}/dog/4.png", f"{val}/dog/5.png"):
        put(tmp_path / name)
    train, held_out = open_splits(str(tmp_path))
    assert (train.name, held_out.name) == ("train", val)
    assert train.classes == held_out.classes == ("cat", "dog")
    assert train.targets.tolist() == [0, 1] and held_out.targets.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat/1.png", "train/dog/1.png"], "no folder val or valid"),
        (["val/cat/1.png", "val/dog/1.png"], "no folder train"),
        (
            ["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/emu/1.png"],
            r"different classes \(2: dog, emu\)",
        ),
        (["train/cat/1.png", "train/dog/1.png", "train/1.png", "val/cat/1.png"], "train: 1.png lies outside"),
        (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png"], "val: there is only one class folder"),
    ],
)
def test_bad_parts(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        put(tmp_path / name)
    with pytest.raises(UsageError, match=message):
        open_splits(str(tmp_path))


def test_scenes() -> None:
    train, val = open_splits("scenes:images=50,size=32,seed=3")
    classes = scenes.CLASSES
    assert (train.name, val.name) == ("scenes", "scenes-val")
    assert (len(train), len(val)) == (50, max(len(classes), 12))
    assert train.keys[13] == f"{classes[13 % len(classes)]}/000013" and len(set(train.keys)) == 50
    assert train.targets.tolist() == [row % len(classes) for row in range(50)]
    assert (train.read(7, None) == scenes.render(3, "train", 7, 32)[0]).all()
    assert (val.read(7, None) == scenes.render(3, "val", 7, 32)[0]).all()
    same = open_dataset("scenes:seed=3,size=32,images=50")
    assert same.fingerprint == train.fingerprint
    others = {open_dataset(f"scenes:{rest}").fingerprint for rest in ("", "seed=3", "size=32,seed=3", "images=50")}
    assert len({train.fingerprint, val.fingerprint} | others) == 6
    assert train.short_side is not None and train.short_side(0) == 32


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("TRAINING", "Testing"), ("train", "Validation")])
@pytest.mark.parametrize("around", ["", "archive", "archive/archive"])
def test_parts_in_any_case_and_in_a_folder_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: str, val: str, around: str
) -> None:
    root = tmp_path / "data"
    for part, name in ((train, "1.png"), (val, "2.png")):
        for kind in "ab":
            put(root / around / part / kind / name)
    put(root / "__MACOSX" / around / "a.png")
    (root / "README.md").write_text("about")
    found = open_dataset(str(root))
    assert (found.keys, found.classes) == (("a/1.png", "b/1.png"), ("a", "b"))
    assert f"has {train} and {val}: using {root / around / train}" in capsys.readouterr().err
    splits = open_splits(str(root))
    assert [split.keys for split in splits] == [("a/1.png", "b/1.png"), ("a/2.png", "b/2.png")]


def test_a_folder_around_the_class_folders_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("ab", "abc"):
        put(tmp_path / "photos" / kind / "x" / "1.png")
    data = open_dataset(str(tmp_path))
    assert data.keys == ("photos/ab/x/1.png", "photos/abc/x/1.png")
    assert (data.classes, data.targets.tolist()) == (("ab", "abc"), [0, 1])
    assert "the 2 folders of photos are its classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "junk", ["@eaDir", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information", "#recycle"]
)
def test_folders_of_systems_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str], junk: str) -> None:
    for name in ("a/1.png", "b/2.png", f"{junk}/3.png", f"a/{junk}/4.png", ".ipynb_checkpoints/5.png"):
        put(tmp_path / name)
    data = open_dataset(str(tmp_path))
    assert (data.keys, data.classes) == (("a/1.png", "b/2.png"), ("a", "b"))
    assert "2 folders that no images of the data lie in are passed over, such as" in capsys.readouterr().err


def test_images_outside_of_the_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(9):
        put(tmp_path / "ab"[number % 2] / f"{number}.png")
    put(tmp_path / "z.png")
    data = open_dataset(str(tmp_path))
    assert data.classes == ("a", "b") and data.targets.tolist() == [0] * 5 + [1] * 4 + [-1]
    said = capsys.readouterr().err
    assert "1 of its 10 images, such as z.png, lie outside of its folders, which are the classes, and have none" in said
    put(tmp_path / "y.png")
    data = open_dataset(str(tmp_path))
    assert data.classes == () and set(data.targets.tolist()) == {-1}
    assert "2 of its 11 images, such as y.png, lie outside of its folders, so that" in capsys.readouterr().err


def replaced(path: Path, data: bytes) -> None:
    """Write a file anew, with the times of the old one and of its folder, as archives do."""
    times = [(place, place.stat()) for place in (path, path.parent) if place.exists()]
    new = path.with_name("new")
    new.write_bytes(data)
    new.replace(path)
    for place, status in times:
        os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_that_come_and_go_with_equal_times_are_seen(tmp_path: Path) -> None:
    put(tmp_path / "a/1.png")
    put(tmp_path / "b/2.png")
    settle(tmp_path)
    assert len(open_dataset(str(tmp_path))) == 2
    image = (tmp_path / "a/1.png").read_bytes()
    replaced(tmp_path / "a/3.png", image)
    settle(tmp_path)
    assert open_dataset(str(tmp_path)).keys == ("a/1.png", "a/3.png", "b/2.png")
    (tmp_path / "a/1.png").unlink()
    (tmp_path / "b").rename(tmp_path / "c")
    settle(tmp_path)
    assert open_dataset(str(tmp_path)).keys == ("a/3.png", "c/2.png")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("size", [500, 50_000])
def test_other_bytes_in_the_same_number_are_seen(
    tmp_path: Path, old: bool, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = b"a" * size, b"a" * (size - 1) + b"b"
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(first)
        if old:
            os.utime(tmp_path / name, (PAST, PAST))
    before = open_dataset(str(tmp_path)).fingerprint
    (tmp_path / "1.png").chmod(0o600)
    os.utime(tmp_path / "1.png")
    replaced(tmp_path / "2.png", first)
    assert open_dataset(str(tmp_path)).fingerprint == before, "the same bytes"
    assert "not those" not in capsys.readouterr().err
    replaced(tmp_path / "1.png", second)
    after = open_dataset(str(tmp_path)).fingerprint
    assert after != before and open_dataset(str(tmp_path)).fingerprint == after
    assert "1 images are not those that were there before, such as 1.png" in capsys.readouterr().err
    replaced(tmp_path / "1.png", first)
    assert open_dataset(str(tmp_path)).fingerprint == before


def test_of_many_images_none_is_read_at_first_and_a_new_entry_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SAMPLED", 0)
    read: list[str] = []
    real = folders._sample
    monkeypatch.setattr(folders, "_sample", lambda path, size: (read.append(path), real(path, size))[1])
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"a" * 500)
    before = open_dataset(str(tmp_path)).fingerprint
    settle(tmp_path)
    for name in ("1.png", "2.png"):
        os.utime(tmp_path / name, (PAST, PAST))  # as time would, after which entries are kept
    assert open_dataset(str(tmp_path)).fingerprint == before and read == []
    replaced(tmp_path / "1.png", b"b" * 500)
    after = open_dataset(str(tmp_path)).fingerprint
    assert after != before and read == [str(tmp_path / "1.png")]
    assert open_dataset(str(tmp_path)).fingerprint == after


def test_each_image_is_asked_for_its_entry_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        put(tmp_path / f"{number % 3}/{number}.png")
    (tmp_path / "0/link.png").symlink_to(tmp_path / "1/1.png")
    settle(tmp_path)
    asked: list[str] = []
    real = os.stat
    monkeypatch.setattr(folders.os, "stat", lambda path, **more: (asked.append(str(path)), real(path, **more))[1])
    folders.walk(tmp_path)
    images = [path for path in asked if path.endswith(".png")]
    assert len(images) == len(set(images)) == 31


@pytest.mark.parametrize("cache_home", [None, "", "relative"])
def test_without_a_home_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_home: str | None
) -> None:
    put(tmp_path / "data/a.png")
    settle(tmp_path / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("XDG_CACHE_HOME")
    if cache_home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert len(open_dataset(str(tmp_path / "data"))) == 1
    assert not list((tmp_path / "here").iterdir())


def test_the_endings_of_what_is_read(tmp_path: Path) -> None:
    names = [f"a{ending}" for ending in (".jfif", ".ppm", ".PGM", ".pbm", ".pnm", ".avif", ".jpe")]
    for name in names:
        put(tmp_path / name)
    assert set(open_dataset(str(tmp_path)).keys) == set(names)


@pytest.mark.parametrize("letter", ["a", "é", "猫", "𐀀"])
def test_names_are_short_enough_for_all_endings(letter: str) -> None:
    short = file_name(letter * 300)
    assert letter in short and len(f"{short}.h5.progress.part".encode()) <= 255
    assert file_name(letter * 10) == letter * 10
