"""What a mixture of experts costs: one layer beside its peers, a whole model beside a dense one.

    python benchmarks/moe.py [--quick] [--part layer|model] [--out FOLDER]

Layer: forward and backward of top-2 SwiGLU experts with the same input, routing and weights
(checked: same output), without the router. `dense` is one SwiGLU as wide as the two experts, the
same multiply-adds; `unbind loop` the fastest loop over experts we know in plain autograd
(a loop that indexes w[e] is many times slower: each gradient has the size of all experts);
`grouped_mm` hakari's composable parts, which is what other devices run; `transformers` its own
Mixtral experts, the same code as Phi-MoE's, by its eager loop and by its grouped_mm.
Loads: even, where experts are equally likely, and skewed, where expert i has odds 1 / i.

Model: tokens per second of hakari's training step at equal active parameters, on random tokens.

All are timed in turns, so that a busy moment meets all; a ratio is the median over the rounds of
the ratio within a round. Two threads. Writes results/moe.json and results/moe.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hakari.training.moe.estimators import ESTIMATORS, combine
from hakari.training.moe.experts import dispatch, expert_mlp, gather, grouped_matmul
from hakari.training.moe.router import Routing

SHAPES = [(2048, 256, 256, 8), (1024, 512, 512, 16), (2048, 256, 128, 64)]  # T, D, F, E
MODELS = [(8, 256), (64, 128)]  # E, F
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOADS = {"even": 0.0, "skewed": 1.0}
TOP_K, SEED = 2, 20260801
BATCH, LENGTH = 8, 256  # of the models
PARTS = {"step": "whole step", "passes": "forward and backward"}
GOALS = {  # (peer, E, dtype): at least; 1.0 of the loop everywhere besides
    ("dense", 8, "float32"): 0.85,
    ("transformers eager", 64, "float32"): 3.0,
}
PACKAGES = ["hakari", "torch", "transformers"]
RESULTS = Path(__file__).parent / "results"
Answer = dict[str, Any]
Layer = Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats; writes only with --out")
    parser.add_argument("--part", choices=["all", "layer", "model"], default="all")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/ beside the script")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if os.getloadavg()[0] > 1:
        Console().print(
            f"load average {os.getloadavg()[0]:.1f}: others' work will blur the timings"
        )
    out = options.out or (None if options.quick else RESULTS)
    earlier = json.loads((out / "moe.json").read_text()) if out and options.part != "all" else {}
    repeats = 3 if options.quick else 15
    report = earlier | {
        "command": "python benchmarks/moe.py" + " --quick" * options.quick,
        "device": device(),
        "repeats": repeats,
    }
    if options.part != "model":
        report["layer"] = layers(repeats, options.quick)
    if options.part != "layer":
        report["model"] = models(repeats, options.quick)
    report["goals"] = goals(report)
    show(report)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "moe.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        plot(report, out / "moe.png")


# --- timing -------------------------------------------------------------------------------


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> Answer:
    """Milliseconds of each call in each of `repeats` rounds; a call fills about `seconds`."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    often = {}
    for name, call in calls.items():
        call()  # warm
        began = perf_counter()
        call()
        often[name] = max(1, round(seconds / (perf_counter() - began)))
    for _ in range(repeats):
        for name, call in calls.items():
            began = perf_counter()
            for _ in range(often[name]):
                call()
            rounds[name].append((perf_counter() - began) / often[name] * 1e3)
    return rounds


def summary(times: list[float], own: list[float]) -> Answer:
    """Median and least milliseconds; how many times as long as `own`, round by round."""
    ratio = median(time / mine for time, mine in zip(times, own, strict=True))
    return {"ms": median(times), "ms_least": min(times), "ratio": ratio}


def device() -> Answer:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": (names or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_1min": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


# --- one layer ----------------------------------------------------------------------------


def layers(repeats: int, quick: bool) -> list[Answer]:
    """Every shape, dtype and load."""
    cases = [(shape, dtype, load) for shape in SHAPES for dtype in DTYPES for load in LOADS]
    if quick:
        cases = [case for case in cases if case[0][3] != 16 and case[2] == "even"]
    return [layer(*shape, dtype, load, repeats) for shape, dtype, load in cases]


def layer(T: int, D: int, H: int, E: int, dtype: str, load: str, repeats: int) -> Answer:
    """All implementations on one problem."""
    torch.manual_seed(SEED)
    odds = torch.arange(1, E + 1).float() ** -LOADS[load]
    expert = torch.multinomial(odds.expand(T, E), TOP_K)
    make = partial(torch.randn, dtype=DTYPES[dtype])
    gate = torch.rand(T, TOP_K).softmax(1).requires_grad_()
    x, slope = make(T, D).requires_grad_(), make(T, D)
    weights = [(make(*s) / D**0.5).requires_grad_() for s in ((E, H, D), (E, H, D), (E, D, H))]
    wide = [
        (make(*s) / D**0.5).requires_grad_()
        for s in ((TOP_K * H, D), (TOP_K * H, D), (D, TOP_K * H))
    ]
    peers = {name: partial(peer, x, expert, gate, *weights) for name, peer in LAYERS.items()}
    for implementation in ("eager", "grouped_mm"):
        call, parameters = transformers_layer(implementation, weights)
        peers[f"transformers {implementation}"] = partial(call, x, expert, gate)
        weights = [*weights, *parameters]
    _check_equal(peers, 2e-2 if dtype == "bfloat16" else 1e-4)
    peers["dense"] = partial(dense, x, *wide)
    leaves = [x, gate, *weights, *wide]
    calls = {name: partial(forward_backward, peer, slope, leaves) for name, peer in peers.items()}
    most = int(torch.bincount(expert.flatten()).max()) * E / expert.numel()
    Console().print(f"T {T} D {D} F {H} E {E} {dtype} {load} ...")
    case = {"T": T, "D": D, "F": H, "E": E, "dtype": dtype, "load": load, "most_over_mean": most}
    rounds = in_turns(calls, repeats, seconds=0.05)
    return case | {"layers": {k: summary(v, rounds["hakari"]) for k, v in rounds.items()}}


def forward_backward(call: Callable[[], Tensor], slope: Tensor, leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
    call().backward(slope)


def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def hakari(x: Tensor, expert: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    return weighted(expert_mlp(x, expert, *weights), expert, gate)


def composed(
    x: Tensor, expert: Tensor, gate: Tensor, first: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Hakari's parts, one by one."""
    rows, ends, inverse = dispatch(x, expert, len(up))
    hidden = F.silu(grouped_matmul(rows, first, ends)) * grouped_matmul(rows, up, ends)
    output = gather(grouped_matmul(hidden, down, ends), inverse, *expert.shape)
    return weighted(output, expert, gate)


def unbind_loop(x: Tensor, expert: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
    """Sort, then each expert's rows through views of its weights."""
    rows, ends, inverse = dispatch(x, expert, len(weights[0]))
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    pieces = zip(rows.split(sizes), *(w.unbind(0) for w in weights), strict=True)
    output = torch.cat([dense(*piece) for piece in pieces])
    return weighted(gather(output, inverse, *expert.shape), expert, gate)


def weighted(output: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    """The sum over a token's experts, as hakari's layer takes it."""
    one = torch.ones_like(gate)
    return combine(output, Routing(expert, gate, one, one, one.bool(), False), ESTIMATORS["gshard"])


def transformers_layer(how: str, weights: list[Tensor]) -> tuple[Layer, list[Tensor]]:
    """Transformers' Mixtral experts with our weights, and their parameters."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    gate, up, down = weights[:3]
    config = MixtralConfig(
        hidden_size=gate.shape[2], intermediate_size=gate.shape[1], num_local_experts=len(gate)
    )
    config._experts_implementation = how
    experts = MixtralExperts(config).to(gate.dtype)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([gate, up], 1))
        experts.down_proj.copy_(down)

    def call(x: Tensor, expert: Tensor, scale: Tensor) -> Tensor:
        return experts(x, expert, scale.to(x.dtype))

    return call, list(experts.parameters())


LAYERS: dict[str, Layer] = {
    "hakari": hakari,
    "grouped_mm": composed,
    "unbind loop": unbind_loop,
}


def _check_equal(peers: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    with torch.no_grad():
        first, *others = (peer().double() for peer in peers.values())
    for name, other in zip(list(peers)[1:], others, strict=True):
        gap = float((other - first).norm() / first.norm())
        if not gap < tolerance:
            raise ValueError(f"{name} differs from hakari by {gap:.1e} of the norm")


# --- a whole model ------------------------------------------------------------------------


def models(repeats: int, quick: bool) -> list[Answer]:
    """MoE beside dense of the same active parameters, dimension 256, 4 layers."""
    from hakari.training.config import Parallel
    from hakari.training.parallel import make_mesh, start_processes

    start_processes("cpu")
    mesh = make_mesh(Parallel(), "cpu")
    cases = [(E, H, dtype) for E, H in MODELS for dtype in DTYPES]
    return [model(*case, mesh, repeats) for case in (cases[:1] if quick else cases)]


def model(E: int, H: int, dtype: str, mesh: Any, repeats: int) -> Answer:
    """Two models in turns: whole training steps, and forward and backward alone."""
    Console().print(f"model, E {E} F {H} {dtype} ...")
    calls: dict[str, Callable[[], Any]] = {}
    parameters = {}
    for name, experts in (("moe", E), ("dense", 0)):
        step, passes, parameters[name] = training(experts, H, dtype, mesh)
        calls |= {f"{name} step": step, f"{name} passes": passes}
    rounds = in_turns(calls, repeats, seconds=0.0)
    case = {"E": E, "F": H, "dtype": dtype, "parameters": parameters}
    for part in ("step", "passes"):
        moe, dense_ = rounds[f"moe {part}"], rounds[f"dense {part}"]
        case[part] = {"moe": summary(moe, moe), "dense": summary(dense_, moe)}
        for row in case[part].values():
            row["tokens_per_second"] = BATCH * LENGTH / row["ms"] * 1e3
    return case


def training(
    experts: int, hidden: int, dtype: str, mesh: Any
) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """A training step of a model on random tokens, its passes alone, its parameters."""
    from hakari.training.config import Config, Model, MoE, Optimizer
    from hakari.training.noise import token_keys
    from hakari.training.passes import Work
    from hakari.training.step import prepare, train_step

    sparse = MoE(experts=experts, top_k=TOP_K, hidden=hidden, dead_steps=0)
    size = Model(vocabulary=4096, dim=256, layers=4, heads=4, hidden=TOP_K * hidden, moe=sparse)
    optimizer = Optimizer(learning_rate=1e-4)
    config = Config(batch=BATCH, length=LENGTH, precision=dtype, model=size, optimizer=optimizer)
    trainer = prepare(config, mesh)
    draw = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(4096, (BATCH, LENGTH + 1), generator=draw)
    keys = token_keys(1, 0, torch.arange(BATCH * LENGTH).view(BATCH, LENGTH))
    work = Work(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, keys)

    def passes() -> None:
        trainer.optimizer.zero_grad()
        trainer.passes.train(work, torch.tensor(tokens[:, 1:].numel()))

    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    return partial(train_step, trainer, work, 0), passes, count


# --- what is shown ------------------------------------------------------------------------


def goals(report: Answer) -> list[Answer]:
    """Every goal beside what was measured, on the even load; the loop on all."""
    found = []
    for case in report.get("layer", []):
        for name, row in case["layers"].items():
            target = GOALS.get((name, case["E"], case["dtype"])) if case["load"] == "even" else None
            target = 1.0 if name == "unbind loop" else target
            if target:
                where = {key: case[key] for key in ("E", "dtype", "load")}
                met = row["ratio"] >= target
                found.append(
                    {"peer": name, **where, "goal": target, "got": row["ratio"], "met": met}
                )
    return found


def show(report: Answer) -> None:
    """The tables on the terminal."""
    console = Console()
    for case in report.get("layer", []):
        title = (
            f"T {case['T']}, D {case['D']}, F {case['F']}, E {case['E']}, {case['dtype']}, "
            f"{case['load']} load (most {case['most_over_mean']:.2f} of the mean)"
        )
        table = Table("layer", "ms", "least", "hakari is x as fast", title=title)
        for name, row in case["layers"].items():
            table.add_row(name, f"{row['ms']:.2f}", f"{row['ms_least']:.2f}", f"{row['ratio']:.2f}")
        console.print(table)
    for case in report.get("model", []):
        title = f"model, E {case['E']}, F {case['F']}, {case['dtype']}"
        table = Table("", "moe tokens/s", "dense tokens/s", "moe / dense", title=title)
        for part in ("step", "passes"):
            moe, dense_ = case[part]["moe"], case[part]["dense"]
            rates = (f"{row['tokens_per_second']:,.0f}" for row in (moe, dense_))
            table.add_row(part, *rates, f"{dense_['ratio']:.3f}")
        console.print(table)
    for goal in report["goals"]:
        word = "met" if goal["met"] else "MISSED"
        console.print(
            f"{word}: {goal['got']:.2f} of {goal['peer']}, E {goal['E']} {goal['dtype']} "
            f"{goal['load']}; goal {goal['goal']}"
        )


def plot(report: Answer, path: Path) -> None:
    """How many times as fast as each peer; tokens per second beside dense."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    cases = [case for case in report.get("layer", []) if case["load"] == "even"]
    names = [name for name in (cases[0]["layers"] if cases else []) if name != "hakari"]
    for index, name in enumerate(names):
        at = np.arange(len(cases)) + (index - len(names) / 2 + 0.5) * 0.16
        left.bar(at, [case["layers"][name]["ratio"] for case in cases], 0.15, label=name)
    left.axhline(1, color="black", linewidth=0.8)
    labels = [f"E {case['E']}\nD {case['D']}, F {case['F']}\n{case['dtype']}" for case in cases]
    left.set_xticks(range(len(cases)), labels, fontsize=8)
    left.set_yscale("log")
    left.set_ylabel("hakari is x times as fast")
    left.set_title("one layer, forward and backward, even load", fontsize=9)
    if names:
        left.legend(fontsize=8)
    models_ = report.get("model", [])
    for index, part in enumerate(("step", "passes")):
        heights = [case[part]["dense"]["ratio"] for case in models_]
        right.bar(np.arange(len(models_)) + index * 0.4 - 0.2, heights, 0.38, label=PARTS[part])
    right.set_xticks(
        range(len(models_)), [f"E {c['E']}, F {c['F']}\n{c['dtype']}" for c in models_], fontsize=8
    )
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("tokens/s of MoE over dense, equal active parameters")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
