"""Shared by all tests: shapes in annotations are checked, designs are made in one place."""

from __future__ import annotations

import tests.typechecker  # noqa: F401 - the hook finds it as an attribute of `tests`
from jaxtyping import install_import_hook

# compiled modules (density, transition, kernels) are left out: numba cannot see through the hook
CHECKED = [
    f"hakari.inference.{name}"
    for name in ("moments", "posterior", "prior", "diagnostics", "identification", "gmm")
]
install_import_hook(CHECKED, "tests.typechecker.check")
