"""Studies: the grid, the recipe's refusals, and a table whose numbers scipy and the hand know."""

import csv
import itertools
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ktransfer import cli
from ktransfer.errors import UsageError
from ktransfer.retrain import selftraining, study

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


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def ap(cell, method):
    """A made AP: better with CC, with more labels and for students, a little different for each seed."""
    value = 0.2 + 0.1 * (cell["init"] != "random") + 0.4 * cell["fraction"] + 0.01 * cell["seed"] ** 2
    return value + (0.05 + 0.02 * cell["seed"] if method == "student" else 0.0)


@pytest.fixture
def ran(monkeypatch):
    """Cells that are only noted, and whose scores are made."""
    done = []

    def fake(run, **options):
        done.append(run.name)
        run.mkdir(parents=True, exist_ok=True)
        scores = {method: {"AP": ap(options, method)} for method in study.METHODS}
        (run / "scores.json").write_text(json.dumps({"scores": scores}))
        return run / "scores.json"

    monkeypatch.setattr(selftraining, "selftrain", fake)
    monkeypatch.setattr(selftraining, "check", lambda run, options: None)
    return done


def test_every_cell_and_one_table(recipe, ran, tmp_path, capsys):
    path = study.study(recipe, tmp_path / "out")
    assert len(ran) == len(set(ran)) == 12
    assert ran[0] == "init-random_fraction-0.5_seed-0"
    text = path.read_text()
    assert text in capsys.readouterr().out
    with (tmp_path / "out" / "study.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["init"], float(row["fraction"])) for row in rows] == [
        ("random", 0.5),
        ("random", 0.25),
        ("other.safetensors", 0.5),
        ("other.safetensors", 0.25),
    ]
    for row in rows:
        cells = [{"init": row["init"], "fraction": float(row["fraction"]), "seed": seed} for seed in range(3)]
        for name in ("teacher", "student"):
            values = [100 * ap(cell, name) for cell in cells]
            low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
            assert float(row[name]) == pytest.approx(np.mean(values))
            assert float(row[f"{name}_half"]) == pytest.approx((high - low) / 2)
        assert float(row["gain"]) == pytest.approx(7.0)
    assert "| CC, labelled pictures alone | 51.7 ± 5.2 | 41.7 ± 5.2 |" in text
    assert "(+7.0 ± 5.0)" in text
    assert "| AP % | 50 % | 25 % |" in text
    assert "| Rand Init w/ self-training | 34.1 | 41.4 | 45.6 |" in text
    assert (tmp_path / "out" / "fraction.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "out" / "augment.svg").exists()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    study.study(recipe, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[names]", "[nomes]", "'nomes' is no table of a study"),
        ("epochs = 1", "epoch = 1", "no setting 'epoch'; did you mean 'epochs'"),
        ("epochs = 1", "epochs = 1\nfraction = 0.1", "'fraction' stands in"),
        ("seed = [0, 1, 2]", "seed = 3", "needs a list of values"),
        ("seed = [0, 1, 2]", "seed = []", "needs a list of values"),
        ("fraction = [0.5, 0.25]", "fraction = [0.5, 2.0]", "must be at most 1"),
        ("epochs = 1", "epochs = = 1", "not valid TOML"),
        ("epochs = 1", "epochs = 1\noverwrite = true", "overwrite is no setting of a study"),
        ("fraction = [0.5, 0.25]", "fraction = [0.5, 0.25, 0.5]", "fraction lists 0.5 twice"),
        ('"random", "other.safetensors"', '"a/b.pth", "a-b.pth"', "two cells would be made in cells/init-a-b.pth"),
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
    page = (Path(__file__).parents[2] / "docs" / "selftraining.md").read_text()
    text = page[page.index("    [selftrain] ") :]
    lines = itertools.takewhile(lambda line: not line or line.startswith("    "), text.splitlines())
    (tmp_path / "recipe.toml").write_text(textwrap.dedent("\n".join(lines)))
    plan = study.read(tmp_path / "recipe.toml")
    assert len(study.cells(plan)) == 24
    for cell in study.cells(plan):
        if (cell["init"], cell["augment"], cell["seed"]) == ("random", "S4", 0):
            selftraining.check(tmp_path / "cell", plan.common | cell)


def test_of_several_processes_one_studies(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["study", "--recipe", str(recipe), "--run", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()


def test_one_seed_has_no_interval():
    assert study.half_interval([3.0]) is None
