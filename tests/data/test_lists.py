"""Lists as people and programs write them: read where one thing can be meant."""

import codecs
import os
from pathlib import Path

import pytest
from PIL import Image

from ktransfer.data.opening import open_dataset, open_splits
from ktransfer.errors import UsageError

ODD = ("one\x85two.png", "one\u2028two.png", "one\x0ctwo.png", "one\x1etwo.png", " blank.png", "é.png")


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path, "PNG")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.tsv"])
def test_only_line_ends_end_a_line(tmp_path: Path, name: str, end: str) -> None:
    for one in ODD:
        put(tmp_path / one)
    head = [] if name.endswith("txt") else ["path"]
    (tmp_path / name).write_bytes(end.join([*head, *ODD, ""]).encode())
    data = open_dataset(str(tmp_path / name))
    assert len(data) == len(ODD)
    assert [data.read(row, None).shape for row in range(len(data))] == [(6, 8, 3)] * len(ODD)


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_names_that_are_not_unicode(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.png")
    odd = os.fsencode(tmp_path) + b"/b\xe9.png"
    with open(odd, "wb") as out:  # noqa: PTH123
        out.write((tmp_path / "a.png").read_bytes())
    head = b"path\n" if name.endswith("csv") else b""
    (tmp_path / name).write_bytes(head + b"a.png\nb\xe9.png\n")
    data = open_dataset(str(tmp_path / name))
    assert data.keys == ("a.png", "b\\xe9.png") and data.read(1, None).shape == (6, 8, 3)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_tables_of_spreadsheets(tmp_path: Path, encoding: str, delimiter: str, declared: bool, ending: str) -> None:
    rows = [("label", "path"), ("cat", "a.png"), ("dog", "é.png"), ("cat", '"x, y;z.png"')]
    for _, name in rows[1:]:
        put(tmp_path / name.strip('"'))
    text = f"sep={delimiter}\r\n" * declared + "".join(delimiter.join(row) + "\r\n" for row in rows)
    (tmp_path / f"list.{ending}").write_bytes(text.encode(encoding))
    data = open_dataset(str(tmp_path / f"list.{ending}"))
    assert data.keys == ("a.png", "é.png", "x, y;z.png")
    assert data.classes == ("cat", "dog") and data.targets.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("lines", "labels"),
    [
        (["sub\\a.png", "sub\\b c.png"], None),
        (["sub/a.png  ", "\tsub/b c.png"], None),
        (["sub/a.png 1", "sub/b c.png 0"], [1, 0]),
        (["sub\\a.png\tdog", "sub/b c.png, cat"], [1, 0]),
        (["sub/a.png;1", "sub/b c.png;0"], [1, 0]),
    ],
)
def test_paths_that_can_be_meant(
    tmp_path: Path, lines: list[str], labels: list[int] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "sub/a.png")
    put(tmp_path / "sub/b c.png")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    data = open_dataset(str(tmp_path / "list.txt"))
    assert data.keys == ("sub/a.png", "sub/b c.png") and data.targets.tolist() == (labels or [-1, -1])
    assert "read otherwise" in capsys.readouterr().err
    (tmp_path / "train.csv").write_text("path,label\nsub\\a.png,0\nsub/b c.png ,1\n")
    (tmp_path / "val.csv").write_text("path;label\nsub\\a.png;0\nsub/b c.png ;1\n")
    for split in open_splits(str(tmp_path)):
        assert split.keys == ("sub/a.png", "sub/b c.png") and split.targets.tolist() == [0, 1]


def test_what_exists_is_meant(tmp_path: Path) -> None:
    for name in ("a.png", "a.png 1", "b\\c.png", " d.png"):
        put(tmp_path / name)
    (tmp_path / "list.txt").write_text("a.png 1\nb\\c.png\n d.png\nmissing.png 3\n")
    data = open_dataset(str(tmp_path / "list.txt"))
    assert data.keys == ("a.png 1", "b\\\\c.png", " d.png", "missing.png 3") and data.classes == ()


def test_two_ways_to_one_image_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\na.png \n")
    with pytest.raises(UsageError, match=r"lists a.png 2 times"):
        open_dataset(str(tmp_path / "list.txt"))


def test_a_byte_order_mark_is_no_part_of_a_path(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF8 + b"a.png")
    assert open_dataset(str(tmp_path / "list.txt")).keys == ("a.png",)
