"""Do joint bands of impulse responses hold? Simulated coverage of hakari's and of its rivals'.

Each design of `lp_designs.py` has known responses. In each sample every method gives a band for
all horizons; what counts is the share of samples in which the whole true response is inside
(joint), and beside it the share of horizons (pointwise), the bands' mean width, bias and RMSE of
the centre. hakari's lines differ in prior and calibration; `pointwise` puts quantiles in place of
the sup-t band and must fail. The rivals, on the same samples: least squares with Newey-West and
with HC3 errors, smooth local projections (Barnichon and Brownlees, 2019), a Gaussian pseudo-
likelihood, and its sandwich (Müller, 2013). No rival here takes an instrument.

    python benchmarks/lp_coverage.py [--replications 400] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import joblib
import lp_designs as designs
import lp_rivals as rivals
import numpy as np
from matplotlib.figure import Figure
from numpy import ndarray
from numpy.random import Generator, SeedSequence, default_rng

import hakari.inference as hi
from hakari.inference.bands import band

LEVELS = (0.68, 0.9, 0.95)
H = 24
DRAWS = 1000
SEED = 20260901
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("hakari", "numpy", "scipy", "numba")


@dataclass(frozen=True)
class Bands:
    """A method's answer: centre (Q,) and a band (lower, upper) at each of `LEVELS`."""

    centre: ndarray
    ends: dict[float, tuple[ndarray, ndarray]]


Method = Callable[[hi.LocalProjection, int], Bands]


def cells(quick: bool) -> list[tuple[designs.Design, int]]:
    """(design, T) of the study."""
    if quick:
        return [(designs.var1(0.9, H), 200)]
    var, iv = designs.var1(0.9, H), designs.lp_iv(0.9, H, 0.4)
    both = [(design, T) for design in (var, iv, late_hump(H)) for T in (200, 500)]
    more = [
        designs.var1(0.97, H),
        designs.var4(0.9, H),
        designs.arma(6, horizons=H),
        designs.var1(0.9, H, heteroskedastic=True),
        designs.lp_iv(0.9, H, 0.4, contaminated=True),
        designs.states(horizons=H),
    ]
    return [*both, *((design, 200) for design in more)]


def late_hump(horizons: int) -> designs.Design:
    """AR(1) noise and a response that is nothing but a hump of height 1 two thirds out.

    No VAR of few lags has it, and a prior that expects responses to settle early denies it.
    """
    peak = 2 * horizons / 3
    truth = np.exp(-0.5 * ((np.arange(horizons + 1) - peak) / (horizons / 9)) ** 2)

    def make(generator: Generator, T: int) -> dict[str, ndarray]:
        shock, noise = generator.standard_normal((2, T + 200))
        level = np.convolve(shock, truth)[: T + 200]
        own = designs.accumulate(np.array([[0.8]]), noise[:, None])[:, 0]
        return {"y": (level + own)[200:], "shock": shock[200:]}

    return designs.Design(f"late hump, H = {horizons}", make, truth, ("y",), 3)


def projection(design: designs.Design, columns: dict[str, ndarray]) -> hi.LocalProjection:
    """The projection of a sample, lag-augmented, as a user would write it."""
    iv = design.instrument is not None
    return hi.LocalProjection(
        columns,
        "y",
        design.shock,
        [design.instrument] if iv else None,
        [name for name in design.series if name not in ("y", design.shock)],
        lags=design.lags + 1,
        horizons=design.truth.shape[-1] - 1,
        shock_lags=None if iv else 0,
        state=None if design.regime is None else f"l({design.regime}, 1)",
    )


# --- methods ------------------------------------------------------------------------------


def ours(
    prior: Any,
    covariance: str = "hc3",
    kind: str = "sup-t",
    calibrated: bool = False,
    shrinkage: str = "auto",
) -> Method:
    """A line of hakari: the posterior sampled, the band of its draws."""

    def answer(lp: hi.LocalProjection, seed: int) -> Bands:
        posterior = lp.posterior(prior, covariance, shrinkage=shrinkage)  # type: ignore[arg-type]
        if calibrated:
            posterior = posterior.calibrate(replications=100, seed=seed)
        result = hi.sample(posterior, draws=DRAWS, chains=1, seed=seed)
        draws = lp.impulse_response(result).draws[:, 0]  # (N, S, H)
        ends = {}
        for level in LEVELS:
            found = [band(draws[:, s], level, kind) for s in range(draws.shape[1])]
            ends[level] = (
                np.concatenate([b.lower for b in found]),
                np.concatenate([b.upper for b in found]),
            )
        return Bands(draws.mean(axis=0).ravel(), ends)

    return answer


def theirs(method: Callable[..., rivals.Answer], **options: Any) -> Method:
    """A line of a rival, on the outcomes, shock and controls of the same projection."""

    def answer(lp: hi.LocalProjection, seed: int) -> Bands:
        rows = lp.parts[0].rows
        arrays = (lp.design.outcomes[rows, 0], lp.design.shocks[rows, 0], lp.design.controls[rows])
        noise = default_rng(seed).standard_normal((DRAWS, lp.shape[2]))
        found = {
            level: method(*arrays, level, noise, **options)
            if method is not rivals.pseudo_likelihood
            else method(*arrays, level)
            for level in LEVELS
        }
        return Bands(found[0.9].mean, {k: (f.lower, f.upper) for k, f in found.items()})

    return answer


FLAT, ROUGH, LOG = hi.Flat(), hi.RoughnessPenalty(), hi.RoughnessPenalty(spacing="log")
OURS: dict[str, Method] = {
    "flat": ours(FLAT),
    "flat, calibrated": ours(FLAT, calibrated=True),
    "flat, hac": ours(FLAT, "hac"),
    "flat, hac:25": ours(FLAT, "hac:25"),
    "flat, pointwise": ours(FLAT, kind="pointwise"),
    "roughness": ours(ROUGH),
    "roughness, calibrated": ours(ROUGH, calibrated=True),
    "roughness, log, calibrated": ours(LOG, calibrated=True),
    "roughness, factor, calibrated": ours(ROUGH, calibrated=True, shrinkage="none"),
}
THEIRS: dict[str, Method] = {
    "least squares, Newey-West": theirs(rivals.frequentist, kind="hac"),
    "least squares, HC3": theirs(rivals.frequentist, kind="hc3"),
    "smooth LP": theirs(rivals.smooth),
    "pseudo-likelihood": theirs(rivals.pseudo_likelihood),
    "sandwich": theirs(rivals.sandwich),
}


def methods(design: designs.Design) -> dict[str, Method]:
    """Those that fit a design: no rival has instruments or states, no bootstrap has states."""
    if design.regime is not None:
        return {name: m for name, m in OURS.items() if "calibrated" not in name}
    return OURS if design.instrument is not None else OURS | THEIRS


# --- the study ----------------------------------------------------------------------------


def study(
    design: designs.Design, T: int, replications: int, chosen: Iterable[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Coverage, width, bias and RMSE of each method over samples of a design."""
    every = methods(design)
    names = list(chosen or every)
    # by words, so that a sample does not depend on which other designs are studied
    roots = SeedSequence([SEED, T, *design.name.encode()]).spawn(replications)
    work = joblib.delayed(_one)
    found = joblib.Parallel(n_jobs=-1)(work(design, T, root, names) for root in roots)
    # by regime, a projection's responses to the shock in the state come first
    truth = design.truth[::-1] if design.regime else design.truth[None]
    return {name: _summary([one[name] for one in found], truth) for name in names}


def _one(design: designs.Design, T: int, root: SeedSequence, names: list[str]) -> dict[str, Bands]:
    generator: Generator = default_rng(root)
    lp = projection(design, design.make(generator, T))
    seed = int(generator.integers(2**31))
    every = methods(design)
    return {name: every[name](lp, seed) for name in names}


def _summary(found: list[Bands], paths: ndarray) -> dict[str, Any]:
    """Joint is of each of the paths (S, H + 1): a band is over the horizons of one."""
    truth = paths.ravel()
    centre = np.stack([one.centre for one in found])
    out: dict[str, Any] = {
        "bias": float(np.abs((centre - truth).mean(axis=0)).mean()),
        "rmse": float(np.sqrt(((centre - truth) ** 2).mean())),
        "joint": {},
        "pointwise": {},
        "width": {},
    }
    for level in LEVELS:
        lower, upper = (np.stack([one.ends[level][i] for one in found]) for i in (0, 1))
        inside = (lower <= truth + 1e-12) & (truth - 1e-12 <= upper)
        out["joint"][f"{level:g}"] = float(inside.reshape(-1, paths.shape[1]).all(axis=1).mean())
        out["pointwise"][f"{level:g}"] = float(inside.mean())
        out["width"][f"{level:g}"] = float((upper - lower).mean())
    return out


# --- output -------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="one design, 40 samples")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    count = 40 if options.quick else options.replications
    options.out.mkdir(parents=True, exist_ok=True)
    table, began = [], perf_counter()
    for design, T in cells(options.quick):
        found = study(design, T, count)
        table.append({"design": design.name, "T": T, "H": design.truth.shape[-1] - 1, **found})
        _print(table[-1])
    record = {
        "what": "joint coverage of bands of impulse responses",
        "replications": count,
        "binomial_error_at_0.9": float(np.sqrt(0.09 / count)),
        "draws": DRAWS,
        "bootstrap_samples": 100,
        "seconds": round(perf_counter() - began),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cells": [
            {k: c[k] for k in ("design", "T", "H")}
            | {"methods": {k: v for k, v in c.items() if k not in ("design", "T", "H")}}
            for c in table
        ],
    }
    (options.out / "lp_coverage.json").write_text(json.dumps(record, indent=1) + "\n")
    picture(record).savefig(options.out / "lp_coverage.png", dpi=150)


def _print(cell: dict[str, Any]) -> None:
    print(f"\n{cell['design']}, T = {cell['T']}, H = {cell['H']}")
    print(f"{'':38}" + "".join(f"{f'joint {level:g}':>12}" for level in LEVELS), end="")
    print(f"{'share inside':>14}{'width .9':>10}{'bias':>8}{'rmse':>8}")
    for name, one in cell.items():
        if isinstance(one, dict):
            print(f"{name:38}" + "".join(f"{one['joint'][f'{k:g}']:12.3f}" for k in LEVELS), end="")
            print(f"{one['pointwise']['0.9']:14.3f}{one['width']['0.9']:10.2f}", end="")
            print(f"{one['bias']:8.3f}{one['rmse']:8.3f}", flush=True)


def picture(record: dict[str, Any]) -> Figure:
    """Joint coverage of 90 % bands against their width, a panel a cell."""
    shown = record["cells"]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.9 * columns + 1.6, 2.6 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = [*OURS, *THEIRS]
    marks = dict(zip(names, "os^<xD*pvPhH>d", strict=False))
    for axis, cell in zip(axes, shown, strict=False):
        base = cell["methods"]["flat"]["width"]["0.9"]
        axis.axhspan(0.9 - 1.64 * record["binomial_error_at_0.9"], 1.0, color="#e2e2e2", lw=0)
        axis.axhline(0.9, color="#222222", lw=0.8)
        for name, one in cell["methods"].items():
            colour = "#0072B2" if name in OURS else "#D55E00"
            axis.plot(
                one["width"]["0.9"] / base, one["joint"]["0.9"], marks[name],
                color=colour, ms=6, mfc="none" if "calibrated" not in name else colour, label=name,
            )  # fmt: skip
        axis.set_title(f"{cell['design']}\nT = {cell['T']}, H = {cell['H']}", fontsize=9)
        axis.set_ylim(-0.03, 1.03)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    figure.supxlabel("mean width of the band, over that of the flat posterior", fontsize=10)
    figure.supylabel("joint coverage of 90 % bands", fontsize=10)
    found = {}
    for axis in axes:
        found |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside right upper", frameon=False, fontsize=8
    )
    return figure


if __name__ == "__main__":
    main()
