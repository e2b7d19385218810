"""What a folder of Hugging Face says about its images, and that what differs here is told."""

import json

import pytest

from ktransfer.errors import UsageError
from ktransfer.networks import teachers
from ktransfer.networks.formats import preprocessing

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 224, "width": 224}
BILINEAR = {"resample": 2}


@pytest.mark.parametrize(
    ("states", "size", "said"),
    [
        (HALF | BILINEAR | {"size": {"shortest_edge": 224}, "crop_size": SQUARE, "do_center_crop": True}, 224, None),
        # ViT's, SigLIP's; the same of an old file
        (HALF | BILINEAR | {"size": SQUARE}, 224, "squeezed to 224 x 224; here: short side 224, centre square"),
        (HALF | BILINEAR | {"size": 192}, 192, "not cut to a square (short side 192)"),
        # DINOv2's
        (
            HALF | {"size": {"shortest_edge": 256}, "crop_size": SQUARE, "do_center_crop": True, "resample": 3},
            224,
            "cut from a short side of 256, resized by bicubic",
        ),
        (
            HALF | BILINEAR | {"size": {"height": 256, "width": 256}, "crop_size": SQUARE, "do_center_crop": True},
            224,
            "squeezed to 256 x 256 and cut to 224 x 224",
        ),
        # ConvNeXt's
        (HALF | BILINEAR | {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, "cut from a short side of 256"),
        (HALF | BILINEAR | {"size": {"shortest_edge": 384}, "crop_pct": 0.875}, 384, "squeezed to 384 x 384"),
        (HALF | {"do_resize": False}, 96, "not resized"),
    ],
)
def test_side_and_differences(tmp_path, states, size, said):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(states))
    found = preprocessing.read(tmp_path, 96)
    assert (found.size, found.mean, found.deviation) == (size, (0.5,) * 3, (0.5,) * 3)
    assert found.line is None if said is None else said in str(found.line)


def test_statistics(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    geometry = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}

    def read(**states):
        file.write_text(json.dumps(geometry | states))
        return preprocessing.read(tmp_path, 224)

    assert read(do_normalize=False)[1:] == ((0,) * 3, (1,) * 3, None)
    assert read(**HALF, rescale_factor=0.00392156862745098)[1] == (0.5,) * 3
    doubled = read(**HALF, rescale_factor=2 / 255)  # (2 x - 0.5) / 0.5 is (x - 0.25) / 0.25
    assert doubled.mean == pytest.approx((0.25,) * 3) and doubled.deviation == pytest.approx((0.25,) * 3)
    raw = read(image_mean=[127.5] * 3, image_std=[51] * 3, do_rescale=False)
    assert raw.mean == pytest.approx((0.5,) * 3) and raw.deviation == pytest.approx((0.2,) * 3)
    unstated = read()
    assert unstated.mean is None and "here by ImageNet's" in str(unstated.line)
    file.unlink()
    assert "without preprocessor_config.json" in str(preprocessing.read(tmp_path, 96).line)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": geometry | HALF}))
    assert preprocessing.read(tmp_path, 96) == (32, (0.5,) * 3, (0.5,) * 3, None)


@pytest.mark.parametrize(
    "states",
    [
        "{",
        "[]",
        '{"size": "large"}',
        '{"size": {"height": 3}}',
        '{"image_mean": [1], "image_std": [1]}',
        '{"image_mean": [1, 1, 1], "image_std": [0, 1, 1]}',
        '{"image_processor": 3}',
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, states):
    (tmp_path / "preprocessor_config.json").write_text(states)
    with pytest.raises(UsageError, match="download it again") as caught:
        preprocessing.read(tmp_path, 96)
    assert "\n" not in str(caught.value)


def test_what_timm_and_torchvision_state_is_named_where_it_differs(tmp_path, capsys):
    pytest.importorskip("timm")
    (tmp_path / "w.pth").write_bytes(b"")
    teachers.find("timm:vit_tiny_patch16_224", None, str(tmp_path / "w.pth"), 0)
    said = (
        "its authors' images are cut from a short side of 248, resized by bicubic; here: short side 224, centre square"
    )
    assert said in capsys.readouterr().err
    teachers.find("torchvision:resnet34", None, str(tmp_path / "w.pth"), 0)
    assert "torchvision:resnet34: its authors' images are cut from a short side of 256;" in capsys.readouterr().err
    assert preprocessing.differences("n", 224, 224, "bilinear") is None
