"""Self-training on the page: scores, images with the boxes of teacher and people, and a slider."""

import shutil
from pathlib import Path

import pytest
from browser import complaints, opened
from tiny import SELFTRAIN

from ktransfer.report import report
from ktransfer.report.boxes import IMAGES, boxes_of
from ktransfer.retrain import selftrain

UNLABELLED = 8  # half of SELFTRAIN's


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("boxes") / "run"
    selftrain(found, **SELFTRAIN)
    return found


def test_what_is_shown(run):
    found = boxes_of(run, [])
    assert found
    assert [row[0][0] for row in found.tables[0].rows] == ["teacher", "student"]
    assert len(found.images) == min(IMAGES, UNLABELLED)
    for image in found.images:
        scores = [box.score for box in image.boxes if box.score is not None]
        assert scores and scores == sorted(scores, reverse=True)
        assert any(box.score is None for box in image.boxes)
        assert all(box.x >= 0 and box.x + box.width <= image.width + 1e-3 for box in image.boxes)
    assert boxes_of(run.parent, []) is None


def test_images_that_are_gone_are_told(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = copy / "selftrain" / "stage.json"
    record.write_text(record.read_text().replace(SELFTRAIN["labelled"], str(tmp_path / "gone")))
    found = boxes_of(copy, [])
    assert found and not found.images and found.tables
    assert "report: no images with boxes" in capsys.readouterr().err


def test_the_slider_hides_boxes(run, tmp_path):
    with opened(report(run), tmp_path) as browser:
        count = "return [...document.querySelectorAll('#boxes rect')].filter(one => one.checkVisibility()).length"
        browser.execute_script("document.querySelector('#boxes').scrollIntoView()")
        before = browser.execute_script(count)
        browser.execute_script("document.getElementById('score').value = 1")
        browser.execute_script("document.getElementById('score').dispatchEvent(new Event('input'))")
        people = browser.execute_script(count)
        browser.find_element("id", "drawn").click()
        assert before > people > browser.execute_script(count) == 0
        assert complaints(browser) == []
