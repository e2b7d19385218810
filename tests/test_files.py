"""Files are whole or not there."""

import codecs
import errno
import hashlib
import os
from pathlib import Path

import pytest

from ktransfer import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trips(tmp_path):
    files.write_bytes(tmp_path / "deep/er/b", b"\0\1")
    files.write_text(tmp_path / "t", "né\n")
    files.write_json(tmp_path / "j", {"b": ["é", 1.5, None], "a": {}})
    assert (tmp_path / "deep/er/b").read_bytes() == b"\0\1"
    assert (tmp_path / "t").read_bytes() == "né\n".encode()
    assert files.read_json(tmp_path / "j") == {"b": ["é", 1.5, None], "a": {}}
    text = (tmp_path / "j").read_text("utf-8")
    assert "é" in text and text.index('"b"') < text.index('"a"') and text.endswith("}\n")
    assert names(tmp_path) == ["deep", "j", "t"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    files.write_text(path, "old")

    def write(part: Path) -> None:
        part.write_text("half of the n")
        assert path.read_text() == "old"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        files.write_whole(path, write)
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_the_content_is_durable_before_the_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append("sync " + Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write_bytes(tmp_path / "x", b"1")
    assert done == ["sync x.part", "rename", f"sync {tmp_path.name}"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_names_the_file_and_leaves_no_half(tmp_path):
    def write(part: Path) -> None:
        part.write_text("half")
        full()

    with pytest.raises(OSError) as caught:
        files.write_whole(tmp_path / "x", write)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "x")
    assert names(tmp_path) == []


def test_full_disk_in_other_words(tmp_path, monkeypatch):
    """torch and safetensors raise errors of their own: what the disk says then counts."""

    def write(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(RuntimeError, match="unexpected pos"):  # the disk has room: their error is the real one
        files.write_whole(tmp_path / "x", write)
    monkeypatch.setattr(files, "_append", full)
    with pytest.raises(OSError) as caught:
        files.write_whole(tmp_path / "x", write)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_reserve(tmp_path):
    files.reserve(tmp_path / "x", 1 << 40, 4096)  # more than any test machine has: all but the head is a hole
    status = (tmp_path / "x").stat()
    assert status.st_size == 1 << 40 and 4096 <= status.st_blocks * 512 < 1 << 20


def test_remove(tmp_path):
    files.write_text(tmp_path / "folder/deep/x", "")
    files.write_text(tmp_path / "file", "")
    for name in ("folder", "file", "nothing"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == []


def test_sha256(tmp_path):
    data = os.urandom(100_000)
    files.write_bytes(tmp_path / "x", data)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_json_keeps_names_that_are_not_unicode(tmp_path: Path) -> None:
    value = {"path": os.fsdecode(b"a\xe9\xff.png"), "other": "é猫🙂\u2028"}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert "é猫🙂" in text and files.read_json(tmp_path / "a.json") == value
    files.write_text(tmp_path / "a.txt", value["path"])
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a\\udce9\\udcff.png"


def test_lines_and_marks(tmp_path: Path) -> None:
    assert files.lines_of("a\u2028b\x85c\r\nd\re\n\nf") == ["a\u2028b\x85c", "d\re", "", "f"]
    assert files.lines_of("a\n") == ["a"] and files.lines_of("") == []
    (tmp_path / "mark.txt").write_bytes(codecs.BOM_UTF8 + "é\r\n".encode())
    assert files.read_text(tmp_path / "mark.txt") == "é\r\n"


@pytest.mark.parametrize("letter", ["a", "é", "猫", "🙂"])
def test_names_of_any_length_can_be_written(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * (255 // len(letter.encode())))
    files.write_text(path, "whole")
    assert path.read_text() == "whole" and names(tmp_path) == [path.name]


def test_a_name_that_is_not_unicode_for_others(tmp_path: Path) -> None:
    for name in (b"a.txt", b"a\xe9.txt"):
        path = tmp_path / os.fsdecode(name)
        path.write_text("here")
        with files.in_unicode(path) as place:
            place.encode()
            assert Path(place).read_text() == "here"
