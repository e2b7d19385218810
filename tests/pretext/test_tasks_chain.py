"""What learned rotation or context is a teacher like any other: the chain runs on it."""

import h5py
import pytest

from ktransfer.cli import main

SCENES = "scenes:images=40,size=64"
TITLES = {"rotation": "trained on rotations", "context": "trained on context"}


@pytest.mark.parametrize(
    ("task", "arch", "layer"), [("rotation", "vgg16_bn", "conv4_1"), ("context", "alexnet", "conv4")]
)
def test_the_chain_runs_on_the_teacher(tmp_path, capsys, task, arch, layer):
    tiny = ["--width", "0.05", "--epochs", "1", "--batch", "8"]
    teach = ["pretext", "--data", SCENES, "--task", task, "--arch", arch, *tiny]
    then = ["cluster", "--k", "4", "retrain", "--arch", "alexnet_bn", *tiny, "--stride", "2"]
    evaluate = ["eval", "--epochs", "1", "--batch", "8"]
    run, direct = tmp_path / "run", tmp_path / "direct"
    assert main(["--run", str(run), *teach, *then, *evaluate]) == 0
    assert "retrained on pseudo-labels (run)" in capsys.readouterr().out
    with h5py.File(run / "features" / "scenes.h5") as file:
        assert file.attrs["layer"] == layer and file["valid"][:].all()
        assert file["features"][:].std(axis=0).max() > 0
    layers = ["--layers", layer]
    assert main(["--run", str(direct), *teach, *evaluate, *layers]) == 0
    assert f"{arch}, {TITLES[task]} (direct)" in capsys.readouterr().out
