"""The protocols on frozen vectors from the outside: several at once, their files, what makes them begin anew."""

import json
import shutil

import pytest

from ktransfer.errors import UsageError
from ktransfer.eval import evaluate
from ktransfer.eval.protocols import svm
from ktransfer.retrain import retrain

SCENES = "scenes:images=60,size=48"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "target"
    retrain(run, data=SCENES, labels="classes", arch="alexnet_bn", width=0.05, stride=2, epochs=1, batch=8)
    return run


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(svm, "DRAWS", 2)
    monkeypatch.setattr(svm, "COSTS", (0.01, 0.1))
    shutil.copytree(made, tmp_path / "target")
    return tmp_path / "target"


def test_several_at_once_and_their_files(run, capsys):
    names = ["knn", "lowshot", "svm", "logreg"]
    paths = evaluate(run, protocol=",".join(names), layers="conv5")
    assert list(paths) == names
    record = json.loads((run / "eval" / "stage.json").read_text())
    for name in names:
        found = json.loads(paths[name].read_text())
        assert found["protocol"] == f"{name}/{2 if name in ('svm', 'logreg') else 1}"
        assert list(found["arms"]) == ["random", "target"]
        assert set(found["settings"]) >= {"grid", "dtype", "layers", "seed"}
        assert ("neighbours" in found["settings"]) == (name == "knn")
        assert not (run / "eval" / f"work-{name}").exists()
        for arm in found["arms"].values():
            cell = arm["scores"]["conv5"]
            first = next(measure for measure in found["measures"] if measure in cell)
            assert cell[f"{first}_interval"][0] <= cell[first] <= cell[f"{first}_interval"][1]
            assert "broken" not in arm and "files" not in arm
    assert "lowshot/labels-one-seed0.txt" in record["lowshot"]["outputs"]
    keys = (run / "eval" / "lowshot" / "labels-ten-seed0.txt").read_text().splitlines()
    assert len(keys) == 12 and len({key.split("/")[0] for key in keys}) == 12  # a tenth of five: one of each class
    shown = capsys.readouterr().out
    assert "k nearest neighbours, 1-NN, top-1 %" in shown and "labels of --subset" not in shown


def test_a_list_that_changes_is_noticed(run, tmp_path):
    evaluate(run, protocol="lowshot", layers="conv5", random=False)
    given = run / "eval" / "lowshot" / "labels-ten-seed0.txt"
    mine = tmp_path / "mine.txt"
    shutil.copy(given, mine)
    with pytest.raises(UsageError, match="subset"):
        evaluate(run, protocol="lowshot", layers="conv5", random=False, subset=str(mine))
    path = evaluate(run, protocol="lowshot", layers="conv5", random=False, subset=str(mine), overwrite=True)["lowshot"]
    cell = json.loads(path.read_text())["arms"]["target"]["scores"]["conv5"]
    assert cell["subset_labels"] == 12 and "ten" not in cell
    before = path.read_bytes()
    evaluate(run, protocol="lowshot", layers="conv5", random=False, subset=str(mine))
    assert path.read_bytes() == before
    mine.write_text("".join(f"{key}\n" for key in mine.read_text().splitlines()[1:]))
    with pytest.raises(UsageError, match="subset"):
        evaluate(run, protocol="lowshot", layers="conv5", random=False, subset=str(mine))


def test_presets_have_names_of_their_own(run):
    path = evaluate(run, preset="deepcluster", epochs=1, batch=8, layers="conv5", random=False)["linear"]
    found = json.loads(path.read_text())
    assert found["protocol"] == "linear/1 deepcluster" and found["settings"]["preset"] == "deepcluster"
    assert found["settings"]["lrs"] == "0.01"
    with pytest.raises(UsageError, match="preset"):
        evaluate(run, epochs=1, batch=8, layers="conv5", random=False)
    with pytest.raises(UsageError, match="preset"):
        evaluate(run, preset="vissl", overwrite=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "knn", "neighbours": "5,many"}, "--neighbours 5,many: must be whole numbers"),
        ({"protocol": "knn", "neighbours": "0"}, "--neighbours 0"),
        ({"protocol": "knn", "temperature": 0.0}, "temperature"),
        ({"protocol": "lowshot", "subset": "nowhere.txt"}, "--subset nowhere.txt: cannot be read"),
        ({"protocol": "svm", "layers": "conv9"}, "no such layer"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(run, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(run, **options)
    assert "\n" not in str(caught.value)
    assert not (run / "eval").exists()
