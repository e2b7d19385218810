"""A small run whose names of images and classes are as unfriendly as names can be."""

from pathlib import Path

import numpy as np
import pytest
from hostile import CLUSTERS, IMAGES, LONG, RIGHT, SCRIPT
from PIL import Image


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clustered, labelled and learned images in three classes; a curve of two lines."""
    from ktransfer.cluster import assign, cluster, extract
    from ktransfer.retrain import retrain

    home = tmp_path_factory.mktemp("report")
    root, run = home / "images", home / "run <b>"
    rng = np.random.default_rng(0)
    for place in range(IMAGES):
        folder = (SCRIPT, RIGHT, LONG[:200])[place % 3]
        path = root / folder / f"script>{place:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tint = rng.integers(0, 256, 3)
        Image.fromarray(np.clip(rng.normal(tint, 30, (40, 50, 3)), 0, 255).astype(np.uint8)).save(path)
    extract(run, data=str(root), teacher="pixels", size=16)
    cluster(run, k=CLUSTERS, sheet=0)
    assign(run)
    retrain(run, arch="alexnet_bn", width=0.05, epochs=2, batch=8, stride=2)
    return run
