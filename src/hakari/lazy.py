"""Names of a package that are imported when they are first asked for (PEP 562).

So a process that needs one part, such as one that only writes checkpoints, loads only that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_demand(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    homes: for each module of the package the names that it is asked for, such as 'Config
    load_config=load' (another name for `load`) or ':balance' (the module itself).
    """
    where = {
        each.partition("=")[0].removeprefix(":"): (module, each)
        for module, names in homes.items()
        for each in names.split()
    }

    def find(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, each = where[name]
        found = import_module(f"{package}.{module}")
        return found if each.startswith(":") else getattr(found, each.partition("=")[2] or name)

    return find
