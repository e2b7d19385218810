"""A study of the chain: what cells share is made once, a kill or a change costs what depends on it, tables by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest
import scipy.stats
import torch

from ktransfer import cli
from ktransfer.errors import StageError
from ktransfer.study import carrying, findings
from ktransfer.study.carrying import study
from ktransfer.study.findings import Table, beyond, gain
from ktransfer.study.recipe import read
from ktransfer.tables import mean

SMALL = """
[pretext]
data = "scenes:images=24,size=48"
arch = "alexnet_bn"
width = 0.05
permutations = 4
epochs = 1
batch = 8
size = 48

[extract]
layer = "conv3"
pool = 1

[cluster]
k = 3

[retrain]
arch = "alexnet_bn"
width = 0.05
stride = 2
size = 32
epochs = 1
batch = 8

[eval]
labelled = "scenes:images=24,size=48"
size = 32
stride = 2
epochs = 1
layers = "conv1,conv3"
"""
GRID = """
[grid]
"cluster.k" = [3, 4]
"retrain.seed" = [0, 1]

[arms.cc]

[arms.labels]
leave = ["pretext", "extract", "cluster", "assign"]
retrain = { labels = "classes", data = "scenes:images=24,size=48" }

[arms.hog]
leave = ["pretext", "extract.layer", "extract.pool"]
extract = { teacher = "hog", data = "scenes:images=24,size=48" }

[names]
labels = "true labels"
"""


def recipe(folder: Path, text: str = SMALL + GRID) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study that was carried out, and what it carried out."""
    folder = tmp_path_factory.mktemp("study")
    begun: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carrying, "_made_here", counted(begun))
        study(recipe(folder), folder / "run")
    return folder, begun


def counted(begun):
    real = carrying._made_here

    def made_here(step, run, done, of):
        begun.append(step.name)
        return real(step, run, done, of)

    return made_here


def outcome(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("study.*")} | {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.glob("steps/*/*/*")
        if path.suffix in (".safetensors", ".csv", ".md")
    }


def test_the_recipe_of_the_documentation(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs/how-to/run-a-study.md").read_text()
    text = page[page.index("    [pretext]") : page.index("and run it:")]
    found = read(recipe(tmp_path, "\n".join(line.removeprefix("    ") for line in text.splitlines())))
    assert len(found.cells) == 4 * (4 + 4 + 1)
    assert Counter(step.folder for step in carrying.distinct(found))["clusters"] == 8


def test_what_cells_share_is_made_once(made):
    _, begun = made
    assert max(Counter(begun).values()) == 1
    folders = Counter(name.partition("-")[0] for name in begun)
    # One pretext; features of two teachers; two clusterings of each; of these and of the labels, two seeds.
    assert folders == {"pretext": 1, "features": 2, "clusters": 4, "retrain": 10, "eval": 10}


def test_the_tables(made):
    folder, _ = made
    text = (folder / "run/study.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    expected = ["random weights", "cc, k 3", "cc, k 4", "true labels", "hog, k 3", "hog, k 4"]
    assert rows[2:8] == expected and rows[10:15] == expected[1:]
    assert "2 repetitions of retrain and what follows" in text
    held = json.loads((folder / "run/study.json").read_text())["values"]
    cell = next(one for one in read(folder / "recipe.toml").cells if one.values == {"arm": "cc", "cluster.k": 4})
    scores = json.loads((folder / "run/steps" / cell.step.name / "eval/linear.json").read_text())["arms"]
    assert len(scores) == 1  # random weights are those of the first cell
    wanted = 100 * scores[cell.step.name]["scores"]["conv3"]["top1"]
    found = [
        one["value"] for one in held if (one["row"], one["column"], one["measure"]) == ("cc, k 4", "conv3", "top1")
    ]
    assert found[0] == pytest.approx(wanted, abs=1e-3)
    assert (folder / "run/linear-top1.svg").stat().st_size > 1000


def test_again_and_changed_it_makes_what_depends_on_the_change(made, tmp_path, capsys, monkeypatch):
    folder, _ = made
    before = outcome(folder / "run")
    study(folder / "recipe.toml", folder / "run")
    assert outcome(folder / "run") == before
    changed = recipe(tmp_path, (SMALL + GRID).replace('"retrain.seed" = [0, 1]', '"retrain.seed" = [0, 1, 2]'))
    study(changed, folder / "run", dry_run=True)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].startswith("10 of 37 steps run, one by one in about ")
    assert sum(" runs " in line for line in shown[:-1]) == 10
    assert outcome(folder / "run") == before


@pytest.mark.parametrize("folder", ["features", "eval"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, folder):
    text = SMALL + '[grid]\n"cluster.k" = [3, 4]\n'
    path = recipe(tmp_path, text)
    study(path, tmp_path / "whole")
    real = carrying._made_here

    def stop(step, run, done, of):
        if step.folder == folder:
            raise KeyboardInterrupt
        return real(step, run, done, of)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(carrying, "_made_here", stop)
        study(path, tmp_path / "run")
    study(path, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_two_jobs_make_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(carrying, "cores", lambda: 2 * torch.get_num_threads())  # as many for each as here
    text = SMALL.replace("[pretext]", "[hidden]").split("[hidden]")[0] + SMALL[SMALL.index("[extract]") :]
    text = text.replace("[extract]", '[extract]\nteacher = "hog"\ndata = "scenes:images=24,size=48"').replace(
        'layer = "conv3"\npool = 1\n', ""
    )
    path = recipe(tmp_path, text + '[grid]\n"cluster.k" = [3, 4]\n')
    study(path, tmp_path / "one")
    assert cli.main(["study", "--recipe", str(path), "--run", str(tmp_path / "two"), "--jobs", "2"]) == 0
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


def test_what_rests_on_a_failed_step_is_not_begun(tmp_path, monkeypatch):
    path = recipe(tmp_path, SMALL + '[grid]\n"cluster.k" = [3, 4]\n')
    begun = []

    def fail(step, run, done, of):
        begun.append(step.folder)
        return "no luck" if step.folder == "clusters" and dict(step.calls)["cluster"]["k"] == 3 else ""

    monkeypatch.setattr(carrying, "_made_here", fail)
    with pytest.raises(StageError, match=r"1 of 8 steps failed: clusters-\w+ \(no luck\)"):
        study(path, tmp_path / "run")
    assert Counter(begun) == {"pretext": 1, "features": 1, "clusters": 2, "retrain": 1, "eval": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not valid TOML"),
        ("[retrian]\n", "no table 'retrian'; did you mean 'retrain'"),
        ("k = 3\n", "no table 'k'"),
        (SMALL + "[grid]\nk = [3]\n", "[grid] k: must be seed or STAGE.SETTING"),
        (SMALL + '[grid]\n"cluster.k" = 3\n', "needs a list of values"),
        (SMALL + '[grid]\n"cluster.k" = [3, 3]\n', "lists 3 twice"),
        (SMALL + '[grid]\n"cluster.kk" = [3]\n', "no setting 'kk'"),
        (SMALL + "[arms.a.clusters]\n", "must be a stage's table"),
        (SMALL + '[arms.a]\nleave = ["all"]\n', "must list stages"),
        (SMALL + '[arms.a]\nleave = ["eval"]\n', "needs the stage eval"),
        (SMALL + '[arms.a.retrain]\narch = "alexnett"\n', "alexnett"),
        (SMALL.replace("k = 3", "k = 3\noverwrite = true"), "overwrite is not a setting of a study"),
    ],
)
def test_a_wrong_recipe_is_one_line_before_anything_begins(tmp_path, capsys, text, words):
    path = recipe(tmp_path, text)
    assert cli.main(["study", "--recipe", str(path), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and said.count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_means_gains_and_corrections_by_other_code():
    first, second = {(0,): 10.0, (1,): 12.0, (2,): 11.0}, {(0,): 12.0, (1,): 14.5, (2,): 13.0, (9,): 99.0}
    table = Table("linear", "top1", "top-1 %", {"a": {"c": first}, "b": {"c": second}})
    value, half, chance = gain(table, "b", "a", "c")
    wanted = scipy.stats.ttest_rel([12.0, 14.5, 13.0], list(first.values()))
    low, high = wanted.confidence_interval(0.95)
    assert (value - half, value + half) == pytest.approx((low, high)) and chance == pytest.approx(wanted.pvalue)
    assert mean([3.0]) == (3.0, None)
    # Holm by hand: 0.01 <= 0.05 / 3, 0.02 <= 0.05 / 2, 0.06 > 0.05.
    assert beyond({"x": 0.02, "y": 0.06, "z": 0.01}) == {"x", "z"}
    assert beyond({"x": 0.03, "y": 0.04}) == set()
    assert "+2.2 ± 0.7" in findings.in_markdown(table)


def test_links_of_a_run_lead_to_the_steps_before(made):
    folder, _ = made
    for place in (folder / "run/steps").glob("eval-*"):
        for link in (path for path in place.iterdir() if path.is_symlink()):
            assert (place / link.readlink()).is_dir()
