"""An analysis as plain data: the object of `--json`, and the run's `config.toml`."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hakari.inference.comparison import disagreement
from hakari.inference.diagnostics import draws_of
from hakari.inference.gmm import Statistic
from hakari.inference.instruments import weakness
from hakari.inference.iv import Analysis, Question
from hakari.inference.prior_text import describe_prior
from hakari.inference.verdict import verdict
from hakari.run import versions

PACKAGES = ("numpy", "scipy", "numba", "xarray", "arviz-stats", "linearmodels", "formulaic")


def record(analysis: Analysis) -> dict[str, Any]:
    """Everything that the tables show, as numbers; NaN and infinity where there is none."""
    moments, question = analysis.moments, analysis.question
    return {
        "formula": question.formula,
        "data": source(question),
        "rows": moments.n,
        "level": question.level,
        "covariance": str(moments.covariance),
        "prior": describe_prior(analysis.posterior.prior),
        "interrupted": analysis.interrupted,
        "verdict": verdict(analysis),
        "posterior": _posterior(analysis),
        "estimates": [_estimate(e) for e in analysis.estimates],
        "linearmodels_disagreement": disagreement(analysis.estimates),
        "first_stage": {s.name: _strength(s) for s in analysis.stages.stages},
        "weak_instruments": weakness(analysis.stages),
        "anderson_rubin": {
            "name": analysis.anderson_rubin.name,
            "level": analysis.anderson_rubin.level,
            "intervals": [list(piece) for piece in analysis.anderson_rubin.intervals],
            "note": analysis.anderson_rubin.note,
            "text": analysis.anderson_rubin.describe(),
        },
        "sensitivity": [_scaled(s, moments.names.parameters) for s in analysis.sensitivity],
        "sampler": _sampler(analysis),
        "notes": analysis.notes,
        "data_digest": moments.digest,
    }


def config(analysis: Analysis) -> dict[str, Any]:
    """Everything that repeats the run, resolved."""
    question, attributes = analysis.question, analysis.result.attrs
    return {
        "command": "iv",
        "model": {
            "formula": question.formula,
            "data": source(question),
            "rows": analysis.moments.n,
            "data_digest": analysis.moments.digest,
            "covariance": question.covariance,
            "covariance_resolved": str(analysis.moments.covariance),
            "centred": question.centred,
            "weights": question.weights,
            "missing": question.missing,
        },
        "posterior": {
            "prior": list(question.prior or ("weak",)),
            "prior_resolved": describe_prior(analysis.posterior.prior),
            "weighting": question.weighting,
            "determinant": question.determinant,
        },
        "sampler": {
            "method": question.method,
            "method_resolved": str(attributes["method"]),
            "why": str(attributes["why"]),
            "draws": question.draws,
            "chains": question.chains,
            "seed": int(attributes["seed"]),
        },
        "output": {"level": question.level, "interrupted": analysis.interrupted},
        "versions": versions(*PACKAGES),
    }


def source(question: Question) -> str:
    """What the data are called: a path as typed, a given name, or the kind of object."""
    data = question.data
    kind = f"a {type(data).__name__} in memory"
    return str(data) if isinstance(data, str | Path) else question.data_name or kind


def _posterior(analysis: Analysis) -> dict[str, dict[str, float]]:
    positive = (draws_of(analysis.result) > 0).mean(axis=(0, 1))
    labels = ["mean", "sd", "median", "lower", "upper", *analysis.summary.columns[5:]]
    return {
        str(name): dict(zip(labels, map(float, row), strict=True)) | {"positive": float(share)}
        for (name, row), share in zip(analysis.summary.iterrows(), positive, strict=True)
    }


def _estimate(estimate: Any) -> dict[str, Any]:
    columns = zip(estimate.names, estimate.theta, estimate.std_error, strict=True)
    return {
        "label": estimate.label,
        "source": estimate.source,
        "coefficients": {
            name: {"estimate": float(value), "std_error": float(error)}
            for name, value, error in columns
        },
        "J": _statistic(estimate.J),
        "note": estimate.note,
    }


def _statistic(found: Statistic) -> dict[str, Any]:
    return asdict(found)


def _strength(stage: Any) -> dict[str, Any]:
    tests = ("F", "F_robust", "F_effective", "F_conditional")
    return {"partial_r2": stage.partial_r2} | {t: _statistic(getattr(stage, t)) for t in tests}


def _scaled(one: Any, names: tuple[str, ...]) -> dict[str, Any]:
    columns = zip(names, one.mean, one.lower, one.upper, strict=True)
    return {
        "scale": "flat" if math.isinf(one.factor) else one.factor,
        "prior": one.prior,
        "asked": one.asked,
        "refused": one.refused,
        "notes": list(one.notes),
        "method": one.method,
        "coefficients": {
            name: {"mean": float(mean), "lower": float(lower), "upper": float(upper)}
            for name, mean, lower, upper in columns
        },
    }


def _sampler(analysis: Analysis) -> dict[str, Any]:
    attributes, checks = analysis.result.attrs, analysis.result["checks"].dataset
    kept = ("method", "why", "seed", "chains", "evaluations", "iterations", "weighting")
    return {name: attributes[name] for name in (*kept, "warmup_seconds", "sampling_seconds")} | {
        "draws": analysis.result["posterior"].sizes["draw"],
        "determinant": bool(attributes["determinant"]),
        "acceptance": checks["acceptance"].values.tolist(),
        "first_stage": checks["first_stage"].values.tolist(),
        "singular_proposals": checks["singular_proposals"].values.tolist(),
        "k_hat": float(checks["k_hat"]) if "k_hat" in checks else math.nan,
        "multivariate_ess": asdict(analysis.ess) | {"enough": analysis.ess.enough},
    }
