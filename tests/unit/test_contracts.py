"""The direction of imports, and what an import may load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hakari.inference
import hakari.training


def test_direction_of_imports():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        (
            "hakari.inference",
            ["torch", "linearmodels", "matplotlib", "hakari.inference.transition"],
        ),
        (
            "hakari.training",
            ["numba", "pandas", "arviz_base", "matplotlib", "transformers", "hakari.inference"],
        ),
        ("hakari.run", ["numpy", "hakari.inference", "hakari.training"]),
        ("hakari.terminal", ["numpy", "matplotlib"]),
        ("hakari.demo", ["torch", "numba", "pandas", "hakari.inference", "hakari.training"]),
        ("hakari.cli", ["numpy", "pandas", "numba", "torch"]),
    ],
)
def test_an_import_loads_only_its_part(module, unwanted):
    """`transition` compiles when imported, so it may not be before the first sample."""
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_that_is_exported_is_there():
    for half in (hakari.inference, hakari.training):
        for name in half.__all__:
            assert getattr(half, name).__doc__, name
