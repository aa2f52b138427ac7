"""How strong the instruments are, and what they say when they are weak.

First stages: partial R², F, robust F, the effective F of Montiel Olea and Pflueger (2013) and
the conditional F of Sanderson and Windmeijer (2016). Each first stage is itself a set of
linear moments (an endogenous variable on Z, with Z as its own instruments), so that every
covariance, and any size of data, comes with the sums of moments.py. The set of Anderson and
Rubin (1949) covers whether instruments are weak or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import solve_triangular
from scipy.stats import chi2, f, ncx2

from hakari.inference.covariance import Covariance, parse_covariance, products, unpack
from hakari.inference.design import Block, Names, stack_blocks
from hakari.inference.formula import parse_formula, read_blocks
from hakari.inference.gmm import Statistic
from hakari.inference.moments import LinearMoments
from hakari.inference.tables import Missing

BIAS = 0.10  # τ: the share of the worst case's bias that strong instruments may leave
SIZE = 0.05  # α: of the test that instruments are weak
RULE = 10.0
EXACT = "the instruments explain the variable exactly: it is not endogenous"
SINGULAR = 1e-12  # smallest over largest eigenvalue of a covariance that cannot be inverted


@dataclass(frozen=True)
class Strength:
    """The first stage of one endogenous variable; q excluded instruments, L in all.

    F: homoskedastic, F(q, n − L); F_robust: Wald statistic over q with the covariance asked
    for, uncorrected for degrees of freedom; F_effective: for a single endogenous variable,
    df its effective degrees of freedom, `critical` as the simplified procedure's, p-value of
    the hypothesis that instruments are weak; F_conditional: homoskedastic, given the other
    endogenous variables, F(q − others, n − L).
    """

    name: str
    partial_r2: float
    F: Statistic
    F_robust: Statistic
    F_effective: Statistic
    F_conditional: Statistic


@dataclass(frozen=True)
class FirstStage:
    """The first stages, one an endogenous variable; none in a regression without any."""

    stages: tuple[Strength, ...]
    instruments: tuple[str, ...]  # the excluded ones
    covariance: Covariance
    n: int


# --- first stages -------------------------------------------------------------------------


def first_stage(
    formula: str,
    data: Any,
    covariance: str | Covariance = "robust",
    *,
    weights: str | None = None,
    missing: Missing = "raise",
) -> FirstStage:
    """Strength of the instruments of `y ~ 1 + x + [endogenous ~ instruments]`; one pass.

    Arguments, and what is raised, as in `LinearMoments.from_formula`; also ValueError where
    the moments do not identify the parameters.

    >>> rng = np.random.default_rng(1)
    >>> table = {"z": rng.standard_normal(300), "y": rng.standard_normal(300)}
    >>> table["x"] = table["z"] + rng.standard_normal(300)
    >>> weakness(first_stage("y ~ 1 + [x ~ z]", table)) is None
    True
    """
    spec = parse_covariance(covariance)
    blocks = read_blocks(parse_formula(formula), data, weights, spec.column, missing)
    if spec.kind == "hac" and spec.bandwidth is None:  # chosen once, from all rows
        whole = list(blocks)
        blocks = iter([(whole[0][0], stack_blocks([block for _, block in whole]))])
    sums: list[LinearMoments] = []
    for found, block in blocks:
        part = _sums(found, block, spec)
        sums = [a + b for a, b in zip(sums, part, strict=True)] if sums else part
    return _first_stage(sums, found, spec)


def first_stage_arrays(
    X: Float[ndarray, "n K"],
    Z: Float[ndarray, "n L"],
    *,
    names: Sequence[str],
    instrument_names: Sequence[str],
    covariance: str | Covariance = "robust",
    weights: Float[ndarray, " n"] | None = None,
    clusters: Sequence[Any] | ndarray | None = None,
) -> FirstStage:
    """As `first_stage`, from the regressors and instruments of `LinearMoments.from_arrays`.

    names: of the K regressors; those that are not among instrument_names are endogenous.
    """
    endogenous = [name for name in names if name not in instrument_names]
    every = Names(tuple(names), tuple(instrument_names), tuple(endogenous))
    X, Z = np.asarray(X, dtype=float), np.asarray(Z, dtype=float)
    labels = None if clusters is None else np.asarray(clusters)
    spec = parse_covariance(covariance)
    return _first_stage(_sums(every, Block(X[:, 0], X, Z, weights, labels), spec), every, spec)


def _sums(names: Names, block: Block, spec: Covariance) -> list[LinearMoments]:
    """Moments of the model, for cross products only, and of each first stage."""
    where = [names.parameters.index(name) for name in names.endogenous]
    model = LinearMoments.from_arrays(
        block.X[:, where[0]] if where else block.y,
        block.X,
        block.Z,
        names=names.parameters,
        instrument_names=names.moments,
        covariance="iid",
        weights=block.weights,
    )
    return [model] + [
        LinearMoments.from_arrays(
            block.X[:, k],
            block.Z,
            names=names.moments,
            instrument_names=names.moments,
            covariance=spec,
            weights=block.weights,
            clusters=block.clusters,
        )
        for k in where
    ]


def _first_stage(sums: list[LinearMoments], names: Names, spec: Covariance) -> FirstStage:
    model, *stages = sums
    model.check()
    shared = [k for k, name in enumerate(names.moments) if name in names.parameters]
    excluded = tuple(n for n in names.moments if n not in names.parameters)
    cross, gram = _cross_products(model, shared) if stages else (np.empty(0), np.empty(0))
    found = []
    for j, (name, stage) in enumerate(zip(names.endogenous, stages, strict=True)):
        others = [k for k in range(len(stages)) if k != j]
        contrast = np.zeros(len(stages))
        contrast[j] = 1
        partial_r2, plain = _homoskedastic(model, cross, gram, contrast, 0)
        # δ of x_j on the other endogenous variables by two-stage least squares
        contrast[others] = -np.linalg.lstsq(cross[:, others], cross[:, j], rcond=None)[0]
        _, conditional = _homoskedastic(model, cross, gram, contrast, len(others))
        robust, effective = _with_covariance(stage, shared)
        if others:
            note = f"effective F is for one endogenous variable, here are {len(stages)}"
            effective = Statistic.unavailable(note)
        found.append(Strength(name, partial_r2, plain, robust, effective, conditional))
    return FirstStage(tuple(found), excluded, spec, model.n)


def _cross_products(model: LinearMoments, shared: list[int]) -> tuple[ndarray, ndarray]:
    """Partialled of the shared regressors: (q, E) of orthonormal instruments and endogenous
    variables, and (E, E) among the endogenous variables, both over n.
    """
    parameters, chosen = model.names.parameters, [model.names.moments[k] for k in shared]
    variables = np.linalg.inv(model.scale.right)[:, 1:]
    inner = variables[:, [parameters.index(name) for name in chosen]]
    outer = variables[:, [parameters.index(name) for name in model.names.endogenous]]
    gram = regression_gram(model)
    rest = partialled(gram, inner, outer)
    return orthonormal(model, shared).T @ model.mean_C @ outer, rest.T @ gram @ rest


def _homoskedastic(
    model: LinearMoments, cross: ndarray, gram: ndarray, contrast: ndarray, others: int
) -> tuple[float, Statistic]:
    """Partial R² and F of the combination Σ contrast_k x_k; Sanderson and Windmeijer's (2016)
    conditional F where the contrast has `others` estimated coefficients.
    """
    df, rest = len(cross) - others, model.n - model.L
    explained, total = float(((cross @ contrast) ** 2).sum()), float(contrast @ gram @ contrast)
    if not total - explained > 1e-13 * total:
        return explained / total, Statistic.unavailable(EXACT, df)
    value = explained / df / ((total - explained) / rest)
    p_value = float(f.sf(value, df, rest))
    return explained / total, Statistic(value, df, p_value, df_residual=rest)


def _with_covariance(stage: LinearMoments, shared: list[int]) -> tuple[Statistic, Statistic]:
    """Robust F and effective F of one first stage.

    With instruments orthonormal, as in Montiel Olea and Pflueger (2013), the coefficients
    are s = z'x/n, their covariance is W/n, W the moments' covariance at the residuals, and
    effective F is n s's / tr W.
    """
    dependent = np.linalg.inv(stage.scale.right)[:, :1]
    regressors = np.linalg.inv(stage.scale.right)[:, 1:]
    instruments = orthonormal(stage, shared)
    s = instruments.T @ stage.mean_C @ dependent[:, 0]
    residual = partialled(regression_gram(stage), regressors, dependent)[:, 0]
    omega = unpack(stage.tensor @ products(residual), stage.L)
    W = instruments.T @ omega @ instruments
    q = len(W)
    spectrum = np.linalg.eigvalsh(W)
    if not np.trace(W) > 1e-26 * (s @ s):
        return Statistic.unavailable(EXACT, q), Statistic.unavailable(EXACT)
    K_eff, critical = effective_critical_value(W)
    value = float(stage.n * (s @ s) / np.trace(W))
    p_value = float(ncx2.sf(value * K_eff, K_eff, K_eff / BIAS))
    effective = Statistic(value, K_eff, p_value, critical=critical)
    if spectrum[0] <= SINGULAR * spectrum[-1]:
        note = f"the covariance of the {q} coefficients is singular: too few clusters or rows"
        return Statistic.unavailable(note, q), effective
    wald = float(stage.n * (s @ np.linalg.solve(W, s)))
    return Statistic(wald / q, q, float(chi2.sf(wald, q))), effective


def effective_critical_value(
    W: Float[ndarray, "q q"], bias: float = BIAS, size: float = SIZE
) -> tuple[float, float]:
    """Effective degrees of freedom and critical value of the effective F.

    W: covariance of the moments of orthonormal instruments; bias: τ, the largest Nagar bias
    of two-stage least squares allowed, relative to the worst case; size: α of the test.
    Montiel Olea and Pflueger's (2013) simplified, conservative procedure: the bound on the
    bias, which depends on the errors' covariance, is replaced by its largest value, 1.

    >>> round(effective_critical_value(np.eye(1))[1], 1)
    23.1
    """
    x, trace = 1 / bias, float(np.trace(W))
    largest = float(np.linalg.eigvalsh(W)[-1])
    K_eff = trace**2 * (1 + 2 * x) / (float((W * W).sum()) + 2 * x * trace * largest)
    return K_eff, float(ncx2.isf(size, K_eff, K_eff * x)) / K_eff


def weakness(stages: FirstStage) -> str | None:
    """One plain sentence when instruments are weak, else None.

    One endogenous variable: effective F below its critical value, always above 10; several:
    a conditional F below 10, Staiger and Stock's (1997) rule of thumb.
    """
    weak = []
    for stage in stages.stages:
        single = len(stages.stages) == 1
        label = "effective" if single else "conditional"
        test = stage.F_effective if single else stage.F_conditional
        bar = test.critical if single else RULE
        if test.value < bar:
            weak.append(f"{stage.name} ({label} F {test.value:.3g}, below {bar:.3g})")
    if not weak:
        return None
    return (
        f"The instruments are weak for {' and '.join(weak)}: "
        "the quasi-posterior then leans on the prior, so compare several priors and the "
        "Anderson-Rubin set."
    )


def regression_gram(moments: LinearMoments) -> Float[ndarray, "P P"]:
    """Mean of (y, x)(y, x)' in working columns."""
    if moments.grams is None:
        raise ValueError("general moments have no regressors: make them with from_arrays")
    return moments.grams.regression / moments.n


def partialled(
    gram: Float[ndarray, "S S"], inner: Float[ndarray, "S A"], outer: Float[ndarray, "S B"]
) -> Float[ndarray, "S B"]:
    """The variables `outer` less their projections on `inner`."""
    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    size = np.linalg.norm(root @ inner, axis=0)
    coefficients = np.linalg.lstsq(root @ inner / size, root @ outer, rcond=None)[0]
    rest: ndarray = outer - inner / size @ coefficients
    return rest


def orthonormal(moments: LinearMoments, shared: list[int]) -> Float[ndarray, "L q"]:
    """The excluded instruments, partialled of the shared ones, with mean products I."""
    assert moments.grams is not None
    gram = moments.grams.instruments / moments.n
    every = np.linalg.inv(moments.scale.left).T
    excluded = [k for k in range(moments.L) if k not in shared]
    rest = partialled(gram, every[:, shared], every[:, excluded])
    size = np.sqrt((rest * (gram @ rest)).sum(axis=0))
    rest = rest / size
    root = np.linalg.cholesky(rest.T @ gram @ rest)
    orthonormal: ndarray = solve_triangular(root, rest.T, lower=True).T
    return orthonormal
