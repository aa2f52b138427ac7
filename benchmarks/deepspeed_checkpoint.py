"""Run by checkpoint.py under an interpreter that has DeepSpeed 0.19: write a ZeRO checkpoint on
two CPU processes, or convert it by DeepSpeed's own `ds_to_universal`.

    python benchmarks/deepspeed_checkpoint.py write FOLDER LAYERS
    python benchmarks/deepspeed_checkpoint.py universal FOLDER TARGET
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.multiprocessing as mp
from torch import nn


def write(rank: int, folder: str, layers: int) -> None:
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641"}
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(32_000, 512), *(nn.Linear(512, 512) for _ in range(4 * layers))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.randint(32_000, (1, 64))).float().square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag="global_step1")


def universal(folder: str, target: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = [
        *("ds_to_universal", "--input_folder", str(Path(folder) / "global_step1")),
        *("--output_folder", target, "--num_extract_workers", "2", "--num_merge_workers", "2"),
        "--inject_missing_state",
    ]
    ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    if sys.argv[1] == "write":
        mp.spawn(write, (sys.argv[2], int(sys.argv[3])), 2)
    else:
        universal(*sys.argv[2:])
