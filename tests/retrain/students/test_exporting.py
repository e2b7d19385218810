"""The export stage: an ONNX file that computes what the network does, or none at all, and a card that is right."""

import importlib.util
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps

from ktransfer import cli, networks
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.retrain import export, load_model
from ktransfer.retrain.students import exporting, onnx_file
from ktransfer.retrain.students.classifier import Both, Classifier
from ktransfer.retrain.students.format import difference
from ktransfer.retrain.students.onnx_file import computing, to_onnx


def session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def random_images(count, size):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def classifier(network):
    model = networks.build(network, 1, "test")
    with torch.no_grad():  # fc8 starts near zero, which would hide what differs before it
        for value in model.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    return Classifier(network, model, tuple(map(str, range(network.classes))))


@pytest.mark.parametrize(
    "network",
    [
        Network("alexnet", 0.05, 2, 40, 5),
        Network("alexnet_bn", 0.05, 2, 40, 5, "picture"),
        Network("alexnet_bn", 0.05, 4, 250, 3, "0.5,0.4,0.3/0.2,0.2,0.1"),
        Network("resnet18", 1.0, 4, 32, 4),
    ],
    ids=lambda network: f"{network.arch}-{network.size}",
)
def test_onnxruntime_computes_what_torch_does_for_any_batch(network):
    model = classifier(network)
    content = to_onnx(model, 18, {})
    for batch in (1, 2, 7):
        images = random_images(batch, network.size)
        with torch.no_grad():
            wanted = model.model(networks.normalise(images, network.normalise)).numpy()
        found = session(content).run(["logits"], {"image": images.numpy()})[0]
        assert np.ptp(wanted) > 1e-2
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))


def test_the_file_says_what_it_takes_and_what_it_is(exported):
    content = onnx.load(exported / "export" / "student.onnx")
    onnx.checker.check_model(content, full_check=True)
    assert [(entry.domain, entry.version) for entry in content.opset_import if entry.domain == ""] == [("", 18)]
    image, logits = content.graph.input[0], content.graph.output[0]
    shape = [side.dim_param or side.dim_value for side in image.type.tensor_type.shape.dim]
    assert image.name == "image" and image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert shape == ["batch", 3, 40, 40]
    assert logits.name == "logits" and logits.type.tensor_type.shape.dim[1].dim_value == 12
    facts = {entry.key: entry.value for entry in content.metadata_props}
    assert Network(**json.loads(facts["network"])) == networks.describe(exported / "retrain" / "model.safetensors")
    assert json.loads(facts["classes"]) == list(load_model(exported).names)
    assert len(load_model(exported).names) == 12 and not load_model(exported).names[0].isdigit()


def test_the_file_names_no_folder_of_the_machine(exported):
    content = (exported / "export" / "student.onnx").read_bytes()
    assert b"site-packages" not in content and b".py" not in content
    assert os.fsencode(exported.parent) not in content
    assert str(exported.parent) not in (exported / "export" / "README.md").read_text()


def test_the_same_weights_give_the_same_bytes(exported, tmp_path):
    export(tmp_path / "run", model=str(exported))
    assert (tmp_path / "run/export/student.onnx").read_bytes() == (exported / "export/student.onnx").read_bytes()


def test_a_newer_opset(of_classes, tmp_path):
    content = onnx.load(export(tmp_path / "run", model=str(of_classes), opset=20))
    assert next(entry.version for entry in content.opset_import if entry.domain == "") == 20


def test_the_code_of_the_card_classifies_an_image(exported, monkeypatch):
    card = (exported / "export" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(exported / "export")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("image.png")
    found: dict = {}
    exec(code.replace("image.jpg", "image.png"), found)
    square = np.asarray(ImageOps.fit(Image.fromarray(pixels), (40, 40), Image.Resampling.BILINEAR))
    with torch.no_grad():
        wanted = load_model(exported)(torch.tensor(square.transpose(2, 0, 1))[None]).numpy()
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-4)
    # No resize is needed here, so that the card's crop is that of every stage.
    assert load_model(exported).predict(pixels).labels[0] == load_model(exported).names[int(found["logits"].argmax())]


def test_the_card_says_what_the_network_is_and_learned(exported, of_clusters, tmp_path):
    card = (exported / "export" / "README.md").read_text()
    record = json.loads((exported / "retrain" / "stage.json").read_text())["retrain"]
    for fact in (
        "alexnet_bn, width 0.05, stride 2",
        "| learned | 12 classes |",
        record["inputs"]["data"],
        "(batch, 3, 40, 40) uint8",
        "0.485, 0.456, 0.406",
        "opset 18",
        "`embedding`: (batch, 16) float32, of layer conv5: its maps averaged over positions",
        record["outputs"]["model.safetensors"]["sha256"],
        "| licence | *to be filled in",
        f"`{load_model(exported).names[11]}`",
    ):
        assert fact in card, fact
    assert "linear probe" not in card
    export(tmp_path / "run", model=str(of_clusters), licence="CC0-1.0 |\nmine")
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "3 clusters" in card and "| licence | CC0-1.0 \\| mine |" in card and "Classes, in the order" not in card


@pytest.mark.parametrize(
    ("task", "title"),
    [
        ("random", "5 outputs of random weights"),
        ("rotation", "5 turns of an image"),
        ("jigsawpp", "5 permutations of the tiles of an image"),
        ("jigsaw", "5 permutations of the tiles of an image"),
        ("context", "5 places of a patch beside another"),
        ("another", "5 outputs"),
    ],
)
def test_the_card_has_a_sentence_for_every_task(tmp_path, task, title):
    network = Network("alexnet", 0.05, 2, 32, 5, "imagenet", task)
    weights = tmp_path / "model.safetensors"
    networks.save(weights, networks.build(network, 0, "t").state_dict(), network)
    export(tmp_path / "run", model=str(weights), format="torch")
    card = (tmp_path / "run" / "export" / "torch" / "README.md").read_text()
    assert card.splitlines()[0].endswith(f"alexnet, {title}") and f"| learned | {title}" in card
    assert card.count("| learned | ") == 1 and ("of the task another" in card) is (task == "another")


def test_the_card_has_the_linear_probe_of_these_weights_alone(exported, tmp_path):
    run = tmp_path / "mine"
    shutil.copytree(exported, run)
    weights = json.loads((run / "retrain" / "stage.json").read_text())["retrain"]["outputs"]["model.safetensors"]
    (run / "eval").mkdir()
    table = {
        "measures": {"top1": "top-1 %"},
        "data": {"test": 50},
        "arms": {"mine": {"scores": {"conv3": {"top1": 0.625}}}},
    }
    (run / "eval" / "linear.json").write_text(json.dumps(table))
    for digest, there in ((weights["sha256"], True), ("0" * 64, False)):
        record = {"state": "done", "config": {}, "outputs": {}, "seconds": 1, "inputs": {"network mine": digest}}
        (run / "eval" / "stage.json").write_text(json.dumps({"linear": record}))
        export(run, overwrite=True)
        line = "| linear probe | top-1 on 50 test images: conv3 62.5% |"
        assert (line in (run / "export" / "README.md").read_text()) is there


def test_done_is_skipped_also_with_a_licence_filled_in_and_changed_is_refused(exported, tmp_path, capsys):
    run = tmp_path / "mine"
    shutil.copytree(exported, run)
    card = run / "export" / "README.md"
    card.write_text(card.read_text().replace("*to be filled in", "mine: *"))
    before = {path: path.read_bytes() for path in (run / "export").iterdir()}
    export(run)
    assert "export: done before, skipped" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (run / "export").iterdir()} == before
    with pytest.raises(UsageError, match=r"opset was 18, is 20\. Give export --overwrite"):
        export(run, opset=20)
    export(run, opset=20, overwrite=True)
    assert "opset 20" in card.read_text()


def test_what_is_not_reproduced_is_not_written(of_classes, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def another(model, opset, facts):
        return to_onnx(classifier(model.network), opset, facts)

    monkeypatch.setattr(onnx_file, "to_onnx", another)
    with pytest.raises(StageError, match=r"does not compute what torch does: it differs by .*nothing was written"):
        export(run, model=str(of_classes))
    assert [path.name for path in (run / "export").iterdir()] == ["stage.json"]
    monkeypatch.undo()
    assert export(run, model=str(of_classes)).is_file()


def test_stopped_between_its_files_it_ends_with_the_same(exported, tmp_path, monkeypatch):
    run = tmp_path / "mine"
    shutil.copytree(exported, run)
    wanted = {name: (run / "export" / name).read_bytes() for name in ("student.onnx", "README.md")}
    shutil.rmtree(run / "export")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "card", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(run)
    assert not (run / "export" / "README.md").exists()
    monkeypatch.undo()
    export(run)
    assert {name: (run / "export" / name).read_bytes() for name in wanted} == wanted


def test_what_onnxruntime_does_not_take_is_one_line(of_classes):
    with pytest.raises(StageError, match="onnxruntime does not take the file"):
        computing(b"no such thing")


def test_a_difference_is_a_share_of_large_numbers_and_infinite_for_no_numbers(of_classes):
    model = load_model(of_classes)
    content = to_onnx(model, 18, {})

    def apart(content):
        return difference(computing(content), Both(model), 40)

    assert apart(content) < 1e-5
    with torch.no_grad():
        model.model.fc8.bias += 0.5
    assert 0.2 < apart(content) <= 0.5
    with torch.no_grad():
        model.model.fc8.bias += 1e6
    assert 0.9 < apart(content) < 1.1
    with torch.no_grad():
        model.model.fc8.bias.fill_(float("nan"))
    assert apart(to_onnx(model, 18, {})) == float("inf")


def test_misuse_is_one_line(of_classes, run, tmp_path, capsys, monkeypatch):
    def said(*words):
        assert cli.main([str(word) for word in words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    new = tmp_path / "new"
    assert "retrain is missing; make it first: ktransfer --run" in said("--run", run, "export")
    assert "no such file; give a model.safetensors" in said("--run", new, "export", "--model", tmp_path / "none")
    puzzle = run / "pretext" / "model.safetensors"
    assert "without classes; give one that retrain made" in said("--run", new, "export", "--model", puzzle)
    note = tmp_path / "note.safetensors"
    note.write_text("no weights")
    assert "not a weight file of ktransfer" in said("--run", new, "export", "--model", note)
    assert "opset = 7: must be at least 18" in said("--run", new, "export", "--model", of_classes, "--opset", 7)
    (new / "export").mkdir(parents=True)
    (new / "export" / "README.md").write_text("my own")
    assert "was not made by ktransfer; move it away, give --overwrite" in said(
        "--run", new, "export", "--model", of_classes
    )
    assert "--opset is read by --format onnx alone; leave it out" in said(
        "--run", new, "export", "--model", of_classes, "--format", "torch", "--opset", 20
    )
    find = importlib.util.find_spec
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda asked, name=name: None if asked == name else find(asked)
        )
        line = said("--run", tmp_path / "other", "export", "--model", of_classes)
        assert line == f"ktransfer: export: {name} is not installed; pip install 'ktransfer[export]'"
    assert not (tmp_path / "other").exists()


def test_a_network_too_large_for_the_format_is_refused(of_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LIMIT", 1000)
    with pytest.raises(UsageError, match="an ONNX file holds"):
        export(tmp_path / "run", model=str(of_classes))


def test_in_a_line_it_exports_what_retrain_will_make(tmp_path, of_classes):
    target = ["--arch", "alexnet_bn", "--width", 0.05, "--stride", 2, "--size", 40, "--epochs", 1, "--batch", 8]
    line = ["--run", tmp_path / "run", "retrain", "--data", "scenes:images=40,size=48", "--labels", "classes", *target]
    assert cli.main([str(word) for word in [*line, "--device", "cpu", "export"]]) == 0
    made = (tmp_path / "run" / "export" / "student.onnx").read_bytes()
    model = load_model(tmp_path / "run")
    images = random_images(3, 40)
    with torch.no_grad():
        wanted = model(images).numpy()
    np.testing.assert_allclose(session(made).run(None, {"image": images.numpy()})[0], wanted, atol=1e-4)
    assert replace(model.network, classes=12) == load_model(of_classes).network
