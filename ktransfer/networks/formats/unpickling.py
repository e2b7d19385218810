"""Pickles of checkpoints read without running anything that they name.

Whatever a pickle wants to call or make, but for tensors and plain containers, is an `Inert` object: it takes what is
done to it and does nothing. So the tensors come out of checkpoints that also hold arguments, numpy scalars, loggers,
whole modules, or of a TorchScript archive, whose code is never looked at.
"""

import collections
import io
import pickle  # for a reader that makes nothing that a pickle names  # nosec B403
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

MOST = 1_000_000  # objects looked at: one that holds itself, or many others many times over, has an end
DEEPEST = 60
LARGEST_BYTES = 2**26  # of a bytearray; tensors are none
# The one in Python: that in C takes as much memory as the largest number that a damaged pickle happens to hold.
_Unpickler: Any = pickle._Unpickler
_PARTS = ("_parameters", "_buffers", "_modules")  # of a pickled nn.Module
_JIT = "__torch__"  # the classes of TorchScript


class Inert:
    """Stands for an object of an unknown class.

    Attributes:
        held: what the pickle set, by name: attributes, and items where it was a mapping.
    """

    held: dict[Any, Any]
    dump_patches = False  # torch asks this of the class of a module in its old format

    def __new__(cls, *_given: Any, **_named: Any) -> "Inert":
        """Make one from anything."""
        made = super().__new__(cls)
        made.held = {}
        return made

    def __init__(self, *_given: Any, **_named: Any) -> None:
        """Whatever it is given is not looked at."""

    def __call__(self, *_given: Any, **_named: Any) -> "Inert":
        """What a call would have returned is not known either."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        """Its attributes; with slots, two mappings."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.held.update(part)

    def __setitem__(self, name: Any, value: Any) -> None:
        """An item of a mapping."""
        self.held[name] = value

    def append(self, _item: Any) -> None:
        """An item of a list: a list has no tensors by name."""

    def extend(self, _items: Any) -> None:
        """Items of a list."""

    def add(self, _item: Any) -> None:
        """An item of a set."""


class _Allowed:
    """One of the functions that make tensors, in a wrapping that a pickle cannot change."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

    def __setattr__(self, _name: str, _value: Any) -> None:
        raise pickle.UnpicklingError("the pickle changes a function")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Any:
    last = offset + sum((many - 1) * step for many, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.size():  # torch would make the storage larger
        raise pickle.UnpicklingError("a tensor is larger than what is stored")
    made: Any = torch._utils._rebuild_tensor(storage, offset, size, stride)
    return made


def _as_it_is(data: Any, *_rest: Any) -> Any:
    return data


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _as_it_is,
    ("torch._utils", "_rebuild_parameter_with_state"): _as_it_is,
}


def read(path: Path) -> tuple[Any, list[str]]:
    """What a file of `torch.save` or `torch.jit.save` holds, and the classes and functions that were left out of it.

    Raises:
        Exception: of any kind, where the file is damaged or no such file.
    """
    if tarfile.is_tarfile(path):
        raise ValueError("an archive of a torch before 0.4")
    left: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sources of classes that are not here
        if is_torchscript(path):
            held = _torchscript(path, left)
        else:
            inert = _pickle_module(left)
            with path.open("rb") as file:
                held = torch.load(file, "cpu", pickle_module=inert, weights_only=False)  # it runs nothing  # nosec B614
    return held, [name for name in left if not name.startswith(_JIT)]


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of `torch.jit.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())


def flat(held: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors by the dotted path of names that leads to each; numbered things (optimisers, lists) are left out.

    Raises:
        ValueError: something holds itself, or far more than a checkpoint has.
    """
    looked = 0
    waiting: list[tuple[str, Any, int]] = [("", held, 0)]
    while waiting:
        prefix, value, depth = waiting.pop()
        looked += 1
        if looked > MOST or depth > DEEPEST:
            raise ValueError("it is nested without end")
        if isinstance(value, Tensor):
            if prefix:
                yield prefix, value
            continue
        if isinstance(value, Inert):
            value = {
                name: inner
                for key, part in value.held.items()
                for name, inner in (_items(part) if key in _PARTS else ((key, part),))
            }
        if isinstance(value, Mapping):
            inner = [(f"{prefix}.{key}" if prefix else key, it) for key, it in value.items() if isinstance(key, str)]
            waiting += [(name, it, depth + 1) for name, it in reversed(inner)]


def _items(part: Any) -> list[tuple[Any, Any]]:
    return (
        list(part.items()) if isinstance(part, Mapping) else list(part.held.items()) if isinstance(part, Inert) else []
    )


def _bytearray(unpickler: Any) -> None:
    """What is there of a bytearray; pickle's own takes as much memory as the number before it says."""
    size = int.from_bytes(unpickler.read(8), "little")
    data = unpickler.read(min(size, LARGEST_BYTES))
    if len(data) != size:
        raise pickle.UnpicklingError(f"a bytearray of {size} bytes is cut off")
    unpickler.append(bytearray(data))


def _pickle_module(left: dict[str, None]) -> Any:
    """What torch takes for the module `pickle`; `left` gets the names of what is not made."""
    allowed = {name: _Allowed(function) for name, function in _FUNCTIONS.items()}
    made: dict[str, type[Inert]] = {}

    class Unpickler(_Unpickler):  # type: ignore[misc]
        dispatch: ClassVar[dict[int, Any]] = _Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _bytearray}

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in allowed:
                return allowed[module, name]
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            full = f"{module}.{name}"
            left.setdefault(full)
            return made.setdefault(full, type("Inert", (Inert,), {"__module__": "inert"}))  # torch looks for no source

    def load(file: Any, **given: Any) -> Any:
        return Unpickler(file, **given).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__="inert")


def _torchscript(path: Path, left: dict[str, None]) -> Any:
    base: Any = _pickle_module(left).Unpickler
    with zipfile.ZipFile(path) as archive:
        (record,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        folder = record.removesuffix("data.pkl")
        kept: dict[str, Any] = {}

        class Unpickler(base):  # type: ignore[misc]
            def find_class(self, module: str, name: str) -> Any:
                if module == "torch" and name.endswith("Storage"):
                    return torch.serialization.StorageType(name)
                return super().find_class(module, name)

            def persistent_load(self, saved: Any) -> Any:
                kind, storage, key, _place, _count = saved
                if kind != "storage" or not isinstance(key, str):
                    raise pickle.UnpicklingError(f"unknown reference {kind}")
                if key not in kept:
                    data = bytearray(archive.read(f"{folder}data/{key}"))
                    untyped = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else None
                    kept[key] = torch.storage.TypedStorage(
                        wrap_storage=torch.UntypedStorage(0) if untyped is None else untyped,
                        dtype=storage.dtype,
                        _internal=True,
                    )
                return kept[key]

        return Unpickler(io.BytesIO(archive.read(record))).load()
