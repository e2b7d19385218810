"""The report stage: one page, the same bytes for the same run, made again when the run changed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile import CLUSTERS, IMAGES, LONG, RIGHT, SCRIPT

from ktransfer.cli import main
from ktransfer.cluster import assign
from ktransfer.errors import UsageError
from ktransfer.report import report
from ktransfer.report.atlas import _spread
from ktransfer.report.places import places
from ktransfer.report.thumbnails import FEW, fitting
from ktransfer.retrain import load_model, retrain
from ktransfer.run import locked


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / run.name)
    return to / run.name


def atlas(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_same_run_gives_the_same_bytes_and_is_then_done(hostile, tmp_path, capsys, monkeypatch):
    first, second = (copied(hostile, tmp_path / name) for name in ("one", "two"))
    pages = []
    for run in (second, first):
        monkeypatch.chdir(run.parent)  # commands on the page name the run as it was given
        pages.insert(0, report(run.name).resolve())
    first = Path(first.name)
    assert pages[0] == (first / "report" / "index.html").resolve()
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert pages[0].stat().st_size < 3e6
    before = pages[0].stat().st_mtime_ns
    assert main(["--run", str(first), "report"]) == 0
    assert "report: done before, skipped" in capsys.readouterr().err
    assert pages[0].stat().st_mtime_ns == before
    (first / "retrain" / "metrics.jsonl").open("a").write('{"step": 99, "epoch": 3, "loss": 1.0}\n{"half')
    assert main(["--run", str(first), "report"]) == 0  # no --overwrite needed
    assert pages[0].read_bytes() != pages[1].read_bytes()


def test_every_image_stands_in_its_cluster_by_distance(hostile, tmp_path):
    run = copied(hostile, tmp_path)
    data = atlas(report(run))
    assert len(data["clusters"]) == CLUSTERS
    keys = [key for one in data["clusters"] for key in one["keys"]]
    assert len(keys) == len(set(keys)) == IMAGES
    assert {key.rpartition("/")[0] for key in keys} == {SCRIPT, RIGHT, LONG[:200]}
    for one in data["clusters"]:
        assert one["size"] == len(one["keys"]) and one["far"] == sorted(one["far"])
        assert one["sheet"] and 0 < one["purity"] <= 1 and 0 <= one["margin"] <= 1 and one["cohesion"] <= 1
        assert len(one["near"]) == 4 and 0 <= one["x"] <= 1


def test_nothing_of_a_name_can_end_an_element(hostile, tmp_path):
    page = report(copied(hostile, tmp_path)).read_text()
    assert "<script>hacked" not in page and "run <b>" not in page


def test_it_may_work_beside_another_stage(hostile, tmp_path, capsys):
    run = copied(hostile, tmp_path)
    with locked(run):
        assert main(["--run", str(run), "report"]) == 0
    assert "report: done" in capsys.readouterr().err


def test_a_run_without_clusters_says_what_is_missing(tmp_path, run):
    page = report(run).read_text()
    assert f"ktransfer --run {run} extract" in page and 'id="data"' not in page
    shutil.rmtree(run / "report")
    with pytest.raises(UsageError, match="holds no stage of a run"):
        report(tmp_path / "none")
    with pytest.raises(UsageError, match=r"--beside .*holds no stage"):
        report(run, beside=str(tmp_path / "none"))


def test_images_that_are_gone_are_told_and_left_out(hostile, tmp_path, capsys, folder):
    run = copied(hostile, tmp_path)
    record = json.loads((run / "clusters" / "stage.json").read_text())
    record["assign"]["config"]["data"] = record["cluster"]["config"]["data"] = str(tmp_path / "gone")
    (run / "clusters" / "stage.json").write_text(json.dumps(record))
    data = atlas(report(run))
    assert "report: no images:" in capsys.readouterr().err
    assert not any(one["sheet"] for one in data["clusters"])
    data = atlas(report(run, data=str(folder)))
    assert "does not hold those that were labelled" in capsys.readouterr().err
    assert not any(one["sheet"] for one in data["clusters"])


def test_names_are_applied_and_learned(hostile, tmp_path):
    run = copied(hostile, tmp_path)
    data = atlas(report(run))
    first, second, third, *_ = (one["keys"] for one in data["clusters"])
    names = tmp_path / "names.csv"
    of = data["clustering"]
    names.write_text(
        f"cluster,key,name,junk,clustering\n0,,dog,,{of}\n1,,dog,,{of}\n2,,,yes,{of}\n"
        + f',"{second[0]}",cat,,{of}\n'.replace(second[0], second[0].replace('"', '""'))
    )
    assign(run, names=str(names), overwrite=True)
    retrain(run, arch="alexnet_bn", width=0.05, epochs=1, batch=8, stride=2, overwrite=True)
    record = json.loads((run / "retrain" / "stage.json").read_text())["retrain"]
    assert record["classes"] == ["dog", "cluster 3", "cluster 4", "cat"]
    assert record["result"] == {"classes": 4, "images": IMAGES - len(third)}
    assert load_model(run).names == ("dog", "cluster 3", "cluster 4", "cat")
    again = atlas(report(run, names=str(names)))
    assert again["clusters"][0]["keys"] == first  # the atlas still shows the clusters
    assert again["names"] == {"clusters": {"0": "dog", "1": "dog", "2": ""}, "images": {second[0]: "cat"}}


def test_names_of_other_clusters_are_refused(hostile, tmp_path):
    run = copied(hostile, tmp_path)
    names = tmp_path / "names.csv"
    names.write_text("cluster,key,name,junk,clustering\n0,,dog,,123456789abc\n")
    with pytest.raises(UsageError, match="names are of another clustering"):
        report(run, names=str(names))
    with pytest.raises(UsageError, match="names are of another clustering"):
        assign(run, names=str(names), overwrite=True)


@pytest.mark.parametrize(
    ("sizes", "budget", "side", "most"),
    [([30] * 200, 12_000_000, 96, 400), ([650] * 2000, 18_100_000, 48, 15), ([650] * 2000, 1_000_000, 48, 3)],
)
def test_thumbnails_fit_the_budget(sizes, budget, side, most):
    found = fitting(sizes, budget)
    assert (found.side, found.most) == (side, most)
    assert found.most >= FEW or budget < FEW * len(sizes) * 600


def test_of_large_clusters_the_ends_and_some_between_are_shown():
    rows = np.arange(100, 200)
    shown = _spread(rows, 15, 3)
    assert len(set(shown.tolist())) == 15 and shown.tolist() == sorted(shown.tolist())
    assert shown[:5].tolist() == [100, 101, 102, 103, 104] and shown[-5:].tolist() == [195, 196, 197, 198, 199]
    assert _spread(rows, 100, 3) is rows
    assert len(_spread(rows, 1, 3)) == 1


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_places_on_the_map(count):
    points = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    found = places(points)
    assert found.shape == (count, 2) and found.min() >= 0 and found.max() <= 1
    np.testing.assert_array_equal(found, places(points))


def test_neighbours_stay_neighbours_on_the_map():
    rng = np.random.default_rng(0)
    points = (np.repeat(np.eye(3) * 10, 20, axis=0) + rng.normal(size=(60, 3))).astype(np.float32)
    found = places(points)
    gaps = np.linalg.norm(found[:, None] - found, axis=2)
    np.fill_diagonal(gaps, np.inf)
    assert (gaps.argmin(axis=1) // 20 == np.arange(60) // 20).all()
