"""The page in a real browser: what people do with it, and that it asks nobody for anything."""

import csv
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import complaints, opened, requests
from hostile import CLUSTERS, LONG, RIGHT, SCRIPT

from ktransfer.artifacts.names import read_names
from ktransfer.report import report

EVIL = SCRIPT + "/script>"
ENTER, ARROW_RIGHT, ESCAPE = "\ue007", "\ue014", "\ue00c"  # as WebDriver calls these keys


@pytest.fixture(scope="module")
def page(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("page")
    shutil.copytree(hostile, home / "run")
    return report(home / "run", beside=str(hostile))


@pytest.fixture
def browser(page: Path, tmp_path: Path) -> Iterator[Any]:
    with opened(page, tmp_path) as found:
        yield found
        assert complaints(found) == []
        assert requests(found) == []
        assert found.execute_script("return typeof hacked") == "undefined"


def seen(browser: Any, what: str) -> list[Any]:
    return browser.find_elements("css selector", what)


def one(browser: Any, what: str) -> Any:
    return browser.find_element("css selector", what)


def shown(browser: Any) -> list[int]:
    """The clusters whose cards are shown, in their order."""
    return browser.execute_script("return [...document.querySelectorAll('.card')].map(card => +card.dataset.cluster)")


def write(browser: Any, where: Any, text: str) -> None:
    """Type, and leave the field; the driver itself cannot type all of Unicode."""
    browser.execute_script(
        "arguments[0].value = arguments[1];"
        "for (const kind of ['input', 'change']) arguments[0].dispatchEvent(new Event(kind, { bubbles: true }))",
        where,
        text,
    )


def choose(browser: Any, what: str, value: str) -> None:
    write(browser, one(browser, what), value)


def until(true: Callable[[], Any], seconds: float = 15) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found
    return found


def name(browser: Any, cluster: int, text: str) -> None:
    write(browser, one(browser, f".card[data-cluster='{cluster}'] .name"), text)


def saved(browser: Any, folder: Path) -> Path:
    one(browser, "#save").click()
    return until(lambda: next(folder.glob("names.csv"), None))


def test_it_shows_all_parts(browser):
    assert [title.text for title in seen(browser, "h2")] == ["Overview", "Curves", "Clusters"]
    assert len(seen(browser, ".step.done")) == 4
    assert seen(browser, ".step.missing pre")[0].text.startswith("ktransfer --run")
    for part in seen(browser, ".chart"):
        browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", part)
        until(lambda part=part: part.find_elements("css selector", "svg"))
    browser.execute_script("document.querySelector('#cards').scrollIntoView()")
    image = until(lambda: one(browser, ".card .tile img"))
    until(lambda: browser.execute_script("return arguments[0].naturalWidth", image) > 0)


def test_search_sort_and_filter(browser):
    assert shown(browser) == list(range(CLUSTERS))
    choose(browser, "#sort", "size")
    choose(browser, "#order", "down")
    sizes = [int(text.text.split()[0]) for text in seen(browser, ".card .facts")]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == CLUSTERS
    choose(browser, "#search", "3")
    assert 3 in shown(browser)
    choose(browser, "#search", "nothing is called so")
    assert shown(browser) == [] and one(browser, "#none").is_displayed()
    choose(browser, "#search", "")
    name(browser, 2, "dog")
    one(browser, ".card[data-cluster='4'] .junk").click()
    for filtered, wanted in (("named", [2]), ("junk", [4]), ("open", [0, 1, 3]), ("all", [0, 1, 2, 3, 4])):
        choose(browser, "#filter", filtered)
        assert sorted(shown(browser)) == wanted
    assert "2 of 5 named or junk" in one(browser, "#state").text


def test_names_merges_junk_and_moves_are_saved_and_survive_a_reload(browser, tmp_path):
    name(browser, 0, EVIL)
    name(browser, 1, RIGHT)
    one(browser, ".card[data-cluster='2'] .junk").click()
    for cluster in (3, 4):
        one(browser, f".card[data-cluster='{cluster}'] .pick").click()
    write(browser, one(browser, "#merged"), LONG)
    one(browser, "#merge").click()
    one(browser, ".card[data-cluster='0'] .open").click()
    until(lambda: one(browser, "#opened").is_displayed())
    keys = [box.get_attribute("data-key") for box in seen(browser, ".member")]
    for box in seen(browser, ".member")[:2]:
        box.click()
    write(browser, one(browser, "#target"), 'ca"t, big')
    one(browser, "#move").click()
    seen(browser, ".member")[2].click()
    one(browser, "#move-junk").click()
    moved = [box.text for box in seen(browser, ".member .moved")]
    assert moved == ['to ca"t, big', 'to ca"t, big', "junk"]
    one(browser, "#close").click()
    browser.refresh()
    until(lambda: shown(browser))
    names = read_names(saved(browser, tmp_path / "downloads"))
    assert names.clusters == {0: EVIL, 1: RIGHT.strip(), 2: None, 3: LONG.strip(), 4: LONG.strip()}
    assert names.images == {keys[0]: 'ca"t, big', keys[1]: 'ca"t, big', keys[2]: None}
    assert len(names.clustering) == 12


def test_undo_and_names_of_a_file(browser, page, tmp_path):
    name(browser, 0, "dog")
    name(browser, 0, "cat")
    one(browser, "#undo").click()
    assert one(browser, ".card[data-cluster='0'] .name").get_attribute("value") == "dog"
    path = saved(browser, tmp_path / "downloads")
    with path.open(newline="") as handle:
        assert [row["name"] for row in csv.DictReader(handle)] == ["dog"]
    text = path.read_text()
    given = tmp_path / "given.csv"
    given.write_text(text + f'1,,"a ""b"", c",,{text.strip().rpartition(",")[2]}\n')
    one(browser, "#load").send_keys(str(given))
    until(lambda: one(browser, ".card[data-cluster='1'] .name").get_attribute("value") == 'a "b", c')
    given.write_text("cluster,key,name,junk,clustering\n0,,x,,000000000000\n")
    one(browser, "#load").send_keys(str(given))
    until(lambda: "another clustering" in one(browser, "#state").text)


def test_the_keyboard_alone_suffices(browser):
    one(browser, "body").send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    browser.execute_script("document.querySelector('.card .open').focus()")
    browser.switch_to.active_element.send_keys(ENTER)
    until(lambda: one(browser, "#opened").is_displayed())
    title = one(browser, "#opened-title").text
    browser.switch_to.active_element.send_keys(ARROW_RIGHT)
    assert one(browser, "#opened-title").text != title
    browser.switch_to.active_element.send_keys(ESCAPE)
    until(lambda: not one(browser, "#opened").is_displayed())


def test_everything_that_is_used_has_a_name(browser):
    nameless = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, a')].filter(one => !one.closest('template') &&"
        "!(one.getAttribute('aria-label') || one.labels?.length || one.textContent.trim())).map(one => one.outerHTML)"
    )
    assert nameless == []


def test_a_phone_needs_no_scrolling_sideways(page, tmp_path):
    with opened(page, tmp_path, 400, 800) as browser:
        until(lambda: shown(browser))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        assert complaints(browser) == []
