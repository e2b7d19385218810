"""Checkpoints with bystanders: the tensors come out, and nothing that stands beside them runs."""

import argparse
import collections
import datetime
import encodings.cp437  # of zipfile, which imports it when it needs it
import encodings.raw_unicode_escape  # noqa: F401  of pickle, likewise
import io
import multiprocessing.synchronize  # noqa: F401  of torch's storages
import os
import pickle
import resource
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ktransfer.errors import UsageError
from ktransfer.networks import checkpoints
from ktransfer.networks.formats import unpickling

WATCHED = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "subprocess.Popen",
)
WATCHED += ("exec", "compile", "import", "socket.connect", "shutil.rmtree", "ctypes.dlopen")
events: list[str] | None = None


def _watch(event, arguments):
    if events is not None and event in WATCHED:
        events.append(f"{event} {arguments}"[:200])


sys.addaudithook(_watch)


@pytest.fixture
def watched():
    """What ran, by Python's own audit; importing torch's parts for the first time is over by then."""
    global events
    unpickling.read(saved({"w": torch.ones(1), "x": argparse.Namespace()}))
    events = []
    yield events
    events = None


class Buffer:
    """As mmengine's HistoryBuffer: an object with arrays and a class attribute of functions."""

    def __init__(self):
        self.log, self.count = np.arange(3.0), np.int64(4)


def saved(held, **how):
    file = io.BytesIO()
    torch.save(held, file, **how)
    path = SCRATCH / "held.pth"
    path.write_bytes(file.getvalue())
    if events:  # of the writing
        events.clear()
    return path


@pytest.fixture(autouse=True, scope="module")
def _scratch(tmp_path_factory):
    global SCRATCH
    SCRATCH = tmp_path_factory.mktemp("pickles")


def tensors():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4, generator=generator).half()
    return {"a.weight": torch.randn(3, 4, generator=generator), "b": half, "n": torch.tensor(7)}


def bystanders():
    return {
        "args": argparse.Namespace(lr=0.1, when=datetime.datetime(2020, 1, 1), path=__import__("pathlib").Path("x")),
        "best": np.float64(0.5),
        "history": {"loss": Buffer()},
        "default": collections.defaultdict(list, a=[1]),
        "types": [np.dtype("float32"), torch.float16, torch.Size([1])],
        "rng": np.random.RandomState(0).get_state(),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_out_beside_anything(watched, zipped):
    state = tensors()
    shared = {"twice": state["a.weight"]}
    path = saved(bystanders() | {"model": state, "again": shared}, _use_new_zipfile_serialization=zipped)
    found = checkpoints.read_tensors(path)
    assert set(found) >= {"model.a.weight", "model.b", "model.n", "again.twice"}
    for name, value in state.items():
        assert torch.equal(found[f"model.{name}"], value) and found[f"model.{name}"].dtype == value.dtype
    assert watched == []


def test_what_was_left_out_is_named(capsys):
    checkpoints.read_tensors(saved({"m": tensors(), "args": argparse.Namespace(a=1)}))
    assert "only its tensors are read; 1 left out, and not run (argparse.Namespace)" in capsys.readouterr().err


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_read_by_the_names_of_its_parts(watched, zipped):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4)))
    found = checkpoints.read_tensors(saved({"model": model, "n": 3}, _use_new_zipfile_serialization=zipped))
    assert {name.removeprefix("model.") for name in found} == set(model.state_dict())
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in model.state_dict().items())
    assert watched == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_read_without_its_code(tmp_path, watched):
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.layer(x)

    model = Loud().eval()
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 8, 8)), tmp_path / "jit.pt")
    watched.clear()
    found = checkpoints.read_tensors(tmp_path / "jit.pt")
    assert set(found) == set(model.state_dict())
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert watched == []


class Call:
    def __init__(self, function, *given):
        self.what = function, given

    def __reduce__(self):
        return self.what


PAYLOADS = {
    "system": lambda ran: Call(os.system, f"touch {ran}"),
    "eval": lambda ran: Call(eval, f"open({str(ran)!r}, 'w')"),
    "exec": lambda ran: Call(exec, f"open({str(ran)!r}, 'w')"),
    "open": lambda ran: Call(open, str(ran), "w"),
    "torch": lambda ran: Call(torch.save, 1, str(ran)),
    "type": lambda ran: Call(torch._tensor._rebuild_from_type_v2, os.system, object, (f"touch {ran}",), None),
    "hub": lambda ran: Call(torch.hub.load, "a/b", "c"),
    "attribute": lambda ran: Call(getattr, nn.Module, "forward"),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("zipped", [True, False])
def test_payloads_do_not_run(tmp_path, watched, name, zipped):
    ran = tmp_path / "ran"
    path = saved({"model": tensors(), "x": PAYLOADS[name](ran)}, _use_new_zipfile_serialization=zipped)
    assert "model.b" in checkpoints.read_tensors(path)
    assert not ran.exists() and watched == []


def rewritten(data, pickled):
    """The archive with another data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


def refused_or_read(data):
    path = SCRATCH / "mutated.pth"
    path.write_bytes(data)
    try:
        checkpoints.read_tensors(path)
    except UsageError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "what",
    [
        b"(cbuiltins\nexec\nX\x04\x00\x00\x00passo.",  # OBJ
        b"(X\x04\x00\x00\x00trueios\nsystem\n.",  # INST
        b"cos\nsystem\nX\x04\x00\x00\x00true\x85R.",  # GLOBAL, REDUCE
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x82\x01.",  # EXT1
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00xcos\nsystem\nsb.",  # BUILD on a function of ours
        b"ctorch._utils\n_rebuild_tensor_v2\n(}}X\x09\x00\x00\x00_functioncos\nsystem\ns\x86b.",
        b"ccollections\nOrderedDict\n(N}X\x08\x00\x00\x00__init__cos\nsystem\nst\x86b.",
        b"cantigravity\nfly\n)R.",  # reading its name must not import the module
        b"cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R.",
    ],
)
def test_every_way_to_call_is_inert(watched, what):
    data = saved({"model": tensors(), "x": argparse.Namespace()}).read_bytes()
    functions = dict(vars(torch._utils._rebuild_tensor_v2))
    refused_or_read(rewritten(data, what))
    refused_or_read(what)
    assert watched == [] and vars(torch._utils._rebuild_tensor_v2) == functions


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_mutated_pickles_run_nothing(data):
    global events
    good = saved({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(a=1), "n": np.float32(1), "c": Buffer()})
    archive = good.read_bytes()
    with zipfile.ZipFile(good) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("data.pkl"))
        pickled = bytearray(opened.read(name))
    call = pickle.dumps(Call(os.system, "true"), protocol=2)[2:-1]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(pickled) - 1))
        how = data.draw(st.sampled_from(["set", "drop", "insert", "call"]))
        if how == "set":
            pickled[place] = data.draw(st.integers(0, 255))
        elif how == "drop":
            del pickled[place]
        else:
            pickled[place:place] = call if how == "call" else data.draw(st.binary(min_size=1, max_size=4))
        if not pickled:
            return
    mutated = rewritten(archive, bytes(pickled))
    events = []
    try:
        refused_or_read(mutated)
        refused_or_read(bytes(pickled))
        assert events == []
    finally:
        events = None


def test_a_damaged_number_takes_no_memory():
    good = saved({"w": torch.ones(2), "x": argparse.Namespace()})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(good) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("data.pkl"))
        pickled = opened.read(name)
    for what in (
        b"r\xff\xff\xff\x0f",
        b"B\xff\xff\xff\x7f",
        b"\x8e" + b"\xff" * 7 + b"\x00",
        b"\x96\x01sbX\x01\x00\x00\x00",  # a bytearray of 6 GB
    ):
        refused_or_read(rewritten(good.read_bytes(), pickled[:-1] + what + b"."))
    large = pickled.replace(b"K\x02", b"J\xff\xff\xff\x7f")
    assert large != pickled
    refused_or_read(rewritten(good.read_bytes(), large))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # KiB


def test_endless_nesting_has_an_end(tmp_path):
    held = {"w": torch.ones(1)}
    held["again"] = held
    with pytest.raises(UsageError, match="nested without end"):
        checkpoints.read_tensors(saved(held))
    many = {"w": torch.ones(1)}
    for _ in range(40):
        many = {"a": many, "b": many}
    with pytest.raises(UsageError, match="nested without end"):
        checkpoints.read_tensors(saved(many))
