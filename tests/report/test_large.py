"""2,000 clusters of 1.3 million images (made): the page keeps its size, and moves."""

import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from browser import complaints, opened

from ktransfer import files
from ktransfer.artifacts.labels import write_labels
from ktransfer.data.dataset import Dataset
from ktransfer.report.page import make_page

pytestmark = pytest.mark.slow

IMAGES, CLUSTERS = 1_300_000, 2000
MEGABYTES = 28
# Milliseconds; a quiet machine of two cores needs a half of the first and a third of the second.
FIRST_CARD, FRAME = 3000, 50
SCROLL = """
const done = arguments[0], gaps = [];
let last = performance.now();
const end = last + 5000;
const step = (now) => {
  gaps.push(now - last);
  last = now;
  scrollBy(0, 60);
  now < end ? requestAnimationFrame(step) : done(gaps);
};
requestAnimationFrame(step);
"""


def made(run: Path) -> Dataset:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 12, 12, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    keys = tuple(f"{row % 1000:03d}/{row:07d}.jpg" for row in range(IMAGES))
    targets = (np.arange(IMAGES) % 1000).astype(np.int32)
    classes = tuple(f"{place:03d}" for place in range(1000))
    data = Dataset("made", "made", keys, targets, classes, "made", lambda row, _: noise[row % len(noise)])
    clusters = run / "clusters"
    clusters.mkdir(parents=True)
    with h5py.File(clusters / "clusters.h5", "w") as file:
        file["centroids"] = rng.normal(size=(CLUSTERS, 64)).astype(np.float32)
        file.attrs.update({"schema": 1, "normalise": False, "teacher": "", "layer": "", "pooling": "", "transform": ""})
    digest = files.sha256(clusters / "clusters.h5")
    labels = rng.integers(0, CLUSTERS, IMAGES).astype(np.int32)
    write_labels(clusters, keys, labels, rng.gamma(5, size=IMAGES).astype(np.float32), CLUSTERS, digest, "made")
    record = {"state": "done", "config": {}, "inputs": {}, "outputs": {}, "seconds": 1.0}
    files.write_json(clusters / "stage.json", {"assign": record})
    return data


def test_a_page_of_many_images(tmp_path):
    data = made(tmp_path / "run")
    page = tmp_path / "index.html"
    page.write_text(make_page(tmp_path / "run", [], data, None, MEGABYTES * 10**6))
    assert page.stat().st_size <= MEGABYTES * 10**6
    with opened("about:blank", tmp_path) as browser:
        browser.set_script_timeout(60)
        browser.get(page.as_uri())
        first = browser.execute_script("return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        assert len(browser.find_elements("css selector", ".card")) == CLUSTERS
        browser.execute_script("document.querySelector('#cards').scrollIntoView()")
        time.sleep(2)
        gaps = sorted(browser.execute_async_script(SCROLL))
        assert first < FIRST_CARD and gaps[len(gaps) // 2] < FRAME, (first, gaps[len(gaps) // 2])
        assert complaints(browser) == []
