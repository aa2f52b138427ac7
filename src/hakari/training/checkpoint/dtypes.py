"""Names of element types as safetensors writes them, and how wide they are.

Nothing here interprets numbers: values move as unsigned integers of the same width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
BITS: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}


def bits(name: str) -> np.dtype[Any]:
    """The unsigned integer type that is as wide as the elements."""
    return BITS[BYTES[name]]
