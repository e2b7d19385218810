"""An `nn.Module` of one's own as the target network: `--arch pkg.module:function`.

The function is called with the number of outputs, and returns a new module with fresh weights:
(batch, 3, size, size) float32, normalised -> (batch, outputs). A class whose constructor takes that number is such a
function too.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ktransfer import distributed
from ktransfer.errors import UsageError
from ktransfer.networks import functions
from ktransfer.networks.formats import hugging_face
from ktransfer.networks.zoos import TIMM, TORCHVISION

CONTRACT = (
    "it is called with the number of outputs and returns an nn.Module, "
    "(batch, 3, size, size) float32 -> (batch, outputs)"
)
VARIABLE = "KTRANSFER_MODULES"
_OTHERS = (TORCHVISION, TIMM, hugging_face.PREFIX, functions.PREFIX)
_trusted: set[str] = set()  # what the command itself has named


def is_own(arch: str) -> bool:
    """Whether an architecture is a function of one's own."""
    return functions.reads_as_name(arch) and not arch.startswith(_OTHERS)


def find(arch: str, flag: str) -> Callable[..., Any]:
    """The function of that name, which came by `flag`; a file alone does not decide what is called.

    Args:
        flag: of the command line, or "network" where a weight file names it.

    Raises:
        UsageError: there is none, it is one of Python's own, or neither the command nor the user's environment names
            it.
    """
    if arch.partition(":")[0].partition(".")[0] in sys.stdlib_module_names:
        raise UsageError(f"{flag} {arch}: a function of Python itself, which is not called; {CONTRACT}")
    if flag.startswith("--"):
        _trusted.add(arch)
    allowed = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")}
    if not (arch in _trusted | allowed or not distributed.is_leader()):  # the leader decides for the others
        raise UsageError(
            f"{flag} {arch}: a weight file names this Python function, and files are not to decide what runs; where "
            f"you trust it, set {VARIABLE}={arch}"
        )
    return functions.find(arch, flag, CONTRACT)


def identity(arch: str) -> str:
    """Hex SHA-256 of the name and of the file where the function stands.

    Raises:
        UsageError: there is no such function.
    """
    find(arch, "--arch")
    return functions.identity(arch, "--arch", CONTRACT)


def made(arch: str, outputs: int) -> nn.Module:
    """What the function returns.

    Raises:
        UsageError: there is no such function, it raises, or returns something else than a module.
    """
    function = find(arch, "network")
    try:
        module = function(outputs)
    except Exception as error:  # it is not ours
        raise UsageError(f"network {arch}: raised {functions.told(error)}; {CONTRACT}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"network {arch}: returned {type(module).__name__}; {CONTRACT}")
    return module
