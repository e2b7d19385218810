"""The eval stage: which networks it evaluates, its files, and its refusals."""

import csv
import json
import shlex
import shutil

import pytest

from ktransfer import networks
from ktransfer.cli import main
from ktransfer.errors import UsageError
from ktransfer.eval import EvalConfig, evaluate, stage
from ktransfer.eval.arms import find_arms, last_network
from ktransfer.eval.config import DEFAULTS, own_settings
from ktransfer.eval.protocols import linear
from ktransfer.networks import Network
from ktransfer.pretext import pretext
from ktransfer.retrain import retrain

SCENES = "scenes:images=40,size=48"
FAST = {"epochs": 1, "batch": 8, "lrs": "0.001,0.003", "precision": "float32"}
NAMES = ["conv1", "conv2", "conv3", "conv4", "conv5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs: `puzzle` holds a teacher alone, `target` a network that learned the classes."""
    home = tmp_path_factory.mktemp("runs")
    pretext(home / "puzzle", data=SCENES, arch="alexnet_bn", width=0.05, epochs=1, batch=8, permutations=5)
    target = {"arch": "alexnet_bn", "width": 0.05, "stride": 2, "epochs": 1, "batch": 8}
    retrain(home / "target", data=SCENES, labels="classes", **target)
    return home


@pytest.fixture
def runs(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def result(run):
    return json.loads((run / "eval" / "linear.json").read_text())


def test_a_network_and_its_random_twin(runs, capsys):
    run = runs / "target"
    path = evaluate(run, **FAST)
    assert path == {"linear": run / "eval" / "linear.json"}
    found = result(run)
    assert found["protocol"] == "linear/1"
    assert found["data"] == {"train": 40, "test": 12, "classes": 12}
    assert found["chance"] == pytest.approx(1 / 12)
    assert found["settings"]["epochs"] == 1
    assert list(found["arms"]) == ["random", "target"]
    assert [arm["task"] for arm in found["arms"].values()] == ["random", "classes"]
    for arm in found["arms"].values():
        assert list(arm["scores"]) == NAMES
    random, mine = found["arms"].values()
    for name in NAMES:  # alike but for the weights
        assert random["scores"][name]["numbers"] == mine["scores"][name]["numbers"]
        for layer in (random["scores"][name], mine["scores"][name]):
            assert layer["top1"] * 12 == pytest.approx(round(layer["top1"] * 12))
    assert random["scores"] != mine["scores"]
    assert sorted(p.name for p in (run / "eval").iterdir()) == [
        "linear.csv",
        "linear.json",
        "linear.md",
        "stage.json",
    ]

    text = (run / "eval" / "linear.md").read_text()
    assert text in capsys.readouterr().out
    with (run / "eval" / "linear.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    expected = [(arm, name, m) for arm in found["arms"] for name in NAMES for m in ("top1", "mean_class")]
    assert [(row["arm"], row["column"], row["measure"]) for row in rows] == expected
    for row in rows:
        layer = found["arms"][row["arm"]]["scores"][row["column"]]
        assert float(row["value"]) == pytest.approx(layer[row["measure"]], abs=1e-6)
        assert float(row["high"]) == pytest.approx(layer[f"{row['measure']}_interval"][1], abs=1e-6)
        assert f"{100 * layer['top1']:.1f} ±" in text

    before = {p.name: p.read_bytes() for p in (run / "eval").iterdir()}
    assert evaluate(run, **FAST) == path
    assert text in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (run / "eval").iterdir()} == before
    with pytest.raises(UsageError, match=r"epochs was 1, is 2.*eval --overwrite"):
        evaluate(run, **(FAST | {"epochs": 2}))
    evaluate(run, overwrite=True, **(FAST | {"random": False, "layers": "conv5,conv2"}))
    found = result(run)
    assert list(found["arms"]) == ["target"]
    assert list(found["arms"]["target"]["scores"]) == ["conv5", "conv2"]


def test_no_weight_decay_can_be_asked_for(runs):
    """0 is no "the protocol's own", which is -1."""
    evaluate(runs / "target", random=False, layers="conv1", weight_decay=0, **FAST)
    assert result(runs / "target")["settings"]["weight_decay"] == 0
    for name, own in DEFAULTS.items():
        assert own_settings(EvalConfig(), name) == own
        assert own_settings(EvalConfig(weight_decay=0.0, epochs=3), name) == {
            key: value for key, value in own.items() if key not in ("weight_decay", "epochs")
        }


def test_a_teacher_alone_is_evaluated_on_its_trunk(runs):
    run = runs / "puzzle"
    evaluate(run, random=False, **FAST)
    arm = result(run)["arms"]["puzzle"]
    assert (arm["task"], arm["arch"], arm["width"]) == ("jigsawpp", "alexnet_bn", 0.05)
    assert list(arm["scores"]) == NAMES
    # 7/8 of 48 pixels in steps of eight, with the stride of whole images.
    config = json.loads((run / "eval" / "stage.json").read_text())["linear"]["config"]
    assert (config["size"], config["stride"], config["labelled"]) == (40, 4, SCENES)


def test_the_retrained_network_is_evaluated_before_the_teacher(runs):
    shutil.copytree(runs / "puzzle" / "pretext", runs / "target" / "pretext")
    evaluate(runs / "target", random=False, layers="conv1", **FAST)
    assert result(runs / "target")["arms"]["target"]["task"] == "classes"


def test_an_unfinished_retraining_is_not_passed_over(runs):
    shutil.copytree(runs / "puzzle" / "pretext", runs / "target" / "pretext")
    record = runs / "target" / "retrain" / "stage.json"
    record.write_text(record.read_text().replace('"done"', '"running"'))
    with pytest.raises(UsageError, match=r"retrain is not finished.*retrain"):
        evaluate(runs / "target", **FAST)
    assert not (runs / "target" / "eval").exists()


def test_beside(runs):
    evaluate(runs / "target", beside=f"{runs / 'puzzle'}", layers="conv1,conv3", **FAST)
    found = result(runs / "target")["arms"]
    assert list(found) == ["random", "target", "puzzle"]
    assert [arm["task"] for arm in found.values()] == ["random", "classes", "jigsawpp"]
    with pytest.raises(UsageError, match=r"puzzle changed.*eval --overwrite"):
        evaluate(runs / "target", layers="conv1,conv3", **FAST)


def evaluated(monkeypatch):
    """Replace the evaluating by a note of who was evaluated, with which weights."""
    seen = []

    def fake(arm, splits, config, folder, device):
        seen.append((arm.name, arm.weights, arm.network))
        numbers = {
            "numbers": 1,
            "lr": 0.1,
            "top1": len(seen) / 100,
            "top1_interval": [0, 1],
            "mean_class": 0.5,
            "mean_class_interval": [0, 1],
        }
        return {"task": arm.network.task, "arch": arm.network.arch, "width": 1, "scores": {"conv1": numbers}}

    monkeypatch.setattr(linear, "evaluate", fake)
    return seen


def test_names_with_dots_do_not_share_their_numbers(runs, monkeypatch):
    for name in ("exp.1", "exp.2"):
        (runs / "target").rename(runs / name) if name == "exp.2" else shutil.copytree(runs / "puzzle", runs / name)
    seen = evaluated(monkeypatch)
    evaluate(runs / "exp.2", beside=str(runs / "exp.1"), **FAST)
    assert [name for name, _, _ in seen] == ["random", "exp.2", "exp.1"]
    assert [arm["scores"]["conv1"]["top1"] for arm in result(runs / "exp.2")["arms"].values()] == [0.01, 0.02, 0.03]


def test_arms_evaluated_before_an_interruption_are_kept(runs, monkeypatch):
    seen = evaluated(monkeypatch)
    fake = linear.evaluate

    def killed(arm, *rest):
        if arm.name == "puzzle" and len(seen) == 2:
            raise KeyboardInterrupt
        return fake(arm, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(linear, "evaluate", killed)
        evaluate(runs / "target", beside=str(runs / "puzzle"), **FAST)
    assert not (runs / "target" / "eval" / "linear.json").exists()
    evaluate(runs / "target", beside=str(runs / "puzzle"), **FAST)
    assert [name for name, _, _ in seen] == ["random", "target", "puzzle"]
    assert [arm["scores"]["conv1"]["top1"] for arm in result(runs / "target")["arms"].values()] == [0.01, 0.02, 0.03]
    assert not (runs / "target" / "eval" / "work-linear").exists()


def test_what_is_written_on_the_way_stays_until_the_outcome_is_kept(runs, monkeypatch):
    evaluated(monkeypatch)
    fake, work = linear.evaluate, runs / "target" / "eval" / "work-linear"
    kept = ["random.json", "target.json"]

    def writing(arm, splits, config, folder, device):
        assert [name for name in kept if (work / name).exists()] == kept[: kept.index(f"{arm.name}.json")]
        assert not (work / "random").exists()
        folder.mkdir(parents=True)
        (folder / "half").touch()
        return fake(arm, splits, config, folder, device)

    def full(path, value):
        if path == work / "target.json":
            raise KeyboardInterrupt
        write(path, value)

    write = stage.files.write_json
    monkeypatch.setattr(linear, "evaluate", writing)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage.files, "write_json", full)
        evaluate(runs / "target", **FAST)
    assert sorted(path.relative_to(work).as_posix() for path in work.rglob("*")) == [
        "random.json",
        "target",
        "target/half",
    ]
    (work / "random").mkdir()  # left by a kill between the two
    shutil.rmtree(work / "target")
    evaluate(runs / "target", **FAST)
    assert not work.exists()


def test_runs_of_the_same_name(runs, tmp_path):
    shutil.copytree(runs / "puzzle", tmp_path / "elsewhere" / "target")
    with pytest.raises(UsageError, match=r"a second run named 'target'"):
        evaluate(runs / "target", beside=str(tmp_path / "elsewhere" / "target"), **FAST)
    (runs / "target").rename(runs / "random")
    with pytest.raises(UsageError, match=r"a run named 'random'.*--no-random"):
        evaluate(runs / "random", **FAST)
    assert not (runs / "random" / "eval").exists()
    evaluate(runs / "random", random=False, layers="conv1", **FAST)
    assert result(runs / "random")["arms"]["random"]["task"] == "classes"


def test_the_room_that_the_maps_need_is_checked_before(runs, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(UsageError, match=r"eval needs 0\.\d+ GB, but .* free; make room") as caught:
        evaluate(runs / "target", **FAST)
    assert "\n" not in str(caught.value)
    assert not (runs / "target" / "eval").exists()
    evaluate(runs / "target", cache=0.0, random=False, layers="conv5", **FAST)  # nothing is kept


def test_broken_images_are_recorded_with_their_reason(runs, folder, tmp_path, capsys):
    root = tmp_path / "root"
    for part in ("train", "val"):
        shutil.copytree(folder, root / part)
    evaluate(runs / "target", labelled=str(root), max_broken=0.1, layers="conv5", **FAST)
    broken = json.loads((runs / "target" / "eval" / "stage.json").read_text())["linear"]["broken"]
    assert [line.split(": ")[0] for line in broken] == ["train/a/05.jpg", "val/a/05.jpg"]
    assert all("image" in line or "damaged" in line for line in broken)
    assert "eval linear: done; 2 broken images" in capsys.readouterr().err
    assert all("broken" not in arm for arm in result(runs / "target")["arms"].values())


def test_other_size_and_stride_than_in_training(runs):
    evaluate(runs / "target", size=64, stride=4, layers="conv1", random=False, **FAST)
    assert result(runs / "target")["arms"]["target"]["scores"]["conv1"]["grid"] == 10


def test_random_weights_have_the_layers_of_the_network(runs):
    """A retrained VGG keeps its fifth block beside random weights; AlexNets are evaluated without their classifier."""
    run = runs / "target"
    weights = run / "retrain" / "model.safetensors"
    for arch, classes in (("vgg16", 5), ("resnet18", 5), ("alexnet", 0)):
        networks.save(weights, {}, Network(arch, size=32, classes=5, task="pseudo-labels"))
        random, mine = find_arms([last_network(run)], EvalConfig(size=64, stride=3))
        assert mine.network == Network(arch, 1.0, 3, 64, classes, task="pseudo-labels")
        assert random.network == Network(arch, 1.0, 3, 64, classes, task="random")
        assert (random.weights, mine.weights) == (None, weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "conv1,conv9"}, r"--layers conv9: alexnet_bn has no such layer; did you mean 'conv\d'"),
        ({"size": 8}, "--size 8: alexnet_bn does not take images so small"),
        ({"lrs": "fast"}, "--lrs fast"),
        ({"protocol": "knn"}, r"^--epochs, --batch, --lrs: not read by knn \(--epochs: by linear, .*\); leave it out$"),
        ({"protocol": "finetune", "layers": "conv3"}, "--layers: not read by finetune"),
        ({"protocol": "linear,finetune", "canvas": 64}, "--canvas: not read by linear, finetune"),
        ({"protocol": "segment", "lrs": "", "size": 64}, "--size: not read by segment"),
        ({"batch": 1}, "--batch 1: batch norm needs two images"),
        ({"weight_decay": -0.5}, "--weight-decay -0.5: below 0; give -1"),
        ({"labelled": "nowhere"}, "nowhere does not exist"),
        ({"protocol": "guess"}, "--protocol guess: no such protocol.*linear"),
        ({"protocol": "linear,"}, "--protocol linear,: no such protocol"),
        ({"device": "abacus"}, "--device abacus"),
        ({"beside": "nowhere"}, "--run nowhere: holds no trained network"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(runs, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(runs / "target", **(FAST | options))
    assert "\n" not in str(caught.value)
    assert not (runs / "target" / "eval").exists()


def test_images_without_parts_and_runs_without_networks(runs, folder, tmp_path):
    with pytest.raises(UsageError, match=r"--labelled takes a root with train"):
        evaluate(runs / "target", labelled=str(folder), **FAST)
    for given in ({}, {"labelled": SCENES}):
        with pytest.raises(UsageError, match="holds no trained network"):
            evaluate(tmp_path / "new", **given, **FAST)
    assert not (tmp_path / "new").exists()


def test_the_command_of_a_result_makes_it_again(runs, tmp_path):
    options = {
        "layers": "conv2",
        "random": False,
        "seed": 3,
        "labelled": "scenes:images=24,size=48",
        "precision": "float32",
    }
    evaluate(runs / "target", protocol="filters,knn", beside=str(runs / "puzzle"), grid=2, **options)
    for name in ("filters", "knn"):
        path = runs / "target" / "eval" / f"{name}.json"
        found = json.loads(path.read_text())
        assert set(found["inputs"]) == {"train", "test", "network target", "network puzzle"}
        words = shlex.split(found["command"])
        assert words[:5] == ["ktransfer", "--run", "target", "eval", "--protocol"]
        before = path.read_bytes()
        path.unlink()
        assert main(["--run", str(runs / "target"), *words[3:], "--overwrite"]) == 0
        assert path.read_bytes() == before


def test_each_protocol_of_a_line_is_carried_out_once(runs, capsys):
    line = ["--run", str(runs / "target"), "eval", "--protocol", "filters,knn", "--layers", "conv2", "--no-random"]
    assert main(line) == 0
    shown = capsys.readouterr()
    assert [shown.out.count(f"{name}: ") for name in ("filters/2", "knn/1")] == [1, 1]
    assert "done before" not in shown.err
    assert main([*line, "--published"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("done before, skipped") == 2
    assert "DeepCluster" in shown.out
    assert "DeepCluster" not in (runs / "target" / "eval" / "knn.md").read_text()


def test_settings_of_one_protocol_leave_the_others_as_they_are(runs, tmp_path, capsys):
    run = runs / "target"
    evaluate(run, protocol="knn", layers="conv1")
    assert "epochs" not in json.loads((run / "eval" / "knn.json").read_text())["settings"]
    line = ["--run", str(run), "eval", "--layers", "conv1"]
    both = [*line, "--protocol", "linear,knn", "--epochs", "1", "--batch", "8", "--lrs", "0.01", "--momentum", "0.8"]
    assert main(both) == 0
    assert result(run)["settings"]["momentum"] == 0.8
    assert "knn: done before, skipped" in capsys.readouterr().err
    # A file may hold what only some protocols read; a flag that nothing reads is a mistake.
    (tmp_path / "mine.toml").write_text('[eval]\nepochs = 3\ncache = 5.0\nlayers = "conv2"\n')
    assert main(["--config", str(tmp_path / "mine.toml"), *line, "--protocol", "knn"]) == 0
    assert "knn: done before, skipped" in capsys.readouterr().err
    assert main([*line, "--protocol", "knn", "--cache", "5"]) == 2
    assert "--cache: not read by knn" in capsys.readouterr().err


def test_what_is_said_of_networks_together_and_of_a_protocol(runs, monkeypatch):
    from ktransfer.eval.protocols import filters

    def relate(together, config):
        assert list(together) == ["random", "target"]
        for place, one in enumerate(together.values()):
            one["scores"]["conv1"] |= {"rank": place + config.seed, "rank_interval": [place, place + 1]}

    monkeypatch.setattr(filters, "relate", relate, raising=False)
    monkeypatch.setattr(filters, "LOWER_IS_BETTER", ("rank",), raising=False)
    monkeypatch.setattr(filters, "MEASURES", filters.MEASURES | {"rank": "rank"})
    evaluate(runs / "target", protocol="filters", seeds=2, precision="float32")
    found = json.loads((runs / "target" / "eval" / "filters.json").read_text())
    assert found["lower_is_better"] == ["rank"]
    assert found["note"] == filters.NOTE
    assert [arm["scores"]["conv1"]["rank_seeds"] for arm in found["arms"].values()] == [[0, 0], [1, 1]]
    assert found["arms"]["random"]["scores"]["conv1"]["colour_deviation"] > 0
    assert found["arms"]["target"]["scores"]["conv1"]["colour_deviation"] == 0
    assert {path.name for path in (runs / "target" / "eval" / "filters").iterdir()} == {"random.png", "target.png"}
    outputs = json.loads((runs / "target" / "eval" / "stage.json").read_text())["filters"]["outputs"]
    assert {"filters/random.png", "filters/target.png"} <= set(outputs)


def test_beside_a_network_of_another_normalisation_the_table_says_so(runs, capsys):
    evaluate(runs / "target", beside=str(runs / "puzzle"), random=False, size=40, **FAST)
    assert result(runs / "target")["normalised"] == {"target": "imagenet", "puzzle": "picture"}
    assert "images normalised differently (imagenet: target; picture: puzzle)" in capsys.readouterr().out
    evaluate(runs / "target", overwrite=True, size=40, **FAST)
    assert "normalised" not in result(runs / "target")
