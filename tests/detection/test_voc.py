import numpy as np
import pytest
from PIL import Image

from ktransfer.detection.opening import open_detection
from ktransfer.errors import BrokenImage, UsageError

BOX = "<object><name>{name}</name><difficult>{hard}</difficult><bndbox>{box}</bndbox></object>"


def annotation(objects):
    rows = [
        BOX.format(
            name=name,
            hard=hard,
            box="".join(
                f"<{side}>{at}</{side}>" for side, at in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            ),
        )
        for name, hard, box in objects
    ]
    return f"<annotation><size><width>50</width><height>30</height></size>{''.join(rows)}</annotation>"


@pytest.fixture
def devkit(tmp_path):
    """VOC2007 with four images, two for training and two for testing."""
    year = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages", "SegmentationClass"):
        (year / folder).mkdir(parents=True)
    things = {
        "000001": [("dog", 0, (1, 1, 50, 30)), ("person", 1, (5, 6, 10, 12))],
        "000002": [("cat", 0, (3, 3, 9, 9))],
        "000003": [("dog", 0, (2, 2, 20, 20))],
        "000004": [],
    }
    for name, objects in things.items():
        (year / "Annotations" / f"{name}.xml").write_text(annotation(objects))
        Image.new("RGB", (50, 30)).save(year / "JPEGImages" / f"{name}.jpg")
    (year / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000002\n")
    (year / "ImageSets" / "Main" / "test.txt").write_text("000003\n000004\n")
    return tmp_path


def test_a_devkit_opens(devkit):
    for root in (devkit, devkit / "VOCdevkit", devkit / "VOCdevkit" / "VOC2007"):
        train, test = open_detection(str(root))
        assert len(train) == len(test) == 2 and len(train.classes) == 20
    first = train.objects[0]
    # Pixels count from 1 and both ends belong to the box: 1..50 is the whole image, 5..10 six pixels.
    assert first.boxes.tolist() == [[0, 0, 50, 30], [4, 5, 10, 12]]
    assert [train.classes[label] for label in first.labels] == ["dog", "person"]
    assert first.difficult.tolist() == [False, True] and not first.crowd.any()
    assert test.counts["images without a box"] == 1 and train.keys[0] == "VOC2007/000001"
    assert test.read(0, None).shape == (30, 50, 3)


def test_without_test_boxes_val_is_the_test_part(devkit):
    year = devkit / "VOCdevkit" / "VOC2012"
    (devkit / "VOCdevkit" / "VOC2007").rename(year)
    lists = year / "ImageSets" / "Main"
    (lists / "test.txt").unlink()
    (lists / "train.txt").write_text("000001\n")
    (lists / "val.txt").write_text("000002\n")
    train, test = open_detection(str(devkit))
    assert train.keys == ("VOC2012/000001",) and test.keys == ("VOC2012/000002",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation>", "cannot be read"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "declares XML entities"),
        ("<annotation><size><width>5</width></size></annotation>", "lacks size/height"),
        (annotation([("dog", 0, ("a", 1, 2, 3))]), "not a number"),
    ],
)
def test_a_broken_annotation_is_one_line(devkit, text, words):
    (devkit / "VOCdevkit" / "VOC2007" / "Annotations" / "000002.xml").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        open_detection(str(devkit))
    assert "\n" not in str(caught.value)


def test_missing_images_are_counted(devkit):
    images = devkit / "VOCdevkit" / "VOC2007" / "JPEGImages"
    (images / "000001.jpg").unlink()
    train, _ = open_detection(str(devkit))
    assert train.counts["images that do not exist"] == 1
    (images / "000002.jpg").unlink()
    with pytest.raises(UsageError, match="none of its images exists"):
        open_detection(str(devkit))


def test_segmentation_has_lists_of_its_own(devkit):
    with pytest.raises(UsageError, match="ImageSets/Segmentation lists no images"):
        open_detection(str(devkit), masks=True)
    lists = devkit / "VOCdevkit" / "VOC2007" / "ImageSets" / "Segmentation"
    lists.mkdir()
    (lists / "trainval.txt").write_text("000002\n")
    (lists / "test.txt").write_text("000003\n")
    train, test = open_detection(str(devkit), masks=True)
    assert train.keys == ("VOC2007/000002",) and test.keys == ("VOC2007/000003",)


def test_an_image_that_another_year_lists_too_is_there_once(devkit, capsys):
    """000003 of VOC2007 is evaluated, 2007_000003 of VOC2012 the same image; so are 000002 and 2007_000002."""
    first = devkit / "VOCdevkit" / "VOC2007"
    second = first.with_name("VOC2012")
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (second / folder).mkdir(parents=True)
    for number in (2, 3, 4):
        old, new = f"00000{number}", f"2007_00000{number}"
        (second / "JPEGImages" / f"{new}.jpg").write_bytes((first / "JPEGImages" / f"{old}.jpg").read_bytes())
        (second / "Annotations" / f"{new}.xml").write_text((first / "Annotations" / f"{old}.xml").read_text())
    for one in ("2010_000003", "000003"):  # another image of that number
        (second / "JPEGImages" / f"{one}.jpg").write_bytes((first / "JPEGImages" / "000001.jpg").read_bytes())
        (second / "Annotations" / f"{one}.xml").write_text((first / "Annotations" / "000001.xml").read_text())
    for year, lists in (
        (first, {"trainval": ["000001", "000002"], "test": ["000003"], "train": ["000001"], "val": ["000002"]}),
        (second, {"trainval": ["2007_000002", "2007_000003", "2007_000004", "2010_000003", "000003"]}),
    ):
        (year / "ImageSets" / "Segmentation").mkdir(parents=True)
        for part, names in lists.items():
            (year / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names))
    train, test = open_detection(str(devkit), masks=True)
    assert test.keys == ("VOC2007/000003",)
    names = [key.split("/")[1] for key in train.keys]
    assert names == ["000001", "000002", "2007_000004", "2010_000003", "000003"]
    assert "2 images left out that the test split or another year lists too" in capsys.readouterr().err
    # Without a test list val is evaluated, by the same rule.
    (first / "ImageSets" / "Segmentation" / "test.txt").unlink()
    (second / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000002\n2007_000003\n")
    (second / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000004\n2007_000001\n")
    (second / "Annotations" / "2007_000001.xml").write_text((first / "Annotations" / "000001.xml").read_text())
    train, test = open_detection(str(devkit), masks=True)
    assert test.keys == ("VOC2007/000002", "VOC2012/2007_000004", "VOC2012/2007_000001")
    assert train.keys == ("VOC2012/2007_000003",)


def test_the_fingerprint_covers_the_masks_where_they_are_learned(devkit):
    year = devkit / "VOCdevkit" / "VOC2007"
    (year / "ImageSets" / "Segmentation").mkdir()
    for part, name in (("trainval", "000002"), ("test", "000003")):
        (year / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(name)
    plain, found = open_detection(str(devkit))[0].fingerprint, []
    for held in (None, b"one", b"two", b"one"):
        if held:
            (year / "SegmentationClass" / "000002.png").write_bytes(held)
        found.append([part.fingerprint for part in open_detection(str(devkit), masks=True)])
    assert len({train for train, _ in found}) == 3 and found[1] == found[3]
    assert len({test for _, test in found}) == 1
    assert open_detection(str(devkit))[0].fingerprint == plain


def test_lists_stay_in_their_folder(devkit):
    path = devkit / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
    for text, words in (("../x\n", "leads out"), ("000001\n000001\n", "twice")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            open_detection(str(devkit))
    path.write_text("000001\n000009\n")
    with pytest.raises(UsageError, match="every listed image needs its annotation"):
        open_detection(str(devkit))


def test_masks_are_palette_images(devkit):
    place = devkit / "VOCdevkit" / "VOC2007" / "SegmentationClass" / "000003.png"
    image = Image.fromarray(np.full((30, 50), 12, np.uint8), "P")
    image.putpalette(list(range(256)) * 3)
    image.save(place)
    _, test = open_detection(str(devkit))
    assert (test.label_map(0) == 12).all() and test.label_map(0).shape == (30, 50)
    with pytest.raises(BrokenImage):
        test.label_map(1)
    Image.new("RGB", (50, 30)).save(place)
    with pytest.raises(BrokenImage, match="no palette"):
        test.label_map(0)


def year_of(devkit):
    return devkit / "VOCdevkit" / "VOC2007"


def rewritten(devkit, old, new, name="000002"):
    path = year_of(devkit) / "Annotations" / f"{name}.xml"
    path.write_text(path.read_text().replace(old, new))
    return path


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_size_of_zero_is_that_of_the_image(devkit, side):
    rewritten(devkit, f"<{side}>{50 if side == 'width' else 30}</{side}>", f"<{side}>0</{side}>")
    train, _ = open_detection(str(devkit))
    assert train.sizes.tolist() == [[50, 30]] * 2 and train.objects[1].boxes.tolist() == [[2, 2, 9, 9]]
    assert train.counts["sizes of 0, taken from the images"] == 1
    (year_of(devkit) / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(UsageError, match=r"000002\.xml: states .* its image cannot be read"):
        open_detection(str(devkit))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<width>50", "<width>wide", "the size/width of its annotation is not a number"),
        ("<width>50", "<width>50.5", "no size of an image"),
        ("<width>50", "<width>-5", "no size of an image"),
        ("<width>50</width>", "<width/>", "lacks size/width"),
        ("<name>cat", "<name> ", "its object lacks name"),
        ("<xmin>3</xmin>", "", "its object lacks bndbox/xmin"),
        ("<xmin>3", "<xmin>nan", "the bndbox/xmin of its object is not a number"),
        ("<difficult>0", "<difficult>perhaps", "the difficult of its object: 'perhaps' is neither"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(devkit, old, new, words):
    path = rewritten(devkit, old, new)
    with pytest.raises(UsageError, match=words) as caught:
        open_detection(str(devkit))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hard"), [("1", True), ("true", True), ("0", False), ("false", False), ("Unspecified", False), ("", False)]
)
def test_numbers_with_a_point_and_difficult_in_words(devkit, text, hard):
    rewritten(devkit, "<difficult>0", f"<difficult>{text}")
    rewritten(devkit, "<width>50<", "<width> 50.0 <")
    train, _ = open_detection(str(devkit))
    assert train.objects[1].difficult.tolist() == [hard] and train.sizes[1].tolist() == [50, 30]


def moved(devkit, new, ending=".jpg"):
    """Image 000002 under another name."""
    year = year_of(devkit)
    for folder, end, other in (("Annotations", ".xml", ".xml"), ("JPEGImages", ".jpg", ending)):
        place = year / folder / f"{new}{other}"
        place.parent.mkdir(parents=True, exist_ok=True)
        (year / folder / f"000002{end}").rename(place)
    (year / "ImageSets" / "Main" / "trainval.txt").write_text(f"000001\n{new}\n", encoding="utf-8")


@pytest.mark.parametrize("name", ["my image 2", "sub/x", "sub dir/my x", "b\u00e4r", "a\u0085b", "2007.17", "x 1"])
@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".png"])
def test_names_and_endings_as_people_have_them(devkit, name, ending):
    moved(devkit, name, ending)
    train, _ = open_detection(str(devkit))
    assert train.keys[1] == f"VOC2007/{name}" and train.read(1, None).shape == (30, 50, 3)
    assert train.reader(1)(None).shape == (30, 50, 3)


def test_lists_with_endings_flags_marks_and_windows_lines(devkit):
    path = year_of(devkit) / "ImageSets" / "Main" / "trainval.txt"
    for text in (
        "000001.jpg\n000002.jpg\n",
        "000001  1\n000002 -1\n",
        "\ufeff000001\r\n000002\r\n",
        "000001.xml\n./000002",
    ):
        path.write_text(text, encoding="utf-8")
        assert open_detection(str(devkit))[0].keys == ("VOC2007/000001", "VOC2007/000002")
    path.write_bytes(b"b\xe4r\n")
    with pytest.raises(UsageError, match=r"trainval\.txt: cannot be read"):
        open_detection(str(devkit))
    for text in ("sub/../../x\n", "/etc/x\n", "a\\b\n", ".x\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match="leads out"):
            open_detection(str(devkit))


def test_an_image_that_only_its_annotation_names(devkit):
    year = year_of(devkit)
    (year / "JPEGImages" / "000002.jpg").rename(year / "JPEGImages" / "photo of a cat.png")
    rewritten(devkit, "<annotation>", "<annotation><filename>C:\\x\\photo of a cat.png</filename>")
    assert open_detection(str(devkit))[0].read(1, None).shape == (30, 50, 3)


@pytest.mark.parametrize("encoding", ["latin-1", "windows-1252", "gbk", "utf-16", "utf-8", "utf-8-sig"])
def test_declared_encodings_are_read(devkit, encoding):
    path = year_of(devkit) / "Annotations" / "000002.xml"
    word = "\u732b" if encoding in ("gbk", "utf-16") else "b\u00e4r"
    declared = encoding.removesuffix("-sig")
    text = f"<?xml version='1.0' encoding='{declared}'?>\n" + path.read_text().replace("cat", word)
    path.write_bytes(text.encode(encoding))
    train, _ = open_detection(str(devkit))
    assert word in train.classes
    path.write_bytes(text.replace("<annotation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>").encode(encoding))
    with pytest.raises(UsageError, match="declares XML entities"):
        open_detection(str(devkit))
    path.write_bytes(b"<?xml version='1.0' encoding='klingon'?><annotation/>")
    with pytest.raises(UsageError, match=r"000002\.xml: cannot be read \(unknown encoding"):
        open_detection(str(devkit))


@pytest.mark.parametrize("split", ["trainval", "train"])
def test_one_list_alone_is_divided(devkit, split, capsys):
    lists = year_of(devkit) / "ImageSets" / "Main"
    (lists / "test.txt").unlink()
    (lists / "trainval.txt").unlink()
    for number in range(10, 20):
        for folder, end in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            place = year_of(devkit) / folder
            (place / f"{number}.{end}").write_bytes((place / f"000003.{end}").read_bytes())
    (lists / f"{split}.txt").write_text("\n".join(map(str, range(10, 20))))
    train, test = open_detection(str(devkit))
    assert len(train) == 8 and len(test) == 2 and not set(train.keys) & set(test.keys)
    assert f"a fifth of {split}.txt" in capsys.readouterr().err


def test_the_other_list_serves_where_one_is_missing(devkit):
    lists = year_of(devkit) / "ImageSets" / "Main"
    (lists / "trainval.txt").rename(lists / "train.txt")
    assert [len(one) for one in open_detection(str(devkit))] == [2, 2]
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "test.txt").unlink()
    (lists / "val.txt").write_text("000001\n")
    assert [one.keys for one in open_detection(str(devkit))] == [("VOC2007/000002",), ("VOC2007/000001",)]
    (lists / "val.txt").write_text("000001\n000002\n")
    with pytest.raises(UsageError, match="all images of trainval"):
        open_detection(str(devkit))
    (lists / "trainval.txt").unlink()
    (lists / "val.txt").unlink()
    with pytest.raises(UsageError, match="lists no images for training"):
        open_detection(str(devkit))
