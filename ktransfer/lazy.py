"""Names of a package that are imported when they are first used (PEP 562), so that help needs no torch."""

import importlib
from collections.abc import Callable
from typing import Any


def exports(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds each name in the given submodule of `package`."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(f"{package}.{names[name]}"), name)

    return get
