"""How others name the tensors of a network, and what else is different in theirs."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Naming(NamedTuple):
    """A naming of somebody else.

    Attributes:
        rename: name of a tensor in the network -> their name.
        adapt: changes the network in place to compute what theirs does, where tensors alone do not say it.
    """

    rename: Callable[[str], str]
    adapt: Callable[[nn.Module], None] | None = None
