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
_CONTRACT = "it is called with (batch, 3, size, size) uint8 and returns (batch, d) numbers"


class Function(nn.Module):
    """(batch, 3, h, w) in 0..1, of images in 0..255 -> (batch, d) float32, what the function makes of the images."""

    layers: ClassVar[dict[str, str]] = {}
    pools = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._function = name, _found(name)

    def forward(self, x: Tensor) -> Tensor:
        """Its vectors.

        Raises:
            UsageError: it raises, or returns anything else.
        """
        pixels = (x.float() * 255).round().to(torch.uint8)
        try:
            vectors = torch.as_tensor(self._function(pixels)).to(x.device, torch.float32)
        except Exception as error:  # it is not ours
            raise UsageError(f"--teacher {self._name}: raised {_told(error)}; {_CONTRACT}") from error
        if vectors.ndim != 2 or len(vectors) != len(x) or not vectors.shape[1]:
            raise UsageError(
                f"--teacher {self._name}: made {tuple(vectors.shape)} of {len(x)} images; {_CONTRACT}, d at least 1"
            )
        return vectors


def is_name(given: str) -> bool:
    """Whether this is `pkg.module:function`, and no file."""
    return bool(_NAME.fullmatch(given)) and not Path(given).exists()


def identity(name: str) -> str:
    """Hex SHA-256 of the name and of the file where the function stands; what it reads itself is not known.

    Raises:
        UsageError: there is no such function.
    """
    function = _found(name)
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object that can be called, or written in C
        source = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return sha256(f"{PREFIX}{name} {input_hash(Path(source)) if source else ''}".encode()).hexdigest()


def _found(name: str) -> Callable[[Tensor], Any]:
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is run, and is not ours
        raise UsageError(
            f"--teacher {name}: no such Python function: {_told(error)}; "
            "modules are found where Python looks for them: PYTHONPATH=. adds this folder"
        ) from error
    if not callable(function):
        raise UsageError(f"--teacher {name}: not a function; {_CONTRACT}")
    return function  # type: ignore[no-any-return]


def _told(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:120]})"
