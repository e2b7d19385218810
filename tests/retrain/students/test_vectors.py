"""Embeddings by `ktransfer predict` and `embed`: means of a layer's maps, whichever file they come from and go to."""

import importlib.util

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ktransfer import cli, networks
from ktransfer.artifacts.features import open_features
from ktransfer.errors import StageError, UsageError
from ktransfer.images import decoding
from ktransfer.networks import Network
from ktransfer.retrain import load_model
from ktransfer.retrain.students.classifier import Classifier
from ktransfer.retrain.students.predicting import predict


def by_hand(run, pixels, module):
    """(d,) of one (h, w, 3) image: the mean of what a module gives, with nothing of what is tested."""
    weights = run / "retrain" / "model.safetensors"
    network = networks.describe(weights)
    model = networks.build(network, 0, "test").eval()
    model.load_state_dict(load_file(weights))
    held = []
    model.get_submodule(module).register_forward_hook(lambda _m, _i, out: held.append(out.clone()))
    square = decoding.square(pixels, network.size).transpose(2, 0, 1)
    with torch.no_grad():
        model(networks.normalise(torch.tensor(square)[None], network.normalise))
    return held[0].mean((2, 3))[0].numpy()


@pytest.fixture
def wanted(of_classes, folder):
    """(23, d) of the images of the folder that can be read: those of the last layer."""
    images = [folder / "ab"[place // 12] / f"{place:02d}.jpg" for place in range(24) if place != 5]
    return np.stack([by_hand(of_classes, decoding.decode(image, 40), "relu5") for image in images])


def test_numpy_holds_the_images_that_can_be_read_and_a_list_says_which(of_classes, folder, tmp_path, wanted, capsys):
    out = predict(of_classes, str(folder), tmp_path / "found.npy", batch=5)
    found = np.load(out)
    assert found.dtype == np.float32 and np.ptp(wanted) > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    keys = [f"{'ab'[place // 12]}/{place:02d}.jpg" for place in range(24) if place != 5]
    assert (tmp_path / "found.keys.txt").read_text().splitlines() == keys
    assert "24 images, 1 broken" in capsys.readouterr().err


def test_cluster_takes_what_numpy_holds(of_classes, folder, tmp_path):
    predict(of_classes, str(folder), tmp_path / "found.npy")
    given = ["--features", tmp_path / "found.npy", "--keys", tmp_path / "found.keys.txt", "--data", folder]
    line = ["--run", tmp_path / "run", "cluster", *given, "--k", 3]
    assert cli.main([str(word) for word in line]) == 0
    with h5py.File(tmp_path / "run" / "clusters" / "clusters.h5") as file:
        assert int(file["counts"][:].sum()) == 23


def test_hdf5_is_a_feature_file(of_classes, folder, tmp_path, wanted):
    found = open_features(predict(of_classes, str(folder), tmp_path / "found.h5", batch=7))
    assert found.keys[5] == "a/05.jpg" and np.flatnonzero(~found.valid).tolist() == [5]
    np.testing.assert_allclose(found.rows[found.valid], wanted, rtol=1e-4, atol=1e-6)
    assert found.targets.tolist() == [0] * 12 + [1] * 12
    assert (found.attributes["layer"], found.attributes["pooling"]) == ("conv5", "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.h5", "pics"]


def test_parquet_is_null_where_an_image_is_broken(of_classes, folder, tmp_path, wanted):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(predict(of_classes, str(folder), tmp_path / "found.parquet", batch=5))
    assert table.column_names == ["key", "embedding"] and table["embedding"].type.list_size == wanted.shape[1]
    rows = table["embedding"].to_pylist()
    assert [place for place, row in enumerate(rows) if row is None] == [5]
    np.testing.assert_allclose([row for row in rows if row is not None], wanted, rtol=1e-4, atol=1e-6)
    assert table["key"].to_pylist()[23] == "b/23.jpg"


def test_an_exported_student_labels_and_embeds_as_the_run_does(of_classes, folder, tmp_path, exported):
    student = exported / "export" / "student.onnx"
    for name in ("found.npy", "found.csv"):
        predict(of_classes, str(folder), tmp_path / f"torch-{name}")
        predict(student, str(folder), tmp_path / f"onnx-{name}", batch=9)
    np.testing.assert_allclose(np.load(tmp_path / "onnx-found.npy"), np.load(tmp_path / "torch-found.npy"), atol=1e-5)
    own, other = ((tmp_path / f"{name}-found.csv").read_text().splitlines() for name in ("torch", "onnx"))
    assert [line.rsplit(",", 1)[0] for line in own] == [line.rsplit(",", 1)[0] for line in other]
    image = np.random.default_rng(3).integers(0, 256, (44, 61, 3)).astype(np.uint8)
    a, b = load_model(of_classes), load_model(student)
    assert a.names == b.names and a.predict(image, top=3).labels == b.predict(image, top=3).labels
    np.testing.assert_allclose(a.predict(image)[1], b.predict(image)[1], atol=1e-5)
    np.testing.assert_allclose(a.embed(image), b.embed(image), atol=1e-5)
    assert b.embed(image, "conv5").shape == a.embed(image).shape


def test_a_layer_by_name(of_classes, tmp_path, folder, capsys):
    image = folder / "b" / "20.jpg"
    found = np.load(predict(of_classes, str(image), tmp_path / "one.npy", layer="conv3"))
    wanted = by_hand(of_classes, decoding.decode(image, 40), "relu3")
    np.testing.assert_allclose(found, wanted[None], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(load_model(of_classes).embed(Image.open(image), "conv3"), wanted, atol=0.1)
    assert cli.main(["predict", "--model", str(of_classes), "--data", str(image), "--layer", "list"]) == 0
    assert "conv3" in capsys.readouterr().out


def test_a_transformer_is_read_at_its_class_token():
    network = Network("vit_b_32", size=64, classes=3)
    model = Classifier(network, networks.build(network, 0, "test"), ("a", "b", "c"))
    held = []
    model.model.encoder.ln.register_forward_hook(lambda _m, _i, out: held.append(out))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = model.embeddings(images)
    torch.testing.assert_close(found, held[0][:, 0])


def test_what_is_not_a_number_is_not_written(of_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Classifier, "embeddings", lambda self, images, tap=None: torch.full((len(images), 2), float("nan"))
    )
    for name in ("found.npy", "found.parquet"):
        with pytest.raises(StageError, match=r"the embedding of .*/000000 is not finite; check the weights"):
            predict(of_classes, "scenes:images=40,size=48", tmp_path / name)
        assert list(tmp_path.iterdir()) == []


def test_misuse_is_one_line(of_classes, exported, folder, tmp_path, monkeypatch):
    given = (of_classes, str(folder))
    with pytest.raises(UsageError, match=r"no --out given; name a \.csv"):
        predict(*given, None)
    with pytest.raises(UsageError, match=r"must end with \.csv for labels, or with \.npy, \.h5, \.parquet"):
        predict(*given, tmp_path / "found.txt")
    with pytest.raises(UsageError, match=r"--top 2: found\.npy holds embeddings"):
        predict(*given, tmp_path / "found.npy", top=2)
    with pytest.raises(UsageError, match=r"--layer conv1: found\.csv holds labels"):
        predict(*given, tmp_path / "found.csv", layer="conv1")
    with pytest.raises(UsageError, match="alexnet_bn has no such layer; did you mean 'conv1'"):
        predict(*given, tmp_path / "found.npy", layer="cnv1")
    student = exported / "export" / "student.onnx"
    with pytest.raises(UsageError, match=r"student\.onnx gives conv5 alone; give the run"):
        predict(student, str(folder), tmp_path / "found.npy", layer="conv1")
    with pytest.raises(UsageError, match=r"--device cuda: student\.onnx runs on the CPU"):
        predict(student, str(folder), tmp_path / "found.npy", device="cuda")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    with pytest.raises(UsageError, match=r"pyarrow is not installed; pip install 'ktransfer\[parquet\]'"):
        predict(*given, tmp_path / "found.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["pics"]


def test_an_onnx_file_of_others_is_one_line(of_classes, tmp_path, folder):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", values[:1], values[1:])
    foreign = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), foreign)
    with pytest.raises(UsageError, match=r"other\.onnx: was not exported by ktransfer"):
        predict(foreign, str(folder), tmp_path / "found.csv")
    foreign.write_bytes(b"no such thing")
    with pytest.raises(UsageError, match=r"other\.onnx: onnxruntime does not take it"):
        load_model(foreign)
