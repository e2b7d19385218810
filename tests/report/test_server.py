"""The page behind a server: all images, names kept in the run, and no answer to those who do not know the token."""

import http.client
import io
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from browser import complaints, opened
from hostile import IMAGES
from PIL import Image

from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.report import report
from ktransfer.report.atlas import clusters_of
from ktransfer.report.server import HOST, Served, open_server


class Running(NamedTuple):
    address: str
    port: int
    path: str
    run: Path


@pytest.fixture(scope="module")
def running(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(hostile, run)
    page, found = report(run), clusters_of(run)
    data = open_dataset(str(hostile.parent / "images"))
    served = Served(page, data, found.assignment, found.members, run / "report" / "names.csv")
    server, address = open_server(served, 0)
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.server_address[1]
        yield Running(address, port, address.partition(str(port))[2], run)
        server.shutdown()
        thread.join()


def ask(running: Running, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection(HOST, running.port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_all_images_of_all_clusters_are_there(running):
    told = []
    for cluster in range(5):
        status, body = ask(running, f"{running.path}members/{cluster}/0")
        assert status == 200
        told += json.loads(body)
    assert len({one["row"] for one in told}) == IMAGES
    assert json.loads(ask(running, f"{running.path}members/0/1")[1])[0]["far"] >= told[0]["far"]
    status, body = ask(running, f"{running.path}images/{told[0]['row']}")
    assert status == 200 and Image.open(io.BytesIO(body)).size == (160, 160)


@pytest.mark.parametrize(
    "path", ["images/36", "images/-1", "images/../stage.json", "../../../etc/passwd", "members/5/0", "stage.json", "x"]
)
def test_there_is_nothing_but_the_page_and_its_images(running, path):
    assert ask(running, running.path + path) == (404, b"there is nothing here\n")


def test_without_the_token_there_is_nothing(running):
    for path in ("/", "/wrong/", running.path[:-2] + "/", "//", "/images/0", running.path.replace("/", "")):
        assert ask(running, path)[0] in (400, 404), path
    assert ask(running, running.path)[0] == 200


def test_other_hosts_and_other_sites_get_nothing(running):
    assert ask(running, running.path, Host="example.org")[0] == 404
    body = b"cluster,key,name,junk\n0,,dog,\n"
    for origin in ("http://example.org", "null", f"http://localhost:{running.port}"):
        assert ask(running, f"{running.path}names", "POST", body, Origin=origin)[0] == 404
    assert not (running.run / "report" / "names.csv").exists()


def test_names_are_kept_where_they_are_names(running):
    own = f"http://{HOST}:{running.port}"
    status, why = ask(running, f"{running.path}names", "POST", b"no names\n", Origin=own)
    assert status == 400 and b"names.csv: not a file of names" in why
    assert ask(running, f"{running.path}names", "POST", b"cluster,key,name,junk\n0,,dog,\n", Origin=own)[0] == 200
    kept = running.run / "report" / "names.csv"
    assert kept.read_text() == "cluster,key,name,junk\n0,,dog,\n"
    kept.unlink()


def test_a_port_that_is_taken_is_one_line(running):
    with pytest.raises(UsageError, match=f"--port {running.port}: Address already in use"):
        open_server(Served(Path(), None, None, [], Path()), running.port)


def test_in_a_browser(running, tmp_path):
    import time

    with opened(running.address, tmp_path) as browser:
        browser.execute_script("document.querySelector('.card .open').click()")
        end = time.monotonic() + 20
        ready = "return [...document.querySelectorAll('.member img')].filter(one => one.naturalWidth == 160).length"
        while not browser.execute_script(ready) and time.monotonic() < end:
            time.sleep(0.1)
        assert browser.execute_script(ready)
        browser.execute_script(
            "document.querySelector('#close').click(); document.querySelector('.card .junk').click()"
        )
        browser.execute_script("document.querySelector('#save').click()")
        kept = running.run / "report" / "names.csv"
        while not kept.exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert kept.read_text().splitlines()[1].startswith("0,,,yes,")
        assert complaints(browser) == []
