"""What others published: the paper's tables as they are printed, and every number with a source."""

import pytest

from ktransfer.eval.config import PROTOCOLS
from ktransfer.eval.published import FILE, published, rows


def cells(protocol, table, method):
    return [row.value for row in rows(protocol) if row.table.startswith(table) and row.method == method]


def test_the_papers_tables():
    """Noroozi et al., CVPR 2018: linear, non-linear, VOC, number of clusters, across data sets."""
    linear = "ImageNet, linear, AlexNet"
    assert cells("linear", linear, "Random") == ["11.6", "17.1", "16.9", "16.3", "14.1"]
    assert cells("linear", linear, "Jigsaw++") == ["18.2", "28.7", "34.1", "33.2", "28.0"]
    assert cells("linear", linear, "CC+Jigsaw++") == ["18.9", "30.5", "35.7", "35.4", "32.2"]
    assert cells("linear", linear, "CC+vgg-Jigsaw++") == ["19.2", "32.0", "37.3", "37.1", "34.6"]
    assert cells("linear", linear, "Supervised") == ["19.3", "36.3", "44.2", "48.3", "50.5"]
    deep = cells("nonlinear", "ImageNet, non-linear", "CC+vgg-Jigsaw++")
    assert deep == ["55.9", "55.1", "52.4", "49.5", "43.9", "37.3", "27.9"]
    assert cells("finetune", "VOC07 classification, AlexNet, mAP %", "CC+vgg-Jigsaw++") == ["72.5"]
    assert cells("detect", "VOC07 detection", "CC+vgg-Jigsaw++") == ["56.5", "57.2"]
    assert cells("segment", "VOC12 segmentation", "CC+vgg-Jigsaw++") == ["42.6"]
    assert cells("finetune", "VOC07 classification by", "CC+Jigsaw++") == ["69.1", "69.5", "69.9", "69.9", "70.0"]
    assert cells("finetune", "VOC07 classification, clusters of", "CC+Jigsaw++") == ["69.9", "68.4", "68.3"]
    assert cells("detect", "COCO detection, ResNet-50", "Random start, self-training") == ["41.9"]


def test_every_number_has_a_place_and_a_source():
    found = [row for name in (*PROTOCOLS, "detect", "segment") for row in rows(name)]
    assert len(set(found)) >= len(FILE.read_text(encoding="utf-8").splitlines()) - 1
    places = [(row.protocol, row.table, row.method, row.column) for row in found]
    assert len(set(found)) == len(set(places))
    for row in found:
        assert 0 < float(row.value) < 100
        assert all(row)


def test_as_tables():
    text = published("linear")
    line = next(line for line in text.splitlines() if line.startswith("| CC+vgg-Jigsaw++ "))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "CC+vgg-Jigsaw++",
        "19.2",
        "32.0",
        "37.3",
        "37.1",
        "34.6",
    ]
    assert text.count("From: ") == len({row.table for row in rows("linear")})
    assert "CVPR 2018" in text
    assert published("filters") == ""


@pytest.mark.parametrize("protocol", ["linear", "nonlinear", "finetune", "knn", "detect", "segment"])
def test_each_table_is_a_rectangle(protocol):
    for block in published(protocol).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
