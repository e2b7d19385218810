"""A line is planned before it starts: what would be done is what is done, and nothing is written for knowing it."""

import json
import subprocess
import sys

import pytest

from ktransfer import cli, networks, plan, stages
from ktransfer.errors import UsageError

SCENES = "scenes:images=40,size=48"
PUZZLES = {"arch": "vgg16_bn", "width": 0.05, "epochs": 1, "batch": 8, "permutations": 10}
TARGET = {"arch": "alexnet_bn", "width": 0.05, "stride": 2, "size": 40, "epochs": 1, "batch": 8}
LINE = [
    ("pretext", PUZZLES | {"data": SCENES}),
    ("cluster", {"k": 3}),
    ("retrain", TARGET),
    ("eval", {"protocol": "linear,knn", "epochs": 1, "layers": "conv1", "neighbours": "3"}),
]


def words(line):
    return [str(word) for stage, given in line for word in [stage, *flags(given)]]


def flags(given):
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def whats(line):
    return {f"{one.plan.stage} {one.step.name}": one.what for one in plan.outlooks(line)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("planned") / "run"
    plan.carry_out_line(plan.plan_line(LINE, run))
    return run


def test_every_stage_has_a_module_with_the_same_names_and_settings_that_say_what_comes_first():
    for stage, row in stages.STAGES.items():
        module = stages.module(stage)
        assert callable(module.check) and callable(module.carry_out) and callable(getattr(module, row.function))
        config = stages.settings(stage)
        assert len(config.first) == 5 and set(config.first) <= set(config.__dataclass_fields__)
        assert row.takes is None or row.takes in config.__dataclass_fields__


def test_stages_that_nobody_named_are_planned_too(tmp_path):
    line = plan.plan_line(LINE, tmp_path / "run")
    assert [one.stage for one in line] == ["pretext", "extract", "cluster", "assign", "retrain", "eval"]
    assert not (tmp_path / "run").exists()
    assert set(whats(line).values()) == {"runs"} and len(whats(line)) == 7


def test_what_is_planned_is_what_is_made(made, tmp_path):
    """The network that later stages expect, the width of the features and the side of the images."""
    line = {one.stage: one for one in plan.plan_line(LINE, tmp_path / "run")}
    for stage in ("pretext", "retrain"):
        planned, found = line[stage].network, networks.describe(made / stage / "model.safetensors")
        assert planned is not None and line[stage].weights == tmp_path / "run" / stage / "model.safetensors"
        assert {**vars(planned), "classes": 0} == {**vars(found), "classes": 0}
    extraction = json.loads((made / "features" / "stage.json").read_text())["scenes"]
    assert line["extract"].dim == extraction["result"]["dim"]
    assert {key: extraction["config"][key] for key in ("layer", "size")} == {
        "layer": line["extract"].config.layer,
        "size": line["extract"].config.size,
    }
    evaluated = json.loads((made / "eval" / "linear.json").read_text())
    for key in ("size", "stride"):
        assert getattr(line["eval"].evaluations[0].config, key) == evaluated["settings"][key]


@pytest.mark.parametrize("task", ["jigsaw", "rotation", "context"])
def test_a_teacher_of_any_task_is_expected_as_it_will_be(tmp_path, task):
    """Stride and normalisation differ between tasks, and what comes after must reckon with those of this one."""
    given = {"data": SCENES, "arch": "alexnet_bn", "width": 0.05, "epochs": 1, "batch": 8, "task": task}
    given |= {"permutations": 10} if task == "jigsaw" else {}
    given |= {"data": "scenes:images=40,size=66", "tile": 16} if task == "context" else {}
    line = plan.plan_line([("pretext", given), ("extract", {})], tmp_path / "run")
    plan.carry_out_line(line)
    found = networks.describe(tmp_path / "run" / "pretext" / "model.safetensors")
    assert line[0].network == found
    assert line[1].teacher.network == networks.trunk(found)
    assert (
        json.loads((tmp_path / "run" / "features" / "stage.json").read_text())["scenes"]["result"]["dim"] == line[1].dim
    )


def test_done_again_and_refused(made):
    assert set(whats(plan.plan_line(LINE, made)).values()) == {"is done"}
    other = [("cluster", {"k": 4}), *LINE[2:]]
    found = whats(plan.plan_line(other, made))
    assert found["cluster cluster"] == "is refused"
    anew = [("cluster", {"k": 4, "overwrite": True}), *LINE[2:]]
    outlooks = plan.outlooks(plan.plan_line(anew, made))
    assert [one.what for one in outlooks[:3]] == ["is made again", "is made again", "is refused"]
    assert outlooks[2].why == ["this line makes the assign stage again"]
    with pytest.raises(UsageError, match=r"retrain in .* was made differently: this line makes the assign stage again"):
        plan.refuse_changes(plan.plan_line(anew, made))


def test_dry_run(made, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert cli.main(["--run", str(made), "--dry-run", *words(LINE)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["stage", "step", "disk", "memory", "took", "before"]
    assert [row.split()[0] for row in said[1:]] == ["pretext", "cluster", "assign", "retrain", "eval", "eval"]
    assert all(row.endswith("is done") and " s " in row for row in said[1:])
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert cli.main(["--run", str(made), "--dry-run", "cluster", "--k", "4"]) == 2
    assert "is refused: k was 3, is 4" in capsys.readouterr().out
    assert cli.main(["--run", str(tmp_path / "new"), "--dry-run", "pretext", "--data", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_self_test_writes_nothing(tmp_path, capsys):
    line = ["--run", str(tmp_path / "new"), "--dry-run", "pretext", "--data", SCENES, "--overfit", "4"]
    assert cli.main(line) == 0
    assert "runs, and writes nothing" in capsys.readouterr().out


def test_images_are_opened_once_for_a_stage(tmp_path, monkeypatch):
    from ktransfer.pretext import stage

    opened: list[str] = []
    open_dataset = stage.open_dataset
    monkeypatch.setattr(stage, "open_dataset", lambda spec: opened.append(spec) or open_dataset(spec))
    stage.pretext(tmp_path / "run", data=SCENES, **PUZZLES)
    assert opened == [SCENES]


def test_images_of_a_second_data_set_are_a_step_of_their_own(made, tmp_path, monkeypatch):
    """Those that get the labels: extracted as the clustered ones were, or as the line will extract those."""
    from ktransfer.cluster import extraction, sources

    other, opened = "scenes:images=24,size=48,seed=5", []
    for module in (extraction, sources):
        open_dataset = module.open_dataset
        monkeypatch.setattr(module, "open_dataset", lambda spec, found=open_dataset: opened.append(spec) or found(spec))
    for run, line in ((made, []), (tmp_path / "run", [*LINE[:1], ("extract", {"pool": 2}), LINE[1]])):
        opened.clear()
        planned = plan.plan_line([*line, ("assign", {"data": other})], run)
        extracted, assigned = planned[-2:]
        assert [one.stage for one in planned[-2:]] == ["extract", "assign"] and opened.count(other) == 1
        assert extracted.images.spec == other and assigned.images is extracted.images
        assert assigned.features == extracted.file == run / "features" / f"scenes-{extracted.images.fingerprint[:8]}.h5"
        assert extracted.config.pool == (2 if line else 4)
        assert whats(planned)[f"extract {extracted.file.stem}"] == "runs"
    twice = plan.plan_line([("assign", {"data": other}), ("assign", {"data": other})], made)
    assert [one.stage for one in twice] == ["extract", "assign", "assign"]


def test_help_lists_commands_by_use(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    order = [said.index(f"\n  {name} ") for name in (*stages.STAGES, "predict", "study", "demo", "doctor")]
    assert order == sorted(order) and "Commands:" not in said
    assert cli.main(["retrain", "--help"]) == 0
    said = capsys.readouterr().out
    order = [
        said.index(word)
        for word in ("Most used:", "--arch", "--labels", "Other options of this stage:", "--crop", "Training:")
    ]
    assert order == sorted(order)


def test_planning_imports_nothing_that_only_some_networks_need(tmp_path):
    """Not torchvision, nor torch's compiler, which that and others load: they take longer than the plan."""
    script = f"""
import sys
from ktransfer import cli
assert cli.main({["--run", str(tmp_path / "run"), "--dry-run", *words(LINE)]!r}) == 0
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {{"torchvision", "faiss", "sklearn", "scipy", "onnx"}}))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] == ["", "False"]
