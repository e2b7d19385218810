"""Studies: the grid, the recipe's refusals, and a table whose numbers scipy and the hand know."""

import csv
import itertools
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from ktransfer import cli, networks
from ktransfer.data import scenes
from ktransfer.detection import saved, voc
from ktransfer.detection.opening import open_detection
from ktransfer.errors import StageError, UsageError
from ktransfer.networks import Network
from ktransfer.plan import Plan
from ktransfer.retrain.selftraining import stage, study, tables

RECIPE = """
[selftrain]
labelled = "scenes:images=24,size=64"
epochs = 1

[grid]
init = ["random", "other.safetensors"]
fraction = [0.5, 0.25]
seed = [0, 1, 2]

[names]
"other.safetensors" = "CC"
"""
TINY = """
[selftrain]
labelled = "scenes:images=8,size=64"
fraction = 0.5
backbone = "alexnet_bn"
width = 0.05
channels = 16
size = 64
epochs = 1
batch = 4
lr = 0.1
threshold = 0.0
precision = "float32"

[grid]
seed = [0, 1]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def ap(cell, method):
    """A made AP: better with CC, with more labels and for students, a little different for each seed."""
    value = 0.2 + (0.1 + 0.005 * cell["seed"]) * (cell["init"] != "random") + 0.4 * cell["fraction"]
    return value + 0.01 * cell["seed"] ** 2 + (0.05 + 0.02 * cell["seed"]) * METHODS.index(method)


METHODS = ("teacher", "student")


@pytest.fixture
def ran(monkeypatch):
    """Cells that are only noted, and whose scores are made."""
    done = []

    def fake(run, **options):
        done.append(run.name)
        run.mkdir(parents=True, exist_ok=True)
        scores = {method: {"AP": ap(options, method), "AP50": 2 * ap(options, method)} for method in METHODS}
        (run / "scores.json").write_text(json.dumps({"scores": scores}))
        return run / "scores.json"

    monkeypatch.setattr(stage, "selftrain", fake)
    monkeypatch.setattr(stage, "check", lambda run, options: Plan(stage="selftrain", run=run))
    return done


def table(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def agrees(row, name, values):
    """Mean and half of the interval, as scipy has them."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert float(row[name]) == pytest.approx(np.mean(values))
    assert float(row[f"{name}_half"]) == pytest.approx((high - low) / 2)


def test_every_cell_and_one_table(recipe, ran, tmp_path, capsys):
    path = study.study(recipe, tmp_path / "out")
    assert len(ran) == len(set(ran)) == 12
    assert ran[0] == "init-random_fraction-0.5_seed-0"
    text = path.read_text()
    assert text in capsys.readouterr().out
    rows = table(tmp_path / "out" / "study.csv")
    combined = itertools.product(("random", "other.safetensors"), (0.5, 0.25), METHODS, ("AP", "AP50"))
    assert [(row["init"], float(row["fraction"]), row["method"], row["measure"]) for row in rows] == list(combined)
    for row in rows:
        cells = [{"init": row["init"], "fraction": float(row["fraction"]), "seed": seed} for seed in range(3)]
        times = 100 if row["measure"] == "AP" else 200
        values = np.array([times * ap(cell, row["method"]) for cell in cells])
        alone = np.array([times * ap(cell, "teacher") for cell in cells])
        fresh = np.array([times * ap(cell | {"init": "random"}, "teacher") for cell in cells])
        agrees(row, "mean", values)
        assert row["seeds"] == "3"
        if row["method"] == "student":
            agrees(row, "gain", values - alone)
        elif row["init"] != "random":
            agrees(row, "gain", values - fresh)
        else:
            assert row["gain"] == row["over_random"] == row["over_random_half"] == ""
            continue
        agrees(row, "over_random", values - fresh)
    each = table(tmp_path / "out" / "cells.csv")
    assert len(each) == 24
    cell = {"init": "random", "fraction": 0.25, "seed": 2}
    own = next(row for row in each if {**row} | {key: str(value) for key, value in cell.items()} == row)
    assert float(own["AP50"]) == pytest.approx(200 * ap(cell, "teacher"))
    assert own["method"] == "teacher"
    assert "| AP % | 50 % | 25 % |" in text
    assert "| init random, labelled images alone | 41.7 ± 5.2 | 31.7 ± 5.2 |" in text
    assert "| CC, labelled images alone | 52.2 ± 6.4 (+10.5 ± 1.2) | 42.2 ± 6.4 (+10.5 ± 1.2) |" in text
    assert "| CC, with self-training | 59.2 ± 11.3 (+7.0 ± 5.0) |" in text
    assert (tmp_path / "out" / "fraction.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "out" / "augment.svg").exists()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    study.study(recipe, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


CLAIM = """
[claim]
text = "The gain grows as labels shrink"
expect = "more"
bound = 1.0
measure = "AP"

[[claim.contrasts]]
"init random, 25 %, with self-training" = 1
"init random, 25 %, labelled images alone" = -1
"init random, 50 %, with self-training" = -1
"init random, 50 %, labelled images alone" = 1
"""


def test_the_claim_of_a_recipe_is_judged(recipe, ran, tmp_path):
    recipe.write_text(RECIPE + CLAIM)
    path = study.study(recipe, tmp_path / "out")
    held = json.loads((tmp_path / "out" / "study.json").read_text())["claim"]
    assert held["found"][0]["mean"] == pytest.approx(0)  # the made gains are the same at 25 and 50 %
    assert held["verdict"] == "refuted"
    assert "**The gain grows as labels shrink: refuted**" in path.read_text()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "25 %, with",
            "20 %, with",
            "no row 'init random, 20 %, with self-training'; the rows are init random, 50 %, ",
        ),
        ('measure = "AP"', 'measure = "top1"', "measure must be one of mask_AP"),
    ],
)
def test_a_wrong_claim_begins_nothing(recipe, ran, tmp_path, old, new, words):
    recipe.write_text(RECIPE + CLAIM.replace(old, new))
    with pytest.raises(UsageError, match=words):
        study.study(recipe, tmp_path / "out")
    assert not ran


@pytest.mark.parametrize(
    ("axis", "values", "shown", "hidden"),
    [
        (
            "fraction",
            "[0.5, 0.25]",
            ["| Rand Init w/ self-training | 34.1 | 41.4 | 45.6 |", "| w/ pre-train | 9.9 |"],
            "Table 2",
        ),
        ("augment", '["S1", "S4"]', ["| Rand Init w/ self-training | 40.9 | 43.0 | 45.4 | 45.6 |"], "Table 3"),
        ("epochs", "[1, 2]", ["| ResNet-101, random init | 38.2 | 41.0 | 41.8 | 42.2 | 42.7 |"], "Zoph"),
        ("alpha", "[0.5, 1.0]", ["| ImageNet Init (SimCLR) | 40.4 |", "| AP % | mean |"], "Table 2"),
    ],
)
def test_the_published_table_of_the_same_shape_stands_beside(recipe, ran, tmp_path, axis, values, shown, hidden):
    text = RECIPE.replace("fraction = [0.5, 0.25]", f"{axis} = {values}").replace("epochs = 1\n", "")
    recipe.write_text(text if axis == "fraction" else text.replace("[grid]", "fraction = 0.5\n[grid]"))
    text = study.study(recipe, tmp_path / "out").read_text()
    for line in shown:
        assert line in text
    assert hidden not in text
    assert "Table 7" not in text  # no joint training
    assert (tmp_path / "out" / f"{axis}.svg").exists() == (axis != "alpha")


def test_each_varied_axis_has_a_table_and_three_methods_one_more(recipe, ran, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "METHODS", ("teacher", "student", "joint"))
    recipe.write_text(RECIPE.replace("[grid]", '[grid]\naugment = ["S1", "S4"]'))
    text = study.study(recipe, tmp_path / "out").read_text()
    heads = [line for line in text.splitlines() if line.startswith("| AP %")]
    assert heads == [
        "| AP % | S1 | S4 |",
        "| AP % | 50 % | 25 % |",
        "| AP % | labelled images alone | with self-training | with joint training |",
    ]
    assert "| S4, CC, 25 % | 42.2 ± 6.4 (+10.5 ± 1.2) | 49.2 ± 11.3 (+7.0 ± 5.0) | 56.2 ± 16.2 (+14.0 ± 9.9) |" in text
    assert "| CC, 25 %, with joint training | 56.2 ± 16.2 (+14.0 ± 9.9) | 56.2 ± 16.2 (+14.0 ± 9.9) |" in text
    assert "| Rand Init | 30.7 | 34.1 | 33.6 | 35.1 |" in text


def test_published_numbers_are_those_of_the_fact_sheet():
    """Gains that the papers print are differences of numbers here."""
    path = Path(tables.__file__).with_name("published.csv")
    held = {(row["source"], row["row"], row["column"]): float(row["ap"]) for row in table(path)}
    assert len(held) == 70
    zoph, he = "Zoph et al. 2020, Table ", "He et al. 2019, Table 1"
    for source, row, other, column, gain in (
        (f"{zoph}2", "ImageNet Init", "Rand Init", "S4", -1.0),
        (f"{zoph}2", "Rand Init w/ self-training", "Rand Init", "S1", 1.7),
        (f"{zoph}3", "ImageNet++ Init w/ self-training", "ImageNet++ Init", "100 %", 0.8),
        (f"{zoph}4", "Rand Init w/ self-training", "Rand Init", "AP", 0.8),
        (he, "ResNet-50, random init", "ResNet-50, w/ pre-train", "6x", 0.2),
        (he, "ResNet-101, random init", "ResNet-101, w/ pre-train", "6x", 0.5),
    ):
        assert held[source, row, column] - held[source, other, column] == pytest.approx(gain, abs=0.051)
    for row, column, gain in (("Rand Init", "w/ both", 4.4), ("ImageNet Init", "w/ joint training", 0.7)):
        assert held[f"{zoph}7", row, column] - held[f"{zoph}7", row, "supervised"] == pytest.approx(gain)


def test_more_seeds_run_alone(tmp_path, capsys):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(TINY)
    study.study(recipe, out)
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert len(before) == 4
    recipe.write_text(TINY.replace("seed = [0, 1]", "seed = [0, 1, 2]"))
    capsys.readouterr()
    study.study(recipe, out)
    said = capsys.readouterr().err
    assert said.count("teacher: done before") == 2
    assert len(list(out.rglob("*.safetensors"))) == 6
    assert {path: path.read_bytes() for path in before} == before
    assert {row["seeds"] for row in table(out / "study.csv")} == {"3"}
    recipe.write_text(TINY.replace("lr = 0.1", "lr = 0.2"))
    with pytest.raises(
        UsageError, match=r"cell seed-0: its teacher was made differently: lr was 0\.1, is 0\.2\. Remove"
    ):
        study.study(recipe, out)
    recipe.write_text(TINY)
    path = out / "cells" / "seed-1" / "selftrain" / "stage.json"
    records = json.loads(path.read_text())
    records["teacher"]["inputs"]["init"] = "of weights"  # and now none are given
    path.write_text(json.dumps(records))
    with pytest.raises(UsageError, match="cell seed-1: its teacher was made differently: init changed"):
        study.study(recipe, out)


def test_a_cell_that_fails_is_named_and_the_others_are_whole(tmp_path):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(TINY.replace("seed = [0, 1]", "threshold = [1.0, 0.0]").replace("threshold = 0.0\n", "", 1))
    with pytest.raises(StageError, match=r"1 of 2 cells failed: threshold-1\.0 \(.*no pseudo-box reaches") as caught:
        study.study(recipe, out)
    assert "\n" not in str(caught.value)
    assert (out / "cells" / "threshold-0.0" / "selftrain" / "scores.json").is_file()
    assert not (out / "study.md").exists()


def devkit(root, parts):
    """The images of scenes as a VOCdevkit."""
    year = root / "VOCdevkit" / "VOC2007"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (year / folder).mkdir(parents=True)
    for part, data in zip(("trainval", "test"), parts, strict=True):
        (year / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{part}{row}\n" for row in range(len(data))))
        for row, one in enumerate(data.objects):
            boxes = "".join(
                f"<object><name>{voc.CLASSES[label]}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
                f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for label, (x1, y1, x2, y2) in zip(one.labels.tolist(), one.boxes.round().astype(int), strict=True)
            )
            text = f"<annotation><size><width>64</width><height>64</height></size>{boxes}</annotation>"
            (year / "Annotations" / f"{part}{row}.xml").write_text(text)
            Image.fromarray(data.read(row, None)).save(year / "JPEGImages" / f"{part}{row}.jpg")
    return root


def test_coco_and_voc_roots_and_a_target_network_of_ours(tmp_path):
    """The cell with the weights begins with them, and that without does not."""
    scenes.write_scenes(tmp_path / "coco", 12, 64)
    devkit(tmp_path / "voc", open_detection("scenes:images=12,size=64"))
    described = Network("alexnet_bn", 0.05, 4, 64, 2, "imagenet", "pseudo-labels")
    cc = tmp_path / "cc" / "retrain" / "model.safetensors"
    networks.save(cc, networks.build(described, 5, "test").state_dict(), described)
    grid = f'labelled = ["{tmp_path}/coco", "{tmp_path}/voc"]\ninit = ["random", "{cc}"]'
    text = TINY.replace('labelled = "scenes:images=8,size=64"\n', "").replace("seed = [0, 1]", grid)
    text = text.replace("lr = 0.1", "lr = 1e-30")  # what it begins with is what it ends with
    names = f'[names]\n"{cc}" = "CC"\n"{tmp_path}/coco" = "COCO"\n"{tmp_path}/voc" = "VOC"\n'
    (tmp_path / "recipe.toml").write_text(text + names)
    text = study.study(tmp_path / "recipe.toml", tmp_path / "out").read_text()
    for line in ("| COCO, CC, labelled images alone |", "| VOC, init random, with self-training |"):
        assert line in text
    held = load_file(cc)
    for cell in sorted((tmp_path / "out" / "cells").iterdir()):
        for method in METHODS:
            state = load_file(cell / "selftrain" / method / "model.safetensors")
            same = torch.equal(state["backbone.body.conv1.weight"], held["conv1.weight"])
            assert same == ("safetensors" in cell.name), cell.name
            classes = saved.describe(cell / "selftrain" / method / "model.safetensors").classes
            assert len(classes) == (20 if "-voc_" in cell.name else 12)
    rows = table(tmp_path / "out" / "study.csv")
    assert len(rows) == 16 and {row["labelled"] for row in rows} == {f"{tmp_path}/coco", f"{tmp_path}/voc"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[names]", "[nomes]", "'nomes' is not a table of a study"),
        ("[grid]", '[grid]\ntask = ["detect", "segment"]', "task: boxes and masks have different measures"),
        ("epochs = 1", "epoch = 1", "no setting 'epoch'; did you mean 'epochs'"),
        ("epochs = 1", "epochs = 1\nfraction = 0.1", "'fraction' is in"),
        ("seed = [0, 1, 2]", "seed = 3", "needs a list of values"),
        ("seed = [0, 1, 2]", "seed = []", "needs a list of values"),
        ("fraction = [0.5, 0.25]", "fraction = [0.5, 2.0]", "must be at most 1"),
        ("epochs = 1", "epochs = = 1", "not valid TOML"),
        ("epochs = 1", "epochs = 1\noverwrite = true", "overwrite is not a setting of a study"),
        ("fraction = [0.5, 0.25]", "fraction = [0.5, 0.25, 0.5]", "fraction lists 0.5 twice"),
        ('"random", "other.safetensors"', '"a/b.pth", "a-b.pth"', "two cells would be written to cells/init-a-b.pth"),
        (
            '"other.safetensors" = "CC"',
            '"other.safetensors" = "init random"',
            "values of init are called 'init random'",
        ),
        ("[names]", '[names]\n"random" = "CC"', "two values of init are called 'CC'"),
    ],
)
def test_a_wrong_recipe_begins_nothing(recipe, ran, tmp_path, old, new, words):
    recipe.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UsageError, match=words):
        study.study(recipe, tmp_path / "out")
    assert not ran
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        study.study(tmp_path / "none.toml", tmp_path / "out")


def test_a_cell_that_cannot_be_is_found_before_the_first(recipe, tmp_path):
    with pytest.raises(UsageError, match=r"other\.safetensors"):
        study.study(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_begins(recipe, ran, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'ktransfer\[report\]'"):
        study.study(recipe, tmp_path / "out")
    assert not ran


def test_seeds_alone_are_one_column(recipe, ran, tmp_path):
    text = RECIPE.replace('init = ["random", "other.safetensors"]\nfraction = [0.5, 0.25]', "")
    recipe.write_text(text.replace("epochs = 1", 'init = "random"\nfraction = 0.5\nepochs = 1'))
    assert "| AP % | mean |" in study.study(recipe, tmp_path / "out").read_text()


def test_the_recipe_of_the_handbook_can_run(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "run-a-study.md").read_text()
    text = page[page.index("    [selftrain] ") :]
    lines = itertools.takewhile(lambda line: not line or line.startswith("    "), text.splitlines())
    (tmp_path / "recipe.toml").write_text(textwrap.dedent("\n".join(lines)))
    plan = study.read(tmp_path / "recipe.toml")
    assert len(study.cells(plan)) == 24
    for cell in study.cells(plan):
        if (cell["init"], cell["augment"], cell["seed"]) == ("random", "S4", 0):
            stage.check(tmp_path / "cell", plan.common | cell)


def test_of_several_processes_one_studies(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["study", "--recipe", str(recipe), "--run", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()


def test_masks_of_objects_are_evaluated_by_their_own_precision_and_pixels_have_no_published_table(
    recipe, ran, tmp_path, monkeypatch
):
    def measured(*names):
        def fake(run, **options):
            run.mkdir(parents=True, exist_ok=True)
            found = {name: ap(options, "teacher") / place for place, name in enumerate(names, 1)}
            (run / "scores.json").write_text(json.dumps({"scores": {"teacher": found}}))
            return run / "scores.json"

        monkeypatch.setattr(stage, "selftrain", fake)
        return study.study(recipe, tmp_path / names[0]).read_text()

    text = measured("mask_AP", "mask_AP50", "AP", "AP50")
    assert "| mask_AP % | 50 % | 25 % |" in text and "Zoph et al. 2020, Table 3" in text
    assert {row["measure"] for row in table(tmp_path / "mask_AP" / "study.csv")} == set(tables.MEASURES) - {"mIoU"}
    text = measured("mIoU")
    assert "| mIoU % | 50 % | 25 % |" in text and "Zoph" not in text
    lines = [tables.Line({"task": task}, "teacher", name, {0: 1.0}) for task, name in (("detect", "AP"), ("b", "AP"))]
    assert tables.measure_of([*lines, tables.Line({"task": "b"}, "teacher", "mask_AP", {0: 2.0})]) == "AP"
