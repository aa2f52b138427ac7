"""The run folder: where a command writes, and what it records to be repeated.

Belongs to neither half: it imports the standard library only.
"""

from __future__ import annotations

import json
import math
import platform
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

CONFIG = "config.toml"


def new_run(name: str, out: str | Path | None = None) -> Path:
    """Make an empty folder for a run and return it.

    out: where; made if missing, taken if empty. None: `runs/NAME`, or the first free of
    `runs/NAME-2`, `runs/NAME-3`, ..., so that default names never collide.
    Raises FileExistsError if `out` is a file or holds anything.
    """
    if out is not None:
        return _claim(Path(out))
    Path("runs").mkdir(exist_ok=True)
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count() ended")  # pragma: no cover


def _claim(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give --out a folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} exists and is not empty: give --out another name, or remove it first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def discard(folder: Path) -> None:
    """Take an empty run folder away again; one that holds anything stays."""
    if not any(folder.iterdir()):
        folder.rmdir()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, hakari and these packages; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("hakari", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# --- config.toml --------------------------------------------------------------------------


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a run's resolved settings to `config.toml` in its folder."""
    path = folder / CONFIG
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings of an earlier run; raises FileNotFoundError if there are none."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: it is not the folder of a run")
    with path.open("rb") as file:
        return tomllib.load(file)


def to_toml(config: Mapping[str, Any], prefix: str = "") -> str:
    """A mapping as TOML; None is left out, mappings become tables.

    >>> print(to_toml({"seed": 1, "model": {"weights": None, "level": 0.9}}))
    seed = 1
    <BLANKLINE>
    [model]
    level = 0.9
    <BLANKLINE>
    """
    plain = {k: v for k, v in config.items() if v is not None and not isinstance(v, Mapping)}
    lines = [f"{_key(name)} = {_value(value)}\n" for name, value in plain.items()]
    for name, table in config.items():
        if isinstance(table, Mapping):
            path = f"{prefix}.{_key(name)}" if prefix else _key(name)
            lines.append(f"\n[{path}]\n" + to_toml(table, path))
    return "".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value).lower()
    if isinstance(value, str | Path):
        return _quoted(str(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"{value!r} of type {type(value).__name__} has no place in {CONFIG}")


def _key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
