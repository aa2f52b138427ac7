"""Shared by all tests: shapes in annotations are checked, designs are made in one place."""

from __future__ import annotations

from jaxtyping import install_import_hook
from threadpoolctl import threadpool_limits

import tests.typechecker  # noqa: F401 - the hook finds it as an attribute of `tests`

# compiled modules (density, transition, kernels) are left out: numba cannot see through the hook
CHECKED = [
    f"hakari.inference.{name}"
    for name in ("moments", "posterior", "prior", "diagnostics", "identification", "gmm")
]
# left out: router (tests give it wrong types on purpose), balance and experts (torch operators)
CHECKED += [
    f"hakari.training.{name}" for name in ("batches", "generation", "moe.layer", "moe.health")
]
install_import_hook(CHECKED, "tests.typechecker.check")

# small solves wait for each other's threads on shared cores, and sums in other orders differ
threadpool_limits(1, user_api="blas")
