"""`export --int8`: whole numbers that give nearly the same classes, and a card that says how nearly."""

import json
import logging
import shutil

import numpy as np
import onnx
import pytest
import torch

from ktransfer import cli
from ktransfer.data.loader import ImageLoader
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.retrain import export, load_model
from ktransfer.retrain.students import quantising
from ktransfer.retrain.students.predicting import predict

SCENES = "scenes:images=40,size=48"


@pytest.fixture(scope="module")
def quantised(of_classes, tmp_path_factory):
    run = tmp_path_factory.mktemp("quantised") / "mine"
    shutil.copytree(of_classes, run)
    handlers = list(logging.getLogger().handlers)
    export(run, int8=True, calibration=16)
    assert logging.getLogger().handlers == handlers
    return run


def test_weights_are_whole_numbers_by_channel_and_the_float_file_stays_as_it_is(quantised, exported):
    folder = quantised / "export"
    assert (folder / "student.onnx").read_bytes() == (exported / "export" / "student.onnx").read_bytes()
    content = onnx.load(folder / "student.int8.onnx")
    onnx.checker.check_model(content, full_check=True)
    kinds = [node.op_type for node in content.graph.node]
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(kinds) and "ConvInteger" not in kinds
    held = {one.name: one for one in content.graph.initializer}
    pairs = [node.input for node in content.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    eight = [pair for pair in pairs if held[pair[0]].data_type == onnx.TensorProto.INT8]
    assert len(eight) == 8  # five convolutions, three products
    assert all(onnx.numpy_helper.to_array(held[pair[1]]).size > 1 for pair in eight)
    facts = {entry.key: entry.value for entry in content.metadata_props}
    own = {entry.key: entry.value for entry in onnx.load(folder / "student.onnx").metadata_props}
    assert facts == own and json.loads(facts["network"])["arch"] == "alexnet_bn"
    assert [one.name for one in content.graph.output] == ["logits", "embedding"]


def test_what_it_costs_is_counted_on_images_without_part_in_the_calibration(quantised, capsys):
    folder = quantised / "export"
    record = json.loads((folder / "stage.json").read_text())["export"]
    assert set(record["outputs"]) == {"student.onnx", "student.int8.onnx"}
    found = record["result"]["int8"]
    data = open_dataset(SCENES)
    calibrating, compared = quantising.split(data, 16, 1000)
    assert len(calibrating) == 16 and len(compared) == 24 == found["images"]
    assert not set(calibrating.tolist()) & set(compared.tolist())
    whole, own = load_model(folder / "student.int8.onnx"), load_model(folder / "student.onnx")
    pixels, _ = ImageLoader(data, 40, cache="off").batch(compared)
    classes, before = whole(pixels).argmax(1), own(pixels).argmax(1)
    true = torch.from_numpy(data.targets)[compared]
    assert found["agreement"] == pytest.approx(float((classes == before).double().mean()))
    shares = [float((one == true).double().mean()) for one in (classes, before)]
    assert found["accuracy"] == pytest.approx(shares)
    a, b = whole.embeddings(pixels), own.embeddings(pixels)
    assert (
        found["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b).mean()), abs=1e-4)
        and found["cosine"] > 0.9
    )
    text = (folder / "README.md").read_text()
    assert f"| student.int8.onnx | same class as float on {found['agreement']:.1%} of 24 images" in text
    assert f"{shares[0]:.1%} right (float: {shares[1]:.1%})" in text
    assert not torch.equal(whole(pixels), own(pixels))


def test_clusters_have_no_accuracy_and_the_same_images_give_the_same_bytes(of_clusters, tmp_path, capsys):
    for name in "ab":
        export(tmp_path / name, model=str(of_clusters), int8=True, data=SCENES, calibration=8, held_out=8)
    first, second = (tmp_path / name / "export" / "student.int8.onnx" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    said = capsys.readouterr().err
    assert "of 8 images without part" in said and "right" not in said and "pre-processing" not in said
    assert json.loads((tmp_path / "a/export/stage.json").read_text())["export"]["result"]["int8"]["accuracy"] is None


def test_it_labels_images(quantised, tmp_path):
    found = predict(quantised / "export" / "student.int8.onnx", SCENES, tmp_path / "found.npy")
    assert np.load(found).shape[0] == 40


def test_misuse_is_one_line(of_classes, tmp_path, capsys):
    copied = tmp_path / "mine.safetensors"
    shutil.copy(of_classes / "retrain" / "model.safetensors", copied)
    with pytest.raises(UsageError, match="does not say what it was trained on; name images with --data"):
        export(tmp_path / "run", model=str(copied), int8=True)
    with pytest.raises(UsageError, match="--int8 is read by --format onnx alone; leave it out"):
        export(tmp_path / "run", model=str(copied), int8=True, format="torch")
    with pytest.raises(UsageError, match="--calibration is read by --int8 alone; leave it out"):
        export(tmp_path / "run", model=str(copied), calibration=3)
    assert not (tmp_path / "run").exists()
    given = ["--run", tmp_path / "run", "--dry-run", "export", "--model", of_classes, "--int8"]
    assert cli.main([str(word) for word in given]) == 0
    capsys.readouterr()


def test_few_images_are_halved():
    data = open_dataset("scenes:images=12,size=48")
    calibrating, compared = quantising.split(data, 256, 1000)
    assert (len(calibrating), len(compared)) == (6, 6)
