"""Real images, from the command line: every part of the quality record, and engines that agree."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from ktransfer import cli
from ktransfer.artifacts.labels import read_labels

PACKS = os.environ.get("KTRANSFER_DATA")


@pytest.mark.skipif(PACKS is None, reason="KTRANSFER_DATA names no folder that holds det_bccd")
def test_hog_of_real_images(tmp_path):
    data = str(Path(PACKS) / "det_bccd")
    assert cli.main(["--run", str(tmp_path / "exact"), "extract", "--data", data, "--teacher", "hog"]) == 0
    features = str(tmp_path / "exact" / "features" / "train.h5")  # the training part is what is meant
    line = ["cluster", "--features", features, "--data", data, "--k", "12", "--stability", "--sheet", "5"]
    labels = {}
    for engine in ("exact", "faiss"):
        run = tmp_path / engine
        assert cli.main(["--run", str(run), *line, "--engine", engine, "assign", "--engine", engine]) == 0
        labels[engine] = read_labels(run / "clusters" / "labels.h5").labels
    np.testing.assert_array_equal(labels["exact"], labels["faiss"])
    record = json.loads((run / "clusters" / "quality.json").read_text())
    step = json.loads((run / "clusters" / "stage.json").read_text())["cluster"]
    made = step["result"]
    rows = len(labels["exact"])
    assert rows == record["rows"] > 200 and record["k"] == 12
    assert record["objective"] == made["objective"] == sorted(made["objective"], reverse=True)
    assert sum(record["sizes"]["histogram"].values()) == 12 and record["sizes"]["imbalance"] >= 1
    assert -1 <= record["silhouette"]["mean"] <= 1 and 0 <= record["margin"]["0.05"] <= record["margin"]["0.95"] <= 1
    assert 0 < record["stability"]["nmi"] < 1
    assert Image.open(run / "clusters" / "clusters.png").width > 16 * 60
    # The contract of a clustering: what the file and the record of the stage hold between them.
    with h5py.File(run / "clusters" / "clusters.h5") as stored:
        assert stored["centroids"].shape == (12, 1764) and stored["counts"][:].sum() == rows
        for name in ("objective", "empties", "splits", "moved"):
            assert stored[name][:].tolist() == made[name]
        said = dict(stored.attrs)
    assert (said["points_used"], said["points_total"], said["seed"]) == (rows, rows, 0)
    assert said["engine"].startswith("faiss") and said["version"]
    assert said["bytes_read"] == made["bytes_read"] == 4 * rows * 1764 * (len(made["objective"]) + 1)
    assert len(made["seconds"]) == len(made["objective"]) and {"ktransfer", "torch", "numpy"} <= set(step["versions"])
