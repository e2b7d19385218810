"""`ktransfer predict` and `load_model`: what the network says of images, under the names that it learned."""

import csv
import json
import shutil
from hashlib import sha256

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ktransfer import cli, networks
from ktransfer.cluster import extract
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.images import decoding
from ktransfer.retrain import export, load_model, retrain
from ktransfer.retrain.students.predicting import predict


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def by_hand(run, pixels):
    """(classes,) probabilities of one (h, w, 3) image, with nothing of what is tested."""
    weights = run / "retrain" / "model.safetensors"
    network = networks.describe(weights)
    model = networks.build(network, 0, "test").eval()
    model.load_state_dict(load_file(weights))
    square = decoding.square(pixels, network.size).transpose(2, 0, 1)
    with torch.no_grad():
        return model(networks.normalise(torch.tensor(square)[None], network.normalise))[0].softmax(0).numpy()


def names_of(run):
    return json.loads((run / "retrain" / "stage.json").read_text())["retrain"]["classes"]


def test_a_table_of_a_folder_says_what_the_network_says_and_leaves_broken_images_empty(
    of_classes, folder, tmp_path, capsys
):
    out = predict(of_classes, str(folder), tmp_path / "found.csv", top=3, batch=5)
    rows = rows_of(out)
    assert [row["key"] for row in rows] == [f"{'ab'[place // 12]}/{place:02d}.jpg" for place in range(24)]
    names = names_of(of_classes)
    for row in rows:
        cells = [row[f"{name}{end}"] for end in ("", "_2", "_3") for name in ("label", "probability")]
        if row["key"] == "a/05.jpg":
            assert cells == [""] * 6
            continue
        wanted = by_hand(of_classes, decoding.decode(folder / row["key"], 40))
        best = np.argsort(-wanted)[:3]
        assert cells[::2] == [names[place] for place in best]
        np.testing.assert_allclose([float(cell) for cell in cells[1::2]], wanted[best], rtol=1e-4)
    said = capsys.readouterr().err
    assert "predict: a/05.jpg: not an image" in said and "24 images, 1 broken" in said


def test_images_come_as_one_file_a_list_or_scenes(of_clusters, folder, tmp_path):
    image = folder / "b" / "20.jpg"
    (row,) = rows_of(predict(of_clusters / "retrain" / "model.safetensors", str(image), tmp_path / "one.csv"))
    wanted = by_hand(of_clusters, decoding.decode(image, 40))
    assert row["key"] == "20.jpg" and row["label"] == str(wanted.argmax())
    assert float(row["probability"]) == pytest.approx(wanted.max(), rel=1e-4)
    (folder / "list.txt").write_text("b/20.jpg\na/01.jpg\n")
    rows = rows_of(predict(of_clusters, str(folder / "list.txt"), tmp_path / "list.csv", top=99))
    assert [other["key"] for other in rows] == ["b/20.jpg", "a/01.jpg"] and rows[0]["label"] == row["label"]
    assert len(rows[0]) == 1 + 2 * 3  # no more columns than clusters
    assert sum(float(rows[0][f"probability{end}"]) for end in ("", "_2", "_3")) == pytest.approx(1, abs=1e-5)
    assert len(rows_of(predict(of_clusters, "scenes:images=12,size=48", tmp_path / "scenes.csv"))) == 12


def test_a_copied_file_knows_the_names_of_its_classes(of_classes, folder, tmp_path):
    copied = tmp_path / "mine.safetensors"
    shutil.copy(of_classes / "retrain" / "model.safetensors", copied)
    names = tuple(names_of(of_classes))
    assert load_model(copied).names == names == networks.class_names(copied)
    tables = [predict(model, str(folder), tmp_path / f"{model.name}.csv") for model in (of_classes, copied)]
    assert tables[0].read_text() == tables[1].read_text()
    described, names_inside = (json.loads(said) for said in facts_of(export(tmp_path / "new", model=str(copied))))
    assert tuple(names_inside) == names and "names" not in described
    card = (tmp_path / "new" / "export" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in names)


def facts_of(student):
    facts = onnxruntime.InferenceSession(student).get_modelmeta().custom_metadata_map
    return facts["network"], facts["classes"]


def test_the_names_of_an_older_file_are_those_of_the_record_beside_it(of_classes, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(of_classes, run)
    weights = run / "retrain" / "model.safetensors"
    networks.save(weights, load_file(weights), networks.describe(weights))
    assert networks.class_names(weights) == () and load_model(weights).names == tuple(map(str, range(12)))
    record = json.loads((run / "retrain" / "stage.json").read_text())
    record["retrain"]["outputs"]["model.safetensors"]["sha256"] = sha256(weights.read_bytes()).hexdigest()
    (run / "retrain" / "stage.json").write_text(json.dumps(record))
    assert load_model(weights).names == tuple(names_of(of_classes))


def test_names_of_other_weights_are_not_taken(of_classes, of_clusters, tmp_path):
    """Weights put where others were made: the record beside them is not theirs."""
    shutil.copytree(of_classes, tmp_path / "run")
    weights = tmp_path / "run" / "retrain" / "model.safetensors"
    shutil.copy(of_clusters / "retrain" / "model.safetensors", weights)
    assert load_model(weights).names == ("0", "1", "2")


def test_one_image_of_any_kind_gives_the_same(of_classes, folder, tmp_path):
    model = load_model(of_classes)
    pixels = np.random.default_rng(3).integers(0, 256, (44, 61, 3)).astype(np.uint8)
    wanted = by_hand(of_classes, pixels)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    for image in (pixels, Image.fromarray(pixels), Image.open(path), path, str(path)):
        labels, probabilities = model.predict(image, top=2)
        best = np.argsort(-wanted)[:2]
        assert labels == tuple(names_of(of_classes)[place] for place in best)
        np.testing.assert_allclose(probabilities, wanted[best], rtol=1e-4)
    assert len(model.predict(pixels).labels) == 1 and len(model.predict(pixels, top=99).labels) == 12
    clear = Image.fromarray(np.dstack([pixels, np.zeros_like(pixels[..., 0])]))  # laid on white, as in a file
    np.testing.assert_array_equal(model.predict(clear)[1], model.predict(np.full_like(pixels, 255))[1])


def test_one_image_that_cannot_be_taken(of_classes, folder):
    model = load_model(of_classes)
    with pytest.raises(BrokenImage):
        model.predict(folder / "a" / "05.jpg")
    with pytest.raises(UsageError, match=r"shape \(3, 40, 40\) and type uint8; give \(height, width, 3\)"):
        model.predict(np.zeros((3, 40, 40), np.uint8))
    with pytest.raises(UsageError, match="type float64"):
        model.predict(np.zeros((40, 40, 3)))
    with pytest.raises(UsageError, match="top 0: must be at least 1"):
        model.predict(np.zeros((40, 40, 3), np.uint8), top=0)


def test_the_command_and_its_misuse(of_classes, run, folder, tmp_path, capsys):
    def said(code, *words):
        assert cli.main([str(word) for word in ("predict", *words)]) == code
        return capsys.readouterr().err.splitlines()

    out = tmp_path / "found.csv"
    given = ["--data", folder, "--out", out]
    (line,) = said(2, "--model", run, *given)
    assert "retrain is missing; make it first" in line
    (line,) = said(2, "--model", run / "pretext" / "model.safetensors", *given)
    assert "without classes" in line
    (line,) = said(2, "--model", of_classes, "--data", tmp_path / "imgaes", "--out", out)
    assert "does not exist" in line
    (line,) = said(2, "--model", of_classes, "--data", folder, "--out", tmp_path / "found.txt")
    assert "must end with .csv" in line
    (line,) = said(2, "--model", of_classes, "--data", folder, "--out", tmp_path / "no" / "found.csv")
    assert "its folder is not there" in line
    names = folder / "list.csv"
    names.write_text("path\na/01.jpg\n")
    (line,) = said(2, "--model", of_classes, "--data", names, "--out", names)
    assert "is the list of the images" in line and names.read_text() == "path\na/01.jpg\n"
    assert not out.exists()
    said(0, "--model", of_classes, *given, "--top", 2, "--device", "cpu")
    assert list(rows_of(out)[0]) == ["key", "label", "probability", "label_2", "probability_2"]


def test_a_network_that_learned_features_has_embeddings_and_no_classes(folder, tmp_path, capsys):
    data = "scenes:images=40,size=48"
    extract(tmp_path, data=data, teacher="hog", size=48)
    options = {"data": data, "arch": "alexnet_bn", "width": 0.05, "stride": 2, "epochs": 1, "batch": 8, "device": "cpu"}
    retrain(tmp_path, objective="features", **options)
    with pytest.raises(UsageError, match=r"learned its teacher's features[^\n]*\.npy"):
        predict(tmp_path, str(folder), tmp_path / "found.csv")
    assert not (tmp_path / "found.csv").exists()
    with pytest.raises(UsageError, match="not classes"):
        load_model(tmp_path).predict(folder / "a" / "00.jpg")
    made = np.load(predict(tmp_path, str(folder), tmp_path / "found.npy"))
    np.testing.assert_allclose(made[0], load_model(tmp_path).embed(folder / "a" / "00.jpg"), rtol=1e-3, atol=1e-4)
    file = export(tmp_path)
    card = (file.parent / "README.md").read_text()
    assert "numbers of its teacher's features" in card and "clusters" not in card
