"""The examples in docstrings run, and at least the public functions have them."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import hakari.inference

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (hakari, hakari.inference)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_a_module(module):
    assert doctest.testmod(importlib.import_module(module), verbose=False).failed == 0


def test_main_entries_show_an_example():
    for name in ("LinearMoments", "QuasiPosterior", "sample", "Normal", "parse_covariance"):
        assert ">>>" in getattr(hakari.inference, name).__doc__, name
