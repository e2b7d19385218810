"""The claims of docs/security.md that no other test holds."""

import ast
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ktransfer import cli, files, networks
from ktransfer.data import foreign
from ktransfer.detection import saved
from ktransfer.detection.detectors import Settings
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.networks.checkpoints import read_tensors

ROOT = Path(__file__).parents[1]


def imported():
    """All modules that the package imports, wherever in a file."""
    for room in ("ktransfer", "pretext", "cluster", "retrain", "eval"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from ((alias.name, path) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield node.module, path


def test_nothing_can_download():
    clients = {
        "urllib.request",
        "http.client",
        "requests",
        "httpx",
        "aiohttp",
        "ftplib",
        "huggingface_hub",
        "socketserver",
        "smtplib",
    }
    assert [(name, path.name) for name, path in imported() if {name, name.partition(".")[0]} & clients] == []


def weights(tmp_path, **said):
    """A weight file that says something else than it holds."""
    path = tmp_path / "model.safetensors"
    network = Network("alexnet_bn", 0.05, 2, 40, 2)
    networks.save(path, networks.build(network, 1, "test").state_dict(), network)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["network"] = json.dumps(json.loads(header["__metadata__"]["network"]) | said)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def test_a_weight_file_cannot_name_a_function_that_is_run(tmp_path, monkeypatch):
    (tmp_path / "chosen.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nf = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="does not say which network it is"):
        networks.describe(weights(tmp_path, arch="function:chosen:f"))
    assert not (tmp_path / "ran").exists() and "chosen" not in sys.modules


@pytest.mark.parametrize(
    "said",
    [
        {"width": 1e308},
        {"size": 10**9},
        {"classes": -1},
        {"width": "1"},
        {"normalise": "0,0/1"},
        {"arch": ["alexnet"]},
        {"arch": "transformers:/etc"},
    ],
)
def test_a_weight_file_that_says_no_network_is_refused(tmp_path, said):
    with pytest.raises(UsageError, match="does not say which network it is"):
        networks.describe(weights(tmp_path, **said))


@pytest.mark.parametrize("said", [{"width": 60.0}, {"classes": 10**9}, {"arch": "vgg99"}, {"size": 8}])
def test_no_more_memory_is_taken_than_a_weight_file_has_weights(tmp_path, said):
    path = weights(tmp_path, **said)
    with pytest.raises(UsageError, match="do not fit"):
        networks.load(path, networks.describe(path))


def test_the_header_of_safetensors_is_limited(tmp_path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UsageError):
        networks.describe(path)
    with pytest.raises(UsageError):
        read_tensors(path)


def test_json_nested_without_end_is_no_json(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        files.read_json(path)


class Runs:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_no_pickle_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for new in (True, False):
        held = {"conv.weight": torch.ones(2), "args": Runs()}
        torch.save(held, "c.pt", _use_new_zipfile_serialization=new)
        assert list(read_tensors(Path("c.pt"))) == ["conv.weight"]
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "said",
    [
        {"channels": 10**9},
        {"size": "96"},
        {"settings": {"proposals": -1}},
        {"settings": {"kind": 3}},
        {"channels": None},
    ],
)
def test_a_detector_file_cannot_ask_for_more_than_numbers(tmp_path, said):
    settings = Settings()
    described = saved.Described(Network("alexnet_bn", 0.05, 2, 64), "p3-p7", settings, ("a",), 64, 8)
    held = described.as_dict()
    held["settings"] |= said.pop("settings", {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"x": torch.zeros(1)}, {"detector": json.dumps(held | said)}))
    with pytest.raises(UsageError, match="holds no detector"):
        saved.describe(path)


def test_half_of_a_character_is_no_name():
    with pytest.raises(ValueError, match="half of a character"):
        foreign.key("a\ud800")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_no_memory_has_its_way_out(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("ktransfer.status.status", fail)
    assert cli.main(["status", "--run", str(tmp_path)]) == 1
    assert "finished stages are complete: end other programs" in capsys.readouterr().err
