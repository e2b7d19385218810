"""The page behind a server on this machine, which has what does not fit into a file: every image of every cluster.

It listens on the loopback address alone, knows nothing but the page, images of the data by their rows, and names.csv,
and answers only to those who know the token in its address; another site that the browser has open does not.
"""

import hmac
import io
import json
import re
import secrets
import tempfile
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktransfer import files
from ktransfer.artifacts.labels import Assignment
from ktransfer.artifacts.names import read_names
from ktransfer.data.dataset import Dataset
from ktransfer.errors import BrokenImage, UsageError
from ktransfer.images.decoding import square

HOST = "127.0.0.1"
SIDE = 160
PART = 120
"""Images of a cluster that are told at once."""
LARGEST = 2**25
"""Bytes of names that are taken at most."""
POLICY, SERVED = "img-src data: blob:", "img-src data: blob: 'self'; connect-src 'self'"
HEAD = '<meta name="color-scheme"'


class Served(NamedTuple):
    """What is served: the page as it was written, the images, the clusters of each, their rows by distance, and where
    names are kept."""

    page: Path
    images: Dataset | None
    found: Assignment | None
    members: list[NDArray[np.int64]]
    names: Path


class Answer(NamedTuple):
    """What a browser gets."""

    status: HTTPStatus
    kind: str
    body: bytes


MISSING = Answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here\n")


def open_server(served: Served, port: int) -> tuple[ThreadingHTTPServer, str]:
    """A server that does not yet work, and the address of its page.

    Args:
        port: 0: any that is free.

    Raises:
        UsageError: the port cannot be had.
    """
    token = secrets.token_urlsafe(24)
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, served, token))
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; choose another one, or 0 for any that is free") from error
    return server, f"http://{HOST}:{server.server_address[1]}/{token}/"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, served: Served, token: str, *given: object) -> None:
        self.served, self.token = served, token
        super().__init__(*given)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        place = self._place()
        for pattern, answer in PLACES.items():
            found = None if place is None else re.fullmatch(pattern, place)
            if found:
                self._send(answer(self.served, f"/{self.token}/", *map(int, found.groups())))
                return
        self._send(MISSING)

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        own = self.headers.get("Origin") == f"http://{self.headers.get('Host')}"
        if self._place() != "names" or not own or not size.isdecimal() or int(size) > LARGEST:
            self._send(MISSING)
            return
        self._send(_keep(self.served.names, self.rfile.read(int(size))))

    def log_message(self, *_: object) -> None:
        """Nothing: the token would stand in it."""

    def _place(self) -> str | None:
        """The path behind the token, None where that is wrong or another host is meant."""
        _, token, place = (*self.path.split("/", 2), "", "")[:3]
        port = self.connection.getsockname()[1]
        here = self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}")
        return place if here and hmac.compare_digest(token.encode(), self.token.encode()) else None

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)


def _page(served: Served, address: str) -> Answer:
    """The file, which may now ask this server."""
    text = served.page.read_text(encoding="utf-8").replace(POLICY, SERVED, 1)
    text = text.replace(HEAD, f'<meta name="served" content="{address}">{HEAD}', 1)
    return Answer(HTTPStatus.OK, "text/html; charset=utf-8", text.encode())


def _members(served: Served, _: str, cluster: int, start: int) -> Answer:
    """Some images of a cluster by distance, from a place on."""
    if served.found is None or cluster >= len(served.members):
        return MISSING
    rows = served.members[cluster][start : start + PART]
    told = [
        {"row": int(row), "key": served.found.keys[row], "far": round(float(served.found.distances[row]), 4)}
        for row in rows
    ]
    return Answer(HTTPStatus.OK, "application/json", json.dumps(told).encode())


def _image(served: Served, _: str, row: int) -> Answer:
    if served.images is None or row >= len(served.images):
        return MISSING
    out = io.BytesIO()
    try:
        Image.fromarray(square(served.images.read(row, SIDE), SIDE)).save(out, "JPEG", quality=85)
    except BrokenImage:
        return MISSING
    return Answer(HTTPStatus.OK, "image/jpeg", out.getvalue())


def _keep(names: Path, content: bytes) -> Answer:
    """Write names.csv, if it is one."""
    with tempfile.NamedTemporaryFile(suffix=".csv") as part:
        part.write(content)
        part.flush()
        try:
            read_names(Path(part.name))
        except UsageError as error:
            why = str(error).replace(part.name, "names.csv")
            return Answer(HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8", why.encode())
    files.write_bytes(names, content)
    return Answer(HTTPStatus.OK, "text/plain; charset=utf-8", str(names).encode())


PLACES: dict[str, Callable[..., Answer]] = {
    "": _page,
    r"members/(\d{1,9})/(\d{1,9})": _members,
    r"images/(\d{1,9})": _image,
}
