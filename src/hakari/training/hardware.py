"""The device a run is on: which, how fast at its best, how much memory it uses."""

from __future__ import annotations

import os
import re
import resource
import sys
import time

import torch

# dense bfloat16 matrix products, in flops a second, from the makers' data sheets
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def pick_device() -> torch.device:
    """The local accelerator of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What the device could do at most: the maker's figure, or the best of a few products.

    dtype: of the matrix products. A product of 1024 x 1024 stands for the peak of a CPU.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if re.search(rf"\b{known}\b", name):
                return peak
    side = 8192 if device.type == "cuda" else 1024
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
