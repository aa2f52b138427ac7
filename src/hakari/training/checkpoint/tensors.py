"""Tensors as arrays of unsigned integers over the same memory, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hakari.training.checkpoint.dtypes import BITS, BYTES

TORCH: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}


def name_of(dtype: torch.dtype) -> str:
    """Name of a torch dtype. Raises ValueError for one that safetensors cannot hold."""
    if dtype not in NAMES:
        raise ValueError(f"{dtype} cannot be stored: use one of {', '.join(map(str, NAMES))}")
    return NAMES[dtype]


def as_bits(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's own memory, as unsigned integers, strides kept; writing changes the tensor."""
    name = name_of(tensor.dtype)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    width = BYTES[name]
    same = tensor.detach() if tensor.dtype == kinds[width] else tensor.detach().view(kinds[width])
    return same.numpy().view(BITS[width])


def as_tensor(array: np.ndarray, name: str) -> Tensor:
    """The tensor of that type over the memory of a contiguous array of unsigned integers."""
    kinds = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
    return torch.from_numpy(array.view(kinds[BYTES[name]])).view(TORCH[name])
