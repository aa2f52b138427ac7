"""Save, load and convert beside torch DCP, torch.save, safetensors and DeepSpeed, in one run.

    python benchmarks/checkpoint.py [--quick] [--part save|convert|all] [--out FOLDER]

save: a model with AdamW states in float32 under FSDP2 on two gloo processes that share a disk.
`blocking` is what the training loop waits, `total` until the checkpoint is on disk; every library
flushes to disk. torch.save and safetensors gather everything on one process first, as their users
do. Loads are timed with the files in the page cache and without. `memory` is by how much the peak
resident memory of the process that needs most exceeds what it had before, its writer included.

convert: a ZeRO checkpoint that DeepSpeed itself writes on two processes, by its own
`ds_to_universal` and by hakari (whole commands, and once the modules are loaded), beside `cp` and
fsync of the same files. Needs an interpreter with
DeepSpeed: HAKARI_DEEPSPEED_PYTHON=/path/to/python (pip install torch deepspeed==0.19.0).

All in turns, so that a busy moment meets all; a ratio is the median over the rounds of the ratio
within a round. Writes results/checkpoint.json and results/checkpoint.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hakari.training.checkpoint as ckpt

PROCESSES = 2
PACKAGES = ["hakari", "torch", "safetensors", "zlib-ng"]
RESULTS = Path(__file__).parent / "results"
Answer = dict[str, Any]
INSIDE = """
import sys, time
import hakari.training.checkpoint as ckpt
import hakari.training.checkpoint.foreign.deepspeed
convert, open_any = ckpt.convert, ckpt.open_any
begun = time.perf_counter()
convert(open_any(sys.argv[1]), sys.argv[2])
print(time.perf_counter() - begun)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small; writes only with --out")
    parser.add_argument("--part", choices=["all", "save", "convert"], default="all")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    options = parser.parse_args()
    if os.getloadavg()[0] > 1:
        Console().print(f"load average {os.getloadavg()[0]:.1f}: others' work blurs the timings")
    out = options.out or (None if options.quick else RESULTS)
    file = out / "checkpoint.json" if out else None
    report = json.loads(file.read_text()) if file and file.exists() else {}
    report |= {"command": "python benchmarks/checkpoint.py" + " --quick" * options.quick}
    report |= {"device": device()}
    layers, rounds = (6, 2) if options.quick else (60, 5)
    with TemporaryDirectory(dir=options.scratch) as scratch:
        if options.part != "convert":
            report["save"] = saves(Path(scratch), layers, rounds)
        if options.part != "save" and os.environ.get("HAKARI_DEEPSPEED_PYTHON"):
            report["convert"] = conversions(Path(scratch), layers, rounds)
    report["goals"] = goals(report)
    show(report)
    if out and file:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        plot(report, out / "checkpoint.png")


def device() -> Answer:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": (names or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


# --- save and load ------------------------------------------------------------------------


def saves(scratch: Path, layers: int, rounds: int) -> Answer:
    """Every library in turns; the slower of the processes counts."""
    file = scratch / "answer.json"
    mp.spawn(on_rank, (str(scratch), layers, rounds, str(file)), PROCESSES)
    return dict(json.loads(file.read_text()))


def on_rank(rank: int, scratch: str, layers: int, rounds: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=PROCESSES
    )
    try:
        model, optimizer = state(layers)
        size = 12 * sum(p.numel() for p in model.parameters())
        answer = {"bytes": size, "processes": PROCESSES, "rounds": [], "step": step_time(model)}
        for number in range(rounds + 1):
            found = one_round(model, optimizer, Path(scratch) / f"round-{number}")
            if number:  # the first one warms up
                answer["rounds"].append(found)
        if rank == 0:
            Path(file).write_text(json.dumps(answer))
    finally:
        dist.destroy_process_group()


class Residual(nn.Module):
    """An embedding and residual layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32_000, 512)
        self.layers = nn.ModuleList(nn.Linear(512, 2048) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(512) for _ in range(layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of tokens."""
        x = self.embed(tokens)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x)).unflatten(-1, (4, 512)).sum(-2)
        return x


def state(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded model and AdamW with all its states."""
    torch.manual_seed(1)
    model = Residual(layers)
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("data",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def step_time(model: nn.Module) -> float:
    """Seconds of a forward and backward pass of 2,048 tokens a process."""
    tokens = torch.randint(32_000, (4, 512))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        model(tokens).square().mean().backward()
        times.append(slowest(time.perf_counter() - begun))
    model.zero_grad()
    return median(times)


def one_round(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Answer:
    """Seconds, bytes and memory of each library, alternating."""
    found: Answer = {}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found["hakari"] = measured(lambda: ckpt.save(folder / "h", model, optimizer, step=1))
    found["DCP"] = measured(lambda: dcp_save(model, optimizer, folder / "dcp"))
    found["torch.save"] = measured(lambda: full(model, optimizer, folder / "t.pt", whole))
    found["safetensors"] = measured(lambda: full(model, optimizer, folder / "s.safetensors", whole))
    found["hakari, background"] = measured(
        lambda: ckpt.save(folder / "h", model, optimizer, step=2, asynchronous=True),
        lambda save: save.wait(),
    )
    found["DCP, background"] = measured(
        lambda: dcp_save(model, optimizer, folder / "dcp-async", True), lambda save: save.result()
    )
    found["copy"] = measured(lambda: copied(model, optimizer))
    found["load"] = loads(model, optimizer, folder, whole)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    return found


def loads(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, whole: StateDictOptions
) -> Answer:
    calls: dict[str, Callable[[], Any]] = {
        "hakari": lambda: ckpt.load(folder / "h", model, optimizer),
        "DCP": lambda: dcp_load(model, optimizer, folder / "dcp"),
        "torch.save": lambda: full_load(model, optimizer, folder / "t.pt", whole),
    }
    found: Answer = {}
    for name, call in calls.items():
        found[name] = {"cached": measured(call)}
        if dropped(folder):
            found[name]["from disk"] = measured(call)
    return found


def measured(call: Callable[[], Any], then: Callable[[Any], Any] | None = None) -> Answer:
    """Seconds until `call` and until `then` return, and growth of memory, the slowest rank's."""
    dist.barrier()
    os.sync()
    before = reset_peak()
    begun = time.perf_counter()
    result = call()
    blocking = time.perf_counter() - begun
    if then:
        then(result)
    total = time.perf_counter() - begun
    grown = peak() - before
    del result
    return {"blocking": slowest(blocking), "total": slowest(total), "memory": slowest(grown)}


def slowest(value: float) -> float:
    told = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.item()


def reset_peak() -> int:
    for process in family():
        Path(f"/proc/{process}/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Peak resident bytes of this process and of those that it started."""
    found = 0
    for process in family():
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                found += int(line.split()[1]) * 1024
    return found


def family() -> list[int]:
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    return [me, *map(int, children)]


def dropped(folder: Path) -> bool:
    """Whether the files could be taken out of the page cache."""
    dist.barrier()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()
    return True


def dcp_save(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, background: bool = False
) -> Any:
    weights, states = get_state_dict(model, optimizer)
    tree = {"model": weights, "optimizer": states}
    save = dcp.async_save if background else dcp.save
    return save(tree, checkpoint_id=path)


def dcp_load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    weights, states = get_state_dict(model, optimizer)
    tree = {"model": weights, "optimizer": states}
    dcp.load(tree, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=tree["optimizer"])


def full(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, whole: StateDictOptions
) -> None:
    """Gather all on rank 0 and write one file."""
    weights, states = get_state_dict(model, optimizer, options=whole)
    if dist.get_rank() == 0:
        if path.suffix == ".pt":
            torch.save({"model": weights, "optimizer": states}, path)
        else:
            from safetensors.torch import save_file

            flat = {
                f"{key}/{name}": value
                for name, entry in states["state"].items()
                for key, value in entry.items()
            }
            save_file({**weights, **flat}, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    dist.barrier()


def full_load(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, whole: StateDictOptions
) -> None:
    tree = torch.load(path, mmap=True, weights_only=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tree["model"],
        optim_state_dict=tree["optimizer"],
        options=whole,
    )


BUFFERS: list[torch.Tensor] = []


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A copy of all local tensors into memory that is there already: what a snapshot must cost."""
    tensors = [p.to_local() for p in model.parameters()]
    tensors += [
        value.to_local() if hasattr(value, "to_local") else value
        for entry in optimizer.state.values()
        for value in entry.values()
    ]
    if not BUFFERS:
        BUFFERS.extend(torch.empty_like(tensor).copy_(tensor) for tensor in tensors)
    for buffer, tensor in zip(BUFFERS, tensors, strict=True):
        buffer.copy_(tensor)


# --- convert ------------------------------------------------------------------------------


def conversions(scratch: Path, layers: int, rounds: int) -> Answer:
    """DeepSpeed's converter, hakari's and cp, in turns, of a checkpoint that DeepSpeed wrote."""
    python = os.environ["HAKARI_DEEPSPEED_PYTHON"]
    script = Path(__file__).parent / "deepspeed_checkpoint.py"
    zero = scratch / "zero"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([python, script, "write", zero, str(layers)], check=True, **quiet)
    files = [path for path in zero.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    answer: Answer = {"bytes": size, "rounds": []}
    for number in range(rounds):
        here = scratch / f"convert-{number}"
        here.mkdir()
        answer["rounds"].append(convert_once(python, script, zero, here) | {"copied_bytes": size})
        shutil.rmtree(here)
    return answer


def convert_once(python: str, script: Path, zero: Path, here: Path) -> Answer:
    """Seconds of whole commands, and how much each wrote."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    inside = [sys.executable, "-c", INSIDE, zero, here / "inside"]
    ours = [Path(sys.executable).parent / "hakari", "checkpoint", "convert", zero, here / "hakari"]
    theirs = [python, script, "universal", zero, here / "ds"]
    return {
        "ds_to_universal": seconds(lambda: subprocess.run(theirs, check=True, **quiet)),
        "hakari": seconds(lambda: subprocess.run(ours, check=True, **quiet)),
        "hakari, started": float(subprocess.run(inside, check=True, capture_output=True).stdout),
        "cp": seconds(lambda: copy_files(zero, here / "cp")),
        "hakari_bytes": used(here / "hakari"),
        "ds_to_universal_bytes": used(here / "ds"),
    }


def seconds(call: Callable[[], Any]) -> float:
    os.sync()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_files(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


# --- what is shown ------------------------------------------------------------------------


def ratios(rounds: list[Answer], path: list[str], peer: list[str]) -> float:
    """Median over the rounds of one figure over another."""
    return median(_at(found, path) / _at(found, peer) for found in rounds)


def _at(found: Answer, path: list[str]) -> float:
    for name in path:
        found = found[name]
    return float(found)  # type: ignore[arg-type]


def goals(report: Answer) -> list[Answer]:
    """Every goal beside what was measured."""
    found = []

    def add(name: str, got: float, goal: float, most: bool = True) -> None:
        met = got <= goal if most else got >= goal
        found.append({"name": name, "got": got, "goal": goal, "most": most, "met": met})

    if "save" in report:
        rounds, step = report["save"]["rounds"], report["save"]["step"]
        add("save, of DCP's time", ratios(rounds, ["hakari", "total"], ["DCP", "total"]), 1.1)
        for how in ("cached", "from disk"):
            ours, theirs = (["load", name, how, "total"] for name in ("hakari", "DCP"))
            add(f"load {how}, of DCP's time", ratios(rounds, ours, theirs), 1.1)
        waits = [
            (found["hakari, background"]["blocking"] - found["copy"]["total"]) / step
            for found in rounds
        ]
        add("background save blocks, beyond the copy, of a step", median(waits), 0.05)
    if "convert" in report:
        rounds = report["convert"]["rounds"]
        add(
            "convert, times as fast as ds_to_universal",
            ratios(rounds, ["ds_to_universal"], ["hakari"]),
            5.0,
            most=False,
        )
        rate = median(
            (found["hakari_bytes"] / found["hakari, started"])
            / (found["copied_bytes"] / found["cp"])
            for found in rounds
        )
        add("convert, bytes per second of cp and fsync", rate, 0.8, most=False)
    return found


def show(report: Answer) -> None:
    """The tables on the terminal."""
    console = Console()
    if "save" in report:
        rounds, size = report["save"]["rounds"], report["save"]["bytes"]
        table = Table(
            *("", "blocking s", "total s", "GB/s", "memory MB"),
            title=f"{size / 1e9:.2f} GB of state on {report['save']['processes']} processes",
        )
        rows = {name: [f[name] for f in rounds] for name in rounds[0] if name != "load"}
        for name, how in rounds[0]["load"].items():
            for kind in how:
                rows[f"load, {kind}: {name}"] = [f["load"][name][kind] for f in rounds]
        for name, cells in rows.items():
            blocking, total, memory = (
                median(cell[key] for cell in cells) for key in ("blocking", "total", "memory")
            )
            speed = f"{size / total / 1e9:.2f}"
            table.add_row(name, f"{blocking:.2f}", f"{total:.2f}", speed, f"{memory / 1e6:,.0f}")
        console.print(table)
    if "convert" in report:
        table = Table("", "s", title=f"{report['convert']['bytes'] / 1e9:.2f} GB of ZeRO files")
        for name in ("ds_to_universal", "hakari", "hakari, started", "cp"):
            middle = median(found[name] for found in report["convert"]["rounds"])
            table.add_row(name, f"{middle:.2f}")
        console.print(table)
    for goal in report["goals"]:
        word, than = "met" if goal["met"] else "MISSED", "at most" if goal["most"] else "at least"
        console.print(f"{word}: {goal['name']}: {goal['got']:.2f}; goal {than} {goal['goal']}")


def plot(report: Answer, path: Path) -> None:
    """Seconds of each library: save, background save, loads, conversion."""
    from matplotlib.figure import Figure

    panels = _panels(report)
    columns = -(-len(panels) // 2)
    figure = Figure(figsize=(4.2 * columns, 4.6), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (title, bars) in zip(grid, panels.items(), strict=False):
        colours = ["C3" if name.startswith("hakari") else "0.6" for name in bars]
        drawn = axes.barh([*bars], [*bars.values()], color=colours)
        axes.bar_label(drawn, fmt="%.2f s", padding=2, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(right=1.3 * max(bars.values()))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("seconds", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)


def _panels(report: Answer) -> dict[str, dict[str, float]]:
    """Title of a panel -> library -> median seconds."""
    panels: dict[str, dict[str, float]] = {}
    if "save" in report:
        rounds = report["save"]["rounds"]
        for title, part, names in (
            ("save, until on disk", "total", ("hakari", "DCP", "torch.save", "safetensors")),
            (
                "save in the background: training waits",
                "blocking",
                ("hakari, background", "DCP, background", "copy"),
            ),
        ):
            panels[title] = {n: median(f[n][part] for f in rounds) for n in names}
        for how in ("cached", "from disk"):
            panels[f"load, {how}"] = {
                name: median(f["load"][name][how]["total"] for f in rounds)
                for name in rounds[0]["load"]
            }
    if "convert" in report:
        panels["convert a ZeRO checkpoint"] = {
            name: median(found[name] for found in report["convert"]["rounds"])
            for name in ("hakari", "hakari, started", "ds_to_universal", "cp")
        }
    return panels


if __name__ == "__main__":
    main()
