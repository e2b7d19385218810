"""A Python function of one's own as the teacher: `--teacher pkg.module:function`."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ktransfer.errors import UsageError
from ktransfer.run import input_hash

PREFIX = "function:"
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_TEACHER = "--teacher"
_CONTRACT = "it is called with (batch, 3, size, size) uint8 and returns (batch, d) numbers"


class Function(nn.Module):
    """(batch, 3, h, w) in 0..1, of images in 0..255 -> (batch, d) float32, what the function makes of the images."""

    layers: ClassVar[dict[str, str]] = {}
    pools = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._function = name, find(name, _TEACHER, _CONTRACT)

    def forward(self, x: Tensor) -> Tensor:
        """Its vectors.

        Raises:
            UsageError: it raises, or returns anything else.
        """
        pixels = (x.float() * 255).round().to(torch.uint8)
        try:
            vectors = torch.as_tensor(self._function(pixels)).to(x.device, torch.float32)
        except Exception as error:  # it is not ours
            raise UsageError(f"--teacher {self._name}: raised {told(error)}; {_CONTRACT}") from error
        if vectors.ndim != 2 or len(vectors) != len(x) or not vectors.shape[1]:
            raise UsageError(
                f"--teacher {self._name}: made {tuple(vectors.shape)} of {len(x)} images; {_CONTRACT}, d at least 1"
            )
        return vectors


def is_name(given: str) -> bool:
    """Whether this is `pkg.module:function`, and no file."""
    return reads_as_name(given) and not Path(given).exists()


def reads_as_name(given: str) -> bool:
    """Whether this has the form of `pkg.module:function`."""
    return bool(_NAME.fullmatch(given))


def identity(name: str, flag: str = _TEACHER, contract: str = _CONTRACT) -> str:
    """Hex SHA-256 of the name and of the file where the function stands; what it reads itself is not known.

    Raises:
        UsageError: as `find`.
    """
    function = find(name, flag, contract)
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that can be called, or written in C
        source = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return sha256(f"{PREFIX}{name} {input_hash(Path(source)) if source else ''}".encode()).hexdigest()


def find(name: str, flag: str, contract: str) -> Callable[..., Any]:
    """The function of that name.

    Args:
        name: `pkg.module:function`, which came by `flag`.
        contract: what it is called with and returns, for errors.

    Raises:
        UsageError: there is no such function.
    """
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is run, and is not ours
        raise UsageError(
            f"{flag} {name}: no such Python function: {told(error)}; "
            "modules are found where Python looks for them: PYTHONPATH=. adds this folder"
        ) from error
    if not callable(function):
        raise UsageError(f"{flag} {name}: not a function; {contract}")
    return function  # type: ignore[no-any-return]


def told(error: Exception) -> str:
    """What an error of foreign code says, in one line."""
    return f"{type(error).__name__} ({' '.join(str(error).split())[:120]})"
