"""Calibrated inference without a likelihood: quasi-posteriors of moment conditions."""

from hakari.inference.anderson_rubin import anderson_rubin
from hakari.inference.covariance import Covariance, parse_covariance
from hakari.inference.diagnostics import convergence_notes, multivariate_ess, summary
from hakari.inference.gmm import estimate
from hakari.inference.identification import tail
from hakari.inference.instruments import first_stage
from hakari.inference.moments import LinearMoments
from hakari.inference.posterior import QuasiPosterior
from hakari.inference.prior import Flat, Normal, StudentT
from hakari.inference.result import load, save
from hakari.inference.risks import expectile_moments, ridge_moments
from hakari.inference.sampling import sample
from hakari.inference.weak_prior import weak_prior

__all__ = [
    "Covariance",
    "Flat",
    "LinearMoments",
    "Normal",
    "QuasiPosterior",
    "StudentT",
    "anderson_rubin",
    "convergence_notes",
    "estimate",
    "expectile_moments",
    "first_stage",
    "load",
    "multivariate_ess",
    "parse_covariance",
    "ridge_moments",
    "sample",
    "save",
    "summary",
    "tail",
    "weak_prior",
]
